"""Rows of keys and latents into their caches (src/kv_rmsnorm_rope_cache.cpp): what npu_kv_rmsnorm_rope_cache
does, and npu_mla_prolog at its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_fusion.kernels.cpu._library import finished, kernel
from npu_fusion.kernels.cpu._tensors import TYPES, address, contiguous, optional_contiguous


@dataclass(frozen=True)
class Cache:
    """A cache [pages, rows of a page, 1, width], and how its int8 numbers are made; ``scale`` has one element
    or ``width``."""

    tensor: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    def arguments(self) -> tuple[int, ...]:
        t = self.tensor
        factors: list[int] = []
        for factor in (self.scale, self.offset):
            factors += [address(factor), int(factor is not None and factor.numel() > 1)]
        return t.data_ptr(), TYPES[t.dtype], *factors, t.stride(0), t.stride(1), t.stride(3)


class Product:
    """A product [R, width] as the kernels take it; fp32 scales [R, 1] and [1, width] count if it is int32."""

    def __init__(
        self, x: Tensor, row_scale: Tensor | None = None, column_scale: Tensor | None = None
    ) -> None:
        self.x = contiguous(x)
        self.scales: list[Tensor | None] = [None, None]
        if x.dtype is torch.int32:
            self.scales = [optional_contiguous(scale) for scale in (row_scale, column_scale)]

    def arguments(self) -> tuple[int, ...]:
        return self.x.data_ptr(), TYPES[self.x.dtype], *map(address, self.scales), *self.x.shape


_function = kernel("kv_rmsnorm_rope_cache", "38q2d")


def write_key_rows(
    kv: Product,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    epsilon: float,
    factor: float,
    slots: Tensor | None,
    latent: Cache,
    rope: Cache,
    *,
    nz: bool,
    round_rope: bool,
    outputs: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Write ``rms_norm(kv[:, :Hckv]) * factor`` and ``rotate(kv[:, Hckv:])`` into two caches of equal pages.

    Args:
        kv: [R, Hckv + Dr], of the dtype of ``gamma`` or int32.
        gamma: [Hckv].
        cos, sin: [R, Dr], contiguous.
        slots: int64 [R], contiguous; a negative one is not written, of equal ones the last is. None: 0, 1, ..
        round_rope: whether the rotated row is rounded to the dtype of ``gamma`` before it is quantized.
        outputs: filled with the two rows as well, not quantized: [R, Hckv] and [R, Dr].

    Returns False, and has written nothing, where there is no kernel, or a slot beyond the caches.
    """
    function = _function()
    if function is None:
        return False
    pages, block = latent.tensor.shape[:2]
    status = function(
        *kv.arguments(),
        TYPES[gamma.dtype],
        gamma.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        gamma.size(0),
        cos.size(1),
        round_rope,
        address(slots),
        block,
        pages,
        nz,
        *latent.arguments(),
        *rope.arguments(),
        address(outputs[0] if outputs else None),
        address(outputs[1] if outputs else None),
        torch.get_num_threads(),
        epsilon,
        factor,
    )
    return finished(status)


def rows_of(angles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Cosine or sine, broadcast to ``shape`` [.., Dr], as [R, Dr]."""
    return contiguous(angles.expand(shape)).view(-1, shape[-1])
