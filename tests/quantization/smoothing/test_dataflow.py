from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.smoothing import trace
from npu_fusion.quantization.smoothing.dataflow import place


class Small(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.ReLU())
        self.run = run

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.c(self.inner(self.a(x) + self.b(x)) * scale) if self.run is None else self.run(self, x)


X = torch.randn(2, 3, 4)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def names(flow: Any) -> list[tuple[str, ...]]:
    return [tuple(flow.name(linear) for linear in group) for group in flow.groups()]


def test_who_read_what() -> None:
    model = Small()
    flow = trace(model, (X,), {"scale": 2.0})
    assert names(flow) == [("a", "b"), ("c",)]
    assert [flow.name(linear) for linear in flow.called()] == ["a", "b", "c"]
    assert flow.source(model.a) == "an input or a parameter of the traced module"
    assert flow.source(model.c) == "aten.mul"
    assert [step.name for step in flow.steps] == ["linear", "linear", "add", "relu", "mul", "linear"]
    assert [flow.describe(step) for step in flow.steps[:4]] == ["a", "b", "aten.add", "aten.relu in inner.1"]
    assert torch.equal(model.eval()(X, scale=2.0), model.c(2 * F.relu(model.a(X) + model.b(X))))


GROUPS: dict[str, tuple[Callable[[Any, Tensor], Any], list[tuple[str, ...]]]] = {
    "views": (lambda m, x: (m.a(x), m.b(x.view(6, 4)), m.c(x.transpose(0, 1))), [("a", "b", "c")]),
    "copies": (lambda m, x: (m.a(x), m.b(x.clone()), m.c(x.double().float()[None])), [("a", "b", "c")]),
    "rows": (lambda m, x: (m.a(x), m.b(x[:, :1]), m.c(x[:1])), [("a",), ("b",), ("c",)]),
    "same rows": (lambda m, x: (m.a(x), m.b(x[:, -1]), m.c(x[:, 2:])), [("a",), ("b", "c")]),
    "same values": (lambda m, x: (m.a(x), m.b(x + 0), m.c(x * 1)), [("a",), ("b",), ("c",)]),
    "twice": (lambda m, x: (m.a(x), m.b(y := -x), m.c(x), m.c(y)), [("a", "b", "c")]),
    "written": (lambda m, x: (m.a(y := x * 1), y.add_(1), m.b(y), m.c(y)), [("a",), ("b", "c")]),
    "no rows": (lambda m, x: (m.a(x), m.b(x[:0]), m.c(input=x)), [("a", "c")]),
    "transposed copy": (
        lambda m, x: (m.a(y := x[:, :1].expand(2, 4, 4)), m.b(y.clone().mT)),
        [("a",), ("b",)],
    ),
    "transposed": (lambda m, x: (m.a(y := x[:, :1].expand(2, 4, 4)), m.b(y.mT)), [("a",), ("b",)]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_layers_that_read_one_tensor(name: str) -> None:
    run, expected = GROUPS[name]
    assert sorted(map(sorted, names(trace(Small(run), (X,))))) == sorted(map(sorted, expected))


def test_modes_and_hooks_are_left_as_they_were() -> None:
    model = Small().train()
    model.inner[1].eval()
    model.a.register_forward_hook(lambda *_: None)
    modes, count = [m.training for m in model.modules()], hooks(model)
    flow = trace(model, (X,))
    assert not any(step.name.startswith("bernoulli") for step in flow.steps)  # no dropout: evaluation mode
    assert ([m.training for m in model.modules()], hooks(model)) == (modes, count)
    assert model(X).requires_grad


def test_they_are_also_after_an_error() -> None:
    def fail(m: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    model = Small(fail).train()
    with pytest.raises(RuntimeError, match="^no$"):
        trace(model, (X,))
    assert all(m.training for m in model.modules())
    assert hooks(model) == 0
    assert torch.is_grad_enabled()


def test_errors_that_the_model_catches() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for bad in (m.a, m.inner):
            try:
                bad(x[..., :1] if bad is m.a else None)
            except (RuntimeError, TypeError):
                x = x + 1
        return m.b(x)

    flow = trace(Small(run), (X,))
    assert names(flow) == [("b",)]
    assert [step.name for step in flow.steps] == ["slice", "add", "add", "linear"]
    assert {step.call for step in flow.steps} == {0}


def test_nothing_is_kept_alive() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def run(m: Any, x: Tensor) -> Tensor:
        for layer in (m.a, m.b, m.c):
            x = layer(x).relu()
            alive.append(weakref.ref(x))
        return x.sum()

    flow = trace(Small(run), (X,))
    assert len(flow.steps) == 7
    assert [ref() for ref in alive] == [None] * 3


def test_addresses_that_are_used_again_are_told_apart() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(50):
            m.a(x * 2)
        return x

    flow = trace(Small(run), (X,))
    assert len({step.reads[0].storage for step in flow.steps if step.linear is not None}) == 50


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        assert names(trace(Small(), (X,))) == [("a", "b"), ("c",)]


def test_hooks_of_others_are_seen() -> None:
    model = Small()
    model.a.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    model.a.register_forward_hook(lambda _, args, y: y - 1)
    flow = trace(model, (X,))
    assert [step.name for step in flow.steps[:3]] == ["mul", "linear", "sub"]
    assert names(flow) == [("a",), ("b",), ("c",)]


def test_a_model_that_is_a_linear_layer() -> None:
    model = nn.Linear(4, 4)
    assert trace(model, (X,)).groups() == [(model,)]


def test_rows_of_views() -> None:
    x = torch.randn(4, 4, 6)
    assert place(x[:, :1]).rows != place(x[:1]).rows
    assert place(x.view(2, 8, 6)).rows == place(x).rows == place(x.transpose(0, 1)[None]).rows
    assert place(x[..., :3]).rows != place(x).rows
    assert place(x[..., 1:]).rows != place(x[..., :5]).rows
    assert place(x[2]).overlaps(place(x[2:])) and not place(x[2]).overlaps(place(x[3]))


def test_it_takes_modules() -> None:
    with pytest.raises(TypeError, match="trace: module must be a torch.nn.Module, got function"):
        trace(lambda x: x, (X,))  # type: ignore[arg-type]
