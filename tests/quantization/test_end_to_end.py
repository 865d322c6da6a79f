"""Quantized, calibrated, converted, compiled: what fuses, with the results of eager mode."""

from __future__ import annotations

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


def calibrated(model: Any, preset: str) -> npu_fusion.quantization.Quantization:
    state = npu_fusion.quantize(model, {**npu_fusion.quantization.PRESETS[preset], "batch_num": 2})
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
