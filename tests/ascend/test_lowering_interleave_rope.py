from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower
from tests.passes.test_interleave_rope import ROPES, Rope, data


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rope", ROPES, ids=lambda f: f.__name__)
def test_it_lowers(rope: Rope, dynamic: bool) -> None:
    got = lower(rope, data(torch.bfloat16), dynamic=dynamic)
    assert got.fused == {"npu_interleave_rope": 1}
    assert got.graph.counts["InterleaveRope"] == 1
    assert not {"Neg", "Mul", "Add", "Sub"} & set(got.graph.counts)
    assert list(got.graph.only("InterleaveRope").inputs) == ["x", "cos", "sin"]
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "InterleaveRope")
