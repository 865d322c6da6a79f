"""npu_mla_prolog and its successors: everything before the attention of multi-head latent attention.

::

    1  cq  = token_x @ weight_dq                                                  [R, Hcq]
    2  n   = rms_norm(cq, rmsnorm_gamma_cq, rmsnorm_epsilon_cq) * qc_qr_scale     query_norm
    3  q   = n @ weight_uq_qr                              [R, N, D + Dr], split into q_nope | q_pe
    4  query      = q_nope @ weight_uk, for each head                             [R, N, Hckv]
    5  query_rope = rope(q_pe)                                                    [R, N, Dr]
    6  kv  = token_x @ weight_dkv_kr                       [R, Hckv + Dr], split into ckv | k_pe
       row of kv_cache = rms_norm(ckv, rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv) * kc_scale
    7  row of kr_cache = rope(k_pe)
    8  write the rows where cache_index says

for R tokens, T or B * S. A product accumulates in fp32 (exactly in int32 for int8 operands); RMSNorm,
rotation and quantization are fp32. Rounded to the dtype of the call are: cq, q and kv where no operand of
their product is quantized; n where the next product is not quantized; q_nope and the outputs. RMSNorm rounds
only after its gamma. ``rope`` is the rotation of npu_interleave_rope.

Quantization. ``amax / 127`` stands for int8; for float8 it is ``amax / 448``:

* ``weight_quant_mode`` 1: weight_uq_qr is int8, and n (times smooth_scales_cq) is quantized for each token: s
  = amax / 127, q = int32(qn @ weight_uq_qr) * s * dequant_scale_w_uq_qr.
* 2: token_x, weight_dq and weight_dkv_kr are int8 too: cq = int32 * dequant_scale_x * dequant_scale_w_dq.
* 3, mxfp8: these four are float8_e4m3fn with a scale 2^k (e8m0) for 32 neighbours along the inner dimension
  of the product. The scales of a weight are transposed: [columns, rows / 32]. n is rounded to bf16, then
  2^(floor(log2(amax)) - 8) is the scale of 32 of its elements.
* ``kv_cache_quant_mode`` 1 (with ``query_quant_mode`` 1): the row of kv_cache times quant_scale_ckv[0],
  rounded. query is quantized for each token and head, dequant_scale_q_nope = amax / 127, and query_rope,
  already rounded, is multiplied by quant_scale_ckv[0] / dequant_scale_q_nope and rounded again.
* 2: both rows are multiplied by their scale (of kr_cache's the rounded row) and become int8.
* 3, for each tile of ``tile_size``: a = amax * k_nope_clip_alpha, scale = a / 127, int8(clip(v, -a, a) /
  scale) (float8: a = max(amax, 1e-4), no clip). The row of kv_cache is, in bytes: the quantized tiles | the
  row of kr_cache in bf16 | the fp32 scales; kr_cache is empty.

Traps:

* ``rope_sin`` comes BEFORE ``rope_cos``. The halves of both are read independently.
* weight_uq_qr has D and then Dr columns for each head, not all D and then all Dr.
* A negative cache index means that the token is not written. Both caches share the index. In NZ order 32
  bytes of a row lie together: 16 columns of bf16 but 32 of int8.
* PA_BLK_* count pages, not slots: token t of a sequence goes to row t % BlockSize of the page at t //
  BlockSize.
* v1 and v2 have no modes: dtypes and the presence of quant_scale_ckv decide. v2 has dequant_scale_q_nope as
  its fifth output, v3 as its third; npu_mla_prolog_v3_functional appends the caches at the end.
* The scales that are outputs have one row per token even where the other outputs are [B, S, ..].
* The zero row of a token and head (mode 1) has query 0 and scale 0, so its query_rope is inf or NaN, as on
  the device.

v1, v2 and v3_functional return updated copies of the caches. On the device v1 and v2 write the given caches
all the same, so nothing may read those afterwards; v3 says so in its schema. Outputs that a mode does not
have are of shape (0,); v2's dequant_scale_q_nope is one 0, of shape (1,).

Where sources differ: kv is rounded in step 6 before RMSNorm and rotation (the kernel; a published golden does
not); quantization divides by the scale and rounds half to even (the kernel rounds query half away from zero
and multiplies by 127 / amax, so an element may differ by 1); a tile of zeros has scale 0 in int8, and
kc_scale applies in every mode (a published reference has 1e-8 / 127, and no kc_scale).

Accepted here: any sizes (devices take Hckv 512, Dr 64 and few others), zero tokens and caches without pages
included. What is not quantized is bfloat16, as on the device; where nothing is, float16 and float32 are
accepted too, throughout, for models that run on the CPU.

Formula: op-plugin documentation, Meta implementations and public kernel sources of torch_npu 2.13.0; mxfp8
and tiles: the public reference of ops-transformer (``attention/mla_prolog_v3/tests``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from npu_fusion.meta_impls._mla_prolog import MX_BLOCK, MXFP8, NOT_QUANTIZED, Call, of_v2, of_v3
from npu_fusion.meta_impls._mla_prolog_checks import check_call
from npu_fusion.meta_impls._registry import operator

_WEIGHTS = (
    "Tensor token_x, Tensor weight_dq, Tensor weight_uq_qr, Tensor weight_uk, Tensor weight_dkv_kr, "
    "Tensor rmsnorm_gamma_cq, Tensor rmsnorm_gamma_ckv, Tensor rope_sin, Tensor rope_cos"
)
_SCALES = (
    "Tensor? dequant_scale_x=None, Tensor? dequant_scale_w_dq=None, Tensor? dequant_scale_w_uq_qr=None, "
    "Tensor? dequant_scale_w_dkv_kr=None, Tensor? quant_scale_ckv=None, Tensor? quant_scale_ckr=None, "
    "Tensor? smooth_scales_cq=None"
)
_NUMBERS = 'float rmsnorm_epsilon_cq=1e-05, float rmsnorm_epsilon_ckv=1e-05, str cache_mode="PA_BSND"'
_V2 = f"{_WEIGHTS}, Tensor cache_index, Tensor kv_cache, Tensor kr_cache, *, {_SCALES}, {_NUMBERS}"
_V3 = (
    f"*, Tensor? cache_index=None, {_SCALES}, Tensor? actual_seq_len=None, Tensor? k_nope_clip_alpha=None, "
    f"{_NUMBERS}, bool query_norm_flag=False, int weight_quant_mode=0, int kv_cache_quant_mode=0, "
    "int query_quant_mode=0, int ckvkr_repo_mode=0, int quant_scale_repo_mode=0, int tile_size=128, "
    "float qc_qr_scale=1.0, float kc_scale=1.0, int? token_x_dtype=None, int? weight_dq_dtype=None, "
    "int? weight_uq_qr_dtype=None, int? weight_dkv_kr_dtype=None, int? kv_cache_dtype=None"
)


@operator(f"npu_mla_prolog({_V2}) -> (Tensor, Tensor, Tensor, Tensor)")
def npu_mla_prolog(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Returns ``query`` [.., N, Hckv], ``query_rope`` [.., N, Dr] and the two caches, updated.

    Arguments by the schema above, shapes and dtypes by :class:`Call`; bfloat16, or weight_uq_qr int8 (mode 1,
    and with int8 caches kv_cache_quant_mode 2). Raises ``ValueError`` for anything else.
    """
    call = of_v2("npu_mla_prolog", *tensors, **options)
    check_call(call)
    query, query_rope, *_ = _outputs(call)
    return query, query_rope, *_caches(call)


@operator(f"npu_mla_prolog_v2({_V2}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def npu_mla_prolog_v2(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """As :func:`npu_mla_prolog`, and ``dequant_scale_q_nope``; an int8 ``token_x`` means mode 2, with
    quant_scale_ckv also kv_cache_quant_mode and query_quant_mode 1."""
    call = of_v2("npu_mla_prolog_v2", *tensors, **options)
    check_call(call)
    query, query_rope, scale, *_ = _outputs(call)
    return query, query_rope, *_caches(call), scale if call.query_quant_mode else scale.new_empty(1)


@operator(
    f"npu_mla_prolog_v3({_WEIGHTS}, Tensor(a!) kv_cache, Tensor(b!) kr_cache, {_V3}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def npu_mla_prolog_v3(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Writes the caches. Returns ``query`` and ``query_rope`` as v1, ``dequant_scale_q_nope`` (fp32
    [R, N, 1], with query_quant_mode 1, where ``query`` is quantized), ``query_norm`` ([.., Hcq] in the dtype
    of weight_uq_qr, with ``query_norm_flag``) and its ``dequant_scale_q_norm`` (fp32 [R, 1]; mxfp8: e8m0
    [R, Hcq / 32]).

    Shapes and dtypes are described at :class:`Call`. The modes combine as listed in ``_mla_prolog_checks``;
    weight_quant_mode 4 and 5 and the ``*_dtype`` arguments are not accepted. Raises ``ValueError`` for
    anything else.
    """
    call = of_v3("npu_mla_prolog_v3", *tensors, **options)
    check_call(call)
    return _outputs(call)


@operator(
    f"npu_mla_prolog_v3_functional({_WEIGHTS}, Tensor kv_cache, Tensor kr_cache, {_V3}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def npu_mla_prolog_v3_functional(*tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The outputs of :func:`npu_mla_prolog_v3`, then ``kv_cache`` and ``kr_cache``, updated."""
    call = of_v3("npu_mla_prolog_v3_functional", *tensors, **options)
    check_call(call)
    return *_outputs(call), *_caches(call)


def _outputs(c: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    new = c.weight_uk.new_empty
    n, _, hckv = c.weight_uk.shape
    hcq, rows = c.weight_dq.size(1), math.prod(c.tokens)
    query = new((*c.tokens, n, hckv), dtype=c.quantized_dtype if c.query_quant_mode else c.dtype)
    query_rope = new((*c.tokens, n, c.rope_sin.size(-1)))
    scale_nope = new((rows, n, 1) if c.query_quant_mode else (0,), dtype=torch.float32)
    norm = new((*c.tokens, hcq) if c.query_norm_flag else (0,), dtype=c.weight_uq_qr.dtype)
    mx = c.weight_quant_mode == MXFP8
    scaled = c.query_norm_flag and c.weight_quant_mode != NOT_QUANTIZED
    scale_norm = new(
        (rows, hcq // MX_BLOCK if mx else 1) if scaled else (0,),
        dtype=torch.float8_e8m0fnu if mx else torch.float32,
    )
    return query, query_rope, scale_nope, norm, scale_norm


def _caches(c: Call) -> tuple[Tensor, Tensor]:
    return c.kv_cache.new_empty(c.kv_cache.shape), c.kr_cache.new_empty(c.kr_cache.shape)
