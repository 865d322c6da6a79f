"""algorithm_register: modules of the user take the places of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_fusion
from npu_fusion.quantization import BaseQuantizeModule, algorithm_register, convert, quantize
from npu_fusion.quantization.user_algorithms import USER_ALGORITHMS


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    USER_ALGORITHMS.clear()


class Rounded(BaseQuantizeModule):
    """Rounds the weight to a grid that the largest input decides."""

    def __init__(self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]) -> None:
        super().__init__(ori_module, layer_name, quant_config)
        self.seen = 0
        self.largest = 0.0

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        self.largest = max(self.largest, float(inputs.abs().max()))
        return self.ori_module(inputs)


class RoundedDeployed(nn.Module):
    def __init__(self, quant_module: Rounded) -> None:
        super().__init__()
        self.layer_name, self.seen, self.config = (
            quant_module.layer_name,
            quant_module.seen,
            quant_module.quant_config,
        )
        step = quant_module.largest / 16
        self.register_buffer("weight", (quant_module.ori_module.weight.detach() / step).round() * step)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def config(**changes: Any) -> dict[str, Any]:
    weights = {"type": "int8", "symmetric": True, "strategy": "channel"}
    return {"batch_num": 2, "quant_cfg": {"weights": weights}, "algorithm": {"rounded"}, **changes}


def test_an_algorithm_of_the_user_from_end_to_end() -> None:
    algorithm_register("rounded", "Linear", Rounded, RoundedDeployed)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Conv2d(1, 1, 1))
    weight = model[1].weight.detach().clone()
    state = quantize(model, config(skip_layers={"0"}))
    assert [type(layer).__name__ for layer in model] == ["Linear", "Rounded", "Conv2d"]
    model[1](torch.full((2, 4), 8.0))
    model[1](torch.ones(2, 4))
    assert convert(model) is model
    layer = model[1]
    assert isinstance(layer, RoundedDeployed)
    assert (layer.layer_name, layer.seen) == ("1", 2)
    assert torch.equal(layer.weight, (weight / 0.5).round() * 0.5)
    assert layer.config["batch_num"] == 2 and "rounded" in layer.config["algorithm"]
    assert list(state.schemes) == ["1"] and state.excluded == ("0",)


def test_registering_again_replaces() -> None:
    algorithm_register("rounded", "Linear", Rounded, nn.Identity)
    algorithm_register("rounded", "Linear", Rounded, RoundedDeployed)
    assert USER_ALGORITHMS["rounded"]["Linear"].deploy_op is RoundedDeployed
    assert npu_fusion.algorithm_register is algorithm_register


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, "Linear", Rounded, RoundedDeployed), TypeError, "name is a int; accepted: a string"),
        (("", "Linear", Rounded, RoundedDeployed), ValueError, "name is empty"),
        (
            ("gptq", "Linear", Rounded, RoundedDeployed),
            ValueError,
            "name is 'gptq'; accepted: not a built-in",
        ),
        (("a", nn.Linear, Rounded, RoundedDeployed), TypeError, "src_op is a type; accepted: a string"),
        (("a", "Linear", Rounded(nn.Identity(), "", {}), RoundedDeployed), TypeError, "quant_op is Rounded"),
        (("a", "Linear", Rounded, int), TypeError, "deploy_op is <class 'int'>; accepted: a subclass"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        algorithm_register(*arguments)
    assert USER_ALGORITHMS == {}


def test_an_unknown_algorithm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="rounded"):
        quantize(model, config())
    assert type(model[0]) is nn.Linear
