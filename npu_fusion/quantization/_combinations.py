"""Which types, granularities and algorithms go together, and in which layers: one table.

Validation, error texts, the rules for single layers and the documentation all read :data:`TABLE`.

Sources: the two tables of AMCT's documentation of quantize. Where these disagree with AMCT's code or with
themselves:

* Weights in hifloat8 or float8_e4m3fn alone: the documentation has minmax and gptq, the code ofmr, gptq, cast
  and
  quantile. All are accepted.
* mxfp8_e4m3fn inputs with mxfp4_e2m1 weights: in the documentation only. Accepted.
* Alignment of int8 and int4 weights alone: the documentation's (32 and 64), which the code does not check.
  That of
  mxfp4_e2m1 and 4-bit floats alone: the code's (64), which the documentation does not have.
* Sizes up to 65535 for weights alone: aclnnWeightQuantBatchMatmulV2 on Atlas A2 and A3.
* An int32 sum of int8 products is exact for K up to 131071, which is (2**31 - 1) // (128 * 128).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npu_fusion.quantization.scheme import InputScheme, WeightScheme


@dataclass(frozen=True)
class Limit:
    """A demand on one layer."""

    text: str
    """What is accepted."""
    holds: Callable[[nn.Module], bool]
    given: Callable[[nn.Module], str]
    """What the layer has, as a sentence."""


@dataclass(frozen=True)
class Combination:
    """A row of :data:`TABLE`. No two rows share layer, types and ``input_strategy``."""

    inputs: str | None
    weights: str
    input_strategy: str | None
    weight_strategies: tuple[str, ...]
    algorithms: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    """Of the model."""
    limits: tuple[Limit, ...] = ()
    asymmetric: str | None = None
    """What may also be asymmetric: ``weights``, ``inputs``, or None."""
    layer: str = "Linear"


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """K (inputs) and N (outputs)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.size(1), weight.size(0)


def _shown_sizes(layer: nn.Module) -> str:
    k, n = _sizes(layer)
    return f"K is {k} and N is {n}"


def _shown_k(layer: nn.Module) -> str:
    return f"K is {_sizes(layer)[0]}"


def _multiples(of_k: int, of_n: int = 1) -> Limit:
    def holds(layer: nn.Module) -> bool:
        k, n = _sizes(layer)
        return k % of_k == 0 and n % of_n == 0

    if of_n == 1:
        return Limit(f"K in multiples of {of_k}", holds, _shown_k)
    if of_n == of_k:
        return Limit(f"K and N in multiples of {of_k}", holds, _shown_sizes)
    return Limit(f"K in multiples of {of_k}, N in multiples of {of_n}", holds, _shown_sizes)


_16_BITS = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BFLOAT16 = (torch.bfloat16,)

_EVEN_BLOCKS = Limit(
    "an even number of blocks of 32 along K",
    lambda layer: -(-_sizes(layer)[0] // 32) % 2 == 0,
    lambda layer: f"K is {_sizes(layer)[0]}, which are {-(-_sizes(layer)[0] // 32)} blocks",
)
_NO_BIAS = Limit("no bias", lambda layer: layer.bias is None, lambda layer: "it has a bias")
_EXACT_SUM = Limit("K up to 131071", lambda layer: _sizes(layer)[0] <= 131071, _shown_k)
_16_BIT_SIZES = Limit("K and N up to 65535", lambda layer: max(_sizes(layer)) <= 65535, _shown_sizes)
_ZEROS = Limit(
    "padding_mode 'zeros'",
    lambda layer: layer.padding_mode == "zeros",
    lambda layer: f"padding_mode is {layer.padding_mode!r}",
)

_WHOLE_ROWS = ("tensor", "channel")
_GROUP = ("group",)
_ALL = ("tensor", "channel", "group")


def _weight_only(
    weights: str,
    strategies: tuple[str, ...],
    algorithms: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = _16_BITS,
    multiple: int | None = None,
    asymmetric: str | None = None,
) -> Combination:
    limits = (_16_BIT_SIZES,) if multiple is None else (_multiples(multiple, multiple), _16_BIT_SIZES)
    return Combination(None, weights, None, strategies, algorithms, dtypes, limits, asymmetric)


_FLOAT8_ALONE = ("minmax", "gptq", "ofmr", "cast", "quantile")
_ROUNDED = ("minmax", "gptq", "awq", "autoround")

TABLE: tuple[Combination, ...] = (
    Combination(
        "hifloat8", "hifloat8", "tensor", _WHOLE_ROWS, ("ofmr", "cast", "quantile", "smoothquant"), _FLOATS
    ),
    # Not cast: it gives inputs no scale at all.
    Combination("hifloat8", "hifloat8", "token", _WHOLE_ROWS, ("ofmr", "quantile", "smoothquant"), _FLOATS),
    Combination("float8_e4m3fn", "float8_e4m3fn", "tensor", _WHOLE_ROWS, ("ofmr", "smoothquant"), _FLOATS),
    Combination("float8_e4m3fn", "float8_e4m3fn", "token", _WHOLE_ROWS, ("ofmr", "smoothquant"), _FLOATS),
    Combination("mxfp8_e4m3fn", "mxfp8_e4m3fn", "group", _GROUP, ("mxquant",), _BFLOAT16, (_EVEN_BLOCKS,)),
    Combination("mxfp8_e4m3fn", "mxfp4_e2m1", "group", _GROUP, ("mxquant",), _BFLOAT16, (_multiples(64),)),
    Combination(
        "float8_e4m3fn",
        "float4_e2m1",
        "tensor",
        _GROUP,
        ("minmax", "smoothquant"),
        _BFLOAT16,
        (_multiples(64), _NO_BIAS),
    ),
    Combination(
        "int8",
        "int8",
        "tensor",
        _WHOLE_ROWS,
        ("minmax", "smoothquant"),
        _16_BITS,
        (_EXACT_SUM,),
        asymmetric="inputs",
    ),
    Combination(
        "int8",
        "int8",
        "token",
        _WHOLE_ROWS,
        ("minmax", "smoothquant"),
        _16_BITS,
        (_multiples(16, 8), _EXACT_SUM),
    ),
    Combination("hifloat8", "hifloat8", "tensor", _WHOLE_ROWS, ("ofmr",), _FLOATS, (_ZEROS,), layer="Conv2d"),
    Combination(
        "float8_e4m3fn", "float8_e4m3fn", "tensor", _WHOLE_ROWS, ("ofmr",), _FLOATS, (_ZEROS,), layer="Conv2d"
    ),
    _weight_only("hifloat8", _WHOLE_ROWS, _FLOAT8_ALONE),
    _weight_only("float8_e4m3fn", _WHOLE_ROWS, _FLOAT8_ALONE),
    _weight_only("mxfp4_e2m1", _GROUP, (*_ROUNDED, "mxquant"), multiple=64),
    _weight_only("float4_e2m1", _GROUP, _ROUNDED, multiple=64),
    _weight_only("float4_e1m2", _GROUP, _ROUNDED, multiple=64),
    _weight_only("int8", _ALL, _ROUNDED, multiple=32, asymmetric="weights"),
    _weight_only("int4", _ALL, _ROUNDED, _FLOATS, multiple=64, asymmetric="weights"),
)


def rows(layer: str, weights: str, inputs: InputScheme | None) -> list[Combination]:
    """The rows for these types; several of them differ in ``input_strategy``."""
    kind = None if inputs is None else inputs.type
    return [row for row in TABLE if (row.layer, row.weights, row.inputs) == (layer, weights, kind)]


def combination(layer: str, weights: WeightScheme, inputs: InputScheme | None) -> Combination | None:
    """The row for a class of layers, or None if there is none."""
    strategy = None if inputs is None else inputs.strategy
    for row in rows(layer, weights.type, inputs):
        if row.input_strategy == strategy and weights.strategy in row.weight_strategies:
            return row
    return None


def layers_of(algorithm: str) -> tuple[str, ...]:
    """The classes of layers that a built-in algorithm is for."""
    return tuple(dict.fromkeys(row.layer for row in TABLE if algorithm in row.algorithms))


def algorithms_for(weights: WeightScheme, inputs: InputScheme | None) -> tuple[str, ...]:
    """The built-in algorithms for linear layers with these types."""
    found = rows("Linear", weights.type, inputs)
    return tuple(dict.fromkeys(name for row in found for name in row.algorithms))


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def markdown() -> str:
    """The table for the documentation."""
    head = (
        "layer",
        "inputs",
        "per",
        "weights",
        "per",
        "asymmetric too",
        "algorithms",
        "dtype of the model",
        "limits",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in TABLE:
        grouped = row.weight_strategies != _WHOLE_ROWS
        limits = [limit.text for limit in row.limits] + (["group_size < K"] if grouped else [])
        cells = (
            f"`{row.layer}`",
            "not quantized" if row.inputs is None else f"`{row.inputs}`",
            row.input_strategy or "",
            f"`{row.weights}`",
            ", ".join(row.weight_strategies),
            row.asymmetric or "",
            ", ".join(f"`{name}`" for name in row.algorithms),
            dtype_names(row.dtypes),
            "; ".join(limits),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
