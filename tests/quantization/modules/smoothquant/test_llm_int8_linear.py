from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from npu_fusion.quantization.modules import W8A8DynamicLinear, quantize_rows
from npu_fusion.quantization.modules.smoothquant import LLMInt8Linear
from tests.quantization.modules.smoothquant._layers import DTYPES, EMPTY, SHAPES, buffers, layer, sums
from tests.quantization.modules.smoothquant._trace import traced

OUTLIERS = torch.tensor([31, 2, 17])


def exact(quantized: LLMInt8Linear, x: Tensor) -> Tensor:
    """The layer's formula: its own integers in Python, everything else in float64."""
    q, scale = quantize_rows(
        x.float() if quantized.regular is None else x.float() * quantized.regular.float()
    )
    y = sums(q, quantized.weight, None).double() * quantized.weight_scale.double() * scale.double()
    if quantized.outliers is not None and quantized.outlier_weight is not None:
        y = y + x.double()[..., quantized.outliers] @ quantized.outlier_weight.double().t()
    return y if quantized.bias is None else y + quantized.bias.double()


def with_outliers(rows: int, size: float = 100.0) -> Tensor:
    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))
    x[:, OUTLIERS] *= size
    return x


@pytest.mark.parametrize("outliers", [OUTLIERS, OUTLIERS[:1].int(), torch.arange(40), OUTLIERS[:0]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype: torch.dtype, bias: bool, outliers: Tensor) -> None:
    quantized = LLMInt8Linear.from_float(layer(bias=bias).to(dtype), outliers)
    x = with_outliers(9).to(dtype)
    y, expected = quantized(x), exact(quantized, x)
    assert y.dtype == dtype
    # Each of the two parts and their sum is rounded to the dtype, and parts can cancel.
    apart = x.double()[:, outliers].abs() @ quantized_weights(quantized).abs().t()
    size = expected.abs().max() + apart.max()
    assert (y.double() - expected).abs().max() <= size * (2 * torch.finfo(dtype).eps + 1e-6)


def quantized_weights(quantized: LLMInt8Linear) -> Tensor:
    """Those in floating point."""
    if quantized.outlier_weight is None:
        return torch.zeros(quantized.out_features, 0, dtype=torch.float64)
    return quantized.outlier_weight.double()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    outliers=st.sets(st.integers(0, 15), max_size=6),
    size=st.floats(1.0, 1e4),
)
def test_the_error_is_that_of_the_other_channels(seed: int, outliers: set[int], size: float) -> None:
    """However large outliers are, the error is that of a layer whose input has zeros there."""
    generator = torch.Generator().manual_seed(seed)
    linear = layer(16, 6, seed=seed)
    index = torch.tensor(sorted(outliers), dtype=torch.int64)
    x = torch.randn(5, 16, generator=generator)
    x[:, index] *= size
    rest = x.index_fill(1, index, 0)
    w = linear.weight.detach().double()
    step_x = rest.abs().amax(1, keepdim=True).double() / 127
    step_w = w.index_fill(1, index, 0).abs().amax(1) / 127
    bound = rest.double().abs().sum(1, keepdim=True) * step_w / 2
    bound = bound + step_x / 2 * w.index_fill(1, index, 0).abs().sum(1) + 16 * step_x * step_w / 4
    error = (
        LLMInt8Linear.from_float(linear, index)(x).double() - x.double() @ w.t() - linear.bias.double()
    ).abs()
    assert (error <= bound * 1.001 + 1e-5 + 1e-6 * x.abs().max()).all()


def test_the_outliers_error_is_gone() -> None:
    linear = layer()
    x = with_outliers(64)
    y = (x.double() @ linear.weight.double().t() + linear.bias.double()).detach()

    def error(quantized: nn.Module) -> float:
        return float((quantized(x).double() - y).abs().mean())

    split, plain = LLMInt8Linear.from_float(linear, OUTLIERS), W8A8DynamicLinear.from_float(linear)
    calm = with_outliers(64, size=1.0)
    rest = plain(calm).double() - calm.double() @ linear.weight.double().t() - linear.bias.double()
    assert error(plain) > 20 * error(split)
    assert error(split) <= float(rest.detach().abs().mean())


def test_outliers_come_from_statistics() -> None:
    linear = layer(6, 4)
    scales = torch.tensor([5.9, 6.0, 100.0, torch.inf, torch.nan, 0.0])
    for threshold, expected in (
        (6.0, [1, 2, 3, 4]),
        (100.0, [2, 3, 4]),
        (torch.tensor(5.0), [0, 1, 2, 3, 4]),
    ):
        quantized = LLMInt8Linear.from_float(linear, act_scales=scales, threshold=threshold)
        assert quantized.outliers is not None
        assert quantized.outliers.tolist() == expected
    default = LLMInt8Linear.from_float(linear, act_scales=scales)
    assert default.outliers is not None
    assert default.outliers.tolist() == [1, 2, 3, 4]
    none = LLMInt8Linear.from_float(linear, act_scales=torch.ones(6))
    assert (none.outliers, none.outlier_weight, none.regular) == (None, None, None)
    x = torch.randn(3, 6)
    assert torch.equal(none(x), W8A8DynamicLinear.from_float(linear)(x))


def test_what_is_kept_where() -> None:
    linear = layer().bfloat16()
    quantized = LLMInt8Linear.from_float(linear, OUTLIERS)
    index = sorted(OUTLIERS.tolist())
    assert quantized.outliers is not None and quantized.regular is not None
    assert quantized.outliers.tolist() == index
    assert not quantized.weight[:, index].any()
    assert torch.equal(quantized.outlier_weight, linear.weight.detach()[:, index])
    assert (quantized.regular == 0).nonzero().squeeze(1).tolist() == index
    rest = linear.weight.detach().index_fill(1, quantized.outliers, 0)
    codes, scale = quantize_rows(rest)
    assert torch.equal(quantized.weight, codes)
    assert torch.equal(quantized.weight_scale, scale.squeeze(1))


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    quantized = LLMInt8Linear.from_float(layer(8, 5), torch.tensor([1, 6]))
    x = torch.randn(shape)
    before = x.clone()
    y = quantized(x)
    assert torch.equal(x, before)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y.reshape(-1, 5), quantized(x.reshape(-1, 8)))


def test_zero_rows_give_the_bias_and_strides_do_not_matter() -> None:
    linear = layer(8, 5)
    quantized = LLMInt8Linear.from_float(linear, torch.tensor([0]))
    x = torch.zeros(2, 8)
    assert torch.equal(quantized(x), linear.bias.detach().expand(2, 5))
    x = torch.randn(8, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(quantized(x), quantized(x.contiguous()))


def test_state_dict_moves_and_the_float_layer() -> None:
    linear = layer().eval()
    before = copy.deepcopy(linear.state_dict())
    quantized = LLMInt8Linear.from_float(linear, OUTLIERS)
    assert all(torch.equal(before[name], value) for name, value in linear.state_dict().items())
    assert not quantized.training
    kept = {
        "weight": (torch.int8, (24, 40)),
        "weight_scale": (torch.float32, (24,)),
        "outliers": (torch.int64, (3,)),
        "bias": (torch.float32, (24,)),
    }
    floating = {"outlier_weight": (24, 3), "regular": (40,)}
    assert buffers(quantized) == kept | {n: (torch.float32, shape) for n, shape in floating.items()}
    loaded = LLMInt8Linear(40, 24, 3)
    loaded.load_state_dict(quantized.state_dict())
    x = with_outliers(5)
    assert torch.equal(loaded(x), quantized(x))
    half = nn.Sequential(loaded).to(torch.bfloat16)[0]
    assert buffers(half) == kept | {n: (torch.bfloat16, shape) for n, shape in floating.items()}
    torch.testing.assert_close(half(x.bfloat16()).float(), quantized(x), rtol=0.02, atol=0.02 * 400)
    assert half(x.half()).dtype == torch.float16  # its weights follow the input
    assert repr(quantized) == "LLMInt8Linear(in_features=40, out_features=24, outliers=3, bias=True)"


@pytest.mark.parametrize("outliers", [OUTLIERS, OUTLIERS[:0]])
def test_traces_as_one_graph(outliers: Tensor) -> None:
    quantized = LLMInt8Linear.from_float(layer().bfloat16(), outliers)
    calls = [[torch.randn(1, tokens, 40).bfloat16()] for tokens in (2, 40)]
    assert len(traced(quantized, calls, dynamic=True)) == 1


def test_one_token_is_right_under_inductor() -> None:
    """pytorch issue 195066, see W8A8DynamicLinear."""
    torch._dynamo.reset()
    quantized = LLMInt8Linear.from_float(layer(), OUTLIERS)
    x = torch.randn(1, 1, 40)
    with torch.no_grad():
        y = torch.compile(quantized, dynamic=False, fullgraph=True)(x)
    torch.testing.assert_close(y.double(), exact(quantized, x), rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    who, linear = "LLMInt8Linear.from_float", layer(8, 5)
    with pytest.raises(TypeError, match=f"{who}: module must be a torch.nn.Linear, got ReLU"):
        LLMInt8Linear.from_float(nn.ReLU(), torch.arange(2))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=f"{who}: neither of outliers and act_scales given; accepted: one of them"
    ):
        LLMInt8Linear.from_float(linear)
    with pytest.raises(TypeError, match="both of outliers and act_scales given"):
        LLMInt8Linear.from_float(linear, torch.arange(2), act_scales=torch.ones(8))
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=f"{who}: outliers has {wrong}; accepted: 0 to 7"):
            LLMInt8Linear.from_float(linear, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="outliers has an index twice; accepted: each once"):
        LLMInt8Linear.from_float(linear, torch.tensor([3, 3]))
    for tensor in (torch.ones(2), torch.ones(1, 1, dtype=torch.int64), torch.ones(8, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"outliers has dtype .* accepted: int64 or int32 \[O\]"):
            LLMInt8Linear.from_float(linear, tensor)
    with pytest.raises(ValueError, match=r"act_scales has shape \[7\]; accepted: \[8\]"):
        LLMInt8Linear.from_float(linear, act_scales=torch.ones(7))
    with pytest.raises(ValueError, match="threshold is 0.0; accepted: a positive finite number"):
        LLMInt8Linear.from_float(linear, act_scales=torch.ones(8), threshold=0.0)
    with pytest.raises(ValueError, match="LLMInt8Linear: outliers is 9; accepted: 0 to 8"):
        LLMInt8Linear(8, 5, 9)
    with pytest.raises(ValueError, match="LLMInt8Linear: in_features is 1 and out_features 5"):
        LLMInt8Linear(1, 5, 0)
    quantized = LLMInt8Linear(8, 5, 1)
    with pytest.raises(ValueError, match="LLMInt8Linear: x has dtype torch.float64; accepted: torch.float16"):
        quantized(torch.randn(2, 8).double())
    with pytest.raises(ValueError, match=r"LLMInt8Linear: x has shape \[2, 7\]; accepted: \[\.\.\., 8\]"):
        quantized(torch.randn(2, 7))
