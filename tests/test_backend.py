"""get_npu_backend and backend="npu_fusion": hosts, reports, options, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import npu_fusion
from npu_fusion import _compat
from tests.models.w8a8 import merged, separate

FUSED = {"npu_dynamic_quant": 1, "npu_dequant_swiglu_quant": 1}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("host", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_is_fused_and_computes_the_same(host: str, dynamic: bool) -> None:
    model = merged()
    backend = npu_fusion.get_npu_backend(host=host)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 9) if dynamic else (5,):
            x = torch.randn(2, tokens, 64)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    assert [r.fused for r in backend.reports] == [FUSED]
    assert backend.reports[0].host == host
    assert backend.reports[0].operators_after["npu.npu_dequant_swiglu_quant"] == 1
    assert "aten.silu" not in backend.reports[0].operators_after


def test_the_registered_name_takes_options_and_keeps_reports() -> None:
    model, x = merged(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="npu_fusion", options={"host": "eager", "dynamic_quant": False})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert [r.fused for r in npu_fusion.reports()] == [{"npu_dequant_swiglu_quant": 1}]
    torch._dynamo.reset()
    assert npu_fusion.reports() == []


def test_the_registered_name_is_listed_by_dynamo() -> None:
    assert "npu_fusion" in torch._dynamo.list_backends()


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_a_graph_for_training_is_left_alone(host: str) -> None:
    model = merged()
    backend = npu_fusion.get_npu_backend(host=host)
    x = torch.randn(3, 64, requires_grad=True)
    torch.compile(lambda x: model(x * 2) + x, backend=backend)(x).sum().backward()
    assert x.grad is not None
    assert all(r.fused == {} for r in backend.reports)
    assert backend.reports[0].refused[0].reason == "the graph is traced for training"


def test_two_backends_in_one_process_do_not_meet() -> None:
    model, x = merged(), torch.randn(3, 64)
    on = npu_fusion.get_npu_backend(host="eager")
    off = npu_fusion.get_npu_backend(host="eager", fusion_config={"dequant_swiglu_quant": False})
    with torch.no_grad():
        torch.compile(model, backend=on)(x)
        torch.compile(model, backend=off)(x)
    assert on.reports[0].fused == FUSED
    assert "npu_dequant_swiglu_quant" not in off.reports[0].fused


def test_an_unmet_expectation_raises_with_the_near_misses() -> None:
    backend = npu_fusion.get_npu_backend(
        host="eager", fusion_config={"expect": {"npu_dequant_swiglu_quant": 1}}
    )
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as failure:
        torch.compile(separate(), backend=backend)(torch.randn(3, 64))
    error = failure.value.inner_exception
    assert isinstance(error, npu_fusion.FusionExpectationError)
    assert "npu_dequant_swiglu_quant: 0 instead of 1" in str(error)
    assert "gate and up are two separate matmuls of the same input" in str(error)
    assert "w8a8.py:" in str(error)


def test_dry_run_reports_and_changes_nothing() -> None:
    model, x = merged(), torch.randn(3, 64)
    backend = npu_fusion.get_npu_backend(host="eager", fusion_config={"dry_run": True})
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    report = backend.reports[0]
    assert report.fused == FUSED
    assert report.dry_run
    assert report.operators_after == report.operators_before


def test_verify_accepts_what_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = npu_fusion.get_npu_backend(host="eager", fusion_config={"verify": True})
    with torch.no_grad():
        torch.compile(merged(), backend=backend, dynamic=True)(torch.randn(3, 64))
    assert backend.reports[0].fused == FUSED


def test_verify_raises_on_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from npu_fusion.passes.compose import dequant_swiglu_quant

    original = dequant_swiglu_quant.token_scale

    def doubled(emitter: Any, factors: Any) -> Any:
        return emitter.call(torch.ops.aten.mul.Tensor, original(emitter, factors), 2)

    monkeypatch.setattr(dequant_swiglu_quant, "token_scale", doubled)
    backend = npu_fusion.get_npu_backend(host="eager", fusion_config={"verify": True})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as failure:
        torch.compile(merged(), backend=backend)(torch.randn(3, 64))
    assert isinstance(failure.value.inner_exception, npu_fusion.FusionVerificationError)
    assert "dequant_swiglu_quant" in str(failure.value.inner_exception)


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_a_dump_has_code_json_and_html(tmp_path: Path, host: str) -> None:
    backend = npu_fusion.get_npu_backend(host=host, fusion_config={"dump_dir": str(tmp_path)})
    with (
        torch.no_grad(),
        _compat.without_compile_caches(),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        torch.compile(merged(), backend=backend)(torch.randn(3, 64))
    (folder,) = tmp_path.iterdir()
    names = {p.name for p in folder.iterdir()}
    assert {"0_before.py", "report.json", "report.html"} <= names
    after = next(p for p in folder.iterdir() if p.name.endswith("after.py"))
    assert "npu_dequant_swiglu_quant" in after.read_text()
    assert "npu_dequant_swiglu_quant" not in (folder / "0_before.py").read_text()
    assert json.loads((folder / "report.json").read_text())["fused"] == FUSED


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"host": "tensorrt"}, ValueError, "host is 'tensorrt'; accepted: 'auto', 'torchair'"),
        ({"host": "torchair", "compiler_config": {}}, TypeError, "accepted: a torchair.CompilerConfig"),
        ({"fusion_config": {"swigluu": True}}, ValueError, "no key 'swigluu'"),
        ({"fusion_config": 3}, TypeError, "fusion_config is a int"),
        ({"host": "inductor", "compiler_config": 3}, TypeError, "compiler_config is a int"),
        (
            {"host": "inductor", "compiler_config": {"nope": 1}},
            ValueError,
            "compiler_config has no key 'nope'",
        ),
        ({"host": "eager", "compiler_config": {}}, ValueError, "host='eager'; accepted: None"),
    ],
)
def test_bad_input_is_refused_at_once(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        npu_fusion.get_npu_backend(**arguments)


@pytest.mark.parametrize("host", ["torchair", "npugraph_ex"])
def test_a_host_that_is_not_installed_is_refused_at_once(host: str) -> None:
    with pytest.raises(ImportError, match=f"host='{host}' needs torch_npu with {host}"):
        npu_fusion.get_npu_backend(host=host)


def test_options_of_torch_compile_need_the_registered_name() -> None:
    backend = npu_fusion.get_npu_backend(host="eager")
    with pytest.raises(BackendCompilerFailed, match="accepted: none"):
        torch.compile(merged(), backend=backend, options={"verify": True})(torch.randn(3, 64))


def test_auto_runs_eagerly_where_inductor_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "why_no_inductor", lambda: "there is no C++ compiler")
    with pytest.warns(RuntimeWarning, match="eagerly: Inductor cannot be used because there is no C\\+\\+"):
        backend = npu_fusion.get_npu_backend()
    assert backend.host == "eager"


def test_a_float_of_a_module_stays_a_constant_with_dynamic_shapes() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-5
            self.weight = torch.nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    backend = npu_fusion.get_npu_backend(host="eager")
    model = Norm()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        x = torch.randn(3, 64)
        torch.testing.assert_close(compiled(x), model(x))
        model.eps = 1.0
        torch.testing.assert_close(compiled(x), model(x))
    assert [r.fused for r in backend.reports] == [{"npu_rms_norm": 1}] * 2
