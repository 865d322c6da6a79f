"""The integers that torch_npu's ``int?`` dtype arguments carry, and the dtypes they mean.

They are the values of PyTorch's C++ ``ScalarType`` enum (int8 is 1), extended by torch_npu with 290 and up
for types that its device adds. (The graph engine below torch_npu counts differently, int8 is 2 there: such a
value passed here means int16, and the operators refuse it.) Since torch_npu 26.0 most of these arguments are
``int?``; before, they were ``ScalarType?``, so a traced graph may hold either spelling.

Source: ``c10/core/ScalarType.h`` of PyTorch; Meta implementations of torch_npu 2.13.0.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from npu_fusion.meta_impls._checks import check

HIFLOAT8 = 290
E8M0 = 293
FLOAT4_E2M1 = 296
FLOAT4_E1M2 = 297
"""Numbers of torch_npu for types that PyTorch does not have, or not in all its releases. Tensors of bytes
carry them: one number in each, or two of the types with 4 bits."""

HIFLOAT8_DTYPE = torch.bits8
"""What :func:`dtype_argument` says for :data:`HIFLOAT8`, as ``torch.quint4x2`` stands for packed int4. No
tensor has it: the bytes are uint8."""

_BY_ENUM: dict[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
}


def torch_dtype(value: int | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype that a dtype-like argument means: ``default`` for None, a ``torch.dtype`` as it is.

    Raises ``ValueError`` for an integer that is not a known ``ScalarType`` value.
    """
    if value is None:
        return default
    if isinstance(value, torch.dtype):
        return value
    if value not in _BY_ENUM:
        known = ", ".join(f"{enum} ({str(dtype).removeprefix('torch.')})" for enum, dtype in _BY_ENUM.items())
        raise ValueError(f"{value} is not the ScalarType value of a supported dtype; known: {known}")
    return _BY_ENUM[value]


def dtype_argument(
    op: str,
    argument: str,
    value: int | torch.dtype | None,
    default: torch.dtype,
    offered: Collection[torch.dtype],
    accepted: str,
) -> torch.dtype:
    """The dtype that ``argument`` of the operator ``op`` means; ``ValueError`` unless it is ``offered``."""
    if value == HIFLOAT8 and HIFLOAT8_DTYPE in offered:
        return HIFLOAT8_DTYPE
    try:
        dtype = torch_dtype(value, default)
    except ValueError as unknown:
        raise ValueError(f"{op}: {argument} is {value}; accepted: {accepted}") from unknown
    check(dtype in offered, op, argument, value, accepted)
    return dtype


def enum_value(dtype: torch.dtype) -> int:
    """The ``ScalarType`` value of a dtype; ``ValueError`` for one that :func:`torch_dtype` does not know."""
    for value, known in _BY_ENUM.items():
        if known == dtype:
            return value
    raise ValueError(
        f"{dtype} has no known ScalarType value; known: {', '.join(map(str, _BY_ENUM.values()))}"
    )
