"""The CPU kernels beside torch_npu's definitions compute what they compute without torch_npu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ascend._inputs import Case
from tests.ascend._inputs_families import CASES
from tests.ascend._on_cpu import results

# The indices that all calls get do not fit into these; there the errors are compared.
REFUSED = {
    "npu_grouped_matmul_swiglu_quant: no rows",
    "npu_mla_prolog_v3: PA_BLK_NZ, rows",
    "npu_mla_prolog_v3_functional: PA_BLK_NZ, rows",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("alone") / "results.pt"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ascend._on_cpu", file]
    without_torch_npu = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    subprocess.run(command, check=True, cwd=root, env=without_torch_npu)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


@pytest.fixture(scope="module")
def beside() -> dict[str, Any]:
    assert "torch_npu" in sys.modules
    return results()


@pytest.mark.parametrize("case", [c for c in CASES if c.accepted], ids=lambda c: f"{c.operator}: {c.label}")
def test_the_same_bits(case: Case, alone: dict[str, Any], beside: dict[str, Any]) -> None:
    name = f"{case.operator}: {case.label}"
    expected, given = alone[name], beside[name]
    if isinstance(expected, str):
        assert given == expected
        return
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        # As bytes: NaN is equal to itself, and every dtype can be compared.
        assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def test_all_others_compute(alone: dict[str, Any]) -> None:
    assert {name for name, result in alone.items() if isinstance(result, str)} == REFUSED
