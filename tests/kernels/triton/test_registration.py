"""The CUDA kernels in the dispatcher: which operators have one, what happens without triton, and what the
passes make of it. Runs without a GPU and without triton."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import npu_fusion
from npu_fusion import FusionConfig
from npu_fusion.kernels import triton as room
from npu_fusion.kernels.reference.dynamic_quant import npu_dynamic_quant as reference
from npu_fusion.meta_impls._calls import checked
from npu_fusion.meta_impls._registry import OPERATORS
from npu_fusion.passes import pipeline
from npu_fusion.quantization.modules.w8a8_linear import quantize_rows


def on_cuda(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "CUDA")


def test_exactly_the_operators_with_a_kernel_are_there_on_cuda() -> None:
    assert {name for name in OPERATORS if on_cuda(name)} == set(room.FAMILIES)


@pytest.mark.parametrize("name", room.FAMILIES)
def test_a_family_has_a_file_with_the_signature_of_the_reference(name: str) -> None:
    path = Path(room.__file__).parent / f"{room.FAMILIES[name]}.py"
    source = path.read_text()
    assert f"def {name}(" in source
    kernel = OPERATORS[name].cpu
    assert kernel is not None
    for argument in inspect.signature(kernel).parameters:
        assert f"{argument}: " in source


def test_importing_the_package_imports_no_file_that_needs_triton() -> None:
    code = (
        "import sys, npu_fusion, npu_fusion.kernels.triton as room;"
        "assert not [name for name in sys.modules if name.startswith(room.__name__ + '.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what runs ----------------------------------------------------------------------------------------


@pytest.fixture
def _unsaid() -> Iterator[None]:
    """Warnings are given once in a process, the availability of triton is asked once."""
    for once in (room._say, room.available):
        once.cache_clear()
    yield
    for once in (room._say, room.available):
        once.cache_clear()


def cuda_call() -> Callable[..., Any]:
    """What the dispatcher calls for npu_dynamic_quant on CUDA; it may be given CPU tensors."""
    op = OPERATORS["npu_dynamic_quant"]
    assert op.cpu is not None and op.cuda is not None
    return checked(op.name, op.fake, op.cpu, op.cuda)


@pytest.mark.usefixtures("_unsaid")
def test_without_triton_the_reference_kernel_runs_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = torch.randn(3, 8).bfloat16()
    with pytest.warns(RuntimeWarning, match="triton is not installed") as said:
        results = [cuda_call()(x), cuda_call()(x)]
    assert len(said) == 1
    for result in results:
        for y, exact in zip(result, reference(x), strict=True):
            assert torch.equal(y, exact)


@pytest.mark.usefixtures("_unsaid")
def test_a_call_that_is_not_taken_goes_to_the_reference_kernel_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Family:
        @staticmethod
        def npu_dynamic_quant(*args: Any, **kwargs: Any) -> Any:
            return NotImplemented

    monkeypatch.setattr(room, "available", lambda: True)
    monkeypatch.setattr(room.importlib, "import_module", lambda name: Family)
    x = torch.randn(3, 8).bfloat16()
    with pytest.warns(RuntimeWarning, match="npu_dynamic_quant has no Triton kernel for these") as said:
        results = [cuda_call()(x), cuda_call()(x)]
    assert len(said) == 1
    assert all(torch.equal(y, reference(x)[0]) for y, _ in results)


@pytest.mark.usefixtures("_unsaid")
def test_a_call_that_is_taken_runs_in_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    class Family:
        @staticmethod
        def npu_dynamic_quant(*args: Any, **kwargs: Any) -> Any:
            return "family"

    monkeypatch.setattr(room, "available", lambda: True)
    monkeypatch.setattr(room.importlib, "import_module", lambda name: Family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_call()(torch.randn(3, 8)) == "family"
        with npu_fusion.kernels.use("reference"):
            assert len(cuda_call()(torch.randn(3, 8))) == 2


# -- the gate of the passes ---------------------------------------------------------------------------


def cuda_graph(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.Graph:
    """``fn`` traced on bfloat16 tensors of a GPU that need not be there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        args = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        return make_fx(fn)(*args).graph


def fused_on_cuda(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[dict[str, int], set[str]]:
    """What the pipeline fuses, and which fusions it refused for want of a kernel."""
    report = pipeline.run(cuda_graph(fn, *shapes), FusionConfig(strict=True))
    wanting = "the operator has no kernel for this device"
    return report.fused, {r.fusion for r in report.refused if r.reason == wanting}


def gate(x: Tensor) -> Tensor:
    act, lin = x.chunk(2, dim=-1)
    return F.silu(act) * lin


def normalize(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    n = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
    return *quantize_rows(n), total.to(x.dtype)


def test_the_passes_fuse_what_has_a_kernel_on_cuda() -> None:
    assert fused_on_cuda(quantize_rows, (5, 64)) == ({"npu_dynamic_quant": 1}, set())
    vectors = functools.partial(fused_on_cuda, normalize)
    assert vectors((5, 64), (5, 64), (64,)) == ({"npu_add_rms_norm_dynamic_quant": 1}, set())


def test_the_passes_leave_what_has_none_on_cuda() -> None:
    assert fused_on_cuda(gate, (5, 64)) == ({}, {"swiglu"})
