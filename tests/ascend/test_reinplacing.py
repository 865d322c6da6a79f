"""ACL graphs: torchair and npugraph_ex replace functional operators by those that write their caches."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
import torchair

import npu_fusion
from npu_fusion import targets
from tests.passes._mla import Prolog, Spelling, inputs
from tests.passes.test_kv_rmsnorm_rope_cache import Keys, Read

npu = torch.ops.npu
PROLOG, CACHE = npu.npu_mla_prolog_v3.default, npu.npu_kv_rmsnorm_rope_cache_v2.default
COPY = torch.ops.aten.copy_.default


def configuration(package: str) -> Any:
    if package == "npugraph_ex":
        return None
    config = torchair.CompilerConfig()
    config.mode = "reduce-overhead"
    return config


@pytest.mark.parametrize("package", ["torchair", "npugraph_ex"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("layer", "cache", "operator"),
    [
        (Prolog, "paged_put", PROLOG),
        (Prolog, "scatter_nd", PROLOG),
        (Prolog, "static_copy", None),  # the operator reads the caches as pages: a view of the input
        (Keys, "scatter_nd", CACHE),
        (Keys, "static_copy", CACHE),
        (Read, "paged_put", CACHE),
        (Read, "static_copy", None),
    ],
)
def test_caches_are_written_in_place(
    layer: type[Prolog], cache: str, operator: Any, dynamic: bool, package: str
) -> None:
    module = importlib.import_module(f"{package}._acl_concrete_graph.fx2acl_converter")
    optimize = module.AclConcreteGraph.optimize_graph_without_runtime
    kept: list[set[Any]] = []

    def keep(graph: Any, *args: Any, **options: Any) -> None:
        optimize(graph, *args, **options)
        kept.append({node.target for node in graph.fx_graph.graph.nodes})

    torch._dynamo.reset()
    model = layer(Spelling(cache=cache))
    args = inputs(model)
    eager = [a.clone() for a in args]
    backend = npu_fusion.get_npu_backend(configuration(package), {"strict": True}, host=package)
    with (
        torch.no_grad(),
        mock.patch.object(module.AclConcreteGraph, "optimize_graph_without_runtime", keep),
        mock.patch.object(targets, "detect", return_value=None),
    ):
        expected = model(*eager)
        result = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    (found,) = kept
    assert (COPY in found) == (operator is None)
    assert found & {PROLOG, CACHE} == ({operator} if operator is not None else set())
    for have, want in zip((*result, *args[-2:]), (*expected, *eager[-2:]), strict=True):
        torch.testing.assert_close(have, want, rtol=2e-2, atol=4e-2)
