"""Graphs on the CPU write their caches in place where nothing can tell the difference, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

import npu_fusion
from npu_fusion.hosts import _in_place, _run, inductor
from npu_fusion.hosts._in_place import write_in_place
from tests.passes._mla import Prolog, Spelling, inputs
from tests.passes.test_kv_rmsnorm_rope_cache import Keys

npu = torch.ops.npu
PROLOG, CACHE = npu.npu_mla_prolog_v3.default, npu.npu_kv_rmsnorm_rope_cache_v2.default
FUNCTIONAL = npu.npu_kv_rmsnorm_rope_cache_v2_functional.default
COPY = torch.ops.aten.copy_.default


class WithoutCaches(nn.Module):
    """A layer whose caller does not get copies of the caches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Any:
        return self.layer(*args)[:-2]


def compiled(model: nn.Module, args: list[Tensor], host: str, dynamic: bool) -> tuple[Any, set[Any]]:
    """What the compiled model returns, and the operators of its graph after the rewrite."""
    found: set[Any] = set()

    def keep(graph: fx.Graph) -> None:
        write_in_place(graph)
        found.update(node.target for node in graph.nodes)

    torch._dynamo.reset()
    backend = npu_fusion.get_npu_backend(fusion_config={"strict": True}, host=host)
    with (
        torch.no_grad(),
        mock.patch.object(_run, "write_in_place", keep),
        mock.patch.object(inductor, "write_in_place", keep),
    ):
        return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args), found


@pytest.mark.by_turns("host", "dynamic")
@pytest.mark.parametrize("host", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("layer", "cache", "operator"),
    [
        (Prolog, "paged_put", PROLOG),
        (Prolog, "scatter_nd", PROLOG),
        (Prolog, "static_copy", PROLOG),
        (Keys, "paged_copy", CACHE),
        (Keys, "static_slice", CACHE),
    ],
)
def test_caches_are_written_in_place(
    layer: type[Prolog],
    cache: str,
    operator: Any,
    dynamic: bool,
    host: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    own = layer(Spelling(cache=cache))
    model = WithoutCaches(own)
    args = inputs(own)
    eager = [a.clone() for a in args]
    expected = model(*eager)
    places = [a.data_ptr() for a in args]
    result, found = compiled(model, args, host, dynamic)
    assert operator in found
    assert COPY not in found
    assert places == [a.data_ptr() for a in args]
    for have, want in zip((*result, *args[-2:]), (*expected, *eager[-2:]), strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=4e-2)


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_a_returned_cache_is_a_tensor_of_its_own(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Keys(Spelling(cache="static_copy"))
    args = inputs(model)
    result, found = compiled(model, args, host, False)
    assert CACHE not in found
    for new, cache in zip(result[-2:], args[-2:], strict=True):
        torch.testing.assert_close(new, cache, rtol=0, atol=0)
        assert new.untyped_storage().data_ptr() != cache.untyped_storage().data_ptr()


def test_a_second_compilation_comes_from_inductors_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    own = Prolog(Spelling())
    args = inputs(own)
    first = [a.clone() for a in args]
    _, found = compiled(WithoutCaches(own), first, "inductor", False)
    second = [a.clone() for a in args]
    _, again = compiled(WithoutCaches(own), second, "inductor", False)
    assert PROLOG in found
    assert again == set()  # no pass has run
    for a, b in zip(first[-2:], second[-2:], strict=True):
        assert torch.equal(a, b)


# -- one graph each, made of a call ----------------------------------------------------------------------

PAGES, SIZE, DV, DR, ROWS = 4, 4, 32, 16, 3


def arguments() -> list[Tensor]:
    """kv, gamma, cos, sin, index, k_cache, ckv_cache"""
    g = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    angles = [floats(1, 1, ROWS, DR) for _ in range(2)]
    caches = [floats(PAGES, SIZE, 1, DR), floats(PAGES, SIZE, 1, DV)]
    return [floats(1, 1, ROWS, DV + DR), floats(DV), *angles, torch.tensor([5, 0, 7]), *caches]


def written(function: Callable[..., Any], args: list[Tensor]) -> bool:
    """Whether the call of ``function`` writes in place, which must not change what comes out."""
    gm = make_fx(functionalize(function, remove="mutations"), tracing_mode="fake")(*args)
    assert gm.graph.find_nodes(op="call_function", target=FUNCTIONAL)
    write_in_place(gm.graph)
    gm.recompile()
    have, want = [a.clone() for a in args], [a.clone() for a in args]
    results, expected = gm(*have), function(*want)
    for a, b in zip((*results, *have), (*expected, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    in_place = bool(gm.graph.find_nodes(op="call_function", target=CACHE))
    assert in_place != bool(gm.graph.find_nodes(op="call_function", target=FUNCTIONAL))
    assert in_place != bool(gm.graph.find_nodes(op="call_function", target=COPY))
    return in_place


def new_caches(*args: Tensor) -> tuple[Tensor, ...]:
    return npu.npu_kv_rmsnorm_rope_cache_v2_functional(*args, cache_mode="PA")


def plain(*args: Tensor) -> tuple[Tensor, ...]:
    k_embed, y, k, ckv = new_caches(*args)
    args[-2].copy_(k)
    args[-1].copy_(ckv)
    return k_embed, y


def test_a_call_and_its_copies() -> None:
    assert written(plain, arguments())


def test_caches_as_views() -> None:
    def function(*args: Tensor) -> tuple[Tensor, ...]:
        *rest, k_cache, ckv_cache = args
        *_, k, ckv = new_caches(*rest, k_cache.view(PAGES, SIZE, 1, DR), ckv_cache.unsqueeze(2))
        k_cache.copy_(k.reshape(-1, DR))
        ckv_cache.copy_(ckv.squeeze(2))
        return (k.sum(), ckv[0].mean())

    *rest, k_cache, ckv_cache = arguments()
    assert written(function, [*rest, k_cache.view(-1, DR), ckv_cache.squeeze(2)])


def test_readers_of_the_old_cache_before_and_of_the_new_one_after() -> None:
    def function(*args: Tensor) -> tuple[Tensor, ...]:
        before = args[-1].sum() + args[-2].view(-1)[3]
        k_embed, _, k, ckv = new_caches(*args)
        args[-2].copy_(k)
        args[-1].copy_(ckv)
        return before, k_embed, ckv.view(-1, DV) @ args[1], k * 2

    assert written(function, arguments())


def read_late(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args)
    late = args[-1].view(-1)[2:5] * 2
    args[-2].copy_(k)
    args[-1].copy_(ckv)
    return (late,)


def returned(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args)
    args[-2].copy_(k)
    args[-1].copy_(ckv)
    return (ckv.view(-1, DV),)


def one_is_kept(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args)
    args[-1].copy_(ckv)
    return (k * 1,)


def another_is_written_back(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args)
    args[-2].copy_(k)
    args[-1].copy_(ckv * 2)
    return (ckv.sum(),)


def part_of_an_input(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args[:-1], args[-1][1:])
    args[-2].copy_(k)
    args[-1][1:].copy_(ckv)
    return (ckv.sum(),)


def in_another_order(*args: Tensor) -> tuple[Tensor, ...]:
    """A square of pages and rows, written back with the two exchanged."""
    _, _, k, ckv = new_caches(*args)
    args[-2].copy_(k)
    args[-1].copy_(ckv.transpose(0, 1))
    return (ckv.sum(),)


def not_an_input(*args: Tensor) -> tuple[Tensor, ...]:
    _, _, k, ckv = new_caches(*args[:-1], args[-1] * 2)
    args[-2].copy_(k)
    args[-1].copy_(ckv)
    return (ckv.sum(),)


@pytest.mark.parametrize(
    "function",
    [
        read_late,
        returned,
        one_is_kept,
        another_is_written_back,
        part_of_an_input,
        in_another_order,
        not_an_input,
    ],
)
def test_near_misses(function: Callable[..., Any]) -> None:
    args = arguments()
    if function is part_of_an_input:
        args[-1] = torch.cat((args[-1][:1], args[-1]))
    assert not written(function, args)


@pytest.mark.parametrize("dense", [True, False])
def test_a_cache_that_is_not_contiguous(dense: bool) -> None:
    """The operator returns contiguous caches, so what is written back has another order in memory."""
    *rest, ckv_cache = arguments()
    wide = ckv_cache if dense else torch.cat((ckv_cache, ckv_cache), dim=-1)[..., :DV]
    gm = make_fx(functionalize(plain, remove="mutations"), tracing_mode="fake")(*rest, wide)
    write_in_place(gm.graph)
    assert bool(gm.graph.find_nodes(op="call_function", target=CACHE)) == dense


def test_two_calls_in_a_row_on_the_same_caches() -> None:
    """The second writes what the first has made; neither may write into the input before that."""

    def function(*args: Tensor) -> tuple[Tensor, ...]:
        *rest, k_cache, ckv_cache = args
        _, _, k, ckv = new_caches(*rest, k_cache, ckv_cache)
        rest[4] = rest[4] + 1
        _, _, k, ckv = new_caches(*rest, k, ckv)
        k_cache.copy_(k)
        ckv_cache.copy_(ckv)
        return (k.sum(),)

    assert not written(function, arguments())


def test_every_operator_has_the_results_of_its_functional_form_but_for_the_caches() -> None:
    for functional, (in_place, caches) in _in_place._OPERATORS.items():
        names = [a.name for a in functional._schema.arguments]
        assert names == [a.name for a in in_place._schema.arguments]
        kept = len(in_place._schema.returns)
        assert sorted(caches.values()) == list(range(kept, len(functional._schema.returns)))
        mutated = [i for i, a in enumerate(in_place._schema.arguments) if a.alias_info is not None]
        assert mutated == sorted(caches)
