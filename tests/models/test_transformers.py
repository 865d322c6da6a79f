"""Norms and rotary embeddings of real model code: Transformers' Llama and DeepSeek-V3, tiny and random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes._harness import DIALECTS, Outcome, fuse

transformers = pytest.importorskip("transformers")

LAYERS = 2


def llama(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config)


def deepseek(dtype: torch.dtype) -> Any:
    config = transformers.DeepseekV3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=LAYERS,  # dense MLPs only: routing of random experts is a coin toss in bfloat16
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        vocab_size=50,
    )
    return transformers.DeepseekV3ForCausalLM(config)


# The first norm reads the embedding; the others, with the last one after all layers, read a residual sum.
# DeepSeek has two more norms in each layer, of the compressed query and of the compressed key and value.
MODELS: dict[str, tuple[Callable[[torch.dtype], Any], dict[str, int]]] = {
    "llama": (llama, {"npu_rms_norm": 1, "npu_add_rms_norm": 2 * LAYERS, "npu_rotary_mul": 2 * LAYERS}),
    "deepseek": (
        deepseek,
        {
            "npu_rms_norm": 1 + 2 * LAYERS,
            "npu_add_rms_norm": 2 * LAYERS,
            "npu_interleave_rope": 2 * LAYERS,
        },
    ),
}


def run(name: str, dtype: torch.dtype, dialect: str, dynamic: bool, **config: Any) -> tuple[Outcome, Tensor]:
    """The logits, and what the same weights give in float64."""
    torch.manual_seed(0)
    make, _ = MODELS[name]
    model = make(dtype).eval()
    for parameter in model.parameters():  # norm weights are ones in a fresh model: nothing would miss them
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model = model.to(dtype)
    ids = torch.randint(0, 50, (2, 7))

    def logits(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    got = fuse(logits, (ids,), dialect=dialect, dynamic=dynamic, **config)
    with torch.no_grad():
        exact = model.to(torch.float64)(ids, use_cache=False).logits
    return got, exact


@pytest.mark.by_turns("dialect", "dynamic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, dialect: str, dynamic: bool, dtype: torch.dtype) -> None:
    got, exact = run(name, dtype, dialect, dynamic)
    assert got.fused == MODELS[name][1]
    after = got.report.operators_after
    assert not {"aten.rsqrt", "aten.mean", "aten.pow"} & set(after)
    if dtype == torch.float32:
        torch.testing.assert_close(got.result, got.expected, rtol=1e-4, atol=1e-5)
    else:
        fused, eager = (torch.linalg.vector_norm(t.double() - exact) for t in (got.result, got.expected))
        assert fused <= eager * 1.1


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_finds_the_same(name: str) -> None:
    got, _ = run(name, torch.float32, "aot", False, dry_run=True)
    assert got.fused == MODELS[name][1]
    assert got.report.operators_after == got.report.operators_before
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_strict_throughout(name: str) -> None:
    got, _ = run(name, torch.float32, "aot", False, numerics="strict")
    assert got.fused == MODELS[name][1]
    assert {f.level for f in got.report.fusions} == {"strict"}
