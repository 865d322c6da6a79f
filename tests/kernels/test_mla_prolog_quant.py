from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from tests.kernels._mla_prolog import (
    COMBINATIONS,
    DR,
    E4M3,
    HCKV,
    HCQ,
    TILE,
    N,
    arguments,
    assert_near,
    assert_same,
    call,
    expected,
    slots,
)

FUNCTIONAL = "npu_mla_prolog_v3_functional"
BF16 = torch.bfloat16


def assert_steps(result: Tensor, exact: Tensor) -> None:
    """int8 ``result`` is ``exact``, rounded to a neighbour at most, and nearly always to the nearest."""
    distance = (result.double().view(exact.shape) - exact.round().clamp(-128, 127)).abs()
    assert distance.max() <= 1
    assert (distance > 0).double().mean() < 0.02


@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
@pytest.mark.parametrize("modes", COMBINATIONS[1:])
def test_matches_float64(modes: tuple[int, int, int], tokens: tuple[int, ...]) -> None:
    a = arguments(modes, tokens)
    exact = expected(a)
    query, query_rope, scale, norm, norm_scale, kv, kr = call(FUNCTIONAL, **a)
    check_norm(a, exact.norm, norm, norm_scale)
    if modes[2]:
        largest = 448 if modes[0] == 3 else 127
        assert scale.shape == (6, N, 1)
        wanted = exact.query.abs().amax(-1, keepdim=True) / largest
        torch.testing.assert_close(scale.double(), wanted, rtol=1e-2, atol=0)
        # The largest distance of neighbours: 1 in int8, 32 in float8.
        unit = float(scale.max()) * (32 if modes[0] == 3 else 1)
        values = query.double().view(exact.query.shape) * scale
        torch.testing.assert_close(values, exact.query, rtol=0, atol=unit)
        exact.query_rope *= float(a["quant_scale_ckv"][0]) / wanted
    else:
        assert scale.shape == (0,) and query.dtype == BF16
        assert_near(query, exact.query, BF16)
    # q is as good as the quantized n: a step of one of 127 in one of 32 elements.
    assert_near(query_rope, exact.query_rope, BF16)
    where = slots(a)
    check_caches(a, exact.ckv, exact.kr, kv.view(-1, kv.shape[-1])[where], kr.view(-1, DR))


def check_norm(a: dict[str, Any], n: Tensor, norm: Tensor, scale: Tensor) -> None:
    assert norm.dtype == a["weight_uq_qr"].dtype and norm.shape == (*a["token_x"].shape[:-1], HCQ)
    if a["weight_quant_mode"] == 3:
        assert scale.shape == (6, HCQ // 32)
        unit = 2.0 ** (n.to(BF16).double().abs().amax(-1, keepdim=True).log2().floor() - 8)
        assert_same(scale, unit.to(torch.float8_e8m0fnu))
        values = norm.double().view(n.shape) * unit
        torch.testing.assert_close(
            values, n.clamp(-448 * unit, 448 * unit), rtol=2.0**-4 + 2.0**-8, atol=1e-3
        )
        return
    n = n * a["smooth_scales_cq"].double()
    assert scale.shape == (6, 1)
    wanted = n.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(scale.double(), wanted, rtol=1e-2, atol=0)
    assert_steps(norm, n / wanted)


def check_caches(a: dict[str, Any], ckv: Tensor, kr: Tensor, kv_rows: Tensor, kr_rows: Tensor) -> None:
    mode = a["kv_cache_quant_mode"]
    if mode == 3:
        assert kr_rows.numel() == 0
        check_tiles(a, ckv, kr, kv_rows)
        return
    kr_rows = kr_rows[slots(a)]
    if mode == 2:
        assert_steps(kv_rows, ckv * a["quant_scale_ckv"].double())
        assert_steps(kr_rows, kr.to(BF16).double() * a["quant_scale_ckr"].double())
        return
    assert_near(kr_rows, kr, BF16)
    if mode == 0:
        assert_near(kv_rows, ckv, BF16)
    elif kv_rows.dtype == torch.int8:
        assert_steps(kv_rows, ckv * 30)
    else:
        wanted = (ckv * 30).clamp(-448, 448)
        torch.testing.assert_close(kv_rows.double(), wanted, rtol=2.0**-4 + 2.0**-8, atol=1e-2)


def check_tiles(a: dict[str, Any], ckv: Tensor, kr: Tensor, rows: Tensor) -> None:
    raw = rows.contiguous().view(torch.uint8)
    assert raw.shape[1] == HCKV + 2 * DR + 4 * (HCKV // TILE)
    data = raw[:, :HCKV].contiguous().view(rows.dtype).double()
    rope = raw[:, HCKV : HCKV + 2 * DR].contiguous().view(BF16)
    scale = raw[:, HCKV + 2 * DR :].contiguous().view(torch.float32).double()
    assert_near(rope, kr, BF16)
    for tile in range(HCKV // TILE):
        columns = slice(tile * TILE, (tile + 1) * TILE)
        v, q = ckv[:, columns], data[:, columns]
        if rows.dtype == torch.int8:
            limit = v.abs().amax(-1, keepdim=True) * 0.8
            torch.testing.assert_close(scale[:, tile, None], limit / 127, rtol=1e-2, atol=0)
            assert_steps(q, torch.maximum(torch.minimum(v, limit), -limit) / (limit / 127))
            assert q.abs().max() == 127
        else:
            wanted = v.abs().amax(-1, keepdim=True) / 448
            torch.testing.assert_close(scale[:, tile, None], wanted, rtol=1e-2, atol=0)
            torch.testing.assert_close(q * wanted, v, rtol=2.0**-4 + 2.0**-8, atol=1e-3)


@pytest.mark.parametrize("modes", [(1, 0, 0), (2, 0, 0)])
def test_smooth_scales_are_a_factor_of_the_norm(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    smooth = a.pop("smooth_scales_cq")
    inside = a | {"rmsnorm_gamma_cq": (smooth[0] > 0.5).to(BF16)}
    ones = a | {"rmsnorm_gamma_cq": torch.ones(HCQ, dtype=BF16), "smooth_scales_cq": (smooth > 0.5).float()}
    for given, wanted in zip(call(FUNCTIONAL, **ones), call(FUNCTIONAL, **inside), strict=True):
        assert_same(given, wanted)


def test_only_the_first_element_of_a_per_tensor_scale_is_read() -> None:
    a = arguments((2, 1, 1))
    wide = torch.full((1, HCKV), math.nan)
    wide[0, 0] = a["quant_scale_ckv"][0]
    for given, wanted in zip(
        call(FUNCTIONAL, **a | {"quant_scale_ckv": wide}), call(FUNCTIONAL, **a), strict=True
    ):
        assert_same(given, wanted)


def test_scales_multiply_and_values_saturate() -> None:
    a = arguments((1, 2, 0))
    a |= {"quant_scale_ckv": a["quant_scale_ckv"] * 1e6, "quant_scale_ckr": a["quant_scale_ckr"] * 1e6}
    exact = expected(a)
    *_, kv, kr = call(FUNCTIONAL, **a)
    for cache, wanted in ((kv, exact.ckv), (kr, exact.kr)):
        rows = cache.view(-1, cache.shape[-1])[slots(a)]
        assert set(rows.flatten().tolist()) <= {-128, 127, 0}
        assert torch.equal(rows[wanted > 1e-2], torch.full_like(rows[wanted > 1e-2], 127))
        assert torch.equal(rows[wanted < -1e-2], torch.full_like(rows[wanted < -1e-2], -128))


def test_halves_are_rounded_to_even() -> None:
    """ckv is (1, -1, 1, -1, ..), the scales halves."""
    a = arguments((1, 2, 0), tokens=(1,)) | {"kc_scale": 1.0, "rmsnorm_epsilon_ckv": 0.0}
    signs = torch.tensor([1.0, -1.0] * (HCKV // 2)).to(BF16)
    weight = torch.zeros_like(a["weight_dkv_kr"])
    weight[0, :HCKV] = signs
    a |= {"weight_dkv_kr": weight, "token_x": torch.ones_like(a["token_x"])}
    a["rmsnorm_gamma_ckv"] = torch.ones(HCKV, dtype=BF16)
    a["quant_scale_ckv"] = torch.arange(HCKV)[None] + 0.5
    *_, kv, _ = call(FUNCTIONAL, **a)
    row = kv.view(-1, HCKV)[slots(a)[0]]
    assert row[:6].tolist() == [0, -2, 2, -4, 4, -6]


def test_full_quantization_keeps_cq_and_q_unrounded() -> None:
    """dequant_scale_x 2^-9 and 1: a bf16 rounding of kv would lose the last bits of 1 + 2^-9."""
    a = arguments((2, 0, 0), tokens=(1,))
    x, weight = torch.zeros_like(a["token_x"]), torch.zeros_like(a["weight_dkv_kr"])
    x[0, 0], x[0, 1] = 127, 1
    # k_pe = (127 * 4 + 5, 512, 0, ..) = (513, 512, 0, ..).
    weight[0, HCKV], weight[1, HCKV] = 4, 5
    weight[0, HCKV + 1], weight[1, HCKV + 1] = 4, 4
    one = torch.ones(1, DR, dtype=BF16)
    a |= {"token_x": x, "weight_dkv_kr": weight, "rope_sin": one, "rope_cos": one}
    a |= {"dequant_scale_x": torch.ones(1, 1), "dequant_scale_w_dkv_kr": torch.ones(1, HCKV + DR)}
    *_, kr = call(FUNCTIONAL, **a)
    assert kr.view(-1, DR)[slots(a)[0]][0] == 1.0


def test_q_nope_is_rounded_before_the_product_with_weight_uk() -> None:
    """q_nope is (127 q, q, 0, ..) and weight_uk (1, -127, ..): they cancel unless q_nope is rounded."""
    a = arguments((1, 0, 0), tokens=(1,))
    a["weight_dq"][:, 1:] = 0
    a["weight_uq_qr"].zero_()
    a["weight_uq_qr"][0, :2] = torch.tensor([127, 1])
    a["weight_uk"][0, :2] = torch.tensor([[1.0], [-127.0]]).to(BF16)
    a["dequant_scale_w_uq_qr"].fill_(0.01)
    query, _, _, norm, norm_scale, *_ = call(FUNCTIONAL, **a)
    assert norm.flatten().abs().tolist() == [127] + [0] * (HCQ - 1)
    q = float(norm[0, 0]) * norm_scale * 0.01
    wanted = (127 * q).to(BF16).double() - 127 * q.to(BF16).double()
    assert abs(float(wanted)) > float(q.abs()) / 8
    assert torch.equal(query[0, 0], wanted.to(BF16).expand(1, HCKV)[0])


def test_int8_products_are_exact() -> None:
    """-128 * -128 summed over He is beyond 16 bits."""
    a = arguments((2, 0, 0), tokens=(1,))
    low = torch.full_like(a["weight_dkv_kr"], -128)
    a |= {"token_x": torch.full_like(a["token_x"], -128), "weight_dkv_kr": low}
    a |= {"dequant_scale_x": torch.ones(1, 1), "dequant_scale_w_dkv_kr": torch.ones(1, HCKV + DR)}
    a |= {"rope_cos": torch.ones(1, DR).to(BF16), "rope_sin": torch.zeros(1, DR).to(BF16)}
    *_, kr = call(FUNCTIONAL, **a)
    assert bool((kr.view(-1, DR)[slots(a)[0]] == 64 * 2.0**14).all())


@pytest.mark.parametrize("modes", [(2, 1, 1), (3, 1, 1)])
def test_a_zero_row_has_scale_and_query_zero(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    a["token_x"].view(torch.uint8)[2] = 0
    query, query_rope, scale, norm, norm_scale, kv, kr = call(FUNCTIONAL, **a)
    assert bool((scale[2] == 0).all()) and bool((query[2].float() == 0).all())
    assert bool((norm[2].float() == 0).all())
    smallest = 2.0**-127 if modes[0] == 3 else 0.0
    assert bool((norm_scale[2].float() == smallest).all())
    slot = slots(a)[2]
    assert bool((kv.view(-1, HCKV)[slot].float() == 0).all())
    assert bool((kr.view(-1, DR)[slot] == 0).all())
    # 0 / 0, as on the device.
    assert not bool(query_rope[2].isfinite().any())
    assert bool(query_rope[[0, 1, 3, 4, 5]].isfinite().all())


@pytest.mark.parametrize("weight_mode", [1, 3])
def test_a_tile_of_zeros(weight_mode: int) -> None:
    """int8: scale 0. float8: amax is taken as 1e-4."""
    a = arguments((weight_mode, 3, 0))
    a["rmsnorm_gamma_ckv"][:TILE] = 0
    *_, kv, _ = call(FUNCTIONAL, **a)
    rows = kv.view(torch.uint8).view(-1, kv.shape[-1])[slots(a)]
    assert bool((rows[:, :TILE] & 0x7F == 0).all())
    scale = rows[:, HCKV + 2 * DR :].contiguous().view(torch.float32)
    assert torch.equal(scale[:, 0], torch.full((6,), 0.0 if weight_mode == 1 else 1e-4) / 448)
    assert bool((scale[:, 1] > 1e-4).all())


def test_no_clip_alpha_is_one() -> None:
    a = arguments((1, 3, 0))
    one = call(FUNCTIONAL, **a | {"k_nope_clip_alpha": torch.ones(1)})
    assert not torch.equal(one[5], call(FUNCTIONAL, **a)[5])
    del a["k_nope_clip_alpha"]
    assert torch.equal(one[5], call(FUNCTIONAL, **a)[5])


def test_mx_scales_of_a_weight_are_transposed_and_belong_to_32_rows() -> None:
    """A doubled scale of column 1, rows 32 to 63 doubles that part of the column."""
    a = arguments((3, 0, 0))
    scale = a["dequant_scale_w_dkv_kr"].view(torch.uint8)
    doubled = a | {"dequant_scale_w_dkv_kr": scale.clone().view(torch.float8_e8m0fnu)}
    doubled["dequant_scale_w_dkv_kr"].view(torch.uint8)[HCKV + 1, 1] += 1
    weight = a["weight_dkv_kr"].float()
    weight[32:, HCKV + 1] *= 2
    by_hand = a | {"weight_dkv_kr": weight.to(E4M3)}
    assert float(by_hand["weight_dkv_kr"].float().abs().max()) < 448
    given, wanted = call(FUNCTIONAL, **doubled), call(FUNCTIONAL, **by_hand)
    assert_same(given[6], wanted[6])
    assert not torch.equal(given[6], call(FUNCTIONAL, **a)[6])


def test_quantized_heads_have_their_own_scales() -> None:
    a = arguments((2, 1, 1))
    query, _, scale, *_ = call(FUNCTIONAL, **a)
    a["weight_uk"][1] *= 4
    other, _, larger, *_ = call(FUNCTIONAL, **a)
    assert torch.equal(larger[:, 1], scale[:, 1] * 4) and torch.equal(larger[:, [0, 2]], scale[:, [0, 2]])
    assert torch.equal(query, other)
