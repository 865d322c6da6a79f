"""npu_add_rms_norm: the residual addition in front of a norm, with every way in which the sum is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes._harness import DIALECTS, Outcome, fuse
from tests.passes.test_rms_norm import EPS, H, assert_no_worse, hugging_face, oracle

npu = torch.ops.npu

Block = Callable[[Tensor, Tensor, Tensor], Any]


def data(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*(lead or (2, 5)), H, generator=generator) * 2 for _ in range(2))
    return a.to(dtype), b.to(dtype), (torch.randn(H, generator=generator) + 1).to(dtype)


def pre_norm(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    return hugging_face(total, g), total


def functional(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    return F.rms_norm(total, (H,), g, EPS), total


def float32_residual(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's native form: the sum is rounded for the next layer only."""
    wide = a.float() + b.float()
    residual = wide.to(a.dtype)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return wide.to(a.dtype) * g, residual


def called(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    return npu.npu_rms_norm(total, g, EPS)[0], total


BLOCKS = [pre_norm, functional, float32_residual, called]


def check(got: Outcome, args: tuple[Tensor, Tensor, Tensor]) -> None:
    assert got.fused == {"npu_add_rms_norm": 1}
    after = got.report.operators_after
    assert after["npu.npu_add_rms_norm"] == 1
    assert not {"aten.add", "aten.rsqrt", "aten.mean", "aten.mul", "npu.npu_rms_norm"} & set(after)
    a, b, g = args
    (y, total), (expected, expected_total) = got.result, got.expected
    assert y.dtype == total.dtype == a.dtype
    assert torch.equal(total, expected_total)
    assert_no_worse(y, expected, oracle(a.double() + b.double(), g))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block(block: Block, dtype: torch.dtype, dialect: str) -> None:
    args = data(dtype)
    got = fuse(block, args, dialect=dialect, dynamic=dtype == torch.float16)
    check(got, args)
    assert got.report.fusions[0].level == "accurate"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda f: f.__name__)
def test_float32_is_strict(block: Block, dialect: str, dynamic: bool) -> None:
    args = data(torch.float32)
    got = fuse(block, args, dialect=dialect, dynamic=dynamic, numerics="strict", verify=True)
    check(got, args)
    assert torch.equal(got.result[0], got.expected[0])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_sum_may_be_unused(dialect: str) -> None:
    args = data(torch.bfloat16)
    got = fuse(lambda a, b, g: hugging_face(a + b, g), args, dialect=dialect)
    assert got.fused == {"npu_add_rms_norm": 1}
    a, b, g = args
    assert_no_worse(got.result, got.expected, oracle(a.double() + b.double(), g))


def test_the_sum_is_read_in_float32_too() -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = a.float() + b.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * g).to(a.dtype)
        return normed, wide, wide.to(a.dtype)

    got = fuse(block, data(torch.bfloat16))
    assert got.fused == {"npu_add_rms_norm": 1}
    assert [t.dtype for t in got.result] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_a_float32_stream_with_16_bit_branches() -> None:
    def block(stream: Tensor, branch: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = stream + branch
        return F.rms_norm(total, (H,), g, EPS), total

    stream, _, g = data(torch.float32)
    got = fuse(block, (stream, data(torch.bfloat16)[1], g))
    assert got.fused == {"npu_add_rms_norm": 1}
    assert got.report.fusions[0].level == "strict"
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_chain_of_layers(dialect: str) -> None:
    """Every sum is normalized and added to: the residual stream goes through the operators' third output."""

    def layers(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        residual, h = x, hugging_face(x, g)
        for _ in range(3):
            residual = residual + torch.tanh(h @ w)
            h = hugging_face(residual, g)
        return h

    a, _, g = data(torch.bfloat16)
    w = torch.randn(H, H, generator=torch.Generator().manual_seed(1)).bfloat16() / H**0.5
    got = fuse(layers, (a, w, g), dialect=dialect, dynamic=True)
    assert got.fused == {"npu_rms_norm": 1, "npu_add_rms_norm": 3}
    assert "aten.add" not in got.report.operators_after
    torch.testing.assert_close(got.result, got.expected, rtol=0.05, atol=0.05)


def test_of_two_norms_of_one_sum_the_second_reads_it() -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = a + b
        return F.rms_norm(total, (H,), g, EPS), F.rms_norm(total, (H,), g * 2, EPS), total

    args = data(torch.float32)
    got = fuse(block, args)
    assert got.fused == {"npu_add_rms_norm": 1, "npu_rms_norm": 1}
    assert got.reasons("add_rms_norm") == []
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_computed_weight() -> None:
    """The weight comes after the sum in the graph: the replacement is put behind it."""

    def block(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        doubled = total * 2
        return F.rms_norm(total, (H,), 1 + w, EPS), doubled

    got = fuse(block, data(torch.float32))
    assert got.fused == {"npu_add_rms_norm": 1}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_float32_weight_of_a_16_bit_model_keeps_the_smaller_operator(dialect: str) -> None:
    def block(a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        wide = total.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1 + w.float())
        return normed.to(total.dtype), total

    got = fuse(block, data(torch.bfloat16), dialect=dialect)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm") == [
        "the weight does not have the dtype of the addends: float32, not bfloat16"
    ]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_result_in_float32_keeps_the_smaller_operator() -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        wide = total.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * g, total

    got = fuse(block, data(torch.bfloat16))
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm") == [
        "the operator returns the dtype of its inputs: bfloat16 in, float32 out"
    ]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_broadcast_addend() -> None:
    a, b, g = data(torch.float32)
    got = fuse(functional, (a, b[:, :1], g))
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm") == ["the addends have different shapes: [2, 5, 48] and [2, 1, 48]"]
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_a_bias_is_no_residual() -> None:
    a, _, g = data(torch.float32)
    got = fuse(functional, (a, g * 3, g))
    assert got.fused == {"npu_rms_norm": 1}
    assert got.reasons("add_rms_norm") == []
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_scaled_addition_is_not_matched() -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.add(a, b, alpha=0.5)
        return F.rms_norm(total, (H,), g, EPS), total

    got = fuse(block, data(torch.float32))
    assert got.fused == {"npu_rms_norm": 1}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("block", [pre_norm, functional], ids=lambda f: f.__name__)
def test_strict_refuses_the_unrounded_sum(block: Block) -> None:
    got = fuse(block, data(torch.bfloat16), numerics="strict")
    assert got.fused == ({"npu_rms_norm": 1} if block is functional else {})
    (reason,) = got.reasons("add_rms_norm")
    assert reason.startswith("numerics='strict' does not allow the difference")
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_rstd_of_the_called_operator_is_used() -> None:
    def block(a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y, rstd = npu.npu_rms_norm(a + b, g, EPS)
        return y, rstd

    got = fuse(block, data(torch.bfloat16))
    assert got.fused == {}
    (reason,) = got.reasons("add_rms_norm")
    assert reason.startswith(
        "an intermediate value that the fused operator does not return has a second user"
    )
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_a_call_of_the_operator_stays() -> None:
    got = fuse(lambda a, b, g: npu.npu_add_rms_norm(a, b, g, EPS)[::2], data(torch.bfloat16))
    assert got.fused == {}
    assert got.report.refused == []
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_switched_off() -> None:
    got = fuse(pre_norm, data(torch.float32), add_rms_norm=False)
    assert got.fused == {"npu_rms_norm": 1}
