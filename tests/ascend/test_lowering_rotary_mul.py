"""npu_rotary_mul lowers to RotaryMul, which knows halves only; on an Ascend 950 to an operator with modes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch_npu

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_rotary_mul import Rope, data, half, half_by_half, pairs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rope", [half, half_by_half])
def test_it_lowers(rope: Rope, dynamic: bool) -> None:
    got = lower(rope, data(torch.bfloat16), dynamic=dynamic)
    assert got.fused == {"npu_rotary_mul": 1}
    assert got.graph.counts["RotaryMul"] == 1
    assert not {"Neg", "Mul", "Add"} & set(got.graph.counts)
    assert list(got.graph.only("RotaryMul").inputs) == ["x", "r1", "r2"]
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "RotaryMul")


@pytest.mark.parametrize("dynamic", [False, True])
def test_pairs_would_be_lowered_as_halves(dynamic: bool) -> None:
    got = lower(pairs, data(torch.bfloat16), dynamic=dynamic)
    assert got.fused == {}
    (reason,) = got.reasons("rotary_mul")
    assert reason.endswith("torchair lowers npu_rotary_mul to 'half', not to 'interleave'")
    assert not {"RotaryMul", "RotaryPositionEmbedding"} & set(got.graph.counts)
    assert_near(got, 0)


@pytest.mark.parametrize(("rope", "mode"), [(half, 0), (pairs, 1)])
def test_an_ascend_950_has_modes(rope: Rope, mode: int) -> None:
    with mock.patch.object(torch_npu.npu, "get_device_name", return_value="Ascend950PR_9599"):
        got = lower(rope, data(torch.bfloat16))
    assert got.fused == {"npu_rotary_mul": 1}
    assert got.graph.only("RotaryPositionEmbedding").attribute("mode", 0) == mode
    assert_near(got)
