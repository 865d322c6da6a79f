"""``quantize``, forward passes of the user, ``convert``: post-training quantization in AMCT's three steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from npu_fusion.prepare import Prepared
from npu_fusion.prepare import prepare as prepare_weights
from npu_fusion.quantization.calibration import Calibration
from npu_fusion.quantization.config import QuantizationConfig, parse
from npu_fusion.quantization.rules import Skipped, plan
from npu_fusion.quantization.scheme import Scheme
from npu_fusion.quantization.user_algorithms import USER_ALGORITHMS, UserAlgorithm

_STATE = "_npu_fusion_quantization"


class QuantizationWarning(UserWarning):
    """Layers were left out, or calibrated without data."""


@dataclass
class Quantization:
    """What :func:`quantize` set up, and what has become of it since."""

    config: QuantizationConfig
    schemes: Mapping[str, Scheme]
    """Layer -> how it is quantized."""
    skipped: tuple[Skipped, ...]
    """Layers that a rule leaves in float, and why."""
    excluded: tuple[str, ...]
    """Layers that the configuration leaves in float."""
    calibration: Calibration | None = field(repr=False)
    prepared: Prepared | None = None
    """What :func:`convert` laid out anew for the fusions."""

    @property
    def batches_left(self) -> int:
        """Forward passes that are still wanted."""
        return 0 if self.calibration is None else max(0, self.calibration.batches_left)

    @property
    def folded(self) -> Mapping[str, str]:
        """Layer -> the norm or layer before it that took its smoothing."""
        return {} if self.calibration is None else self.calibration.folded

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that no forward pass has reached (experts, say): rounded to nearest, without data."""
        return () if self.calibration is None else tuple(self.calibration.unseen)

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for scheme in self.schemes.values():
            kinds[_kind(scheme)] = kinds.get(_kind(scheme), 0) + 1
        lines = [f"quantize: {len(self.schemes)} layers"]
        lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
        if self.folded:
            lines.append(f"  smoothing of {len(self.folded)} layers folded into what feeds them")
        if self.excluded:
            lines.append(f"  {len(self.excluded)} left in float by the configuration")
        reasons: dict[str, list[str]] = {}
        for skipped in self.skipped:
            reasons.setdefault(skipped.reason, []).append(skipped.name)
        lines += [
            f"  left in float: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


def _kind(scheme: Scheme) -> str:
    weights, inputs = scheme.weights, scheme.inputs
    group = f" of {weights.group_size}" if weights.group_size else ""
    symmetry = "" if weights.symmetric else ", asymmetric"
    text = f"{weights.type} weights per {weights.strategy}{group}{symmetry}"
    if inputs is not None:
        text += f", {inputs.type} inputs per {inputs.strategy}{'' if inputs.symmetric else ', asymmetric'}"
    return f"{text}, {scheme.algorithm}"


def quantize(
    model: nn.Module,
    config: Mapping[str, Any] | QuantizationConfig | str | None = None,
    *,
    progress: bool | None = None,
) -> Quantization:
    """Make ``model`` ready for calibration, in place, as AMCT's function of this name does.

    Then run the model on ``batch_num`` batches of calibration data, under ``torch.no_grad()``. In the last of
    these passes the layers are quantized; from then on the model computes as the converted one will.
    :func:`convert` completes it. Layers whose algorithm needs no data (``minmax`` of weights, with no or
    dynamic inputs) are quantized by :func:`convert` even if no pass was run.

    Linear layers that read the same tensor share their smoothing and the scale of their input. Smoothing goes
    into what feeds them (a norm, ``v_proj``, ``up_proj``) where that has no other reader.

    Args:
        model: its ``torch.nn.Linear`` and ``torch.nn.Conv2d`` are quantized, no subclasses of them.
        config: a dict of AMCT's form (see :mod:`npu_fusion.quantization.config`), the name of a preset, or
        None for
            ``INT8_MINMAX_WEIGHT_QUANT_CFG``.
        progress: show a bar; None: if the terminal can.

    Returns:
        What will be quantized, and what will not and why. Layers that a rule leaves out are also named in one
        warning, :class:`QuantizationWarning`.

    Raises:
        TypeError: ``model`` is no module, or a value of ``config`` has a wrong type.
        ValueError: a key or value of ``config`` is not accepted; no layer is left to quantize by it; or the
        model is
            itself a layer, or being calibrated. Nothing is changed then.

    Source: AMCT's documentation of quantize.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}; accepted: torch.nn.Module")
    if is_calibrating(model):
        raise ValueError(
            "quantize: the model is being calibrated already; call npu_fusion.convert(model) first"
        )
    parsed = parse(config)
    if isinstance(model, (nn.Linear, nn.Conv2d)):
        raise ValueError(
            f"quantize: model is itself a {type(model).__name__}, which cannot be replaced in place; "
            f"accepted: a module that holds it"
        )
    planned = plan(model, parsed)
    warning = planned.warning()
    if not planned.schemes:
        raise ValueError(
            f"quantize: the model has no layer to quantize by this config\n{warning or ''}".rstrip()
        )
    if warning is not None:
        warnings.warn(f"quantize: {warning}", QuantizationWarning, stacklevel=2)
    own = {
        name: scheme for name, scheme in planned.schemes.items() if scheme.algorithm not in USER_ALGORITHMS
    }
    calibration = Calibration(model, own, parsed.batch_num, progress)
    for name, scheme in planned.schemes.items():
        if scheme.algorithm in USER_ALGORITHMS:
            layer = model.get_submodule(name)
            operator = USER_ALGORITHMS[scheme.algorithm][type(layer).__name__]
            model.set_submodule(
                name, operator.quant_op(layer, name, parsed.for_layer(name, type(layer).__name__))
            )
    state = Quantization(parsed, planned.schemes, planned.skipped, planned.excluded, calibration)
    setattr(model, _STATE, state)
    return state


def convert(model: nn.Module, *, prepare: bool = True) -> nn.Module:
    """Complete a calibrated model, in place: it has quantized layers only, and is laid out for the fusions.

    Args:
        model: what :func:`quantize` was called with, after its forward passes.
        prepare: lay out weights by :func:`npu_fusion.prepare` (gate and up projection in one layer). Keys of
        the
            state dict stay what they are.

    Returns:
        The model itself. What was done is in the :class:`Quantization` that :func:`quantize` returned.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it was not given to :func:`quantize`.
        RuntimeError: forward passes are missing.

    Source: AMCT's documentation of convert.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model is a {type(model).__name__}; accepted: torch.nn.Module")
    state = getattr(model, _STATE, None)
    if not isinstance(state, Quantization) or state.calibration is None:
        raise ValueError("convert: model is not being calibrated; accepted: a model given to quantize before")
    state.calibration.finish()
    state.calibration.remove()
    _deploy_user_algorithms(model, state)
    if state.unseen:
        warnings.warn(
            f"convert: no forward pass reached {len(state.unseen)} layers, which were rounded to nearest: "
            f"{', '.join(state.unseen[:5])}{' ...' if state.unseen[5:] else ''}",
            QuantizationWarning,
            stacklevel=2,
        )
    delattr(model, _STATE)
    if prepare:
        state.prepared = prepare_weights(model)
    return model


def is_calibrating(model: nn.Module) -> bool:
    """Whether :func:`quantize` has been called and :func:`convert` not yet."""
    return hasattr(model, _STATE)


def _deploy_user_algorithms(model: nn.Module, state: Quantization) -> None:
    for name, scheme in state.schemes.items():
        operators = USER_ALGORITHMS.get(scheme.algorithm)
        if operators is None:
            continue
        module = model.get_submodule(name)
        operator: UserAlgorithm = next(o for o in operators.values() if type(module) is o.quant_op)
        model.set_submodule(name, operator.deploy_op(module))
