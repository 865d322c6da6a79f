from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.meta_impls._opcheck import check_operator, check_refused, compile_dynamic

NAMES = ["npu_dynamic_quant", "npu_dynamic_quant_asymmetric"]
QUINT4X2, HIFLOAT8 = 16, 290
FLOATS = {
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    291: torch.float8_e5m2,
    292: torch.float8_e4m3fn,
    torch.float8_e5m2: torch.float8_e5m2,
    torch.float8_e4m3fn: torch.float8_e4m3fn,
    HIFLOAT8: torch.uint8,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 8), (0, 8)])
def test_fake_and_real_agree(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y, *numbers = check_operator(name, torch.randn(shape).to(dtype))
    assert (y.shape, y.dtype) == (shape, torch.int8)
    assert len(numbers) == (1 if name == "npu_dynamic_quant" else 2)
    for number in numbers:
        assert (number.shape, number.dtype) == (shape[:-1], torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("quant_mode", "scale_shape"), [("pertoken", (2, 3)), ("perchannel", (2, 16)), ("pertensor", (1,))]
)
def test_modes(name: str, quant_mode: str, scale_shape: tuple[int, ...]) -> None:
    x = torch.randn(16, 3, 2).permute(2, 1, 0)
    smooth = torch.rand(3 if quant_mode == "perchannel" else 16)
    _, *numbers = check_operator(name, x, smooth_scales=smooth, quant_mode=quant_mode)
    assert all(number.shape == scale_shape for number in numbers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quant_mode", ["pertoken", "pertensor"])
@pytest.mark.parametrize("shape", [(2, 3, 16), (0, 16)])
def test_int4(name: str, quant_mode: str, shape: tuple[int, ...]) -> None:
    y, *_ = check_operator(name, torch.randn(shape), dst_type=QUINT4X2, quant_mode=quant_mode)
    assert (y.shape, y.dtype) == ((*shape[:-1], 2), torch.int32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quant_mode", ["pertoken", "perchannel", "pertensor"])
@pytest.mark.parametrize("dst_type", FLOATS)
def test_floats(name: str, quant_mode: str, dst_type: int | torch.dtype) -> None:
    x = torch.randn(16, 3, 2).permute(2, 1, 0).bfloat16()
    y, *numbers = check_operator(name, x, dst_type=dst_type, quant_mode=quant_mode)
    assert (y.shape, y.dtype) == (x.shape, FLOATS[dst_type])
    assert all(number.dtype == torch.float32 for number in numbers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dst_type_max", [0.0, 15.0, 32768.0])
def test_hifloat8_takes_a_maximum(name: str, dst_type_max: float) -> None:
    y, *_ = check_operator(name, torch.randn(0, 8), dst_type=HIFLOAT8, dst_type_max=dst_type_max)
    assert (y.shape, y.dtype) == ((0, 8), torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_groups(name: str) -> None:
    group_index = torch.tensor([1, 1, 6], dtype=torch.int32)
    check_operator(name, torch.randn(2, 3, 8), smooth_scales=torch.rand(3, 8), group_index=group_index)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"dst_type": QUINT4X2},
        {"quant_mode": "perchannel"},
        {"dst_type": 24},
        {"dst_type": HIFLOAT8, "dst_type_max": 15.0},
    ],
)
def test_dynamic_rows_in_one_graph(name: str, kwargs: dict[str, Any]) -> None:
    operator = getattr(torch.ops.npu, name)
    compile_dynamic(lambda x: operator(x, **kwargs), lambda t: [torch.randn(t, 16)], [2, 7, 3])


@pytest.mark.parametrize("name", NAMES)
def test_dynamic_columns_and_groups_in_one_graph(name: str) -> None:
    operator = getattr(torch.ops.npu, name)
    compile_dynamic(
        lambda x, smooth, ends: operator(x, smooth_scales=smooth, group_index=ends),
        lambda n: [torch.randn(2, 3, 4 * n), torch.rand(n, 4 * n), torch.full((n,), 6, dtype=torch.int32)],
        [2, 5, 3],
        dynamic=[(0, 2), (1, 0), (1, 1), (2, 0)],
    )


@pytest.mark.parametrize("name", NAMES)
class TestRefusals:
    x = torch.ones(2, 8)
    ends = torch.tensor([2], dtype=torch.int32)

    def test_input(self, name: str) -> None:
        check_refused(name, "input has dtype int32; accepted: float16, bfloat16, float32", self.x.int())
        check_refused(name, "input has 1 dimensions; accepted: at least 2", self.x[0])

    @pytest.mark.parametrize("dst_type", [2, 5, 12, 21, 285, 296])
    def test_dst_type(self, name: str, dst_type: int) -> None:
        # 2 is int8 in the graph engine below torch_npu, and int16 here.
        check_refused(
            name, rf"dst_type is {dst_type}; accepted: None, 1 \(int8\), 16", self.x, dst_type=dst_type
        )

    def test_modes(self, name: str) -> None:
        check_refused(name, "quant_mode is 'static'; accepted: 'pertoken'", self.x, quant_mode="static")
        check_refused(name, "quant_mode is 'perchannel'", self.x, dst_type=QUINT4X2, quant_mode="perchannel")

    @pytest.mark.parametrize("dst_type", [None, QUINT4X2, 24])
    def test_maximum_of_other_types(self, name: str, dst_type: int | None) -> None:
        message = r"dst_type_max is 15.0; accepted: 0 \(other values act on hifloat8 only\)"
        check_refused(name, message, self.x, dst_type=dst_type, dst_type_max=15.0)

    @pytest.mark.parametrize("dst_type_max", [-1.0, 32768.5, math.inf, math.nan])
    def test_maximum_of_hifloat8(self, name: str, dst_type_max: float) -> None:
        message = f"dst_type_max is {dst_type_max}; accepted: 0 to 32768"
        check_refused(name, message, self.x, dst_type=HIFLOAT8, dst_type_max=dst_type_max)

    def test_int4_columns(self, name: str) -> None:
        check_refused(
            name, "input has 9 columns; accepted: a multiple of 8", torch.ones(2, 9), dst_type=QUINT4X2
        )

    def test_smooth_scales(self, name: str) -> None:
        check_refused(name, "smooth_scales has dtype float64", self.x, smooth_scales=torch.ones(8).double())
        check_refused(
            name, "smooth_scales has 2 dimensions; accepted: 1", self.x, smooth_scales=torch.ones(1, 8)
        )
        check_refused(
            name, r"smooth_scales has shape \[7\]; accepted: \[8\]", self.x, smooth_scales=torch.ones(7)
        )
        check_refused(
            name,
            r"smooth_scales has shape \[8\]; accepted: \[2\], dimension -2",
            self.x,
            smooth_scales=torch.ones(8),
            quant_mode="perchannel",
        )

    def test_groups(self, name: str) -> None:
        two = torch.ones(2, 8)
        check_refused(
            name, "smooth_scales is None; accepted: .* with group_index", self.x, group_index=self.ends
        )
        check_refused(
            name,
            "group_index has dtype int64; accepted: int32",
            self.x,
            smooth_scales=two[:1],
            group_index=self.ends.long(),
        )
        check_refused(
            name, "smooth_scales has 1 dimensions", self.x, smooth_scales=two[0], group_index=self.ends
        )
        check_refused(
            name, r"accepted: \[1, 8\], groups and columns", self.x, smooth_scales=two, group_index=self.ends
        )
        check_refused(
            name, "group_index has 2 dimensions", self.x, smooth_scales=two, group_index=self.ends[None]
        )
        check_refused(
            name,
            "quant_mode is 'pertensor'; accepted: 'pertoken' with group_index",
            self.x,
            smooth_scales=two[:1],
            group_index=self.ends,
            quant_mode="pertensor",
        )
