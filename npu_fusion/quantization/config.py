"""The configuration of the quantizer: AMCT's dict, checked, complete and frozen.

::

    {
        "batch_num": 8,                                   # forward passes for calibration; default 1
        "quant_cfg": {
            "weights": {"type": "int8", "symmetric": True, "strategy": "channel"},
            "inputs": {"type": "int8", "symmetric": True, "strategy": "token"},       # absent: weights only
            "*down_proj.weights": {"strategy": "tensor"},                             # for some layers
            "*o_proj.inputs": {"enable_quant": False},
        },
        "algorithm": {"minmax"},                          # or {"smoothquant": {"smooth_strength": 0.5}}
        "skip_layers": {"lm_head"},
    }

``weights``: ``type`` (required), ``symmetric`` (default True), ``strategy`` (``tensor``, ``channel``,
``group``; default ``channel``, for mx types and 4-bit floats ``group``), ``group_size`` (with ``group`` only;
a multiple of 32, less than the inputs of the layer; 32 for mx types, where it may be left out),
``enable_quant`` (False: layers stay in float).

``inputs``: ``type`` (required), ``symmetric`` (default True), ``strategy`` (``tensor``: one scale, from
calibration; ``token``: one for each token, at run time; ``group``: mx types and only these; default
``tensor``, or ``group`` for mx), ``dynamic`` (only says what ``strategy`` says: True with ``token``, False
with ``tensor``), ``enable_quant`` (False: not quantized).

Keys ``<pattern>.weights`` and ``<pattern>.inputs`` are for the layers whose full name matches the pattern as
in a shell (``*``, ``?``, ``[...]``; upper and lower case differ). What such a dict leaves out is taken from
the global ``weights`` or ``inputs``, except that ``group_size`` and ``dynamic`` come with ``strategy``, and
``enable_quant`` is always True unless given. For each layer, **the last key that matches counts**, alone (in
AMCT the first). Without global ``weights``, only matching layers are quantized.

``algorithm``: a name, a set or list of one name, or a dict from a name to its options: minmax, ofmr, mxquant,
cast, quantile, smoothquant (``smooth_strength``, between 0 and 1, default 0.5), awq (``grids_num``, default
20), gptq (``percdamp`` 0.01, ``block_size`` 128, ``act_order`` True), autoround (``steps`` 200, ``lr`` None),
or one that is registered by ``algorithm_register``. The larger ``smooth_strength``, the more of the
difficulty moves from activations to weights, so activations with *larger* outliers want *more* of it (AMCT's
documentation says the opposite of the paper, arXiv:2211.10438). Weights in mx types need no algorithm:
mxquant is their default. Two algorithms are accepted only for different classes of layers.

``skip_layers``: a pattern, or a set, list or tuple of them. A pattern with ``*``, ``?`` or ``[`` is matched
against the whole name, any other is searched for in it. So ``"1"`` skips ``layers.1``, and ``layers.10`` and
``fc1`` too; write ``"*layers.1.*"`` for the first.

What goes together is in ``_combinations.py``. Source: AMCT's documentation of quantize.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from npu_fusion.quantization._check import Origin, check
from npu_fusion.quantization._combinations import algorithms_for
from npu_fusion.quantization._options import Chosen, read_algorithms
from npu_fusion.quantization._quant_cfg import Override, read_quant_cfg
from npu_fusion.quantization._values import integer, keyed, listed, plain, refusal
from npu_fusion.quantization.presets import DEFAULT, PRESETS, preset
from npu_fusion.quantization.scheme import MX_TYPES, InputScheme, Scheme, WeightScheme

_KEYS = ("batch_num", "quant_cfg", "algorithm", "skip_layers")
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class QuantizationConfig:
    """A configuration without errors. Made by :func:`parse`."""

    batch_num: int
    weights: WeightScheme | None
    """None: only layers that an override gives weights are quantized."""
    inputs: InputScheme | None
    overrides: tuple[Override, ...]
    """In the order in which they were given."""
    algorithms: tuple[Chosen, ...]
    skip_layers: tuple[str, ...]

    def algorithm_for(self, layer_class: str) -> Chosen | None:
        """The algorithm for layers whose class has that name (``"Linear"``)."""
        return next((chosen for chosen in self.algorithms if layer_class in chosen.layers), None)

    def excludes(self, layer_name: str) -> bool:
        """Whether this leaves the layer in float: by ``skip_layers``, or because it gives it no weights."""
        if any(skips(pattern, layer_name) for pattern in self.skip_layers):
            return True
        weights, _ = self._weights_for(layer_name)
        return weights is None

    def scheme_for(self, layer_name: str, layer_class: str = "Linear") -> Scheme | None:
        """What is asked of a layer; None if :meth:`excludes` has it or no algorithm is for its class.

        Args:
            layer_name: its full name in the model.
            layer_class: name of its class.

        Raises:
            ValueError: overrides that were fine alone give this layer a combination that does not exist.
        """
        algorithm = self.algorithm_for(layer_class)
        if algorithm is None or self.excludes(layer_name):
            return None
        weights, weights_path = self._weights_for(layer_name)
        inputs, inputs_path = self._inputs_for(layer_name)
        assert weights is not None
        if algorithm.built_in:
            check(weights, inputs, algorithm.name, Origin(weights_path, inputs_path, layer_name))
        return Scheme(weights, inputs, algorithm.name, dict(algorithm.options))

    def for_layer(self, layer_name: str, layer_class: str = "Linear") -> dict[str, Any]:
        """What is asked of a layer, in the dict that AMCT hands to the ``quant_op`` of a user's algorithm.

        Keys: ``batch_num``, ``weights_cfg``, ``inputs_cfg`` (with ``quant_type`` for the type; inputs that
        are not quantized: ``{"enable_quant": False}``), ``kvcache_cfg`` and ``algorithm``.

        Raises:
            ValueError: the layer is not quantized, or see :meth:`scheme_for`.
        """
        scheme = self.scheme_for(layer_name, layer_class)
        if scheme is None:
            raise ValueError(
                f"quantize: layer {layer_name!r} of class {layer_class} is left in float by the configuration"
            )
        weights_cfg = _renamed(_weights_dict(scheme.weights))
        inputs_cfg: dict[str, Any] = {"enable_quant": False}
        if scheme.inputs is not None:
            dynamic = True if scheme.inputs.strategy == "token" else None
            inputs_cfg = {**_renamed(_inputs_dict(scheme.inputs)), "dynamic": dynamic}
        return {
            "batch_num": self.batch_num,
            "weights_cfg": weights_cfg,
            "inputs_cfg": inputs_cfg,
            "kvcache_cfg": {"enable_quant": False},
            "algorithm": {scheme.algorithm: dict(scheme.options)},
        }

    def to_dict(self) -> dict[str, Any]:
        """A dict of JSON values, with all defaults, of which :func:`parse` makes the same configuration.

        The order of the overrides has a meaning: do not sort the keys.
        """
        quant_cfg: dict[str, Any] = {}
        if self.weights is not None:
            quant_cfg["weights"] = _weights_dict(self.weights)
        if self.inputs is not None:
            quant_cfg["inputs"] = _inputs_dict(self.inputs)
        for override in self.overrides:
            quant_cfg[override.key] = _part_dict(override.scheme)
        algorithm = {
            chosen.name: {
                name: list(value) if isinstance(value, tuple) else value for name, value in chosen.options
            }
            for chosen in self.algorithms
        }
        return {
            "batch_num": self.batch_num,
            "quant_cfg": quant_cfg,
            "algorithm": algorithm,
            "skip_layers": list(self.skip_layers),
        }

    def cache_key(self) -> str:
        """A hash of the content, the same in every process."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def _weights_for(self, name: str) -> tuple[WeightScheme | None, str]:
        override = self._override(name, "weights")
        if override is None:
            return self.weights, "quant_cfg.weights"
        assert not isinstance(override.scheme, InputScheme)
        return override.scheme, override.path

    def _inputs_for(self, name: str) -> tuple[InputScheme | None, str]:
        override = self._override(name, "inputs")
        if override is None:
            return self.inputs, "quant_cfg.inputs"
        assert not isinstance(override.scheme, WeightScheme)
        return override.scheme, override.path

    def _override(self, name: str, part: str) -> Override | None:
        matching = (o for o in reversed(self.overrides) if o.part == part and o.matches(name))
        return next(matching, None)


def skips(pattern: str, layer_name: str) -> bool:
    """Whether a pattern of ``skip_layers`` is for a layer."""
    if _WILDCARDS.isdisjoint(pattern):
        return pattern in layer_name
    return fnmatchcase(layer_name, pattern)


def parse(
    config: Mapping[str, Any] | QuantizationConfig | str | None = None,
    user_algorithms: Mapping[str, Collection[str]] | None = None,
) -> QuantizationConfig:
    """Check a configuration and fill in its defaults. ``config`` is only read.

    Args:
        config: a dict as above, the name of a preset (in any case, with or without ``_CFG``), None for
            ``INT8_MINMAX_WEIGHT_QUANT_CFG``, or the result of an earlier call.
        user_algorithms: name of an algorithm -> names of the classes of layers that it is for. None: those
            registered by ``algorithm_register``.

    Raises:
        TypeError: a value has a wrong type.
        ValueError: a key is unknown or missing, a value is not accepted, or values do not go together. The
            message names the key, what was given and what is accepted.
    """
    if isinstance(config, QuantizationConfig):
        return config
    if config is None:
        config = PRESETS[DEFAULT]
    elif isinstance(config, str):
        config = preset(config)
    elif not isinstance(config, Mapping):
        raise TypeError(refusal("config", config, "a dict, the name of a preset, or None"))
    fields = keyed("", config, _KEYS)
    batch_num = integer("batch_num", fields.get("batch_num", 1))
    skip_layers = _skip_layers(fields.get("skip_layers"))
    if "quant_cfg" not in fields:
        raise ValueError("quantize: quant_cfg is missing; accepted: a dict with the key 'weights'")
    weights, inputs, overrides = read_quant_cfg(fields["quant_cfg"])
    algorithms = read_algorithms(fields.get("algorithm"), user_algorithms)
    if not algorithms:
        algorithms = _default_algorithm(weights, inputs, overrides)
    parsed = QuantizationConfig(batch_num, weights, inputs, overrides, algorithms, skip_layers)
    _check_combinations(parsed)
    return parsed


def _skip_layers(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    accepted = "a string, or a set, list or tuple of strings, none of them empty"
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (set, frozenset, list, tuple)):
        raise TypeError(refusal("skip_layers", value, accepted))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(refusal("skip_layers", value, accepted))
        if not pattern:
            raise ValueError(refusal("skip_layers", value, f"{accepted} ('' is in every name)"))
    return tuple(sorted({plain(pattern) for pattern in patterns}))


def _weight_candidates(
    weights: WeightScheme | None, overrides: tuple[Override, ...]
) -> list[tuple[WeightScheme, str]]:
    own = [(weights, "quant_cfg.weights")] if weights is not None else []
    return own + [(o.scheme, o.path) for o in overrides if isinstance(o.scheme, WeightScheme)]


def _default_algorithm(
    weights: WeightScheme | None, inputs: InputScheme | None, overrides: tuple[Override, ...]
) -> tuple[Chosen, ...]:
    """mxquant if nothing but mx types is asked for, as AMCT's tables have them without an algorithm."""
    candidates = _weight_candidates(weights, overrides)
    for scheme, path in candidates:
        if scheme.type not in MX_TYPES:
            names = algorithms_for(scheme, inputs) or algorithms_for(scheme, None)
            raise ValueError(
                f"quantize: algorithm is empty, and {path}.type is {scheme.type!r}; "
                f"accepted: {listed(names)} (only mx types need no algorithm)"
            )
    return read_algorithms("mxquant", {})


def _check_combinations(config: QuantizationConfig) -> None:
    """Refuse what no layer could have. Which overrides meet in a layer is known to ``scheme_for`` only."""
    algorithm = config.algorithm_for("Linear")
    if algorithm is None or not algorithm.built_in:
        return
    if config.weights is not None:
        check(config.weights, config.inputs, algorithm.name, Origin("quant_cfg.weights", "quant_cfg.inputs"))
    weights = _weight_candidates(config.weights, config.overrides)
    inputs: list[tuple[InputScheme | None, str]] = [(config.inputs, "quant_cfg.inputs")]
    for override in config.overrides:
        if override.part == "inputs":
            assert not isinstance(override.scheme, WeightScheme)
            inputs.append((override.scheme, override.path))
    for own_weights, weights_path in weights:
        _check_any([(own_weights, i, Origin(weights_path, path)) for i, path in inputs], algorithm.name)
    for own_inputs, inputs_path in inputs[1:]:
        _check_any([(w, own_inputs, Origin(path, inputs_path)) for w, path in weights], algorithm.name)


def _check_any(pairs: list[tuple[WeightScheme, InputScheme | None, Origin]], algorithm: str) -> None:
    """Raise the error of the first pair, unless one of the pairs has none."""
    first: ValueError | None = None
    for weights, inputs, origin in pairs:
        try:
            check(weights, inputs, algorithm, origin)
            return
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _weights_dict(scheme: WeightScheme) -> dict[str, Any]:
    fields = {"type": scheme.type, "symmetric": scheme.symmetric, "strategy": scheme.strategy}
    return fields if scheme.group_size is None else {**fields, "group_size": scheme.group_size}


def _inputs_dict(scheme: InputScheme) -> dict[str, Any]:
    return {"type": scheme.type, "symmetric": scheme.symmetric, "strategy": scheme.strategy}


def _part_dict(scheme: WeightScheme | InputScheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"enable_quant": False}
    return _weights_dict(scheme) if isinstance(scheme, WeightScheme) else _inputs_dict(scheme)


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {"quant_type" if key == "type" else key: value for key, value in fields.items()}
