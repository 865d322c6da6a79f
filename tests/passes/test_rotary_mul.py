"""npu_rotary_mul: rotary embeddings as models spell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes._harness import DIALECTS, Outcome, fuse

B, N, S, D = 2, 3, 5, 16

Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_unbound_pairs(x: Tensor) -> Tensor:
    evens, odds = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odds, evens), dim=-1).reshape(x.shape)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def chunks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate_chunks(x) * sin + cos * x


def rotated_in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    return (wide * cos.float() + rotate_half(wide) * sin.float()).to(x.dtype)


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_pairs(x) * sin


def unbound_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_unbound_pairs(x) * sin


def half_by_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-width cosine and sine: GPT-NeoX style in vLLM."""
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


HALF = [half, chunks, rotated_in_float32, half_by_half]
INTERLEAVED = [pairs, unbound_pairs]


def data(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, S, D] by default, with cosine and sine [1, 1, S, D] whose halves agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape or (B, N, S, D), generator=generator)
    angle = torch.rand(1, 1, S, D // 2, generator=generator) * 6
    angle = torch.cat((angle, angle), -1)
    tensors = x.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)
    for tensor in tensors:  # the head dimension of a model is not dynamic
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    return tensors


def oracle(rope: Rope, args: tuple[Tensor, ...]) -> Tensor:
    x, cos, sin = (t.double() for t in args)
    turned = rotate_pairs(x) if rope in INTERLEAVED else rotate_half(x)
    return x * cos + turned * sin


def check(got: Outcome, exact: Tensor, level: str) -> None:
    assert got.fused == {"npu_rotary_mul": 1}
    after = got.report.operators_after
    assert after["npu.npu_rotary_mul"] == 1
    assert not {"aten.add", "aten.mul", "aten.neg", "aten.sub"} & set(after)
    assert got.report.fusions[0].level == level
    assert got.result.dtype == got.expected.dtype
    if level == "strict":
        assert torch.equal(got.result, got.expected)
    else:
        fused, eager = (torch.linalg.vector_norm(t.double() - exact) for t in (got.result, got.expected))
        assert fused <= eager


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rope", HALF + INTERLEAVED, ids=lambda f: f.__name__)
def test_float32_is_strict(rope: Rope, dialect: str, dynamic: bool) -> None:
    args = data(torch.float32)
    got = fuse(rope, args, dialect=dialect, dynamic=dynamic, numerics="strict", verify=True)
    check(got, oracle(rope, args), "strict")
    assert ("'interleave'" in got.code) == (rope in INTERLEAVED)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("rope", HALF + INTERLEAVED, ids=lambda f: f.__name__)
def test_16_bits(rope: Rope, dialect: str) -> None:
    args = data(torch.bfloat16 if dialect == "aot" else torch.float16)
    got = fuse(rope, args, dialect=dialect)
    check(got, oracle(rope, args), "strict" if rope is rotated_in_float32 else "accurate")


def test_strict_refuses_the_products_of_16_bits() -> None:
    got = fuse(half, data(torch.bfloat16), numerics="strict")
    assert got.fused == {}
    (reason,) = got.reasons("rotary_mul")
    assert reason.startswith("numerics='strict' does not allow the difference")
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_query_and_key_as_in_hugging_face(dynamic: bool, dialect: str) -> None:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (t.view(B, S, -1, D).transpose(1, 2) for t in (q, k))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return half(q, cos, sin), half(k, cos, sin)

    q, cos, sin = data(torch.float32, B, S, 4 * D)
    k = data(torch.float32, B, S, 2 * D)[0]
    got = fuse(apply, (q, k, cos[0], sin[0]), dynamic=dynamic, dialect=dialect)
    assert got.fused == {"npu_rotary_mul": 2}
    assert not {"aten.cat", "aten.neg", "aten.add"} & set(got.report.operators_after)
    for result, expected in zip(got.result, got.expected, strict=True):
        assert torch.equal(result, expected)


def test_layout_after_the_rotation() -> None:
    """The source's result has the layout of the transposed query, which the model goes on to view."""

    def fn(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = half(q.view(B, S, N, D).transpose(1, 2), cos, sin)
        return torch.exp(q).transpose(1, 2).view(B, S, N * D)

    _, cos, sin = data(torch.float32)
    q = data(torch.float32, B, S, N * D)[0]
    got = fuse(fn, (q, cos, sin))
    assert got.fused == {"npu_rotary_mul": 1}
    assert got.report.operators_after["aten.clone"] == 1  # the view after the rotation has to copy
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ((B, N, S, D), (1, 1, S, D)),  # BNSD
        ((B, N, S, D), (B, 1, S, D)),
        ((B, N, S, D), (B, N, S, D)),
        ((B, S, N, D), (1, S, 1, D)),  # BSND
        ((B, S, N, D), (B, S, 1, D)),
        ((S, B, N, D), (S, 1, 1, D)),  # SBND
        ((B, N, S, D), (S, D)),
        ((S, N, D), (S, 1, D)),  # TND
        ((S, D), (S, D)),
    ],
)
def test_layouts(shape: tuple[int, ...], factor: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(s, generator=generator) for s in (shape, factor, factor))
    got = fuse(half, (x, cos, sin))
    check(got, oracle(half, (x, cos, sin)), "strict")
    assert got.result.shape == x.shape


def test_float32_cosine_of_a_16_bit_model() -> None:
    x = data(torch.bfloat16)[0]
    _, cos, sin = data(torch.float32)
    got = fuse(rotated_in_float32, (x, cos, sin))
    check(got, oracle(half, (x, cos, sin)), "strict")
    assert "f32[2, 3, 5, 16]" in got.code


def test_part_of_the_head_is_rotated() -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((half(x[..., :D], cos, sin), x[..., D:]), -1)

    x, cos, sin = data(torch.float32)
    got = fuse(fn, (torch.cat((x, x), -1), cos, sin))
    assert got.fused == {"npu_rotary_mul": 1}
    assert torch.equal(got.result, got.expected)


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, -first), -1) * sin


NEAR_MISSES: dict[str, tuple[Rope, tuple[int, ...], tuple[int, ...], str]] = {
    "other way round": (other_way, (B, N, S, D), (S, D), "the rotation is the other way round: cat(x2, -x1)"),
    "five dimensions": (half, (1, B, N, S, D), (S, D), "the input has more than four dimensions: 5"),
    "cosine broadcasts the input": (
        half,
        (1, N, S, D),
        (B, 1, S, D),
        "the cosine or sine has more entries than the input: ",
    ),
    "narrow cosine": (
        half,
        (B, N, S, D),
        (S, 1),
        "cosine and sine do not broadcast over the input as the operator has it: "
        "[5, 1] and [5, 1] for [2, 3, 5, 16]",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss(case: str, dialect: str) -> None:
    rope, shape, factor, reason = NEAR_MISSES[case]
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=generator) for s in (shape, factor, factor)]
    got = fuse(rope, args, dialect=dialect)
    assert got.fused == {}
    assert got.reasons("rotary_mul") == [reason]
    assert torch.equal(got.result, got.expected)


def plus_instead_of_minus(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), c, s = x.chunk(2, -1), cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat((a * c + b * s, b * c + a * s), -1)


def unequal_halves_of_the_cosine(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (a, b), (c, d), (s, t) = (v.chunk(2, -1) for v in (x, cos, sin))
    return torch.cat((a * c - b * s, b * d + a * t), -1)


@pytest.mark.parametrize(
    "rope",
    [
        lambda x, cos, sin: x * cos + rotate_half(x + 1) * sin,
        lambda x, cos, sin: x * cos + torch.cat((-x[..., :8], x[..., 8:]), -1) * sin,
        lambda x, cos, sin: x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin,
        lambda x, cos, sin: x * cos + torch.cat((x[..., 8:], x[..., :8]), -1) * sin,
        lambda x, cos, sin: x * cos - rotate_half(x) * sin,
        lambda x, cos, sin: x * cos + torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2) * sin,
        plus_instead_of_minus,
        unequal_halves_of_the_cosine,
    ],
)
def test_something_else(rope: Rope) -> None:
    got = fuse(rope, data(torch.float32))
    assert got.fused == {}
    assert torch.equal(got.result, got.expected)


def test_sine_of_another_shape() -> None:
    x, cos, sin = data(torch.float32)
    got = fuse(half, (x, cos, sin.expand(B, 1, S, D).contiguous()))
    assert got.fused == {}
    (reason,) = got.reasons("rotary_mul")
    assert reason.startswith("cosine and sine do not broadcast over the input as the operator has it")
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("target", ["ascend910b", "ascend950"])
@pytest.mark.parametrize("rope", [half, pairs], ids=lambda f: f.__name__)
def test_only_half_on_a_target(rope: Rope, target: str) -> None:
    got = fuse(rope, data(torch.float32), target=target)
    if rope is half:
        assert got.fused == {"npu_rotary_mul": 1}
    else:
        assert got.fused == {}
        assert got.reasons("rotary_mul") == [
            "torchair lowers npu_rotary_mul to 'half', whatever its mode: mode 'interleave'"
        ]
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize(
    ("shape", "factor", "reason"),
    [
        ((B, N, S, 896), (S, 896), "the last dimension is larger than 895: it is 896"),
        ((1000, 1, 2, D), (2, D), "a dimension that cosine and sine lack is larger than 999: it is 1000"),
        (
            (B, N, S, D),
            (1, N, S, D),
            "cosine and sine are broadcast over the first dimension alone: [1, 3, 5, 16] for [2, 3, 5, 16]",
        ),
    ],
)
def test_limits_of_a_target(shape: tuple[int, ...], factor: tuple[int, ...], reason: str) -> None:
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(s, generator=generator) for s in (shape, factor, factor)]
    assert fuse(half, args).fused == {"npu_rotary_mul": 1}
    got = fuse(half, args, target="ascend910b")
    assert got.fused == {}
    assert got.reasons("rotary_mul") == [reason]
    assert torch.equal(got.result, got.expected)


@pytest.mark.parametrize("symbolic", ["refuse", "guard"])
def test_symbolic_batch_on_a_target(symbolic: str) -> None:
    got: Any = fuse(half, data(torch.float32), dynamic=True, target="ascend910b", symbolic=symbolic)
    assert got.fused == ({"npu_rotary_mul": 1} if symbolic == "guard" else {})
    assert torch.equal(got.result, got.expected)
    if symbolic == "refuse":
        (reason,) = got.reasons("rotary_mul")
        assert "symbolic sizes leave it open" in reason


def test_switched_off() -> None:
    got = fuse(half, data(torch.float32), rotary_mul=False)
    assert got.fused == {}
    assert torch.equal(got.result, got.expected)
