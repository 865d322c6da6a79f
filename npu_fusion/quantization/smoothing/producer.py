"""What can absorb a factor for each channel: a norm's weight and bias, or the rows of a linear layer.

::

    w' = w * m      b' = b * m             a norm, or W'[n, :] = W[n, :] * m[n] of a linear layer
    w' = (1 + w) * m - 1                   a norm that multiplies by 1 + w (Gemma)

and its consumers get ``W / m``. Channels of the consumers may share one of the producer (grouped-query
attention: a value head feeds several heads of the output projection); they need one factor
(:meth:`Producer.reduce`).

Rounding. In float16 and bfloat16 ``w * m`` is rounded, and a factor of 1.003 may come out as 1.0. A norm has
one number for each channel, so what it really multiplies by is known (:meth:`Producer.attainable`), and
consumers divided by that are exact again. The rows of a linear layer round each weight on its own, as any
weight in 16 bits is rounded. With powers of two (:func:`power_of_two`) nothing is rounded anywhere, but under
a ``1 + w``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Producer:
    """Made by :func:`~npu_fusion.quantization.smoothing.find_groups`, which has proven that it is exact."""

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    """[channels], and of a linear layer [channels, in_features]; in the order weight, bias."""
    plus_one: tuple[bool, ...]
    """For each parameter p: it is used as 1 + p."""
    channel: Tensor
    """int64 [K]: the producer's channel in each channel that the consumers read."""

    def describe(self) -> str:
        return self.name

    def reduce(self, scales: Tensor) -> Tensor:
        """[K] -> [K]: in channels that share one of the producer, the largest of their values.

        That is for what activations are divided by (s), not for ``smooth_scales``, which are 1 / s.
        """
        self._check_size("reduce", scales)
        index = self.channel.to(scales.device)
        count = int(index.max()) + 1
        best = scales.new_zeros(count).scatter_reduce(0, index, scales, "amax", include_self=False)
        return best[index]

    def attainable(self, smooth_scales: Tensor) -> Tensor:
        """fp32 [K]: the factors that :meth:`fold` really gives, near those asked for (see Rounding, above).

        Raises:
            ValueError: as :meth:`fold`.
        """
        factors = self._factors("attainable", smooth_scales)
        if isinstance(self.module, nn.Linear):
            return smooth_scales.to(torch.float32)
        weight, plus_one = self.parameters[0], self.plus_one[0]
        old, new = _values(weight, plus_one), _values(self._folded(weight, plus_one, factors), plus_one)
        got = torch.where(old == 0, factors.reshape(old.shape), new / old)
        return got.flatten()[self.channel.to(got.device)].to(torch.float32)

    @torch.no_grad()
    def fold(self, smooth_scales: Tensor) -> None:
        """Multiply the channels that the consumers read as k by ``smooth_scales[k]``, in place.

        Args:
            smooth_scales: [K], positive, the same where :meth:`reduce` makes it the same.

        Raises:
            ValueError: it is not that, or a parameter would overflow its dtype; nothing is changed then.
        """
        factors = self._factors("fold", smooth_scales)
        for parameter, plus_one in zip(self.parameters, self.plus_one, strict=True):
            parameter.copy_(self._folded(parameter, plus_one, factors))

    def _check_size(self, where: str, scales: Tensor) -> None:
        if scales.shape != self.channel.shape:
            raise ValueError(
                f"{where}: scales have shape {list(scales.shape)}; accepted: {list(self.channel.shape)}"
            )

    def _factors(self, where: str, smooth_scales: Tensor) -> Tensor:
        """fp64, one for each of the producer's channels, on its device."""
        self._check_size(where, smooth_scales)
        if not bool((smooth_scales.isfinite() & (smooth_scales > 0)).all()):
            raise ValueError(f"{where}: smooth_scales has values that are not positive and finite")
        first = self.parameters[0]
        linear = isinstance(self.module, nn.Linear)
        scales = smooth_scales.detach().to(first.device, torch.float64)
        index = self.channel.to(first.device)
        factors = scales.new_ones(first.size(0) if linear else first.numel())
        factors[index] = scales
        if not torch.equal(factors[index], scales):
            raise ValueError(
                f"{where}: smooth_scales differs over channels that share one of {self.name}; "
                f"accepted: what reduce gives"
            )
        for parameter, plus_one in zip(self.parameters, self.plus_one, strict=True):
            if linear and parameter.dim() > 1:
                peak = parameter.detach().abs().amax(1).to(scales)
            else:
                peak = _values(parameter, plus_one).abs().flatten()
            if not bool((peak * factors <= torch.finfo(parameter.dtype).max).all()):
                raise ValueError(
                    f"{where}: smooth_scales makes a parameter of {self.name} overflow {parameter.dtype}"
                )
        return factors

    def _folded(self, parameter: Tensor, plus_one: bool, factors: Tensor) -> Tensor:
        factors = factors.to(parameter.device)
        if parameter.dim() > 1 and isinstance(self.module, nn.Linear):
            # The one large tensor, and fp32 is enough for one product.
            wide = torch.promote_types(parameter.dtype, torch.float32)
            return (parameter.detach().to(wide) * factors.to(wide).unsqueeze(1)).to(parameter.dtype)
        new = _values(parameter, plus_one) * factors.reshape(parameter.shape)
        folded = (new - 1 if plus_one else new).to(parameter.dtype)
        # What was not 0 must not become 0 or change its sign: that would switch a channel off for good.
        limits = torch.finfo(parameter.dtype)
        least = torch.where(new > 0, limits.smallest_normal, -limits.smallest_normal)
        if plus_one:
            least = torch.where(new > 0, limits.eps / 2 - 1, -limits.eps - 1)
        return torch.where(_values(folded, plus_one).sign() == new.sign(), folded, least.to(parameter.dtype))


def _values(parameter: Tensor, plus_one: bool) -> Tensor:
    """What is multiplied by, fp64."""
    values = parameter.detach().to(torch.float64)
    return values + 1 if plus_one else values


def power_of_two(scales: Tensor) -> Tensor:
    """The nearest powers of two (in the logarithm) of positive ``scales``, in its shape and dtype."""
    return torch.exp2(torch.log2(scales.to(torch.float64)).round()).to(scales.dtype)
