"""The checks on a call of any mla_prolog operator; what they demand is described at :class:`Call`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from npu_fusion.meta_impls._cache import check_cache
from npu_fusion.meta_impls._checks import (
    FLOATS,
    check,
    check_choice,
    check_dtype,
    check_rank,
    check_shape,
    check_size,
)
from npu_fusion.meta_impls._mla_prolog import (
    BY_PAGE,
    DATA,
    DIRECT,
    FULL,
    MX_BLOCK,
    MXFP8,
    NOT_QUANTIZED,
    PAGED,
    PARTIAL,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TILE,
    Call,
)

_COMBINATIONS = (
    (NOT_QUANTIZED, 0, 0),
    (PARTIAL, 0, 0),
    (PARTIAL, PER_CHANNEL, 0),
    (PARTIAL, PER_TILE, 0),
    (FULL, 0, 0),
    (FULL, PER_TENSOR, 1),
    (FULL, PER_TILE, 0),
    (MXFP8, 0, 0),
    (MXFP8, PER_TENSOR, 1),
    (MXFP8, PER_TILE, 0),
)
"""Of weight_quant_mode, kv_cache_quant_mode and query_quant_mode."""

_NOT_COMPUTED = {4: "all operands float8", 5: "all operands hifloat8"}

# They tell hifloat8 from the uint8 that carries it, which is weight_quant_mode 5.
_CARRIERS = (
    "token_x_dtype",
    "weight_dq_dtype",
    "weight_uq_qr_dtype",
    "weight_dkv_kr_dtype",
    "kv_cache_dtype",
)

_SCALES = (
    "dequant_scale_x",
    "dequant_scale_w_dq",
    "dequant_scale_w_uq_qr",
    "dequant_scale_w_dkv_kr",
    "quant_scale_ckv",
    "quant_scale_ckr",
    "smooth_scales_cq",
    "k_nope_clip_alpha",
)


def check_call(c: Call) -> None:
    """Raise ``ValueError`` for anything that :class:`Call` and ``mla_prolog.py`` do not describe."""
    _check_modes(c)
    _check_dtypes(c)
    _check_shapes(c)
    _check_scales(c)
    _check_caches(c)
    _check_cache_index(c)


def _check_modes(c: Call) -> None:
    mode = c.weight_quant_mode
    if mode in _NOT_COMPUTED:
        given = f"{mode} ({_NOT_COMPUTED[mode]}, which is not computed on the CPU)"
        check(False, c.op, "weight_quant_mode", given, "0, 1, 2, 3")
    check_choice(c.op, "weight_quant_mode", mode, (NOT_QUANTIZED, PARTIAL, FULL, MXFP8))
    check_choice(
        c.op,
        "(weight_quant_mode, kv_cache_quant_mode, query_quant_mode)",
        (mode, c.kv_cache_quant_mode, c.query_quant_mode),
        _COMBINATIONS,
    )
    check_choice(c.op, "cache_mode", c.cache_mode, (*PAGED, *BY_PAGE, *DIRECT))
    per_tile = c.kv_cache_quant_mode == PER_TILE
    with_mode = f"{int(per_tile)} with kv_cache_quant_mode {c.kv_cache_quant_mode}"
    for argument in ("ckvkr_repo_mode", "quant_scale_repo_mode"):
        given = getattr(c, argument)
        check(given == int(per_tile), c.op, argument, given, with_mode)
    if per_tile:
        accepted = ("PA_BSND", *DIRECT)
        check(
            c.cache_mode in accepted,
            c.op,
            "cache_mode",
            f"{c.cache_mode!r} with kv_cache_quant_mode {PER_TILE}",
            ", ".join(map(repr, accepted)),
        )
        check(c.tile_size > 0, c.op, "tile_size", c.tile_size, "a positive number")
    for argument in _CARRIERS:
        check(getattr(c, argument) is None, c.op, argument, getattr(c, argument), "None")


def _check_dtypes(c: Call) -> None:
    mode = c.weight_quant_mode
    floats = FLOATS if mode == NOT_QUANTIZED else (torch.bfloat16,)
    check_dtype(c.op, "weight_uk", c.weight_uk, *floats)
    data = DATA.get(mode, c.dtype)
    kv_cache = c.quantized_dtype if c.kv_cache_quant_mode else c.dtype
    for argument, accepted in {
        "token_x": data,
        "weight_dq": data,
        "weight_uq_qr": torch.int8 if mode == PARTIAL else data,
        "weight_dkv_kr": data,
        "rmsnorm_gamma_cq": c.dtype,
        "rmsnorm_gamma_ckv": c.dtype,
        "rope_sin": c.dtype,
        "rope_cos": c.dtype,
        "kv_cache": kv_cache,
    }.items():
        check_dtype(c.op, argument, getattr(c, argument), accepted)
    if c.kv_cache_quant_mode != PER_TILE:
        check_dtype(
            c.op, "kr_cache", c.kr_cache, kv_cache if c.kv_cache_quant_mode == PER_CHANNEL else c.dtype
        )


def _check_shapes(c: Call) -> None:
    op = c.op
    check_rank(op, "token_x", c.token_x, 2, 3)
    if c.cache_mode in DIRECT:
        rank = 3 if c.cache_mode == "BSND" else 2
        check_rank(op, f"token_x, with cache_mode {c.cache_mode!r},", c.token_x, rank, rank)
    check_rank(op, "weight_dq", c.weight_dq, 2, 2)
    check_rank(op, "weight_uk", c.weight_uk, 3, 3)
    check_rank(op, "rope_sin", c.rope_sin, c.token_x.dim(), c.token_x.dim())
    he, hcq = c.weight_dq.shape
    n, d, hckv = c.weight_uk.shape
    dr = c.rope_sin.size(-1)
    for name, size in {"He": he, "Hcq": hcq, "N": n, "D": d, "Hckv": hckv, "Dr": dr}.items():
        check_size(size != 0, op, f"{name} is 0; accepted: at least 1")
    check_size(dr % 2 == 0, op, f"rope_sin has shape {list(c.rope_sin.shape)}; accepted: an even last size")
    shapes: dict[str, Sequence[int | torch.SymInt]] = {
        "token_x": (*c.tokens, he),
        "weight_uq_qr": (hcq, n * (d + dr)),
        "weight_dkv_kr": (he, hckv + dr),
        "rmsnorm_gamma_cq": (hcq,),
        "rmsnorm_gamma_ckv": (hckv,),
        "rope_sin": (*c.tokens, dr),
        "rope_cos": (*c.tokens, dr),
    }
    for argument, shape in shapes.items():
        check_shape(op, argument, getattr(c, argument), shape)
    if c.weight_quant_mode == MXFP8:
        for name, size in {"He": he, "Hcq": hcq}.items():
            check_size(size % MX_BLOCK == 0, op, f"{name} is {size}; accepted: a multiple of {MX_BLOCK}")


def _dequantizing(c: Call) -> dict[str, Sequence[int | torch.SymInt]]:
    """The scales that belong to the operands of products, and their shapes."""
    rows, (he, hcq) = math.prod(c.tokens), c.weight_dq.shape
    up, down = c.weight_uq_qr.size(1), c.weight_dkv_kr.size(1)
    if c.weight_quant_mode == MXFP8:
        return {
            "dequant_scale_x": (rows, he // MX_BLOCK),
            "dequant_scale_w_dq": (hcq, he // MX_BLOCK),
            "dequant_scale_w_uq_qr": (up, hcq // MX_BLOCK),
            "dequant_scale_w_dkv_kr": (down, he // MX_BLOCK),
        }
    full: dict[str, Sequence[int | torch.SymInt]] = {
        "dequant_scale_x": (rows, 1),
        "dequant_scale_w_dq": (1, hcq),
        "dequant_scale_w_uq_qr": (1, up),
        "dequant_scale_w_dkv_kr": (1, down),
    }
    names = {PARTIAL: ["dequant_scale_w_uq_qr"], FULL: list(full)}.get(c.weight_quant_mode, [])
    return {name: full[name] for name in names}


def _check_scales(c: Call) -> None:
    """Each scale is required, allowed or forbidden by the modes, and has one dtype and shape."""
    mode, kv_mode = c.weight_quant_mode, c.kv_cache_quant_mode
    hcq, hckv, dr = c.weight_dq.size(1), c.weight_uk.size(2), c.rope_sin.size(-1)
    dequant = _dequantizing(c)
    shapes = dict(dequant)
    if kv_mode in (PER_TENSOR, PER_CHANNEL):
        flat = kv_mode == PER_TENSOR and c.quant_scale_ckv is not None and c.quant_scale_ckv.dim() == 1
        shapes["quant_scale_ckv"] = (1,) if flat else (1, hckv)
    if kv_mode == PER_CHANNEL:
        shapes["quant_scale_ckr"] = (1, dr)
    required = set(shapes)
    if mode in (PARTIAL, FULL):
        shapes["smooth_scales_cq"] = (1, hcq)
        if kv_mode == PER_TILE:
            shapes["k_nope_clip_alpha"] = (1,)
    modes = f"with weight_quant_mode {mode} and kv_cache_quant_mode {kv_mode}"
    for argument in _SCALES:
        scale = getattr(c, argument)
        if scale is None:
            check(argument not in required, c.op, argument, "None", f"a tensor {modes}")
            continue
        check(argument in shapes, c.op, argument, "given", f"None {modes}")
        mx = mode == MXFP8 and argument in dequant
        # Not in a table: torch before 2.7 has no e8m0.
        check_dtype(c.op, argument, scale, torch.float8_e8m0fnu if mx else torch.float32)
        check_shape(c.op, argument, scale, shapes[argument])


def _check_cache_index(c: Call) -> None:
    op, mode, rank = c.op, c.cache_mode, c.token_x.dim()
    where = f"with cache_mode {mode!r} and a token_x of {rank} dimensions"
    _check_presence(op, "cache_index", c.cache_index, torch.int64, mode not in DIRECT, where)
    _check_presence(op, "actual_seq_len", c.actual_seq_len, torch.int32, mode in BY_PAGE and rank == 2, where)
    if mode in PAGED:
        check_shape(op, "cache_index", c.cache_index, c.tokens)
    elif c.cache_index is not None and c.actual_seq_len is not None:
        check_rank(op, "cache_index", c.cache_index, 1, 1)
        check_rank(op, "actual_seq_len", c.actual_seq_len, 1, 1)
    elif c.cache_index is not None:
        batch, length = c.tokens
        block = c.kv_cache.size(1)
        check_shape(op, "cache_index", c.cache_index, (batch, (length + block - 1) // block))


def _check_presence(
    op: str, argument: str, tensor: Tensor | None, dtype: torch.dtype, wanted: bool, where: str
) -> None:
    given, accepted = ("None", "a tensor") if tensor is None else ("given", "None")
    check((tensor is not None) == wanted, op, argument, given, f"{accepted} {where}")
    check_dtype(op, argument, tensor, dtype)


def _check_caches(c: Call) -> None:
    op, hckv, dr = c.op, c.weight_uk.size(2), c.rope_sin.size(-1)
    per_tile = c.kv_cache_quant_mode == PER_TILE
    kv_width = hckv
    if per_tile:
        message = f"Hckv is {hckv}; accepted: a multiple of tile_size {c.tile_size}"
        check_size(hckv % c.tile_size == 0, op, message)
        kv_width = hckv + dr * c.dtype.itemsize + hckv // c.tile_size * torch.float32.itemsize
    leading: Sequence[int | torch.SymInt] = c.tokens
    if c.cache_mode in DIRECT:
        check_shape(op, "kv_cache", c.kv_cache, (*leading, 1, kv_width))
    else:
        check_cache(op, "kv_cache", c.kv_cache, kv_width, nz=c.nz)
        leading = c.kv_cache.shape[:2]
        message = f"kv_cache has shape {list(c.kv_cache.shape)}; accepted: a BlockSize above 0"
        check_size(leading[1] != 0, op, message)
    if per_tile:
        message = (
            f"kr_cache has shape {list(c.kr_cache.shape)}; accepted: no elements with kv_cache_quant_mode 3"
        )
        check_size(c.kr_cache.numel() == 0, op, message)
        return
    check_shape(op, "kr_cache", c.kr_cache, (*leading, 1, dr))
    if c.nz:
        check_cache(op, "kr_cache", c.kr_cache, dr, nz=True)
