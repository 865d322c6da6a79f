from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.checkpoints import load_checkpoint
from tests.quantization.checkpoints._packers import (
    FP8_CONFIG,
    LAYERS,
    Small,
    Tensors,
    fp8_layer,
    model_of,
    save,
    save_sharded,
)
from tests.quantization.checkpoints._snapshot import refused


class Layer(nn.Module):
    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kv_a_proj_with_mqa = nn.Linear(inputs, outputs, bias=False, dtype=dtype)


@pytest.mark.parametrize(("outputs", "inputs"), [(576, 1000), (128, 128), (1, 129), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_partial_blocks_in_fp32_with_one_rounding(
    tmp_path: Path, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    own, weight = fp8_layer("kv_a_proj_with_mqa", outputs, inputs)
    tensors = {f"kv_a_proj_with_mqa.{key}": tensor for key, tensor in own.items()}
    model = Layer(outputs, inputs, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # floats are what there is in this format
        loaded = load_checkpoint(model, save(tmp_path, tensors, FP8_CONFIG))
    assert loaded.format == "fp8" and not loaded.layers
    assert loaded.left == {"kv_a_proj_with_mqa": "its scales are of blocks of 128 x 128"}
    assert model.kv_a_proj_with_mqa.weight.requires_grad
    assert torch.equal(model.kv_a_proj_with_mqa.weight.detach(), weight.to(dtype))


def test_some_layers_may_be_floats(tmp_path: Path) -> None:
    tensors, weights = model_of(fp8_layer)
    weights["up"] = torch.randn(64, 128)
    del tensors["up.weight_scale_inv"]
    with torch.device("meta"):
        model = Small()
    loaded = load_checkpoint(
        model, save_sharded(tmp_path, tensors | {"up.weight": weights["up"]}, FP8_CONFIG)
    )
    assert set(loaded.left) == {"gate", "down"}
    assert all(torch.equal(model.get_submodule(name).weight, weights[name]) for name in LAYERS)  # type: ignore


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"weight_block_size": None}, "weight_block_size is missing"),
        ({"weight_block_size": [128]}, "the size of blocks is [128]; accepted: two positive numbers"),
        ({"weight_block_size": [128, 0]}, "the size of blocks is [128, 0]"),
        ({"weight_block_size": [128, True]}, "the size of blocks is [128, True]"),
        ({"weight_block_size": [32, 32]}, "weight_scale_inv has shape"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; accepted: 'e4m3'"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, setting: dict[str, Any], text: str) -> None:
    model = Small()
    folder = save(tmp_path, model_of(fp8_layer)[0], FP8_CONFIG | setting)
    with refused(model, text):
        load_checkpoint(model, folder)


def test_a_block_beyond_the_weight_costs_nothing(tmp_path: Path) -> None:
    tensors, weights = model_of(fp8_layer)
    loaded = load_checkpoint(
        Small(), save(tmp_path, tensors, FP8_CONFIG | {"weight_block_size": [1 << 40, 1 << 40]})
    )
    assert set(loaded.left) == set(weights)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("up.weight_scale_inv", torch.ones(2, 1), "up.weight_scale_inv has shape [2, 1]; accepted: [1, 1]"),
        ("up.weight_scale_inv", torch.full((1, 1), torch.nan), "up.weight_scale_inv has NaN"),
        ("up.weight_scale_inv", torch.zeros(1, 1), "up.weight_scale_inv is 0 everywhere"),
        (
            "up.weight_scale_inv",
            torch.full((1, 1), 1e39, dtype=torch.float64),
            "up.weight_scale_inv is float64",
        ),
        ("up.weight_scale_inv", None, "up.weight is float8_e4m3fn [64, 128]; accepted: float16"),
        ("up.weight", torch.ones(64, 128), "up.weight is float32 [64, 128]; accepted: float8_e4m3fn"),
        ("up.weight", None, "up.weight is missing"),
        ("up.weight", torch.ones(64, 128, 1).to(torch.float8_e4m3fn), "up.weight is no matrix"),
        (
            "up.weight",
            torch.full((64, 128), torch.nan).to(torch.float8_e4m3fn),
            "up.weight is no matrix, or has NaN",
        ),
        ("more.weight_scale_inv", torch.ones(1, 1), "more.weight is missing"),
    ],
)
def test_damaged_tensors_are_named(tmp_path: Path, name: str, value: Tensor | None, text: str) -> None:
    tensors = {key: t for key, t in {**model_of(fp8_layer)[0], name: value}.items() if t is not None}
    model = Small()
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, save(tmp_path, tensors, FP8_CONFIG))


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    tensors, _ = model_of(fp8_layer)
    model = Small(dtype=torch.float16)
    with refused(model, "up.weight has numbers beyond those of torch.float16"):
        load_checkpoint(
            model, save(tmp_path, tensors | {"up.weight_scale_inv": torch.full((1, 1), 1e4)}, FP8_CONFIG)
        )


def deepseek(on: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        n_routed_experts=4,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        max_position_embeddings=64,
    )
    with torch.device(on):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def deepseek_checkpoint(model: nn.Module) -> tuple[Tensors, Tensors]:
    """As DeepSeek's files are: linear layers in fp8, experts as layers, and a part that is not used."""
    tensors: Tensors = {"model.layers.61.eh_proj.weight": torch.ones(2, 2)}
    values: Tensors = {}
    for key, value in model.state_dict().items():
        if value.dim() < 2 or any(part in key for part in ("embed", "lm_head", "mlp.gate.")):
            tensors[key] = values[key] = torch.randn(
                value.shape, generator=torch.Generator().manual_seed(len(key))
            )
            continue
        if value.dim() == 2:
            name = key.removesuffix(".weight")
            own, values[key] = fp8_layer(name, *value.shape)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}
            continue
        experts, _, kind = key.rpartition(".")
        stack = []
        for expert in range(value.size(0)):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            rows = []
            for part in parts:
                name = f"{experts}.{expert}.{part}"
                own, weight = fp8_layer(name + "x" * expert, value.size(1) // len(parts), value.size(2))
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}
                rows.append(weight)
            stack.append(torch.cat(rows))
        values[key] = torch.stack(stack)
    return tensors, values


def test_deepseek_v3_of_transformers_with_its_experts(tmp_path: Path) -> None:
    expected = deepseek("cpu")
    tensors, values = deepseek_checkpoint(expected)
    expected.load_state_dict(values)
    folder = save_sharded(tmp_path, tensors, FP8_CONFIG)
    for on in ("cpu", "meta"):
        model = deepseek(on)
        loaded = load_checkpoint(model, folder)
        assert loaded.ignored == ("model.layers.61.eh_proj.weight",)
        assert {name for name in loaded.left if ".experts." in name and "shared" not in name} == {
            f"model.layers.1.mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")
        }
        assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"),
            "experts.2.up_proj.weight is missing",
        ),
        (
            lambda t: [
                t.pop(f"model.layers.1.mlp.experts.2.up_proj.{k}") for k in ("weight", "weight_scale_inv")
            ],
            "model.layers.1.mlp.experts.2.up_proj is missing, one of the experts",
        ),
        (
            lambda t: t.update(
                {f"model.layers.1.mlp.experts.4.up_proj.{k}": v for k, v in fp8_layer("x", 32, 64)[0].items()}
            ),
            "model.layers.1.mlp.experts.4.up_proj is no layer of the model",
        ),
        (
            lambda t: t.update(
                {f"model.layers.1.mlp.experts.0.up_proj.{k}": v for k, v in fp8_layer("x", 64, 32)[0].items()}
            ),
            "model.layers.1.mlp.experts.0.up_proj has a weight [64, 32]; accepted: [32, 64]",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 64, 64)}),
            "experts.gate_up_proj is there as one tensor, and as the layers of its experts",
        ),
        (lambda t: t.pop("model.layers.1.mlp.gate.weight"), "model.layers.1.mlp.gate.weight is missing"),
    ],
)
def test_damaged_experts_are_named(tmp_path: Path, change: Any, text: str) -> None:
    model = deepseek("cpu")
    tensors, _ = deepseek_checkpoint(model)
    change(tensors)
    with refused(model, text):
        load_checkpoint(model, save(tmp_path, tensors, FP8_CONFIG))
