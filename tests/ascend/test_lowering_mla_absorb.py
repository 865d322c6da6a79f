"""Absorbed latent attention is plain ATen operators; all of them have converters."""

from __future__ import annotations

import pytest

from tests.ascend._lowering import assert_dynamic, assert_near, lower_only
from tests.passes import test_mla_absorb as absorb


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("key", ["filled", "cat"])
def test_it_lowers(key: str, dynamic: bool) -> None:
    form = absorb.Form("eager", key=key)
    args = absorb.symbolic(form) if dynamic else absorb.data(form)
    got = lower_only("mla_absorb", absorb.Latent(form), args, dynamic=dynamic, numerics="relaxed")
    assert got.fused == {"mla_absorb": 1}
    # the product with each half of the up projection, the scores and the weighted latents
    assert got.graph.counts["BatchMatMul"] == 4
    assert_near(got, 1e-4)
    if dynamic:
        assert_dynamic(got, "BatchMatMul")
