"""Calls of the mla_prolog operators, and their formula again: float64, one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HE, HCQ, N, D, DR, HCKV = 64, 32, 3, 8, 32, 64
PAGES, BLOCK, TILE = 5, 4, 32
E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu

COMBINATIONS = [
    *((0, 0, 0), (1, 0, 0), (1, 2, 0), (1, 3, 0), (2, 0, 0), (2, 1, 1), (2, 3, 0)),
    *((3, 0, 0), (3, 1, 1), (3, 3, 0)),
]


def call(name: str, **arguments: Any) -> Any:
    return getattr(torch.ops.npu, name)(**arguments)


def arguments(
    modes: tuple[int, int, int] = (0, 0, 0),
    tokens: tuple[int, ...] = (6,),
    cache_mode: str = "PA_BSND",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of npu_mla_prolog_v3 by name, random, with every option that the modes allow."""
    weight_mode, kv_mode, query_mode = modes
    g = torch.Generator().manual_seed(seed)

    def floats(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    def data(quantized: bool, *shape: int) -> Tensor:
        if not quantized:
            return floats(*shape, scale=0.3)
        if weight_mode == 3:
            return torch.randn(shape, generator=g).to(E4M3)
        return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) * 0.01 + 0.001

    def powers(*shape: int) -> Tensor:
        return torch.randint(120, 131, shape, generator=g).to(torch.uint8).view(E8M0)

    rows, up, down = math.prod(tokens), N * (D + DR), HCKV + DR
    a: dict[str, Any] = {
        "token_x": data(weight_mode >= 2, *tokens, HE),
        "weight_dq": data(weight_mode >= 2, HE, HCQ),
        "weight_uq_qr": data(weight_mode >= 1, HCQ, up),
        "weight_uk": floats(N, D, HCKV),
        "weight_dkv_kr": data(weight_mode >= 2, HE, down),
        "rmsnorm_gamma_cq": floats(HCQ),
        "rmsnorm_gamma_ckv": floats(HCKV),
        "rope_sin": floats(*tokens, DR),
        "rope_cos": floats(*tokens, DR),
        "rmsnorm_epsilon_cq": 1e-2,
        "rmsnorm_epsilon_ckv": 3e-2,
        "cache_mode": cache_mode,
        "query_norm_flag": True,
        "qc_qr_scale": 1.5,
        "kc_scale": 0.7,
        "weight_quant_mode": weight_mode,
        "kv_cache_quant_mode": kv_mode,
        "query_quant_mode": query_mode,
    }
    if weight_mode in (1, 2):
        a["dequant_scale_w_uq_qr"] = positive(1, up)
        a["smooth_scales_cq"] = positive(1, HCQ) * 100
    if weight_mode == 2:
        a |= {"dequant_scale_x": positive(rows, 1), "dequant_scale_w_dq": positive(1, HCQ)}
        a["dequant_scale_w_dkv_kr"] = positive(1, down)
    if weight_mode == 3:
        a |= {"dequant_scale_x": powers(rows, HE // 32), "dequant_scale_w_dq": powers(HCQ, HE // 32)}
        a |= {
            "dequant_scale_w_uq_qr": powers(up, HCQ // 32),
            "dequant_scale_w_dkv_kr": powers(down, HE // 32),
        }
    if kv_mode == 1:
        a["quant_scale_ckv"] = torch.tensor([30.0])
    if kv_mode == 2:
        a |= {"quant_scale_ckv": positive(1, HCKV) * 5000, "quant_scale_ckr": positive(1, DR) * 5000}
    if kv_mode == 3:
        a |= {"ckvkr_repo_mode": 1, "quant_scale_repo_mode": 1, "tile_size": TILE}
        if weight_mode != 3:
            a["k_nope_clip_alpha"] = torch.tensor([0.8])
    return a | _caches(g, modes, tokens, cache_mode, dtype)


def _caches(
    g: torch.Generator,
    modes: tuple[int, int, int],
    tokens: tuple[int, ...],
    cache_mode: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    weight_mode, kv_mode, _ = modes
    leading = {"BSND": tokens, "TND": tokens}.get(cache_mode, (PAGES, BLOCK))
    kv_dtype = (E4M3 if weight_mode == 3 else torch.int8) if kv_mode else dtype
    kr_dtype = torch.int8 if kv_mode == 2 else dtype
    width = HCKV + 2 * DR + 4 * HCKV // TILE if kv_mode == 3 else HCKV

    def filled(last: int, of: torch.dtype) -> Tensor:
        # Whole numbers that every dtype holds: what is not written can be compared.
        return torch.randint(-8, 8, (*leading, 1, last), generator=g).to(of)

    rows = math.prod(tokens)
    kr_cache = torch.empty(0, dtype=dtype) if kv_mode == 3 else filled(DR, kr_dtype)
    a: dict[str, Any] = {"kv_cache": filled(width, kv_dtype), "kr_cache": kr_cache}
    if cache_mode in ("PA_BSND", "PA_NZ"):
        a["cache_index"] = torch.randperm(PAGES * BLOCK, generator=g)[:rows].view(tokens)
    elif cache_mode.startswith("PA_BLK") and len(tokens) == 2:
        pages = math.ceil(tokens[1] / BLOCK)
        a["cache_index"] = torch.randperm(PAGES, generator=g)[: tokens[0] * pages].view(tokens[0], pages)
    elif cache_mode.startswith("PA_BLK"):
        # Two sequences: all tokens but one, and one.
        pages = math.ceil((rows - 1) / BLOCK) + 1
        a["cache_index"] = torch.randperm(PAGES, generator=g)[:pages]
        a["actual_seq_len"] = torch.tensor([rows - 1, rows], dtype=torch.int32)
    return a


def of_v2(a: dict[str, Any]) -> dict[str, Any]:
    """The same call for v1 and v2, which lack these options."""
    dropped = ("query_norm_flag", "qc_qr_scale", "kc_scale")
    return {k: v for k, v in a.items() if k not in dropped and not k.endswith("quant_mode")}


@dataclass
class Expected:
    """Unrounded float64 results; rounded and quantized only where the next step takes them so."""

    norm: Tensor
    """[R, Hcq]: n, before query_norm is rounded or quantized."""
    query: Tensor
    """[R, N, Hckv], rounded to the dtype of the call."""
    query_rope: Tensor
    """[R, N, Dr], not rounded, and not divided by the scale of query."""
    ckv: Tensor
    """[R, Hckv], not rounded."""
    kr: Tensor
    """[R, Dr], not rounded."""


def expected(a: dict[str, Any]) -> Expected:
    dtype, mode = a["weight_uk"].dtype, a["weight_quant_mode"]

    def b(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    x = _value(a["token_x"].reshape(-1, a["token_x"].shape[-1]), a.get("dequant_scale_x"), mode, rows=True)
    w_dq = _value(a["weight_dq"], a.get("dequant_scale_w_dq"), mode)
    w_uq_qr = _value(a["weight_uq_qr"], a.get("dequant_scale_w_uq_qr"), mode)
    w_dkv_kr = _value(a["weight_dkv_kr"], a.get("dequant_scale_w_dkv_kr"), mode)
    n_heads, d, hckv = a["weight_uk"].shape
    dr = a["rope_sin"].shape[-1]
    sin, cos = (a[name].double().reshape(-1, dr) for name in ("rope_sin", "rope_cos"))
    out: dict[str, list[Tensor]] = {"norm": [], "query": [], "query_rope": [], "ckv": [], "kr": []}
    for t in range(len(x)):
        cq, kv = x[t] @ w_dq, x[t] @ w_dkv_kr
        if mode in (0, 1):
            cq, kv = b(cq), b(kv)
        n = _rms(cq, a["rmsnorm_gamma_cq"], a["rmsnorm_epsilon_cq"]) * a["qc_qr_scale"]
        q = _taken(n, a) @ w_uq_qr
        if mode == 0:
            q = b(q)
        queries, ropes = [], []
        for head in range(n_heads):
            own = q[head * (d + dr) : (head + 1) * (d + dr)]
            queries.append(b(b(own[:d]) @ a["weight_uk"][head].double()))
            ropes.append(_rope(own[d:], cos[t], sin[t]))
        out["norm"].append(n)
        out["query"].append(torch.stack(queries))
        out["query_rope"].append(torch.stack(ropes))
        out["ckv"].append(_rms(kv[:hckv], a["rmsnorm_gamma_ckv"], a["rmsnorm_epsilon_ckv"]) * a["kc_scale"])
        out["kr"].append(_rope(kv[hckv:], cos[t], sin[t]))
    return Expected(**{name: torch.stack(values) for name, values in out.items()})


def _value(data: Tensor, scale: Tensor | None, mode: int, rows: bool = False) -> Tensor:
    """The float64 values that an operand stands for."""
    value = data.double()
    if scale is None:
        return value
    if data.dtype == torch.int8:
        return value * scale.double()
    along = value if rows else value.T
    for row in range(along.shape[0]):
        for block in range(scale.shape[1]):
            exponent = int(scale.view(torch.uint8)[row, block]) - 127
            along[row, 32 * block : 32 * block + 32] *= 2.0**exponent
    return along if rows else along.T


def _taken(n: Tensor, a: dict[str, Any]) -> Tensor:
    """The values of query_norm that the product with weight_uq_qr sees."""
    mode = a["weight_quant_mode"]
    if mode in (0, 3):
        n = n.to(a["weight_uk"].dtype).double()
    if mode == 0:
        return n
    if mode == 3:
        blocks = []
        for block in n.split(32):
            unit = 2.0 ** (math.floor(math.log2(float(block.abs().max()))) - 8)
            blocks.append((block / unit).clamp(-448, 448).to(E4M3).double() * unit)
        return torch.cat(blocks)
    if "smooth_scales_cq" in a:
        n = n * a["smooth_scales_cq"][0].double()
    scale = n.abs().max() / 127
    return (n / scale).round() * scale


def _rms(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + epsilon) * gamma.double()


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = len(x) // 2
    out = torch.empty_like(x)
    for i in range(half):
        even, odd = x[2 * i], x[2 * i + 1]
        out[i] = even * cos[i] - odd * sin[i]
        out[half + i] = odd * cos[half + i] + even * sin[half + i]
    return out


def slots(a: dict[str, Any]) -> list[int]:
    """Which row of the cache, counted through all pages, each token goes to."""
    index, mode = a.get("cache_index"), a["cache_mode"]
    rows = a["token_x"].shape[:-1].numel()
    if index is None:
        return list(range(rows))
    if not mode.startswith("PA_BLK"):
        return index.flatten().tolist()
    if index.dim() == 2:
        lengths = [a["token_x"].shape[1]] * a["token_x"].shape[0]
    else:
        ends = a["actual_seq_len"].tolist()
        lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    pages, block, out = iter(index.flatten().tolist()), a["kv_cache"].shape[1], []
    for length in lengths:
        own = [next(pages) for _ in range(math.ceil(length / block))]
        out += [own[t // block] * block + t % block for t in range(length)]
    return out


def written(cache: Tensor, rows: Tensor, where: list[int], nz: bool) -> Tensor:
    """A copy of ``cache`` with ``rows`` written one element at a time; negative slots are not."""
    out = cache.clone()
    flat = out.view(-1)
    width, block = rows.shape[1], cache.shape[1]
    for row, slot in zip(rows, where, strict=True):
        if slot < 0:
            continue
        page, r = divmod(slot, block)
        for column in range(width):
            d0 = 32 // cache.element_size()
            inside = (column // d0) * block * d0 + r * d0 + column % d0 if nz else r * width + column
            at = page * block * width + inside if nz else slot * width + column
            flat[at] = row[column]
    return out


def assert_near(result: Tensor, exact: Tensor, dtype: torch.dtype, steps: float = 4) -> None:
    """Within some units in the last place of ``dtype`` at the largest magnitude in ``exact``.

    Not relative to each element: rotation and sums cancel.
    """
    unit = float(exact.abs().max()) * {torch.float32: 2.0**-20}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(result.double().view(exact.shape), exact, rtol=0, atol=steps * unit)


def assert_same(a: Tensor, b: Tensor) -> None:
    """Equal bit by bit (float8 has no comparison)."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
