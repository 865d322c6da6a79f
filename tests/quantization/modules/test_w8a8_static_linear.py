from __future__ import annotations

import pytest
import torch
from torch import nn

from npu_fusion.quantization.input_parameters import InputParameters
from npu_fusion.quantization.modules import W8A8StaticLinear, deploy
from npu_fusion.quantization.modules.w8a8_static_linear import _bias
from npu_fusion.quantization.quantized_weight import QuantizedWeight
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

WEIGHTS = WeightScheme("int8")
CODES = torch.tensor([[1, -2, 3, 4], [5, 6, -7, -128]], dtype=torch.int8)
SCALE = torch.tensor([0.5, 0.25])


def static(
    bias: list[float] | None,
    scale: float = 0.1,
    offset: int | None = None,
    dtype: torch.dtype = torch.float32,
    smooth: torch.Tensor | None = None,
) -> W8A8StaticLinear:
    layer = nn.Linear(4, 2, bias=bias is not None)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    scheme = Scheme(WEIGHTS, InputScheme("int8", offset is None, "tensor"))
    zero_point = None if offset is None else torch.tensor([offset], dtype=torch.int32)
    inputs = InputParameters(torch.tensor([scale]), zero_point)
    made = deploy(layer.to(dtype), scheme, QuantizedWeight(WEIGHTS, CODES, SCALE), inputs, smooth)
    assert isinstance(made, W8A8StaticLinear)
    return made


def test_what_is_precomputed() -> None:
    made = static([1.03, -2.0], offset=-5)
    assert made.bias is not None
    assert made.input_offset is not None
    torch.testing.assert_close(made.deq_scale, torch.tensor([0.05, 0.025]), rtol=1e-7, atol=0)
    # round(1.03 / 0.05) + 5 · (1 - 2 + 3 + 4), round(-2 / 0.025) + 5 · (5 + 6 - 7 - 128)
    assert made.bias.tolist() == [21 + 30, -80 - 620]
    assert made.bias.dtype == torch.int32
    assert made.input_scale.tolist() == torch.full((4,), 0.1).tolist()
    assert made.input_offset.tolist() == [-5] * 4
    q = torch.tensor([[-5, -4, 100, 127]])  # x = 0, s, 105 s, 132 s
    y = made((q + 5) * 0.1)
    exact = ((q + 5) * 0.1).double() @ (CODES * SCALE[:, None]).double().T + torch.tensor([21 * 0.05, -2])
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_model_keeps_scale_and_zero_point_in_bfloat16_and_derives_the_rest_of_them() -> None:
    made = static(None, scale=0.1, offset=77, dtype=torch.bfloat16)
    rounded = torch.tensor(0.1).bfloat16()
    assert made.input_offset is not None
    assert (made.input_scale.dtype, made.input_offset.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(made.input_scale, rounded.expand(4))
    assert made.input_offset.tolist() == [77.0] * 4
    assert rounded.float() != torch.tensor(0.1)
    assert torch.equal(made.deq_scale, rounded.float() * SCALE)
    assert static(None, dtype=torch.float16).input_scale.dtype == torch.float32


def test_smoothing_is_in_the_scale_which_stays_float32() -> None:
    smooth = torch.tensor([0.5, 1.0, 2.0, 3.0]).bfloat16()
    made = static(None, scale=0.1, offset=3, dtype=torch.bfloat16, smooth=smooth)
    assert made.input_offset is not None
    assert (made.input_scale.dtype, made.input_offset.dtype) == (torch.float32, torch.int32)
    assert torch.equal(made.input_scale, torch.tensor(0.1) / smooth.float())
    assert torch.equal(made.deq_scale, torch.tensor(0.1) * SCALE)


def test_a_bias_beyond_int32_is_added_after_the_scales() -> None:
    """With an int32 bias the second channel would give 107 instead of 500."""
    big = 2.0**31 * 0.05e-6
    made = static([0.0, 5 * big], scale=1e-7, offset=9)
    assert made.bias is not None
    assert made.bias.dtype == torch.float32
    x = torch.tensor([[1.0, -3.0, 2.0, 0.5]]) * 1e-7
    q = ((x / 1e-7 + 9).round() - 9) * 1e-7
    exact = q.double() @ (CODES * SCALE[:, None]).double().T + torch.tensor([0.0, 5 * big]).double()
    torch.testing.assert_close(made(x).double(), exact, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("steps", "dtype"), [(0, torch.int32), (1, torch.float32)])
def test_the_last_bias_that_int32_holds_together_with_the_largest_product(
    steps: int, dtype: torch.dtype
) -> None:
    """Reach of the second channel: 128 · (5 + 6 + 7 + 128) = 18688."""
    bias = float(2**31 - 1 - 18688 + steps)
    layer = nn.Linear(4, 2).double()
    layer.bias.data = torch.tensor([0.0, bias], dtype=torch.float64)
    found = _bias(layer.bias, CODES, None, torch.ones(2))
    assert found is not None
    assert found.dtype == dtype
    assert found[1].item() == (bias if dtype == torch.int32 else torch.tensor(bias).item())


def test_refuses_sizes() -> None:
    scheme = Scheme(WEIGHTS, InputScheme("int8", True, "tensor"))
    with pytest.raises(ValueError, match="W8A8StaticLinear: in_features is 1 and out_features 3; accepted"):
        W8A8StaticLinear(1, 3, scheme, bias=None, input_scale=torch.float32)
