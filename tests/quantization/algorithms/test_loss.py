from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.algorithms._loss import gram_of, output_error, weight_error
from npu_fusion.quantization.qparams import round_to_nearest
from tests.quantization.algorithms._problems import INT4, correlated, exact_error, problem, random


def test_error_is_that_of_the_output() -> None:
    weight, x = random(12, 40, seed=1), correlated(200, 40)
    quantized = round_to_nearest(weight, INT4)
    exact = exact_error(quantized.dequantize(), weight, x)
    torch.testing.assert_close(weight_error(quantized, weight, x.t() @ x).double(), exact, rtol=1e-4, atol=0)
    difference = quantized.dequantize() - weight
    kept = difference.clone()
    torch.testing.assert_close(output_error(difference, x.t() @ x).double(), exact, rtol=1e-4, atol=0)
    assert torch.equal(difference, kept)


def test_gram_matrix_of_all_batches() -> None:
    x = random(30, 8)
    gram = gram_of(problem("gptq", [random(4, 8)], x, INT4))
    torch.testing.assert_close(gram, x.t() @ x)


@pytest.mark.parametrize(
    "x", [None, torch.full((2, 8), math.inf), torch.full((2, 8), 1e30), torch.ones(2, 8, 3, 3)]
)
def test_no_gram_matrix(x: Tensor | None) -> None:
    assert gram_of(problem("gptq", [random(4, 8)], x, INT4)) is None
