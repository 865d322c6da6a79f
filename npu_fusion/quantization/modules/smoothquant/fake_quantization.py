"""Fake quantization by the largest magnitude, under the names of SmoothQuant's code.

::

    y = round(x / scale) * scale        scale = max|x| / (2^(bits-1) - 1)

Each function returns a new tensor of the shape and dtype of its argument, which is never written to (the
original divides in place, also the residual stream of a model). All arithmetic is fp32 with one rounding at
the end (:mod:`._absmax`); a row of zeros stays zero. No gradient flows through them.

Source: SmoothQuant (arXiv:2211.10438), section 2 and its code.
"""

from __future__ import annotations

from torch import Tensor

from npu_fusion.quantization.modules.smoothquant._absmax import absmax_codes
from npu_fusion.quantization.modules.smoothquant._checks import check_float

_FEWEST_BITS, _MOST_BITS = 2, 16


def quantize_weight_per_channel_absmax(w: Tensor, n_bits: int = 8) -> Tensor:
    """Quantize and dequantize each output channel of a weight [..., N, K] with a scale of its own.

    Args:
        w: float16, bfloat16 or float32; an output channel is a row, as in ``torch.nn.Linear``. (One scale for
            each column could not be taken out of a matrix product.)
        n_bits: 2 to 16.

    Raises:
        TypeError: ``n_bits`` is no integer.
        ValueError: another dtype or number of bits, or less than two dimensions.
    """
    return _fake("quantize_weight_per_channel_absmax", "w", w, True, n_bits, 2)


def quantize_weight_per_tensor_absmax(w: Tensor, n_bits: int = 8) -> Tensor:
    """Quantize and dequantize a weight [..., N, K] with one scale.

    Arguments and errors are those of :func:`quantize_weight_per_channel_absmax`.
    """
    return _fake("quantize_weight_per_tensor_absmax", "w", w, False, n_bits, 2)


def quantize_activation_per_token_absmax(t: Tensor, n_bits: int = 8) -> Tensor:
    """Quantize and dequantize each token of activations [..., K] with a scale of its own.

    Args:
        t: float16, bfloat16 or float32, one or more dimensions, any strides; no tokens are fine.
        n_bits: 2 to 16.

    Raises:
        TypeError: ``n_bits`` is no integer.
        ValueError: another dtype or number of bits, or a single number.
    """
    return _fake("quantize_activation_per_token_absmax", "t", t, True, n_bits, 1)


def quantize_activation_per_tensor_absmax(t: Tensor, n_bits: int = 8) -> Tensor:
    """Quantize and dequantize activations [..., K] with one scale, that of the largest of all values.

    Arguments and errors are those of :func:`quantize_activation_per_token_absmax`.
    """
    return _fake("quantize_activation_per_tensor_absmax", "t", t, False, n_bits, 1)


def _fake(who: str, name: str, x: Tensor, by_row: bool, n_bits: int, least_rank: int) -> Tensor:
    check_float(who, name, x)
    if x.dim() < least_rank:
        raise ValueError(
            f"{who}: {name} has shape {list(x.shape)}; accepted: {least_rank} or more dimensions"
        )
    if isinstance(n_bits, bool) or not isinstance(n_bits, int):
        raise TypeError(f"{who}: n_bits must be an int, got {type(n_bits).__name__}")
    if not _FEWEST_BITS <= n_bits <= _MOST_BITS:
        raise ValueError(f"{who}: n_bits is {n_bits}; accepted: {_FEWEST_BITS} to {_MOST_BITS}")
    codes, scale = absmax_codes(x, by_row, n_bits)
    return (codes * scale).to(x.dtype)
