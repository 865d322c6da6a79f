from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import npu_fusion
from npu_fusion.kernels.cpu import mla_prolog as cpu
from npu_fusion.kernels.reference import mla_prolog as reference
from tests.kernels import _mla_prolog as calls
from tests.kernels._mla_prolog import COMBINATIONS, arguments, expected, of_v2, slots
from tests.kernels.cpu._agreement import assert_agrees

V1, V2 = "npu_mla_prolog", "npu_mla_prolog_v2"
V3, FUNCTIONAL = "npu_mla_prolog_v3", "npu_mla_prolog_v3_functional"
POSITIONAL = (
    "token_x", "weight_dq", "weight_uq_qr", "weight_uk", "weight_dkv_kr", "rmsnorm_gamma_cq",
    "rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache",
)  # fmt: skip
TAKEN = [modes for modes in COMBINATIONS if modes[0] != 3 and modes[1] != 3]
LEFT = [modes for modes in COMBINATIONS if modes not in TAKEN]
CACHE_MODES = [
    ("PA_BSND", (6,)), ("PA_BSND", (2, 3)), ("PA_NZ", (6,)), ("PA_BLK_BSND", (6,)), ("PA_BLK_BSND", (2, 3)),
    ("PA_BLK_NZ", (2, 3)), ("BSND", (2, 3)), ("TND", (6,)),
]  # fmt: skip
BF16 = torch.bfloat16


def run(kernels: Any, name: str, a: dict[str, Any]) -> Any:
    names = (*POSITIONAL[:9], "cache_index", *POSITIONAL[9:]) if name in (V1, V2) else POSITIONAL
    options = {key: value for key, value in a.items() if key not in names}
    return getattr(kernels, name)(*(a[key] for key in names), **options)


def assert_agree(results: Any, wanted: Any) -> None:
    """Sums are taken in another order, and a rounding that falls the other way goes through all that follows:
    floats within a unit in the last place of their row, at most one int8 in a hundred off by 1."""
    assert results is not NotImplemented
    for given_, exact in zip(results, wanted, strict=True):
        assert (given_.shape, given_.dtype) == (exact.shape, exact.dtype)
        assert given_.is_contiguous()
        if not given_.numel():
            continue
        distance = (given_.double() - exact.double()).abs()
        if given_.dtype == torch.int8:
            assert distance.max() <= 1
            assert (distance != 0).sum() <= max(2, 0.01 * distance.numel())
        else:
            row = exact.double().abs().amax(-1, keepdim=True)
            unit = {torch.float32: 2.0**-19}.get(given_.dtype, torch.finfo(given_.dtype).eps)
            assert bool((distance <= unit * row).all())
            if given_.dtype != torch.float32:
                assert (distance != 0).double().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize(("cache_mode", "tokens"), CACHE_MODES)
def test_unquantized(cache_mode: str, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    a = arguments((0, 0, 0), tokens, cache_mode, dtype)
    assert_agree(run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a))


@pytest.mark.parametrize(("cache_mode", "tokens"), CACHE_MODES)
@pytest.mark.parametrize("modes", [modes for modes in TAKEN if modes[0]])
def test_quantized(modes: tuple[int, int, int], cache_mode: str, tokens: tuple[int, ...]) -> None:
    a = arguments(modes, tokens, cache_mode)
    results, wanted = run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a)
    assert_agree(results, wanted)
    if modes[0] == 2:  # Sums of int8 are exact: what does not go through weight_uk is.
        assert_agrees([results[i] for i in (3, 4, 5, 6)], [wanted[i] for i in (3, 4, 5, 6)])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (150, 90, 5, 40, 20, 90))),
    rows=st.integers(1, 9),
    modes=st.sampled_from(TAKEN),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_sizes_that_no_vector_divides(
    sizes: tuple[int, ...], rows: int, modes: tuple[int, int, int], transposed: bool, seed: int
) -> None:
    he, hcq, n, d, half, hckv = sizes
    dims = {"HE": he, "HCQ": hcq, "N": n, "D": d, "DR": 2 * half, "HCKV": hckv}
    with mock.patch.multiple(calls, **dims):
        a = arguments(modes, (rows,), seed=seed)
    if transposed:
        for name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr", "weight_uk"):
            a[name] = a[name].transpose(-2, -1).contiguous().transpose(-2, -1)
    assert_agree(run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a))


@pytest.mark.parametrize("modes", TAKEN)
def test_strided_arguments(modes: tuple[int, int, int]) -> None:
    """Every tensor is every second row or the middle columns of a larger one."""
    a = arguments(modes)
    for name, x in a.items():
        if isinstance(x, Tensor) and x.dim() > 1 and name not in ("kv_cache", "kr_cache", "cache_index"):
            wide = torch.cat([x, x, x], dim=-1)
            a[name] = torch.stack((wide, wide), dim=1)[:, 0, ..., x.shape[-1] : 2 * x.shape[-1]]
            assert torch.equal(a[name], x)
    assert_agree(run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a))


@pytest.mark.parametrize("modes", TAKEN)
def test_scales_whose_elements_lie_apart(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    apart = dict(a)
    for name, x in a.items():
        if isinstance(x, Tensor) and x.dtype == torch.float32 and "scale" in name:
            apart[name] = torch.stack((x, x + 1), dim=-1)[..., 0]
    assert_agree(run(cpu, FUNCTIONAL, apart), run(reference, FUNCTIONAL, a))


@pytest.mark.parametrize(
    ("name", "modes"), [(V1, TAKEN[0]), (V1, (1, 2, 0)), (V2, (2, 0, 0)), (V2, (2, 1, 1))]
)
@pytest.mark.parametrize("cache_mode", ["PA_BSND", "PA_NZ"])
def test_v1_and_v2(name: str, modes: tuple[int, int, int], cache_mode: str) -> None:
    a = of_v2(arguments(modes, (2, 3), cache_mode))
    assert_agree(run(cpu, name, a), run(reference, name, a))


@pytest.mark.parametrize(("cache_mode", "tokens"), CACHE_MODES)
@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (2, 1, 1)])
def test_v3_writes_where_it_should_and_nowhere_else(
    modes: tuple[int, int, int], cache_mode: str, tokens: tuple[int, ...]
) -> None:
    a = arguments(modes, tokens, cache_mode)
    functional = run(cpu, FUNCTIONAL, a)
    before = [a[name].clone() for name in ("kv_cache", "kr_cache")]
    results = run(cpu, V3, a)
    for given_, wanted in zip((*results, a["kv_cache"], a["kr_cache"]), functional, strict=True):
        assert torch.equal(given_, wanted)
    assert not any(
        torch.equal(old, a[name]) for old, name in zip(before, ("kv_cache", "kr_cache"), strict=True)
    )


@pytest.mark.parametrize("modes", [(0, 0, 0), (2, 0, 0)])
def test_both_caches_beside_each_other_in_one_tensor(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    both = torch.cat((a["kv_cache"], a["kr_cache"]), dim=-1)
    kv, kr = both.split((calls.HCKV, calls.DR), dim=-1)
    wanted = run(reference, FUNCTIONAL, a)
    results = run(cpu, V3, a | {"kv_cache": kv, "kr_cache": kr})
    assert_agree([*results, kv.contiguous(), kr.contiguous()], wanted)


@pytest.mark.parametrize(("cache_mode", "tokens"), CACHE_MODES)
@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0)])
def test_caches_whose_elements_lie_apart(
    modes: tuple[int, int, int], cache_mode: str, tokens: tuple[int, ...]
) -> None:
    a = arguments(modes, tokens, cache_mode)
    wanted = run(cpu, FUNCTIONAL, a)
    memories = [torch.stack((a[name], a[name]), dim=-1) for name in ("kv_cache", "kr_cache")]
    kv, kr = (memory[..., 1] for memory in memories)
    run(cpu, V3, a | {"kv_cache": kv, "kr_cache": kr})
    assert torch.equal(kv, wanted[5]) and torch.equal(kr, wanted[6])
    for memory, name in zip(memories, ("kv_cache", "kr_cache"), strict=True):
        assert torch.equal(memory[..., 0], a[name])


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (2, 1, 1)])
def test_slots_that_are_negative_or_the_same(modes: tuple[int, int, int]) -> None:
    a = arguments(modes) | {"cache_index": torch.tensor([3, -1, 5, 3, -20, 5])}
    assert_agree(run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a))


def test_a_slot_beyond_the_cache_is_refused_and_nothing_written() -> None:
    a = arguments() | {"cache_index": torch.tensor([0, 1, 2, 3, 4, 20])}
    before = a["kv_cache"].clone()
    assert run(cpu, V3, a) is NotImplemented
    with pytest.raises(ValueError, match="slot is 20; accepted: below 20"):
        calls.call(V3, **a)
    assert torch.equal(a["kv_cache"], before)


@pytest.mark.parametrize("modes", TAKEN)
def test_options_at_their_defaults(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    for name in ("query_norm_flag", "qc_qr_scale", "kc_scale", "smooth_scales_cq"):
        a.pop(name, None)
    assert_agree(run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a))


@pytest.mark.parametrize("modes", TAKEN)
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_special_tokens(modes: tuple[int, int, int], value: float) -> None:
    """A token of zeros (also in int8), and one with a NaN or an infinity: it spoils its own rows only."""
    a = arguments(modes)
    a["token_x"][1] = 0
    if modes[0] != 2:
        a["token_x"][4, 3] = value
    results, wanted = run(cpu, FUNCTIONAL, a), run(reference, FUNCTIONAL, a)
    for given_, exact in zip(results, wanted, strict=True):
        assert torch.equal(given_.isfinite(), exact.isfinite())
    assert_agree([r.nan_to_num(0, 0, 0) for r in results], [w.nan_to_num(0, 0, 0) for w in wanted])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_large_products_are_as_close_to_float64_as_the_reference(rows: int, transposed: bool) -> None:
    with mock.patch.multiple(calls, HE=1024, HCQ=384, N=4, D=128, DR=64, HCKV=512, PAGES=20):
        a = arguments(tokens=(rows,))
        exact = expected(a)
    if transposed:
        for name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr"):
            a[name] = a[name].t().contiguous().t()
    where = slots(a)

    oracles = (exact.query, exact.query_rope, exact.norm, exact.ckv, exact.kr)

    def errors(outputs: Any) -> list[float]:
        query, query_rope, _, norm, _, kv, kr = outputs
        found = (query, query_rope, norm, kv.view(-1, 512)[where], kr.view(-1, 64)[where])
        return [float((f.double() - o).square().sum()) for f, o in zip(found, oracles, strict=True)]

    for ours, theirs, oracle in zip(
        errors(run(cpu, FUNCTIONAL, a)), errors(run(reference, FUNCTIONAL, a)), oracles, strict=True
    ):
        # Where nearly all is exact, one rounding of another sum that falls the other way is half the error.
        unit = float(oracle.abs().max()) * torch.finfo(BF16).eps
        assert ours <= 1.02 * theirs + 4 * unit**2


@pytest.mark.parametrize("modes", LEFT)
def test_modes_that_are_left_to_the_reference(modes: tuple[int, int, int]) -> None:
    assert run(cpu, FUNCTIONAL, arguments(modes)) is NotImplemented


def test_other_calls_that_are_left_to_the_reference() -> None:
    assert run(cpu, V3, arguments(tokens=(0,))) is NotImplemented
    a = arguments()
    assert run(cpu, V3, a | {"kv_cache": a["kv_cache"][:0], "kr_cache": a["kr_cache"][:0]}) is NotImplemented


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 0, 0)])
def test_weights_that_require_gradients(modes: tuple[int, int, int]) -> None:
    a = arguments(modes)
    wanted = calls.call(FUNCTIONAL, **a)
    for name in ("weight_dq", "weight_uk", "rmsnorm_gamma_cq"):
        a[name] = torch.nn.Parameter(a[name])
    with torch.no_grad():
        results = calls.call(FUNCTIONAL, **a)
    for given_, exact in zip(results, wanted, strict=True):
        assert torch.equal(given_, exact)
    assert calls.call(FUNCTIONAL, **a)[0].requires_grad


def test_the_operator_calls_it() -> None:
    a = arguments()
    with npu_fusion.kernels.use("compiled"):
        fast = calls.call(FUNCTIONAL, **a)
    for given_, wanted in zip(fast, run(cpu, FUNCTIONAL, a), strict=True):
        assert torch.equal(given_, wanted)
