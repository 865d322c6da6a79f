"""The adapter for vllm-ascend, inside its two ways to compile.

Everything runs against stand-ins with vllm-ascend's interfaces, and where vllm-ascend itself can be imported
(with vLLM, and torch_npu as in ``make test-ascend``) against its own classes and functions, too.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import npu_fusion
import npu_fusion_vllm
from npu_fusion.hosts import _admission, vllm_ascend
from npu_fusion.hosts._vllm_pass import pass_class
from tests.hosts import _vllm_doubles
from tests.hosts._vllm_layers import DynamicLinear, StaticLinear, dense_mlp, tokens

INTERFACE = "vllm_ascend.compilation.compiler_interface"
MANAGER = "vllm_ascend.compilation.graph_fusion_pass_manager"
DYNAMIC = {"npu_add_rms_norm_dynamic_quant": 1, "npu_dequant_swiglu_quant": 1}
STATIC = {"npu_add_rms_norm_quant": 1, "npu_dequant_swiglu_quant": 1}


@dataclass
class Stack:
    """vllm-ascend, or what stands for it."""

    interface: Any
    manager_class: Any
    pass_context: Callable[[Any], Any]

    def vllm_config(self, **compile_config: Any) -> Any:
        """With vllm-ascend's own fusions off: they make tensors on an NPU when they are set up."""
        off = ("fuse_norm_quant", "fuse_qknorm_rope", "fuse_allreduce_rms", "fuse_muls_add")
        return SimpleNamespace(
            additional_config={"ascend_compilation_config": dict.fromkeys(off, False)},
            compilation_config=SimpleNamespace(
                pass_config=SimpleNamespace(enable_sp=False),
                inductor_compile_config=compile_config,
                splitting_ops=None,
                use_inductor_graph_partition=False,
            ),
            model_config=None,
            device_config=None,
        )

    def manager(self, *passes: Any) -> Any:
        made = self.manager_class()
        made.configure(self.vllm_config())
        for each in passes:
            made.add(each)
        return made

    def piecewise(self, model: torch.nn.Module, manager: Any, *counts: int, **like: Any) -> list[Any]:
        """Compile as with ``cudagraph_mode=PIECEWISE``, for any number of tokens, and run."""

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            compiled, _ = self.interface.fusion_pass_compile(
                gm, inputs, {vllm_ascend.PASS_KEY: manager}, compile_range=None
            )
            return compiled

        with self.pass_context(None):
            return run(model, backend, *counts, **like)

    def full(self, model: torch.nn.Module, directory: Path, *counts: int) -> str:
        """Compile as with ``cudagraph_mode=FULL``; the code that vllm-ascend keeps of it. npugraph_ex itself
        cannot run that code without a device."""
        config = SimpleNamespace(enable_static_kernel=False)

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            original = copy.deepcopy(gm)
            self.interface.npugraph_ex_compile(gm, inputs, {}, None, config, None, "kept", str(directory))
            return original.forward

        run(model, backend, *counts)
        return (directory / "kept").read_text()


def run(model: torch.nn.Module, backend: Any, *counts: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = []
    for count in counts:
        arguments = tokens(count, dtype)
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        with torch.no_grad():
            results.append((compiled(*arguments), model(*arguments)))
    return results


def assert_close(results: list[Any]) -> None:
    for (y, residual), (expected, expected_residual) in results:
        assert torch.equal(residual, expected_residual)
        assert (y - expected).float().abs().max() <= 0.03 * expected.float().abs().max()


def _doubles(patch: pytest.MonkeyPatch) -> Stack:
    made = _vllm_doubles.modules()
    for name, module in made.items():
        patch.setitem(sys.modules, name, module)
    patch.setattr(_admission, "_runs_on_npu", lambda operator: True)  # there is no torch_npu to ask
    manager = vars(made[MANAGER])["GraphFusionPassManager"]
    return Stack(made[INTERFACE], manager, _vllm_doubles.pass_context)


def _vllm_ascend(patch: pytest.MonkeyPatch) -> Stack:
    pytest.importorskip("torch_npu", exc_type=ImportError)
    interface = pytest.importorskip(INTERFACE, exc_type=ImportError)
    manager = pytest.importorskip(MANAGER)
    from vllm.compilation.passes.inductor_pass import pass_context

    stream = SimpleNamespace(stream_id=0)
    patch.setattr("torch.npu.set_compile_mode", lambda **_: None)
    patch.setattr("torch.npu.current_stream", lambda: stream)
    patch.setattr("torch_npu.npu.current_device", lambda: 0)
    settings = SimpleNamespace(enable_npugraph_ex=True, enable_static_kernel=False)
    patch.setattr(interface, "get_ascend_config", lambda: SimpleNamespace(ascend_compilation_config=settings))
    return Stack(interface, manager.GraphFusionPassManager, pass_context)


@pytest.fixture(params=[_doubles, _vllm_ascend], ids=["doubles", "vllm-ascend"])
def stack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    pass_class.cache_clear()
    yield request.param(monkeypatch)
    if vllm_ascend._installed is not None:
        vllm_ascend._installed.remove()
    pass_class.cache_clear()


@pytest.mark.parametrize(("linear", "fused"), [(DynamicLinear, DYNAMIC), (StaticLinear, STATIC)])
@pytest.mark.parametrize("custom", [True, False])
def test_the_dense_mlp_fuses(stack: Stack, linear: Any, fused: dict[str, int], custom: bool) -> None:
    added = vllm_ascend.fusion_pass(stack.vllm_config(), {"strict": True})
    assert added.is_applicable_for_range(None)
    results = stack.piecewise(dense_mlp(linear, custom=custom), stack.manager(added), 5, 3)
    (report,) = added.reports  # one graph for both numbers of tokens
    assert report.fused == fused
    assert report.host == "vllm_ascend"
    assert report.operators_after["npu.npu_quant_matmul"] == 2
    assert not {"npu.npu_swiglu", "npu.npu_quantize", "npu.npu_add_rms_norm"} & report.operators_after.keys()
    assert npu_fusion.reports()[-1] is report
    assert_close(results)


def test_what_does_not_fuse_is_called_as_before(stack: Stack) -> None:
    added = vllm_ascend.fusion_pass(fusion_config={"numerics": "strict", "strict": True})
    codes = []
    manager = stack.manager(added)

    def keep(gm: fx.GraphModule) -> Any:
        before = gm.code
        made = manager(gm)
        codes.append((before, gm.code))
        return made

    results = stack.piecewise(dense_mlp(StaticLinear), keep, 4)
    ((before, after),) = codes
    assert "torch.ops.vllm.quantize" in before
    assert "torch.ops._C_ascend.npu_add_rms_norm_bias" in before
    assert before == after
    ((y, _), (expected, _)) = results[0]
    assert torch.equal(y, expected)


def test_a_biased_norm_is_left_to_vllm_ascend(stack: Stack) -> None:
    added = vllm_ascend.fusion_pass(fusion_config={"strict": True})
    results = stack.piecewise(dense_mlp(StaticLinear, bias=True), stack.manager(added), 4)
    (report,) = added.reports
    assert report.fused == {"npu_dequant_swiglu_quant": 1}
    assert report.operators_after["_C_ascend.npu_add_rms_norm_bias"] == 1
    assert_close(results)


def test_scales_that_are_computed_in_the_graph_stay(stack: Stack) -> None:
    def quantized(x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.abs()
        return torch.ops.vllm.quantize(x, scale, 1 / scale, torch.zeros_like(scale))

    added = vllm_ascend.fusion_pass(fusion_config={"strict": True})
    gm = make_fx(quantized)(torch.randn(3, 8), torch.rand(8) + 0.1)
    code = gm.code
    added(gm)
    assert gm.code == code
    assert added.reports[0].operators_before == added.reports[0].operators_after


def test_float16_is_refused_on_a_target_and_the_call_restored(stack: Stack) -> None:
    added = vllm_ascend.fusion_pass(fusion_config={"strict": True, "target": "ascend910b"})
    results = stack.piecewise(
        dense_mlp(StaticLinear, torch.float16), stack.manager(added), 4, dtype=torch.float16
    )
    (report,) = added.reports
    assert "npu_add_rms_norm_quant" not in report.fused
    assert "npu_dequant_swiglu_quant" not in report.fused
    details = [r.detail for r in report.refused if r.fusion == "add_rms_norm_quant"]
    assert details == ["float16 instead of int32"]
    assert_close(results)


def test_every_configuration_has_an_identity(stack: Stack) -> None:
    """vLLM's hash of its configuration asks a pass in it for this."""
    configs = (None, {}, {"swiglu_quant": False})
    plain, again, other = (vllm_ascend.fusion_pass(fusion_config=config).uuid() for config in configs)
    assert isinstance(plain, str)
    assert plain == again != other


def test_copies_and_pickles(stack: Stack) -> None:
    added = vllm_ascend.fusion_pass(stack.vllm_config(), {"swiglu": False})
    for twin in (copy.deepcopy(added), pickle.loads(pickle.dumps(added))):
        assert twin is not added
        assert isinstance(twin, pass_class())
        assert (twin.config, twin.uuid(), twin.reports) == (added.config, added.uuid(), [])


def test_a_graph_is_taken_as_well_as_a_module(stack: Stack) -> None:
    added = vllm_ascend.fusion_pass(fusion_config={"strict": True})

    def manager(gm: fx.GraphModule) -> fx.GraphModule:
        added(gm.graph)
        gm.recompile()
        return gm

    results = stack.piecewise(dense_mlp(DynamicLinear), manager, 4)
    assert added.reports[0].fused == DYNAMIC
    assert_close(results)


def test_install_adds_the_pass_to_managers(stack: Stack) -> None:
    installed = vllm_ascend.install({"strict": True})
    results = stack.piecewise(dense_mlp(StaticLinear), stack.manager(), 4)
    assert [report.fused for report in installed.reports] == [STATIC]
    assert_close(results)


def test_install_sets_the_pass_of_npugraph_ex(stack: Stack, tmp_path: Path) -> None:
    before = stack.full(dense_mlp(StaticLinear), tmp_path, 4, 6)
    assert "npu_dequant_swiglu_quant" not in before
    installed = vllm_ascend.install({"strict": True})
    code = stack.full(dense_mlp(StaticLinear), tmp_path, 4, 6)
    assert [report.fused for report in installed.reports] == [STATIC]
    assert installed.reports[0].host == "npugraph_ex"
    assert "npu.npu_dequant_swiglu_quant" in code
    assert "npu.npu_add_rms_norm_quant" in code


def test_a_pass_that_npugraph_ex_has_already_runs_first(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = stack.interface._configure_backend, []

    def earlier(gm: fx.GraphModule, example_inputs: Any, compiler_config: Any) -> None:
        seen.append("npu_dequant_swiglu_quant" in gm.code)

    def configure(config: Any, *args: Any, **kwargs: Any) -> None:
        original(config, *args, **kwargs)
        config.post_grad_custom_pre_pass = earlier

    monkeypatch.setattr(stack.interface, "_configure_backend", configure)
    installed = vllm_ascend.install({"strict": True})
    stack.full(dense_mlp(StaticLinear), tmp_path, 4)
    assert seen == [False]
    assert [report.fused for report in installed.reports] == [STATIC]
    installed.remove()


def test_under_npugraph_ex_what_does_not_fuse_is_called_as_before(stack: Stack, tmp_path: Path) -> None:
    vllm_ascend.install({"numerics": "strict", "strict": True})
    code = stack.full(dense_mlp(StaticLinear), tmp_path, 4)
    assert "vllm.quantize" in code
    assert "_C_ascend.npu_add_rms_norm_bias" in code
    assert "npu.npu_quantize" not in code


def test_install_enters_the_compiler_hash(stack: Stack) -> None:
    def key() -> str:
        return stack.interface.AscendCompiler().compute_hash(None)

    plain = key()
    vllm_ascend.install()
    first = key()
    vllm_ascend.install({"swiglu_quant": False})
    assert len({plain, first, key()}) == 3
    assert len(first) == len(plain)
    vllm_ascend.install()
    assert key() == first


def places(stack: Stack) -> list[Any]:
    return [
        stack.manager_class.configure,
        stack.interface._configure_backend,
        stack.interface.AscendCompiler.compute_hash,
    ]


def test_install_is_idempotent_and_can_be_undone(stack: Stack) -> None:
    before = places(stack)
    first = vllm_ascend.install()
    during = places(stack)
    assert not set(before) & set(during)
    assert vllm_ascend.install() is first
    assert places(stack) == during
    second = vllm_ascend.install({"swiglu": False})
    assert second is not first
    assert len(stack.manager().passes) == 1
    first.remove()
    assert len(stack.manager().passes) == 1
    second.remove()
    second.remove()
    assert places(stack) == before
    assert stack.manager().passes == []


def test_a_pass_set_by_hand_is_not_run_twice(stack: Stack) -> None:
    vllm_ascend.install()
    by_hand = vllm_ascend.fusion_pass()
    manager = stack.manager_class()
    manager.configure(stack.vllm_config(graph_fusion_manager=by_hand))
    assert manager.passes == []  # vLLM adds it after configure()


def test_undoing_under_somebody_elses_hook_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = vllm_ascend.install()
    with monkeypatch.context() as other:
        other.setattr(stack.interface.AscendCompiler, "compute_hash", lambda *_: "")
        with pytest.raises(RuntimeError, match="compute_hash of vllm-ascend was replaced after npu_fusion"):
            installed.remove()
    installed.remove()


def test_another_vllm_ascend_is_refused_before_anything_is_changed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(stack.interface, "_configure_backend")
    before = stack.manager_class.configure
    with pytest.raises(RuntimeError, match=r"has no .*compiler_interface._configure_backend; accepted: "):
        vllm_ascend.install()
    assert stack.manager_class.configure is before


def test_without_vllm_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_class.cache_clear()
    monkeypatch.setitem(sys.modules, MANAGER, None)
    with pytest.raises(ImportError, match="needs vllm-ascend and vLLM, which cannot be imported here"):
        vllm_ascend.fusion_pass()


def test_the_plugin_is_opt_in(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", sys.modules.get("torch_npu", SimpleNamespace()))
    before = places(stack)
    for off in (None, "", "0", "false"):
        if off is None:
            monkeypatch.delenv("ENABLE_NPU_FUSION", raising=False)
        else:
            monkeypatch.setenv("ENABLE_NPU_FUSION", off)
        npu_fusion_vllm.register()
        assert places(stack) == before
    monkeypatch.setenv("ENABLE_NPU_FUSION", "1")
    monkeypatch.setenv("NPU_FUSION_SWIGLU_QUANT", "0")
    npu_fusion_vllm.register()
    npu_fusion_vllm.register()
    (added,) = stack.manager().passes
    assert not added.config.swiglu_quant
    monkeypatch.setenv("ENABLE_NPU_FUSION", "yes")
    with pytest.raises(ValueError, match="ENABLE_NPU_FUSION is 'yes'; accepted: 0, 1, false, true"):
        npu_fusion_vllm.register()


def test_loading_the_plugin_imports_nothing() -> None:
    """vLLM loads every plugin that is installed, wanted or not."""
    code = (
        "import sys, npu_fusion_vllm as p; p.register(); print({'torch', 'npu_fusion'} & sys.modules.keys())"
    )
    root = Path(npu_fusion_vllm.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
