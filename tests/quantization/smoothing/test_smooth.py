from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.smoothing import find_groups, get_act_scales, smooth, trace

K = 8


class Mlp(nn.Module):
    """norm -> (gate, up) -> down, and a head that reads a sum, which nothing can be folded into."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(K)
        self.gate, self.up, self.down, self.head = (
            nn.Linear(K, 12),
            nn.Linear(K, 12),
            nn.Linear(12, K),
            nn.Linear(K, 3),
        )
        nn.init.normal_(self.norm.weight, 1.0, 0.3)
        nn.init.normal_(self.norm.bias, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def inputs(n: int = 40) -> Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def oracle(act: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """Equation 4, channel by channel."""
    s = []
    for k in range(act.numel()):
        x, w = act[k].item(), max(weight[:, k].abs().max().item() for weight in weights)
        s.append(x**alpha / w ** (1 - alpha) if x > 0 and w > 0 else 1.0)
    return torch.tensor(s)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_it_is_the_formula_of_the_paper(alpha: float) -> None:
    model = Mlp()
    x, before = inputs(), copy.deepcopy(model)
    act = get_act_scales(model, [x])
    done = smooth(model, act, x, alpha)
    assert [(group.consumers, group.producer, group.alpha) for group in done.smoothed] == [
        (("gate", "up"), "norm", alpha),
        (("down",), "up", alpha),
    ]
    down = oracle(act["down"], [before.down.weight], alpha)
    # The rows of up are divided first: these are the weights that get quantized.
    rows = before.up.weight / down[:, None]
    both = oracle(act["gate"], [before.gate.weight, rows], alpha)
    for group, s in zip(done.smoothed, (both, down), strict=True):
        torch.testing.assert_close(group.scales, s, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.norm.weight, before.norm.weight / both, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.norm.bias, before.norm.bias / both, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(model.gate.weight, before.gate.weight * both, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.up.weight, rows * both, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.up.bias, before.up.bias / down, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.down.weight, before.down.weight * down, rtol=1e-5, atol=0)
    with torch.no_grad():
        assert relative(model(x), before(x)) <= 1e-5


def test_what_is_left_alone_is_said() -> None:
    model = Mlp()
    act = get_act_scales(model, [inputs()])
    del act["down"]
    done = smooth(model, act, inputs())
    assert done.left == {
        "down": "act_scales has none of its group",
        "head": "nothing multiplies its input by a parameter for each channel; it comes from aten.add",
    }
    assert str(done).splitlines() == [
        "gate, up: alpha 0.5, into norm",
        *(f"{name}: not smoothed: {why}" for name, why in done.left.items()),
    ]


def test_scales_of_one_layer_are_enough_for_its_group() -> None:
    one, both = Mlp(), Mlp()
    act = get_act_scales(one, [inputs()])
    smooth(both, {"gate": act["gate"], "up": act["up"]}, inputs())
    smooth(one, {"up": act["up"]}, inputs())
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(both).values(), strict=True))


def test_an_alpha_for_each_group() -> None:
    model = Mlp()
    act = get_act_scales(model, [inputs()])
    done = smooth(model, act, inputs(), {"down": 0.9, "gate": 0.25, "[ug]*": 0.25, "*": 0.1})
    assert [group.alpha for group in done.smoothed] == [0.25, 0.9]
    model = Mlp()
    done = smooth(model, act, inputs(), {"d*n": 0.9})
    assert [group.alpha for group in done.smoothed] == [0.5, 0.9]


def test_known_groups_need_no_inputs() -> None:
    model, other = Mlp(), Mlp()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    groups = find_groups(model, trace(model, (inputs(),)), layers)
    act = get_act_scales(model, [inputs()])
    smooth(model, act, None, groups=groups[:1])
    smooth(other, {"up": act["up"]}, {"x": inputs(2)})
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(other).values(), strict=True))


def test_dead_channels_stay() -> None:
    model = Mlp()
    x = inputs()
    with torch.no_grad():
        model.norm.weight[2] = model.norm.bias[2] = 0  # an activation that is always 0
        model.gate.weight[:, 5] = 0  # weights that are all 0
        model.up.weight[:, 5] = 0
    before = copy.deepcopy(model)
    done = smooth(model, get_act_scales(model, [x]), x)
    assert done.smoothed[0].scales[[2, 5]].tolist() == [1.0, 1.0]
    assert (done.smoothed[0].scales != 1).sum() == K - 2
    with torch.no_grad():
        assert relative(model(x), before(x)) <= 1e-5


@pytest.mark.parametrize("size", [16.0, 1000.0])
def test_planted_outliers_shrink(size: float) -> None:
    model = Mlp()
    x = inputs()
    with torch.no_grad():
        model.norm.weight[[1, 6]] *= size
        model.norm.bias[[1, 6]] *= size
        model.gate.weight[:, [1, 6]] /= size
        model.up.weight[:, [1, 6]] /= size
    before = get_act_scales(model, [x])["gate"]
    smooth(model, get_act_scales(model, [x]), x)
    after = get_act_scales(model, [x])["gate"]
    assert before.max() / before.median() > size / 4
    assert after.max() / after.median() < 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    exact = Mlp().to(dtype).double()
    x = inputs().to(dtype)
    act = get_act_scales(exact, [x.double()])
    errors = {}
    for powers in (None, False, True):
        model = copy.deepcopy(exact).to(dtype)
        if powers is not None:
            smooth(model, act, x, 0.5, powers_of_two=powers)
        with torch.no_grad():
            errors[powers] = model(x)
    with torch.no_grad():
        want = exact(x.double())
    assert torch.equal(errors[True], errors[None])
    assert not torch.equal(errors[False], errors[None])
    assert relative(errors[False], want) <= 4 * torch.finfo(dtype).eps


def test_modes_and_gradients_stay() -> None:
    model = Mlp().train()
    smooth(model, get_act_scales(model, [inputs()]), inputs())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


ACT = {"gate": torch.ones(K), "up": torch.ones(K), "down": torch.ones(12)}


def scales(**changed: Any) -> dict[str, Any]:
    """Those of all layers, one of them changed."""
    return {"act_scales": {**ACT, **changed}}


# name: what is wrong, the error, and its message
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": (scales(gates=ACT["gate"]), ValueError, "act_scales has 'gates', which is no linear layer"),
    "norm": (scales(norm=ACT["gate"]), ValueError, "act_scales has 'norm', which is no linear layer"),
    "size": (scales(down=torch.ones(K)), ValueError, r"\['down'\] has shape \[8\]; accepted: \[12\]"),
    "type": (scales(gate=[1.0] * K), TypeError, r"act_scales\['gate'\] is a list; accepted: a tensor"),
    "negative": (scales(down=-torch.ones(12)), ValueError, r"act_scales\['down'\] has values that are neg"),
    "nan": (scales(down=torch.ones(12) * torch.nan), ValueError, r"act_scales\['down'\] has values"),
    "alpha": ({"alpha": 1.1}, ValueError, r"alpha of '\*' is 1.1; accepted: 0 to 1"),
    "alpha nan": ({"alpha": float("nan")}, ValueError, "accepted: 0 to 1"),
    "alpha below": ({"alpha": {"down": -0.1}}, ValueError, "alpha of 'down' is -0.1"),
    "alpha type": ({"alpha": True}, TypeError, "is a bool; accepted: a number"),
    "alpha text": ({"alpha": "0.5"}, TypeError, "is a str; accepted: a number"),
    "pattern": ({"alpha": {"no*": 0.5}}, ValueError, "pattern 'no\\*', which is the name of no linear layer"),
    "conflict": ({"alpha": {"gate": 0.5, "up": 0.6}}, ValueError, r"alpha is \[0.5, 0.6\] for gate, up"),
    "inputs": ({"example_inputs": 3}, TypeError, "smooth: example_inputs is a int; accepted: a tensor"),
    "model": ({"model": len}, TypeError, "model must be a torch.nn.Module"),
    "consumer": (scales(down=torch.full((12,), 1e38)) | {"alpha": 1.0}, ValueError, "overflow"),
    "producer": (
        scales(gate=torch.full((K,), 1e-38), up=torch.full((K,), 1e-38)) | {"alpha": 1.0},
        ValueError,
        "a parameter of norm overflow",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_change_nothing(name: str) -> None:
    options, error, message = BAD[name]
    model = Mlp().half() if name in ("consumer", "producer") else Mlp()
    before = state(model)
    x = inputs().to(model.norm.weight.dtype)
    with pytest.raises(error, match=message):
        smooth(**{"model": model, "act_scales": ACT, "example_inputs": x, **options})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_groups_of_another_model() -> None:
    model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, K))
    groups = find_groups(model, trace(model, (inputs(),)), {"1": model[1]})
    with pytest.raises(ValueError, match="groups has '1', which is no linear layer"):
        smooth(Mlp(), ACT, None, groups=groups)
