"""One call of an operator with data: the fake's argument checks, then the fastest kernel that takes it.

    torch.ops.npu.X(..) ──▶ fake's checks (once per signature) ──▶ compiled kernel ──▶ result
                                    │ raises                            │ NotImplemented, strict, autograd
                                    ▼                                   ▼
                               ValueError                       reference kernel ──▶ result

A fake reads no data, so what it says of a call holds for every call with the same signature: the shapes,
dtypes and strides of the tensors and the values of everything else. Signatures that passed are remembered.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final, Literal

import torch

KERNELS: Final = "NPU_FUSION_KERNELS"
Kind = Literal["compiled", "reference"]
KINDS: tuple[Kind, ...] = ("compiled", "reference")

# Serving meets one signature for each number of tokens. When there are more, the memory starts anew.
_REMEMBERED: Final = 4096

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = (int, float, bool, str, type(None))


def _kind(given: str, source: str) -> Kind:
    for kind in KINDS:
        if given == kind:
            return kind
    raise ValueError(f"{source} is {given!r}; accepted: {' or '.join(repr(kind) for kind in KINDS)}")


class _Choice:
    """Which kernels run in this process."""

    def __init__(self) -> None:
        self.kind = _kind(os.environ.get(KERNELS) or "compiled", KERNELS)


CHOICE = _Choice()


# Set while a graph runs that was compiled with numerics="strict".
_REFERENCE_ONLY: ContextVar[bool] = ContextVar("npu_fusion_reference_only", default=False)


def fast() -> bool:
    """Whether the next call may run another kernel than the reference."""
    return CHOICE.kind == "compiled" and not _REFERENCE_ONLY.get()


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with the reference kernels for every operator that it calls."""

    def run(*args: Any) -> Any:
        token = _REFERENCE_ONLY.set(True)
        try:
            return function(*args)
        finally:
            _REFERENCE_ONLY.reset(token)

    return run


class use:
    """Which kernels run: ``"compiled"`` where there are any (the default), or ``"reference"`` always.

    For the whole process, at once; as a context manager, until its end. ``NPU_FUSION_KERNELS`` sets it at
    import. The reference kernels are the executable specification; the compiled ones agree with them but for
    the last bit of sums and exponentials (docs/architecture.md has the limits).

    Raises ``ValueError`` for another name.
    """

    def __init__(self, kernels: str) -> None:
        self._kind = _kind(kernels, "kernels")
        # A first block ends with what was before the constructor, any other with what was before itself.
        self._restored = [CHOICE.kind]
        self._constructed = True
        CHOICE.kind = self._kind

    def __enter__(self) -> None:
        if not self._constructed:
            self._restored.append(CHOICE.kind)
        self._constructed = False
        CHOICE.kind = self._kind

    def __exit__(self, *exc: object) -> None:
        CHOICE.kind = self._restored.pop()


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """What a fake can know of a call, as a key; None where an argument is of a kind that has no such key."""
    key: list[Any] = [*kwargs]
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind in _TENSORS:
            key += (value.shape, value.dtype, value.stride())
        elif kind in _PLAIN:
            # 1, 1.0 and True are equal keys, and not equal arguments.
            key += (kind, value)
        elif kind is list and all(type(item) in _PLAIN for item in value):
            key += (kind, *value, kind)
        else:
            return None
    return tuple(key)


def _differentiated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether autograd records this call: the reference kernels are differentiable, the others are not."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())
    )


def checked(
    name: str,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    compiled: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """The kernel of operator ``name`` that the dispatcher calls. ``compiled`` may return NotImplemented."""
    passed: set[tuple[Any, ...]] = set()

    def call(*args: Any, **kwargs: Any) -> Any:
        key = signature(args, kwargs)
        if key not in passed:
            fake(*args, **kwargs)
            if key is not None:
                if len(passed) >= _REMEMBERED:
                    passed.clear()
                passed.add(key)
        if compiled is not None and fast() and not _differentiated(args, kwargs):
            result = compiled(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return reference(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call
