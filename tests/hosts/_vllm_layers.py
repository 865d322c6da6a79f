"""Layers that call what vllm-ascend's quantized layers call, argument by argument, and CPU kernels for that.

Source: vllm-ascend 0.23.0, vllm_ascend/quantization/methods/w8a8_static.py and w8a8_dynamic.py,
ops/layernorm.py, ops/activation.py, ops/register_custom_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)

npu = torch.ops.npu
_LIBRARIES: list[torch.library.Library] = []


def _operator(
    namespace: str, schema: str, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator of vllm-ascend unless it has done so itself, and give it its CPU kernel."""

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{namespace}::{schema.partition('(')[0]}"
        library = torch.library.Library(namespace, "FRAGMENT")
        _LIBRARIES.append(library)
        if not torch._C._dispatch_has_kernel(name):
            library.define(schema)
            torch.library.register_fake(name, fake or kernel, lib=library)
        library.impl(name.partition("::")[2], kernel, "CPU")
        return kernel

    return decorate


@_operator("vllm", "quantize(Tensor x, Tensor scale, Tensor reciprocal, Tensor offset) -> Tensor")
def _quantize(x: Tensor, scale: Tensor, reciprocal: Tensor, offset: Tensor) -> Tensor:
    return npu.npu_quantize(x, reciprocal, offset, torch.qint8, -1, False)


@_operator(
    "vllm",
    "maybe_chunk_residual(Tensor x, Tensor residual) -> Tensor",
    fake=lambda x, residual: torch.empty_like(x),
)
def _maybe_chunk_residual(x: Tensor, residual: Tensor) -> Tensor:
    return residual.clone()


@_operator(
    "_C_ascend",
    "npu_add_rms_norm_bias(Tensor x1, Tensor x2, Tensor gamma, Tensor? beta=None, float epsilon=1e-6)"
    " -> (Tensor y, Tensor rstd, Tensor x)",
)
def _add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None = None, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, x = npu.npu_add_rms_norm(x1, x2, gamma, epsilon)
    return (y if beta is None else y + beta), rstd, x


class RMSNorm(torch.nn.Module):
    """AscendRMSNorm with a residual."""

    def __init__(self, size: int, dtype: torch.dtype, bias: bool = False, custom: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size).to(dtype) + 0.5, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(size).to(dtype), requires_grad=False) if bias else None
        self.custom = custom

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = torch.ops.vllm.maybe_chunk_residual(x, residual)
        if self.custom:
            x, _, residual = torch.ops._C_ascend.npu_add_rms_norm_bias(
                x, residual, self.weight, self.bias, 1e-6
            )
        else:
            x, _, residual = npu.npu_add_rms_norm(x, residual, self.weight, 1e-6)
        return x, residual


class _Linear(torch.nn.Module):
    def __init__(self, inner: int, outer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", torch.randint(-127, 128, (inner, outer), dtype=torch.int8))
        self.register_buffer("weight_scale", (torch.rand(outer) * 0.002 + 0.001).to(dtype))


class DynamicLinear(_Linear):
    """AscendW8A8DynamicLinearMethod.apply; the scale of the weight has the model's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        quantized_x, pertoken_scale = npu.npu_dynamic_quant(x, dst_type=torch.int8)
        return npu.npu_quant_matmul(
            quantized_x,
            self.weight,
            self.weight_scale,
            pertoken_scale=pertoken_scale,
            bias=None,
            output_dtype=x.dtype,
        )


class StaticLinear(_Linear):
    """AscendW8A8LinearMethod.apply after its process_weights_after_loading."""

    def __init__(self, inner: int, outer: int, dtype: torch.dtype) -> None:
        super().__init__(inner, outer, dtype)
        scale = torch.tensor([0.03], dtype=dtype)
        self.register_buffer("input_scale", scale.repeat(inner))
        self.register_buffer("input_reciprocal", 1 / scale.repeat(inner))
        self.register_buffer("input_offset", torch.tensor([3], dtype=torch.int8).repeat(inner).to(dtype))
        deq_scale = scale.float() * self.weight_scale.float()
        packed = deq_scale.view(torch.int32).to(torch.int64)  # what float16 layers of ModelSlim have
        self.register_buffer("deq_scale", packed if dtype == torch.float16 else deq_scale)
        self.register_buffer("quant_bias", torch.randint(-900, 900, (outer,), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.vllm.quantize(x, self.input_scale, self.input_reciprocal, self.input_offset)
        return npu.npu_quant_matmul(
            x, self.weight, self.deq_scale, bias=self.quant_bias, output_dtype=self.dtype
        )


class DenseMLP(torch.nn.Module):
    """The norm before it, gate and up in one projection, AscendSiluAndMul, the projection down."""

    def __init__(self, linear: type[_Linear], dtype: torch.dtype = torch.bfloat16, **norm: bool) -> None:
        super().__init__()
        self.norm = RMSNorm(64, dtype, **norm)
        self.gate_up = linear(64, 256, dtype)
        self.down = linear(128, 64, dtype)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.norm(x, residual)
        return self.down(npu.npu_swiglu(self.gate_up(x))), residual


def dense_mlp(linear: type[_Linear], dtype: torch.dtype = torch.bfloat16, **norm: bool) -> DenseMLP:
    torch.manual_seed(0)
    return DenseMLP(linear, dtype, **norm).eval()


def tokens(count: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, 64, generator=generator).to(dtype) for _ in range(2))
