"""The example of torch_npu's documentation of npu_mla_prolog (7.0.0), run as it is written there."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)

EXAMPLE = """
import torch
import torch_npu
import math
# 生成随机数据, 并发送到npu
B = 8
He = 7168
Hcq = 1536
Hckv = 512
N = 32
D = 128
Dr = 64
Skv = 1024
S = 2
Nkv = 1
BlockSize = 128
BlockNum = 64
token_x = torch.rand(B, S, He, dtype=torch.bfloat16).npu()
w_dq = torch.rand(He, Hcq, dtype=torch.bfloat16).npu()
w_dq_cast = torch_npu.npu_format_cast(w_dq.contiguous(), 29)
w_uq_qr = torch.rand(Hcq, N * (D + Dr), dtype=torch.bfloat16).npu()
w_uq_qr_cast = torch_npu.npu_format_cast(w_uq_qr.contiguous(), 29)
w_uk = torch.rand(N, D, Hckv, dtype=torch.bfloat16).npu()
w_dkv_kr = torch.rand(He, Hckv + Dr, dtype=torch.bfloat16).npu()
w_dkv_kr_cast = torch_npu.npu_format_cast(w_dkv_kr.contiguous(), 29)
rmsnorm_gamma_cq = torch.rand(Hcq, dtype=torch.bfloat16).npu()
rmsnorm_gamma_ckv = torch.rand(Hckv, dtype=torch.bfloat16).npu()
rope_sin = torch.rand(B, S, Dr, dtype=torch.bfloat16).npu()
rope_cos = torch.rand(B, S, Dr, dtype=torch.bfloat16).npu()
cache_index = torch.rand(B, S).to(torch.int64).npu()
kv_cache = torch.rand(BlockNum, BlockSize, Nkv, Hckv, dtype=torch.bfloat16).npu()
kr_cache = torch.rand(BlockNum, BlockSize, Nkv, Dr, dtype=torch.bfloat16).npu()
rmsnorm_epsilon_cq = 1.0e-5
rmsnorm_epsilon_ckv = 1.0e-5
cache_mode = "PA_BSND"
# 调用MlaProlog算子
query_mla, query_rope_mla, kv_cache_out_mla, kr_cache_out_mla = torch_npu.npu_mla_prolog(token_x, w_dq_cast, w_uq_qr_cast, w_uk, w_dkv_kr_cast, rmsnorm_gamma_cq, rmsnorm_gamma_ckv, rope_sin, rope_cos, cache_index, kv_cache, kr_cache, rmsnorm_epsilon_cq=rmsnorm_epsilon_cq, rmsnorm_epsilon_ckv=rmsnorm_epsilon_ckv, cache_mode=cache_mode)
"""  # noqa: E501


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``torch_npu`` whose functions are the operators that this package defines, and ``Tensor.npu``."""
    module = ModuleType("torch_npu")
    module.__getattr__ = lambda name: getattr(torch.ops.npu, name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(Tensor, "npu", lambda self: self, raising=False)


@pytest.mark.usefixtures("torch_npu")
def test_the_example_of_the_documentation() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    query, query_rope = names["query_mla"], names["query_rope_mla"]
    kv, kr = names["kv_cache_out_mla"], names["kr_cache_out_mla"]
    assert [(t.shape, t.dtype) for t in (query, query_rope, kv, kr)] == [
        ((8, 2, 32, 512), torch.bfloat16),
        ((8, 2, 32, 64), torch.bfloat16),
        ((64, 128, 1, 512), torch.bfloat16),
        ((64, 128, 1, 64), torch.bfloat16),
    ]
    # Sums of 1536 and 128 products of positive numbers: not the +-0.03 that the documentation prints.
    assert float(query.min()) > 1e4 and float(query.max()) < 1e5

    # All 16 indices are 0, as torch.rand is below 1: the last token stays in slot 0.
    assert not names["cache_index"].any()
    for out, cache in ((kv, names["kv_cache"]), (kr, names["kr_cache"])):
        assert torch.equal(out.flatten(0, 2)[1:], cache.flatten(0, 2)[1:])
    latent = (names["token_x"][-1, -1].double() @ names["w_dkv_kr"].double())[:512]
    wanted = latent / (latent.square().mean() + 1e-5).sqrt() * names["rmsnorm_gamma_ckv"].double()
    torch.testing.assert_close(kv[0, 0, 0].double(), wanted, rtol=0, atol=2 * 2.0**-8)
