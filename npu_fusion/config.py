"""What to fuse, how strictly, and what to show: one frozen object, from code, a dict or the environment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from npu_fusion._releases import TARGETS
from npu_fusion._version import fingerprint

ENV_PREFIX = "NPU_FUSION_"
_OTHER_VARIABLES = ("NPU_FUSION_OFFLINE", "NPU_FUSION_CACHE")
"""Not fields: read by :mod:`npu_fusion.hosts.offline`."""


class Numerics(IntEnum):
    """How far a fused result may be from the source expression evaluated in its own dtypes.

    ``STRICT``: bit-identical (against the reference kernels), or not fused. ``ACCURATE``: roundings to a
    narrower dtype inside the fused region and guards such as ``clamp_min(eps)`` under an amax may go, and
    float32 factors may be multiplied in another order, where the result is at least as close to the exact
    value. ``RELAXED``: also reassociation that can lose accuracy.
    """

    STRICT = 0
    ACCURATE = 1
    RELAXED = 2


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Configuration of the fusion pipeline.

    One flag per fusion (all on by default), then:

    ``numerics``: ``"strict"``, ``"accurate"`` (default) or ``"relaxed"``, see :class:`Numerics`.
    ``strict``: a failing pass raises instead of warning and leaving the graph as it was.
    ``expect``: operator name -> count that every compiled graph must reach, e.g.
    ``{"npu_dequant_swiglu_quant": 61}``; raises :class:`npu_fusion.FusionExpectationError` otherwise.
    ``dry_run``: find and report, change nothing.
    ``verify``: run every rewritten region and its replacement on random inputs and raise on a mismatch.
    ``dump_dir``: where each graph leaves its FX code after every stage, ``report.json`` and ``report.html``.
    ``target``: the SoC whose hardware limits apply (``"ascend910b"``, ``"ascend910_93"``, ``"ascend950"``),
    with the operators of the latest torch_npu, or behind a dash those of ``-7.0``, ``-7.1``, ``-7.2``,
    ``-7.3``, ``-26.0`` or ``-26.1`` (Ascend 950 since 26.0). None: no limits, as on the CPU.
    ``cache_layout``: ``"model"`` (default) keeps what the model stores in its caches; ``"npu"`` lets
    ``mla_prolog`` store a rotated key that the model has in adjacent pairs as halves, as the operator does:
    every reader and writer of that cache must then be compiled so, and query and key be used together only.
    ``symbolic``: what to do when symbolic sizes leave a condition undecided: ``"refuse"`` or ``"guard"``.
    ``int32_bytes_per_token``: most bytes of int32 product per token that a fusion may newly create where
    the source rounded to 16 bits at once (None: no limit).
    ``int32_product_bytes``: the same for the whole product, with the largest number of tokens that the
    symbolic shapes allow (None: no limit).
    """

    rms_norm: bool = True
    add_rms_norm: bool = True
    add_rms_norm_quant: bool = True
    add_rms_norm_dynamic_quant: bool = True
    swiglu: bool = True
    swiglu_quant: bool = True
    dynamic_quant: bool = True
    quantize: bool = True
    quant_matmul: bool = True
    rotary_mul: bool = True
    interleave_rope: bool = True
    dequant_swiglu_quant: bool = True
    mla_prolog: bool = True
    mla_absorb: bool = True
    kv_rmsnorm_rope_cache: bool = True

    numerics: str = "accurate"
    strict: bool = False
    expect: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
    dry_run: bool = False
    verify: bool = False
    dump_dir: str | None = None
    target: str | None = None
    cache_layout: str = "model"
    symbolic: str = "refuse"
    int32_bytes_per_token: int | None = None
    int32_product_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool":
                _require(isinstance(value, bool), field.name, value, "True or False")
            elif field.type == "int | None":
                ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
                _require(ok, field.name, value, "a number of bytes >= 0, or None")
        _require_choice("numerics", self.numerics, tuple(n.name.lower() for n in Numerics))
        _require_choice("symbolic", self.symbolic, ("refuse", "guard"))
        _require_choice("cache_layout", self.cache_layout, ("model", "npu"))
        _require_choice("target", self.target, (None, *TARGETS))
        if isinstance(self.dump_dir, Path):
            object.__setattr__(self, "dump_dir", str(self.dump_dir))
        _require(
            self.dump_dir is None or isinstance(self.dump_dir, str),
            "dump_dir",
            self.dump_dir,
            "a path, or None",
        )
        if self.expect is not None:
            _require(
                isinstance(self.expect, Mapping),
                "expect",
                self.expect,
                "a dict operator name -> count, or None",
            )
            for name, count in self.expect.items():
                good = (
                    isinstance(name, str)
                    and isinstance(count, int)
                    and not isinstance(count, bool)
                    and count >= 0
                )
                _require(good, f"expect[{name!r}]", count, "operator name -> count >= 0")
            object.__setattr__(self, "expect", dict(self.expect))

    @property
    def level(self) -> Numerics:
        return Numerics[self.numerics.upper()]

    def enabled(self, fusion: str) -> bool:
        return bool(getattr(self, fusion))

    def replace(self, **changes: Any) -> FusionConfig:
        """A copy with some fields changed; unknown names are refused."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def cache_key(self) -> str:
        """Stable over processes: hash of the package's code, of the torch_npu at hand, whose operators are
        then the ones in a graph, and of every field that changes a graph."""
        content = dataclasses.asdict(self)
        content["torch_npu"] = getattr(sys.modules.get("torch_npu"), "__version__", None)
        for only_shows in ("dump_dir", "expect"):
            content.pop(only_shows)
        text = json.dumps([fingerprint(), content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def make(cls, value: FusionConfig | Mapping[str, Any] | None = None) -> FusionConfig:
        """From a config, a dictionary or None; ``NPU_FUSION_*`` environment variables override either.

        ``NPU_FUSION_DEQUANT_SWIGLU_QUANT=0`` switches one fusion off in a deployment without touching code.
        """
        if value is None:
            config = cls()
        elif isinstance(value, FusionConfig):
            config = value
        elif isinstance(value, Mapping):
            _refuse_unknown(value)
            config = cls(**value)
        else:
            raise TypeError(
                f"fusion_config is a {type(value).__name__}; "
                "accepted: FusionConfig, a dict of its fields, or None"
            )
        overrides = _from_environment()
        return dataclasses.replace(config, **overrides) if overrides else config


def fusion_flags() -> tuple[str, ...]:
    """Names of the per-fusion flags."""
    return tuple(f.name for f in dataclasses.fields(FusionConfig) if f.type == "bool" and f.default is True)


def _require(ok: bool, name: str, given: Any, accepted: str) -> None:
    if not ok:
        kind = TypeError if not isinstance(given, (int, str)) or isinstance(given, bool) else ValueError
        raise kind(f"FusionConfig.{name} is {given!r}; accepted: {accepted}")


def _require_choice(name: str, given: Any, accepted: tuple[Any, ...]) -> None:
    if given not in accepted:
        options = ", ".join(repr(a) for a in accepted)
        raise ValueError(f"FusionConfig.{name} is {given!r}; accepted: {options}")


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(FusionConfig)]
    for name in given:
        if name not in known:
            raise ValueError(f"FusionConfig has no key {name!r}; accepted: {', '.join(known)}")


def _from_environment() -> dict[str, Any]:
    """Fields set by ``NPU_FUSION_<FIELD>``; booleans as 0/1/true/false, ``expect`` as JSON."""
    fields = {f.name: f for f in dataclasses.fields(FusionConfig)}
    found: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in fields:
            accepted = ", ".join(ENV_PREFIX + f.upper() for f in fields)
            raise ValueError(f"environment variable {variable} is not known; accepted: {accepted}")
        found[name] = _parse(variable, text, str(fields[name].type))
    return found


def _parse(variable: str, text: str, kind: str) -> Any:
    if kind == "bool":
        value = {"0": False, "false": False, "1": True, "true": True}.get(text.strip().lower())
        if value is None:
            raise ValueError(f"environment variable {variable} is {text!r}; accepted: 0, 1, false, true")
        return value
    if text == "" and kind.endswith("None"):
        return None
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError:
            raise ValueError(
                f"environment variable {variable} is {text!r}; accepted: a whole number"
            ) from None
    if kind.startswith("Mapping"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"environment variable {variable} is {text!r}; accepted: JSON ({error})"
            ) from None
    return text
