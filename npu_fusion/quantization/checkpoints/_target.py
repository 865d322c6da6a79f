"""The model that a checkpoint is loaded into, and where each tensor of the file belongs in it.

Everything is read, checked and made here; the model is only looked at. ``_swap`` changes it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion._prepare_checks import attached
from npu_fusion.quantization._combinations import combination
from npu_fusion.quantization.checkpoints import _experts
from npu_fusion.quantization.checkpoints._buffers import computed_buffers
from npu_fusion.quantization.checkpoints._files import FLOATS, Tensors
from npu_fusion.quantization.checkpoints._found import Dense, Found, Quantized
from npu_fusion.quantization.modules import Deployed, WeightOnlyLinear, deploy
from npu_fusion.quantization.modules._deployed import described

_COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Files of early transformers have it; every model computes it."""


@dataclass
class Changes:
    """What is to be done to a model, in full."""

    modules: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Layer -> what takes its place."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Name of a parameter or buffer -> its new value, in its dtype and on :func:`device_of` it."""
    ties: list[list[str]] = field(default_factory=list)
    """Names of parameters and buffers that are to be one tensor."""


class Target:
    """A model, and what is found for it in a file."""

    def __init__(self, model: nn.Module, tensors: Tensors) -> None:
        if isinstance(model, nn.Linear | nn.Conv2d):
            raise ValueError(
                f"load_checkpoint: model is itself a {type(model).__name__}, which cannot be replaced in "
                f"place; accepted: a module that holds it"
            )
        self.model = model
        self.tensors = tensors
        self.changes = Changes()
        self.became: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.ignored: list[str] = []
        self.buffers: dict[str, Tensor] = {}
        """Values for meta buffers that are in no state dict."""
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: defaultdict[nn.Module, list[str]] = defaultdict(list)
        for name, module in self.modules.items():
            self.names[module].append(name)
        state: Mapping[str, Any] = model.state_dict(keep_vars=True)
        self.slots = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
        self._stacks = _experts.Stacks(self.slots)

    # Layers

    def layer(self, name: str) -> nn.Module:
        """Raises ``ValueError`` if the model has no such layer."""
        if name not in self.modules:
            raise self.problem(name, "is no layer of the model (load into a model before it is prepared)")
        return self.modules[name]

    def place(self, name: str, found: Found) -> None:
        """Deploy what the file has for a linear layer; where that cannot be, load the weight as numbers."""
        expert = _experts.place(name, self.slots) if name not in self.modules else None
        if expert is not None:
            self._check_shape(name, found, (expert.rows, expert.columns))
            self._stacks.put(expert, self._as(expert.key, _numbers(found)))
            self.left[name] = "the experts are one tensor in the model"
            return
        layer = self.layer(name)
        if not isinstance(layer, nn.Linear):
            raise self.problem(name, f"is a {type(layer).__name__} in the model; accepted: torch.nn.Linear")
        self._check_shape(name, found, (layer.out_features, layer.in_features))
        bias = self._bias(name, layer, found)
        reason = found.reason if isinstance(found, Dense) else self._deploy(name, layer, found, bias)
        if reason is not None:
            self.left[name] = reason
            self.changes.values[f"{name}.weight"] = self._as(f"{name}.weight", _numbers(found))
            if bias is not None:
                self.changes.values[f"{name}.bias"] = self._as(f"{name}.bias", bias)

    def _bias(self, name: str, layer: nn.Linear, found: Found) -> Tensor | None:
        """The bias, if the layer has one; early files of GPTQ have one of zeros for layers without it."""
        key = f"{name}.bias"
        bias = found.bias if isinstance(found, Quantized) else None
        if bias is None and (layer.bias is not None or key in self.tensors):
            bias = self.tensors.take(key, FLOATS, (layer.out_features,))
            bias = bias if layer.bias is None else self._as(key, bias)
        if layer.bias is None and bias is not None and bool(bias.any()):
            raise self.problem(name, "has a bias that is not 0, and the layer of the model has none")
        return None if layer.bias is None else bias

    def _deploy(self, name: str, layer: nn.Linear, found: Quantized, bias: Tensor | None) -> str | None:
        """None, or why the weight has to be loaded as numbers."""
        if type(layer) is not nn.Linear:
            return f"it is a {type(layer).__name__}; accepted: torch.nn.Linear itself"
        shell = _shell(layer, bias)
        row = combination("Linear", found.weight.scheme, found.scheme.inputs)
        for limit in () if row is None else row.limits:
            if not limit.holds(shell):
                return f"{limit.given(shell)}; accepted for {described(found.scheme)}: {limit.text}"
        dtype = layer.weight.dtype
        smooth_scales = None if found.smooth_scales is None else found.smooth_scales.to(dtype)
        try:
            made = deploy(shell, found.scheme, found.weight, found.inputs, smooth_scales)
        except ValueError as error:
            return str(error).removeprefix("deploy: ")
        if not all(b.isfinite().all() for b in made.buffers() if b.dtype in FLOATS):
            return f"its scales are beyond {dtype}"
        self.replace(name, made.to(device_of(layer.weight)))
        if _rounded(found, made):
            self.became[name] += f", scales rounded to {str(dtype).removeprefix('torch.')}"
        return None

    def replace(self, name: str, made: Deployed) -> None:
        """Have ``made`` take the place of a layer, under all names that the layer has."""
        layer = self.layer(name)
        obstacle = attached(name, layer)
        if obstacle is not None:
            raise self.problem(name, f"cannot be replaced: {obstacle}")
        if layer in self.changes.modules:
            raise self.problem(name, "is the same layer as another of the file, in the model")
        self.changes.modules[layer] = made
        self.became[name] = described(made.scheme)

    def _check_shape(self, name: str, found: Found, shape: tuple[int, int]) -> None:
        if found.shape != shape:
            raise self.problem(
                name, f"has a weight {list(found.shape)}; accepted: {list(shape)}, as in the model"
            )

    # All other tensors

    def rest(self) -> None:
        """Take what is left in the file for what is left in the model.

        Raises ``ValueError`` for what has no place there.
        """
        covered = self._covered()
        for key in self.tensors.left():
            layer, _, kind = key.rpartition(".")
            expert = _experts.place(layer, self.slots) if kind == "weight" else None
            if key in self.slots and key not in covered and key not in self.changes.values:
                self.changes.values[key] = self.take(key)
            elif expert is not None and layer not in self.left:
                value = self.tensors.take(key, FLOATS, (expert.rows, expert.columns))
                self._stacks.put(expert, self._as(expert.key, value))
            elif self._ignores(key):
                self.ignore(key)
        left = self.tensors.left()
        if left:
            more = f" (nor have {len(left) - 1} more)" if left[1:] else ""
            raise self.tensors.problem(left[0], f"has no place in the model{more}")

    def ignore(self, key: str) -> None:
        self.tensors.pass_over(key)
        self.ignored.append(key)

    def _ignores(self, key: str) -> bool:
        patterns: Iterable[str] = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return _COMPUTED.fullmatch(key) is not None or any(re.search(pattern, key) for pattern in patterns)

    def take(self, key: str) -> Tensor:
        """The value of a parameter or buffer out of the file, as the model has it."""
        slot = self.slots[key]
        if slot.dtype in FLOATS:
            return self._as(key, self.tensors.take(key, FLOATS, slot.shape))
        return self.tensors.take(key, (slot.dtype,), slot.shape).to(device_of(slot))

    def _as(self, key: str, value: Tensor) -> Tensor:
        """``value`` in the dtype and on the device of a tensor of the model. It must not overflow there."""
        slot = self.slots[key]
        converted = value.to(slot.dtype)
        if converted.dtype != value.dtype and bool((converted.isinf() & value.isfinite()).any()):
            raise self.problem(key, f"has numbers beyond those of {slot.dtype}, the dtype of the model")
        return converted.to(device_of(slot))

    def _covered(self) -> set[str]:
        """Tensors of the model that go away with their layers."""
        gone = {name for module in self.changes.modules for name in self.names[module]}
        return {key for key in self.slots if key.rpartition(".")[0] in gone}

    # Completeness

    def complete(self) -> None:
        """Check that every tensor of the model has one value."""
        missing = self._stacks.missing()
        if missing is not None:
            raise self.problem(missing, "is missing, one of the experts")
        for key, value in self._stacks.tensors.items():
            if key in self.changes.values:
                raise self.tensors.problem(key, "is there as one tensor, and as the layers of its experts")
            self.changes.values[key] = value
        covered = self._covered()
        same: defaultdict[int, list[str]] = defaultdict(list)
        for key, slot in self.slots.items():
            if key not in covered:
                same[id(slot)].append(key)
        for keys in same.values():
            given = [key for key in keys if key in self.changes.values]
            if not given:
                self.tensors.shape(keys[0])  # raises
            for key in given[1:]:
                if not torch.equal(self.changes.values[given[0]], self.changes.values[key]):
                    raise self.tensors.problem(key, f"and {given[0]} differ, and are one tensor in the model")
        for key in self.changes.values:
            if self.slots[key].is_meta and holder(self.model, key) is None:
                raise self.tensors.problem(
                    key, "is of a prepared layer on the meta device; accepted: load, then prepare"
                )
        self._fill()

    def _fill(self) -> None:
        """Give meta buffers that are in no state dict the values of the file, or what the model computes."""
        for name, module in self.modules.items():
            if module in self.changes.modules:
                continue
            lacking = [key for key, b in module._buffers.items() if b is not None and b.is_meta]
            names = {key: f"{name}.{key}".removeprefix(".") for key in lacking}
            lacking = [key for key in lacking if names[key] not in self.changes.values]
            given = {key: self.buffers[names[key]] for key in lacking if names[key] in self.buffers}
            if len(given) < len(lacking):
                given = {**computed_buffers(self.model, module), **given}
            for key in lacking:
                value = given.get(key)
                if value is None:
                    raise ValueError(
                        f"load_checkpoint: {names[key]} is on the meta device, and no checkpoint has it; "
                        f"accepted: a model whose buffers are on a real one"
                    )
                self.changes.values[names[key]] = value

    def problem(self, name: str, what: str) -> ValueError:
        """An error about a layer, with the file that has tensors of it."""
        file = next((self.tensors.file(key) for key in self.tensors if key.startswith(f"{name}.")), None)
        return ValueError(f"{'load_checkpoint' if file is None else file}: {name} {what}")


def device_of(tensor: Tensor) -> torch.device:
    """Where the value of a tensor goes; of a meta tensor, to the CPU."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def holder(model: nn.Module, key: str) -> tuple[nn.Module, str] | None:
    """The module that has the parameter or buffer ``key`` itself, and its name there.

    None for a key that a prepared layer saves and loads of what it has otherwise.
    """
    path, _, name = key.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    has = module._parameters.get(name) is not None or module._buffers.get(name) is not None
    return (module, name) if has else None


def _numbers(found: Found) -> Tensor:
    """fp32 [N, K]. Smoothing of the input is in it."""
    if isinstance(found, Dense):
        return found.value
    value = found.weight.dequantize()
    return value if found.smooth_scales is None else value * found.smooth_scales.to(torch.float32)


def _rounded(found: Quantized, made: Deployed) -> bool:
    """Whether the layer has other scales than the file, since operators want them in the model's dtype."""
    if found.inputs is None:
        dtype = made.dtypes[0] if isinstance(made, WeightOnlyLinear) else torch.float32
        return not torch.equal(found.weight.scale, found.weight.scale.to(dtype).float())
    own = made._buffers.get("input_scale")
    return found.smooth_scales is None and own is not None and bool((own.float() != found.inputs.scale).any())


def _shell(layer: nn.Linear, bias: Tensor | None) -> nn.Linear:
    """A stand-in for ``layer`` on the CPU, with this bias and a weight without memory."""
    shell = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    zero = torch.zeros((), dtype=layer.weight.dtype)
    shell.weight = nn.Parameter(zero.expand(layer.weight.shape), requires_grad=False)
    if bias is not None:
        shell.bias = nn.Parameter(bias.cpu(), requires_grad=False)
    return shell.train(layer.training)
