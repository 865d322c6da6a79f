"""npu_fusion.explain: nothing is executed, everything is reported."""

from __future__ import annotations

import pytest
import torch

import npu_fusion
from tests.models.w8a8 import merged, separate


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_it_counts_what_would_fuse(dynamic: bool | None) -> None:
    report = npu_fusion.explain(merged(), torch.randn(4, 64), dynamic=dynamic)
    assert report.fused == {"npu_dynamic_quant": 1, "npu_dequant_swiglu_quant": 1}
    assert report.dry_run


def test_it_names_the_reason_and_the_line_of_the_users_code() -> None:
    report = npu_fusion.explain(separate(), torch.randn(4, 64))
    (refusal,) = [r for r in report.refused if r.fusion == "dequant_swiglu_quant"]
    assert refusal.reason == "gate and up are two separate matmuls of the same input"
    assert "npu_fusion.prepare(model)" in refusal.detail
    assert refusal.source is not None
    path, _, line = refusal.source.rpartition(":")
    assert path.endswith("tests/models/w8a8.py")
    with open(path) as file:
        assert "self.down(F.silu(self.gate(x)) * self.up(x))" in file.read().splitlines()[int(line) - 1]


_RUNS: list[tuple[int, ...]] = []


@torch.library.custom_op("npu_fusion_tests::counted", mutates_args=())
def _counted(x: torch.Tensor) -> torch.Tensor:
    _RUNS.append(tuple(x.shape))
    return x.clone()


@_counted.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_no_operator_of_the_model_is_executed() -> None:
    model, x = merged(), torch.randn(4, 64)

    def counted(x: torch.Tensor) -> torch.Tensor:
        return model(_counted(x))

    counted(x)
    assert _RUNS == [(4, 64)]  # a real execution is seen
    assert npu_fusion.explain(counted, x).fused["npu_dequant_swiglu_quant"] == 1
    assert _RUNS == [(4, 64)]


def test_buffers_and_inputs_keep_their_values() -> None:
    class Cache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state.add_(x)
            return self.state * 2

    model, x = Cache(), torch.ones(4)
    npu_fusion.explain(model, x)
    assert torch.equal(model.state, torch.ones(4))


def test_graph_breaks_are_followed() -> None:
    first, second = merged(), merged()

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    report = npu_fusion.explain(broken, torch.randn(4, 64))
    assert report.graph == "2 graphs"
    assert report.fused["npu_dequant_swiglu_quant"] == 2


def test_a_compiled_model_can_be_explained() -> None:
    report = npu_fusion.explain(torch.compile(merged()), torch.randn(4, 64))
    assert report.fused["npu_dequant_swiglu_quant"] == 1


def test_it_can_be_called_more_often_than_dynamo_recompiles() -> None:
    model, x = merged(), torch.randn(4, 64)
    for _ in range(10):
        assert npu_fusion.explain(model, x).fused["npu_dequant_swiglu_quant"] == 1


def test_an_expectation_is_checked_over_all_graphs() -> None:
    with pytest.raises(
        npu_fusion.FusionExpectationError, match="npu_dequant_swiglu_quant: 1 instead of 2"
    ) as failure:
        npu_fusion.explain(
            merged(), torch.randn(4, 64), fusion_config={"expect": {"npu_dequant_swiglu_quant": 2}}
        )
    assert failure.value.report.fused["npu_dequant_swiglu_quant"] == 1


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="fn_or_module is a int; accepted: a function or torch.nn.Module"):
        npu_fusion.explain(3)  # type: ignore[arg-type]
