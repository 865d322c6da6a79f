from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAME = "npu_dequant_swiglu_quant"
dsq = torch.ops.npu.npu_dequant_swiglu_quant


def int32(*shape: int) -> Tensor:
    return torch.randint(-1000, 1000, shape, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 8), (0, 8), (2, 1, 2, 2)])
@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("swiglu_mode", [0, 1, 2])
def test_k_fake_and_real_agree(
    shape: tuple[int, ...], dtype: torch.dtype, quant_mode: int, swiglu_mode: int
) -> None:
    x = int32(*shape) if dtype == torch.int32 else torch.randn(shape).to(dtype)
    weight_scale = torch.rand(shape[-1]) if dtype == torch.int32 else None
    y, scale = check_operator(
        NAME, x, weight_scale=weight_scale, quant_mode=quant_mode, swiglu_mode=swiglu_mode, activate_left=True
    )
    assert (y.shape, y.dtype) == ((*shape[:-1], shape[-1] // 2), torch.int8)
    assert (scale.shape, scale.dtype) == (shape[:-1], torch.float32)


@pytest.mark.parametrize("quant_mode", [0, 1])
@pytest.mark.parametrize("bias_dtype", [torch.int32, torch.float32, torch.float16, torch.bfloat16])
def test_k_fake_and_real_agree_with_all_tensors(quant_mode: int, bias_dtype: torch.dtype) -> None:
    check_operator(
        NAME,
        int32(5, 16),
        weight_scale=torch.rand(2, 16),
        activation_scale=torch.rand(5),
        bias=torch.ones(2, 16).to(bias_dtype),
        quant_scale=torch.rand(2, 8) + 0.5,
        quant_offset=torch.rand(2, 8) if quant_mode == 0 else None,
        group_index=torch.tensor([2, 2]),
        quant_mode=quant_mode,
    )


@pytest.mark.parametrize(
    ("dst_type", "dtype"),
    [
        (None, torch.int8),
        (1, torch.int8),
        (torch.int8, torch.int8),
        (23, torch.float8_e5m2),
        (291, torch.float8_e5m2),
        (torch.float8_e5m2, torch.float8_e5m2),
        (24, torch.float8_e4m3fn),
        (292, torch.float8_e4m3fn),
        (torch.float8_e4m3fn, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("quant_mode", [0, 1])
def test_k_dst_types(dst_type: int | torch.dtype | None, dtype: torch.dtype, quant_mode: int) -> None:
    y, _ = check_operator(NAME, torch.randn(3, 8).half(), dst_type=dst_type, quant_mode=quant_mode)
    assert y.dtype == dtype


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_k_activate_dim(dim: int) -> None:
    shape = [4, 6, 8]
    y, scale = check_operator(NAME, torch.randn(shape).half(), activate_dim=dim)
    shape[dim] //= 2
    assert list(y.shape) == shape
    assert list(scale.shape) == shape[:-1]


def test_k_strided_inputs() -> None:
    x, weight_scale = int32(16, 5).T, torch.rand(16, 2).T
    index = torch.tensor([2, 3])
    check_operator(NAME, x, weight_scale=weight_scale, group_index=index, quant_mode=1)
    check_operator(NAME, torch.randn(6, 4, 3).half().permute(2, 1, 0), activate_dim=1)


# --- symbolic sizes --------------------------------------------------------------------------------------


def test_k_dynamic_tokens_in_one_graph() -> None:
    weight_scale, smooth, index = torch.rand(2, 16), torch.rand(2, 8), torch.tensor([1, 1])
    compile_dynamic(
        lambda x, token: dsq(
            x,
            weight_scale=weight_scale,
            activation_scale=token,
            quant_scale=smooth,
            group_index=index,
            activate_left=True,
            quant_mode=1,
        ),
        lambda t: (int32(t, 16), torch.rand(t)),
        [2, 7, 3],
        dynamic=[(0, 0), (1, 0)],
    )


def test_k_dynamic_batch_and_sequence_in_one_graph() -> None:
    compile_dynamic(
        lambda x, token: dsq(x, weight_scale=torch.ones(16), activation_scale=token, quant_mode=1),
        lambda t: (int32(t, t + 1, 16), torch.rand(t, t + 1, 1)),
        [2, 7, 3],
        dynamic=[(0, 0), (0, 1), (1, 0), (1, 1)],
    )


def test_k_dynamic_width_in_one_graph() -> None:
    compile_dynamic(
        lambda x, weight, bias, smooth: dsq(
            x, weight_scale=weight, bias=bias, quant_scale=smooth, quant_mode=1
        ),
        lambda h: (int32(3, 2 * h), torch.rand(2 * h), torch.rand(1, 2 * h), torch.rand(h)),
        [4, 7, 3],
        dynamic=[(0, 1), (1, 0), (2, 1), (3, 0)],
    )


@pytest.mark.parametrize("scalars", ["[G]", "[G, 1]", "[G, H]"])
def test_k_dynamic_groups_in_one_graph(scalars: str) -> None:
    def make_args(groups: int) -> tuple[Tensor, ...]:
        shape = {"[G]": (groups,), "[G, 1]": (groups, 1), "[G, H]": (groups, 8)}[scalars]
        index = torch.ones(groups, dtype=torch.int64)
        return int32(9, 16), torch.rand(groups, 16), torch.rand(shape) + 1, torch.rand(shape), index

    compile_dynamic(
        lambda x, weight, scale, offset, index: dsq(
            x, weight_scale=weight, quant_scale=scale, quant_offset=offset, group_index=index
        ),
        make_args,
        [2, 7, 3],
        dynamic=[(1, 0), (2, 0), (3, 0), (4, 0)],
    )


def test_k_dynamic_activate_dim_not_last_in_one_graph() -> None:
    compile_dynamic(lambda x: dsq(x, activate_dim=0), lambda t: (torch.randn(2 * t, 5).half(),), [2, 7, 3])


# --- refusals --------------------------------------------------------------------------------------------

X = torch.ones(4, 8).half()
XI = torch.ones(4, 8, dtype=torch.int32)
W = torch.ones(8)
INDEX = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("match", "x", "options"),
    [
        ("x has dtype float32; accepted: int32, float16, bfloat16", X.float(), {}),
        ("x has 1 dimensions; accepted: at least 2", X[0], {}),
        (r"x has shape \[4, 7\]; accepted: an even dimension 1", X[:, :7], {}),
        (r"x has shape \[4, 0\]; .* not empty", X[:, :0], {}),
        (r"x has shape \[3, 8\]; accepted: an even dimension 0", X[:3], {"activate_dim": 0}),
        ("quant_mode is 5; accepted: 0, 1", X, {"quant_mode": 5}),
        ("swiglu_mode is 3; accepted: 0, 1, 2", X, {"swiglu_mode": 3}),
        ("round_mode is 5; accepted: None, 0, 1, 2, 3, 4", X, {"round_mode": 5}),
        ("round_mode is 1; accepted: None or 0 for float8", X, {"round_mode": 1, "dst_type": 24}),
        ("clamp_limit is 0.0; accepted: a finite number above 0", X, {"clamp_limit": 0.0}),
        ("clamp_limit is inf; accepted", X, {"clamp_limit": float("inf")}),
        ("glu_alpha is nan; accepted: a finite number", X, {"glu_alpha": float("nan")}),
        ("glu_bias is -inf; accepted: a finite number", X, {"glu_bias": float("-inf")}),
        ("activate_dim is 2; accepted: None or -2 to 1", X, {"activate_dim": 2}),
        (
            "activate_dim is 0; accepted: a dimension other than the last only in static",
            X,
            {"activate_dim": 0, "quant_mode": 1},
        ),
        (
            "activate_dim is -2; accepted: .* without group_index",
            X,
            {"activate_dim": -2, "group_index": INDEX},
        ),
        ("group_index has dtype int32; accepted: int64", X, {"group_index": INDEX.int()}),
        ("group_index has 2 dimensions; accepted: 1", X, {"group_index": INDEX[None]}),
        ("weight_scale is None; accepted: a float32 tensor where x is int32", XI, {}),
        ("weight_scale has dtype bfloat16; accepted: float32", XI, {"weight_scale": W.bfloat16()}),
        ("weight_scale has 3 dimensions; accepted: 1 to 2", XI, {"weight_scale": W[None, None]}),
        (
            r"weight_scale has shape \[4\]; accepted: \[1, 8\], or \[8\] for one group",
            XI,
            {"weight_scale": W[:4]},
        ),
        (r"weight_scale has shape \[8\]; accepted: \[2, 8\]", XI, {"weight_scale": W, "group_index": INDEX}),
        (r"weight_scale has shape \[2, 8\]; accepted: \[1, 8\]", XI, {"weight_scale": W.expand(2, 8)}),
        (
            "activation_scale has dtype float16; accepted: float32",
            XI,
            {"weight_scale": W, "activation_scale": torch.ones(4).half()},
        ),
        (
            r"activation_scale has shape \[8\]; accepted: one element for each of the 4 rows of x",
            XI,
            {"weight_scale": W, "activation_scale": torch.ones(8)},
        ),
        ("bias has dtype int8; accepted: int32, float16", XI, {"weight_scale": W, "bias": W.to(torch.int8)}),
        (r"bias has shape \[4\]; accepted: \[1, 8\]", XI, {"weight_scale": W, "bias": W[:4]}),
        (
            r"bias has shape \[8\]; accepted: \[2, 8\]",
            XI,
            {"weight_scale": W.expand(2, 8), "bias": W, "group_index": INDEX},
        ),
        ("weight_scale is given; accepted: None where x is torch.float16, not int32", X, {"weight_scale": W}),
        ("activation_scale is given; accepted: None where x", X, {"activation_scale": torch.ones(4)}),
        ("bias is given; accepted: None where x", X, {"bias": W}),
        ("quant_scale has dtype float64; accepted: float16", X, {"quant_scale": W[:4].double()}),
        ("quant_scale has 3 dimensions; accepted: 1 to 2", X, {"quant_scale": torch.ones(1, 1, 4)}),
        (r"quant_scale has shape \[8\]; accepted: .* or a scalar per group: \[1\]", X, {"quant_scale": W}),
        (
            r"quant_scale has shape \[1\]; accepted: \[1, 4\], or \[4\] for one group$",
            X,
            {"quant_scale": W[:1], "quant_mode": 1},
        ),
        (r"quant_scale has shape \[1, 1\]; accepted", X, {"quant_scale": W[:1, None], "quant_mode": 1}),
        (r"quant_scale has shape \[4\]; accepted: \[2, 4\]", X, {"quant_scale": W[:4], "group_index": INDEX}),
        (
            r"quant_scale has shape \[1, 4\]; accepted: \[2, 4\]",
            X,
            {"quant_scale": W[None, :4], "group_index": INDEX},
        ),
        ("quant_offset is given; accepted: None without quant_scale", X, {"quant_offset": W[:4]}),
        (
            "quant_offset is given; accepted: None in dynamic mode",
            X,
            {"quant_scale": W[:4], "quant_offset": W[:4], "quant_mode": 1},
        ),
        (
            "quant_offset has dtype float16; accepted: float32",
            X,
            {"quant_scale": W[:4], "quant_offset": W[:4].half()},
        ),
        (
            r"quant_offset has shape \[1\]; accepted: \[4\]",
            X,
            {"quant_scale": W[:4], "quant_offset": W[:1]},
        ),
    ],
)
def test_refusals(match: str, x: Tensor, options: dict[str, Any]) -> None:
    check_refused(NAME, match, x, **options)


@pytest.mark.parametrize("dst_type", [0, 2, 3, 5, 12, 16, 290, 296, 297, torch.int16, torch.quint4x2])
def test_refuses_other_dst_types_and_above_all_the_graph_engines_int8(dst_type: int | torch.dtype) -> None:
    check_refused(NAME, r"dst_type is \d+.*; accepted: None or 1 \(int8\), 24 or 292", X, dst_type=dst_type)


def test_only_float8_with_another_round_mode_is_refused_of_all_combinations() -> None:
    for quant_mode, round_mode, swiglu_mode, dst_type in itertools.product(
        (0, 1), (None, 0, 1, 2, 3, 4), (0, 1, 2), (None, 1, 23, 24, 291, 292)
    ):
        options = {"quant_mode": quant_mode, "round_mode": round_mode, "swiglu_mode": swiglu_mode}
        if dst_type not in (None, 1) and round_mode:
            with pytest.raises(ValueError, match=f"{NAME}: round_mode"):
                dsq(X, dst_type=dst_type, **options)
        else:
            y, _ = dsq(X, dst_type=dst_type, **options)
            assert y.shape == (4, 4)
