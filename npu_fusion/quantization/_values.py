"""Reading one value of a configuration: typed, with one error that names its key.

Every message has the form ``quantize: <path of the key> is <what was given>; accepted: <what is>``; a value
of a wrong type is a ``TypeError``, a wrong value a ``ValueError``.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

UINT32_MAX = 2**32 - 1

_ALIASES = {
    "fp8": "float8_e4m3fn",
    "float8": "float8_e4m3fn",
    "hif8": "hifloat8",
    "hifp8": "hifloat8",
    "mxfp8": "mxfp8_e4m3fn",
    "mxfp4": "mxfp4_e2m1",
    "fp4": "float4_e2m1",
    "float4": "float4_e2m1",
    "per_tensor": "tensor",
    "per_channel": "channel",
    "per_token": "token",
    "per_group": "group",
    "block": "group",
    "rtn": "minmax",
    "signround": "autoround",
    "activations": "inputs",
}
"""Other names for what is accepted, for suggestions only."""
_LONGEST_NAME = 60


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print very long integers, with an error that names no key.
        return repr(x) if x.bit_length() <= 128 else f"<integer of {x.bit_length()} bits>"


shown = _Short().repr
"""The value as text, shortened."""


def join(path: str, key: str) -> str:
    """``path.key``, or ``path['key']`` where the key is no plain word; the outermost path is empty."""
    if not key.isidentifier() or len(key) > _LONGEST_NAME:
        return f"{path or 'config'}[{shown(key)}]"
    return f"{path}.{key}" if path else key


def refusal(path: str, value: Any, accepted: str, hint: str = "", where: str = "") -> str:
    return f"quantize: {path} is {shown(value)}{where and ' '}{where}; accepted: {accepted}{hint}"


def listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def suggestion(name: str, accepted: Sequence[str]) -> str:
    """``" (did you mean 'int8'?)"``, or nothing if no accepted name is near."""
    if len(name) > _LONGEST_NAME:
        return ""
    word = name.lower().replace("-", "_").replace(" ", "_")
    alias = _ALIASES.get(word)
    spelled = {candidate.lower(): candidate for candidate in accepted}
    near = [alias] if alias in spelled else difflib.get_close_matches(word, spelled, n=1)
    return f" (did you mean {spelled[near[0]]!r}?)" if near else ""


def plain(text: str) -> str:
    """The same characters as a ``str`` proper, of an enum member that is a string, say."""
    return str.__str__(text)


def keyed(path: str, value: Any, accepted: Sequence[str]) -> dict[str, Any]:
    """A dict whose keys are all in ``accepted``. ``path`` is empty for the configuration itself."""
    fields = strings_as_keys(path, value)
    for key in fields:
        if key not in accepted:
            hint = suggestion(key, accepted)
            raise ValueError(
                f"quantize: {join(path, key)} is an unknown key; accepted: {listed(accepted)}{hint}"
            )
    return fields


def strings_as_keys(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(refusal(path or "config", value, "a dict"))
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"quantize: {path or 'config'} has the key {shown(key)}; accepted: strings")
    return {plain(key): value[key] for key in value}


def one_of(path: str, value: Any, accepted: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(refusal(path, value, listed(accepted)))
    if value not in accepted:
        raise ValueError(refusal(path, value, listed(accepted), suggestion(value, accepted)))
    return plain(value)


def boolean(path: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(refusal(path, value, "True, False"))
    return value


def integer(path: str, value: Any, low: int = 1, multiple: int = 1) -> int:
    """An integer from ``low`` that is a multiple of ``multiple`` and fits uint32; True is none."""
    accepted = f"an integer from {low} to {UINT32_MAX}" + (
        f" in multiples of {multiple}" if multiple > 1 else ""
    )
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(refusal(path, value, accepted))
    number = int(value)
    if not low <= number <= UINT32_MAX or number % multiple:
        raise ValueError(refusal(path, value, accepted))
    return number


def fraction(path: str, value: Any, closed: bool = True, otherwise: str = "") -> float:
    """A number above 0 and at most 1 (below 1 if not ``closed``). ``otherwise`` ends the error's text."""
    accepted = f"a number greater than 0 and {'at most' if closed else 'less than'} 1{otherwise}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(refusal(path, value, accepted))
    # Compared as it is given: an integer may be too large for a float.
    number: Any = value
    if not 0 < number <= 1 or (number == 1 and not closed) or float(number) == 0:
        raise ValueError(refusal(path, value, accepted))
    return float(number)
