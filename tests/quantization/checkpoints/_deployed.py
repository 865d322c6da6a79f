"""Models with deployed layers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import Deployed, deploy, share
from npu_fusion.quantization.qparams import round_to_nearest
from npu_fusion.quantization.scheme import MX_BLOCK, InputScheme, Scheme, WeightScheme
from tests.quantization.checkpoints._packers import LAYERS, Small


def scheme(weights: str, inputs: str | None = None, **more: Any) -> Scheme:
    """``more``: strategy and symmetric of the weights; input_strategy, input_symmetric."""
    given = None
    if inputs is not None:
        given = InputScheme(inputs, more.pop("input_symmetric", True), more.pop("input_strategy", "tensor"))
    return Scheme(WeightScheme(weights, **more), given)


def _group(size: int, **more: Any) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size, **more}


SCHEMES = [
    scheme("int8", "int8", input_strategy="token"),
    scheme("int8", "int8"),
    scheme("int8", "int8", input_symmetric=False, strategy="tensor"),
    scheme("float8_e4m3fn", "float8_e4m3fn"),
    scheme("hifloat8", "hifloat8", input_strategy="token"),
    scheme("mxfp8_e4m3fn", "mxfp8_e4m3fn", input_strategy="group", **_group(MX_BLOCK)),
    scheme("mxfp4_e2m1", "mxfp8_e4m3fn", input_strategy="group", **_group(MX_BLOCK)),
    scheme("float4_e2m1", "float8_e4m3fn", **_group(32)),
    scheme("int8", strategy="tensor", symmetric=False),
    scheme("int8", **_group(32)),
    scheme("int4"),
    scheme("int4", **_group(32, symmetric=False)),
    scheme("float8_e4m3fn"),
    scheme("hifloat8", strategy="tensor"),
    scheme("float4_e2m1", **_group(32)),
    scheme("float4_e1m2", **_group(32)),
    scheme("mxfp4_e2m1", **_group(MX_BLOCK)),
]


def name_of(given: Scheme) -> str:
    weights, inputs = given.weights, given.inputs
    words = [weights.type, weights.strategy] + ([] if weights.symmetric else ["asymmetric"])
    if inputs is not None:
        words += [inputs.type, inputs.strategy] + ([] if inputs.symmetric else ["asymmetric"])
    return "-".join(words)


def deployed(layer: nn.Linear | nn.Conv2d, given: Scheme, smooth_scales: Tensor | None = None) -> Deployed:
    inputs = None
    if given.inputs is not None and not given.inputs.dynamic:
        offset = None if given.inputs.symmetric else torch.tensor([3], dtype=torch.int32)
        inputs = InputParameters(torch.tensor([0.03125 if given.inputs.type == "int8" else 0.01]), offset)
    weight = round_to_nearest(layer.weight.detach().flatten(1).float(), given.weights, given.inputs)
    return deploy(layer, given, weight, inputs, smooth_scales)


def small(
    given: Scheme, bias: bool = True, smooth: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Small:
    """All layers of :class:`Small` deployed; gate and up read one tensor, and share what belongs to it."""
    torch.manual_seed(0)
    model = Small(bias=bias, dtype=dtype).eval()
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        factors = torch.linspace(0.5, 2, layer.in_features).to(dtype) if smooth else None
        model.set_submodule(name, deployed(layer, given, factors))
    share([model.gate, model.up])
    return model


def llama(on: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(on):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
