"""Configurations by name: AMCT's, and those with which models fuse best.

A preset is a read-only dict, so that no change to one reaches the next model. ``copy()`` and
``copy.deepcopy`` give an ordinary dict of ordinary dicts and sets, to be changed at will::

    config = INT8_SMOOTHQUANT_CFG.copy()
    config["skip_layers"].add("router")

Values of AMCT's presets: its ``common/config/config.py``. Its HIFP8_KVCACHE_CFG is not here: KV caches are
not quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from npu_fusion.quantization._values import listed, refusal, suggestion


class Preset(dict[str, Any]):
    """A dict that cannot be changed; its copies can."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a preset cannot be changed; change a copy, made by its method copy()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def copy(self) -> dict[str, Any]:
        """A deep copy, which can be changed."""
        return {key: _thawed(value) for key, value in self.items()}

    def __copy__(self) -> dict[str, Any]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self.copy()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (self.copy(),)


def _thawed(value: Any) -> Any:
    if isinstance(value, Preset):
        return value.copy()
    return set(value) if isinstance(value, frozenset) else value


_HEAD = frozenset({"lm_head"})


def _preset(
    weights: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    algorithm: str,
    skip_layers: frozenset[str] | None = _HEAD,
    **options: Any,
) -> Preset:
    quant_cfg = {"weights": Preset(weights)}
    if inputs is not None:
        quant_cfg["inputs"] = Preset(inputs)
    chosen = Preset({algorithm: Preset(options)}) if options else frozenset({algorithm})
    preset = {"batch_num": 1, "quant_cfg": Preset(quant_cfg), "algorithm": chosen}
    if skip_layers is not None:
        preset["skip_layers"] = skip_layers
    return Preset(preset)


def _per(kind: str, strategy: str, group_size: int | None = None) -> Mapping[str, Any]:
    fields = {"type": kind, "symmetric": True, "strategy": strategy}
    return fields if group_size is None else {**fields, "group_size": group_size}


INT4_AWQ_WEIGHT_QUANT_CFG = _preset(_per("int4", "channel"), None, "awq", grids_num=20)
INT4_GPTQ_WEIGHT_QUANT_CFG = _preset(_per("int4", "channel"), None, "gptq")
INT8_SMOOTHQUANT_CFG = _preset(
    _per("int8", "channel"), _per("int8", "tensor"), "smoothquant", smooth_strength=0.5
)
INT8_MINMAX_WEIGHT_QUANT_CFG = _preset(_per("int8", "channel"), None, "minmax")
HIFP8_OFMR_CFG = _preset(_per("hifloat8", "tensor"), _per("hifloat8", "tensor"), "ofmr", None)
FP8_OFMR_CFG = _preset(_per("float8_e4m3fn", "tensor"), _per("float8_e4m3fn", "tensor"), "ofmr")
MXFP8_QUANT_CFG = _preset(_per("mxfp8_e4m3fn", "group", 32), _per("mxfp8_e4m3fn", "group"), "mxquant")
MXFP4_AWQ_WEIGHT_QUANT_CFG = _preset(_per("mxfp4_e2m1", "group", 32), None, "awq", grids_num=20)
HIFP8_CAST_CFG = _preset(_per("hifloat8", "channel"), _per("hifloat8", "tensor"), "cast")
HIFP8_QUANTILE_CFG = _preset(_per("hifloat8", "tensor"), _per("hifloat8", "tensor"), "quantile")
HIFP8_SMOOTHQUANT_CFG = _preset(
    _per("hifloat8", "channel"), _per("hifloat8", "tensor"), "smoothquant", smooth_strength=0.5
)

W8A8_DYNAMIC_CFG = _preset(_per("int8", "channel"), _per("int8", "token"), "minmax")
"""int8 with one scale for each token at run time: has the most fusions, and needs no calibration."""
W8A8_DYNAMIC_SMOOTHQUANT_CFG = _preset(
    _per("int8", "channel"), _per("int8", "token"), "smoothquant", smooth_strength=0.5
)
"""The same for models with outliers in their activations, which is most large language models."""
W4A16_AUTOROUND_CFG = _preset(_per("int4", "group", 128), None, "autoround", steps=200)
"""The smallest weights, for decoding bound by memory; layers with at most 128 inputs stay in float."""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {name: value for name, value in list(globals().items()) if isinstance(value, Preset)}
)
"""Name -> configuration."""
DEFAULT = "INT8_MINMAX_WEIGHT_QUANT_CFG"


def preset(name: str) -> Preset:
    """The preset of that name, in any case, with or without ``_CFG``; ``ValueError`` for an unknown name."""
    word = name.strip().upper()
    for candidate in (word, f"{word}_CFG"):
        if candidate in PRESETS:
            return PRESETS[candidate]
    hint = suggestion(word, tuple(PRESETS)) or suggestion(f"{word}_CFG", tuple(PRESETS))
    raise ValueError(refusal("config", name, listed(tuple(PRESETS)), hint))
