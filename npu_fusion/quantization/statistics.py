"""What calibration remembers of the input of a layer: sums and extremes, never the input itself.

An algorithm says what it needs (:data:`NEEDS`), and only that is computed. Layers that read the same tensor
share one object.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

RANGE, ABS_MEAN, GRAM, SAMPLE = "range", "abs_mean", "gram", "sample"
NEEDS = (RANGE, ABS_MEAN, GRAM, SAMPLE)

SAMPLED_ROWS = 512
SAMPLED_IMAGES = 32


class Statistics:
    """Running statistics, fp32, of all inputs [..., K] of a layer (for a convolution: [B, C, H, W], K is C).

    Attributes:
        rows: how many rows (images) there were; 0 means that the layer never ran.
        low, high: [K], smallest and largest value of each channel (``range``).
        abs_mean: [K], mean of the absolute value of each channel (``abs_mean``).
        gram: [K, K], the sum of x xᵀ over all rows (``gram``; linear layers only).
        sample: [at most SAMPLED_ROWS, K] rows, or SAMPLED_IMAGES images, evenly out of all batches
        (``sample``).
    """

    def __init__(
        self, channels: int, needs: Collection[str], device: torch.device, images: bool = False
    ) -> None:
        self.needs = frozenset(needs)
        self.images = images
        self.rows = 0
        self._values = 0
        self._abs_sum = torch.zeros(channels, device=device)
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.gram = torch.zeros((channels, channels) if GRAM in self.needs else (0, 0), device=device)
        self._batches: list[Tensor] = []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in one batch. It is only read."""
        x = x.detach()
        if not self.images:
            x = x.reshape(-1, x.size(-1))
        if x.numel() == 0:
            return
        channels = x.transpose(0, 1).flatten(1).float() if self.images else x.float().t()
        self.rows += x.size(0)
        if RANGE in self.needs:
            self.low = torch.minimum(self.low, channels.amin(1))
            self.high = torch.maximum(self.high, channels.amax(1))
        if ABS_MEAN in self.needs:
            self._values += channels.size(1)
            self._abs_sum += channels.abs().sum(1)
        if GRAM in self.needs:
            self.gram.addmm_(channels, channels.t())
        if SAMPLE in self.needs:
            self._sample(x)

    def _sample(self, x: Tensor) -> None:
        if self._batches and x.shape[1:] != self._batches[0].shape[1:]:
            return  # images of another size than the first ones, which could not be one tensor with them
        limit = SAMPLED_IMAGES if self.images else SAMPLED_ROWS
        self._batches.append(_evenly(x, limit).clone())
        # Every batch keeps the same share, so that late batches count as much as early ones.
        share = max(1, limit // len(self._batches))
        self._batches = [_evenly(batch, share) for batch in self._batches][:limit]

    @property
    def abs_max(self) -> Tensor:
        """[K], largest absolute value of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def abs_mean(self) -> Tensor:
        return self._abs_sum / max(1, self._values)

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._batches)


def _evenly(x: Tensor, count: int) -> Tensor:
    if x.size(0) <= count:
        return x
    return x[torch.linspace(0, x.size(0) - 1, count, device=x.device).long()]
