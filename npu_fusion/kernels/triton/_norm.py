"""The factor of an RMSNorm as device function; the kernels decide what is rounded where."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal_rms(squares: tl.tensor, WIDTH: tl.constexpr, epsilon: tl.tensor) -> tl.tensor:
    """``1 / sqrt(squares / WIDTH + epsilon)``, each step correctly rounded: it is one number for a row."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, WIDTH * 1.0) + epsilon))
