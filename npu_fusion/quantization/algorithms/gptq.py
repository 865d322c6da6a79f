"""gptq: columns are rounded one after the other, and the error of each is made up for by those after it.

::

    H = G + damping I,    U = upper Cholesky factor of H^-1
    for each column k:    q = round(w_k)                      with the scale and offset of its group
                          e = (w_k - q) / U[k, k]
                          W[:, k+1:] -= e U[k, k+1:]

with G the Gram matrix of the layer's input. Columns are taken in blocks; what is after a block is updated
once, by one product. ``act_order`` takes the columns with the largest G[k, k] first; scales and offsets
belong to the groups of the original order and come from the original weight, so the result is stored as any
other.

Integers and floats alike: only the rounding differs.

Conditions and traps:

* Columns whose input was always 0 get the weight 0, as in the paper's code, and H[k, k] = 1.
* If H is not positive definite in fp32, the damping grows tenfold, until it is.
* The greedy order is no promise: of each row the better one of GPTQ and rounding to nearest is kept
  (:func:`gptq_weight`), measured by the error of the output over all calibration data.

Source: arXiv 2210.17323, algorithm 1; ``act_order`` and static groups as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._base import Algorithm, Problem, Solution, algorithm
from npu_fusion.quantization.algorithms._loss import gram_of, weight_error
from npu_fusion.quantization.algorithms._nearest import input_needs, round_all, static_inputs
from npu_fusion.quantization.qparams import (
    all_parameters,
    encode_numbers,
    encode_weight,
    nearest_numbers,
    step,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme
from npu_fusion.quantization.statistics import GRAM

PERCDAMP, BLOCK_SIZE, ACT_ORDER = 0.01, 128, True
_LEAST_GROWN_DAMPING = 1e-3
_ATTEMPTS = 7
"""The last one has a damping of at least 100 times the mean of the diagonal."""


@dataclass(frozen=True)
class Hessian:
    """What GPTQ needs of the input of some layers, computed once for all of them."""

    order: Tensor
    """int64 [K]: the columns, as they are rounded."""
    dead: Tensor
    """bool [K], in the original order: columns whose input was always 0."""
    factor: Tensor
    """fp32 [K, K], in the order of rounding: the upper Cholesky factor of the inverse."""


def prepare(gram: Tensor, percdamp: float = PERCDAMP, act_order: bool = ACT_ORDER) -> Hessian | None:
    """The factor of the inverse of a Gram matrix [K, K], which may be scaled by any positive number.

    None if it cannot be inverted, however much it is damped (it is not positive semidefinite, or not finite).

    Raises:
        ValueError: ``gram`` is not square; or ``percdamp``, the damping in units of the mean of the diagonal,
            is negative.
    """
    if gram.dim() != 2 or gram.size(0) != gram.size(1):
        raise ValueError(f"gptq: gram has shape {list(gram.shape)}; accepted: [K, K]")
    if percdamp < 0:
        raise ValueError(f"gptq: percdamp is {percdamp}; accepted: 0 or more")
    diagonal = gram.diagonal()
    order = torch.arange(gram.size(0), device=gram.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    dead = diagonal == 0
    hessian = gram[order][:, order].float()
    hessian.diagonal()[dead[order]] = 1.0
    mean = hessian.diagonal().mean()
    damping = percdamp
    for _ in range(_ATTEMPTS):
        hessian.diagonal().add_(mean * damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(factor.isfinite().all()):
                return Hessian(order, dead, factor)
        damping = max(10 * damping, _LEAST_GROWN_DAMPING)
    return None


def gptq_numbers(
    weight: Tensor,
    hessian: Hessian,
    scheme: WeightScheme,
    scale: Tensor,
    offset: Tensor | None = None,
    bits: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """The numbers of the type, fp32 [N, K], that GPTQ rounds a weight [N, K] to.

    Args:
        scheme: its type says how to round, its ``group_size`` which columns share a scale.
        scale, offset: in the shape of ``QuantizedWeight.scale``.
        bits: of integers, if fewer than the type has.

    Raises:
        ValueError: ``weight`` and ``hessian`` have different numbers of columns; ``block_size`` is below 1.
    """
    rows, columns = weight.shape
    if hessian.order.numel() != columns:
        raise ValueError(
            f"gptq: weight has {columns} columns; accepted: {hessian.order.numel()}, as the Gram matrix"
        )
    if block_size < 1:
        raise ValueError(f"gptq: block_size is {block_size}; accepted: at least 1")
    # One column at a time is read and written, so columns are stored as rows.
    left = weight.float().masked_fill(hessian.dead, 0.0).t()[hessian.order]
    numbers = torch.empty_like(left)
    scales, offsets = _by_group(scale), None if offset is None else _by_group(offset.float())
    size = scheme.group_size or columns
    groups = [column // size for column in hessian.order.tolist()]
    diagonal = hessian.factor.diagonal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, factor = left[start:end], hessian.factor[start:end]
        errors = left.new_empty(end - start, rows)
        for i in range(end - start):
            scale_of_column = scales[groups[start + i]]
            quotient = block[i] / scale_of_column
            if offsets is None:
                number = nearest_numbers(quotient, scheme.type, bits)
                value = number * scale_of_column
            else:
                offset_of_column = offsets[groups[start + i]]
                number = nearest_numbers(quotient + offset_of_column, scheme.type, bits)
                value = (number - offset_of_column) * scale_of_column
            numbers[start + i] = number
            torch.sub(block[i], value, out=errors[i]).div_(diagonal[start + i])
            block[i + 1 :].addr_(factor[i, start + i + 1 : end], errors[i], alpha=-1)
        left[end:].addmm_(factor[:, end:].t(), errors, alpha=-1)
    result = torch.empty_like(numbers)
    result[hessian.order] = numbers
    return result.t().contiguous()


def gptq_weight(
    weight: Tensor,
    gram: Tensor,
    hessian: Hessian,
    scheme: WeightScheme,
    inputs: InputScheme | None = None,
    bits: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> QuantizedWeight:
    """Quantize a weight [N, K]; every row by GPTQ or to nearest, whatever gives the smaller error."""
    scale, offset, channel_scale = all_parameters(weight, scheme, inputs, bits)
    nearest = encode_weight(weight, scheme, scale, offset, channel_scale, bits)
    numbers = gptq_numbers(weight, hessian, scheme, step(scale, channel_scale), offset, bits, block_size)
    codes = encode_numbers(numbers, scheme.type, bits)
    rounded = QuantizedWeight(scheme, codes, scale, offset, channel_scale)
    better = weight_error(rounded, weight, gram) < weight_error(nearest, weight, gram)
    codes = torch.where(better.unsqueeze(1), codes, nearest.codes)
    return QuantizedWeight(scheme, codes, scale, offset, channel_scale)


@algorithm
class GPTQ(Algorithm):
    name = "gptq"

    def needs(self, scheme: Scheme) -> frozenset[str]:
        return frozenset({GRAM}) | input_needs(scheme)

    def solve(self, problem: Problem) -> Solution:
        gram = gram_of(problem)
        scheme, options = problem.scheme, problem.scheme.options
        hessian = None
        if gram is not None:
            hessian = prepare(
                _normalized(gram), options.get("percdamp", PERCDAMP), options.get("act_order", ACT_ORDER)
            )
        if gram is None or hessian is None:
            return round_all(problem)
        block_size = options.get("block_size", BLOCK_SIZE)
        weights = tuple(
            gptq_weight(weight, gram, hessian, scheme.weights, scheme.inputs, block_size=block_size)
            for weight in problem.weights
        )
        return Solution(weights, static_inputs(problem))


def _normalized(gram: Tensor) -> Tensor:
    """Dead columns have 1 in the diagonal of H, so the others' are made 1 in the mean where it matters."""
    alive = gram.diagonal()[gram.diagonal() > 0]
    if alive.numel() in (0, gram.size(0)):
        return gram
    return gram / alive.mean()


def _by_group(parameter: Tensor) -> Tensor:
    """Scales or offsets [1], [N] or [N, groups] as [groups, 1 or N]."""
    return parameter.t().contiguous() if parameter.dim() == 2 else parameter.unsqueeze(0)
