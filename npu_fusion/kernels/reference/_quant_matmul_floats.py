"""npu_quant_matmul of 8-bit and 4-bit floats; formula and traps in the file of this name in meta_impls.

Operands are widened to fp32, which is exact, and multiplied in fp32. What blocks share is multiplied in
before the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_fusion import formats
from npu_fusion.kernels.reference._float_operands import float4_rows, powers_of_two, spread
from npu_fusion.kernels.reference._quant import unpack_quant_param
from npu_fusion.meta_impls._dtypes import HIFLOAT8
from npu_fusion.meta_impls._quant_matmul import Call, Kind, kind_of
from npu_fusion.meta_impls._quant_matmul_floats import float_result_dtype

_E4M3, _E2M1 = "float8_e4m3fn", "float4_e2m1"


def float_product(call: Call) -> Tensor:
    """The result of a checked call whose operands are floating-point numbers."""
    kind = kind_of(call)
    if kind is Kind.FLOAT8:
        y = _float8(call)
    elif kind is Kind.TWO_LEVEL:
        y = _two_level(call)
    else:
        y = _microscaled(call, kind)
    return y.to(float_result_dtype(call, kind))


def _float8(call: Call) -> Tensor:
    element = "hifloat8" if call.x1_dtype == HIFLOAT8 else _E4M3
    acc = torch.matmul(formats.decode(call.x1, element), formats.decode(call.x2, element))
    if call.pertoken_scale is None:
        scale = unpack_quant_param(call.scale)[0] if call.scale.dtype == torch.int64 else call.scale
        return (acc if call.bias is None else acc + call.bias) * scale
    y = acc * call.scale * call.pertoken_scale.unsqueeze(-1)
    return y if call.bias is None else y + call.bias


def _microscaled(call: Call, kind: Kind) -> Tensor:
    assert call.pertoken_scale is not None
    inner = call.x1.size(-1)
    x2 = formats.decode(call.x2, _E4M3) if kind is Kind.MX else float4_rows(call.x2.t(), _E2M1).t()
    rows = powers_of_two(call.pertoken_scale).flatten(-2)
    columns = powers_of_two(call.scale).transpose(-2, -1).flatten(-3, -2)
    x1 = formats.decode(call.x1, _E4M3) * spread(rows, inner, -1)
    y = torch.matmul(x1, x2 * spread(columns, inner, -2))
    return y if call.bias is None else y + call.bias.to(torch.float32)


def _two_level(call: Call) -> Tensor:
    assert call.y_scale is not None
    weight = float4_rows(call.x2.t(), _E2M1)
    scale = spread(call.scale.to(torch.float32), weight.size(-1), -1)
    weight = formats.decode(formats.encode((weight * scale).to(call.scale.dtype), _E4M3), _E4M3)
    return torch.matmul(formats.decode(call.x1, _E4M3), weight.t()) * unpack_quant_param(call.y_scale)[0]
