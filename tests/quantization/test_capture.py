"""Calls of a model and its blocks are remembered, and made again with the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization._capture import Capture, outputs, repeated_blocks
from npu_fusion.quantization._replay import Call, main_input, main_output, snapshot


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None = None) -> tuple[Tensor, str]:
        if cache is not None:
            cache.append(x)
        return torch.tanh(self.linear(x)) * mask, "more"


class Model(nn.Module):
    """Blocks in a row; ``between`` is what happens to the hidden state from one to the next."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(8, 4)
        self.between: Any = lambda x: x
        self.skip: int | None = None

    def forward(self, x: Tensor, mask: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != self.skip:
                x, _ = block(x, mask=mask, cache=cache)
                x = self.between(x)
        return self.head(x)


def layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def capture(model: Model, passes: list[tuple[Tensor, Tensor]], **kwargs: Any) -> Capture:
    found = Capture(model, repeated_blocks(model, layers(model)), lambda: None)
    with torch.no_grad():
        for x, mask in passes:
            model(x, mask, **kwargs)
    found.remove()
    return found


def some_passes(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, 8, generator=generator), torch.rand(8, generator=generator)) for _ in range(count)
    ]


def test_blocks_are_the_container_with_the_most_layers() -> None:
    model = Model()
    model.tower = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    blocks = repeated_blocks(model, layers(model))
    assert blocks is not None
    assert blocks.names == ("blocks.0", "blocks.1", "blocks.2")
    assert blocks.modules == tuple(model.blocks)


def test_layers_that_are_members_themselves_are_no_blocks() -> None:
    model = nn.Module()
    model.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert repeated_blocks(model, layers(model)) is None
    assert repeated_blocks(nn.ModuleList([nn.Linear(2, 2)]), {"0"}) is None


def test_replayed_blocks_give_what_they_gave() -> None:
    torch.manual_seed(0)
    model, passes = Model(), some_passes()
    found = capture(model, passes)
    assert found.blocks is not None
    with torch.no_grad():
        hidden: list[Tensor | None] = [None, None]
        for index, block in enumerate(model.blocks):
            hidden = [*outputs(block, [one[index] for one in found.captured.blocks], hidden)]
        expected = [model(x, mask) for x, mask in passes]
        assert torch.equal(torch.stack([model.head(h) for h in hidden]), torch.stack(expected))
        assert torch.equal(found.captured.model[1].replay(model), expected[1])


def test_hidden_states_between_blocks_are_not_kept() -> None:
    found = capture(Model(), some_passes(1))
    first, second, third = found.captured.blocks[0]
    assert isinstance(first.args[0], Tensor) and first.hidden is None
    for later in (second, third):
        assert later.args == (None,) and later.hidden == 0
    assert second.kwargs["mask"] is first.kwargs["mask"] is third.kwargs["mask"], "one copy of what is shared"


def test_later_changes_of_inputs_and_caches_are_not_seen() -> None:
    torch.manual_seed(0)
    model, passes = Model(), some_passes(1)
    (x, mask), cache = passes[0], [torch.zeros(2, 8)]
    found = capture(model, passes, cache=cache)
    assert len(cache) == 4
    with torch.no_grad():
        expected = model(x.clone(), mask.clone())
        x.zero_(), mask.zero_(), cache.clear()
        call = found.captured.model[0]
        for _ in range(2):
            args, kwargs = call.arguments()
            assert len(kwargs["cache"]) == 1, "as it was before the pass, at every replay"
            assert torch.equal(model(*args, **kwargs), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "between", lambda x: x + 1),
        lambda model: setattr(model, "between", lambda x: x.clone()),
        lambda model: setattr(model, "skip", 1),
        lambda model: model.blocks.insert(1, model.blocks[0]),
    ],
    ids=["added to", "another tensor", "skipped", "called twice"],
)
def test_a_model_that_does_more_than_call_its_blocks_is_taken_as_a_whole(change: Any) -> None:
    model = Model()
    change(model)
    found = capture(model, some_passes())
    assert found.blocks is None
    assert found.captured.blocks == []
    assert len(found.captured.model) == 2


def test_a_pass_that_fails_does_not_count() -> None:
    model, counted = Model(), []
    found = Capture(model, repeated_blocks(model, layers(model)), lambda: counted.append(1))
    (x, mask), *_ = some_passes()
    with pytest.raises(RuntimeError):
        model(x, mask[:3])
    with torch.no_grad():
        model(x, mask)
    assert len(counted) == len(found.captured.model) == len(found.captured.blocks) == 1
    found.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_with_hooks_can_be_copied() -> None:
    model, counted = Model(), []
    found = Capture(model, repeated_blocks(model, layers(model)), lambda: counted.append(1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other(*some_passes()[0])
    assert found.captured.model == [], "the copy has a capture of its own"


def test_snapshots() -> None:
    x = torch.randn(3, requires_grad=True)
    text = {"a": (x, [x, 1, None]), "b": "text", "c": {1, 2}}
    copied = snapshot(text, {})
    assert copied is not text and copied["a"][0] is copied["a"][1][0]
    assert torch.equal(copied["a"][0], x) and not copied["a"][0].requires_grad
    assert copied["c"] == {1, 2} and copied["c"] is not text["c"]
    model = nn.Linear(2, 2)
    assert snapshot((model, torch.relu), {}) == (model, torch.relu)


def test_a_tensor_that_was_written_in_between_is_copied_again() -> None:
    x, memo = torch.zeros(3), {}
    first = snapshot(x, memo)
    x.add_(1)
    assert torch.equal(snapshot(x, memo), torch.ones(3)) and torch.equal(first, torch.zeros(3))


def test_tensors_of_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        copied = snapshot(torch.ones(2), {})
    assert not copied.is_inference()
    copied.add_(1)


class Holder:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_an_object_in_an_autograd_graph_is_an_error_that_says_what_to_do() -> None:
    x = torch.randn(2, requires_grad=True) * 2
    with pytest.raises(RuntimeError, match=r"a Holder .* run the forward passes under torch.no_grad\(\)"):
        snapshot(Holder(x), {})


def test_main_input_and_output() -> None:
    x, ids = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    assert main_input((ids, x), {}) == (1, x)
    assert main_input((ids,), {"hidden_states": x}) == ("hidden_states", x)
    assert main_input((ids,), {"flag": True}) is None
    assert main_output((x, 1)) is x and main_output(x) is x
    assert Call((None,), {"y": 1}, 0).arguments(x) == ((x,), {"y": 1})
