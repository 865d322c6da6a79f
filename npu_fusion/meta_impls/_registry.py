"""Where operators are declared: schema, fake implementation and CPU kernel meet under one name.

``meta_impls/<family>.py`` declares an operator by decorating its fake implementation with the schema;
``kernels/reference/<family>.py`` adds the kernel that runs on the CPU. Both fill plain dictionaries on
import; :func:`register_all`, called once by ``import npu_fusion``, hands them to the dispatcher:

* an operator that nobody has defined yet is defined here, with its fake and its CPU kernel;
* an operator that torch_npu has already defined keeps torch_npu's schema and Meta kernel, and only gets
  what it lacks: the CPU kernel (``_released.py``, should the schema be another one) and, for the few
  without a Meta kernel, the fake.

Once an operator has been defined here torch_npu cannot be imported any more, see ``_import_order.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from npu_fusion.meta_impls import _import_order
from npu_fusion.meta_impls._calls import checked
from npu_fusion.meta_impls._released import adapted

NAMESPACE = "npu"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Operator:
    """One operator of the ``npu`` namespace as this package knows it."""

    name: str
    """Qualified inside the namespace: ``npu_swiglu``, or with overload ``npu_format_cast.Tensor``."""
    schema: str
    fake: Callable[..., Any]
    cpu: Callable[..., Any] | None = field(default=None)
    compiled: Callable[..., Any] | None = field(default=None)
    """The fast CPU kernel; returns NotImplemented for calls that it does not take."""
    cuda: Callable[..., Any] | None = field(default=None)
    """The CUDA kernel, with the same freedom; an operator without one is not there on CUDA."""
    copying: str | None = field(default=None)
    """For an operator that returns the argument it writes: the one that returns a copy instead."""
    beside: bool = field(default=False)
    """Whether torch_npu has defined it, with this schema: its Meta kernel is then the one in effect."""

    @property
    def overload(self) -> torch._ops.OpOverload:
        packet, _, overload = self.name.partition(".")
        return getattr(getattr(getattr(torch.ops, NAMESPACE), packet), overload or "default")


OPERATORS: dict[str, Operator] = {}

# What answers for a tensor without data. (PyTorch has a fallback for Meta: it raises.)
_FAKE_KEYS = ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd")

# The libraries must outlive the process' use of the operators: a collected Library unregisters them.
_LIBRARIES: list[torch.library.Library] = []


def operator(schema: str, *, copying: str | None = None) -> Callable[[F], F]:
    """Declare an operator: ``@operator("npu_swiglu(Tensor input, int dim=-1) -> Tensor")`` on its fake.

    The decorated function checks every argument and returns tensors without data (``new_empty``). It must
    work on symbolic sizes without specializing them. An operator that writes its first argument and returns
    it (``Tensor(a!) input, .. -> Tensor(a!)``) names in ``copying`` the operator that takes the same
    arguments and returns a copy: PyTorch cannot trace such an operator by itself.
    """
    name = schema.partition("(")[0]

    def decorate(fake: F) -> F:
        if name in OPERATORS:
            raise ValueError(f"operator {name!r} is declared twice")
        OPERATORS[name] = Operator(name, schema, fake, copying=copying)
        return fake

    return decorate


def cpu_kernel(name: str) -> Callable[[F], F]:
    """Give the operator ``name`` its CPU kernel, the reference. It may rely on the checks of the fake, which
    run first (``_calls.py``)."""
    return _kernel(name, "cpu")


def compiled_kernel(name: str) -> Callable[[F], F]:
    """Give the operator ``name`` its fast CPU kernel, which is asked before the reference and may rely on the
    same checks. It returns NotImplemented for calls that it does not take."""
    return _kernel(name, "compiled")


def cuda_kernel(name: str) -> Callable[[F], F]:
    """Give the operator ``name`` its CUDA kernel, as :func:`compiled_kernel` does for the CPU."""
    return _kernel(name, "cuda")


def _kernel(name: str, kind: str) -> Callable[[F], F]:
    def decorate(kernel: F) -> F:
        if name not in OPERATORS:
            raise ValueError(f"no operator {name!r} is declared in npu_fusion.meta_impls")
        if getattr(OPERATORS[name], kind) is not None:
            raise ValueError(f"operator {name!r} has two {kind} kernels")
        setattr(OPERATORS[name], kind, kernel)
        return kernel

    return decorate


def _functionalized(copying: Operator) -> Callable[..., Any]:
    """What a traced call of an operator becomes: the copying operator, then an update of the argument."""

    def call(api: Any, written: Any, *args: Any, **kwargs: Any) -> Any:
        plain, plain_kwargs = api.unwrap_tensors((written, *args)), api.unwrap_tensors(kwargs)
        with api.redispatch_to_next():
            updated = copying.overload(*plain, **plain_kwargs)
        api.replace(written, updated)
        api.commit_update(written)
        api.sync(written)
        return written

    return call


def register_all() -> None:
    """Hand every declared operator to the dispatcher; what exists already is left as it is."""
    if _LIBRARIES:
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _LIBRARIES.append(library)
    for op in OPERATORS.values():
        qualified = f"{NAMESPACE}::{op.name}"
        if not torch._C._dispatch_has_kernel(qualified):
            library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
            if op.copying is not None:
                op.overload.py_functionalize_impl(_functionalized(OPERATORS[op.copying]))
            if _import_order.PACKAGE not in sys.modules:
                _import_order.refuse_torch_npu_from_now_on()
        else:
            op.beside = _same_schema(op)
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key) for key in _FAKE_KEYS):
            fake = _as_defined(op, op.fake)
            if fake is not None:
                torch.library.register_fake(qualified, fake, lib=library)
        for key, fast in (("CPU", op.compiled), ("CUDA", op.cuda)):
            if op.cpu is None or (key == "CUDA" and fast is None):
                continue
            if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
                continue
            kernel = _as_defined(op, checked(op.name, op.fake, op.cpu, fast))
            if kernel is not None:
                library.impl(op.name, kernel, key)


def _same_schema(op: Operator) -> bool:
    # By text: schemas that only differ in ScalarType and int are equal.
    return str(_declared(op)) == str(op.overload._schema)


def _declared(op: Operator) -> torch.FunctionSchema:
    return torch._C.parse_schema(f"{NAMESPACE}::{op.schema}")


def _as_defined(op: Operator, function: Callable[..., Any]) -> Callable[..., Any] | None:
    """``function``, written for the schema declared here, for the schema that the operator has."""
    return function if _same_schema(op) else adapted(op.name, function, op.overload._schema, _declared(op))
