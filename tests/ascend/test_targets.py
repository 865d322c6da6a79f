"""Targets beside the real torch_npu: its schemas say what there is."""

from __future__ import annotations

import torch

from npu_fusion import targets
from npu_fusion.meta_impls._registry import OPERATORS


def test_the_release_of_the_wheel_is_told_by_its_schemas() -> None:
    assert targets._installed_release() == "26.1"


def test_nothing_that_is_declared_here_is_missing_there() -> None:
    for operator in OPERATORS.values():
        assert targets.missing(None, operator.overload) is None, operator.name


def test_the_target_of_the_device_that_the_stand_in_claims_to_be() -> None:
    assert targets.detect() == "ascend910b-26.1"


def test_dtypes_are_numbers_where_the_schema_says_int() -> None:
    npu = torch.ops.npu
    older = targets.TARGETS["ascend910b-7.3"]
    assert not targets.takes_dtype(older, npu.npu_quant_matmul.default, "output_dtype")
    assert targets.takes_dtype(None, npu.npu_dequant_bias.default, "output_dtype")


def test_an_argument_that_the_schema_lacks() -> None:
    why = targets.missing(None, torch.ops.npu.npu_swiglu.default, (None,), {"limit": 7.0})
    assert why == "the npu_swiglu at hand has no argument limit"
