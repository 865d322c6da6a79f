"""The pipeline inside the real torchair and npugraph_ex: how it is attached, and that they go on working."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchair
from torchair.inference._cache_compiler import CompiledModel

import npu_fusion

x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_across_streams(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    with torchair.scope.npu_stream_switch("1"):
        gate = F.silu(gate)
    return gate * up


def swiglu_in_a_stream(x: torch.Tensor) -> torch.Tensor:
    with torchair.scope.npu_stream_switch("1"):
        y = swiglu(x)
    return y + 1


def swiglu_across_core_limits(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    with torchair.scope.limit_core_num(4, 4):
        gate = F.silu(gate)
    return gate * up


class Layer(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._step(x)

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)


def _run(backend: Any, function: Any = swiglu, dynamic: bool | None = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(function, backend=backend, dynamic=dynamic)(x)


def test_host_auto_is_the_one_whose_configuration_is_given() -> None:
    backend = npu_fusion.get_npu_backend(compiler_config=torchair.CompilerConfig())
    assert backend.host == "torchair"
    import npugraph_ex

    assert npu_fusion.get_npu_backend(compiler_config=npugraph_ex.CompilerConfig()).host == "npugraph_ex"


def test_host_auto_without_configuration_is_torchair_offline() -> None:
    assert npu_fusion.get_npu_backend().host == "torchair"


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "npugraph_ex"])
def test_torchair_in_each_mode(mode: str) -> None:
    config = torchair.CompilerConfig()
    config.mode = mode
    backend = npu_fusion.get_npu_backend(compiler_config=config, fusion_config={"strict": True})
    torch.testing.assert_close(_run(backend, dynamic=True), swiglu(x), rtol=0, atol=0)
    assert [r.fused for r in backend.reports] == [{"npu_swiglu": 1}]
    assert backend.reports[0].host == "torchair"


def test_npugraph_ex_with_options() -> None:
    backend = npu_fusion.get_npu_backend({"remove_cat_ops": False}, {"strict": True}, host="npugraph_ex")
    torch.testing.assert_close(_run(backend, dynamic=True), swiglu(x), rtol=0, atol=0)
    assert [(r.host, r.fused) for r in backend.reports] == [("npugraph_ex", {"npu_swiglu": 1})]


def test_an_option_that_npugraph_ex_does_not_know_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="no_such"):
        npu_fusion.get_npu_backend({"no_such": 1}, host="npugraph_ex")


def test_a_pass_of_the_user_runs_first_and_his_configuration_is_not_changed() -> None:
    seen: list[set[str]] = []

    def user_pass(gm: torch.fx.GraphModule, example_inputs: Any, config: Any) -> None:
        seen.append({str(n.target) for n in gm.graph.nodes})

    config = torchair.CompilerConfig()
    config.post_grad_custom_pre_pass = user_pass
    before = dict(torchair.configs.compiler_config._get_all_leaf_properties(config))
    backend = npu_fusion.get_npu_backend(compiler_config=config)
    _run(backend)
    assert backend.reports[0].fused == {"npu_swiglu": 1}
    assert "aten.silu.default" in seen[0]
    assert dict(torchair.configs.compiler_config._get_all_leaf_properties(config)) == before


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "npugraph_ex"])
def test_an_expectation_that_is_not_met_is_raised_with_its_report(mode: str) -> None:
    host = "npugraph_ex" if mode == "npugraph_ex" else "torchair"
    config = None
    if host == "torchair":
        config = torchair.CompilerConfig()
        config.mode = mode
    backend = npu_fusion.get_npu_backend(config, {"expect": {"npu_swiglu": 2}}, host=host)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="npu_swiglu: 1 instead of 2") as raised:
        _run(backend)
    error = raised.value.inner_exception
    assert isinstance(error, npu_fusion.FusionExpectationError)
    assert error.report is not None and error.report.fused == {"npu_swiglu": 1}


def test_an_expectation_in_an_enabled_configuration() -> None:
    config = npu_fusion.enable(torchair.CompilerConfig(), {"expect": {"npu_swiglu": 2}})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="npu_swiglu: 1 instead of 2") as raised:
        _run(torchair.get_npu_backend(compiler_config=config))
    assert isinstance(raised.value.inner_exception, npu_fusion.FusionExpectationError)


def test_a_pass_of_the_user_need_not_give_fake_values() -> None:
    def user_pass(gm: torch.fx.GraphModule, example_inputs: Any, config: Any) -> None:
        (mul,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
        with gm.graph.inserting_after(mul):
            doubled = gm.graph.call_function(torch.ops.aten.add.Tensor, (mul, mul))
        mul.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)

    config = torchair.CompilerConfig()
    config.post_grad_custom_pre_pass = user_pass
    backend = npu_fusion.get_npu_backend(config, {"strict": True})
    torch.testing.assert_close(_run(backend, dynamic=True), 2 * swiglu(x), rtol=0, atol=0)
    assert backend.reports[0].fused == {"npu_swiglu": 1}


def test_each_graph_has_its_ge_graph_beside_its_report(tmp_path: Path) -> None:
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    for folder in ("a", "b"):
        torch._dynamo.reset()
        npu_fusion.enable(config, {"dump_dir": str(tmp_path / folder)})
        _run(torchair.get_npu_backend(compiler_config=config))
        assert len(list((tmp_path / folder).rglob("*.pbtxt"))) == 1


def swiglu_of_a_value_that_another_stream_has_too(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torchair.scope.npu_stream_switch("1"):
        total = x.cos().sum()
    with torchair.scope.npu_stream_switch("2"):
        y = swiglu(x.cos())
    return total, y


def test_a_fused_operator_reads_what_its_own_stream_computed(tmp_path: Path) -> None:
    backend = npu_fusion.get_npu_backend(torchair.CompilerConfig(), {"dump_dir": str(tmp_path)})
    _run(backend, swiglu_of_a_value_that_another_stream_has_too)
    (report,) = backend.reports
    assert report.fused == {"npu_swiglu": 1}
    code = report.stages[-1][1]
    assert code.count("aten.cos.default") == 2


def test_enable_adds_to_a_configuration_of_torchair() -> None:
    calls: list[str] = []
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    config.post_grad_custom_pre_pass = lambda gm, inputs, config: calls.append("user")
    assert npu_fusion.enable(config) is config
    npu_fusion.enable(config, {"swiglu": False})
    _run(torchair.get_npu_backend(compiler_config=config))
    npu_fusion.enable(config)
    torch._dynamo.reset()
    _run(torchair.get_npu_backend(compiler_config=config))
    assert calls == ["user", "user"]
    assert [r.fused for r in npu_fusion.reports()] == [{"npu_swiglu": 1}]  # reset forgot the first


def test_enable_adds_to_a_configuration_of_npugraph_ex() -> None:
    import npugraph_ex

    config = npugraph_ex.CompilerConfig()
    config.force_eager = True
    npu_fusion.enable(config)
    _run(npugraph_ex.get_npu_backend(compiler_config=config))
    assert [r.fused for r in npu_fusion.reports()] == [{"npu_swiglu": 1}]


def test_enable_refuses_what_is_no_configuration() -> None:
    with pytest.raises(TypeError, match=r"compiler_config is a dict; accepted: torchair.CompilerConfig or"):
        npu_fusion.enable({})


def test_options_for_the_backend_npugraph_ex_by_name() -> None:
    calls: list[str] = []
    options = npu_fusion.npugraph_ex_options(
        force_eager=True, post_grad_custom_pre_pass=lambda gm, inputs, config: calls.append("user")
    )
    with torch.no_grad():
        y = torch.compile(swiglu, backend="npugraph_ex", options=options)(x)
    torch.testing.assert_close(y, swiglu(x), rtol=0, atol=0)
    assert calls == ["user"]
    assert [r.fused for r in npu_fusion.reports()] == [{"npu_swiglu": 1}]


@pytest.mark.parametrize("function", [swiglu_across_streams, swiglu_across_core_limits])
def test_no_fusion_across_streams_and_core_limits(function: Any) -> None:
    backend = npu_fusion.get_npu_backend(compiler_config=torchair.CompilerConfig())
    torch.testing.assert_close(_run(backend, function), swiglu(x), rtol=0, atol=0)
    (report,) = backend.reports
    assert report.fused == {}
    reasons = {r.reason for r in report.refused}
    assert reasons <= {"the nodes run on different streams", "the nodes are in different scopes"}
    assert len(reasons) == 1


def test_what_is_fused_in_a_stream_stays_in_it(tmp_path: Path) -> None:
    backend = npu_fusion.get_npu_backend(torchair.CompilerConfig(), {"dump_dir": str(tmp_path)})
    torch.testing.assert_close(_run(backend, swiglu_in_a_stream), swiglu(x) + 1, rtol=0, atol=0)
    (report,) = backend.reports
    assert report.fused == {"npu_swiglu": 1}
    (dumped,) = Path(report.dump_dir).glob("*.pbtxt")
    (node,) = (n for n in dumped.read_text().split("\nnode {") if 'op: "SwiGlu"' in n)
    assert "_user_stream_label" in node
    others = [n for n in dumped.read_text().split("\nnode {") if 'op: "Add"' in n]
    assert others and "_user_stream_label" not in others[0]


def test_a_ge_dump_that_the_user_asks_for_stays_where_he_wants_it(tmp_path: Path) -> None:
    config = torchair.CompilerConfig()
    config.debug.graph_dump.type = "py"
    config.debug.graph_dump.path = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    backend = npu_fusion.get_npu_backend(config, {"dump_dir": str(tmp_path / "ours")})
    _run(backend)
    assert list((tmp_path / "mine").glob("*.py"))
    assert not list((tmp_path / "ours").rglob("*.pbtxt"))


def _cache(layer: Layer, fusion_config: dict[str, Any] | None, earlier: Any = None) -> str:
    config = torchair.CompilerConfig()
    if earlier is not None:
        config.post_grad_custom_pre_pass = earlier
    if fusion_config is not None:
        npu_fusion.enable(config, fusion_config)
    return CompiledModel.get_cache_bin(layer._step, config=config)


def test_the_fusion_configuration_is_in_the_key_of_the_compile_cache() -> None:
    layer = Layer()
    configurations: list[dict[str, Any] | None] = [None, {}, {"swiglu": False}, {"target": "ascend910b"}]
    keys = [_cache(layer, c) for c in configurations]
    assert len(set(keys)) == len(keys)
    assert keys == [_cache(layer, c) for c in configurations]
    shown_only = _cache(layer, {"dump_dir": "somewhere"})
    assert shown_only == keys[1]


def test_a_pass_of_the_user_is_in_the_key_too() -> None:
    def make(limit: int) -> Any:
        def user_pass(gm: Any, inputs: Any, config: Any) -> None:
            assert limit

        return user_pass

    layer = Layer()
    keys = [_cache(layer, {}, earlier) for earlier in (None, make(1), make(2))]
    assert len(set(keys)) == 3
    assert keys[1] == _cache(layer, {}, make(1))


class Counting:
    """A pass that is an object."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, gm: Any, inputs: Any, config: Any) -> None:
        assert self.limit

    def method(self, gm: Any, inputs: Any, config: Any) -> None:
        assert self.limit


def test_passes_that_are_objects_and_methods_are_told_apart_by_what_they_hold() -> None:
    layer = Layer()
    earlier = [Counting(1), Counting(2), Counting(1).method, Counting(2).method]
    keys = [_cache(layer, {}, e) for e in earlier]
    assert len(set(keys)) == 4
    assert keys[0] == _cache(layer, {}, Counting(1)) and keys[2] == _cache(layer, {}, Counting(1).method)


def test_a_pass_that_holds_itself_or_something_not_there_yet() -> None:
    def recursive(gm: Any, inputs: Any, config: Any) -> None:
        if config is None:
            recursive(gm, inputs, config)
            later()

    key = _cache(Layer(), {}, recursive)
    assert key == _cache(Layer(), {}, recursive)

    def later() -> None: ...


def test_a_training_graph_is_left_alone() -> None:
    backend = npu_fusion.get_npu_backend(compiler_config=torchair.CompilerConfig())
    y = torch.compile(swiglu, backend=backend)(x.clone().requires_grad_())
    assert y.requires_grad
    (report,) = backend.reports
    assert report.fused == {} and [r.reason for r in report.refused] == ["the graph is traced for training"]


def test_an_operator_without_ge_converter_is_refused_for_ge_only() -> None:
    scale = torch.full((32,), 20.0)

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.npu.npu_quantize(swiglu(x), scale, None, torch.qint8, -1, False)

    for mode, expected in (("max-autotune", 0), ("reduce-overhead", 1)):
        torch._dynamo.reset()
        config = torchair.CompilerConfig()
        config.mode = mode
        backend = npu_fusion.get_npu_backend(compiler_config=config)
        result = _run(backend, quantized)
        assert (result.int() - quantized(x).int()).abs().max() <= 1
        (report,) = backend.reports
        assert report.fused.get("npu_swiglu_quant", 0) == expected, (mode, report.refused)
        if not expected:
            assert report.fused["npu_swiglu"] == 1
            refused = [r.detail for r in report.refused if r.fusion == "swiglu_quant"]
            assert any(re.search("no GE converter|converter of npu_swiglu_quant", d) for d in refused), (
                refused
            )


def test_what_torchair_raises_reaches_the_user() -> None:
    def unsupported(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(x @ x.T)

    backend = npu_fusion.get_npu_backend(compiler_config=torchair.CompilerConfig())
    with pytest.raises(Exception, match="matrix_exp"):
        _run(backend, unsupported)


def test_an_operator_that_torch_npu_types_otherwise_is_not_emitted() -> None:
    """torch_npu's Meta of npu_mla_prolog says bfloat16 for whatever it is given."""
    from tests.passes._mla import Dims, Spelling
    from tests.passes.test_mla_prolog_spellings import Decoder, decoded

    dims = Dims(B=1, S=1, page=16, pages=2)
    model = Decoder(Spelling(), dims)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        expected = decoded(model, dims, 4)
        backend = npu_fusion.get_npu_backend(host="inductor")
        got = decoded(torch.compile(model, backend=backend), dims, 4)
    assert got[0] == expected[0]
    assert not any("mla_prolog" in name for name in backend.reports[0].fused)
    refused = [r.detail for r in backend.reports[0].refused if r.fusion == "mla_prolog"]
    assert refused and all("of torch_npu returns" in detail for detail in refused)


def test_torch_npu_is_in_the_key_of_every_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = npu_fusion.FusionConfig().cache_key()
    monkeypatch.delitem(sys.modules, "torch_npu")
    assert npu_fusion.FusionConfig().cache_key() != beside
