"""Kernels for operators that the installed torch_npu defines otherwise than this package does.

Releases of torch_npu add arguments to operators, put new ones between old ones, rename ``self`` to ``input``
and turn ``ScalarType`` into ``int``. A CPU kernel of this package is written for the schema of 2.13.0. Behind
another one it is called by name: what the release lacks keeps its default here, what it has in addition has
to stay at its default there.

Source: ``op_plugin_functions.yaml`` of op-plugin, branches 7.0.0 to 26.1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npu_fusion.meta_impls._dtypes import enum_value, torch_dtype


def adapted(
    name: str, kernel: Callable[..., Any], released: torch.FunctionSchema, declared: torch.FunctionSchema
) -> Callable[..., Any] | None:
    """``kernel``, which takes the arguments of ``declared``, as one for ``released``.

    None if no call can be handed on: the results are others, or an argument without default is missing.
    """
    ours = {argument.name: argument for argument in declared.arguments}
    names = _names(released, declared)
    given = set(names.values())
    required = {a.name for a in declared.arguments if not a.has_default_value()}
    results = [[str(result.type) for result in schema.returns] for schema in (released, declared)]
    if results[0] != results[1] or not required <= given:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        values = {a.name: a.default_value for a in released.arguments if a.has_default_value()}
        values |= {a.name: value for a, value in zip(released.arguments, args, strict=False)} | kwargs
        handed: dict[str, Any] = {}
        for argument in released.arguments:
            value = values[argument.name]
            target = names.get(argument.name)
            if target is not None:
                handed[target] = _converted(value, argument, ours[target])
            elif not argument.has_default_value() or value != argument.default_value:
                raise TypeError(
                    f"{name}: {argument.name} is {value!r}; accepted: the default, as the CPU kernel is that "
                    "of another torch_npu release"
                )
        positional = [handed.pop(a.name) for a in declared.arguments if not a.has_default_value()]
        return kernel(*positional, **handed)

    return call


def _names(released: torch.FunctionSchema, declared: torch.FunctionSchema) -> dict[str, str]:
    """For each argument of ``released`` that exists here its name here; the first has had two names."""
    ours = [argument.name for argument in declared.arguments]
    names = {argument.name: argument.name for argument in released.arguments if argument.name in ours}
    names[released.arguments[0].name] = ours[0]
    return names


def _converted(value: Any, released: torch.Argument, declared: torch.Argument) -> Any:
    """A dtype in the spelling of the declared schema: a ``torch.dtype`` or its ``ScalarType`` value."""
    if isinstance(value, torch.dtype) and not _is_dtype(declared):
        return enum_value(value)
    if isinstance(value, int) and _is_dtype(declared) and not _is_dtype(released):
        return torch_dtype(value, torch.int8)
    return value


def _is_dtype(argument: torch.Argument) -> bool:
    return "ScalarType" in str(argument.real_type)
