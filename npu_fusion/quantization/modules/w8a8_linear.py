"""A linear layer in int8: weights with one scale per output channel, activations with one scale per token.

It is written in plain ATen operators, so it runs wherever PyTorch does, and a graph traced from it is what
the fusions look for (``npu_dynamic_quant``, ``npu_quant_matmul``, ``npu_dequant_swiglu_quant``)::

    x [× smooth_scales] ─ abs ─ amax ─ /127 ─┬───────────────────────────────────────────────────┐
          └───────────────────────────────── ÷ ─ round ─ clamp ─ int8 ─ _int_mm ─ × weight_scale ─ × ─ + bias
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from npu_fusion._mergeable import mergeable
from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._deployed import Spec, deployed
from npu_fusion.quantization.modules._description import DTYPES
from npu_fusion.quantization.modules._linear import (
    DeployedLinear,
    as_given,
    bias_fp32,
    check_int8_sizes,
    doubled,
    dtype_or_none,
    flag,
    for_each_output,
)
from npu_fusion.quantization.modules._replace import replace_linears
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

PLAIN = Scheme(WeightScheme("int8"), InputScheme("int8", strategy="token"))
"""Of layers that are made without a scheme."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` symmetrically to int8.

    With r a row (the last dimension), in fp32::

        scale = max|r| / 127        q = round(r / scale), half to even, clamped to [-128, 127]

    which is ``npu_dynamic_quant``'s formula (op-plugin documentation of torch_npu 2.13.0) and the symmetric
    absmax quantization of LLM.int8() (arXiv:2208.07339, section 2). A row whose scale is 0 (all zero, or so
    small that the quotient underflows) gives q = 0: it is divided by 1 instead.

    Args:
        x: [..., K], floating point, K at least 1.

    Returns:
        q, int8 [..., K], and scale, fp32 [..., 1].
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    q = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-128, 127).to(torch.int8)
    return q, scale


@deployed
class W8A8DynamicLinear(DeployedLinear):
    """``y = x Wᵀ + b`` with int8 weights (scale per channel) and int8 activations (per token, at run time).

    With f the smooth scales (1 where there are none) and qx, sx = :func:`quantize_rows` (x · f)::

        y[t, n] = (Σₖ qx[t, k] · weight[n, k]) · weight_scale[n] · sx[t] + b[n]

    The sum is an exact int32 (K up to 131,071), the rest is fp32, rounded once to the dtype of ``x``. This
    is per-token and per-channel W8A8 as in LLM.int8() (arXiv:2208.07339) and SmoothQuant
    (arXiv:2211.10438), and what ``npu_dynamic_quant`` and ``npu_quant_matmul(pertoken_scale=)`` compute.
    The layer is for inference: no gradient reaches its weight.

    Buffers: ``weight`` int8 [out_features, in_features], ``weight_scale`` fp32 [out_features] (equal numbers
    where the scheme has one for the whole weight), ``smooth_scales`` [in_features] or None, ``bias`` fp32
    [out_features] or None. A new layer has zero weights: make it with :func:`deploy` or :meth:`from_float`,
    or load a state dict. On CUDA ``torch._int_mm`` itself wants more than 16 tokens and features in multiples
    of 8.

    Args:
        scheme: of int8 weights (symmetric, one scale or one per channel) and int8 inputs per token.
        smooth_scales: their dtype, which has to be that of ``x`` for the fusions; None: there are none.

    Raises:
        ValueError: ``in_features`` is less than 2 (``torch._int_mm`` misreads a matrix of one row on the CPU,
            pytorch issue 195066) or ``out_features`` less than 1.
    """

    kind = "w8a8_dynamic_linear"
    shared = ("smooth_scales",)
    reads: ClassVar = {"bias": flag, "smooth_scales": dtype_or_none(DTYPES)}

    weight: Tensor
    weight_scale: Tensor
    smooth_scales: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        scheme: Scheme = PLAIN,
        smooth_scales: torch.dtype | None = None,
    ) -> None:
        check_int8_sizes("W8A8DynamicLinear", in_features, out_features)
        specs = {
            "weight": Spec(torch.int8, (out_features, in_features)),
            "weight_scale": Spec(torch.float32, (out_features,)),
            "smooth_scales": None if smooth_scales is None else Spec(smooth_scales, (in_features,)),
            "bias": Spec(torch.float32, (out_features,)) if bias else None,
        }
        options = {"bias": bias, "smooth_scales": smooth_scales}
        super().__init__(in_features, out_features, scheme, specs, device, options)

    @classmethod
    def takes(cls, scheme: Scheme) -> bool:
        weights, inputs = scheme.weights, scheme.inputs
        return (
            inputs is not None
            and (weights.type, weights.symmetric) == ("int8", True)
            and weights.strategy in ("tensor", "channel")
            and (inputs.type, inputs.symmetric, inputs.strategy) == ("int8", True, "token")
        )

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> W8A8DynamicLinear:
        dtype = None if smooth_scales is None else smooth_scales.dtype
        made = cls.like(layer, scheme, bias=layer.bias is not None, smooth_scales=dtype)
        made.fill(
            weight=weight.codes,
            weight_scale=for_each_output(weight),
            smooth_scales=smooth_scales,
            bias=bias_fp32(layer),
        )
        return made

    def quantized_weight(self) -> QuantizedWeight:
        return as_given(self.scheme, self.weight, self.weight_scale)

    @classmethod
    @torch.no_grad()
    def from_float(cls, linear: nn.Linear) -> W8A8DynamicLinear:
        """Quantize a float layer; it is left as it is.

        Raises:
            TypeError: ``linear`` is not a ``torch.nn.Linear``.
            ValueError: its weight is not floating point, its weight or bias has an infinity or a NaN, or it
                has less than two input features or no output.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"W8A8DynamicLinear.from_float: linear must be a torch.nn.Linear, got {type(linear).__name__}"
            )
        if not linear.weight.is_floating_point():
            raise ValueError(
                f"W8A8DynamicLinear.from_float: weight has dtype {linear.weight.dtype}; "
                f"accepted: floating point"
            )
        for name, parameter in linear.named_parameters(recurse=False):
            if not parameter.isfinite().all():
                raise ValueError(
                    f"W8A8DynamicLinear.from_float: {name} has infinities or NaN; accepted: finite values"
                )
        weight, scale = quantize_rows(linear.weight.detach())
        given = QuantizedWeight(PLAIN.weights, weight, scale.squeeze(-1))
        return cls.of(linear, PLAIN, given, None, None).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features]; zero tokens are fine.

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or its last size is not ``in_features``.
        """
        rows = self.rows(x)
        if self.smooth_scales is not None:
            rows = rows.float() * self.smooth_scales.float()
        q, scale = quantize_rows(rows)
        y = torch._int_mm(q, self.weight.t()).float() * self.weight_scale * scale
        if self.bias is not None:
            y = y + self.bias
        return self.unrows(y, x)


mergeable(W8A8DynamicLinear, shared=W8A8DynamicLinear.shared)(doubled)


def quantize_linears(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> list[str]:
    """Replace each ``torch.nn.Linear`` in ``model`` by its :class:`W8A8DynamicLinear`, in place.

    Subclasses of Linear are left alone: their owners may use them in a way of their own (MultiheadAttention
    reads the weight of its ``out_proj``). A layer that is used under several names stays one layer, in float
    if one of them is to be skipped.

    Args:
        skip: names to leave in float: a full name (``model.layers.0.mlp.down_proj``) or its last parts
            (``down_proj``), with the wildcards of file names.

    Returns:
        The full names of the replaced layers, in the order of ``model.named_modules``.

    Raises:
        TypeError: ``skip`` is a single string.
        ValueError: ``model`` is itself a Linear, which cannot be replaced in place; or see
            :meth:`W8A8DynamicLinear.from_float` (nothing is replaced then).
    """
    return replace_linears(
        "quantize_linears", model, lambda _, linear: W8A8DynamicLinear.from_float(linear), skip
    )
