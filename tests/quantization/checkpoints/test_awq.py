from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization import QuantizationWarning
from npu_fusion.quantization.checkpoints import load_checkpoint
from npu_fusion.quantization.modules import Deployed
from tests.quantization.checkpoints._packers import (
    AWQ_CONFIG,
    LAYERS,
    TOKENS,
    Small,
    Tensors,
    awq_layer,
    awq_pack,
    model_of,
    reference,
    save,
    save_sharded,
    weight_of,
)
from tests.quantization.checkpoints._snapshot import refused


@pytest.fixture(scope="module")
def made() -> tuple[Tensors, dict[str, Tensor]]:
    return model_of(awq_layer)


def test_the_interleave_is_that_of_the_gemm_kernels() -> None:
    # Outputs 0 to 7 hold their own numbers; the word has them in the order 0, 2, 4, 6, 1, 3, 5, 7.
    assert int(awq_pack(np.arange(8)[None])) & 0xFFFFFFFF == 0x75316420


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep", [save, save_sharded])
def test_weights_are_the_numbers_of_the_file(
    made: Any, tmp_path: Path, keep: Any, dtype: torch.dtype
) -> None:
    tensors, weights = made
    model = Small(dtype=dtype)
    loaded = load_checkpoint(model, keep(tmp_path, tensors, AWQ_CONFIG))
    assert loaded.format == "awq" and not loaded.left and not loaded.ignored
    assert loaded.layers == dict.fromkeys(LAYERS, "int4 weights (group, asymmetric)")
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, Deployed)
        assert (layer.scheme.algorithm, layer.scheme.weights.group_size) == ("awq", 32)
        assert torch.equal(weight_of(layer), weights[name])
    assert torch.equal(model.norm.bias, tensors["norm.bias"].to(dtype))
    assert torch.equal(model.head.weight, tensors["embed.weight"].to(dtype))
    assert model.head.weight is model.embed.weight


def test_the_model_computes_with_them(made: Any, tmp_path: Path) -> None:
    tensors, weights = made
    model = Small()
    load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    torch.testing.assert_close(model(TOKENS), reference(weights)(TOKENS))


def test_a_model_without_memory_is_given_it(made: Any, tmp_path: Path) -> None:
    tensors, weights = made
    with torch.device("meta"):
        model = Small()
    load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embed.weight and isinstance(model.head.weight, nn.Parameter)
    torch.testing.assert_close(model(TOKENS), reference(weights)(TOKENS))


def test_scales_that_bfloat16_has_not_are_rounded_and_that_is_said(made: Any, tmp_path: Path) -> None:
    tensors, weights = made
    model = Small(dtype=torch.bfloat16)
    loaded = load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    assert loaded.layers["gate"] == "int4 weights (group, asymmetric), scales rounded to bfloat16"
    codes = model.gate.quantized_weight()  # type: ignore[operator]
    assert torch.equal(codes.scale, tensors["gate.scales"].t().bfloat16().float())
    torch.testing.assert_close(codes.dequantize(), weights["gate"], rtol=2**-8, atol=0)


def test_zero_points_in_the_middle_are_a_symmetric_weight(tmp_path: Path) -> None:
    tensors, _ = model_of(awq_layer)
    middle = awq_pack(np.full((4, 64), 8))
    model = Small()
    loaded = load_checkpoint(model, save(tmp_path, tensors | {"gate.qzeros": middle}, AWQ_CONFIG))
    assert loaded.layers["gate"] == "int4 weights (group)"
    assert loaded.layers["up"] == "int4 weights (group, asymmetric)"


def test_one_group_is_a_scale_for_each_channel(tmp_path: Path) -> None:
    tensors, weights = model_of(lambda name, n, k: awq_layer(name, n, k, group=k))
    model = Small()
    loaded = load_checkpoint(model, save(tmp_path, tensors, {**AWQ_CONFIG, "group_size": -1}))
    assert loaded.layers["down"] == "int4 weights (channel, asymmetric)"
    assert all(torch.equal(weight_of(model.get_submodule(name)), weights[name]) for name in LAYERS)


def test_sizes_that_the_operator_does_not_take_become_floats(tmp_path: Path) -> None:
    def layer(name: str, outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        return awq_layer(name, *((96, 128) if name != "down" else (128, 96)))

    tensors, weights = model_of(layer)
    model = Small(inner=96)
    with pytest.warns(QuantizationWarning, match="down: K is 96 and N is 128; accepted .* of 64"):
        loaded = load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    assert not loaded.layers and set(loaded.left) == set(LAYERS)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LAYERS)
    assert all(torch.equal(weight_of(model.get_submodule(name)), weights[name]) for name in LAYERS)


def test_biases_are_kept(tmp_path: Path) -> None:
    tensors, weights = model_of(awq_layer)
    biases = {f"{name}.bias": torch.randn(weights[name].size(0)).half() for name in LAYERS}
    model = Small(bias=True)
    load_checkpoint(model, save(tmp_path, tensors | biases, AWQ_CONFIG))
    expected = reference(weights, biases)
    torch.testing.assert_close(model(TOKENS), expected(TOKENS))


def test_autoawq_own_file_of_settings_is_read(made: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, made[0], {})
    (folder / "config.json").unlink()
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(settings))
    assert load_checkpoint(Small(), folder).format == "awq"


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"version": "gemv"}, "version is 'gemv'; accepted: 'gemm'"),
        ({"zero_point": False}, "zero_point is false; accepted: true"),
        ({"bits": 8}, "bits is 8; accepted: 4"),
        ({"bits": "4"}, "bits is '4'; accepted: int"),
        ({"group_size": 0}, "group_size is 0; accepted: -1 (all inputs), or at least 1"),
        ({"group_size": 48}, "down.qweight has 64 inputs; accepted: a multiple of group_size 48"),
        ({"group_size": 64}, "down.qzeros is int32 [2, 16]; accepted: int32 [1, 16]"),
        ({"group_size": True}, "group_size is True; accepted: int"),
    ],
)
def test_other_layouts_are_refused(made: Any, tmp_path: Path, setting: dict[str, Any], text: str) -> None:
    model = Small()
    folder = save(tmp_path, made[0], AWQ_CONFIG | setting)
    with refused(model, text):
        load_checkpoint(model, folder)


def damaged(tensors: Tensors, name: str, value: Tensor | None) -> Tensors:
    return {key: t for key, t in {**tensors, name: value}.items() if t is not None}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("up.scales", None, "up.scales is missing"),
        ("up.qzeros", None, "up.qzeros is missing"),
        ("norm.bias", None, "norm.bias is missing"),
        ("embed.weight", None, "embed.weight is missing"),
        ("up.qweight", torch.zeros(128, 8), "up.qweight is float32 [128, 8]; accepted: int32"),
        ("up.qweight", torch.zeros(128, 8, dtype=torch.int64), "up.qweight is int64"),
        ("up.qweight", torch.zeros(128, dtype=torch.int32), "up.qweight has shape [128]"),
        (
            "up.qweight",
            torch.zeros(96, 8, dtype=torch.int32),
            "up.qzeros is int32 [4, 8]; accepted: int32 [3, 8]",
        ),
        ("up.scales", torch.full((4, 64), float("nan")), "up.scales has NaN"),
        ("up.scales", torch.full((4, 64), float("inf")), "up.scales has NaN, infinities"),
        ("up.scales", torch.full((4, 64), -0.1), "up.scales has NaN, infinities or negative"),
        ("up.scales", torch.zeros(4, 64), "up.scales is 0 everywhere"),
        ("up.scales", torch.ones(4, 32), "up.scales has shape [4, 32]; accepted: [4, 64]"),
        ("up.scales", torch.ones(4, 64, dtype=torch.int8), "up.scales is int8"),
        ("up.bias", torch.ones(64), "up has a bias that is not 0"),
        ("other.weight", torch.ones(2), "other.weight has no place in the model"),
        ("up.weight", torch.ones(64, 128), "up.weight has no place in the model"),
        ("norm.weight", torch.ones(127), "norm.weight is float32 [127]; accepted"),
        ("norm.weight", torch.ones(128, dtype=torch.int32), "norm.weight is int32"),
        ("norm.weight", torch.ones(128).to(torch.float8_e4m3fn), "norm.weight is float8_e4m3fn"),
        ("extra.qweight", torch.zeros(128, 8, dtype=torch.int32), "extra.qzeros is missing"),
    ],
)
def test_damaged_tensors_are_named(
    made: Any, tmp_path: Path, name: str, value: Tensor | None, text: str
) -> None:
    model = Small()
    folder = save(tmp_path, damaged(made[0], name, value), AWQ_CONFIG)
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, folder)


def test_another_model_is_refused(made: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, made[0], AWQ_CONFIG)
    for model in (Small(hidden=64), Small(inner=128), nn.Sequential(nn.Linear(128, 64))):
        with refused(model, "model.safetensors"):
            load_checkpoint(model, folder)


def test_the_same_layer_twice_in_the_file_is_refused(made: Any, tmp_path: Path) -> None:
    model = Small()
    model.up = model.gate
    with refused(model, "up is the same layer as another of the file"):
        load_checkpoint(model, save(tmp_path, made[0], AWQ_CONFIG))


def test_a_layer_with_hooks_is_not_replaced(made: Any, tmp_path: Path) -> None:
    model = Small()
    model.up.register_forward_hook(lambda *_: None)
    with refused(model, "up cannot be replaced: up has hooks"):
        load_checkpoint(model, save(tmp_path, made[0], AWQ_CONFIG))


def test_a_value_beyond_the_dtype_of_the_model_is_refused(made: Any, tmp_path: Path) -> None:
    model = Small(dtype=torch.float16)
    large = made[0] | {"norm.weight": torch.full((128,), 1e5)}
    with refused(model, "norm.weight has numbers beyond those of torch.float16"):
        load_checkpoint(model, save(tmp_path, large, AWQ_CONFIG))
