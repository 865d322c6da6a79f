"""A linear layer in int8: weights with one scale per output channel, activations with one scale per token.

It is written in plain ATen operators, so it runs wherever PyTorch does, and a graph traced from it is what
the fusions look for (``npu_dynamic_quant``, ``npu_quant_matmul``, ``npu_dequant_swiglu_quant``)::

    x ─ abs ─ amax ─ /127 ─┬───────────────────────────────────────────────────┐
    x ──────────────────── ÷ ─ round ─ clamp ─ int8 ─ _int_mm ─ × weight_scale ─ × ─ + bias ─ y
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FEWEST_INPUTS = 2


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


class W8A8DynamicLinear(nn.Module):
    """``y = x Wᵀ + b`` with int8 weights (scale per channel) and int8 activations (per token, at run time).

    With qx, sx = :func:`quantize_rows` (x) and qw, sw = :func:`quantize_rows` (W)::

        y[t, n] = (Σₖ qx[t, k] · qw[n, k]) · sw[n] · sx[t] + b[n]

    The sum is an exact int32 (K up to 131,071), the rest is fp32, rounded once to the dtype of ``x``. This
    is per-token and per-channel W8A8 as in LLM.int8() (arXiv:2208.07339) and SmoothQuant
    (arXiv:2211.10438), and what ``npu_dynamic_quant`` and ``npu_quant_matmul(pertoken_scale=)`` compute.
    The layer is for inference: no gradient reaches its weight.

    Buffers: ``weight`` int8 [out_features, in_features], ``weight_scale`` fp32 [out_features], ``bias``
    fp32 [out_features] or None. A new layer has zero weights: make it with :meth:`from_float` or load a
    state dict. On CUDA ``torch._int_mm`` itself wants more than 16 tokens and features in multiples of 8.

    Raises:
        ValueError: ``in_features`` is less than 2 (``torch._int_mm`` misreads a matrix of one row on the CPU,
            pytorch issue 195066) or ``out_features`` less than 1.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features < _FEWEST_INPUTS or out_features < 1:
            raise ValueError(
                f"W8A8DynamicLinear: in_features is {in_features} and out_features {out_features}; "
                f"accepted: in_features at least {_FEWEST_INPUTS} and out_features at least 1"
            )
        self.in_features = in_features
        self.out_features = out_features
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        zero_bias = torch.zeros(out_features, dtype=torch.float32, device=device) if bias else None
        self.register_buffer("bias", zero_bias)

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
        quantized = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device
        )
        weight, scale = quantize_rows(linear.weight)
        quantized.weight.copy_(weight)
        quantized.weight_scale.copy_(scale.squeeze(-1))
        if quantized.bias is not None:
            quantized.bias.copy_(linear.bias)
        return quantized.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., out_features] in the dtype of ``x`` [..., in_features]; zero tokens are fine.

        Raises:
            ValueError: ``x`` is not float16, bfloat16 or float32, or its last size is not ``in_features``.
        """
        if x.dtype not in _ACTIVATION_DTYPES:
            raise ValueError(
                f"W8A8DynamicLinear: x has dtype {x.dtype}; "
                f"accepted: {', '.join(str(dtype) for dtype in _ACTIVATION_DTYPES)}"
            )
        if x.dim() == 0 or x.size(-1) != self.in_features:
            raise ValueError(
                f"W8A8DynamicLinear: x has shape {list(x.shape)}; "
                f"accepted: [..., {self.in_features}] (in_features last)"
            )
        # The rows are made two-dimensional before they are quantized, not after: for a single token Inductor
        # turns a later reshape into a stride of 0, with which torch._int_mm computes garbage on the CPU
        # (pytorch issue 195066).
        q, scale = quantize_rows(x.reshape(-1, self.in_features))
        y = torch._int_mm(q, self.weight.t()).float() * self.weight_scale * scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def quantize_linears(model: nn.Module, skip: Iterable[str] = ("lm_head",)) -> list[str]:
    """Replace each ``torch.nn.Linear`` in ``model`` by its :class:`W8A8DynamicLinear`, in place.

    Subclasses of Linear are left alone: their owners may use them in a way of their own (MultiheadAttention
    reads the weight of its ``out_proj``). A layer that is used under several names stays one layer.

    Args:
        skip: names to leave in float: a full name (``model.layers.0.mlp.down_proj``) or its last parts
            (``down_proj``).

    Returns:
        The full names of the replaced layers, in the order of ``model.named_modules``.

    Raises:
        TypeError: ``skip`` is a single string.
        ValueError: ``model`` is itself a Linear, which cannot be replaced in place; or see
            :meth:`W8A8DynamicLinear.from_float` (nothing is replaced then).
    """
    if isinstance(skip, str):
        raise TypeError(f"quantize_linears: skip must be a sequence of names, got the string {skip!r}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "quantize_linears: model is itself a Linear; use W8A8DynamicLinear.from_float(model)"
        )
    skipped = tuple(skip)
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and not any(f".{name}".endswith(f".{suffix}") for suffix in skipped)
    }
    quantized: dict[nn.Linear, W8A8DynamicLinear] = {}
    for name, linear in linears.items():
        if linear not in quantized:
            try:
                quantized[linear] = W8A8DynamicLinear.from_float(linear)
            except ValueError as error:
                raise ValueError(f"quantize_linears: layer {name}: {error}") from error
    for name, linear in linears.items():
        model.set_submodule(name, quantized[linear])
    return list(linears)
