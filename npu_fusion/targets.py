"""What the hardware accepts: limits that the passes check when ``FusionConfig.target`` names a SoC.

Source: the constraint sections of the torch_npu and CANN operator documentation. Where they contradict each
other the smaller limit stands here.
"""

from __future__ import annotations

from dataclasses import dataclass


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


TARGETS = {
    "ascend910b": Target("ascend910b"),
    "ascend910_93": Target("ascend910_93"),
    "ascend950": Target("ascend950", swiglu_modes=(0,), interleave_rope_any_layout=True),
}
