from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization import quantize_linears
from npu_fusion.quantization.modules.smoothquant import LLMInt8Linear, split_outliers
from npu_fusion.quantization.smoothing import get_act_scales


class Model(nn.Module):
    """A gain of which four entries are large makes outliers, as the norms of language models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        gain = torch.ones(64)
        gain[[3, 20, 41, 60]] = 200.0
        self.register_buffer("gain", gain)
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.last = nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(nn.functional.normalize(x) * self.gain) * 0.02
        return self.lm_head(self.last(self.second(nn.functional.normalize(h) * self.gain)))


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_a_model_with_outliers_stays_what_it_was() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        exact = Model()(x)
        split, plain = Model(), Model()
        names = split_outliers(split, get_act_scales(split, batches(), progress=False))
        assert names == ["first", "second", "last"]
        assert split.first is split.second
        assert quantize_linears(plain) == names
        assert isinstance(split.first, LLMInt8Linear)
        assert split.first.outliers is not None
        assert split.first.outliers.tolist() == [3, 20, 41, 60]
        assert type(split.lm_head) is nn.Linear
        error, naive = ((m(x) - exact).abs().mean() / exact.abs().mean() for m in (split, plain))
    assert error < 0.02
    assert naive > 3 * error


def test_the_threshold_and_skip() -> None:
    model = Model()
    scales = get_act_scales(model, batches(), progress=False)
    assert split_outliers(model, scales, threshold=1e6, skip=("last", "lm_head")) == ["first", "second"]
    assert isinstance(model.first, LLMInt8Linear)
    assert model.first.outliers is None


def test_refusals_change_nothing() -> None:
    model = Model()
    scales = get_act_scales(model, batches(), progress=False)
    with pytest.raises(
        ValueError, match="split_outliers: layer last: act_scales has no entry for it; accepted: one"
    ):
        split_outliers(model, {name: scales[name] for name in scales if name != "last"})
    with pytest.raises(
        ValueError, match=r"split_outliers: layer last: .*act_scales has shape \[3\]; accepted"
    ):
        split_outliers(model, scales | {"last": torch.ones(3)})
    with pytest.raises(
        TypeError, match="split_outliers: skip must be a sequence of names, got the string 'last'"
    ):
        split_outliers(model, scales, skip="last")
    with pytest.raises(ValueError, match="split_outliers: model is itself a Linear"):
        split_outliers(nn.Linear(2, 2), {})
    assert type(model.first) is type(model.last) is nn.Linear
