from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import npu_fusion
from npu_fusion.quantization import QuantizationWarning, quantize_linears
from npu_fusion.quantization.checkpoints import load_checkpoint, save_checkpoint
from npu_fusion.quantization.modules import Deployed
from npu_fusion.quantization.scheme import Scheme
from tests.quantization.checkpoints._deployed import deployed, llama, name_of, scheme, small
from tests.quantization.checkpoints._packers import LAYERS, TOKENS, Small, weight_of
from tests.quantization.checkpoints._snapshot import refused, same_values

DESCRIPTION = "quant_model_description.json"
DYNAMIC = scheme("int8", "int8", input_strategy="token")
STATIC = scheme("int8", "int8")
ASYMMETRIC = scheme("int8", "int8", input_symmetric=False)
W8A16 = scheme("int8", symmetric=False)
W8A16_GROUPS = scheme("int8", strategy="group", group_size=32)
W4A16 = scheme("int4")
W4A16_GROUPS = scheme("int4", strategy="group", group_size=32, symmetric=False)
TYPES = {
    "W8A8_DYNAMIC": (DYNAMIC,),
    "W8A8": (STATIC, ASYMMETRIC),
    "W8A16": (W8A16, W8A16_GROUPS),
    "W4A16": (W4A16, W4A16_GROUPS),
}
ALL = [(kind, given) for kind, schemes in TYPES.items() for given in schemes]


def written(folder: Path, model: nn.Module, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    save_checkpoint(model, folder, form="ascend", **more)
    description = json.loads((folder / DESCRIPTION).read_text())
    index = json.loads((folder / "quant_model_weights.safetensors.index.json").read_text())
    tensors = {
        key: t for name in set(index["weight_map"].values()) for key, t in load_file(folder / name).items()
    }
    assert set(tensors) == set(index["weight_map"])
    return description, tensors


def own(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{layer}."): t for key, t in tensors.items() if key.startswith(f"{layer}.")}


def form(tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, [*tensor.shape]


def test_the_description_is_that_of_ascendv1(tmp_path: Path) -> None:
    description, tensors = written(tmp_path, small(DYNAMIC))
    assert {path.name for path in tmp_path.iterdir()} == {
        DESCRIPTION,
        "quant_model_weights-00001-of-00001.safetensors",
        "quant_model_weights.safetensors.index.json",
    }
    about = {key: description.pop(key) for key in list(description) if key not in tensors}
    assert about == {
        "version": "1.0.0",
        "model_quant_type": "W8A8_DYNAMIC",
        "group_size": 0,
        "metadata": {},
        "optional": {},
    }
    layers = {
        "weight": "W8A8_DYNAMIC",
        "weight_scale": "W8A8_DYNAMIC",
        "weight_offset": "W8A8_DYNAMIC",
        "bias": "FLOAT",
    }
    floats = ("embed.weight", "head.weight", "norm.weight", "norm.bias")
    assert description == dict.fromkeys(floats, "FLOAT") | {
        f"{name}.{key}": kind for name in LAYERS for key, kind in layers.items()
    }


def test_dynamic(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    tensors = own(written(tmp_path, model)[1], "gate")
    assert {key: form(t) for key, t in tensors.items()} == {
        "weight": (torch.int8, [64, 128]),
        "weight_scale": (torch.float32, [64, 1]),
        "weight_offset": (torch.float32, [64, 1]),
        "bias": (torch.float32, [64]),
    }
    assert torch.equal(tensors["weight"].float() * tensors["weight_scale"], weight_of(model.gate))
    assert not tensors["weight_offset"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [STATIC, ASYMMETRIC])
def test_static(given: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(given, dtype=dtype)
    layer = model.gate
    tensors = own(written(tmp_path, model)[1], "gate")
    assert {key: form(t) for key, t in tensors.items()} == {
        "weight": (torch.int8, [64, 128]),
        "weight_scale": (torch.float32, [64, 1]),
        "weight_offset": (torch.float32, [64, 1]),
        "input_scale": (torch.float32, [1]),
        "input_offset": (torch.float32, [1]),
        "deq_scale": (torch.float32 if dtype == torch.bfloat16 else torch.int64, [64]),
        "quant_bias": (torch.int32, [64]),
        "bias": (torch.float32, [64]),
    }
    deq = tensors["deq_scale"]
    if dtype == torch.float16:
        # The bits of the fp32 number, as an int64.
        deq = torch.from_numpy(deq.numpy().astype(np.int32).view(np.float32))
    assert torch.equal(deq, tensors["input_scale"] * tensors["weight_scale"].squeeze(1))
    offset = 0.0 if given is STATIC else 3.0
    assert tensors["input_offset"].tolist() == [offset]
    # The original bias, which is the float layer's of small().
    torch.manual_seed(0)
    bias = Small(bias=True, dtype=dtype).gate.bias.detach().double()
    sums = tensors["weight"].double().sum(1)
    assert torch.equal(tensors["quant_bias"].double(), (bias / deq.double()).round() - sums * offset)
    torch.testing.assert_close(tensors["bias"].double(), bias, rtol=0, atol=float(deq.max()) / 2 * 1.001)
    # y = (q W + quant_bias) * deq_scale, which is what the operator computes.
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    q = (x.float() / tensors["input_scale"] + tensors["input_offset"]).round().clamp(-128, 127).double()
    y = (q @ tensors["weight"].double().t() + tensors["quant_bias"]).float() * deq
    assert torch.equal(y.to(dtype), layer(x))


@pytest.mark.parametrize("given", [W8A16, W8A16_GROUPS, W4A16, W4A16_GROUPS], ids=name_of)
def test_weights_alone(given: Scheme, tmp_path: Path) -> None:
    model = small(given)
    description, all_tensors = written(tmp_path, model)
    tensors = own(all_tensors, "gate")
    weights = given.weights
    assert description["group_size"] == (weights.group_size or 0)
    columns = 128 // weights.group_size if weights.group_size else 1
    assert form(tensors["weight_scale"]) == form(tensors["weight_offset"]) == (torch.float32, [64, columns])
    packed = tensors["weight"].numpy()
    if weights.type == "int8":
        codes = packed
    else:
        # In K for channels, in N for groups; the even one is in the low bits.
        axis = 0 if weights.group_size else 1
        low, high = (packed << 4).astype(np.int8) >> 4, packed >> 4
        codes = np.stack([low, high], axis + 1).reshape(64, 128)
    size = weights.group_size or 128
    offset, scale = (tensors[f"weight_{name}"].repeat_interleave(size, 1) for name in ("offset", "scale"))
    assert bool(offset.any()) == (not weights.symmetric)
    # What is subtracted, not what npu_weight_quant_batchmatmul adds.
    value = (torch.from_numpy(codes.copy()).float() - offset) * scale
    assert torch.equal(value, weight_of(model.gate))


@pytest.mark.parametrize(("kind", "given"), ALL, ids=[f"{kind}-{name_of(given)}" for kind, given in ALL])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_read_back(kind: str, given: Scheme, bias: bool, tmp_path: Path) -> None:
    model = small(given, bias)
    description, _ = written(tmp_path, model, shard_size=10_000)
    assert description["model_quant_type"] == kind and description["gate.weight"] == kind
    for on in ("cpu", "meta"):
        with torch.device(on):
            loaded = Small(bias=bias, dtype=torch.bfloat16).eval()
        report = load_checkpoint(loaded, tmp_path)
        assert report.format == "ascend" and set(report.layers) == set(LAYERS) and not report.left
        assert torch.equal(loaded(TOKENS), model(TOKENS))
        assert loaded.head.weight is loaded.embed.weight
        if given.weights.strategy != "tensor":
            assert same_values(loaded, model)


@pytest.mark.parametrize(("kind", "given"), ALL, ids=[f"{kind}-{name_of(given)}" for kind, given in ALL])
def test_smoothing_that_was_not_folded(kind: str, given: Scheme, tmp_path: Path) -> None:
    model = small(given, smooth=True, dtype=torch.float16)
    _, tensors = written(tmp_path, model)
    assert {"div.mul_scale", "linear.weight", "linear.bias"} <= set(own(tensors, "gate"))
    assert "gate.weight" not in tensors
    factors = torch.linspace(0.5, 2, 128).half().float()
    torch.testing.assert_close(tensors["gate.div.mul_scale"].float(), factors, rtol=1e-6, atol=0)
    loaded = Small(bias=True, dtype=torch.float16).eval()
    load_checkpoint(loaded, tmp_path)
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=2e-3, atol=2e-3)
    assert torch.equal(weight_of(loaded.gate), weight_of(model.gate))
    if given.inputs is not None:
        name = "smooth_scales" if given.inputs.dynamic else "input_scale"
        assert loaded.gate.get_buffer(name) is loaded.up.get_buffer(name)


def test_a_prepared_llama_is_written_with_the_names_of_before(tmp_path: Path) -> None:
    model = llama("cpu", torch.float16)
    quantize_linears(model)
    plain = written(tmp_path / "plain", model)
    assert npu_fusion.prepare(model).merged
    prepared = written(tmp_path / "prepared", model)
    assert prepared[0] == plain[0]
    assert all(torch.equal(tensor, plain[1][key]) for key, tensor in prepared[1].items())
    assert {"lm_head.weight", "model.layers.1.mlp.gate_proj.weight_scale"} <= set(plain[1])


def test_the_type_of_the_model_is_that_with_the_fewest_bits(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    torch.manual_seed(1)
    for name, given in (("up", W4A16), ("down", STATIC)):
        outputs, inputs = (128, 64) if name == "down" else (64, 128)
        layer = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
        model.set_submodule(name, deployed(layer, given))
    description, _ = written(tmp_path, model)
    assert description["model_quant_type"] == "W4A16"
    assert written(tmp_path / "floats", Small())[0]["model_quant_type"] == "FLOAT"


def test_what_the_form_has_no_type_for_is_refused(tmp_path: Path) -> None:
    for given in (scheme("hifloat8"), scheme("float8_e4m3fn", "float8_e4m3fn")):
        with pytest.raises(
            ValueError, match="gate has .* weights .*; accepted with form='ascend': int8 weights"
        ):
            save_checkpoint(small(given), tmp_path, form="ascend")
    mixed = small(W4A16_GROUPS)
    torch.manual_seed(1)
    mixed.down = deployed(  # type: ignore[assignment]
        nn.Linear(128, 128, dtype=torch.bfloat16), scheme("int4", strategy="group", group_size=64)
    )
    with pytest.raises(
        ValueError, match="the model has groups of 32, 64; accepted with form='ascend': one size"
    ):
        save_checkpoint(mixed, tmp_path, form="ascend")
    large = small(STATIC)
    layer = nn.Linear(64, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.bias.fill_(1e30)
    large.down = deployed(layer, STATIC)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="down has a bias beyond int32 beside its scales"):
        save_checkpoint(large, tmp_path, form="ascend")
    assert not list(tmp_path.iterdir())


def change_description(**more: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda description, tensors: description.update(more)


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def apply(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    return apply


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def apply(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del description[name], tensors[name]

    return apply


def rewrite(folder: Path, apply: Any) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    path = folder / "quant_model_weights-00001-of-00001.safetensors"
    tensors = load_file(path)
    apply(description, tensors)
    (folder / DESCRIPTION).write_text(json.dumps(description))
    save_file(tensors, path)
    index = {"weight_map": dict.fromkeys(tensors, path.name)}
    (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))


def test_a_static_layer_without_weight_scale_is_that_of_the_other_writer(tmp_path: Path) -> None:
    model = small(STATIC, dtype=torch.float16)
    written(tmp_path, model)
    rewrite(
        tmp_path,
        lambda d, t: [without(f"up.{name}")(d, t) for name in ("weight_scale", "weight_offset", "bias")],
    )
    loaded = Small(bias=True, dtype=torch.float16).eval()
    load_checkpoint(loaded, tmp_path)
    assert isinstance(loaded.up, Deployed)
    torch.testing.assert_close(weight_of(loaded.up), weight_of(model.up), rtol=1e-6, atol=0)
    assert torch.equal(loaded.up.get_buffer("bias"), model.up.get_buffer("bias"))


def test_sizes_that_the_operator_does_not_take_become_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small(inner=96, bias=True, dtype=torch.bfloat16).eval()
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        factors = torch.linspace(0.5, 2, layer.in_features).bfloat16()
        model.set_submodule(name, deployed(layer, W4A16_GROUPS, factors))
    written(tmp_path, model)
    loaded = Small(inner=96, bias=True, dtype=torch.bfloat16).eval()
    with pytest.warns(QuantizationWarning, match="of 64"):
        load_checkpoint(loaded, tmp_path)
    for name in LAYERS:
        layer, original = loaded.get_submodule(name), model.get_submodule(name)
        assert type(layer) is nn.Linear
        # What the input was multiplied by is in the weight now.
        smoothed = weight_of(original) * original.get_buffer("smooth_scales").float()
        assert torch.equal(layer.weight.detach(), smoothed.bfloat16())
        assert torch.equal(layer.bias.detach(), original.get_buffer("bias").bfloat16())


@pytest.mark.parametrize(
    ("given", "apply", "text"),
    [
        (
            DYNAMIC,
            change_description(**{"up.weight": "W4A4_DYNAMIC"}),
            "up.weight is 'W4A4_DYNAMIC'; accepted: FLOAT",
        ),
        (DYNAMIC, change_description(**{"up.weight": 8}), "up.weight is 8; accepted: FLOAT"),
        (DYNAMIC, change_description(**{"up.weight": "FLOAT"}), "up.weight is int8"),
        (DYNAMIC, change_description(**{"up.weight": "W8A8"}), "up.input_scale is missing"),
        (
            DYNAMIC,
            change_description(**{"up.weight": "W4A16"}),
            "up has a weight [64, 256]; accepted: [64, 128]",
        ),
        (DYNAMIC, change_description(extra="FLOAT"), "extra is missing"),
        (DYNAMIC, change_description(group_size=-1), "group_size is -1"),
        (DYNAMIC, change_description(metadata={"quarot": {}}), "metadata has quarot; accepted: nothing"),
        (DYNAMIC, change_description(kv_cache_type="C8"), "kv_cache_type is 'C8'; accepted: none"),
        (DYNAMIC, lambda d, t: d.pop("up.weight"), "up.weight is not in"),
        (DYNAMIC, change("up.weight_offset", torch.ones(64, 1)), "up.weight_offset is not 0; accepted: 0"),
        (DYNAMIC, change("up.weight_scale", None), "up.weight_scale is missing"),
        (DYNAMIC, change("up.weight_scale", torch.ones(64, 2)), "up.weight_scale has 2 groups of 128 inputs"),
        (DYNAMIC, change("up.bias", torch.ones(63)), "up.bias is float32 [63]"),
        (STATIC, change("up.deq_scale", torch.ones(64)), "up.deq_scale is not input_scale * weight_scale"),
        (
            STATIC,
            change("up.deq_scale", torch.full((64,), -1)),
            "up.deq_scale is no fp32 scale in the low bits",
        ),
        (STATIC, change("up.deq_scale", torch.full((64,), 1 << 40)), "up.deq_scale is no fp32 scale"),
        (STATIC, change("up.input_scale", torch.zeros(1)), "up.input_scale is 0"),
        (STATIC, change("up.input_offset", torch.full((1,), 0.5)), "up.input_offset is no integer of 8 bits"),
        (
            STATIC,
            change("up.input_offset", torch.full((1,), torch.nan)),
            "up.input_offset is no integer of 8 bits",
        ),
        (STATIC, change("up.quant_bias", torch.zeros(64)), "up.quant_bias is float32"),
        (W8A16_GROUPS, change_description(group_size=64), "gate.weight_scale has 4 groups of 128 inputs"),
        (W8A16_GROUPS, change_description(group_size=0), "in a W8A16 layer with group_size 0"),
        (
            W8A16,
            change("up.weight_offset", torch.full((64, 1), 0.5)),
            "up.weight_offset is no integer up to 128",
        ),
        (W8A16, change("up.weight", torch.zeros(64, dtype=torch.int8)), "up.weight has shape [64]"),
        (
            W4A16,
            change("up.weight", torch.zeros(32, 64, dtype=torch.int8)),
            "up.weight_scale has shape [64, 1]",
        ),
    ],
)
def test_damage_is_named(given: Scheme, apply: Any, text: str, tmp_path: Path) -> None:
    written(tmp_path, small(given))
    rewrite(tmp_path, apply)
    model = Small(bias=True, dtype=torch.bfloat16)
    with refused(model, text):
        load_checkpoint(model, tmp_path)


def test_a_bias_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    for given in (STATIC, DYNAMIC):
        folder = tmp_path / name_of(given)
        written(folder, small(given))
        model = Small(bias=False, dtype=torch.bfloat16)
        with refused(model, "gate has a bias that is not 0, and the layer of the model has none"):
            load_checkpoint(model, folder)
