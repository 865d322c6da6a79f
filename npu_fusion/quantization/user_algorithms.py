"""Algorithms of the user: modules of their own for calibration and for the converted model.

The extension point of AMCT, with its names: ``quant_op(ori_module, layer_name, quant_config)`` takes the
place of a layer whose class is called ``src_op`` when the model is quantized, sees the user's forward passes,
and ``deploy_op(quant_module)`` takes its place when the model is converted.

Source: AMCT's documentation of algorithm_register.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from npu_fusion.quantization.algorithms import ALGORITHMS


class BaseQuantizeModule(nn.Module):
    """What a ``quant_op`` may be derived from: it keeps what it was made with.

    Attributes:
        ori_module: the layer that it stands for.
        layer_name: full name of that layer in the model.
        quant_config: what was asked of the layer, in the form of the configuration.
    """

    def __init__(self, ori_module: nn.Module, layer_name: str, quant_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.ori_module = ori_module
        self.layer_name = layer_name
        self.quant_config = quant_config


@dataclass(frozen=True)
class UserAlgorithm:
    quant_op: type[nn.Module]
    deploy_op: type[nn.Module]


USER_ALGORITHMS: dict[str, dict[str, UserAlgorithm]] = {}
"""Name -> class name of the layer -> modules."""


def algorithm_register(name: str, src_op: str, quant_op: type[nn.Module], deploy_op: type[nn.Module]) -> None:
    """Make ``{"algorithm": {name}}`` replace layers of the class called ``src_op``.

    Registering a name and class again replaces what was registered.

    Args:
        name: not one of the built-in algorithms.
        src_op: name of a class of layers, ``"Linear"`` say.
        quant_op: called as ``quant_op(ori_module, layer_name, quant_config)``, see
        :class:`BaseQuantizeModule`. deploy_op: called with the object that ``quant_op`` gave.

    Raises:
        TypeError: a name is no string, or an operator no class of modules.
        ValueError: a name is empty, or that of a built-in algorithm.
    """
    for argument, value in (("name", name), ("src_op", src_op)):
        if not isinstance(value, str):
            raise TypeError(f"algorithm_register: {argument} is a {type(value).__name__}; accepted: a string")
        if not value:
            raise ValueError(f"algorithm_register: {argument} is empty; accepted: a name")
    if name in ALGORITHMS:
        raise ValueError(f"algorithm_register: name is {name!r}; accepted: not a built-in algorithm")
    for argument, operator in (("quant_op", quant_op), ("deploy_op", deploy_op)):
        if not (isinstance(operator, type) and issubclass(operator, nn.Module)):
            raise TypeError(
                f"algorithm_register: {argument} is {operator!r}; accepted: a subclass of torch.nn.Module"
            )
    USER_ALGORITHMS.setdefault(name, {})[src_op] = UserAlgorithm(quant_op, deploy_op)
