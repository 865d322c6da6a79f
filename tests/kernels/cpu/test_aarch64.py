"""Every kernel, compiled for aarch64 and run in qemu, agrees with the reference."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import _bf16_matmul, _build
from npu_fusion.meta_impls._registry import OPERATORS
from tests.kernels.cpu import test_bf16_matmul as bf16_matmul
from tests.kernels.cpu import test_kv_rmsnorm_rope_cache as key_rows
from tests.kernels.cpu import test_mla_prolog as mla_prolog
from tests.kernels.cpu._agreement import FLOATS, assert_agrees, laid_out, normal, positive, special_rows
from tests.kernels.cpu._emulated import DRIVER, EmulatedLibrary

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SYSTEM = Path("/usr/aarch64-linux-gnu")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR) and SYSTEM.exists()),
        reason=f"needs {COMPILER} and {EMULATOR}",
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedLibrary]:
    directory = tmp_path_factory.mktemp("aarch64")
    library = _build.build(directory / "kernels.so", compiler=COMPILER, machine="aarch64")
    driver = directory / "emulated_call"
    subprocess.run([COMPILER, "-O1", "-o", str(driver), str(DRIVER), "-ldl"], check=True)
    command = [EMULATOR, "-cpu", "max", "-L", str(SYSTEM), str(driver)]
    neon = EmulatedLibrary(command, library, "neon", directory)
    with neon.used():
        yield neon


def compare(emulated: EmulatedLibrary, operator: str, *args: Any, **kwargs: Any) -> None:
    found = OPERATORS[operator]
    assert found.compiled is not None and found.cpu is not None
    results = emulated.run(found.compiled, *args, **kwargs)
    assert results is not NotImplemented
    assert_agrees(results, found.cpu(*args, **kwargs))


def rows(dtype: torch.dtype, width: int) -> list[Tensor]:
    """Whole blocks, tails and unaligned addresses; and rows of special numbers."""
    return [
        normal(3, width, seed=0, dtype=dtype),
        laid_out(normal(2, width, seed=1, dtype=dtype), "unaligned"),
        special_rows(width, dtype, seed=2),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8, 64, 77])
def test_dynamic_quant(emulated: EmulatedLibrary, dtype: torch.dtype, width: int) -> None:
    smooth = positive(width, seed=3, dtype=dtype)
    groups = {
        "smooth_scales": positive(2, width, seed=4),
        "group_index": torch.tensor([1, 2], dtype=torch.int32),
    }
    for x in rows(dtype, width):
        for operator in ("npu_dynamic_quant", "npu_dynamic_quant_asymmetric"):
            compare(emulated, operator, x)
            compare(emulated, operator, x, smooth_scales=smooth)
            compare(emulated, operator, x, **groups)
        compare(emulated, "npu_dynamic_quant", x, quant_mode="pertensor")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8, 64, 77])
def test_quantize(emulated: EmulatedLibrary, dtype: torch.dtype, width: int) -> None:
    scales, zero = positive(width, seed=3) * 0.1, normal(width, seed=4)
    for x in rows(dtype, width):
        compare(emulated, "npu_quantize", x, scales, zero, 1, -1, True)
        compare(emulated, "npu_quantize", x, scales[:1], None, 1, -1, False)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8, 64, 77, 1100])
def test_norms(emulated: EmulatedLibrary, dtype: torch.dtype, width: int) -> None:
    gamma, beta = positive(width, seed=3, dtype=dtype), normal(width, seed=4, dtype=dtype)
    scale, zero = positive(width, seed=5) * 0.05, normal(width, seed=6)
    for x in rows(dtype, width):
        other = normal(*x.shape, seed=7, dtype=dtype)
        compare(emulated, "npu_rms_norm", x, gamma)
        compare(emulated, "npu_rms_norm", x, gamma.float())
        compare(emulated, "npu_add_rms_norm", x, other, gamma)
        arguments = {"beta": beta, "scales2": scale * 2}
        compare(emulated, "npu_add_rms_norm_quant", x, other, gamma, scale, zero, **arguments)
        if dtype is not torch.float32:
            operator = "npu_add_rms_norm_dynamic_quant"
            compare(emulated, operator, x, other, gamma)
            arguments = {"smooth_scale1": gamma, "smooth_scale2": gamma * 2, "beta": beta}
            compare(emulated, operator, x, other, gamma, **arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [8, 64, 78])
def test_rotations(emulated: EmulatedLibrary, dtype: torch.dtype, width: int) -> None:
    for x in (
        normal(1, 3, 2, width, seed=0, dtype=dtype),
        special_rows(width, dtype, 1).view(2, 2, 2, width),
    ):
        q = x.transpose(1, 2).contiguous().transpose(1, 2)
        cos, sin = (normal(1, 1, 2, width, seed=seed, dtype=dtype) for seed in (2, 3))
        compare(emulated, "npu_rotary_mul", q, cos, sin)
        compare(emulated, "npu_rotary_mul", q, cos, sin, "interleave")
        compare(emulated, "npu_interleave_rope", q, cos, sin)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [16, 64, 154])
def test_swiglu(emulated: EmulatedLibrary, dtype: torch.dtype, width: int) -> None:
    groups = {"smooth_scales": positive(2, seed=3), "group_index": torch.tensor([1, 2], dtype=torch.int32)}
    for x in rows(dtype, width):
        compare(emulated, "npu_swiglu", x)
        compare(emulated, "npu_swiglu_quant", x, quant_mode=1)
        compare(emulated, "npu_swiglu_quant", x, quant_mode=1, **groups)
        compare(emulated, "npu_swiglu_quant", x * 9, offsets=normal(2, seed=4), **groups)
    gate = torch.linspace(-120, 120, 4800).to(dtype)
    compare(emulated, "npu_swiglu", torch.cat([gate, torch.ones_like(gate)]))


@pytest.mark.parametrize("width", [16, 64, 154])
def test_dequant_swiglu_quant(emulated: EmulatedLibrary, width: int) -> None:
    operator = "npu_dequant_swiglu_quant"
    x = torch.randint(-200_000, 200_000, (4, width), dtype=torch.int32)
    scales = {"weight_scale": positive(width, seed=1) * 2e-4, "activation_scale": positive(4, seed=2)}
    for mode in (0, 1):
        for swiglu in (0, 1, 2):
            compare(emulated, operator, x, **scales, quant_mode=mode, swiglu_mode=swiglu)
        for rounding in (1, 2, 3, 4):
            compare(emulated, operator, x, **scales, quant_mode=mode, round_mode=rounding)
        for dtype in (torch.bfloat16, torch.float16):
            for floats in rows(dtype, width):
                compare(emulated, operator, floats, quant_mode=mode)


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("by_column", [False, True])
def test_quant_matmul(emulated: EmulatedLibrary, m: int, by_column: bool) -> None:
    generator = torch.Generator().manual_seed(m)
    x = torch.randint(-128, 128, (m, 83), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (45, 83), dtype=torch.int8, generator=generator).T
    w = w if by_column else w.contiguous()
    scale, pertoken = positive(45, seed=1) * 1e-3, positive(m, seed=2)
    compare(emulated, "npu_quant_matmul", x, w, scale, pertoken_scale=pertoken, output_dtype=torch.bfloat16)
    compare(emulated, "npu_quant_matmul", x, w, scale, output_dtype=torch.float16)
    compare(emulated, "npu_quant_matmul", x, w, scale)


@pytest.mark.parametrize("mode", key_rows.MODES)
@pytest.mark.parametrize("int8", [False, True])
def test_kv_rmsnorm_rope_cache(emulated: EmulatedLibrary, mode: str, int8: bool) -> None:
    for dtype in FLOATS:
        args, scales = key_rows.make(2, 3, 64, 32, mode, dtype, int8, 1)
        options = {"cache_mode": mode, "is_output_kv": True, **scales}
        compare(emulated, "npu_kv_rmsnorm_rope_cache", *args, **options)


@pytest.mark.parametrize("modes", mla_prolog.TAKEN)
@pytest.mark.parametrize("cache_mode", ["PA_BSND", "PA_NZ"])
def test_mla_prolog(emulated: EmulatedLibrary, modes: tuple[int, int, int], cache_mode: str) -> None:
    a = mla_prolog.arguments(modes, cache_mode=cache_mode)
    found = OPERATORS[mla_prolog.FUNCTIONAL]
    names = mla_prolog.POSITIONAL
    tensors, options = [a[name] for name in names], {k: v for k, v in a.items() if k not in names}
    assert found.compiled is not None and found.cpu is not None
    results = emulated.run(found.compiled, *tensors, **options)
    mla_prolog.assert_agree(results, found.cpu(*tensors, **options))


@pytest.mark.parametrize("rows_of_k", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 1), (1, 300, 70), (6, 64, 64), (7, 33, 17), (13, 301, 130)])
def test_bf16_matmul(
    emulated: EmulatedLibrary, m: int, k: int, n: int, rows_of_k: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bf16_matmul, "_has_onednn", lambda dtype: False)
    x, weight = normal(2, m, k, seed=0, dtype=torch.bfloat16), normal(2, k, n, seed=1, dtype=torch.bfloat16)
    if rows_of_k:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    y = torch.full((2, m, n), torch.nan, dtype=torch.bfloat16)
    emulated.run(_bf16_matmul.matmul, x, weight, y)
    bf16_matmul.assert_rounded_sums(y, x, weight)
