from __future__ import annotations

import pytest
import torch

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes.test_add_rms_norm import data
from tests.passes.test_rms_norm import EPS, Norm, functional, hugging_face


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", [hugging_face, functional])
def test_it_lowers(norm: Norm, dynamic: bool) -> None:
    x, _, gamma = data(torch.bfloat16)
    got = lower_only("rms_norm", norm, [x, gamma], dynamic=dynamic)
    assert got.fused == {"npu_rms_norm": 1}
    assert got.graph.counts["RmsNorm"] == 1
    assert not {"Rsqrt", "ReduceMean", "ReduceMeanD", "Pow"} & set(got.graph.counts)
    assert got.graph.only("RmsNorm").attribute("epsilon", 1e-6) == pytest.approx(EPS)
    assert_near(got)
    if dynamic:
        assert_dynamic(got, "RmsNorm")
