from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_add_rms_norm_dynamic_quant"
SMOOTH = torch.linspace(0.5, 1.5, 16).half()


def _arguments(**changes: Any) -> dict[str, Any]:
    """The three required tensors, [3, 16] float16; ``changes`` replace or add arguments."""
    arguments: dict[str, Any] = {
        "x1": torch.randn(3, 16).half(),
        "x2": torch.randn(3, 16).half(),
        "gamma": torch.randn(16).half(),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize("y_dtype", [None, 1, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smooth_scale1": SMOOTH},
        {"smooth_scale1": SMOOTH, "smooth_scale2": SMOOTH},
        {"output_mask": [True, True], "beta": SMOOTH},
        {"output_mask": [False, True], "smooth_scale2": SMOOTH},
    ],
)
def test_fake_and_real_agree(options: dict[str, Any], y_dtype: int | None) -> None:
    check_operator(NAME, **_arguments(), **options, y_dtype=y_dtype)


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (2, 3, 16), (1, 2, 1, 2, 1, 2, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x1, x2, gamma = (torch.randn(s).to(dtype) for s in (shape, shape, (16,)))
    y1, _, x, scale1, _ = check_operator(NAME, x1, x2, gamma, epsilon=1e-5)
    assert (y1.shape, y1.dtype) == (shape, torch.int8)
    assert (x.shape, x.dtype) == (shape, dtype)
    assert (scale1.shape, scale1.dtype) == (shape[:-1], torch.float32)


def test_strided_inputs() -> None:
    x = torch.randn(16, 5).half()
    check_operator(NAME, x.T, x.T.contiguous(), torch.ones(32).half()[::2])


@pytest.mark.parametrize(("dtype", "value"), [(torch.int8, 1), (torch.quint4x2, 16)])
def test_y_dtype_as_dtype_or_scalar_type_value(dtype: torch.dtype, value: int) -> None:
    arguments = _arguments()
    by_dtype = check_operator(NAME, **arguments, y_dtype=dtype)
    by_value = check_operator(NAME, **arguments, y_dtype=value)
    assert by_dtype[0].dtype == by_value[0].dtype
    assert torch.equal(by_dtype[0], by_value[0])


@pytest.mark.parametrize("y_dtype", [2, 3, 29, 290, torch.float8_e4m3fn])
def test_refuses_other_y_dtypes(y_dtype: int | torch.dtype) -> None:
    """2 is int8 and 29 is int4 one layer below, in GE; here they are other ScalarType values."""
    check_refused(NAME, "y_dtype is .*; accepted: None, 1, 16", **_arguments(), y_dtype=y_dtype)


def test_dynamic_rows_in_one_graph() -> None:
    gamma = torch.randn(16).half()

    def both(x1: torch.Tensor, x2: torch.Tensor) -> Any:
        int8 = torch.ops.npu.npu_add_rms_norm_dynamic_quant(x1, x2, gamma, output_mask=[True, True])
        int4 = torch.ops.npu.npu_add_rms_norm_dynamic_quant(x1, x2, gamma, y_dtype=torch.quint4x2)
        return int8, int4

    compile_dynamic(
        both,
        lambda t: (torch.randn(t, 16).half(), torch.randn(t, 16).half()),
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )


def test_refuses_smooth_scale2_alone() -> None:
    check_refused(NAME, "smooth_scale2 is given; accepted: None", **_arguments(smooth_scale2=SMOOTH))


@pytest.mark.parametrize("mask", [[], [True], [True, True, True], [False, False]])
def test_refuses_masks(mask: list[bool]) -> None:
    check_refused(NAME, "output_mask is .*; accepted: two values", **_arguments(output_mask=mask))


@pytest.mark.parametrize("index", [0, 1])
def test_refuses_a_mask_that_drops_a_smoothed_output(index: int) -> None:
    mask = [True, True]
    mask[index] = False
    options = {"output_mask": mask, f"smooth_scale{index + 1}": SMOOTH}
    check_refused(NAME, f"output_mask is .*; accepted: True at index {index}", **_arguments(**options))


@pytest.mark.parametrize("argument", ["beta", "smooth_scale1"])
def test_refuses_vectors_unlike_gamma(argument: str) -> None:
    check_refused(
        NAME, rf"{argument} has shape \[8\]; accepted: \[16\]", **_arguments(**{argument: SMOOTH[:8]})
    )
    check_refused(
        NAME, f"{argument} has dtype float32; accepted: float16", **_arguments(**{argument: SMOOTH.float()})
    )


def test_refuses_dtypes() -> None:
    ones = torch.ones(3, 16)
    check_refused(NAME, "x1 has dtype float32; accepted: float16, bfloat16", **_arguments(x1=ones, x2=ones))
    check_refused(NAME, "x2 has dtype float32; accepted: float16", **_arguments(x2=ones))
    check_refused(NAME, "gamma has dtype float32; accepted: float16", **_arguments(gamma=ones[0]))


def test_refuses_shapes() -> None:
    check_refused(
        NAME, r"x2 has shape \[1, 16\]; accepted: \[3, 16\]", **_arguments(x2=torch.ones(1, 16).half())
    )
    row = torch.ones(16).half()
    check_refused(NAME, "x1 has 1 dimensions; accepted: 2 to 8", **_arguments(x1=row, x2=row))
    check_refused(NAME, "gamma has 2 dimensions; accepted: 1", **_arguments(gamma=torch.ones(3, 16).half()))
    nothing = {name: tensor[..., :0] for name, tensor in _arguments().items()}
    check_refused(NAME, "accepted: normalized sizes above 0", **nothing)


def test_refuses_int4_unless_eight_fill_a_word() -> None:
    odd = {name: tensor[..., :12] for name, tensor in _arguments().items()}
    check_refused(NAME, "accepted for int4: a last dimension divisible by 8", **odd, y_dtype=16)
