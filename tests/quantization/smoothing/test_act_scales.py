from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from npu_fusion.quantization.smoothing import get_act_scales


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.unused = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(input=self.drop(self.up(x * scale)))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def expected(model: Model, *inputs: Tensor) -> dict[str, Tensor]:
    rows = torch.cat([x.reshape(-1, 4) for x in inputs])
    with torch.no_grad():
        return {"up": rows.abs().amax(0), "down": model.up(rows).abs().amax(0)}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, scales in want.items():
        torch.testing.assert_close(got[name], scales.float(), rtol=1e-6, atol=0)


def test_the_running_maximum() -> None:
    model = Model()
    batches = [torch.randn(2, n, 4) for n in (3, 5, 1)]
    got = get_act_scales(model, batches)
    assert_equal(got, expected(model, *batches))
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in got.values())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4), min_size=1, max_size=6
    )
)
def test_order_and_split_of_batches_do_not_matter(rows: list[list[float]]) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    x = torch.tensor(rows)
    together = get_act_scales(model, [x])["0"]
    assert torch.equal(together, x.abs().amax(0))
    assert torch.equal(together, get_act_scales(model, list(x.flip(0)))["0"])


def test_what_a_model_is_called_with() -> None:
    model = Model()
    x = torch.randn(2, 3, 4)
    for batch in (x, (x, 2.0), [x, 2.0], {"x": x, "scale": 2.0}, {"x": x}):
        scale = 2.0 if len(batch) == 2 and not isinstance(batch, Tensor) else 1.0
        assert_equal(get_act_scales(model, [batch]), expected(model, x * scale))


def test_strided_and_empty_batches() -> None:
    model = Model()
    x = torch.randn(4, 3, 2).permute(2, 1, 0)
    assert_equal(get_act_scales(model, [x[:0], x, x[:, :0]]), expected(model, x))
    assert get_act_scales(model, [x[:0]]) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 2)).to(dtype)
    x = (1000 * torch.randn(5, 4)).to(dtype)
    got = get_act_scales(model, [x])["0"]
    assert got.dtype == torch.float32
    assert torch.equal(got, x.abs().amax(0).float())


def test_the_input_is_not_changed() -> None:
    x = torch.randn(2, 4)
    before = x.clone()
    get_act_scales(Model(), [x])
    assert torch.equal(x, before)


def test_modes_and_hooks_are_left_as_they_were() -> None:
    model = Model().train()
    model.up.eval()
    seen: list[Any] = []
    model.up.register_forward_pre_hook(lambda m, _: seen.append((model.training, torch.is_grad_enabled())))
    x = torch.randn(3, 4)
    got = get_act_scales(model, [x])
    assert seen == [(False, False)]
    assert_equal(got, expected(model, x))  # without dropout
    assert (model.training, model.up.training, model.drop.training, hooks(model)) == (True, False, True, 1)


def test_they_are_also_after_an_error() -> None:
    model = Model().train()
    with pytest.raises(RuntimeError):
        get_act_scales(model, [torch.randn(3, 4), torch.randn(3, 5)])
    assert model.training and hooks(model) == 0
    assert model(torch.randn(3, 4)).requires_grad


def test_a_shared_layer_has_all_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    x = torch.randn(3, 4)
    got = get_act_scales(model, [x])
    both = torch.cat([x, model[0](x).relu()]).abs().amax(0)
    assert got.keys() == {"0", "2"}
    assert torch.equal(got["0"], got["2"]) and torch.equal(got["0"], both)


def test_num_samples_ends_a_stream() -> None:
    def stream() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield torch.full((1, 4), float(len(taken)))

    taken: list[int] = []
    assert get_act_scales(Model(), stream(), num_samples=3)["up"].tolist() == [3.0] * 4
    assert len(taken) == 3
    assert get_act_scales(Model(), [torch.ones(1, 4)] * 2, num_samples=5)["up"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((len, []), {}, TypeError, "get_act_scales: model must be a torch.nn.Module, got builtin"),
        ((Model(), []), {}, ValueError, "get_act_scales: batches is empty"),
        ((Model(), [3]), {}, TypeError, "get_act_scales: a batch is a int; accepted: a tensor"),
        ((Model(), [torch.ones(4)]), {"num_samples": 0}, ValueError, "get_act_scales: num_samples is 0"),
        (
            (Model(), [torch.ones(4)]),
            {"num_samples": True},
            TypeError,
            "num_samples must be an int, got bool",
        ),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get_act_scales(*arguments, **options)


def test_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    get_act_scales(Model(), [torch.ones(1, 4)] * 3, progress=True)
    assert "activations" in capsys.readouterr().err
    get_act_scales(Model(), [torch.ones(1, 4)] * 3)  # stderr is no terminal here
    assert capsys.readouterr().err == ""
