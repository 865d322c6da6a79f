"""The compiled npu_quant_matmul has the reference's bits: sums of integers are exact, and the fp32 arithmetic
on them is done in the same order."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu import _build, _library
from npu_fusion.kernels.cpu import quant_matmul as kernel
from npu_fusion.kernels.cpu.quant_matmul import npu_quant_matmul as compiled
from npu_fusion.kernels.reference.quant_matmul import npu_quant_matmul as reference
from npu_fusion.meta_impls._dtypes import enum_value

OP = torch.ops.npu.npu_quant_matmul.default
INT8, INT32, FP16, BF16 = 1, 3, 5, 15


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def weight(inner: int, columns: int, transposed: bool) -> Tensor:
    return int8(columns, inner).t() if transposed else int8(inner, columns)


def assert_same(x1: Tensor, x2: Tensor, scale: Tensor, **arguments: Any) -> None:
    result = compiled(x1, x2, scale, **arguments)
    # Copies: torch._int_mm is wrong for one row that is expanded, and for one row of x2 with strides (1, 1).
    x1, x2 = (x.clone(memory_format=torch.contiguous_format) for x in (x1, x2))
    expected = reference(x1, x2, scale, **arguments)
    assert result.dtype == expected.dtype
    assert result.is_contiguous()
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    # A NaN of one may be a NaN with another payload of the other; zeros have their signs.
    if result.dtype.is_floating_point:
        assert torch.equal(result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan())


@settings(max_examples=200, deadline=None)
@given(
    rows=st.one_of(st.integers(0, 14), st.integers(66, 80)),
    inner=st.one_of(st.integers(0, 9), st.integers(60, 70), st.integers(120, 300)),
    columns=st.one_of(st.integers(0, 9), st.integers(30, 70), st.integers(120, 140)),
    transposed=st.booleans(),
    output=st.sampled_from([None, INT8, INT32, FP16, BF16]),
    bias=st.sampled_from([None, torch.int32, torch.float32, torch.bfloat16, torch.float16]),
    one_scale=st.booleans(),
    pertoken=st.booleans(),
    offset=st.sampled_from([None, "one", "each"]),
    seed=st.integers(0, 1000),
)
def test_has_the_bits_of_the_reference(
    rows: int,
    inner: int,
    columns: int,
    transposed: bool,
    output: int | None,
    bias: torch.dtype | None,
    one_scale: bool,
    pertoken: bool,
    offset: str | None,
    seed: int,
) -> None:
    generator = torch.manual_seed(seed)
    arguments: dict[str, Any] = {"output_dtype": output}
    if output in (FP16, BF16) and pertoken:
        arguments["pertoken_scale"] = torch.rand(rows)
    if output in (None, INT8) and offset is not None:
        arguments["offset"] = torch.randn(columns if offset == "each" else 1)
    if bias == torch.int32:
        arguments["bias"] = torch.randint(-(2**31), 2**31 - 1, (columns,)).to(torch.int32)
    elif bias is not None and output in (FP16, BF16):
        arguments["bias"] = torch.randn(columns, generator=generator).to(bias)
    scale = torch.randn(1 if one_scale else columns) * 1e-3
    assert_same(int8(rows, inner), weight(inner, columns, transposed), scale, **arguments)


# One shape for each way of src/int8_gemm.h, its borders, and more than one block of rows and of k.
SHAPES = [
    (1, 4100, 130),
    (2, 8, 4300),
    (6, 65, 129),
    (8, 1030, 900),
    (9, 1030, 700),
    (71, 4200, 66),
    (72, 2100, 66),
    (515, 2050, 67),
    (1030, 70, 65),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_every_way_at_its_borders(
    rows: int, inner: int, columns: int, transposed: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x1, x2 = int8(rows, inner), weight(inner, columns, transposed)
    bias = torch.randint(-9, 9, (columns,), dtype=torch.int32)
    assert_same(x1, x2, torch.ones(1), bias=bias, output_dtype=INT32)
    assert_same(x1, x2, torch.rand(columns), pertoken_scale=torch.rand(rows), output_dtype=BF16)


def test_the_bare_product_of_many_rows_is_left_to_torch() -> None:
    x2 = weight(70, 65, True)
    for rows, taken in ((kernel.MANY_ROWS - 1, True), (kernel.MANY_ROWS, False)):
        result = compiled(int8(rows, 70), x2, torch.ones(1), output_dtype=INT32)
        assert (result is not NotImplemented) == taken
    assert compiled(int8(rows, 70), x2, torch.ones(1), output_dtype=BF16) is not NotImplemented


@pytest.mark.parametrize("variant", _build.variants())
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 300, 70), (7, 67, 133), (80, 130, 70)])
def test_every_instruction_set(
    rows: int, inner: int, columns: int, transposed: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_library.VARIANT, variant)
    try:
        library = _library.open_library()
    except ValueError:
        pytest.skip(f"this processor does not have {variant}")
    assert library.variant == variant
    function = library.function("quant_matmul", kernel.FIELDS)
    monkeypatch.setattr(kernel, "_function", lambda: function)
    extreme = torch.tensor([-128, 127], dtype=torch.int8)
    for x1 in (int8(rows, inner), extreme[0].expand(rows, inner)):
        for x2 in (weight(inner, columns, transposed), extreme[torch.randint(2, (inner, columns))]):
            assert_same(x1, x2, torch.ones(1), output_dtype=INT32)
            assert_same(x1, x2, torch.rand(columns), output_dtype=FP16)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [1, 100])
def test_sums_beyond_32_bits_wrap(rows: int, transposed: bool) -> None:
    inner = 2**17 + 5
    x1 = torch.full((rows, inner), -128, dtype=torch.int8)
    x2 = torch.full((inner, 1), -128, dtype=torch.int8)
    x2 = x2 if transposed else x2.expand(inner, 2).contiguous()
    total = (128 * 128 * inner + 2**31) % 2**32 - 2**31
    assert compiled(x1, x2, torch.ones(1), output_dtype=INT32).unique().tolist() == [total]


@pytest.mark.parametrize("output", [INT8, FP16, BF16])
def test_scales_that_are_no_numbers_or_too_large(output: int) -> None:
    scale = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, 0.0, -0.0, 1e-45, 1.0])
    assert_same(int8(3, 5), int8(5, 8), scale, output_dtype=output)
    assert_same(torch.zeros(3, 5, dtype=torch.int8), int8(5, 8), scale, output_dtype=output)


@pytest.mark.parametrize("bias", [-0.0, 0.0])
def test_negative_zeros_keep_their_sign(bias: float) -> None:
    zeros = torch.zeros(2, 4, dtype=torch.int8)
    scale = torch.tensor([-1.0, 1.0])
    assert_same(zeros, int8(4, 2), scale, output_dtype=BF16)
    assert_same(zeros, int8(4, 2), scale, bias=torch.full((2,), bias), output_dtype=BF16)


def test_packed_scales() -> None:
    packed = torch.randint(0, 2**46, (7,))
    for output in (INT8, FP16):
        assert_same(int8(3, 9), int8(9, 7), packed, output_dtype=output)


def test_batches_of_rows_share_the_weight_and_the_row_scales() -> None:
    x1, x2 = int8(2, 3, 5, 9), weight(9, 20, True)
    assert_same(x1, x2, torch.rand(20), pertoken_scale=torch.rand(5), output_dtype=BF16)
    assert_same(x1[:0], x2, torch.rand(20), pertoken_scale=torch.rand(5), output_dtype=BF16)
    assert_same(x1.transpose(0, 2), x2, torch.rand(20), output_dtype=INT32)


def test_strides_and_unaligned_addresses() -> None:
    memory = int8(40, 200)
    x2 = int8(70, 200)
    for x1 in (
        memory[::2, 3:73],
        memory[:, ::2][:, :70],
        memory.t()[1:71, 5:30].t(),
        memory[:1].expand(9, 200)[:, :70],
    ):
        for w in (
            x2[:, 1:34],
            x2[:, ::3],
            memory[:33, 5:75].t(),
            memory.t()[2:72:1, ::2],
            x2[:, :1].expand(70, 8),
        ):
            assert_same(x1, w, torch.rand(w.shape[1]), output_dtype=BF16)
    for scale in (torch.rand(66)[::2], torch.rand(34)[1:], torch.rand(33).bfloat16()):
        assert_same(memory[:, :70], x2[:, :33], scale, pertoken_scale=torch.rand(80)[::2], output_dtype=BF16)


@pytest.mark.parametrize(
    ("x1", "x2", "bias"),
    [
        (int8(2, 3, 9), int8(2, 9, 4), None),
        (int8(3, 9), int8(2, 9, 4), None),
        (int8(2, 3, 9), int8(9, 4), torch.ones(2, 1, 4, dtype=torch.int32)),
    ],
)
def test_what_it_leaves_to_the_reference(x1: Tensor, x2: Tensor, bias: Tensor | None) -> None:
    scale = torch.ones(4)
    assert compiled(x1, x2, scale, bias=bias, output_dtype=INT32) is NotImplemented
    expected = torch.matmul(x1.double(), x2.double()) + (0 if bias is None else bias)
    assert torch.equal(OP(x1, x2, scale, bias=bias, output_dtype=INT32).double(), expected)


def test_several_threads_at_once() -> None:
    inputs = [(int8(rows, 257), weight(257, 300, rows % 2 == 0)) for rows in (1, 7, 8, 40, 90, 91)]
    expected = [reference(x1, x2, torch.ones(1), output_dtype=INT32) for x1, x2 in inputs]
    failures: list[int] = []

    def work(start: int) -> None:
        for turn in range(30):
            index = (start + turn) % len(inputs)
            if not torch.equal(compiled(*inputs[index], torch.ones(1), output_dtype=INT32), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_operator_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = kernel._function

    def counted() -> Any:
        calls.append(1)
        return original()

    monkeypatch.setattr(kernel, "_function", counted)
    x1, x2, scale = int8(3, 64), int8(64, 8), torch.rand(8)
    y = OP(x1, x2, scale, output_dtype=enum_value(torch.bfloat16))
    assert calls == [1]
    assert torch.equal(y, reference(x1, x2, scale, output_dtype=BF16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_leaves_floating_point_operands_to_the_reference(dtype: torch.dtype) -> None:
    """Both have a byte for each number, as int8 has."""
    x1, x2 = torch.ones(3, 32).to(dtype), torch.ones(32, 4).to(dtype)
    numbers = {"x1_dtype": 290, "x2_dtype": 290} if dtype == torch.uint8 else {}
    assert compiled(x1, x2, torch.ones(4), output_dtype=BF16, **numbers) is NotImplemented
    y = OP(x1, x2, torch.ones(4), output_dtype=BF16, **numbers)
    assert torch.equal(y, reference(x1, x2, torch.ones(4), output_dtype=BF16, **numbers))
