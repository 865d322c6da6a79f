"""CPU kernels behind the schemas of other torch_npu releases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.meta_impls._registry import OPERATORS
from npu_fusion.meta_impls._released import adapted

X = torch.linspace(-1, 1, 32).reshape(2, 16).bfloat16()
GAMMA, SCALES = torch.ones(16).bfloat16(), torch.linspace(0.01, 0.02, 16).bfloat16()


def _adapted(schema: str) -> Callable[..., Any] | None:
    name = schema.partition("(")[0]
    ours, theirs = (torch._C.parse_schema(f"npu::{text}") for text in (OPERATORS[name].schema, schema))
    return adapted(name, OPERATORS[name].overload, theirs, ours)


def _same(given: Any, expected: Any) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_an_argument_between_others_does_not_shift_them() -> None:
    """In release 7.1 there is no beta: the sixth argument is what is the seventh here."""
    kernel = _adapted(
        "npu_add_rms_norm_quant(Tensor x1, Tensor x2, Tensor gamma, Tensor scales1, Tensor? zero_points1, "
        "Tensor? scales2=None, Tensor? zero_points2=None, *, int axis=-1, float epsilon=1e-06, "
        "bool div_mode=True) -> (Tensor, Tensor, Tensor)"
    )
    assert kernel is not None
    expected = torch.ops.npu.npu_add_rms_norm_quant(X, X, GAMMA, SCALES, None, scales2=2 * SCALES)
    _same(kernel(X, X, GAMMA, SCALES, None, 2 * SCALES), expected)
    plain = torch.ops.npu.npu_add_rms_norm_quant(X, X, GAMMA, SCALES, None, div_mode=False)
    _same(kernel(X, X, GAMMA, SCALES, None, div_mode=False), plain)


def test_self_and_dtypes_before_release_26() -> None:
    kernel = _adapted(
        "npu_quantize(Tensor self, Tensor scales, Tensor? zero_points, ScalarType dtype, int axis=1) "
        "-> Tensor"
    )
    assert kernel is not None
    expected = torch.ops.npu.npu_quantize(X, SCALES, None, 12, 1)
    _same(kernel(X, SCALES, None, torch.qint8), expected)
    _same(kernel(self=X, scales=SCALES, zero_points=None, dtype=torch.qint8, axis=1), expected)


def test_a_dtype_that_is_a_number_in_the_release() -> None:
    kernel = _adapted(
        "npu_swiglu_quant(Tensor x, *, int quant_mode=0, int? dst_type=None) -> (Tensor, Tensor)"
    )
    assert kernel is not None
    expected = torch.ops.npu.npu_swiglu_quant(X, quant_mode=1, dst_type=torch.quint4x2)
    _same(kernel(X, quant_mode=1, dst_type=16), expected)


def test_defaults_are_those_of_the_release() -> None:
    """The dispatcher does not pass on what is equal to the default."""
    kernel = _adapted("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=0.5) -> (Tensor, Tensor)")
    assert kernel is not None
    _same(kernel(X, GAMMA), torch.ops.npu.npu_rms_norm(X, GAMMA, 0.5))


def test_an_argument_of_a_later_release_has_to_stay_at_its_default() -> None:
    kernel = _adapted("npu_swiglu(Tensor input, int dim=-1, *, float slope=1.0) -> Tensor")
    assert kernel is not None
    _same(kernel(X, -2, slope=1.0), torch.ops.npu.npu_swiglu(X, -2))
    with pytest.raises(
        TypeError, match=r"^npu_swiglu: slope is 2.0; accepted: the default, as the CPU kernel"
    ):
        kernel(X, slope=2.0)


@pytest.mark.parametrize(
    "schema",
    [
        "npu_swiglu(Tensor input, int dim=-1) -> (Tensor, Tensor)",
        "npu_rms_norm(Tensor input, float epsilon=1e-06) -> (Tensor, Tensor)",
    ],
)
def test_other_results_and_missing_arguments_have_no_kernel(schema: str) -> None:
    assert _adapted(schema) is None


_OLDER = """
import sys
import torch
library = torch.library.Library("npu", "FRAGMENT")
library.define(
    "npu_dequant_swiglu_quant(Tensor x, *, Tensor? weight_scale=None, Tensor? activation_scale=None, "
    "Tensor? bias=None, Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? group_index=None, "
    "bool activate_left=False, int quant_mode=0) -> (Tensor, Tensor)"
)
library.define("npu_swiglu(Tensor self, int dim=-1) -> (Tensor, Tensor)")
library.define("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
meta = torch.library.Library("npu", "IMPL", "Meta")
meta.impl("npu_rms_norm", lambda self, gamma, epsilon=1e-06: (self.new_empty(1), self.new_empty(2)))
import npu_fusion

x, scale = torch.arange(32, dtype=torch.int32).reshape(2, 16), torch.linspace(0.1, 0.2, 16)
call = torch.ops.npu.npu_dequant_swiglu_quant
results = [*call(x, weight_scale=scale, quant_mode=1)]
for refused, error in (
    (lambda: call(x, weight_scale=scale, swiglu_mode=1), RuntimeError),
    (lambda: torch.ops.npu.npu_swiglu(torch.ones(2)), NotImplementedError),
):
    try:
        refused()
    except error as text:
        print(str(text).splitlines()[0])
meta = torch.ops.npu.npu_rms_norm(x.to("meta"), x.to("meta"))
print([list(t.shape) for t in meta], call(x.to("meta"), weight_scale=scale.to("meta"))[0].shape)
torch.save(results, sys.argv[1])
"""


def test_operators_that_are_there_before_this_package(tmp_path: Path) -> None:
    """Their schema and Meta kernel stay; what they lack is added where it fits."""
    file = tmp_path / "results.pt"
    done = subprocess.run([sys.executable, "-c", _OLDER, file], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    unknown, no_kernel, shapes = done.stdout.splitlines()
    assert "Unknown keyword argument 'swiglu_mode'" in unknown
    assert "Could not run 'npu::npu_swiglu' with arguments from the 'CPU' backend" in no_kernel
    assert shapes == "[[1], [2]] torch.Size([2, 8])"
    x, scale = torch.arange(32, dtype=torch.int32).reshape(2, 16), torch.linspace(0.1, 0.2, 16)
    expected = torch.ops.npu.npu_dequant_swiglu_quant(x, weight_scale=scale, quant_mode=1)
    _same(torch.load(file), list(expected))
