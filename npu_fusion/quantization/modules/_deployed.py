"""Deployed layers: what ``convert`` leaves in a model, and how a new kind of them is added.

::

    deploy(layer, scheme, weight, inputs, smooth_scales)  ->  a layer with quantized weights
    empty(layer.describe())                               ->  another, to be given layer.state_dict()

A kind is one file with one subclass of :class:`Deployed` under :func:`deployed`. All that a forward can be
spared is computed once, by :meth:`Deployed.of`, and is a buffer: a forward has no ``item()``, branches on
nothing but what is fixed, changes nothing, and is one graph for any number of tokens.

Layers that read one tensor share its quantization in a graph where they read one and the same smoothing or
scale: not an equal one, the very tensor object, because buffers are inputs of a graph. :func:`share` sees to
that, and a deployed layer keeps it when the model is moved (``Module.to`` makes a new tensor for each
buffer; of parameters it keeps the object for the same reason).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules._description import (
    DTYPES,
    Fields,
    dtype_name,
    read_scheme,
    write_scheme,
)
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import Scheme

Layer = nn.Linear | nn.Conv2d
Kind = TypeVar("Kind", bound="type[Deployed]")


class Spec(NamedTuple):
    """Of a buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Deployed(nn.Module, ABC):
    """A layer with quantized weights. It is for inference: it has buffers and no parameters.

    ``Module.to(dtype)``, ``half()`` and the like move the buffers and leave their dtypes as they are: they
    are codes and scales, and the result has the dtype of the input.
    """

    kind: ClassVar[str]
    """Its name in descriptions."""
    stands_for: ClassVar[type[nn.Module]]
    """Whose place it takes."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Buffers that belong to the input, hence to all layers that read it."""

    def __init__(
        self, scheme: Scheme, specs: Mapping[str, Spec | None], device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.scheme = scheme
        for name, spec in specs.items():
            zeros = None if spec is None else torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            self.register_buffer(name, zeros)

    @classmethod
    @abstractmethod
    def takes(cls, scheme: Scheme) -> bool:
        """Whether this kind is the one for layers with this scheme."""

    @classmethod
    @abstractmethod
    def of(
        cls,
        layer: Any,
        scheme: Scheme,
        weight: QuantizedWeight,
        inputs: InputParameters | None,
        smooth_scales: Tensor | None,
    ) -> Deployed:
        """The deployed layer of a float one. :func:`deploy` has checked that the arguments fit together."""

    @classmethod
    @abstractmethod
    def read(cls, fields: Fields, scheme: Scheme) -> Deployed:
        """A layer without values, out of what :meth:`settings` wrote."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values of which, and the scheme, the shapes and dtypes of all buffers follow."""

    @abstractmethod
    def quantized_weight(self) -> QuantizedWeight:
        """The weight that the layer multiplies with, as it was given to :func:`deploy`."""

    def describe(self) -> dict[str, Any]:
        """JSON values of which :func:`empty` makes a layer with buffers of the same shapes and dtypes."""
        return {"kind": self.kind, "scheme": write_scheme(self.scheme), **self.settings()}

    def fill(self, **tensors: Tensor | None) -> None:
        """Make these tensors the buffers, the objects themselves.

        Raises ``ValueError`` for a tensor whose dtype or shape is not that of the buffer.
        """
        for name, tensor in tensors.items():
            place = self.get_buffer(name) if self._buffers[name] is not None else None
            given, accepted = _form(tensor), _form(place)
            if given != accepted:
                raise ValueError(f"deploy: {name} is {given}; accepted: {accepted}")
            setattr(self, name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Deployed:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = {name: self._buffers[name] for name in self.shared}
        super()._apply(keeping_dtype, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and torch._has_compatible_shallow_copy_type(old, new):
                old.data = new
                self._buffers[name] = old
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Without torch.save, PyTorch pickles no tensor of a float8 dtype: its bytes travel.
        state = dict(self.__dict__)
        float8 = {n: t.dtype for n, t in self._buffers.items() if t is not None and _is_float8(t.dtype)}
        views = {
            name: t.view(torch.uint8) for name, t in self._buffers.items() if t is not None and name in float8
        }
        return state | {"_buffers": {**self._buffers, **views}, _FLOAT8: float8}

    def __setstate__(self, state: dict[str, Any]) -> None:
        float8 = state.pop(_FLOAT8)
        super().__setstate__(state)
        for name, dtype in float8.items():
            self._buffers[name] = self.get_buffer(name).view(dtype)


_FLOAT8 = "_float8"


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _form(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


KINDS: dict[str, type[Deployed]] = {}


def deployed(cls: Kind) -> Kind:
    """Register a kind under its name."""
    KINDS[cls.kind] = cls
    return cls


@torch.no_grad()
def deploy(
    layer: nn.Module,
    scheme: Scheme,
    weight: QuantizedWeight,
    inputs: InputParameters | None = None,
    smooth_scales: Tensor | None = None,
) -> Deployed:
    """The layer that takes the place of ``layer``, which is left as it is.

    Its forward gives what ``layer`` would give with the weight ``weight.dequantize()`` and the input
    quantized and dequantized again, up to one rounding to the dtype of the input and the last bits of sums
    in fp32; each kind's docstring has the formula.

    Args:
        layer: of the model's dtype (float16, bfloat16 or float32).
        scheme: what was asked for; decides about the kind.
        weight: of ``scheme.weights``, in the shape of the layer's weight (of a convolution:
            [O, I / groups * kh * kw]).
        inputs: exactly where the input is quantized by a given scale (``scheme.inputs`` is not dynamic).
        smooth_scales: [K], positive; the input is multiplied by it. Linear layers only.

    Raises:
        TypeError: ``layer`` is no linear layer or convolution.
        ValueError: no kind takes the scheme, or the arguments do not fit together.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(
            f"deploy: layer is a {type(layer).__name__}; accepted: torch.nn.Linear, torch.nn.Conv2d"
        )
    kind = next((k for k in KINDS.values() if isinstance(layer, k.stands_for) and k.takes(scheme)), None)
    if kind is None:
        raise ValueError(
            f"deploy: scheme is {described(scheme)} for a {type(layer).__name__}; no layer has it"
        )
    if layer.weight.dtype not in DTYPES:
        accepted = ", ".join(map(dtype_name, DTYPES))
        raise ValueError(f"deploy: layer.weight is {dtype_name(layer.weight.dtype)}; accepted: {accepted}")
    if weight.scheme != scheme.weights:
        raise ValueError(f"deploy: weight has the scheme {weight.scheme}; accepted: {scheme.weights}")
    if weight.shape != layer.weight.flatten(1).shape:
        accepted_shape = list(layer.weight.flatten(1).shape)
        raise ValueError(f"deploy: weight has shape {list(weight.shape)}; accepted: {accepted_shape}")
    static = scheme.inputs is not None and not scheme.inputs.dynamic
    if (inputs is not None) != static:
        accepted = "InputParameters with a static input" if static else "None with this scheme"
        raise ValueError(
            f"deploy: inputs is {'given' if inputs is not None else 'None'}; accepted: {accepted}"
        )
    if inputs is not None:
        _check_inputs(inputs, scheme)
    if smooth_scales is not None:
        _check_smoothing(smooth_scales, layer)
    return kind.of(layer, scheme, weight, inputs, smooth_scales).train(layer.training)


def described(scheme: Scheme) -> str:
    """In a few words: ``int8 weights (channel), int8 inputs (token)``."""
    weights, inputs = scheme.weights, scheme.inputs
    words = [f"{weights.type} weights ({weights.strategy}{'' if weights.symmetric else ', asymmetric'})"]
    if inputs is not None:
        words.append(f"{inputs.type} inputs ({inputs.strategy}{'' if inputs.symmetric else ', asymmetric'})")
    return ", ".join(words)


def _check_inputs(inputs: InputParameters, scheme: Scheme) -> None:
    assert scheme.inputs is not None
    if _form(inputs.scale) != "float32 [1]" or not bool(
        (inputs.scale > 0).all() & inputs.scale.isfinite().all()
    ):
        raise ValueError(
            f"deploy: inputs.scale is {inputs.scale}; accepted: one positive float32 number in [1]"
        )
    accepted = "None" if scheme.inputs.symmetric else "int32 [1]"
    if _form(inputs.offset) != accepted:
        raise ValueError(f"deploy: inputs.offset is {_form(inputs.offset)}; accepted: {accepted}")


def _check_smoothing(smooth_scales: Tensor, layer: Layer) -> None:
    if not isinstance(layer, nn.Linear):
        raise ValueError("deploy: smooth_scales is given for a convolution; accepted: None")
    accepted = _form(layer.weight.detach()[:1].squeeze(0))
    if _form(smooth_scales) != accepted:
        raise ValueError(f"deploy: smooth_scales is {_form(smooth_scales)}; accepted: {accepted}")
    if not bool((smooth_scales > 0).all() & smooth_scales.isfinite().all()):
        raise ValueError(
            "deploy: smooth_scales has numbers that are not positive; accepted: positive numbers"
        )


def empty(description: Mapping[str, Any]) -> Deployed:
    """A layer with the shapes and dtypes of the one that gave ``description``; its buffers are zeros.

    Raises:
        TypeError, ValueError: for what :meth:`Deployed.describe` would not have written.
    """
    fields = Fields("description", description)
    kind = KINDS[fields.choice("kind", KINDS)]
    scheme = read_scheme("description.scheme", fields.take("scheme", dict))
    if not kind.takes(scheme):
        raise ValueError(f"description: scheme is {described(scheme)}; {kind.kind} has it not")
    layer = kind.read(fields, scheme)
    fields.nothing_left()
    return layer


def share(layers: Sequence[nn.Module]) -> None:
    """Let layers that read the same tensor read the same buffers of it, where these are equal.

    For the layers of one ``Problem`` after each was deployed, and for such layers after a checkpoint was
    loaded into them: a graph then quantizes their input once. Modules that are not deployed are passed over.
    """
    for name in dict.fromkeys(
        name for layer in layers if isinstance(layer, Deployed) for name in layer.shared
    ):
        kept: list[Tensor] = []
        for layer in layers:
            tensor = layer._buffers.get(name) if isinstance(layer, Deployed) else None
            if tensor is None:
                continue
            same = next((t for t in kept if _equal(t, tensor)), None)
            if same is None:
                kept.append(tensor)
            else:
                layer._buffers[name] = same


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
