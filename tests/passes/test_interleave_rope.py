"""npu_interleave_rope: rotary embeddings that sort pairs into halves first (DeepSeek)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes._harness import DIALECTS, Outcome, fuse
from tests.passes.test_rotary_mul import half

B, N, S, D = 2, 3, 5, 16

Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def viewed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Transformers before 5.15."""
    b, n, s, d = x.shape
    return half(x.view(b, n, s, d // 2, 2).transpose(4, 3).reshape(b, n, s, d), cos, sin)


def sorted_by_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return half(torch.cat((x[..., ::2], x[..., 1::2]), -1), cos, sin)


def sliced(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Transformers since 5.15: no sorting, half of the cosine and sine."""
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    evens, odds = x[..., 0::2], x[..., 1::2]
    return torch.cat([evens * cos - odds * sin, odds * cos + evens * sin], dim=-1)


ROPES = [viewed, sorted_by_slices, sliced]


def data(dtype: torch.dtype, width: int = D) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, S, width, generator=generator)
    angle = torch.rand(1, 1, S, width // 2, generator=generator) * 6
    angle = torch.cat((angle, angle), -1)
    tensors = x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)
    for tensor in tensors:  # the head dimension of a model is not dynamic
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    return tensors


def oracle(args: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, cos, sin = (t.double() for t in args)
    return sorted_by_slices(x, cos, sin)


def check(got: Outcome, exact: Tensor, level: str) -> None:
    assert got.fused == {"npu_interleave_rope": 1}
    after = got.report.operators_after
    assert after["npu.npu_interleave_rope"] == 1
    assert not {"aten.add", "aten.mul", "aten.neg", "aten.sub"} & set(after)
    assert got.report.fusions[0].level == level
    if level == "strict":
        assert torch.equal(got.result, got.expected)
    else:
        fused, eager = (torch.linalg.vector_norm(t.double() - exact) for t in (got.result, got.expected))
        assert fused <= eager


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rope", ROPES, ids=lambda f: f.__name__)
def test_float32_is_strict(rope: Rope, dialect: str, dynamic: bool) -> None:
    args = data(torch.float32)
    got = fuse(rope, args, dialect=dialect, dynamic=dynamic, numerics="strict", verify=True)
    check(got, oracle(args), "strict")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rope", ROPES, ids=lambda f: f.__name__)
def test_16_bits(rope: Rope, dialect: str) -> None:
    args = data(torch.bfloat16 if dialect == "aot" else torch.float16)
    got = fuse(rope, args, dialect=dialect)
    check(got, oracle(args), "accurate")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_query_and_key_as_in_deepseek(dialect: str) -> None:
    """The rotary part is split off a transposed projection; the key has one head."""

    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        plain, rotary = q.view(B, S, N, 2 * D).transpose(1, 2).split([D, D], -1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        key = viewed(k.view(B, 1, S, D), cos, sin)
        return torch.cat((plain, viewed(rotary, cos, sin)), -1), key

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, S, N * 2 * D, generator=generator), torch.randn(B, S, D, generator=generator)
    _, cos, sin = data(torch.float32)
    got = fuse(fn, (q, k, cos[0], sin[0]), dialect=dialect, dynamic=True)
    assert got.fused == {"npu_interleave_rope": 2}
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_another_layout_is_rotated_by_the_smaller_operator() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return sorted_by_slices(x, cos.transpose(1, 2), sin.transpose(1, 2))

    x, cos, sin = data(torch.float32)
    x = x.transpose(1, 2).contiguous()
    got = fuse(fn, (x, cos, sin))
    assert got.fused == {"npu_rotary_mul": 1}
    assert got.reasons("interleave_rope") == [
        "the layout is not [B, N, S, D] with one cosine for all heads: [2, 5, 3, 16] and [1, 5, 1, 16]"
    ]
    assert torch.equal(got.result, got.expected)


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Odd entries first."""
    return half(torch.cat((x[..., 1::2], x[..., ::2]), -1), cos, sin)


def regrouped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Quarters instead of pairs."""
    b, n, s, d = x.shape
    return half(x.view(b, n, s, d // 4, 4).transpose(4, 3).reshape(b, n, s, d), cos, sin)


@pytest.mark.parametrize("rope", [half, swapped, regrouped], ids=lambda f: f.__name__)
def test_other_orders_are_rotated_by_the_smaller_operator(rope: Rope) -> None:
    got = fuse(rope, data(torch.float32))
    assert got.fused == {"npu_rotary_mul": 1}
    assert got.reasons("interleave_rope") == []
    assert torch.equal(got.result, got.expected)


def test_adjacent_pairs_in_the_result_are_another_operator() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[..., : D // 2], sin[..., : D // 2]
        evens, odds = x[..., 0::2], x[..., 1::2]
        return torch.stack([evens * cos - odds * sin, odds * cos + evens * sin], dim=-1).flatten(-2)

    got = fuse(fn, data(torch.float32))
    assert got.fused == {}
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize(
    ("target", "dtype", "width", "reason"),
    [
        ("ascend910b", torch.bfloat16, 64, None),
        ("ascend910b", torch.bfloat16, 32, "the last dimension is not 64: it is 32"),
        ("ascend950", torch.float32, 64, None),
        ("ascend950", torch.float32, 128, "the last dimension is not 64: it is 128"),
        ("ascend910_93", torch.float32, 64, "npu_interleave_rope takes float16 and bfloat16: float32"),
    ],
)
def test_target(target: str, dtype: torch.dtype, width: int, reason: str | None) -> None:
    got = fuse(viewed, data(dtype, width), target=target)
    if reason is None:
        assert got.fused == {"npu_interleave_rope": 1}
    else:
        assert got.fused == {"npu_rotary_mul": 1}
        assert got.reasons("interleave_rope") == [reason]
    torch.testing.assert_close(got.result, got.expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize(("target", "copies"), [("ascend910b", 1), ("ascend950", 0), (None, 0)])
def test_contiguous_where_the_device_wants_it(target: str | None, copies: int) -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return sliced(x.transpose(1, 2), cos, sin)

    x, cos, sin = data(torch.bfloat16, 64)
    x = x.transpose(1, 2).contiguous()
    got = fuse(fn, (x, cos, sin), target=target)
    assert got.fused == {"npu_interleave_rope": 1}
    assert got.report.operators_after.get("aten.clone", 0) == copies
    torch.testing.assert_close(got.result, got.expected, rtol=2**-6, atol=2**-6)


def test_switched_off() -> None:
    got = fuse(viewed, data(torch.float32), interleave_rope=False)
    assert got.fused == {"npu_rotary_mul": 1}
    assert torch.equal(got.result, got.expected)
