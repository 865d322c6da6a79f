"""LLM.int8(): all input channels in int8, but a few with outliers in floating point.

::

    x ─ × regular ─ quantize per token ─ _int_mm(weight) ─ × scales ─ + bias ─ to(dtype) ─┐
    x[outliers] ─────────────────────────────────────────── linear(outlier_weight) ───── + ─ y

``regular`` is 1 and at outliers 0. They thus cost the other channels no resolution, and in a compiled graph
the first row is ``npu_dynamic_quant(x, smooth_scales=regular)`` and one ``npu_quant_matmul``: its sums keep
all input channels, where gathering the regular ones would copy the whole input and leave an odd width.

The original looks for outliers in every input (``|x| >= 6``), which needs the values while a graph is built.
The outliers of a language model are in the same few channels for every token, so here their set is fixed.

Source: Dettmers et al. (arXiv:2208.07339), sections 2 and 3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.quantization.modules.smoothquant._absmax import absmax_codes
from npu_fusion.quantization.modules.smoothquant._checks import (
    check_float,
    check_linear,
    check_rows,
    check_sizes,
    one_scale,
)
from npu_fusion.quantization.modules.smoothquant._int8_linear import FixedDtypes
from npu_fusion.quantization.modules.w8a8_linear import quantize_rows

THRESHOLD = 6.0
"""The magnitude from which on the original keeps a channel in floating point."""


class LLMInt8Linear(FixedDtypes):
    """``y = q(x) Wᵀ + x[outliers] outlier_weightᵀ + b``, outliers being the channels that are not quantized.

    With qx, sx = :func:`~npu_fusion.quantization.modules.quantize_rows` (x · regular)::

        y[t, n] = (Σₖ qx[t, k] · weight[n, k]) · weight_scale[n] · sx[t] + bias[n]
                  + Σ_o x[t, outliers[o]] · outlier_weight[n, o]

    The first row is that of :class:`~npu_fusion.quantization.modules.W8A8DynamicLinear`, rounded to the dtype
    of ``x``; the second a product in that dtype, added to it.

    Buffers: ``weight`` int8 [out_features, in_features], zeros at outliers; ``weight_scale`` fp32
    [out_features]; ``outliers`` int64 [O]; ``outlier_weight`` [out_features, O] and ``regular``
    [in_features], in the dtype of the model (these three are None without outliers); ``bias`` fp32
    [out_features] or None. ``Module.to(dtype)`` leaves ``weight_scale`` and ``bias`` as they are. A new layer
    has zeros: make it with :meth:`from_float` or load a state dict.

    Args:
        outliers: how many there are.

    Raises:
        ValueError: ``in_features`` is not between 2 and 131,071, ``out_features`` less than 1, or
            ``outliers`` not between 0 and ``in_features``.
    """

    fixed: ClassVar = ("weight_scale", "bias")

    weight: Tensor
    weight_scale: Tensor
    outliers: Tensor | None
    outlier_weight: Tensor | None
    regular: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        outliers: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("LLMInt8Linear", in_features, out_features)
        if not 0 <= outliers <= in_features:
            raise ValueError(f"LLMInt8Linear: outliers is {outliers}; accepted: 0 to {in_features}")
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        index = apart = regular = None
        if outliers:
            index = torch.zeros(outliers, dtype=torch.int64, device=device)
            apart = torch.zeros(out_features, outliers, dtype=dtype, device=device)
            regular = torch.zeros(in_features, dtype=dtype, device=device)
        self.register_buffer("outliers", index)
        self.register_buffer("outlier_weight", apart)
        self.register_buffer("regular", regular)
        zero_bias = torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        self.register_buffer("bias", zero_bias)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        module: nn.Linear,
        outliers: Tensor | None = None,
        *,
        act_scales: Tensor | None = None,
        threshold: float = THRESHOLD,
    ) -> LLMInt8Linear:
        """Quantize a float layer, with the given outliers or those that statistics show; it is left as it is.

        Args:
            outliers: indices of input channels, int64 [O] (int32 is fine); none are fine.
            act_scales: in place of them, the largest magnitude of each input channel, [in_features], as
                :func:`npu_fusion.quantization.smoothing.get_act_scales` gives it: outliers are the channels
                that reach ``threshold``, and those that are not finite.

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``, or both or none of ``outliers`` and
                ``act_scales`` are given.
            ValueError: an index out of range or there twice, statistics of another shape, a threshold that is
                not positive, or a layer that is not finite or too large.
        """
        who = "LLMInt8Linear.from_float"
        module = check_linear(who, module)
        check_sizes(who, module.in_features, module.out_features)
        if (outliers is None) == (act_scales is None):
            given = "neither" if outliers is None else "both"
            raise TypeError(f"{who}: {given} of outliers and act_scales given; accepted: one of them")
        if act_scales is not None:
            outliers = _reaching(who, act_scales, one_scale(who, "threshold", threshold), module.in_features)
        assert outliers is not None
        _check_indices(who, outliers, module.in_features)
        weight = module.weight.detach()
        index = outliers.to(weight.device, torch.int64).sort().values
        quantized = cls(
            module.in_features,
            module.out_features,
            index.numel(),
            module.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        codes, scale = absmax_codes(weight.index_fill(1, index, 0), by_row=True)
        quantized.weight.copy_(codes)
        quantized.weight_scale.copy_(scale.squeeze(-1))
        if quantized.outliers is not None:
            assert quantized.outlier_weight is not None
            assert quantized.regular is not None
            quantized.outliers.copy_(index)
            quantized.outlier_weight.copy_(weight[:, index])
            quantized.regular.fill_(1).index_fill_(0, index, 0)
        if quantized.bias is not None:
            quantized.bias.copy_(module.bias)
        return quantized.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features]; no tokens are fine.

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or has another last size.
        """
        check_float("LLMInt8Linear", "x", x)
        check_rows("LLMInt8Linear", x, self.in_features)
        rows = x.reshape(-1, self.in_features)  # before they are quantized, see W8A8DynamicLinear
        q, scale = quantize_rows(rows if self.regular is None else rows.float() * self.regular.float())
        y = torch._int_mm(q, self.weight.t()).float() * self.weight_scale * scale
        if self.bias is not None:
            y = y + self.bias
        y = y.to(x.dtype)
        if self.outliers is not None and self.outlier_weight is not None:
            y = y + F.linear(rows.index_select(1, self.outliers), self.outlier_weight.to(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        count = 0 if self.outliers is None else self.outliers.numel()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, outliers={count}, "
            f"bias={self.bias is not None}"
        )


def _reaching(who: str, act_scales: Tensor, threshold: float, in_features: int) -> Tensor:
    if tuple(act_scales.shape) != (in_features,):
        raise ValueError(f"{who}: act_scales has shape {list(act_scales.shape)}; accepted: [{in_features}]")
    return (~(act_scales < threshold)).nonzero().squeeze(-1)


def _check_indices(who: str, outliers: Tensor, in_features: int) -> None:
    if outliers.dim() != 1 or outliers.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{who}: outliers has dtype {outliers.dtype} and shape {list(outliers.shape)}; "
            "accepted: int64 or int32 [O]"
        )
    wrong = outliers[(outliers < 0) | (outliers >= in_features)]
    if wrong.numel():
        raise ValueError(f"{who}: outliers has {int(wrong[0])}; accepted: 0 to {in_features - 1}")
    if outliers.unique().numel() != outliers.numel():
        raise ValueError(f"{who}: outliers has an index twice; accepted: each once")
