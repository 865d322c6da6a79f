"""The algorithms by name, with their options, and how ``algorithm`` of a configuration is read.

Names and defaults: AMCT's documentation of quantize (awq, gptq, minmax, smoothquant), AMCT's code (ofmr,
mxquant, cast, quantile), and the papers for the rest: GPTQ (arXiv:2210.17323, damping of 1 % and blocks of
128 columns) and SignRound (arXiv:2309.05516, 200 steps; a learning rate of None is one over the number of
steps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from npu_fusion.quantization._combinations import layers_of
from npu_fusion.quantization._values import (
    boolean,
    fraction,
    integer,
    join,
    keyed,
    listed,
    plain,
    refusal,
    strings_as_keys,
    suggestion,
)


@dataclass(frozen=True)
class Option:
    default: Any
    read: Callable[[str, Any], Any]
    """(path of the key, given value) -> the value, or an error."""


def _open_fraction(path: str, value: Any) -> float:
    return fraction(path, value, closed=False)


def _fraction_or_none(path: str, value: Any) -> float | None:
    return None if value is None else fraction(path, value, otherwise=", or None")


OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "minmax": {},
    "smoothquant": {"smooth_strength": Option(0.5, _open_fraction)},
    "awq": {"grids_num": Option(20, integer)},
    "gptq": {
        "percdamp": Option(0.01, fraction),
        "block_size": Option(128, integer),
        "act_order": Option(True, boolean),
    },
    "ofmr": {},
    "mxquant": {},
    "autoround": {"steps": Option(200, integer), "lr": Option(None, _fraction_or_none)},
    "cast": {},
    "quantile": {},
}
"""Built-in algorithm -> its options."""


@dataclass(frozen=True)
class Chosen:
    """An algorithm of a configuration."""

    name: str
    options: tuple[tuple[str, Any], ...]
    """(name, value), all of them, sorted by name."""
    layers: tuple[str, ...]
    """Names of the classes of layers that it is for."""

    @property
    def built_in(self) -> bool:
        return self.name in OPTIONS


def read_algorithms(value: Any, user_algorithms: Mapping[str, Collection[str]] | None) -> tuple[Chosen, ...]:
    """The algorithms in ``value``, sorted by name; none if it is empty or None.

    ``user_algorithms`` maps names to the classes of layers that they are for; None: those registered by
    ``algorithm_register``.
    """
    chosen = sorted(
        (_choose(name, options, user_algorithms) for name, options in _names(value)),
        key=lambda algorithm: algorithm.name,
    )
    taken: dict[str, str] = {}
    for algorithm in chosen:
        for layer in algorithm.layers:
            if layer in taken:
                raise ValueError(
                    f"quantize: algorithm has {taken[layer]!r} and {algorithm.name!r}, both for {layer}; "
                    f"accepted: one for each class of layers"
                )
            taken[layer] = algorithm.name
    return tuple(chosen)


def _names(value: Any) -> list[tuple[str, Any]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [(plain(value), None)] if value else []
    if isinstance(value, Mapping):
        return list(strings_as_keys("algorithm", value).items())
    accepted = "a name, a set or list of one name, or a dict from a name to its options"
    if not isinstance(value, (set, frozenset, list, tuple)):
        raise TypeError(refusal("algorithm", value, accepted))
    for name in value:
        if not isinstance(name, str):
            raise TypeError(refusal("algorithm", value, accepted))
    return [(plain(name), None) for name in value]


def _choose(name: str, options: Any, user_algorithms: Mapping[str, Collection[str]] | None) -> Chosen:
    path = join("algorithm", name)
    if name in OPTIONS:
        accepted = OPTIONS[name]
        given = {} if options is None else keyed(path, options, tuple(accepted))
        values = {
            key: option.read(join(path, key), given[key]) if key in given else option.default
            for key, option in accepted.items()
        }
        return Chosen(name, tuple(sorted(values.items())), layers_of(name))
    if user_algorithms is None:
        # Imported here, because it imports the algorithms, which are below this.
        from npu_fusion.quantization.user_algorithms import USER_ALGORITHMS

        user_algorithms = USER_ALGORITHMS
    if name not in user_algorithms:
        names = (*OPTIONS, *sorted(user_algorithms))
        raise ValueError(
            refusal("algorithm", name, f"{listed(names)}, or a name registered by algorithm_register")
            + suggestion(name, names)
        )
    fields = {} if options is None else strings_as_keys(path, options)
    values = {key: _plain_data(join(path, key), fields[key]) for key in fields}
    return Chosen(name, tuple(sorted(values.items())), tuple(sorted(user_algorithms[name])))


def _plain_data(path: str, value: Any) -> Any:
    """An option of a user's algorithm: it has to be hashed, compared and stored as JSON."""
    if isinstance(value, (list, tuple)):
        return tuple(_scalar(path, element) for element in value)
    return _scalar(path, value)


def _scalar(path: str, value: Any) -> Any:
    accepted = "None, a bool, an int, a finite float, a string, or a list of these"
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(refusal(path, value, accepted))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(refusal(path, value, accepted))
    return plain(value) if isinstance(value, str) else value
