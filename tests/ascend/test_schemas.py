"""The schemas declared here are those of the real torch_npu 2.13.0, and its operators stay its own."""

from __future__ import annotations

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.meta_impls._registry import OPERATORS


def _schemas(name: str) -> tuple[torch.FunctionSchema, torch.FunctionSchema]:
    return torch._C.parse_schema(f"npu::{OPERATORS[name].schema}"), OPERATORS[name].overload._schema


@pytest.mark.parametrize("name", OPERATORS)
def test_arguments_results_and_aliases_are_equal(name: str) -> None:
    ours, theirs = _schemas(name)
    # The text tells ScalarType from int, which compare equal; the objects tell one number from another.
    assert str(ours) == str(theirs)
    assert ours == theirs
    for a, b in zip((*ours.arguments, *ours.returns), (*theirs.arguments, *theirs.returns), strict=True):
        assert (a.name, str(a.real_type), a.kwarg_only) == (b.name, str(b.real_type), b.kwarg_only)
        assert (a.has_default_value(), a.default_value) == (b.has_default_value(), b.default_value)
        written = [x.alias_info is not None and x.alias_info.is_write for x in (a, b)]
        assert written[0] == written[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_npu_keeps_what_it_has_and_the_cpu_kernel_is_from_here(name: str) -> None:
    lines = torch._C._dispatch_dump(f"npu::{name}").splitlines()
    origin = {key: rest for key, _, rest in (line.partition(": ") for line in lines)}
    assert "torch_npu" in origin["debug"], "defined by torch_npu"
    assert "torch_npu" in origin["PrivateUse1"], "computed on the device by torch_npu"
    assert "npu_fusion" in origin["CPU"]
    assert torch.Tag.pt2_compliant_tag in OPERATORS[name].overload.tags


@pytest.mark.parametrize("name", [n for n, op in OPERATORS.items() if "(a!)" in op.schema])
def test_torch_npu_functionalizes_what_writes_its_arguments(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "Functionalize")
