from __future__ import annotations

from functools import cache
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
    LAYERS,
    TOKENS,
    Small,
    Tensors,
    generator,
    gptq_config,
    gptq_layer,
    int32,
    model_of,
    pack_rows,
    reference,
    save,
    save_sharded,
    weight_of,
)
from tests.quantization.checkpoints._snapshot import refused

V1, V2 = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}


@cache
def checkpoint(minus_one: bool = True, **settings: Any) -> tuple[Tensors, dict[str, Tensor]]:
    return model_of(lambda name, n, k: gptq_layer(name, n, k, minus_one=minus_one, **settings))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [V1, V2])
def test_weights_are_the_numbers_of_the_file(
    tmp_path: Path, version: dict[str, str], symmetric: bool, bits: int
) -> None:
    tensors, weights = checkpoint(version is V1, bits=bits, symmetric=symmetric)
    model = Small(dtype=torch.float16)
    loaded = load_checkpoint(model, save(tmp_path, tensors, gptq_config(bits, sym=symmetric, **version)))
    kind = "int8" if bits == 8 else "int4"
    suffix = "" if symmetric else ", asymmetric"
    assert loaded.format == "gptq" and not loaded.left
    assert loaded.layers == dict.fromkeys(LAYERS, f"{kind} weights (group{suffix})")
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, Deployed) and layer.scheme.algorithm == "gptq"
        assert torch.equal(weight_of(layer), weights[name])


def test_three_bits_cross_the_words_as_in_autogptq() -> None:
    """Ten values, two bits of the eleventh; its last bit, ten values, one bit; two bits, ten values."""
    values = generator().integers(0, 8, 32)
    words = [
        sum(int(v) << (3 * i) for i, v in enumerate(values[:10])) | (int(values[10]) & 3) << 30,
        int(values[10]) >> 2
        | sum(int(v) << (3 * i + 1) for i, v in enumerate(values[11:21]))
        | (int(values[21]) & 1) << 31,
        int(values[21]) >> 1 | sum(int(v) << (3 * i + 2) for i, v in enumerate(values[22:])),
    ]
    assert torch.equal(pack_rows(values[None], 3)[0], int32(words))


def test_without_a_format_it_is_the_first(tmp_path: Path) -> None:
    tensors, weights = checkpoint()
    model = Small()
    load_checkpoint(model, save_sharded(tmp_path, tensors, gptq_config()))
    torch.testing.assert_close(model(TOKENS), reference(weights)(TOKENS))


def test_eight_bits_are_floats_in_a_float32_model(tmp_path: Path) -> None:
    tensors, weights = checkpoint(bits=8)
    model = Small()
    with pytest.warns(QuantizationWarning, match="dtype is float32 with int8 weights"):
        loaded = load_checkpoint(model, save(tmp_path, tensors, gptq_config(8)))
    assert set(loaded.left) == set(LAYERS)
    assert all(torch.equal(weight_of(model.get_submodule(name)), weights[name]) for name in LAYERS)


def test_scattered_groups_become_floats_with_the_same_numbers(tmp_path: Path) -> None:
    def layer(name: str, outputs: int, inputs: int) -> tuple[Tensors, Tensor]:
        order = np.arange(inputs) // 32
        if name != "up":
            generator(3).shuffle(order)
        return gptq_layer(name, outputs, inputs, order=order)

    tensors, weights = model_of(layer)
    model = Small()
    with pytest.warns(QuantizationWarning, match="not neighbours .desc_act."):
        loaded = load_checkpoint(model, save(tmp_path, tensors, gptq_config(desc_act=True)))
    assert set(loaded.left) == {"gate", "down"} and set(loaded.layers) == {"up"}
    assert type(model.gate) is nn.Linear and isinstance(model.up, Deployed)
    assert all(torch.equal(weight_of(model.get_submodule(name)), weights[name]) for name in LAYERS)
    torch.testing.assert_close(model(TOKENS), reference(weights)(TOKENS))


@pytest.mark.parametrize("keep", [True, False])
def test_one_group_with_and_without_g_idx(tmp_path: Path, keep: bool) -> None:
    tensors, weights = model_of(lambda name, n, k: gptq_layer(name, n, k, group=k))
    if not keep:
        tensors = {key: t for key, t in tensors.items() if not key.endswith("g_idx")}
    model = Small()
    loaded = load_checkpoint(model, save(tmp_path, tensors, gptq_config(group=-1)))
    assert loaded.layers["gate"] == "int4 weights (channel, asymmetric)"
    assert all(torch.equal(weight_of(model.get_submodule(name)), weights[name]) for name in LAYERS)


def test_biases_of_zeros_are_those_of_early_files(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    zeros = {f"{name}.bias": torch.zeros(tensors[f"{name}.scales"].size(1)).half() for name in LAYERS}
    loaded = load_checkpoint(Small(), save(tmp_path / "zeros", tensors | zeros, gptq_config()))
    assert not loaded.left and not loaded.ignored
    model = Small()
    others = tensors | zeros | {"up.bias": torch.ones(64).half()}
    with refused(model, "up has a bias that is not 0, and the layer of the model has none"):
        load_checkpoint(model, save(tmp_path / "ones", others, gptq_config()))


@pytest.mark.parametrize(("written", "labelled"), [(V1, V2), (V2, V1)])
def test_a_wrong_label_shows_in_a_symmetric_file(
    tmp_path: Path, written: dict[str, str], labelled: dict[str, str]
) -> None:
    tensors, _ = checkpoint(written is V1, symmetric=True)
    model = Small()
    with refused(
        model, "qzeros has the zero point", "says sym (the file may be of the other checkpoint_format)"
    ):
        load_checkpoint(model, save(tmp_path, tensors, gptq_config(sym=True, **labelled)))


def stored_by_gptqmodel(bits: int) -> tuple[Tensors, Tensor]:
    """A layer [32, 32] with zero points of 0, stored as v1 by subtracting ones from whole words."""
    g = generator(bits)
    w, z = g.integers(0, 2**bits, (32, 32)), g.integers(0, 2**bits, (1, 32))
    z[0, ::3] = 0
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = pack_rows(z, bits).numpy().view(np.uint32).astype(np.int64)
    scales = torch.rand(1, 32).half() + 0.5
    tensors = {
        "qweight": pack_rows(w.T, bits).t(),
        "qzeros": int32((words - ones) % 2**32),
        "scales": scales,
    }
    return tensors, (torch.from_numpy(w - z).float() * scales.float()).t()


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32, bias=False)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_zero_in_v1_are_read_only_from_a_writer_that_is_known(
    tmp_path: Path, bits: int
) -> None:
    own, weight = stored_by_gptqmodel(bits)
    tensors = {f"layer.{key}": tensor for key, tensor in own.items()}
    model = One()
    with refused(model, "layer.qzeros stores a zero point as", "accepted: checkpoint_format gptq_v2"):
        load_checkpoint(model, save(tmp_path / "unknown", tensors, gptq_config(bits, -1)))
    known = gptq_config(bits, -1, meta={"quantizer": ["gptqmodel:2.1.0"]})
    with pytest.warns(QuantizationWarning):
        load_checkpoint(model, save(tmp_path / "known", tensors, known))
    assert torch.equal(weight_of(model.layer), weight)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"bits": 5}, "bits is 5; accepted: 2, 3, 4, 8"),
        ({"bits": None}, "bits is missing"),
        ({"group_size": -2}, "group_size is -2; accepted: -1"),
        ({"group_size": 64}, "has shape"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; accepted: gptq, gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic gives layers settings of their own"),
        ({"bits": 8}, "up.scales"),
        ({"sym": "yes"}, "sym is 'yes'; accepted: bool"),
    ],
)
def test_other_layouts_are_refused(tmp_path: Path, setting: dict[str, Any], text: str) -> None:
    tensors, _ = model_of(lambda name, n, k: gptq_layer(name, n, k))
    first = {key: t for key, t in tensors.items() if not key.startswith(("gate", "down"))}
    model = Small()
    with refused(model, text):
        load_checkpoint(model, save(tmp_path, first, gptq_config() | setting))


def test_excluded_layers_are_no_settings_of_layers(tmp_path: Path) -> None:
    tensors, _ = checkpoint()
    assert load_checkpoint(Small(), save(tmp_path, tensors, gptq_config(dynamic={"-:.*head.*": {}}))).layers


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "up.g_idx",
            torch.full((128,), 4, dtype=torch.int32),
            "up.g_idx has groups from 4 to 4; accepted: 0 to 3",
        ),
        ("up.g_idx", torch.full((128,), -1, dtype=torch.int32), "up.g_idx has groups from -1"),
        (
            "up.g_idx",
            torch.zeros(64, dtype=torch.int32),
            "up.g_idx is int32 [64]; accepted: int32, int64 [128]",
        ),
        ("up.g_idx", torch.zeros(128), "up.g_idx is float32"),
        (
            "up.qweight",
            torch.zeros(8, 64, dtype=torch.int32),
            "up.scales has shape [4, 64]; accepted: [2, 64]",
        ),
        ("up.qweight", torch.zeros(16, 64, dtype=torch.uint8), "up.qweight is uint8"),
        ("up.qweight", torch.zeros(0, 64, dtype=torch.int32), "up.qweight has shape [0, 64]"),
        (
            "up.qzeros",
            torch.zeros(4, 4, dtype=torch.int32),
            "up.qzeros is int32 [4, 4]; accepted: int32 [4, 8]",
        ),
        ("up.scales", torch.ones(4, 63).half(), "up.scales has shape [4, 63]"),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, name: str, value: Tensor, text: str) -> None:
    tensors, _ = checkpoint()
    model = Small()
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, save(tmp_path, tensors | {name: value}, gptq_config()))


def test_three_bits_need_whole_patterns(tmp_path: Path) -> None:
    tensors, _ = checkpoint(bits=3)
    model = Small()
    cut = tensors | {"up.qweight": tensors["up.qweight"][:11]}
    with refused(model, "up.qweight has shape [11, 64]; accepted: [K * 3 / 32, N]"):
        load_checkpoint(model, save(tmp_path, cut, gptq_config(3)))
