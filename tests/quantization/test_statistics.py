"""Running statistics equal those of all data at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_fusion.quantization import statistics
from npu_fusion.quantization.statistics import NEEDS, SAMPLED_IMAGES, SAMPLED_ROWS, Statistics

CPU = torch.device("cpu")


def gathered(batches: list[Tensor], needs: tuple[str, ...] = NEEDS, images: bool = False) -> Statistics:
    channels = batches[0].size(1 if images else -1)
    found = Statistics(channels, needs, CPU, images=images)
    for batch in batches:
        found.update(batch)
    return found


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_they_equal_those_of_all_rows(sizes: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(*size, 3, generator=generator) * 10).to(dtype) for size in sizes]
    found = gathered(batches)
    rows = torch.cat([batch.reshape(-1, 3) for batch in batches]).double()
    assert found.rows == len(rows)
    if found.rows == 0:
        assert not found.abs_mean.any() and not found.gram.any()
        return
    for got, expected in (
        (found.low, rows.amin(0)),
        (found.high, rows.amax(0)),
        (found.abs_max, rows.abs().amax(0)),
    ):
        assert torch.equal(got.double(), expected)
    torch.testing.assert_close(found.abs_mean.double(), rows.abs().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gram.double(), rows.t() @ rows, rtol=1e-4, atol=1e-3)


def test_images() -> None:
    batches = [torch.randn(2, 3, 4, 5), torch.randn(1, 3, 4, 5)]
    found = gathered(batches, ("range", "abs_mean", "sample"), images=True)
    pixels = torch.cat(batches)
    assert found.rows == 3
    assert torch.equal(found.low, pixels.amin((0, 2, 3)))
    torch.testing.assert_close(found.abs_mean, pixels.abs().mean((0, 2, 3)))
    assert torch.equal(found.sample, pixels)


@pytest.mark.parametrize(("images", "limit"), [(False, SAMPLED_ROWS), (True, SAMPLED_IMAGES)])
@pytest.mark.parametrize("count", [1, 3, 5, 1000])
def test_a_sample_is_bounded_and_out_of_all_batches(count: int, images: bool, limit: int) -> None:
    shape = (40, 1, 1, 1) if images else (600, 1)
    found = gathered([torch.full(shape, float(i)) for i in range(count)], ("sample",), images=images)
    assert found.sample.size(0) <= limit
    batches = found.sample.flatten().unique()
    assert batches.numel() >= min(count, limit // 2)
    assert batches.min() == 0
    # 1000 batches are more than there is room for; up to as many, each is there and counts the same.
    if count <= limit:
        assert batches.numel() == count
        assert len(set(found.sample.flatten().long().bincount().tolist())) == 1


def test_a_sample_is_of_images_of_one_size() -> None:
    found = gathered(
        [torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 6, 4), torch.ones(1, 3, 4, 4)],
        ("range", "sample"),
        images=True,
    )
    assert found.sample.shape == (3, 3, 4, 4) and found.rows == 5
    assert not found.low.any(), "the range is of all of them"


def test_only_what_is_needed_is_computed() -> None:
    found = gathered([torch.randn(4, 8)], ("range",))
    assert found.gram.numel() == 0 and found._batches == [] and not found._abs_sum.any()


def test_the_input_is_only_read() -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    found = gathered([x])
    x.zero_()
    assert torch.equal(found.sample, before)


def test_strided_inputs() -> None:
    x = torch.randn(8, 6, 4)
    assert torch.equal(gathered([x.transpose(0, 1)]).low, x.reshape(-1, 4).amin(0))
    assert statistics.RANGE in NEEDS
