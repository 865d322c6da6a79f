from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization import QuantizationWarning
from npu_fusion.quantization.checkpoints import Loaded, load_checkpoint
from npu_fusion.quantization.modules import Deployed
from npu_fusion.quantization.scheme import InputScheme
from tests.quantization.checkpoints._compressed import (
    FP8,
    TENSOR,
    TOKEN,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A16,
    args,
    config,
    float8_layer,
    group,
    int8_layer,
    packed_layer,
)
from tests.quantization.checkpoints._packers import (
    LAYERS,
    TOKENS,
    Small,
    Tensors,
    generator,
    model_of,
    reference,
    save,
    weight_of,
)
from tests.quantization.checkpoints._snapshot import refused


def load(
    folder: Path,
    made: tuple[Tensors, dict[str, Tensor]],
    settings: dict[str, Any],
    dtype: Any = torch.float32,
) -> tuple[Small, Loaded]:
    model = Small(dtype=dtype)
    return model, load_checkpoint(model, save(folder, made[0], settings))


def assert_weights(model: Small, weights: dict[str, Tensor], deployed: bool = True) -> None:
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, Deployed) == deployed
        assert torch.equal(weight_of(layer), weights[name])


@pytest.mark.parametrize(
    ("layer", "settings", "kind"),
    [
        (int8_layer, W8A8, "int8 weights (channel), int8 inputs (token)"),
        (float8_layer, FP8, "float8_e4m3fn weights (channel), float8_e4m3fn inputs (token)"),
        (packed_layer, W4A16, "int4 weights (group)"),
        (
            lambda *a: packed_layer(*a, symmetric=False),
            W4A16_ASYM,
            "int4 weights (group, asymmetric)",
        ),
        (lambda *a: packed_layer(*a, bits=8, size=a[2]), W8A16, "int8 weights (channel)"),
        (
            lambda *a: packed_layer(*a, bits=8, size=a[2], symmetric=False),
            config("pack-quantized", group(args(8, strategy="channel", symmetric=False))),
            "int8 weights (channel, asymmetric)",
        ),
        (
            lambda *a: packed_layer(*a, bits=2),
            config("pack-quantized", group(args(2, strategy="group", group_size=32))),
            "int4 weights (group)",
        ),
        (
            lambda *a: int8_layer(*a, tensor=True),
            config("int-quantized", group(args(8, strategy="tensor"), TOKEN)),
            "int8 weights (tensor), int8 inputs (token)",
        ),
        (
            int8_layer,
            config("naive-quantized", group(args(8, strategy="channel"), TOKEN)),
            "int8 weights (channel), int8 inputs (token)",
        ),
        (
            lambda *a: float8_layer(*a, tensor=True),
            config(
                "naive-quantized", group(args(8, "float"), args(8, "float", strategy="token", dynamic=True))
            ),
            "float8_e4m3fn weights (tensor), float8_e4m3fn inputs (token)",
        ),
    ],
)
def test_weights_are_the_numbers_of_the_file(tmp_path: Path, layer: Any, settings: Any, kind: str) -> None:
    made = model_of(layer)
    model, loaded = load(tmp_path, made, settings, torch.float16)
    assert (loaded.format, loaded.left, loaded.ignored) == ("compressed-tensors", {}, ())
    assert loaded.layers == dict.fromkeys(LAYERS, kind)
    assert_weights(model, made[1])


def with_inputs(made: tuple[Tensors, dict[str, Tensor]], scale: Tensor, zero_point: Tensor | None) -> Any:
    own = {f"{name}.input_scale": scale.clone() for name in LAYERS}
    if zero_point is not None:
        own |= {f"{name}.input_zero_point": zero_point.clone() for name in LAYERS}
    return made[0] | own, made[1]


@pytest.mark.parametrize("shape", [(1,), ()])
@pytest.mark.parametrize(("symmetric", "zero_point"), [(True, None), (True, 0), (False, -7), (False, 0)])
def test_static_inputs(tmp_path: Path, symmetric: bool, zero_point: int | None, shape: Any) -> None:
    scale = torch.full(shape, 0.03125)
    zero = None if zero_point is None else torch.full(shape, zero_point, dtype=torch.int8)
    made = with_inputs(model_of(int8_layer), scale, zero)
    inputs = {**TENSOR, "symmetric": symmetric}
    model, loaded = load(tmp_path, made, config("int-quantized", group(args(8, strategy="channel"), inputs)))
    assert not loaded.left
    assert_weights(model, made[1])
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, Deployed)
        assert layer.scheme.inputs == InputScheme("int8", symmetric, "tensor")
        assert set(layer.get_buffer("input_scale").tolist()) == {0.03125}
        assert symmetric or set(layer.get_buffer("input_offset").tolist()) == {zero_point}
    # As compressed-tensors computes: round, add the zero point, clamp, and back.
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    offset = 0 if symmetric or zero_point is None else zero_point
    q = (x / scale + offset).round().clamp(-128, 127)
    expected = ((q - offset) * scale) @ made[1]["gate"].t()
    torch.testing.assert_close(model.gate(x), expected)


def test_a_scale_of_inputs_that_bfloat16_has_not_is_rounded_and_that_is_said(tmp_path: Path) -> None:
    settings = config("int-quantized", group(args(8, strategy="channel"), TENSOR))
    kind = "int8 weights (channel), int8 inputs (tensor)"
    for scale, suffix in ((0.03, ", scales rounded to bfloat16"), (0.03125, "")):
        made = with_inputs(model_of(int8_layer), torch.tensor([scale]), None)
        _, loaded = load(tmp_path / str(scale), made, settings, torch.bfloat16)
        assert loaded.layers["gate"] == kind + suffix


def test_neighbours_share_the_scale_of_their_input(tmp_path: Path) -> None:
    made = with_inputs(model_of(int8_layer), torch.tensor([0.5]), None)
    model, _ = load(tmp_path, made, config("int-quantized", group(args(8, strategy="channel"), TENSOR)))
    assert model.gate.get_buffer("input_scale") is model.up.get_buffer("input_scale")


def test_static_float8_inputs(tmp_path: Path) -> None:
    made = with_inputs(model_of(float8_layer), torch.tensor([0.02]), None)
    settings = config(
        "float-quantized", group(args(8, "float", strategy="channel"), args(8, "float", strategy="tensor"))
    )
    model, loaded = load(tmp_path, made, settings)
    assert loaded.layers["up"] == "float8_e4m3fn weights (channel), float8_e4m3fn inputs (tensor)"
    assert_weights(model, made[1])
    assert model.up.get_buffer("input_scale").tolist() == pytest.approx([0.02])


def test_the_model_computes_with_them(tmp_path: Path) -> None:
    made = model_of(packed_layer)
    model, _ = load(tmp_path, made, W4A16)
    torch.testing.assert_close(model(TOKENS), reference(made[1])(TOKENS))


def blocks(name: str, outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
    g = generator(len(name))
    codes = torch.from_numpy(g.normal(0, 50, (outputs, inputs))).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(g.uniform(0.1, 1, (-(-outputs // 48), -(-inputs // 48)))).float()
    spread = np.kron(scale.numpy(), np.ones((48, 48), dtype=np.float32))[:outputs, :inputs]
    return {"weight": codes, "weight_scale": scale}, codes.float() * torch.from_numpy(spread)


def scattered(name: str, outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
    """Packed, with the group of input k at g_idx[k]."""
    own, weight = packed_layer(name, outputs, inputs, symmetric=False)
    order = np.argsort(generator(5).random(inputs))
    g_idx = (order // 32).astype(np.int32)
    codes = weight / own["weight_scale"].float().repeat_interleave(32, 1)  # codes - zeros, exactly
    zeros = own["weight_zero_point"]
    flat = [
        [(int(zeros[r // 8, c]) >> 4 * (r % 8) & 15) - 8 for c in range(zeros.size(1))]
        for r in range(outputs)
    ]
    zero = torch.tensor(flat).float()
    codes = codes.round() + zero.repeat_interleave(32, 1)
    index = torch.from_numpy(g_idx).long()
    value = (codes - zero[:, index]) * own["weight_scale"].float()[:, index]
    return own | {"weight_g_idx": torch.from_numpy(g_idx)}, value


FLOAT_BLOCKS = config(
    "float-quantized",
    group(
        args(8, "float", strategy="block", block_structure=[48, 48]),
        args(8, "float", strategy="group", group_size=128, dynamic=True),
    ),
)


@pytest.mark.parametrize(
    ("layer", "settings", "reason"),
    [
        (blocks, FLOAT_BLOCKS, "its scales are of blocks of 48 x 48"),
        (scattered, W4A16_ASYM, "the inputs of a group are not neighbours .actorder."),
        (
            packed_layer,
            config("pack-quantized", group(args(4, strategy="group", group_size=32), TOKEN)),
            "scheme is int4 weights .group., int8 inputs .token. for a Linear",
        ),
        (
            int8_layer,
            config("int-quantized", group(args(8, strategy="channel"), {**TOKEN, "symmetric": False})),
            "its inputs are quantized at run time for each token .int of 8 bits, asymmetric.",
        ),
        (
            int8_layer,
            config("int-quantized", group(args(8, strategy="channel"), {**TENSOR, "dynamic": True})),
            "its inputs are quantized at run time for each tensor",
        ),
    ],
)
def test_what_no_layer_has_becomes_floats(tmp_path: Path, layer: Any, settings: Any, reason: str) -> None:
    made = model_of(layer)
    model = Small()
    with pytest.warns(QuantizationWarning, match=reason):
        loaded = load_checkpoint(model, save(tmp_path, made[0], settings))
    assert set(loaded.left) == set(LAYERS) and not loaded.layers
    assert_weights(model, made[1], deployed=False)


@pytest.mark.parametrize("g_idx", [torch.full((128,), -1), torch.arange(128) // 32])
def test_groups_in_order_are_groups(tmp_path: Path, g_idx: Tensor) -> None:
    tensors, weights = model_of(packed_layer)
    model, loaded = load(tmp_path, (tensors | {"up.weight_g_idx": g_idx.to(torch.int32)}, weights), W4A16)
    assert not loaded.left
    assert_weights(model, weights)


def test_a_name_counts_more_than_a_pattern_and_that_more_than_a_class(tmp_path: Path) -> None:
    tensors, weights = model_of(packed_layer)
    for name in ("gate", "down"):
        own, weights[name] = int8_layer(name, *weights[name].shape)
        kept = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
        tensors = kept | {f"{name}.{key}": tensor for key, tensor in own.items()}
    settings = config(
        "mixed-precision",
        {**group(args(8, strategy="channel"), targets=["re:.*ate", "down"]), "format": "int-quantized"},
        {**group(args(4, strategy="group", group_size=32)), "format": "pack-quantized"},
        {**group(args(8, strategy="channel"), TOKEN, targets=["gate"]), "format": "int-quantized"},
    )
    model, loaded = load(tmp_path, (tensors, weights), settings, torch.float16)
    assert loaded.layers == {
        "gate": "int8 weights (channel), int8 inputs (token)",
        "up": "int4 weights (group)",
        "down": "int8 weights (channel)",
    }
    assert_weights(model, weights)


def test_ignored_layers_are_floats(tmp_path: Path) -> None:
    tensors, weights = model_of(int8_layer)
    weights["up"] = torch.randn(64, 128)
    kept = {key: t for key, t in tensors.items() if not key.startswith("up.")} | {"up.weight": weights["up"]}
    model, loaded = load(tmp_path, (kept, weights), {**W8A8, "ignore": ["re:u.$", "lm_head"]})
    assert set(loaded.layers) == {"gate", "down"}
    assert type(model.up) is nn.Linear and torch.equal(model.up.weight, weights["up"])


def test_scales_of_a_quantized_cache_are_reported(tmp_path: Path) -> None:
    tensors, weights = model_of(int8_layer)
    _, loaded = load(tmp_path, (tensors | {"attn.k_scale": torch.ones(1)}, weights), W8A8)
    assert loaded.ignored == ("attn.k_scale",)
    assert "not wanted by the model: attn.k_scale" in str(loaded)


def changed(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**settings, **more}


def weights_with(**more: Any) -> dict[str, Any]:
    return config("int-quantized", group(args(8, **{"strategy": "channel", **more}), TOKEN))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (changed(W8A8, format="marlin-24"), "format is 'marlin-24'; accepted: int-quantized"),
        (changed(W8A8, format="pack-quantized"), "is beside int weights; accepted: those of pack-quantized"),
        (
            changed(W8A8, format="float-quantized"),
            "is beside int weights; accepted: those of float-quantized",
        ),
        (changed(W8A8, quantization_status="frozen"), "quantization_status is 'frozen'"),
        (changed(W8A8, transform_config={"config_groups": {"u": {}}}), "transform_config is given"),
        (changed(W8A8, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is given"),
        (changed(W8A8, config_groups={}), "config_groups is empty"),
        (changed(W8A8, config_groups={"a": "W8A8"}), "config_groups.a is 'W8A8'; accepted: a group"),
        (changed(W8A8, ignore=["re:.*"]), "has scales, and is in no group"),
        (changed(W8A8, ignore=["re:("]), "which is no regular expression"),
        (changed(W8A8, ignore=[3]), "ignore is [3]; accepted: a list of names and patterns"),
        (config("int-quantized", group(args(8), TOKEN, targets=["Conv2d"])), "is in no group"),
        (
            config("int-quantized", {**group(args(8), TOKEN), "output_activations": args(8)}),
            "output_activations",
        ),
        (weights_with(num_bits=5), "type is 'int' with num_bits 5"),
        (weights_with(type="float", num_bits=4), "type is 'float' with num_bits 4"),
        (weights_with(strategy="group"), "group_size is None with strategy 'group'"),
        (weights_with(strategy="tensor_group"), "strategy is 'tensor_group'"),
        (weights_with(strategy="tensor"), "weight_scale has shape"),
        (weights_with(strategy="group", group_size=32), "weight_scale has shape"),
        (weights_with(strategy="token"), "weight_scale is of strategy 'token'"),
        (weights_with(strategy="block", block_structure=[0, 1]), "the size of blocks is [0, 1]"),
        (weights_with(symmetric=False), "asymmetric weight, and weight_zero_point is missing"),
        (weights_with(dynamic="local"), "dynamic is 'local'; accepted: bool"),
        (weights_with(num_bits=4), "weight has numbers of more than 4 bits"),
        (changed(weights_with(type="float"), format="naive-quantized"), "down.weight is int8"),
        (config("int-quantized", group(args(8, strategy="channel"), TENSOR)), "input_scale is missing"),
    ],
)
def test_other_configurations_are_refused(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    model = Small()
    folder = save(tmp_path, model_of(int8_layer)[0], settings)
    with refused(model, text):
        load_checkpoint(model, folder)


@pytest.mark.parametrize(
    ("layer", "settings", "name", "value", "text"),
    [
        (
            packed_layer,
            W4A16,
            "up.weight_shape",
            torch.tensor([64, 129]),
            "up.weight_packed has shape [64, 16]",
        ),
        (
            packed_layer,
            W4A16,
            "up.weight_shape",
            torch.tensor([-64, 128]),
            "accepted: that of a weight [-64, 128]",
        ),
        (
            packed_layer,
            W4A16,
            "up.weight_shape",
            torch.tensor([1 << 62, 1 << 62]),
            "up.weight_packed has shape",
        ),
        (packed_layer, W4A16, "up.weight_shape", torch.tensor([64]), "up.weight_shape is int64 [1]"),
        (packed_layer, W4A16, "up.weight_packed", torch.zeros(64, 16), "up.weight_packed is float32"),
        (packed_layer, W4A16, "up.weight_scale", torch.zeros(64, 4), "up.weight_scale is 0 everywhere"),
        (packed_layer, W4A16, "up.weight_scale", -torch.ones(64, 4), "up.weight_scale has NaN"),
        (
            packed_layer,
            W4A16,
            "up.weight_g_idx",
            torch.full((128,), 4, dtype=torch.int32),
            "up.weight_g_idx has groups from 4 to 4; accepted: 0 to 3",
        ),
        (
            packed_layer,
            W4A16,
            "up.weight_zero_point",
            torch.ones(64, 4, dtype=torch.int8),
            "up.weight_zero_point is not 0; accepted: 0, because the config says symmetric",
        ),
        (
            packed_layer,
            W4A16_ASYM,
            "up.weight_zero_point",
            torch.zeros(64, 4, dtype=torch.int32),
            "up.weight_zero_point is int32 [64, 4]; accepted: int32 [8, 4]",
        ),
        (float8_layer, FP8, "up.weight", torch.full((64, 128), torch.nan).to(torch.float8_e4m3fn), "has NaN"),
        (
            float8_layer,
            FP8,
            "up.weight",
            torch.zeros(64, 128).to(torch.float8_e5m2),
            "up.weight is float8_e5m2",
        ),
        (int8_layer, W8A8, "up.weight", torch.zeros(64, 128), "up.weight is float32"),
        (
            int8_layer,
            W8A8,
            "up.weight",
            torch.zeros(128, 64, dtype=torch.int8),
            "up.weight_scale has shape [64, 1]",
        ),
        (int8_layer, W8A8, "norm.weight_scale", torch.ones(1), "norm has scales, and is in no group"),
    ],
)
def test_damaged_tensors_are_named(
    tmp_path: Path, layer: Any, settings: Any, name: str, value: Tensor, text: str
) -> None:
    model = Small()
    tensors = model_of(layer if settings is not W4A16_ASYM else lambda *a: packed_layer(*a, symmetric=False))[
        0
    ]
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, save(tmp_path, tensors | {name: value}, settings))


@pytest.mark.parametrize(
    ("scale", "zero", "text"),
    [
        (torch.zeros(1), None, "input_scale is 0; accepted: positive scales"),
        (torch.tensor([torch.inf]), None, "input_scale has NaN, infinities"),
        (torch.ones(2), None, "input_scale has shape [2]; accepted: [1] or []"),
        (torch.ones(1), torch.tensor([0.5]), "input_zero_point has others than integers of 8 bits"),
        (torch.ones(1), torch.tensor([torch.nan]), "input_zero_point has others than integers"),
        (torch.ones(1), torch.tensor([1000]), "input_zero_point has others than integers of 8 bits"),
        (torch.ones(1), torch.zeros(2, dtype=torch.int8), "input_zero_point has shape [2]"),
        (torch.ones(1), None, "is of an asymmetric input, and input_zero_point is missing"),
    ],
)
def test_damaged_inputs_are_named(tmp_path: Path, scale: Tensor, zero: Tensor | None, text: str) -> None:
    model = Small()
    tensors, _ = with_inputs(model_of(int8_layer), scale, zero)
    inputs = {**TENSOR, "symmetric": False}
    with refused(model, text):
        load_checkpoint(
            model,
            save(tmp_path, tensors, config("int-quantized", group(args(8, strategy="channel"), inputs))),
        )


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", ".*.*.*.*.*.*.*x", "a" * 501, "(x{1,9}){1,9}"])
def test_expressions_that_take_forever_are_refused(tmp_path: Path, pattern: str) -> None:
    model = Small()
    folder = save(tmp_path, model_of(int8_layer)[0], {**W8A8, "ignore": [f"re:{pattern}"]})
    start = time.perf_counter()
    with refused(model, "which could take forever to match"):
        load_checkpoint(model, folder)
    assert time.perf_counter() - start < 5
