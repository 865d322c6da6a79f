"""Beside compressed-tensors, where it is installed: its converters, and files that it has compressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_fusion.quantization.checkpoints import load_checkpoint
from tests.quantization.checkpoints._compressed import args, config
from tests.quantization.checkpoints._packers import (
    AWQ_CONFIG,
    FP8_CONFIG,
    LAYERS,
    Small,
    awq_layer,
    floats,
    fp8_layer,
    model_of,
    save,
    sizes,
    weight_of,
)
from tests.quantization.checkpoints.test_deepseek_fp8 import Layer

pytest.importorskip("compressed_tensors")


def test_autoawq_converter(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    tensors, _ = model_of(awq_layer)
    model = Small()
    load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    converted = AutoAWQConverter(group_size=32).process(dict(tensors))
    for name in LAYERS:
        shape = torch.Size(sizes(name))
        groups = torch.Size((shape[0], shape[1] // 32))
        codes = unpack_from_int32(converted[f"{name}.weight_packed"], 4, shape)
        zeros = unpack_from_int32(converted[f"{name}.weight_zero_point"], 4, groups, packed_dim=0)
        spread = [t.float().repeat_interleave(32, 1) for t in (zeros, converted[f"{name}.weight_scale"])]
        assert torch.equal((codes.float() - spread[0]) * spread[1], weight_of(model.get_submodule(name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_block_dequantizer(dtype: torch.dtype, tmp_path: Path) -> None:
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer

    own, _ = fp8_layer("kv", 576, 1000)
    tensors = {f"kv_a_proj_with_mqa.{key}": tensor for key, tensor in own.items()}
    model = Layer(576, 1000, dtype)
    load_checkpoint(model, save(tmp_path, tensors, FP8_CONFIG))
    converted = FP8BlockDequantizer(targets=["re:.*"], dtype=dtype).process(dict(tensors))
    assert torch.equal(model.kv_a_proj_with_mqa.weight.detach(), converted["kv_a_proj_with_mqa.weight"])


TOKEN = {"strategy": "token", "dynamic": True}
PACKED = [
    ("pack-quantized", args(bits, strategy="group", group_size=32, symmetric=symmetric), None)
    for bits in (2, 4, 8)
    for symmetric in (True, False)
]
CASES = [
    *PACKED,
    ("pack-quantized", args(4, strategy="channel", symmetric=False), None),
    ("int-quantized", args(8, strategy="channel"), args(8) | TOKEN),
    ("int-quantized", args(8, strategy="tensor"), args(8) | TOKEN),
    ("float-quantized", args(8, "float", strategy="channel"), args(8, "float") | TOKEN),
    (
        "float-quantized",
        args(8, "float", strategy="block", block_structure=[48, 40]),
        args(8, "float") | TOKEN,
    ),
]


@pytest.mark.filterwarnings("ignore::npu_fusion.quantization.QuantizationWarning")
@pytest.mark.parametrize(("layout", "weights", "inputs"), CASES)
def test_what_compressed_tensors_compresses(layout: str, weights: Any, inputs: Any, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    given = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    compressor = BaseCompressor.get_value_from_registry(layout)
    g = torch.Generator().manual_seed(1)
    tensors, expected = floats(), {}
    for name in LAYERS:
        outputs, columns = sizes(name)
        shape = {
            "group": (outputs, columns // 32),
            "channel": (outputs, 1),
            "tensor": (1,),
            "block": (-(-outputs // 48), -(-columns // 40)),
        }[weights["strategy"]]
        half = 2 ** (weights["num_bits"] - 1)
        scale = (torch.rand(shape, generator=g) + 1) * (2 / (448 if weights["type"] == "float" else half))
        # In a float16 model, where the scales of weights alone are of that dtype.
        state: dict[str, Tensor] = {
            "weight": torch.randn(outputs, columns, generator=g),
            "weight_scale": scale.half().float(),
        }
        if not weights["symmetric"]:
            state["weight_zero_point"] = torch.randint(-half, half, shape, generator=g).to(torch.int8)
        compressed = compressor.compress(state, given)
        expected[name] = compressor.decompress(dict(compressed), given)["weight"].float()
        tensors |= {f"{name}.{key}": tensor for key, tensor in compressed.items()}
    model = Small(dtype=torch.float16)
    if weights["strategy"] == "block":
        model = Small()
    load_checkpoint(model, save(tmp_path, tensors, config(layout, json.loads(given.model_dump_json()))))
    for name in LAYERS:
        assert torch.equal(weight_of(model.get_submodule(name)), expected[name])
