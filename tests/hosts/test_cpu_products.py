from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import npu_fusion
from npu_fusion.hosts import _cpu_products, _run

INT_MM = torch.ops.aten._int_mm.default
QUANT_MATMUL = torch.ops.npu.npu_quant_matmul.default


def mlp(q: Tensor, weight: Tensor, channel: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    d = torch._int_mm(q, weight.t()).float() * channel * token
    gate, up = d.chunk(2, -1)
    s = F.silu(gate) * up
    scale = s.abs().amax(-1, keepdim=True) / 127
    return (s / scale).round().clamp(-128, 127).to(torch.int8), scale


@pytest.fixture
def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (5, 32), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (48, 32), dtype=torch.int8, generator=generator)
    return q, weight, torch.rand(48, generator=generator) * 1e-3, torch.rand(5, 1, generator=generator)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs as the hosts get them."""
    seen: list[fx.Graph] = []
    optimize = _run.optimize

    def spy(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        report = optimize(graph, *args, **kwargs)
        copied = fx.Graph()
        copied.graph_copy(graph, {})
        seen.append(copied)
        return report

    monkeypatch.setattr("npu_fusion.hosts.eager.optimize", spy)
    monkeypatch.setattr("npu_fusion.hosts.inductor.optimize", spy)
    return seen


def count(graph: fx.Graph, target: Any) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("host", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_product_before_a_fusion_runs_compiled(
    host: str, dynamic: bool, inputs: tuple[Tensor, ...], graphs: list[fx.Graph]
) -> None:
    with torch._inductor.utils.fresh_inductor_cache():
        backend = npu_fusion.get_npu_backend(host=host)
        compiled = torch.compile(mlp, backend=backend, dynamic=dynamic)
        with torch.no_grad():
            y, scale = compiled(*inputs)
    assert backend.reports[0].fused == {"npu_dequant_swiglu_quant": 1}
    assert count(graphs[0], INT_MM) == 0 and count(graphs[0], QUANT_MATMUL) == 1
    expected_y, expected_scale = mlp(*inputs)
    assert (y.int() - expected_y.int()).abs().max() <= 1
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    torch._dynamo.reset()


def test_a_graph_without_fusions_is_left_alone(inputs: tuple[Tensor, ...], graphs: list[fx.Graph]) -> None:
    backend = npu_fusion.get_npu_backend(host="eager")
    compiled = torch.compile(lambda q, w: torch._int_mm(q, w.t()) + 1, backend=backend)
    with torch.no_grad():
        compiled(*inputs[:2])
    assert count(graphs[0], INT_MM) == 1


def test_without_compiled_kernels_the_product_stays(
    inputs: tuple[Tensor, ...], graphs: list[fx.Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_products._library, "library", lambda: None)
    compiled = torch.compile(mlp, backend=npu_fusion.get_npu_backend(host="eager"))
    with torch.no_grad():
        compiled(*inputs)
    assert count(graphs[0], INT_MM) == 1
    torch._dynamo.reset()
