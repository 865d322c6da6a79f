"""What every operator must pass, whatever it computes: opcheck, fake against real, dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import npu_fusion  # noqa: F401  (registers the operators)

_ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def overload(name: str) -> torch._ops.OpOverload:
    """``npu_swiglu`` or ``npu_format_cast.Tensor`` as the callable overload."""
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.npu, packet), variant or "default")


def check_operator(name: str, *args: Any, **kwargs: Any) -> Any:
    """Run all of ``torch.library.opcheck`` on one call, compare fake with real, return the real result.

    opcheck covers the schema (no mutation, no aliasing), the autograd registration, the fake kernel and
    AOT dispatch with symbolic shapes. It does not compare strides of every output, so this does.
    """
    op = overload(name)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    float8 = any(t.is_floating_point() and t.element_size() == 1 for t in tensors)
    # test_schema compares arguments by arithmetic that float8 does not have.
    torch.library.opcheck(op, args, kwargs, test_utils=_ALL[1:] if float8 else _ALL)
    before = [_bytes(t) for t in tensors] if float8 else []
    real = op(*args, **kwargs)
    if float8:
        assert all(torch.equal(_bytes(t), b) for t, b in zip(tensors, before, strict=True))
    compare_fake_and_real(name, real, *args, **kwargs)
    return real


def compare_fake_and_real(name: str, real: Any, *args: Any, **kwargs: Any) -> None:
    """Assert that the fake kernel predicts shape, dtype, device and stride of every output in ``real``."""
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        fake = overload(name)(*fake_args, **fake_kwargs)
    predicted, fake_spec = pytree.tree_flatten(fake)
    computed, real_spec = pytree.tree_flatten(real)
    assert fake_spec == real_spec, f"{name}: fake returns {fake_spec}, the kernel {real_spec}"
    for index, (f, r) in enumerate(zip(predicted, computed, strict=True)):
        promised = (tuple(f.shape), f.dtype, f.device, _addressing_strides(f))
        given = (tuple(r.shape), r.dtype, r.device, _addressing_strides(r))
        assert promised == given, f"{name}: output {index}: fake says {promised}, the kernel gives {given}"


def check_refused(name: str, match: str, *args: Any, **kwargs: Any) -> None:
    """Assert that the call raises a ``ValueError`` that names the operator and matches, eager and traced."""
    with pytest.raises(ValueError, match=f"(?s)^{name.partition('.')[0]}: .*{match}"):
        overload(name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
        with pytest.raises(ValueError, match=match):
            overload(name)(*fake_args, **fake_kwargs)


def _bytes(tensor: Tensor) -> Tensor:
    """A copy of the data, in a dtype that can be compared."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def _addressing_strides(tensor: Tensor) -> list[int]:
    """The strides that reach an element: those of sizes 0 and 1 are arbitrary."""
    if tensor.numel() == 0:
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def compile_dynamic(
    fn: Callable[..., Any],
    make_args: Callable[[int], Sequence[Any]],
    sizes: Sequence[int],
    dynamic: Sequence[tuple[int, int]] = ((0, 0),),
) -> None:
    """Compile ``fn`` once, run it at every size, and require eager's bits from one single graph.

    ``make_args(size)`` builds the arguments; ``dynamic`` lists (argument, dimension) pairs that follow
    ``size`` (default: dimension 0 of the first argument). They are marked dynamic, so a kernel that
    specializes one of them raises. ``sizes`` must be at least 2 each: PyTorch always specializes 0 and 1.
    """
    assert len(set(sizes)) > 1, "give two or more different sizes"
    assert min(sizes) >= 2, "0 and 1 are always specialized"
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, backend=counter, fullgraph=True)
    for size in sizes:
        args = list(make_args(size))
        expected = fn(*args)
        for argument, dim in dynamic:
            torch._dynamo.mark_dynamic(args[argument], dim)
        result = compiled(*args)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert counter.frame_count == 1, f"compiled {counter.frame_count} graphs for the sizes {list(sizes)}"
