"""The stand-in for CANN under the real torch_npu: what it answers, and that the rest fails by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch_npu
import torchair
from torchair._ge_concrete_graph.compat_ir import is_cann_compat

from npu_fusion.hosts import offline


def test_there_is_one_device() -> None:
    assert torch_npu.npu.is_available()
    assert (torch_npu.npu.device_count(), torch_npu.npu.current_device()) == (1, 0)
    assert torch_npu.npu.get_device_name() == "Ascend910B1"
    assert torch_npu.npu.utils.get_soc_version() == 220
    assert torch_npu.npu.utils.get_cann_version() == "9.1.0"
    assert not torch_npu.npu.utils._is_gte_cann_version("9.2.0")


@pytest.mark.parametrize(("soc", "number"), [("ascend910_93", 250), ("ascend950", 260), ("Ascend310P3", 202)])
def test_the_chip_can_be_chosen(soc: str, number: int) -> None:
    code = (
        "import torch_npu as n; print('soc', n.npu.utils.get_soc_version(), n.npu.utils.get_cann_version())"
    )
    environment = offline.environment(soc, "8.5.0")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"soc {number} 8.5.0" in done.stdout, done.stderr


def test_tensors_can_be_made_and_copied() -> None:
    x = torch.randn(3, 5)
    there = x.npu()
    assert there.device.type == "npu"
    assert torch.equal(there.cpu(), x)


def test_a_kernel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="offline stand-in: aclCreateTensorDesc needs CANN and a device"):
        torch.ones(2).npu() + 1


def test_a_ge_graph_is_converted_but_neither_compiled_nor_run() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + 1, backend=torchair.get_npu_backend())
    with pytest.raises(
        Exception, match=r"offline stand-in: ge::Graph::LoadFromSerializedModelArray\(.*needs"
    ):
        compiled(torch.ones(2))


def test_the_operator_library_has_what_torchairs_converters_name() -> None:
    assert is_cann_compat("Whatever", ("any_input",), ("axis", "activate_left")) == ""
    assert "no_such_attribute" in is_cann_compat("Whatever", (), ("no_such_attribute",))
