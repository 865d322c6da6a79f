from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.kernels._mla_prolog import (
    BLOCK,
    COMBINATIONS,
    DR,
    E4M3,
    E8M0,
    HCKV,
    HCQ,
    HE,
    PAGES,
    N,
    arguments,
    assert_same,
    call,
    of_v2,
)
from tests.meta_impls._opcheck import (
    check_operator,
    check_refused,
    compare_fake_and_real,
    compile_dynamic,
    overload,
)

V1, V2 = "npu_mla_prolog", "npu_mla_prolog_v2"
V3, FUNCTIONAL = "npu_mla_prolog_v3", "npu_mla_prolog_v3_functional"
FP32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
CACHE_MODES = [
    ("PA_BSND", (6,)),
    ("PA_BSND", (2, 3)),
    ("PA_NZ", (6,)),
    ("PA_BLK_BSND", (6,)),
    ("PA_BLK_BSND", (2, 3)),
    ("PA_BLK_NZ", (2, 3)),
    ("BSND", (2, 3)),
    ("TND", (6,)),
]


def check_float8(name: str, **a: Any) -> Any:
    """:func:`check_operator` without the part of opcheck that compares float8, which PyTorch cannot.

    That part finds mutation that the schema does not declare: here, compare the bytes.
    """
    before = {key: value.clone() for key, value in a.items() if isinstance(value, Tensor)}
    others = ["test_autograd_registration", "test_faketensor"]
    if a["kv_cache_quant_mode"] != 3:
        # Among the bytes of a row with its scales are NaNs of float8, which would be unequal to themselves;
        # test_dynamic_tokens_in_one_graph compares these.
        others.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload(name), (), a, test_utils=others)
    real = call(name, **a)
    compare_fake_and_real(name, real, **a)
    for key, value in before.items():
        if name == FUNCTIONAL or key not in ("kv_cache", "kr_cache"):
            assert_same(a[key], value)
    return real


@pytest.mark.parametrize("name", [V3, FUNCTIONAL])
@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
@pytest.mark.parametrize("modes", COMBINATIONS)
def test_fake_and_real_agree(modes: tuple[int, int, int], tokens: tuple[int, ...], name: str) -> None:
    a = arguments(modes, tokens)
    weight_mode, _, query_mode = modes
    checked = check_float8 if weight_mode == 3 else check_operator
    query, query_rope, scale, norm, norm_scale, *caches = checked(name, **a)
    quantized = {2: INT8, 3: E4M3}.get(weight_mode)
    assert (query.shape, query.dtype) == ((*tokens, N, HCKV), quantized if query_mode else BF16)
    assert (query_rope.shape, query_rope.dtype) == ((*tokens, N, DR), BF16)
    assert (scale.shape, scale.dtype) == ((6, N, 1) if query_mode else (0,), FP32)
    assert (norm.shape, norm.dtype) == ((*tokens, HCQ), INT8 if weight_mode == 1 else quantized or BF16)
    norm_scale_shape = {0: (0,), 3: (6, HCQ // 32)}.get(weight_mode, (6, 1))
    assert (norm_scale.shape, norm_scale.dtype) == (norm_scale_shape, E8M0 if weight_mode == 3 else FP32)
    for cache, argument in zip(caches, ("kv_cache", "kr_cache"), strict=False):
        assert (cache.shape, cache.dtype) == (a[argument].shape, a[argument].dtype)


@pytest.mark.parametrize("name", [V3, FUNCTIONAL])
@pytest.mark.parametrize("weight_mode", [0, 1, 3])
def test_without_query_norm(weight_mode: int, name: str) -> None:
    a = arguments((weight_mode, 0, 0)) | {"query_norm_flag": False}
    checked = check_float8 if weight_mode == 3 else check_operator
    _, _, _, norm, norm_scale, *_ = checked(name, **a)
    assert (norm.shape, norm.dtype) == ((0,), a["weight_uq_qr"].dtype)
    assert (norm_scale.shape, norm_scale.dtype) == ((0,), E8M0 if weight_mode == 3 else FP32)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, FP32])
@pytest.mark.parametrize(("cache_mode", "tokens"), CACHE_MODES)
def test_cache_modes(cache_mode: str, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    a = arguments(tokens=tokens, cache_mode=cache_mode, dtype=dtype)
    outputs = check_operator(FUNCTIONAL, **a)
    assert [outputs[i].dtype for i in (0, 1, 3, 5, 6)] == [dtype] * 5
    check_operator(V3, **a)


@pytest.mark.parametrize("tokens", [(6,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize(
    ("name", "modes"),
    [
        (V1, (0, 0, 0)),
        (V1, (1, 0, 0)),
        (V1, (1, 2, 0)),
        (V2, (0, 0, 0)),
        (V2, (1, 2, 0)),
        (V2, (2, 0, 0)),
        (V2, (2, 1, 1)),
    ],
)
def test_v1_and_v2(name: str, modes: tuple[int, int, int], tokens: tuple[int, ...]) -> None:
    a = of_v2(arguments(modes, tokens, "PA_NZ"))
    query, query_rope, kv, kr, *scale = check_operator(name, **a)
    assert (query.shape, query.dtype) == ((*tokens, N, HCKV), INT8 if modes[2] else BF16)
    assert query_rope.shape == (*tokens, N, DR)
    assert (kv.dtype, kr.dtype) == (a["kv_cache"].dtype, a["kr_cache"].dtype)
    rows = torch.Size(tokens).numel()
    assert [s.shape for s in scale] == ([] if name == V1 else [(rows, N, 1) if modes[2] else (1,)])


@pytest.mark.parametrize("modes", [(0, 0, 0), (1, 2, 0), (2, 1, 1), (3, 3, 0)])
def test_dynamic_tokens_in_one_graph(modes: tuple[int, int, int]) -> None:
    names = ["token_x", "rope_sin", "rope_cos", "cache_index", "dequant_scale_x"]
    fixed = {k: v for k, v in arguments(modes).items() if k not in names}
    names = [name for name in names if name in arguments(modes)]

    def run(*tensors: Tensor) -> Any:
        return call(FUNCTIONAL, **fixed, **dict(zip(names, tensors, strict=True)))

    compile_dynamic(
        run,
        lambda t: [arguments(modes, (t,))[name] for name in names],
        [2, 7, 3],
        dynamic=[(i, 0) for i in range(len(names))],
    )


@pytest.mark.parametrize("cache_mode", ["PA_NZ", "PA_BLK_BSND", "BSND"])
def test_dynamic_batches_lengths_and_pages_in_one_graph(cache_mode: str) -> None:
    names = ["token_x", "rope_sin", "rope_cos", "kv_cache", "kr_cache"]
    names += [] if cache_mode == "BSND" else ["cache_index"]
    fixed = {k: v for k, v in arguments(tokens=(2, 3), cache_mode=cache_mode).items() if k not in names}

    def inputs(t: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(t)
        batch, length = t + 1, 4 * t
        pages = {"BSND": (batch, length)}.get(cache_mode, (t * batch + 1, BLOCK))
        index = {"PA_BLK_BSND": (batch, t)}.get(cache_mode, (batch, length))
        shapes = [(batch, length, HE), *[(batch, length, DR)] * 2, (*pages, 1, HCKV), (*pages, 1, DR)]
        made = [torch.randn(shape, generator=g).to(BF16) for shape in shapes]
        return [*made, torch.arange(index[0] * index[1]).view(index)][: len(names)]

    tokens = [(i, dim) for i in (0, 1, 2) for dim in (0, 1)]
    caches = [(i, dim) for i in (3, 4) for dim in ((0, 1) if cache_mode == "BSND" else (0,))]
    index = [] if cache_mode == "BSND" else [(5, 0), (5, 1)]
    compile_dynamic(
        lambda *given: call(FUNCTIONAL, **fixed, **dict(zip(names, given, strict=True))),
        inputs,
        [2, 4, 3],
        dynamic=[*tokens, *caches, *index],
    )


@pytest.mark.parametrize("cache_mode", ["PA_BSND", "PA_NZ"])
@pytest.mark.parametrize("modes", [(0, 0, 0), (2, 1, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_v3_updates_the_caches_it_was_given(
    dynamic: bool, modes: tuple[int, int, int], cache_mode: str
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(kv_cache: Tensor, kr_cache: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        query, query_rope, *_ = call(V3, kv_cache=kv_cache, kr_cache=kr_cache, **others)
        return query.float() + 1, query_rope * 2

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in (6, 4) if dynamic else (6,):
        # With dynamic=True Dynamo traces a second time for a float that is an input.
        made = arguments(modes, (tokens,), cache_mode).items()
        a = {key: value for key, value in made if not isinstance(value, float)}
        eager = a | {name: a[name].clone() for name in ("kv_cache", "kr_cache")}
        before = a["kv_cache"].clone()
        result, wanted = compiled(**a), step(**eager)
        for given, expected in zip(result, wanted, strict=True):
            assert_same(given, expected)
        assert_same(a["kv_cache"], eager["kv_cache"])
        assert_same(a["kr_cache"], eager["kr_cache"])
        assert not torch.equal(a["kv_cache"], before)
    assert counter.frame_count == 1


def test_two_compiled_steps_write_the_same_caches_one_after_the_other() -> None:
    a = arguments()
    other = a | {"cache_index": (a["cache_index"] + 1) % (PAGES * BLOCK), "token_x": a["token_x"].flip(0)}

    def steps(kv_cache: Tensor, kr_cache: Tensor) -> Tensor:
        first = call(V3, **a | {"kv_cache": kv_cache, "kr_cache": kr_cache})[0]
        return first + call(V3, **other | {"kv_cache": kv_cache, "kr_cache": kr_cache})[0] + kv_cache.sum()

    torch._dynamo.reset()
    caches = [[a["kv_cache"].clone(), a["kr_cache"].clone()] for _ in range(2)]
    given = torch.compile(steps, backend="aot_eager", fullgraph=True)(*caches[0])
    assert_same(given, steps(*caches[1]))
    assert_same(caches[0][0], caches[1][0])
    assert_same(caches[0][1], caches[1][1])


def test_the_schemas_say_what_is_written() -> None:
    for name, mutable in ((V1, []), (V2, []), (V3, ["kv_cache", "kr_cache"]), (FUNCTIONAL, [])):
        schema = getattr(torch.ops.npu, name).default._schema
        assert [x.name for x in schema.arguments if x.alias_info is not None] == mutable


def refused(message: str, modes: tuple[int, int, int] = (0, 0, 0), /, name: str = V3, **changes: Any) -> None:
    """Change random arguments for ``modes``, ``tokens`` and ``cache_mode``: to a value or by a function."""
    made_for = {key: changes.pop(key) for key in ("tokens", "cache_mode") if key in changes}
    a = arguments(modes, **made_for)
    if name in (V1, V2):
        a = of_v2(a)
    for argument, change in changes.items():
        # An underscore tells a changed argument from one that the arguments are made for.
        argument = argument.removesuffix("_")
        a[argument] = change(a[argument]) if callable(change) else change
    check_refused(name, message, **a)


def cut(dim: int = 0) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


def test_refuses_modes() -> None:
    refused(r"weight_quant_mode is 4 \(all operands float8, which is not computed", weight_quant_mode=4)
    refused(r"weight_quant_mode is 5 \(all operands hifloat8, which is not computed", weight_quant_mode=5)
    refused("weight_quant_mode is 6; accepted: 0, 1, 2, 3", weight_quant_mode=6)
    combination = r"\(weight_quant_mode, kv_cache_quant_mode, query_quant_mode\) is "
    refused(combination + r"\(0, 1, 0\); accepted: \(0, 0, 0\), \(1, 0, 0\)", kv_cache_quant_mode=1)
    refused(combination + r"\(0, 0, 1\)", query_quant_mode=1)
    refused(combination + r"\(2, 1, 0\)", (2, 1, 1), query_quant_mode=0)
    refused(combination + r"\(2, 2, 0\)", (2, 1, 1), query_quant_mode=0, kv_cache_quant_mode=2)
    refused("ckvkr_repo_mode is 1; accepted: 0 with kv_cache_quant_mode 0", ckvkr_repo_mode=1)
    refused("quant_scale_repo_mode is 1; accepted: 0 with", quant_scale_repo_mode=1)
    refused("ckvkr_repo_mode is 0; accepted: 1 with kv_cache_quant_mode 3", (1, 3, 0), ckvkr_repo_mode=0)
    refused("quant_scale_repo_mode is 0; accepted: 1", (1, 3, 0), quant_scale_repo_mode=0)
    refused("tile_size is 0; accepted: a positive", (1, 3, 0), tile_size=0)
    refused("Hckv is 64; accepted: a multiple of tile_size 48", (1, 3, 0), tile_size=48)


@pytest.mark.parametrize("argument", ["token_x", "weight_dq", "weight_uq_qr", "weight_dkv_kr", "kv_cache"])
def test_refuses_dtypes_of_carriers(argument: str) -> None:
    refused(f"{argument}_dtype is 290; accepted: None", **{f"{argument}_dtype": 290})


def test_refuses_cache_modes() -> None:
    refused("cache_mode is 'BNSD'; accepted: 'PA_BSND', 'PA_NZ', 'PA_BLK_BSND'", cache_mode_="BNSD")
    for mode in ("PA_NZ", "PA_BLK_BSND", "PA_BLK_NZ"):
        message = f"cache_mode is '{mode}' with kv_cache_quant_mode 3; accepted: 'PA_BSND', 'BSND', 'TND'"
        refused(message, (1, 3, 0), cache_mode_=mode)
    for name in (V1, V2):
        for mode in ("BSND", "TND", "PA_BLK_BSND"):
            refused(f"cache_mode is '{mode}'; accepted: 'PA_BSND', 'PA_NZ'", name=name, cache_mode_=mode)
    refused("token_x, with cache_mode 'BSND', has 2 dimensions; accepted: 3", cache_mode_="BSND")
    refused("token_x, with cache_mode 'TND', has 3 dimensions; accepted: 2", tokens=(2, 3), cache_mode_="TND")


DTYPES = {
    (0, 0, 0): dict.fromkeys(
        [
            *("token_x", "weight_dq", "weight_uq_qr", "weight_dkv_kr", "rmsnorm_gamma_cq"),
            *("rmsnorm_gamma_ckv", "rope_sin", "rope_cos", "kv_cache", "kr_cache"),
        ],
        "bfloat16",
    ),
    (1, 2, 0): {"token_x": "bfloat16", "weight_uq_qr": "int8", "kv_cache": "int8", "kr_cache": "int8"},
    (2, 1, 1): {
        **dict.fromkeys(["token_x", "weight_dq", "weight_uq_qr", "weight_dkv_kr", "kv_cache"], "int8"),
        "kr_cache": "bfloat16",
    },
    (3, 1, 1): dict.fromkeys(["token_x", "weight_dq", "weight_uq_qr", "kv_cache"], "float8_e4m3fn"),
}


@pytest.mark.parametrize(("modes", "argument"), [(m, a) for m, names in DTYPES.items() for a in names])
def test_refuses_dtypes(modes: tuple[int, int, int], argument: str) -> None:
    accepted = DTYPES[modes][argument]
    refused(f"{argument} has dtype int16; accepted: {accepted}", modes, **{argument: lambda t: t.short()})


def test_refuses_other_dtypes() -> None:
    message = "weight_uk has dtype float64; accepted: float16, bfloat16, float32"
    refused(message, weight_uk=lambda t: t.double())
    refused("rope_sin has dtype float32; accepted: bfloat16", rope_sin=lambda t: t.float())
    refused("weight_uk has dtype float32; accepted: bfloat16", (1, 0, 0), weight_uk=lambda t: t.float())
    refused("cache_index has dtype int32; accepted: int64", cache_index=lambda t: t.int())
    ends = {"cache_mode": "PA_BLK_BSND", "actual_seq_len": lambda t: t.long()}
    refused("actual_seq_len has dtype int64; accepted: int32", **ends)
    refused("token_x has dtype int8; accepted: bfloat16", name=V1, token_x=lambda t: t.char())
    refused("weight_dq has dtype bfloat16; accepted: int8", name=V2, token_x=lambda t: t.char())


@pytest.mark.parametrize("tokens", [(6,), (2, 3)])
def test_refuses_ranks(tokens: tuple[int, ...]) -> None:
    rank = len(tokens)
    refused("token_x has 1 dimensions; accepted: 2 to 3", tokens=tokens, token_x=lambda t: t.flatten())
    refused("token_x has 4 dimensions; accepted: 2 to 3", token_x=lambda t: t[None, None])
    refused("weight_dq has 3 dimensions; accepted: 2", tokens=tokens, weight_dq=lambda t: t[None])
    refused("weight_uk has 2 dimensions; accepted: 3", tokens=tokens, weight_uk=lambda t: t.flatten(0, 1))
    other = (2, 3) if rank == 1 else (6,)
    for argument in ("rope_sin", "rope_cos", "cache_index"):
        refused(f"{argument} has", tokens=tokens, **{argument: lambda t: t.reshape(*other, *t.shape[rank:])})
    refused("kv_cache has 3 dimensions; accepted: 4", tokens=tokens, kv_cache=lambda t: t[:, :, 0])


@pytest.mark.parametrize(
    ("argument", "dim", "message"),
    [
        ("token_x", 1, r"token_x has shape \[6, 63\]; accepted: \[6, 64\]"),
        ("weight_dq", 1, r"weight_uq_qr has shape \[32, 120\]; accepted: \[31, 120\]"),
        ("weight_uq_qr", 1, r"weight_uq_qr has shape \[32, 119\]; accepted: \[32, 120\]"),
        ("weight_uk", 1, r"weight_uq_qr has shape \[32, 120\]; accepted: \[32, 117\]"),
        ("weight_dkv_kr", 0, r"weight_dkv_kr has shape \[63, 96\]; accepted: \[64, 96\]"),
        ("weight_dkv_kr", 1, r"weight_dkv_kr has shape \[64, 95\]; accepted: \[64, 96\]"),
        ("rmsnorm_gamma_cq", 0, r"rmsnorm_gamma_cq has shape \[31\]; accepted: \[32\]"),
        ("rmsnorm_gamma_ckv", 0, r"rmsnorm_gamma_ckv has shape \[63\]; accepted: \[64\]"),
        ("rope_sin", 0, r"rope_sin has shape \[5, 32\]; accepted: \[6, 32\]"),
        ("rope_cos", 0, r"rope_cos has shape \[5, 32\]; accepted: \[6, 32\]"),
        ("rope_sin", 1, r"rope_sin has shape \[6, 31\]; accepted: an even last size"),
        ("rope_cos", 1, r"rope_cos has shape \[6, 31\]; accepted: \[6, 32\]"),
        ("cache_index", 0, r"cache_index has shape \[5\]; accepted: \[6\]"),
        ("kv_cache", 3, r"kv_cache has shape \[5, 4, 1, 63\]; accepted: \[5, 4, 1, 64\]"),
        ("kr_cache", 3, r"kr_cache has shape \[5, 4, 1, 31\]; accepted: \[5, 4, 1, 32\]"),
        ("kr_cache", 0, r"kr_cache has shape \[4, 4, 1, 32\]; accepted: \[5, 4, 1, 32\]"),
        ("kr_cache", 1, r"kr_cache has shape \[5, 3, 1, 32\]; accepted: \[5, 4, 1, 32\]"),
        ("kv_cache", 1, r"kr_cache has shape \[5, 4, 1, 32\]; accepted: \[5, 3, 1, 32\]"),
    ],
)
@pytest.mark.parametrize("name", [V1, V2, V3, FUNCTIONAL])
def test_refuses_shapes(name: str, argument: str, dim: int, message: str) -> None:
    refused(message, name=name, **{argument: cut(dim)})


@pytest.mark.parametrize(
    ("argument", "dim", "size"),
    [
        ("weight_dq", 0, "He"),
        ("weight_dq", 1, "Hcq"),
        ("weight_uk", 0, "N"),
        ("weight_uk", 1, "D"),
        ("weight_uk", 2, "Hckv"),
        ("rope_sin", 1, "Dr"),
    ],
)
def test_refuses_sizes_of_zero(argument: str, dim: int, size: str) -> None:
    refused(f"{size} is 0; accepted: at least 1", **{argument: lambda t: t.narrow(dim, 0, 0)})


def test_refuses_caches() -> None:
    refused(r"kv_cache has shape \[5, 4, 2, 64\]", kv_cache=lambda t: t.repeat(1, 1, 2, 1))
    message = r"kv_cache has shape \[5, 0, 1, 64\]; accepted: a BlockSize above 0"
    refused(message, kv_cache=lambda t: t[:, :0], kr_cache=lambda t: t[:, :0])
    refused("kr_cache has shape", (1, 3, 0), kr_cache=torch.zeros(PAGES, BLOCK, 1, DR).bfloat16())
    refused(
        r"kv_cache has shape \[5, 4, 1, 64\]; accepted: \[5, 4, 1, 136\]",
        (1, 3, 0),
        kv_cache=lambda t: t[..., :64],
    )
    refused(
        r"kv_cache has shape \[2, 2, 1, 64\]; accepted: \[2, 3, 1, 64\]",
        tokens=(2, 3),
        cache_mode="BSND",
        kv_cache=cut(1),
    )
    refused(r"kr_cache has shape \[5, 1, 32\]; accepted: \[6, 1, 32\]", cache_mode="TND", kr_cache=cut(0))


def test_refuses_widths_that_nz_does_not_hold() -> None:
    for argument, width, d0 in (("kv_cache", 60, 16), ("kr_cache", 8, 16)):
        a = arguments(cache_mode="PA_NZ")
        if argument == "kv_cache":
            a |= {
                "weight_uk": a["weight_uk"][..., :width],
                "weight_dkv_kr": a["weight_dkv_kr"][:, : width + DR],
            }
            a |= {"rmsnorm_gamma_ckv": a["rmsnorm_gamma_ckv"][:width], "kv_cache": a["kv_cache"][..., :width]}
        else:
            a |= {name: a[name][..., :width] for name in ("rope_sin", "rope_cos", "kr_cache")}
            a["weight_uq_qr"] = a["weight_uq_qr"][:, : N * (a["weight_uk"].shape[1] + width)]
            a["weight_dkv_kr"] = a["weight_dkv_kr"][:, : HCKV + width]
        check_refused(V3, f"{argument} .*{d0}", **a)
        check_operator(V3, **a | {"cache_mode": "PA_BSND"})


def test_refuses_what_mxfp8_cannot_scale() -> None:
    refused(
        "He is 63; accepted: a multiple of 32",
        (3, 0, 0),
        token_x=cut(1),
        weight_dq=cut(),
        weight_dkv_kr=cut(),
    )
    refused(
        "Hcq is 31; accepted: a multiple of 32",
        (3, 0, 0),
        weight_dq=cut(1),
        weight_uq_qr=cut(),
        rmsnorm_gamma_cq=cut(),
    )


def test_refuses_a_missing_or_superfluous_index() -> None:
    refused("cache_index is None; accepted: a tensor with cache_mode 'PA_BSND'", cache_index=None)
    index = torch.zeros(6, dtype=torch.int64)
    refused("cache_index is given; accepted: None with cache_mode 'TND'", cache_mode="TND", cache_index=index)
    ends = torch.tensor([6], dtype=torch.int32)
    refused("actual_seq_len is given; accepted: None with cache_mode 'PA_BSND'", actual_seq_len=ends)
    refused("actual_seq_len is None; accepted: a tensor", cache_mode="PA_BLK_NZ", actual_seq_len=None)
    message = "actual_seq_len is given; accepted: None with cache_mode 'PA_BLK_NZ' and a token_x of 3 dim"
    refused(message, cache_mode="PA_BLK_NZ", tokens=(2, 3), actual_seq_len=ends)


def test_refuses_page_indices() -> None:
    message = r"cache_index has shape \[2, 2\]; accepted: \[2, 1\]"
    refused(message, cache_mode="PA_BLK_BSND", tokens=(2, 3), cache_index=lambda t: t.repeat(1, 2))
    message = "cache_index has 2 dimensions; accepted: 1"
    refused(message, cache_mode="PA_BLK_BSND", cache_index=lambda t: t[None])
    message = "actual_seq_len has 2 dimensions; accepted: 1"
    refused(message, cache_mode="PA_BLK_BSND", actual_seq_len=lambda t: t[None])


SCALES = {
    (1, 2, 0): ["dequant_scale_w_uq_qr", "quant_scale_ckv", "quant_scale_ckr"],
    (2, 1, 1): [
        *("dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_uq_qr", "dequant_scale_w_dkv_kr"),
        "quant_scale_ckv",
    ],
    (3, 1, 1): [
        *("dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_uq_qr", "dequant_scale_w_dkv_kr"),
        "quant_scale_ckv",
    ],
}
OPTIONAL = {
    (1, 2, 0): ["smooth_scales_cq"],
    (1, 3, 0): ["k_nope_clip_alpha"],
    (2, 1, 1): ["smooth_scales_cq"],
}
ALL_SCALES = [
    *("dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_uq_qr", "dequant_scale_w_dkv_kr"),
    *("quant_scale_ckv", "quant_scale_ckr", "smooth_scales_cq", "k_nope_clip_alpha"),
]


@pytest.mark.parametrize(("modes", "argument"), [(m, a) for m, names in SCALES.items() for a in names])
def test_refuses_a_missing_scale(modes: tuple[int, int, int], argument: str) -> None:
    given = f"weight_quant_mode {modes[0]} and kv_cache_quant_mode {modes[1]}"
    refused(f"{argument} is None; accepted: a tensor with {given}", modes, **{argument: None})


@pytest.mark.parametrize("argument", ALL_SCALES)
@pytest.mark.parametrize("modes", [(0, 0, 0), *SCALES])
def test_refuses_a_scale_that_has_no_meaning(modes: tuple[int, int, int], argument: str) -> None:
    if argument in SCALES.get(modes, []) + OPTIONAL.get(modes, []):
        return
    message = f"{argument} is given; accepted: None with weight_quant_mode {modes[0]}"
    refused(message, modes, **{argument: torch.ones(1, 1)})


@pytest.mark.parametrize(
    ("modes", "argument"),
    [(m, a) for table in (SCALES, OPTIONAL) for m, names in table.items() for a in names],
)
def test_refuses_dtypes_and_shapes_of_scales(modes: tuple[int, int, int], argument: str) -> None:
    mx = modes[0] == 3 and argument.startswith("dequant")
    accepted = "float8_e8m0fnu" if mx else "float32"
    refused(f"{argument} has dtype float16; accepted: {accepted}", modes, **{argument: lambda t: t.half()})
    refused(f"{argument} has shape .*; accepted", modes, **{argument: cut(-1)})
    refused(f"{argument} has shape .*; accepted", modes, **{argument: lambda t: t[None]})


def test_refuses_what_v1_and_v2_have_no_mode_for() -> None:
    scale = torch.ones(1, HCKV)
    for name in (V1, V2):
        refused("quant_scale_ckv is given; accepted: None", name=name, quant_scale_ckv=scale)
        refused("quant_scale_ckv is None; accepted: a tensor", (1, 2, 0), name=name, quant_scale_ckv=None)
    refused("kv_cache has dtype int8; accepted: bfloat16", (2, 1, 1), name=V2, quant_scale_ckv=None)
