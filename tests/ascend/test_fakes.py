"""The fakes of this package against the Meta kernels of the real torch_npu."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import sympy
import torch
import torch.utils._pytree as pytree
import torch_npu
from hypothesis import assume, given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch_npu.op_plugin.meta import _meta_registrations

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.meta_impls._registry import OPERATORS
from tests.ascend._contradictions import (
    DIFFERS,
    FIXED_SIZES,
    KEEPS_ORDER,
    LAXER,
    NOT_COMPUTED,
    SPECIALIZES,
)
from tests.ascend._inputs import Case
from tests.ascend._inputs_families import CASES

ACCEPTED = [case for case in CASES if case.accepted]

# The operators of torch_npu 2.13.0 that have no Meta kernel: there the fake of this package is in effect.
WITHOUT_META = {"npu_format_cast", "npu_format_cast.Tensor"}

# What _meta_registrations calls Ascend 910B, and the first of the Ascend 950.
ASCEND_910B, ASCEND_950 = 220, 260


def _name(case: Case) -> str:
    return f"{case.operator}: {case.label}"


def _named(case: Case, entries: Any) -> bool:
    return any(case.operator in entry.operators and case.label in entry.labels for entry in entries)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some Meta kernels ask for the chip and the CANN version; the answer belongs to the case."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    mxfp8 = case is not None and case.arguments.get("weight_quant_mode") == 3
    monkeypatch.setattr(_meta_registrations, "get_soc_version", lambda: ASCEND_950 if mxfp8 else ASCEND_910B)
    monkeypatch.setattr(_meta_registrations, "get_cann_version", lambda: "8.5.0")
    monkeypatch.setattr(torch_npu.npu.utils, "_is_gte_cann_version", lambda version, module: True)


def _outputs(function: Callable[..., Any], case: Case) -> list[tuple[Any, torch.dtype]]:
    args, kwargs = case.call()
    return _described(function(*args, **kwargs))


def _described(outputs: Any) -> list[tuple[Any, torch.dtype]]:
    return [(tuple(t.shape), t.dtype) for t in _tensors(outputs)]


@pytest.mark.parametrize("case", [case for case in ACCEPTED if not _named(case, DIFFERS)], ids=_name)
def test_the_order_of_results_in_memory(case: Case) -> None:
    operator = OPERATORS[case.operator]
    args, kwargs = case.call()
    ours, theirs = (
        [t.stride() for t in _tensors(f(*args, **kwargs))] for f in (operator.fake, operator.overload)
    )
    strided = any(not t.is_contiguous() for t in _tensors((args, kwargs)))
    assert (ours == theirs) != (strided and case.operator in KEEPS_ORDER)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _refuses(call: Callable[[], Any]) -> bool:
    """Whether a Meta kernel raises; besides its own errors those of Python for values it did not expect."""
    try:
        call()
    except (RuntimeError, IndexError, TypeError, AttributeError):
        return True
    return False


def test_every_operator_is_in_the_grid_and_what_has_no_meta_kernel_is_known() -> None:
    assert {case.operator for case in CASES} == OPERATORS.keys()
    origin = {name: torch._C._dispatch_dump(f"npu::{name}") for name in OPERATORS}
    assert {name for name, text in origin.items() if "_meta_registrations.py" not in text} == WITHOUT_META


def test_no_call_of_the_grid_is_there_twice() -> None:
    names = [_name(case) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", ACCEPTED, ids=_name)
def test_accepted_calls_agree(case: Case) -> None:
    operator = OPERATORS[case.operator]
    ours = _outputs(operator.fake, case)
    for entry in DIFFERS:
        if case.operator in entry.operators and case.label in entry.labels:
            if entry.refused:
                assert _refuses(lambda: _outputs(operator.overload, case)), entry.reason
            else:
                assert _outputs(operator.overload, case) != ours, f"no longer true: {entry.reason}"
            return
    assert _outputs(operator.overload, case) == ours


@pytest.mark.parametrize("case", [case for case in CASES if not case.accepted], ids=_name)
def test_refused_calls_agree(case: Case) -> None:
    operator = OPERATORS[case.operator]
    with pytest.raises(ValueError, match=f"^{case.operator.partition('.')[0]}: "):
        _outputs(operator.fake, case)
    if case.operator in WITHOUT_META:
        with pytest.raises(ValueError, match=f"^{case.operator}: "):
            _outputs(operator.overload, case)
        return
    laxer = [entry for entry in LAXER if case.operator in entry.operators]
    refused = any(case.label in entry.refused for entry in laxer)
    assert _refuses(lambda: _outputs(operator.overload, case)) == refused, laxer


def test_the_table_names_calls_of_the_grid() -> None:
    grid = {(case.operator, case.label): case.accepted for case in CASES}
    for entry in (*NOT_COMPUTED, *DIFFERS):
        for name in entry.operators:
            for label in entry.labels:
                assert grid[name, label] == (entry in DIFFERS), (name, label)
    for known in SPECIALIZES:
        assert {(name, label) for name in known.operators for label in known.labels} <= grid.keys()
    assert FIXED_SIZES.keys() <= grid.keys()
    for laxer in LAXER:
        for name in laxer.operators:
            for label in laxer.refused:
                assert grid[name, label] is False, (name, label)
                assert not any(name in e.operators and label in e.labels for e in NOT_COMPUTED)
    listed = [name for laxer in LAXER for name in laxer.operators]
    assert sorted(listed) == sorted(OPERATORS.keys() - WITHOUT_META)


# Fewer examples find less, and these are cheap: no example computes anything.
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_the_fake_accepts_the_meta_kernel_answers_alike(data: st.DataObject) -> None:
    """A call of the grid with one tensor changed at random: other sizes, another rank or another dtype."""
    agreed = [c for c in ACCEPTED if not _named(c, DIFFERS) and c.arguments.get("weight_quant_mode") != 3]
    case = data.draw(st.sampled_from(agreed), "call")
    tensors = {name: value for name, value in case.arguments.items() if isinstance(value, Tensor)}
    name = data.draw(st.sampled_from(sorted(tensors)), "argument")
    changed = data.draw(_tensor_like(tensors[name]), "value")
    call = Case(case.operator, case.label, {**case.arguments, name: changed}, True)
    operator = OPERATORS[case.operator]
    try:
        ours = _outputs(operator.fake, call)
    except ValueError:
        return
    # An empty batch of npu_quant_matmul is one of the known contradictions.
    assume(case.operator != "npu_quant_matmul" or 0 not in ours[0][0][:-2])
    assert _outputs(operator.overload, call) == ours


def _tensor_like(tensor: Tensor) -> st.SearchStrategy[Tensor]:
    sizes = st.sampled_from(sorted({0, 1, 2, 3, 8, 16, 32, *tensor.shape}))
    shapes = st.one_of(
        st.just(list(tensor.shape)),
        st.lists(sizes, max_size=5),
        st.tuples(*(st.one_of(st.just(size), sizes) for size in tensor.shape)),
    )
    dtypes = st.one_of(
        st.just(tensor.dtype),
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64]),
    )
    return st.builds(lambda s, d: torch.empty(tuple(s), dtype=d, device="meta"), shapes, dtypes)


@pytest.mark.parametrize("case", [case for case in ACCEPTED if not _named(case, DIFFERS)], ids=_name)
def test_symbolic_sizes_agree_and_stay_symbolic(case: Case) -> None:
    operator = OPERATORS[case.operator]
    ours, fixed = _symbolic(operator.fake, case)
    assert set(fixed.values()) == FIXED_SIZES.get((case.operator, case.label), set())
    theirs, specialized = _symbolic(operator.overload, case)
    assert specialized == {}
    agree = _at_other_sizes(ours, fixed) == _at_other_sizes(theirs, fixed)
    assert agree != _named(case, SPECIALIZES)


def _symbolic(
    function: Callable[..., Any], case: Case
) -> tuple[list[tuple[sympy.Expr, ...]], dict[sympy.Symbol, int]]:
    """The output shapes for inputs of any size (equal sizes stay equal), and the symbols that got numbers."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:

        def fake(tensor: Tensor) -> Tensor:
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * tensor.dim())
            return mode.from_tensor(tensor, symbolic_context=context)

        args, kwargs = pytree.tree_map_only(Tensor, fake, case.call())
        outputs = _tensors(function(*args, **kwargs))
    shapes = [tuple(env.replace(_expression(size)) for size in output.shape) for output in outputs]
    return shapes, {symbol: int(to) for symbol, to in env.replacements.items() if to.is_number}


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _at_other_sizes(shapes: list[tuple[sympy.Expr, ...]], fixed: dict[sympy.Symbol, int]) -> list[list[int]]:
    """The shapes with a number for each symbol, the same in both answers, that any size divides."""
    symbols = sorted({s for shape in shapes for size in shape for s in size.free_symbols}, key=str)
    values = {symbol: fixed.get(symbol, 64 * zlib.crc32(symbol.name.encode())) for symbol in symbols}
    return [[int(size.subs(values)) for size in shape] for shape in shapes]
