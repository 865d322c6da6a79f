"""``npu-fusion quantize``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_fusion.cli import main
from npu_fusion.quantization import W8A8DynamicLinear, load_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

BRIEF = ["--batches", "2", "--batch-size", "2", "--length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that reads bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_folder_becomes_a_quantized_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 4)
    arguments = ["quantize", str(folder), "--preset", "w8a8_dynamic_smoothquant", "--out", str(out)]
    assert main([*arguments, "--data", str(text), "--evaluate", *BRIEF]) == 0
    printed = capsys.readouterr().out
    assert "quantize: 14 layers" in printed
    assert "smoothing of 14 layers folded into what feeds them" in printed
    assert "loss in nats per token: " in printed and "MB of weights became" in printed
    model = load_model(out, prepare=False)
    assert isinstance(model.model.layers[1].mlp.down_proj, W8A8DynamicLinear)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.arange(10)[None]).logits.isfinite().all()
    merged = load_model(out)
    assert hasattr(merged.model.layers[0].mlp, "gate_up_proj")
    with torch.no_grad():
        ids = torch.arange(20)[None]
        assert torch.equal(merged(ids).logits, model(ids).logits)


def test_a_configuration_in_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"type": "int4", "symmetric": False, "strategy": "group", "group_size": 32}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quant_cfg": {"weights": weights}, "algorithm": ["minmax"]}))
    out = tmp_path / "out"
    assert (
        main(
            [
                "quantize",
                str(folder),
                "--config",
                str(config),
                "--out",
                str(out),
                "--dtype",
                "float32",
                *BRIEF,
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "11 x int4 weights per group of 32, asymmetric, minmax" in captured.out
    assert "calibrating on the source code of Python's standard library" in captured.err
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert load_model(out).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--preset": "INT9"}, "INT9"),
        ({"model": "nowhere"}, "MODEL_DIR is 'nowhere'; accepted: a folder with config.json"),
        ({"--data": "nowhere"}, "--data is 'nowhere', which cannot be read"),
        ({"--batches": "100000"}, "the calibration text has"),
        ({"--out": "."}, "--out is '.', which is there already"),
        ({"--dtype": "float32"}, r"no layer to quantize"),
    ],
)
def test_bad_input(
    change: dict[str, str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "model": str(folder),
        "--preset": "W8A8_DYNAMIC_CFG",
        "--out": str(tmp_path / "out"),
        "--batches": "1",
    }
    options |= {"--length": "16"} | change
    model = options.pop("model")
    assert main(["quantize", model, *(word for option in options.items() for word in option)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_cannot_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{")
    for name in ("config.json", "missing.json"):
        arguments = [
            "quantize",
            str(folder),
            "--config",
            str(tmp_path / name),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main(arguments) == 2
        assert f"{name}', which cannot be read" in capsys.readouterr().err
