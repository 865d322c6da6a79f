"""Which operator read what, in one forward of a module: a record of the forward, in the order it ran.

::

    model.layers.0 ──── aten.pow, aten.mean, aten.rsqrt, aten.mul, aten.mul   in input_layernorm
                   ──── linear q_proj, linear k_proj, linear v_proj           in self_attn
                   ──── aten.view, ...

The forward itself is run, so any Python is fine: there is no tracing by proxies, no export. Below autograd a
mode sees each ATen operator, and hooks of modules see which module is running. A call of an ``nn.Linear`` is
one step, whatever operators it is made of.

Tensors are told apart by memory, not by object: a view has the storage of its base, so views need no
treatment at all, and writing into a view is writing into the base. No tensor is kept alive but integers and
booleans (indices and masks); of the others only sizes and strides are noted. A weak reference to each storage
keeps its address from being used again, so that one address is one storage.

What it does not see: values that leave PyTorch (``tensor.numpy()``), and tensors that are handed on in
attributes of modules or in objects other than tuples, lists, and mappings; of those it does not know who
could read them later.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from npu_fusion.quantization.smoothing._running import evaluating

COPIES = ("clone", "_to_copy")
"""Operators whose result is a copy of their input, perhaps in another dtype."""


@dataclass(frozen=True)
class Ref:
    """A tensor as a place in memory."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    tensor: Tensor | None = field(default=None, compare=False, repr=False)
    """Kept only for integers and booleans, and for tensors without strides (sparse ones)."""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.size:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """How many elements of the storage it reaches over, from the first."""
        if self.numel == 0:
            return 0
        pairs = zip(self.size, self.stride, strict=True)
        return self.offset + 1 + sum((size - 1) * stride for size, stride in pairs)

    def overlaps(self, other: Ref) -> bool:
        """They may have elements in common."""
        return self.storage == other.storage and self.offset < other.extent and other.offset < self.extent

    @property
    def rows(self) -> tuple[Any, ...]:
        """What two views of one storage have in common that are the same rows, in whatever leading sizes."""
        leading = [(n, s) for n, s in zip(self.size[:-1], self.stride[:-1], strict=True) if n != 1]
        merged: list[tuple[int, int]] = []
        for size, stride in sorted(leading, key=lambda pair: -pair[1]):
            if merged and merged[-1][1] == size * stride:
                size *= merged.pop()[0]
            merged.append((size, stride))
        return (self.offset, self.size[-1:], self.stride[-1:], tuple(merged))


@dataclass(frozen=True)
class Step:
    """An operator, or a call of an ``nn.Linear``: then ``linear`` is set, and ``args`` is its input alone."""

    index: int
    name: str
    """Of the operator in ATen without overload, without the underscore of in-place operators: ``mul``."""
    func: Any
    args: Sequence[Any]
    """With a :class:`Ref` for each tensor."""
    kwargs: Mapping[str, Any]
    reads: tuple[Ref, ...]
    writes: tuple[Ref, ...]
    """What it computed: new tensors, and those that it wrote into. Views are not there."""
    call: int
    """Index of the innermost call of a module that it ran in."""
    linear: nn.Linear | None = None


@dataclass(frozen=True)
class Call:
    """A call of a module other than an ``nn.Linear``."""

    module: nn.Module
    name: str


class Dataflow:
    """What one forward of ``module`` did. Made by :func:`trace`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps: list[Step] = []
        self.calls: list[Call] = []
        self.touching: dict[int, list[int]] = defaultdict(list)
        """Storage -> indices of the steps that read or write it, in order."""
        self.writing: dict[int, list[int]] = defaultdict(list)
        """Storage -> indices of the steps that write it, in order."""
        self.seen: dict[int, set[int]] = defaultdict(set)
        """Storage -> calls of modules that had it: computed it, were given it, or got it back."""
        self.zero: set[int] = set()
        """Storages from before the forward that it wrote into, and that held nothing but zeros until then."""
        self.outputs: tuple[Ref, ...] = ()
        self._linears: dict[nn.Linear, list[Step]] = {}

    def add(self, step: Step) -> None:
        self.steps.append(step)
        for storage in dict.fromkeys(ref.storage for ref in (*step.reads, *step.writes)):
            self.touching[storage].append(step.index)
        for storage in dict.fromkeys(ref.storage for ref in step.writes):
            self.writing[storage].append(step.index)
            self.seen[storage].add(step.call)
        if step.linear is not None and step.reads[0].numel:
            self._linears.setdefault(step.linear, []).append(step)

    def called(self) -> tuple[nn.Linear, ...]:
        """Every ``nn.Linear`` that was called with at least one row, in the order of their first calls."""
        return tuple(self._linears)

    def calls_of(self, linear: nn.Linear) -> Sequence[Step]:
        """Its calls with at least one row."""
        return self._linears.get(linear, ())

    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """The called linear layers, those that read one tensor together, in the order of the first calls.

        Reading through views of all of its rows or through copies in another dtype is reading it. A layer
        that was called with several tensors is in one group with all of their readers.
        """
        group_of: dict[Any, dict[nn.Linear, None]] = {}
        for linear in self.called():
            keys = [self.tensor(step.index, step.reads[0]) for step in self.calls_of(linear)]
            group = {linear: None}
            for other in [group_of[key] for key in keys if key in group_of]:
                if other is not group:
                    other.update(group)
                    group_of |= {key: other for key, own in group_of.items() if own is group}
                    group = other
            group_of.update(dict.fromkeys(keys, group))
        place_of = {linear: index for index, linear in enumerate(self.called())}
        groups = {id(group): sorted(group, key=place_of.__getitem__) for group in group_of.values()}
        return [tuple(group) for group in sorted(groups.values(), key=lambda group: place_of[group[0]])]

    def tensor(self, index: int, ref: Ref) -> tuple[Any, ...]:
        """A key of what ``ref`` holds when step ``index`` reads it; copies have the key of the original."""
        while True:
            writers = self.writers(ref.storage, index)
            if len(writers) == 1 and writers[0].name in COPIES and writers[0].reads:
                source, copy = writers[0].reads[0], writers[0].writes[0]
                if copy.rows == ref.rows and source.size[-1:] == ref.size[-1:] and source.numel == ref.numel:
                    index, ref = writers[0].index, source
                    continue
            return (ref.storage, len(writers), ref.rows)

    def writers(self, storage: int, before: int) -> list[Step]:
        """The steps that wrote into ``storage`` before step ``before``."""
        indices = self.writing.get(storage, [])
        return [self.steps[index] for index in indices[: bisect_left(indices, before)]]

    def written_after(self, storage: int, index: int) -> bool:
        """Whether a step after ``index`` wrote into ``storage``."""
        return max(self.writing.get(storage, ()), default=-1) > index

    def readers(self, ref: Ref) -> list[Step]:
        """The steps that read something of ``ref``, in order. A layer's calls do not count for its weight."""
        steps = (self.steps[index] for index in self.touching.get(ref.storage, ()))
        return [step for step in steps if any(read.overlaps(ref) for read in step.reads)]

    def source(self, linear: nn.Linear) -> str:
        """In words: what computed the tensor that ``linear`` read in its first call."""
        step = self.calls_of(linear)[0]
        storage, index = step.reads[0].storage, step.index
        while writers := self.writers(storage, index):
            last = writers[-1]
            if last.name not in COPIES or not last.reads:
                return self.describe(last)
            storage, index = last.reads[0].storage, last.index
        return "an input or a parameter of the traced module"

    def describe(self, step: Step) -> str:
        """``aten.add in layers.0.mlp``, or the name of a linear layer."""
        if step.linear is not None:
            return self.name(step.linear)
        place = self.calls[step.call].name
        operator = ".".join(str(step.func).split(".")[:2])  # without the overload
        return f"{operator} in {place}" if place else operator

    def name(self, module: nn.Module) -> str:
        return next((name for name, other in self.module.named_modules() if other is module), "?")


def trace(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Dataflow:
    """Run ``module(*args, **kwargs)`` once, in evaluation mode and without gradients, and record it.

    The module is left as it was, its modes too; a cache that is passed in gets its entries as in any forward.
    A few tokens are enough, and cheaper than many.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
        What the forward raises; hooks and modes are then as before.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"trace: module must be a torch.nn.Module, got {type(module).__name__}")
    recorder = _Recorder(module)
    with ExitStack() as stack:
        stack.enter_context(evaluating(module))
        stack.callback(recorder.close)
        recorder.watch()
        # What is compiled in the model (flex_attention compiles itself) would refuse to run below a mode.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(recorder)
        module(*args, **(kwargs or {}))
    return recorder.flow


def place(tensor: Tensor) -> Ref:
    """Where a tensor is."""
    if tensor.layout is not torch.strided:
        return Ref(-id(tensor), (), (), 0, tensor.dtype, tensor)
    kept = None if tensor.is_floating_point() or tensor.is_complex() else tensor
    storage = tensor.untyped_storage()._cdata
    return Ref(
        storage, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, kept
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def is_plain_linear(module: nn.Module) -> bool:
    """Its forward is ``F.linear`` of its input, weight and bias, and nothing else."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
    )


class _Recorder(TorchDispatchMode):
    # Operators such as flex_attention are recorded as steps of which nothing is known.
    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.flow = Dataflow(module)
        self._stack: list[int] = []
        self._in_linear = False
        self._handles: list[Any] = []
        # Holding these keeps addresses from being used for other storages; the data is freed as ever.
        self._storages: dict[int, StorageWeakRef] = {}

    def watch(self) -> None:
        for name, module in self.flow.module.named_modules():
            if is_plain_linear(module):
                # The hooks of others run outside of the two, so that what they do is seen.
                before = module.register_forward_pre_hook(self._linear_starts)
                after = module.register_forward_hook(
                    self._linear_ends, with_kwargs=True, prepend=True, always_call=True
                )
            else:
                before = module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: self._starts(m, name, (args, kwargs)),
                    with_kwargs=True,
                    prepend=True,
                )
                after = module.register_forward_hook(self._ends, always_call=True)
            self._handles += [before, after]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _starts(self, module: nn.Module, name: str, given: Any) -> None:
        self._stack.append(len(self.flow.calls))
        self.flow.calls.append(Call(module, name))
        for tensor in tensors_in(given):
            self.flow.seen[self._ref(tensor).storage].add(self._stack[-1])

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack or self.flow.calls[self._stack[-1]].module is not module:
            return  # a hook raised before the call began
        self._stack.pop()
        refs = [self._ref(tensor) for tensor in tensors_in(output)]
        for ref in refs:
            self.flow.seen[ref.storage].update(self._stack[-1:])
        if not self._stack:
            self.flow.outputs = tuple(refs)

    def _linear_starts(self, module: nn.Module, args: Any) -> None:
        self._in_linear = True

    def _linear_ends(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> None:
        begun, self._in_linear = self._in_linear, False
        if output is None or not begun:
            return  # it raised, and what catches the error has nothing of it
        x = self._ref(args[0] if args else kwargs["input"])
        self._record("linear", None, (x,), {}, (x,), (self._ref(output),), module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_linear:
            return func(*args, **kwargs)
        given = {id(t): self._ref(t) for t in tensors_in((args, kwargs))}
        written = [given[id(t)] for t in _written(func, args, kwargs)]
        for tensor in _written(func, args, kwargs):
            self._note_zeros(given[id(tensor)].storage, tensor)
        output = func(*args, **kwargs)
        sources = {ref.storage for ref in given.values()}
        results = [self._ref(tensor) for tensor in tensors_in(output)]
        written += [ref for ref in results if ref.storage not in sources]
        schema = getattr(func, "_schema", None)
        name = str(func) if schema is None else schema.name.split("::")[-1].removesuffix("_")
        self._record(
            name, func, _swapped(args, given), _swapped(kwargs, given), tuple(given.values()), tuple(written)
        )
        return output

    def _record(
        self,
        name: str,
        func: Any,
        args: Any,
        kwargs: Any,
        reads: tuple[Ref, ...],
        writes: tuple[Ref, ...],
        linear: Any = None,
    ) -> None:
        call = self._stack[-1] if self._stack else 0
        self.flow.add(Step(len(self.flow.steps), name, func, args, kwargs, reads, writes, call, linear))

    def _note_zeros(self, storage: int, tensor: Tensor) -> None:
        """A cache of zeros that was made before: what is not written of it in this forward stays zero."""
        if not self.flow.writers(storage, len(self.flow.steps)) and tensor.is_floating_point():
            count = tensor.untyped_storage().nbytes() // tensor.element_size()
            if not tensor.as_strided((count,), (1,), 0).any():
                self.flow.zero.add(storage)

    def _ref(self, tensor: Tensor) -> Ref:
        ref = place(tensor)
        if ref.storage > 0 and ref.storage not in self._storages:
            self._storages[ref.storage] = StorageWeakRef(tensor.untyped_storage())
        return ref


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes into, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def _swapped(value: Any, refs: Mapping[int, Ref]) -> Any:
    if isinstance(value, Tensor):
        return refs[id(value)]
    if isinstance(value, Mapping):
        return {key: _swapped(item, refs) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_swapped(item, refs) for item in value]
    return value
