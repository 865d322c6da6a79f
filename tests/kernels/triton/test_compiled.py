"""Every kernel compiles for a GPU, here and now, and no number of rows compiles it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.kernels.triton import (
    add_rms_norm_dynamic_quant,
    dequant_swiglu_quant,
    dynamic_quant,
    mla_prolog,
    quant_matmul,
    swiglu_quant,
)
from npu_fusion.kernels.triton._launch import RowKernel

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the place of the compiler", allow_module_level=True)

from tests.kernels.triton._compiler import compiling, spilled, variants

ROWS = (1, 2, 3, 16, 17, 64, 65, 4096)
WIDTHS = (1536, 9216)


def dequantize(rows: int, width: int, **other: Any) -> None:
    dequant_swiglu_quant.npu_dequant_swiglu_quant(
        torch.zeros(rows, 2 * width, dtype=torch.int32),
        weight_scale=torch.zeros(2 * width),
        activation_scale=torch.zeros(rows),
        **other,
    )


def gate(rows: int, width: int) -> None:
    x = torch.zeros(rows, 2 * width, dtype=torch.bfloat16)
    dequant_swiglu_quant.npu_dequant_swiglu_quant(x, quant_mode=1)
    swiglu_quant.npu_swiglu_quant(x, quant_mode=1)


def quantize(rows: int, width: int) -> None:
    smooth = torch.zeros(width, dtype=torch.bfloat16)
    dynamic_quant.npu_dynamic_quant(torch.zeros(rows, width, dtype=torch.bfloat16), smooth_scales=smooth)


def normalize(rows: int, width: int) -> None:
    x, gamma = torch.zeros(rows, width, dtype=torch.bfloat16), torch.zeros(width, dtype=torch.bfloat16)
    add_rms_norm_dynamic_quant.npu_add_rms_norm_dynamic_quant(x, x, gamma, smooth_scale1=gamma)


def multiply(rows: int, width: int) -> None:
    x1, x2 = torch.zeros(rows, 512, dtype=torch.int8), torch.zeros(width, 512, dtype=torch.int8).t()
    per_token = torch.zeros(rows)
    quant_matmul.npu_quant_matmul(x1, x2, torch.zeros(width), pertoken_scale=per_token, output_dtype=15)


def prolog(rows: int, width: int) -> None:
    """DeepSeek-V3's sizes, but a small token_x and few heads."""
    hidden, heads, nope, rope, latent = 64, 2, 128, 64, 512

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    mla_prolog.npu_mla_prolog_v3_functional(
        zeros(rows, hidden),
        zeros(hidden, width),
        zeros(width, heads * (nope + rope)),
        zeros(heads, nope, latent),
        zeros(hidden, latent + rope),
        zeros(width),
        zeros(latent),
        zeros(rows, rope),
        zeros(rows, rope),
        zeros(8, 128, 1, latent),
        zeros(8, 128, 1, rope),
        cache_index=torch.zeros(rows, dtype=torch.int64),
    )


CALLS: dict[str, tuple[Callable[[int, int], None], tuple[RowKernel, ...]]] = {
    "dequant_swiglu_quant": (
        lambda rows, width: dequantize(rows, width, quant_mode=1),
        (dequant_swiglu_quant.DYNAMIC_KERNEL,),
    ),
    "static": (
        lambda rows, width: dequantize(rows, width, quant_mode=0),
        (dequant_swiglu_quant.STATIC_KERNEL,),
    ),
    "16 bits": (gate, (dequant_swiglu_quant.DYNAMIC_KERNEL, swiglu_quant.DYNAMIC_KERNEL)),
    "dynamic_quant": (quantize, (dynamic_quant.KERNEL,)),
    "add_rms_norm": (normalize, (add_rms_norm_dynamic_quant.KERNEL,)),
    "quant_matmul": (multiply, (*quant_matmul.PRODUCTS.values(), quant_matmul.EPILOGUE)),
    "mla_prolog": (prolog, (mla_prolog.NORM, mla_prolog.QUERY_ROPE, mla_prolog.LATENT)),
}


@pytest.fixture(autouse=True, scope="module")
def _no_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, compiling():
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_choice_compiles_without_spilling(
    monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    call, kernels = CALLS[name]
    for kernel in kernels:
        kernel.kernel.device_caches.clear()
        choices = kernel.choices
        monkeypatch.setattr(kernel, "_launch", _each(kernel, choices))
    call(5, width)
    call(200, width)
    for kernel in kernels:
        compiled = variants(kernel.kernel).values()
        assert compiled
        for variant in compiled:
            assert spilled(variant.asm["cubin"]) == 0


def _each(kernel: RowKernel, choices: Callable[[dict[str, Any]], list[Any]]) -> Callable[..., None]:
    def launch(choice: Any, rows: int, arguments: dict[str, Any], constants: dict[str, Any]) -> None:
        for other in choices(constants):
            RowKernel._launch(kernel, other, rows, arguments, constants)

    return launch


@pytest.mark.parametrize("name", CALLS)
def test_no_number_of_rows_compiles_again(name: str) -> None:
    call, kernels = CALLS[name]
    width = WIDTHS[0]
    for kernel in kernels:
        kernel.kernel.device_caches.clear()
    # One of each: the product has two tiles, and the library takes over from 65 rows on.
    for rows in (5, 40, 200):
        call(rows, width)
    before = [set(variants(kernel.kernel)) for kernel in kernels]
    for rows in ROWS:
        call(rows, width)
    assert [set(variants(kernel.kernel)) for kernel in kernels] == before


def test_another_width_does() -> None:
    """So that the test above can fail."""
    kernel = dynamic_quant.KERNEL
    quantize(3, 64)
    before = set(variants(kernel.kernel))
    quantize(3, 80)
    assert set(variants(kernel.kernel)) > before
