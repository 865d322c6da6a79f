from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.kernels.cpu.dequant_swiglu_quant import npu_dequant_swiglu_quant as compiled
from npu_fusion.kernels.reference.dequant_swiglu_quant import npu_dequant_swiglu_quant as reference

OP = torch.ops.npu.npu_dequant_swiglu_quant.default


def assert_agrees(x: Tensor, *, ties: float = 1e-5, **arguments: Any) -> None:
    y, scale = compiled(x, **arguments)
    expected_y, expected_scale = reference(x, **arguments)
    assert y.dtype == expected_y.dtype and y.shape == expected_y.shape and y.is_contiguous()
    assert scale.shape == expected_scale.shape
    distance = (y.int() - expected_y.int()).abs()
    if distance.numel():
        assert distance.max() <= 1
        assert (distance != 0).double().sum() <= max(1.0, ties * distance.numel())
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0, equal_nan=True)


def int_inputs(tokens: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randint(-200_000, 200_000, (tokens, 2 * width), dtype=torch.int32, generator=generator)
    return x, torch.rand(2 * width, generator=generator) * 2e-4, torch.rand(tokens, generator=generator)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 70),
    source=st.sampled_from([torch.int32, torch.float16, torch.bfloat16]),
    bias=st.sampled_from([None, torch.int32, torch.float32, torch.bfloat16]),
    groups=st.sampled_from([None, 1, 3]),
    smooth=st.booleans(),
    offset=st.booleans(),
    scalars=st.booleans(),
    token_scale=st.booleans(),
    left=st.booleans(),
    mode=st.sampled_from([0, 1]),
    rounding=st.sampled_from([None, 0, 1, 2, 3, 4]),
    swiglu=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(
    tokens: int,
    width: int,
    source: torch.dtype,
    bias: torch.dtype | None,
    groups: int | None,
    smooth: bool,
    offset: bool,
    scalars: bool,
    token_scale: bool,
    left: bool,
    mode: int,
    rounding: int | None,
    swiglu: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight_scale, activation_scale = int_inputs(tokens, width, generator)
    g = groups or 1
    arguments: dict[str, Any] = {
        "activate_left": left,
        "quant_mode": mode,
        "round_mode": rounding,
        "swiglu_mode": swiglu,
    }
    if groups is not None:
        ends = torch.randint(0, tokens + 1, (groups,), generator=generator).sort().values
        arguments["group_index"] = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    if source is torch.int32:
        arguments["weight_scale"] = weight_scale * (1 + torch.rand(g, 1, generator=generator))
        if token_scale:
            arguments["activation_scale"] = activation_scale
        if bias is torch.int32:
            arguments["bias"] = torch.randint(-9999, 9999, (g, 2 * width), dtype=bias, generator=generator)
        elif bias is not None:
            arguments["bias"] = torch.randn(g, 2 * width, generator=generator).to(bias)
    else:
        x = torch.randn(tokens, 2 * width, generator=generator).mul(4).to(source)
    if smooth:
        shape = (g, 1) if scalars and mode == 0 else (g, width)
        arguments["quant_scale"] = torch.rand(shape, generator=generator) + 0.05
        if offset and mode == 0:
            arguments["quant_offset"] = torch.randn(shape, generator=generator)
    assert_agrees(x, **arguments)


@pytest.mark.parametrize("tokens, width", [(64, 4096), (7, 9217)])
def test_large_rows(tokens: int, width: int, generator: torch.Generator) -> None:
    x, weight_scale, activation_scale = int_inputs(tokens, width, generator)
    assert_agrees(x, weight_scale=weight_scale, activation_scale=activation_scale, quant_mode=1)


def test_every_path_sees_nan_infinity_and_zero_rows(generator: torch.Generator) -> None:
    x = torch.randn(9, 70, generator=generator).to(torch.bfloat16)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 40] = torch.inf
    x[3, 40] = -torch.inf
    x[4] = 3e38
    x[5] = 1e-38
    x[6, 5] = -300
    x[7, 69] = torch.nan
    for mode in (0, 1):
        for left in (True, False):
            for swiglu in (0, 1, 2):
                assert_agrees(x, quant_mode=mode, activate_left=left, swiglu_mode=swiglu)


def test_tiny_and_huge_scales(generator: torch.Generator) -> None:
    """Scales whose reciprocal is not a normal number take the division instead."""
    x, weight_scale, activation_scale = int_inputs(5, 33, generator)
    activation_scale = torch.tensor([1e-30, 1e-18, 1.0, 1e12, 1e19])
    arguments = {"weight_scale": weight_scale, "activation_scale": activation_scale}
    assert_agrees(x, **arguments, quant_mode=1, quant_scale=torch.full((33,), 1e-12))
    assert_agrees(x, **arguments, quant_mode=1)
    assert_agrees(x, **arguments, quant_mode=0, quant_scale=torch.full((33,), 1e-30))


def test_int32_bias_wraps() -> None:
    x = torch.full((1, 32), 2**31 - 1, dtype=torch.int32)
    bias = torch.full((32,), 5, dtype=torch.int32)
    assert_agrees(x, weight_scale=torch.full((32,), 1e-9), bias=bias, quant_mode=1)


def test_strides_and_addresses(generator: torch.Generator) -> None:
    x, weight_scale, activation_scale = int_inputs(6, 40, generator)
    expected = reference(x, weight_scale=weight_scale, activation_scale=activation_scale, quant_mode=1)
    shifted = torch.empty(6 * 80 + 1, dtype=torch.int32)[1:].view(6, 80).copy_(x)
    wide = torch.zeros(6, 100, dtype=torch.int32)
    wide[:, 10:90] = x
    for given_x in (shifted, wide[:, 10:90], x.t().contiguous().t()):
        for scale in (weight_scale, weight_scale.repeat_interleave(2)[::2]):
            got = compiled(given_x, weight_scale=scale, activation_scale=activation_scale, quant_mode=1)
            assert torch.equal(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)


def test_more_dimensions(generator: torch.Generator) -> None:
    x, weight_scale, activation_scale = int_inputs(12, 20, generator)
    x, activation_scale = x.view(2, 3, 2, 40), activation_scale.view(2, 3, 2, 1)
    assert_agrees(x, weight_scale=weight_scale, activation_scale=activation_scale, quant_mode=1)


def test_threads_share_the_rows(generator: torch.Generator) -> None:
    x, weight_scale, activation_scale = int_inputs(101, 512, generator)
    counts = torch.tensor([3, 0, 50, 30])
    arguments: dict[str, Any] = {
        "weight_scale": weight_scale * torch.arange(1, 5).view(4, 1),
        "activation_scale": activation_scale,
        "group_index": counts,
        "quant_mode": 1,
    }
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = compiled(x, **arguments)
        torch.set_num_threads(3)
        three = compiled(x, **arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert_agrees(x, **arguments)


def test_callers_in_several_python_threads(generator: torch.Generator) -> None:
    x, weight_scale, activation_scale = int_inputs(64, 256, generator)
    expected = reference(x, weight_scale=weight_scale, activation_scale=activation_scale, quant_mode=1)[0]
    failures: list[str] = []

    def call() -> None:
        for _ in range(50):
            y, _ = OP(x, weight_scale=weight_scale, activation_scale=activation_scale, quant_mode=1)
            if (y.int() - expected.int()).abs().max() > 1:
                failures.append("a wrong result")

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_takes_only_int8_along_the_last_dimension(generator: torch.Generator) -> None:
    x = torch.randn(4, 8, generator=generator).to(torch.bfloat16)
    assert compiled(x, activate_dim=0) is NotImplemented
    assert compiled(x, dst_type=24) is NotImplemented
    assert compiled(x, dst_type=1, activate_dim=1) is not NotImplemented
    assert compiled(x, activate_dim=-1) is not NotImplemented


def test_too_many_rows_are_refused_as_by_the_reference(generator: torch.Generator) -> None:
    x, weight_scale, _ = int_inputs(4, 8, generator)
    arguments = {"weight_scale": weight_scale.expand(2, -1), "quant_mode": 1}
    with pytest.raises(ValueError, match="group_index sum to 6"):
        OP(x, **arguments, group_index=torch.tensor([3, 3]))
