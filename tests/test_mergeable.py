"""Merging layers that have something in common: what quantizes their input."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion import _mergeable
from npu_fusion.prepare import mergeable, prepare
from npu_fusion.quantization.modules import W8A8DynamicLinear, deploy
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

HIDDEN, INNER = 32, 48
SCHEME = Scheme(WeightScheme("int8"), InputScheme("int8", True, "token"))


def layer(smooth: Tensor | None, outputs: int = INNER, scheme: Scheme = SCHEME) -> nn.Module:
    linear = nn.Linear(HIDDEN, outputs)
    weight = linear.weight.detach() if smooth is None else linear.weight.detach() / smooth
    return deploy(linear, scheme, round_to_nearest(weight, scheme.weights), None, smooth)


class MLP(nn.Module):
    def __init__(self, gate: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = gate, up
        self.down_proj = nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def smooth_scales() -> Tensor:
    return torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("same_object", [True, False])
def test_what_is_shared_is_kept_once_and_saved_for_both(same_object: bool) -> None:
    smooth = smooth_scales()
    module = MLP(layer(smooth), layer(smooth if same_object else smooth.clone()))
    expected, state = module(X), copy.deepcopy(module.state_dict())
    assert len(prepare(module)) == 1
    merged = module.gate_up_proj
    assert isinstance(merged, W8A8DynamicLinear)
    # The object itself: a third layer may read the same input.
    assert merged.smooth_scales is smooth
    torch.testing.assert_close(module(X), expected)
    for saved in (module.state_dict(), copy.deepcopy(module).state_dict()):
        assert list(saved) == list(state)
        assert all(torch.equal(saved[key], state[key]) for key in state)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(X), module(X))


@pytest.mark.parametrize("assign", [False, True])
def test_loading(assign: bool) -> None:
    module = MLP(*(layer(smooth_scales()) for _ in range(2)))
    other = MLP(*(layer(smooth_scales() * 2) for _ in range(2)))
    expected, state = other(X), copy.deepcopy(other.state_dict())
    prepare(module)
    module.load_state_dict(state, assign=assign)
    torch.testing.assert_close(module(X), expected)

    # One of the two is enough where not both are asked for.
    half = {"gate_proj.smooth_scales": torch.full((HIDDEN,), 3.0)}
    module.load_state_dict(half, strict=False, assign=assign)
    assert module.gate_up_proj.smooth_scales.unique().tolist() == [3.0]

    state["up_proj.smooth_scales"] = state["up_proj.smooth_scales"] + 1
    before = copy.deepcopy(module.state_dict())
    message = (
        "gate_proj.smooth_scales and up_proj.smooth_scales have different values: npu_fusion.prepare made "
        "them one tensor; accepted: equal ones"
    )
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, assign=assign)
    assert torch.equal(module.state_dict()["up_proj.smooth_scales"], before["up_proj.smooth_scales"])
    del state["up_proj.smooth_scales"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "up_proj.smooth_scales"'):
        module.load_state_dict(state)


@pytest.mark.parametrize(
    ("gate", "up", "reason"),
    [
        (
            layer(smooth_scales()),
            layer(smooth_scales() + 1),
            "gate_proj.smooth_scales and up_proj.smooth_scales have different values",
        ),
        (layer(smooth_scales()), layer(None), "gate_proj has a smooth_scales, up_proj has not"),
    ],
    ids=["values", "one"],
)
def test_what_is_not_equal_is_left(gate: nn.Module, up: nn.Module, reason: str) -> None:
    module = MLP(gate, up)
    prepared = prepare(module)
    assert [entry.reason for entry in prepared.skipped] == [reason]
    assert hasattr(module, "gate_proj")


def test_on_the_meta_device_values_are_compared_when_they_are_loaded() -> None:
    good, bad = (MLP(layer(smooth_scales()), layer(smooth_scales() + i)) for i in range(2))
    module = copy.deepcopy(good).to("meta")
    assert len(prepare(module)) == 1
    with pytest.raises(RuntimeError, match="have different values"):
        module.load_state_dict(bad.state_dict(), assign=True)
    module.load_state_dict(good.state_dict(), assign=True)
    torch.testing.assert_close(module(X), good(X))


def float4(kind: str) -> nn.Module:
    weights = WeightScheme(kind, True, "group", 32)
    linear = nn.Linear(2 * HIDDEN, INNER).bfloat16()
    return deploy(linear, Scheme(weights), round_to_nearest(linear.weight.detach().float(), weights))


def test_layers_that_differ_in_more_than_tensors_show() -> None:
    """e2m1 and e1m2 in two layers with tensors of equal shapes and dtypes."""
    one, other = float4("float4_e1m2"), float4("float4_e1m2")
    other.scheme = Scheme(WeightScheme("float4_e2m1", True, "group", 32))
    module = MLP(one, other)
    reason = (
        "gate_proj has float4_e1m2 weights in groups of 32, up_proj has float4_e2m1 weights in groups of 32"
    )
    assert [entry.reason for entry in prepare(module).skipped] == [reason]


class _Last(nn.Module):
    """A weight with the outputs last."""

    def __init__(self, in_features: int, out_features: int, device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("assign", [False, True])
def test_outputs_may_be_last(monkeypatch: pytest.MonkeyPatch, assign: bool) -> None:
    monkeypatch.setattr(_mergeable, "_CLASSES", dict(_mergeable._CLASSES))

    @mergeable(_Last, dim=-1)
    def double(layer: _Last) -> _Last:
        return _Last(layer.in_features, 2 * layer.out_features, device="meta")

    module, other = (MLP(_Last(HIDDEN, INNER), _Last(HIDDEN, INNER)) for _ in range(2))
    expected, state = module(X), copy.deepcopy(module.state_dict())
    prepare(module)
    assert module.gate_up_proj.weight.shape == (HIDDEN, 2 * INNER)
    torch.testing.assert_close(module(X), expected)
    assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items())
    module.load_state_dict(other.state_dict(), assign=assign)
    torch.testing.assert_close(module(X), other(X))

    mergeable(_Last)(double)
    with pytest.raises(RuntimeError, match="every tensor that is not shared twice as large in dimension 0"):
        prepare(other)


def test_registration_refuses() -> None:
    with pytest.raises(
        TypeError, match="mergeable: shared is the string 'scale'; accepted: a sequence of names"
    ):
        mergeable(_Last, shared="scale")
    with pytest.raises(ValueError, match="mergeable: dim is 1; accepted: 0, -1"):
        mergeable(_Last, dim=1)
