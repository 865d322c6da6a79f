"""The two demo models lower whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import npu_fusion
from npu_fusion.demo import load_byte_llama, load_byte_mla
from npu_fusion.demo.mla_model import Cache
from npu_fusion.quantization import quantize_linears
from tests.ascend._lowering import assert_dynamic, lower

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_w8a8_llama(dynamic: bool) -> None:
    """In bfloat16: torchair's pattern fuses norm and quantization of float32, too, which no kernel takes."""
    model = load_byte_llama(torch.bfloat16)
    linears = len(quantize_linears(model))
    npu_fusion.prepare(model)
    layers = model.config.num_hidden_layers
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    got = lower(Logits(model), [tokens], dynamic=dynamic)
    assert got.fused["npu_dequant_swiglu_quant"] == layers
    counts = got.graph.counts
    assert counts["DequantSwigluQuant"] == got.pbtxt.count('op: "DequantSwigluQuant"') == layers
    assert counts["QuantBatchMatmulV3"] == linears - layers  # gate and up are one
    assert counts["RotaryMul"] == 2 * layers
    if dynamic:
        assert_dynamic(got, "DequantSwigluQuant", "QuantBatchMatmulV3", "RotaryMul")
    assert (got.result - got.expected).abs().max() < 0.05 * got.expected.abs().max()


class Decode(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, *caches: Tensor) -> Tensor:
        pairs = [Cache(*caches[i : i + 2]) for i in range(0, len(caches), 2)]
        return self.model(tokens, positions, pairs).logits


@pytest.mark.parametrize("dynamic", [False, True])
def test_mla_decode(dynamic: bool) -> None:
    model = load_byte_mla(torch.bfloat16)  # torch_npu's npu_mla_prolog takes nothing else
    npu_fusion.prepare(model)
    layers = len(model.layers)
    batch = 6  # another than the number of heads: torchair compares sizes where it derives views
    caches = [t for cache in model.new_caches(batch) for t in (cache.latent, cache.rotary)]
    for cache in caches:
        cache.normal_(generator=torch.Generator().manual_seed(0))
    eager = [cache.clone() for cache in caches]
    tokens = torch.randint(0, 256, (batch, 1), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        Decode(model)(tokens, torch.tensor([5]), *eager)
    got = lower(Decode(model), [tokens, torch.tensor([5]), *caches], dynamic=dynamic, numerics="relaxed")
    assert (got.fused["mla_absorb"], got.fused["npu_mla_prolog_v3_functional"]) == (layers, layers)
    counts = got.graph.counts
    assert counts["MlaPrologV3"] == got.pbtxt.count('op: "MlaPrologV3"') == layers
    assert (counts["AddRmsNorm"], counts["SwiGlu"], counts["Assign"]) == (2 * layers, layers, 2 * layers)
    if dynamic:
        assert_dynamic(got, "MlaPrologV3", "AddRmsNorm", "SwiGlu")
    # Two units in the last place of the largest value; what lower() compares with it is equal.
    torch.testing.assert_close(got.result, got.expected, rtol=0, atol=0.25)
    for have, want in zip(caches, eager, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0.125)
