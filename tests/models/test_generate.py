"""Hugging Face ``generate`` with a KV cache on a compiled, fused W8A8 Llama: the same tokens as eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import npu_fusion
from npu_fusion.demo.model import load_byte_llama
from npu_fusion.quantization import quantize_linears

STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("options", [{}, pytest.param(STATIC, marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = load_byte_llama()
    quantize_linears(model)
    npu_fusion.prepare(model)
    model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": 24, "do_sample": False, "use_cache": True, **options}
    prompt = torch.tensor([list(b"def main(args):\n    ")])
    with torch.no_grad():
        expected = model.generate(prompt, **settings)
        backend = npu_fusion.get_npu_backend(host="eager")
        model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
        result = model.generate(prompt, **settings)
    assert torch.equal(result, expected)
    layers = model.config.num_hidden_layers
    assert len(backend.reports) <= 3  # prefill and decode, not one graph per token
    for report in backend.reports:
        assert report.fused["npu_dequant_swiglu_quant"] == layers
        assert report.fused["npu_rotary_mul"] == 2 * layers
        assert not report.failures
