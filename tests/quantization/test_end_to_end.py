"""Quantized, calibrated, converted, compiled: what fuses, with the results of eager mode."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_fusion

transformers = pytest.importorskip("transformers")

LAYERS = 2
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "use_cache": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": LAYERS,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=16)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL)),
    "deepseek": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**SMALL, **LATENT})
    ),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model.bfloat16()


def calibrated(model: Any, preset: str, **changes: Any) -> npu_fusion.quantization.Quantization:
    config = {**npu_fusion.quantization.PRESETS[preset], "batch_num": 2, **changes}
    state = npu_fusion.quantize(model, config)
    with torch.no_grad():
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randint(0, 64, (2, 12), generator=generator))
    npu_fusion.convert(model)
    return state


DYNAMIC, STATIC = "W8A8_DYNAMIC_SMOOTHQUANT_CFG", "INT8_SMOOTHQUANT_CFG"
FAST = {("llama", STATIC), ("deepseek", DYNAMIC)}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(name, preset, marks=() if (name, preset) in FAST else pytest.mark.slow)
        for name in MODELS
        for preset in (DYNAMIC, STATIC)
    ],
)
def test_models_fuse_by_construction(name: str, preset: str) -> None:
    torch._dynamo.reset()
    model = made(name)
    state = calibrated(model, preset)
    assert state.skipped == () and state.unseen == ()
    # In front of every group there is something that takes the smoothing.
    unfolded = [layer for layer in state.schemes if layer not in state.folded]
    assert unfolded == []
    dynamic = preset == DYNAMIC
    # The first norm reads no sum; the last one is in front of lm_head, which stays in float.
    norm = "npu_add_rms_norm_dynamic_quant" if dynamic else "npu_add_rms_norm_quant"
    expect = {"npu_dequant_swiglu_quant": LAYERS, norm: 2 * LAYERS - 1}
    backend = npu_fusion.get_npu_backend(fusion_config={"expect": expect, "strict": True}, host="eager")
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        eager = model(ids).logits.float()
        fused = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(ids).logits.float()
    assert (fused - eager).norm() <= 0.03 * eager.norm()
    (report,) = backend.reports
    left = Counter(report.operators_after)
    for operator in ("aten.round", "aten.clamp", "aten.div", "aten.amax", "aten.abs", "aten._int_mm"):
        assert left[operator] == (LAYERS if operator == "aten._int_mm" else 0), operator


def test_latent_attention_with_its_expansion_in_float() -> None:
    """Decoding: the latent is attended to as it is cached, and what is before that is one operator."""
    torch._dynamo.reset()
    model = made("deepseek")
    state = calibrated(model, DYNAMIC, skip_layers={"kv_b_proj", "lm_head"})
    assert state.skipped == ()
    seeded = torch.Generator().manual_seed(3)
    prompt, token = (torch.randint(0, 64, (3, length), generator=seeded) for length in (5, 1))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    expect = {
        "mla_absorb": LAYERS,
        "npu_mla_prolog_v3_functional": LAYERS,
        "npu_dequant_swiglu_quant": LAYERS,
        "npu_add_rms_norm_dynamic_quant": 2 * LAYERS - 1,
    }
    settings = {"expect": expect, "strict": True, "numerics": "relaxed"}
    backend = npu_fusion.get_npu_backend(fusion_config=settings, host="eager")
    with torch.no_grad():
        model(prompt, past_key_values=cache, use_cache=True)
        written = copy.deepcopy(cache)
        eager = model(token, past_key_values=cache, use_cache=True).logits.float()
        step = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        fused = step(token, past_key_values=written, use_cache=True).logits.float()
    assert (fused - eager).norm() <= 0.05 * eager.norm()
    for ours, theirs in zip(written.layers, cache.layers, strict=True):
        for name in ("keys", "values"):
            have, want = getattr(ours, name).float(), getattr(theirs, name).float()
            assert (have - want).norm() <= 0.05 * want.norm()
    (report,) = backend.reports
    left = Counter(report.operators_after)
    assert left["aten._int_mm"] == LAYERS  # of gate and up
    assert left["npu.npu_quant_matmul"] == 2 * LAYERS  # o_proj and down_proj
