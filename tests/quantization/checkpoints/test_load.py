from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.checkpoints import Loaded, load_checkpoint, save_checkpoint
from npu_fusion.quantization.checkpoints._patterns import Patterns, class_names
from npu_fusion.quantization.modules import Deployed
from tests.quantization.checkpoints._deployed import SCHEMES, small
from tests.quantization.checkpoints._packers import (
    AWQ_CONFIG,
    Small,
    Tensors,
    awq_layer,
    gptq_config,
    gptq_layer,
    model_of,
    save,
    weight_of,
)
from tests.quantization.checkpoints._snapshot import refused, unchanged


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return model_of(awq_layer)[0]


def test_wrong_arguments(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path, tensors, AWQ_CONFIG)
    with pytest.raises(TypeError, match="model is a int; accepted: torch.nn.Module"):
        load_checkpoint(3, folder)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is a int; accepted: a string or a path"):
        load_checkpoint(Small(), 3)  # type: ignore[arg-type]
    model = Small()
    with refused(model, "format is 'gguf'; accepted: npu_fusion, ascend, awq, gptq, compressed-tensors, fp8"):
        load_checkpoint(model, folder, format="gguf")
    with refused(layer := nn.Linear(128, 64), "model is itself a Linear, which cannot be replaced in place"):
        load_checkpoint(layer, folder)


def test_a_path_may_be_a_string_a_file_or_a_folder(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path, tensors, AWQ_CONFIG)
    for path in (str(folder), folder, folder / "model.safetensors"):
        assert load_checkpoint(Small(), path, format="awq").format == "awq"


def test_without_safetensors_there_is_a_line_to_type(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, tensors, AWQ_CONFIG)
    original = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "safetensors":
            raise ImportError(name)
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    model = Small()
    with unchanged(model), pytest.raises(ImportError, match="load_checkpoint needs safetensors: pip install"):
        load_checkpoint(model, folder)
    with pytest.raises(ImportError, match="save_checkpoint needs safetensors: pip install"):
        save_checkpoint(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "nothing says how it is quantized; accepted: one of npu_fusion_quantization.json"),
        ({"quantization_config": 3}, "quantization_config is 3; accepted: dict"),
        ({"quantization_config": {}}, "quantization_config: quant_method is missing"),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "quant_method is 'aqlm'; accepted: 'awq', 'gptq'",
        ),
        ({"quantization_config": {"quant_method": 3}}, "quant_method is 3; accepted: str"),
        ({"text_config": 3}, "text_config is 3; accepted: dict"),
        (
            {"quantization_config": {**AWQ_CONFIG, "quant_method": "gptq"}},
            "up.scales has shape [4, 64]; accepted: [32, 8]",
        ),
        (
            {"quantization_config": {**AWQ_CONFIG, "quant_method": "compressed-tensors"}},
            "quantization_config: format is missing",
        ),
        ({"quantization_config": {**AWQ_CONFIG, "quant_method": "fp8"}}, "weight_block_size is missing"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
            "says fp8, but no tensor is a weight_scale_inv",
        ),
    ],
)
def test_mislabelled_checkpoints(tensors: Tensors, config: dict[str, Any], text: str, tmp_path: Path) -> None:
    # Only one layer, so that it is the one that is named.
    one = {key: t for key, t in tensors.items() if not key.startswith(("gate", "down"))}
    folder = save(tmp_path, one, {})
    (folder / "config.json").write_text(json.dumps(config))
    model = Small()
    with refused(model, text):
        load_checkpoint(model, folder)


def test_a_float_checkpoint_with_a_label_is_refused(tmp_path: Path) -> None:
    floats = {key: t for key, t in Small().state_dict().items() if key != "head.weight"}
    model = Small()
    for method, more in (("awq", {}), ("gptq", {"bits": 4, "group_size": 32})):
        with refused(model, f"says {method}, but no tensor is a qweight"):
            load_checkpoint(model, save(tmp_path / method, floats, {"quant_method": method, **more}))


def test_the_format_that_was_asked_for(tensors: Tensors, tmp_path: Path) -> None:
    model = Small()
    with refused(model, "is of format 'awq'; accepted: 'gptq', as load_checkpoint was told"):
        load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG), format="gptq")


def test_settings_inside_those_of_the_text_model(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path, tensors, {})
    (folder / "config.json").write_text(json.dumps({"text_config": {"quantization_config": AWQ_CONFIG}}))
    assert load_checkpoint(Small(), folder).format == "awq"


def test_what_the_model_does_not_want_is_passed_over(tensors: Tensors, tmp_path: Path) -> None:
    more = {"layers.0.rotary_emb.inv_freq": torch.ones(4), "mtp.weight": torch.ones(4)}
    folder = save(tmp_path, tensors | more, AWQ_CONFIG)
    model = Small()
    with refused(model, "mtp.weight has no place in the model"):
        load_checkpoint(model, folder)
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # type: ignore[assignment]
    assert set(load_checkpoint(model, folder).ignored) == set(more)


class WithBuffer(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def test_buffers(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path, tensors | {"steps": torch.tensor(7)}, AWQ_CONFIG)
    model = WithBuffer()
    load_checkpoint(model, folder)
    assert int(model.steps) == 7 and model.table.tolist() == [0, 1, 2, 3]  # type: ignore[arg-type, operator, union-attr]
    with torch.device("meta"):
        empty = WithBuffer()
    with refused(empty, "table is on the meta device, and no checkpoint has it"):
        load_checkpoint(empty, folder)
    wrong = save(tmp_path / "wrong", tensors | {"steps": torch.tensor(7.0)}, AWQ_CONFIG)
    with refused(model := WithBuffer(), "steps is float32 []; accepted: int64 []"):
        load_checkpoint(model, wrong)


def test_parameters_keep_their_objects_and_their_training(tensors: Tensors, tmp_path: Path) -> None:
    folder = save(tmp_path, tensors, AWQ_CONFIG)
    model = Small().train()
    norm, embed = model.norm.weight, model.embed.weight
    norm.requires_grad_(False)
    load_checkpoint(model, folder)
    assert model.norm.weight is norm and model.embed.weight is embed and model.gate.training
    with torch.device("meta"):
        empty = Small().eval()
    empty.norm.weight.requires_grad_(False)
    load_checkpoint(empty, folder)
    assert (
        not empty.norm.weight.requires_grad and empty.embed.weight.requires_grad and not empty.gate.training
    )


def test_a_linear_of_another_class_is_loaded_as_numbers(tensors: Tensors, tmp_path: Path) -> None:
    class Own(nn.Linear):
        pass

    model = Small()
    model.up = Own(128, 64, bias=False)
    with pytest.warns(UserWarning, match="up: it is a Own; accepted: torch.nn.Linear itself"):
        loaded = load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    assert set(loaded.left) == {"up"} and isinstance(model.gate, Deployed)
    assert torch.equal(model.up.weight.detach(), model_of(awq_layer)[1]["up"])


def test_other_layers_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    model = Small()
    model.up = nn.Conv1d(128, 64, 1, bias=False)  # type: ignore[assignment]
    with refused(model, "up is a Conv1d in the model; accepted: torch.nn.Linear"):
        load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))


def test_a_report_in_words() -> None:
    loaded = Loaded("awq", {"a": "int4", "b": "int4"}, {"c": "too small", "d": "too small"}, ("e", "f", "g"))
    assert str(loaded).splitlines() == [
        "load_checkpoint: 2 quantized layers, of a awq checkpoint",
        "  2 x int4",
        "  loaded as floats: c and 1 more: too small",
        "  not wanted by the model: e and 2 more",
    ]


def test_a_description_counts_more_than_a_configuration(tmp_path: Path) -> None:
    save_checkpoint(small(SCHEMES[0]), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AWQ_CONFIG}))
    assert load_checkpoint(Small(bias=True, dtype=torch.bfloat16), tmp_path).format == "npu_fusion"


def test_patterns() -> None:
    patterns = Patterns(["Linear", "re:.*attn.*", "re:.*q_proj", "model.lm_head"], "f")
    linear = class_names(nn.Linear(1, 1))
    assert linear == ["Linear", "Module"] and class_names(None) == ("Linear",)
    assert patterns.match("model.lm_head", linear) == (0, "model.lm_head")
    assert patterns.match("attn.q_proj", linear) == (1, "re:.*attn.*")
    assert patterns.match("x.q_proj", linear) == (1, "re:.*q_proj")
    assert patterns.match("mlp", linear) == (2, "Linear")
    assert patterns.match("mlp", ["Conv2d"]) is None
    # As re.match: from the beginning, not to the end.
    assert Patterns(["re:mlp"], "f").match("mlp.up", []) and not Patterns(["re:mlp"], "f").match("x.mlp", [])


def test_experts_in_two_forms_are_refused(tmp_path: Path) -> None:
    """The packed weight of an expert, and a float one beside it."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Module()
            self.experts.down_proj = nn.Parameter(torch.zeros(2, 128, 64))

    own, weight = awq_layer("down", 128, 64)
    tensors = {f"experts.{e}.down_proj.{key}": t.clone() for e in (0, 1) for key, t in own.items()}
    model = Mixture()
    with refused(model, "experts.1.down_proj.weight has no place in the model"):
        double = tensors | {"experts.1.down_proj.weight": weight.contiguous()}
        load_checkpoint(model, save(tmp_path / "double", double, AWQ_CONFIG))
    with pytest.warns(UserWarning, match="the experts are one tensor in the model"):
        load_checkpoint(model, save(tmp_path / "single", tensors, AWQ_CONFIG))
    assert torch.equal(model.experts.down_proj.detach(), torch.stack([weight, weight]))


def test_a_default_device_changes_nothing(tmp_path: Path) -> None:
    made, weights = model_of(gptq_layer)
    folder = save(tmp_path, made, gptq_config())
    with torch.device("meta"):
        model = Small()
        load_checkpoint(model, folder)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(weight_of(model.gate), weights["gate"])


def test_values_are_on_the_device_of_the_model(tensors: Tensors, tmp_path: Path) -> None:
    """Of meta tensors, on the CPU; so a mixed model is possible."""
    model = Small()
    with torch.device("meta"):
        model.gate = nn.Linear(128, 64, bias=False)
    load_checkpoint(model, save(tmp_path, tensors, AWQ_CONFIG))
    devices: set[Tensor] = {t.device for t in (*model.parameters(), *model.buffers())}  # type: ignore[misc]
    assert devices == {torch.device("cpu")}
