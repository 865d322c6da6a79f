"""What a SoC takes with a release of torch_npu; ``FusionConfig.target`` names both.

::

    ascend910b-7.2 ─▶ operators and arguments of torch_npu 7.2 (npu_fusion/_releases.py)
                      limits of the SoC in that release        (Target, MlaLimits)

A name without a release means the latest. Where torch_npu is imported, its own schemas decide besides: what
it does not have is not emitted, whatever the target.

Source: the constraint sections of the torch_npu and CANN operator documentation. Where they contradict each
other the smaller limit stands here. SoC numbers: ``SocVersion`` in ``NpuVariables.h`` of torch_npu 2.13.0.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from npu_fusion import _releases
from npu_fusion._releases import RELEASES, reaches
from npu_fusion.config import FusionConfig
from npu_fusion.meta_impls._registry import NAMESPACE, OPERATORS


@dataclass(frozen=True)
class MlaLimits:
    """Sizes that one version of npu_mla_prolog takes."""

    hidden: tuple[int, ...] = (7168,)
    """He."""
    query_rank: tuple[int, ...] = (1536,)
    """Hcq."""
    heads: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    nope: tuple[int, ...] = (128,)
    """D."""
    block: tuple[int, ...] = (16, 128)
    """Rows of a cache page."""
    max_length: int | None = 16
    """Most tokens per sequence (S)."""
    weight_modes: tuple[int, ...] = (0, 1, 2)
    """Quantized weights: 0 none, 1 those that raise the query, 2 all."""


_PAGES = tuple(range(16, 1025, 16))
_V3 = MlaLimits(hidden=(7168, 7680), block=_PAGES, max_length=None)
_V3_26 = MlaLimits(
    hidden=(1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192),
    query_rank=(1536, 2048),
    nope=(128, 192),
    block=_PAGES,
    max_length=None,
)
_MLA = {
    "npu_mla_prolog": {"7.0": MlaLimits(heads=(32, 64, 128), weight_modes=(0,))},
    "npu_mla_prolog_v2": {
        "7.1": MlaLimits(heads=(8, 16, 32, 64, 128), weight_modes=(0, 1)),
        "7.2": MlaLimits(),
    },
    "npu_mla_prolog_v3_functional": {"7.3": _V3, "26.1": _V3_26},
}
"""Operator -> its limits by the release that they came with."""


@dataclass(frozen=True)
class Target:
    """Limits of one SoC family with one release of torch_npu."""

    soc: str
    release: str
    swiglu_alignment: int = 64
    """x's last dimension (2H) of npu_dequant_swiglu_quant is a multiple of this."""
    swiglu_max_rank: int = 8
    float_bias: bool = False
    """Whether npu_dequant_swiglu_quant documents a floating bias."""
    swiglu_quant_width: int = 8192
    """Largest last dimension (2H) of npu_swiglu_quant."""
    quant_matmul_width: int = 65535
    """Largest last dimension of either operand (k and n) of npu_quant_matmul."""
    rotary_max_width: int = 895
    """Largest last dimension of npu_rotary_mul."""
    rotary_max_broadcast: int = 999
    """Largest dimension (batch or heads) over which npu_rotary_mul broadcasts the cosine."""
    interleave_rope_width: int = 64
    """The one last dimension that npu_interleave_rope takes."""
    interleave_rope_any_layout: bool = False
    """Whether npu_interleave_rope takes float32, and tensors that are not contiguous."""

    @classmethod
    def named(cls, name: str) -> Target:
        soc, _, release = name.partition("-")
        return cls(soc, release or RELEASES[-1], interleave_rope_any_layout=soc == "ascend950")

    def mla(self, operator: str) -> MlaLimits:
        """What this version of npu_mla_prolog takes in the target's release."""
        limits = _MLA[operator]
        reached = [since for since in limits if reaches(self.release, since)]
        return limits[reached[-1] if reached else next(iter(limits))]


TARGETS = {name: Target.named(name) for name in _releases.TARGETS}

_FIRST_NUMBER = ((260, "ascend950"), (250, "ascend910_93"), (240, None), (220, "ascend910b"))
"""From which ``SocVersion`` on a number means which family; 240 to 249 are Ascend310B."""


def resolve(config: FusionConfig) -> Target | None:
    """The target that a config names, or None: no limits."""
    return None if config.target is None else TARGETS[config.target]


def detect() -> str | None:
    """The name of the target at hand: SoC of the current NPU and release of the torch_npu that is imported.

    None without torch_npu or without a device. An NPU of another family is None too, with a warning, because
    its limits are not known here.
    """
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is None or not torch_npu.npu.is_available():
        return None
    number = torch_npu.npu.utils.get_soc_version()
    soc = next((soc for first, soc in _FIRST_NUMBER if number >= first), None)
    if soc is None:
        warnings.warn(
            f"the NPU has SoC version {number}, whose limits npu_fusion does not know; operators are fused "
            f"without any. Known: {', '.join(_releases.SOCS)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    release = max(_installed_release(), _releases.SOCS[soc], key=RELEASES.index)
    return f"{soc}-{release}"


def _installed_release() -> str:
    """The latest release all of whose operators and arguments the imported torch_npu has."""
    lacking = [since for name, since in _releases.OPERATORS.items() if not _of_torch_npu(name)]
    for name, arguments in _releases.ARGUMENTS.items():
        if _of_torch_npu(name):
            known = {a.name for a in OPERATORS[name].overload._schema.arguments}
            lacking += [since for argument, since in arguments.items() if argument not in known]
    first = min(map(RELEASES.index, lacking), default=len(RELEASES))
    return RELEASES[max(first - 1, 0)]


def _of_torch_npu(operator: str) -> bool:
    """Is the operator torch_npu's, or did this package define what an older release does not have? Only
    torch_npu has kernels for the device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", "PrivateUse1")


def missing(
    target: Target | None, call: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> str | None:
    """Why ``call(*args, **kwargs)`` may not be emitted for ``target``, or None.

    ``call`` is an operator overload; those of other namespaces are not judged. The target's release must have
    the operator and every argument that is given, its SoC the operator, and so must torch_npu if it is there.
    """
    schema = getattr(call, "_schema", None)
    if schema is None or not schema.name.startswith(f"{NAMESPACE}::"):
        return None
    operator = schema.name.partition("::")[2]
    given = [a.name for a in schema.arguments[: len(args)]] + list(kwargs or ())
    return _absent(target, operator) or _argument_absent(target, operator, schema, given)


def choose(target: Target | None, *operators: str) -> str:
    """The first of several operators for one purpose that may be emitted; the first of all if none may."""
    return next((name for name in operators if _absent(target, name) is None), operators[0])


def takes_dtype(target: Target | None, call: Any, argument: str) -> bool:
    """Is a dtype given to ``argument`` as a ``torch.dtype``, as before 26.0, or as its ``ScalarType`` number?

    Every schema accepts both, but torchair compares with the one that its release has.
    """
    operator = call._schema.name.partition("::")[2]
    if "torch_npu" in sys.modules and _of_torch_npu(operator):
        (found,) = (a for a in call._schema.arguments if a.name == argument)
        return "ScalarType" in str(found.real_type)
    return target is not None and not reaches(target.release, _releases.INTEGER_DTYPES)


def _absent(target: Target | None, operator: str) -> str | None:
    torch_npu = sys.modules.get("torch_npu")
    if torch_npu is not None and not _of_torch_npu(operator):
        return f"the torch_npu at hand ({torch_npu.__version__}) has no {operator}"
    if target is None:
        return None
    since = _releases.OPERATORS.get(operator, RELEASES[0])
    if not reaches(target.release, since):
        return f"{operator} came with torch_npu {since}, the target has {target.release}"
    there = _releases.ELSEWHERE.get(operator, {})
    if target.soc not in there:
        return None
    later = there[target.soc]
    if later is None:
        return f"{operator} does not run on {target.soc}"
    if not reaches(target.release, later):
        return f"{operator} is for {target.soc} from torch_npu {later} on, the target has {target.release}"
    return None


def _argument_absent(target: Target | None, operator: str, schema: Any, given: Sequence[str]) -> str | None:
    known = {a.name for a in schema.arguments}
    younger = _releases.ARGUMENTS.get(operator, {})
    for argument in given:
        if argument not in known:
            return f"the {operator} at hand has no argument {argument}"
        if target is None:
            continue
        since = younger.get(argument, RELEASES[0])
        if not reaches(target.release, since):
            what = f"argument {argument} of {operator}"
            return f"{what} came with torch_npu {since}, the target has {target.release}"
        if argument in _releases.IGNORED.get(operator, {}).get(target.soc, ()):
            return f"{operator} ignores {argument} on {target.soc}"
    return None
