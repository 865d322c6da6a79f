"""What the hardware accepts: limits that the passes check when ``FusionConfig.target`` names a SoC.

A name may end in a release of torch_npu, the first with its limits: -7.0 has npu_mla_prolog, -7.1 (also 7.2)
npu_mla_prolog_v2, without an ending the operators of 7.3 and later are there.

Source: the constraint sections of the torch_npu and CANN operator documentation. Where they contradict each
other the smaller limit stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """Limits of one SoC family."""

    name: str
    swiglu_alignment: int = 64
    """x's last dimension (2H) of npu_dequant_swiglu_quant is a multiple of this."""
    swiglu_max_rank: int = 8
    float_bias: bool = False
    """Whether npu_dequant_swiglu_quant documents a floating bias."""
    swiglu_modes: tuple[int, ...] = (0, 1, 2)
    swiglu_quant_width: int = 8192
    """Largest last dimension (2H) of npu_swiglu_quant."""
    quant_matmul_width: int = 65535
    """Largest last dimension of either operand (k and n) of npu_quant_matmul."""
    rotary_max_width: int = 895
    """Largest last dimension of npu_rotary_mul."""
    rotary_max_broadcast: int = 999
    """Largest dimension (batch or heads) over which npu_rotary_mul broadcasts the cosine."""
    interleave_rope_width: int = 64
    """The one last dimension that npu_interleave_rope takes."""
    interleave_rope_any_layout: bool = False
    """Whether npu_interleave_rope takes float32, and tensors that are not contiguous."""
    mla_prolog: str = "npu_mla_prolog_v3_functional"
    """The version of the operator that the release has."""
    mla_hidden: tuple[int, ...] = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
    """He of npu_mla_prolog."""
    mla_query_rank: tuple[int, ...] = (1536, 2048)
    """Hcq."""
    mla_heads: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    mla_nope: tuple[int, ...] = (128, 192)
    """D."""
    mla_block: tuple[int, ...] = tuple(range(16, 1025, 16))
    """Rows of a cache page."""
    mla_max_length: int | None = None
    """Most tokens per sequence (S) of npu_mla_prolog."""


_BEFORE_V3: dict[str, Any] = {
    "mla_hidden": (7168,),
    "mla_query_rank": (1536,),
    "mla_nope": (128,),
    "mla_block": (16, 128),
    "mla_max_length": 16,
}
_V1 = _BEFORE_V3 | {"mla_prolog": "npu_mla_prolog", "mla_heads": (32, 64, 128)}
_V2 = _BEFORE_V3 | {"mla_prolog": "npu_mla_prolog_v2", "mla_heads": (8, 16, 32, 64, 128)}

TARGETS = {
    "ascend910b": Target("ascend910b"),
    "ascend910_93": Target("ascend910_93"),
    "ascend910b-7.0": Target("ascend910b-7.0", **_V1),
    "ascend910b-7.1": Target("ascend910b-7.1", **_V2),
    "ascend910_93-7.0": Target("ascend910_93-7.0", **_V1),
    "ascend910_93-7.1": Target("ascend910_93-7.1", **_V2),
    "ascend950": Target("ascend950", swiglu_modes=(0,), interleave_rope_any_layout=True),
}
