"""The Inductor host: its cache stays correct, reports survive cache hits, a user's own pass still runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import npu_fusion
from npu_fusion.config import FusionConfig
from npu_fusion.hosts.inductor import FusionPass
from tests.models.w8a8 import merged

FUSED = {"npu_dynamic_quant": 1, "npu_dequant_swiglu_quant": 1}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()


def _compiled(**config: object) -> tuple[npu_fusion.FusionReport, torch.Tensor]:
    torch._dynamo.reset()
    backend = npu_fusion.get_npu_backend(host="inductor", fusion_config=config)
    torch.manual_seed(1)
    x = torch.randn(4, 64)
    with torch.no_grad():
        result = torch.compile(merged(), backend=backend)(x)
    (report,) = backend.reports
    return report, result


def test_a_second_compilation_comes_from_the_cache_with_its_report() -> None:
    first, result = _compiled()
    second, again = _compiled()
    assert not first.from_cache
    assert second.from_cache
    assert first.fused == second.fused == FUSED
    assert torch.equal(result, again)


def test_another_config_is_never_served_from_the_cache() -> None:
    with_fusion, result = _compiled()
    without, plain = _compiled(dequant_swiglu_quant=False)
    assert with_fusion.fused == FUSED
    assert "npu_dequant_swiglu_quant" not in without.fused
    assert not without.from_cache
    torch.testing.assert_close(result, plain)


def test_a_cached_graph_whose_report_is_gone_is_compiled_afresh(tmp_path: Path) -> None:
    _compiled()
    for path in (tmp_path / "cache" / "npu_fusion").iterdir():
        path.unlink()
    report, _ = _compiled()
    assert not report.from_cache
    assert report.fused == FUSED


def test_an_expectation_holds_for_cached_graphs_too() -> None:
    _compiled()
    with pytest.raises(Exception, match="npu_dequant_swiglu_quant: 1 instead of 2"):
        _compiled(expect={"npu_dequant_swiglu_quant": 2})


class _Counting(CustomGraphPass):
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(any("npu_dequant_swiglu_quant" in str(n.target) for n in graph.nodes))

    def uuid(self) -> str:
        return "counting"


def test_a_pass_that_the_user_set_runs_first() -> None:
    counting = _Counting()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=counting):
        report, _ = _compiled()
    assert counting.seen == [False]
    assert report.fused == FUSED


def test_a_plain_function_of_the_user_runs_and_switches_the_cache_off() -> None:
    seen: list[int] = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: seen.append(len(graph.nodes))):
        first, _ = _compiled()
        second, _ = _compiled()
    assert len(seen) == 2
    assert not first.from_cache
    assert not second.from_cache


def test_the_uuid_is_that_of_version_and_config() -> None:
    def uuid(**fields: object) -> object:
        return FusionPass(FusionConfig(**fields), "g", lambda report: None, True).uuid()  # type: ignore[arg-type]

    assert uuid() == uuid(dump_dir="elsewhere")
    assert uuid() != uuid(swiglu=False)
    assert FusionPass(FusionConfig(), "g", lambda r: None, True, before=lambda g: None).uuid() is None


def test_options_of_inductor_reach_it() -> None:
    with pytest.raises(ValueError, match="has no key 'max_autotunee'"):
        npu_fusion.get_npu_backend(host="inductor", compiler_config={"max_autotunee": True})
    backend = npu_fusion.get_npu_backend(host="inductor", compiler_config={"fx_graph_cache": False})
    with torch.no_grad():
        torch.compile(merged(), backend=backend)(torch.randn(4, 64))
    assert backend.reports[0].fused == FUSED


def test_a_training_graph_and_an_inference_graph_do_not_share_their_report() -> None:
    def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a, b = (x @ w.t()).chunk(2, -1)
        return torch.nn.functional.silu(a) * b

    def fused(training: bool) -> dict[str, int]:
        torch._dynamo.reset()
        backend = npu_fusion.get_npu_backend(host="inductor")
        w = torch.ones(64, 32, requires_grad=training)
        torch.compile(gated, backend=backend)(torch.randn(8, 32), w)
        return backend.reports[0].fused

    assert [fused(training) for training in (False, True, False, True)] == [{"npu_swiglu": 1}, {}] * 2
