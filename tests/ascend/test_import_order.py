"""torch_npu imported before npu_fusion, after it, or not at all, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)

_MODEL = """
import sys
import torch
import torch.nn.functional as F

def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up

def quantized(x):
    y, scale = torch.ops.npu.npu_dynamic_quant(swiglu(x))
    return y, scale

def written(x, cache, index):
    torch.ops.npu.scatter_update_(cache, index, x.reshape(4, 1, 1, 16), -2)
    return cache * 2

def run(file):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for function in (swiglu, quantized):
        backend = npu_fusion.get_npu_backend(host="eager")
        compiled = torch.compile(function, backend=backend, dynamic=True)
        outputs = compiled(x)
        results += outputs if isinstance(outputs, tuple) else [outputs]
        results.append(sorted(backend.reports[0].fused.items()))
    index = torch.arange(4)
    traced, plain = torch.zeros(2, 4, 1, 8, 16, dtype=torch.bfloat16)
    results.append(torch.compile(written, backend="aot_eager")(x, traced, index))
    assert torch.equal(results[-1], written(x, plain, index)) and torch.equal(traced, plain)
    results.append(traced)
    torch.save(results, file)
"""


def _child(source: str, *args: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", source, *map(str, args)]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # the order is what the source says
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)


def _results(imports: str, file: Path) -> list[Tensor | list[tuple[str, int]]]:
    done = _child(f"{imports}\n{_MODEL}\nrun(sys.argv[1])", file)
    assert done.returncode == 0, done.stderr
    loaded: list[Tensor | list[tuple[str, int]]] = torch.load(file)
    return loaded


_TOO_LATE = """
import npu_fusion
import importlib.util
assert importlib.util.find_spec("torch_npu").origin.endswith("__init__.py")
for attempt in range(2):
    try:
        import torch_npu
    except ImportError as error:
        assert error.name == "torch_npu"
        print(error)
"""


def test_torch_npu_too_late_is_one_clear_error_and_npu_fusion_goes_on(tmp_path: Path) -> None:
    done = _child(f"{_TOO_LATE}\n{_MODEL}\nrun(sys.argv[1])", tmp_path / "results.pt")
    assert done.returncode == 0, done.stderr
    message = (
        "torch_npu is imported after npu_fusion, which has defined the operators of the npu namespace "
        "because torch_npu was not there; accepted: 'import torch_npu' before 'import npu_fusion'"
    )
    assert done.stdout.splitlines() == [message] * 2


def test_without_the_error_the_process_would_end() -> None:
    """Why the error is needed: should torch_npu come to bear it one day, this test says so."""
    done = _child("import npu_fusion, sys; sys.meta_path.pop(0); import torch_npu")
    assert done.returncode < 0
    assert "Tried to register an operator (npu::" in done.stderr


def test_a_fused_model_computes_the_same_with_torch_npu_and_without(tmp_path: Path) -> None:
    alone = _results("import npu_fusion", tmp_path / "alone.pt")
    beside = _results("import torch_npu\nimport npu_fusion", tmp_path / "beside.pt")
    assert len(alone) == len(beside) == 7
    for a, b in zip(alone, beside, strict=True):
        if isinstance(a, Tensor):
            assert isinstance(b, Tensor)
            assert torch.equal(a, b)
        else:
            assert a == b
    assert alone[1] == [("npu_swiglu", 1)]


@pytest.mark.parametrize("name", ["npu_format_cast", "npu_swiglu", "npu_mla_prolog_v3"])
def test_gradients_stay_torch_npus_and_are_for_its_device_alone(name: str) -> None:
    """Operators that torch_npu can differentiate have their formula on its device; on the CPU none has."""
    keys = ("AutogradCPU", "Autograd", "CompositeImplicitAutograd")
    assert not any(torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", key) for key in keys)
