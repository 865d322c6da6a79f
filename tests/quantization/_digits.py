"""A small CNN, trained on scikit-learn's digits in seconds, and quantized ones of it."""

from __future__ import annotations

import copy
import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from npu_fusion.quantization import convert, quantize

TRAINED = 1200
EPOCHS, BATCH = 20, 64


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images[order], torch.tensor(digits.target)[order]


@functools.cache
def _trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )
    images, labels = (part[:TRAINED] for part in _data())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINED, generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


def digits_cnn() -> nn.Module:
    """In float32; a new copy."""
    return copy.deepcopy(_trained())


def quantized_cnn(kind: str, strategy: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """With all convolutions and the linear layer in ``kind`` (hifloat8, float8_e4m3fn), by ofmr."""
    model = digits_cnn().to(dtype)
    quant_cfg = {
        "weights": {"type": kind, "symmetric": True, "strategy": strategy},
        "inputs": {"type": kind, "symmetric": True, "strategy": "tensor"},
    }
    quantize(model, {"batch_num": 2, "quant_cfg": quant_cfg, "algorithm": {"ofmr"}})
    for images in _data()[0][: 2 * BATCH].split(BATCH):
        model(images.to(dtype))
    return convert(model)


@torch.no_grad()
def accuracy(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    """On the images that were not trained on."""
    images, labels = (part[TRAINED:] for part in _data())
    return float((model(images.to(dtype)).argmax(1) == labels).float().mean())
