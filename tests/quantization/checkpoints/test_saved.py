from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import npu_fusion
from npu_fusion.quantization import quantize_linears
from npu_fusion.quantization.checkpoints import load_checkpoint, save_checkpoint
from npu_fusion.quantization.modules import Deployed, QuantizedConv2d
from npu_fusion.quantization.modules._deployed import KINDS
from npu_fusion.quantization.scheme import Scheme
from tests.quantization.checkpoints._deployed import SCHEMES, deployed, llama, name_of, scheme, small
from tests.quantization.checkpoints._packers import LAYERS, TOKENS, Small
from tests.quantization.checkpoints._snapshot import refused, same_values, unchanged

DESCRIPTION = "npu_fusion_quantization.json"
DYNAMIC = SCHEMES[0]


def fresh(on: str, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> Small:
    with torch.device(on):
        return Small(bias=bias, dtype=dtype).eval()


def bare(given: Scheme) -> bool:
    """Layers of this scheme have no bias."""
    return given.weights.type == "float4_e2m1" and given.inputs is not None


@pytest.mark.parametrize("given", SCHEMES, ids=name_of)
@pytest.mark.parametrize("smooth", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(given: Scheme, smooth: bool, tmp_path: Path) -> None:
    bias = not bare(given)
    model = small(given, bias, smooth)
    save_checkpoint(model, tmp_path)
    for on in ("meta", "cpu"):
        loaded = fresh(on, bias)
        report = load_checkpoint(loaded, tmp_path)
        assert report.format == "npu_fusion" and set(report.layers) == set(LAYERS) and not report.left
        assert same_values(loaded, model)
        assert torch.equal(loaded(TOKENS), model(TOKENS))
        assert loaded.head.weight is loaded.embed.weight
        for name in LAYERS:
            layer, original = loaded.get_submodule(name), model.get_submodule(name)
            assert isinstance(layer, Deployed) and isinstance(original, Deployed)
            assert layer.describe() == original.describe()
        for name in model.gate.shared:  # type: ignore[union-attr]
            assert loaded.gate._buffers[name] is loaded.up._buffers[name]
            assert (loaded.gate._buffers[name] is None) == (model.gate._buffers[name] is None)


class Pictures(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", dtype=dtype)
        self.norm = nn.BatchNorm2d(8, dtype=dtype)
        self.second = nn.Conv2d(8, 4, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)))
        return y


@pytest.mark.parametrize("type", ["hifloat8", "float8_e4m3fn"])
def test_convolutions_too(type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pictures()
    model(torch.randn(2, 3, 8, 8))  # gives the norm its buffers
    model.eval()
    for name in ("first", "second"):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        model.set_submodule(name, deployed(layer, scheme(type, type)))
    save_checkpoint(model, tmp_path)
    x = torch.randn(2, 3, 8, 8)
    for on in ("cpu", "meta"):
        with torch.device(on):
            loaded = Pictures().eval()
        load_checkpoint(loaded, tmp_path)
        assert torch.equal(loaded(x), model(x)) and same_values(loaded, model)
    other = Pictures()
    other.second = nn.Conv2d(8, 4, (3, 1), stride=1, padding=(1, 0), groups=2, bias=False)
    with refused(other, "layers.second: the layer of the model has ((1, 1),", "accepted: ((2, 2),"):
        load_checkpoint(other, tmp_path)


def test_the_schemes_above_are_of_every_kind_of_layer() -> None:
    convolution = QuantizedConv2d.kind
    linear = {next(k for k, cls in KINDS.items() if k != convolution and cls.takes(s)) for s in SCHEMES}
    assert {*linear, convolution} == set(KINDS)


@pytest.mark.parametrize("sizes", [1, 20_000])
def test_several_files_and_an_index(sizes: int, tmp_path: Path) -> None:
    model = small(DYNAMIC, smooth=True)
    save_checkpoint(model, tmp_path, shard_size=sizes)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = {key: t for file in files for key, t in load_file(tmp_path / file).items()}
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    loaded = fresh("meta")
    load_checkpoint(loaded, tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_one_file_of_it_finds_its_description(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    save_checkpoint(model, tmp_path)
    loaded = fresh("cpu")
    load_checkpoint(loaded, tmp_path / "model.safetensors", format="npu_fusion")
    assert same_values(loaded, model)


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    save_checkpoint(model, tmp_path)
    loaded = fresh("meta")
    load_checkpoint(loaded, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_floats_alone_are_a_checkpoint_too(tmp_path: Path) -> None:
    model = Small()
    save_checkpoint(model, tmp_path)
    loaded = fresh("meta", bias=False, dtype=torch.float32)
    assert not load_checkpoint(loaded, tmp_path).layers
    assert same_values(loaded, model) and loaded.head.weight is loaded.embed.weight


def test_a_deployed_model_takes_another_checkpoint_of_its_own_form(tmp_path: Path) -> None:
    model, other = small(DYNAMIC), small(DYNAMIC)
    with torch.no_grad():
        other.gate.weight.neg_()
    save_checkpoint(other, tmp_path)
    load_checkpoint(model, tmp_path)
    assert same_values(model, other)
    static = small(SCHEMES[1])
    with refused(static, "layers.", "the layer of the model is {'kind': 'w8a8_static_linear'"):
        load_checkpoint(static, tmp_path)


def test_tied_weights_are_tied_again(tmp_path: Path) -> None:
    save_checkpoint(Small(), tmp_path)
    for on in ("cpu", "meta"):
        loaded = fresh(on, bias=False, dtype=torch.float32)
        loaded.head.weight = nn.Parameter(loaded.head.weight.detach().clone())
        load_checkpoint(loaded, tmp_path)
        assert loaded.head.weight is loaded.embed.weight


def test_what_is_tied_only_in_the_model_has_to_be_equal_in_the_file(tmp_path: Path) -> None:
    model = Small()
    model.head.weight = nn.Parameter(torch.randn(16, 128))
    save_checkpoint(model, tmp_path)
    loaded = Small()
    with refused(loaded, "head.weight and embed.weight differ, and are one tensor in the model"):
        load_checkpoint(loaded, tmp_path)


def test_one_layer_of_two_names_stays_one(tmp_path: Path) -> None:
    model = small(DYNAMIC, smooth=True)
    model.up = model.gate
    save_checkpoint(model, tmp_path)
    loaded = fresh("meta")
    loaded.up = loaded.gate
    load_checkpoint(loaded, tmp_path)
    assert loaded.up is loaded.gate and torch.equal(loaded(TOKENS), model(TOKENS))
    with refused(apart := fresh("cpu"), "up."):
        load_checkpoint(apart, tmp_path)


def test_a_quantized_head_leaves_the_embedding(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    model.head = deployed(model.head, DYNAMIC)  # type: ignore[assignment]
    save_checkpoint(model, tmp_path)
    loaded = fresh("meta")
    assert set(load_checkpoint(loaded, tmp_path).layers) == {*LAYERS, "head"}
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("prepare_first", [False, True])
def test_a_llama_before_and_after_prepare(prepare_first: bool, tmp_path: Path) -> None:
    model = llama("cpu")
    quantize_linears(model)
    keys = list(model.state_dict())
    if prepare_first:
        assert npu_fusion.prepare(model).merged
    save_checkpoint(model, tmp_path)
    described = json.loads((tmp_path / DESCRIPTION).read_text())
    assert {f"{name}.weight" for name in described["layers"]} < set(keys)
    assert described["buffers"] == ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
    assert ["model.embed_tokens.weight", "lm_head.weight"] in described["shared"]
    tokens = torch.arange(8)[None]
    for on in ("meta", "cpu"):
        loaded = llama(on)
        load_checkpoint(loaded, tmp_path)
        assert list(loaded.state_dict()) == keys and same_values(loaded, model)
        assert isinstance(loaded.get_submodule("model.layers.0.mlp.gate_proj"), Deployed)
        with torch.no_grad():
            npu_fusion.prepare(loaded)
            prepared = copy.deepcopy(model)
            npu_fusion.prepare(prepared)
            assert torch.equal(loaded(tokens).logits, prepared(tokens).logits)


def test_a_prepared_model_is_loaded_before_it_is_prepared(tmp_path: Path) -> None:
    model = llama("cpu")
    quantize_linears(model)
    save_checkpoint(model, tmp_path)
    late = llama("cpu")
    npu_fusion.prepare(late)
    with refused(late, "mlp.gate_proj is no layer of the model (load into a model before it is prepared)"):
        load_checkpoint(late, tmp_path)


def test_floats_go_into_a_prepared_model(tmp_path: Path) -> None:
    model = llama("cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    save_checkpoint(model, tmp_path)
    prepared = llama("cpu")
    assert npu_fusion.prepare(prepared).merged
    load_checkpoint(prepared, tmp_path)
    assert same_values(prepared, model)


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_buffers_of_no_state_dict_come_out_of_the_file(tmp_path: Path) -> None:
    model = WithTable()
    model.table += 1
    save_checkpoint(model, tmp_path)
    with torch.device("meta"):
        loaded = WithTable()
    assert not load_checkpoint(loaded, tmp_path).ignored
    assert loaded.get_buffer("table").tolist() == [1, 2, 3, 4]
    assert list(loaded.state_dict()) == ["layer.weight", "layer.bias"]


def test_frequencies_of_a_real_model_stay_what_they_are(tmp_path: Path) -> None:
    save_checkpoint(llama("cpu"), tmp_path)
    model = llama("cpu")
    frequencies = model.get_buffer("model.rotary_emb.inv_freq")
    before = frequencies.clone()
    report = load_checkpoint(model, tmp_path)
    assert model.get_buffer("model.rotary_emb.inv_freq") is frequencies and torch.equal(frequencies, before)
    assert report.ignored == ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format="other"), "format is 'other'; accepted: 'npu_fusion'"),
        (lambda d: d.update(format_version=2), "format_version is 2, of npu_fusion 0.1.0; accepted: 1"),
        (lambda d: d.update(format_version=True), "format_version is True; accepted: int"),
        (lambda d: d.pop("layers"), "layers is missing"),
        (
            lambda d: d.update(weights="../model.safetensors"),
            "weights is '../model.safetensors'; accepted: the name",
        ),
        (lambda d: d.update(weights="other.safetensors"), "other.safetensors: is no file"),
        (lambda d: d.update(weights="model.bin"), "is a pickle by its name"),
        (lambda d: d.update(shared=[["a"]]), "shared has a group of one name"),
        (lambda d: d["shared"].append(d["shared"][0]), "one name in two groups"),
        (lambda d: d.update(shared=[["x", "y"]]), "x is missing"),
        (lambda d: d.update(shared=[[1, 2]]), "shared has [1, 2]; accepted: lists of names"),
        (lambda d: d.update(shared=[["gate.weight", "up.weight"]]), "up.weight is there twice"),
        (lambda d: d.update(buffers="x"), "buffers is 'x'; accepted: list"),
        (lambda d: d.update(buffers=["x"]), "x is missing"),
        (lambda d: d["layers"].update(other=d["layers"]["up"]), "other is no layer of the model"),
        (
            lambda d: d["layers"].update(norm=d["layers"]["up"]),
            "layers.norm: the layer of the model is a LayerNorm",
        ),
        (lambda d: d["layers"].update(up=[]), "layers.up: description: is a list; accepted: a dict"),
        (
            lambda d: d["layers"].pop("up"),
            "gate.smooth_scales is up.smooth_scales, too; in the model these differ",
        ),
        (lambda d: d["layers"]["up"].update(kind="x"), "layers.up: description: kind is 'x'"),
        (lambda d: d["layers"]["up"].update(out_features=63), "has a weight [64, 128]; accepted: [63, 128]"),
        (lambda d: d["layers"]["up"].update(out_features=-1), "out_features is -1; accepted: at least 1"),
        (lambda d: d["layers"]["up"].update(out_features=1 << 62), "layers.up: "),
        (lambda d: d["layers"]["up"].update(in_features=10**30), "layers.up: "),
        (lambda d: d["layers"]["up"].update(out_features=1.5), "out_features is 1.5; accepted: int"),
        (lambda d: d["layers"]["up"].update(bias=False), "layers.up: has no bias; accepted: as in the model"),
        (lambda d: d["layers"]["up"].update(more=1), "has no entry 'more'"),
        (lambda d: d["layers"]["up"]["scheme"]["weights"].update(type="int3"), "type is 'int3'"),
        (lambda d: d["layers"]["up"]["scheme"].update(inputs=None), "layers.up: "),
        (lambda d: d["layers"]["up"].update(smooth_scales="float32"), "gate.smooth_scales is"),
        (
            lambda d: d["layers"]["up"].update(smooth_scales=None),
            "gate.smooth_scales is up.smooth_scales, too",
        ),
    ],
)
def test_a_description_that_lies_is_refused(change: Any, text: str, tmp_path: Path) -> None:
    save_checkpoint(small(DYNAMIC, smooth=True), tmp_path)
    edit(tmp_path, change)
    for on in ("cpu", "meta"):
        model = fresh(on)
        with refused(model, text):
            load_checkpoint(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "up.weight",
            torch.zeros(64, 127, dtype=torch.int8),
            "up.weight is int8 [64, 127]; accepted: int8 [64, 128]",
        ),
        (
            "up.weight",
            torch.zeros(64, 128, dtype=torch.uint8),
            "up.weight is uint8 [64, 128]; accepted: int8",
        ),
        ("up.weight_scale", torch.full((64,), torch.nan), "up.weight_scale has others than finite numbers"),
        ("up.bias", torch.full((64,), torch.inf), "up.bias has others than finite numbers"),
        (
            "gate.smooth_scales",
            torch.zeros(128).bfloat16(),
            "gate.smooth_scales has others than positive numbers",
        ),
        ("up.smooth_scales", torch.ones(128).bfloat16(), "up.smooth_scales is there twice"),
        ("up.more", torch.ones(1), "up.more has no place in the model"),
        ("down.bias", None, "down.bias is missing"),
        ("embed.weight", None, "embed.weight is missing"),
        ("norm.weight", torch.ones(64), "norm.weight is float32 [64]"),
    ],
)
def test_damaged_tensors_are_named(name: str, value: Tensor | None, text: str, tmp_path: Path) -> None:
    save_checkpoint(small(DYNAMIC, smooth=True), tmp_path)
    tensors = {**load_file(tmp_path / "model.safetensors"), name: value}
    save_file({key: t for key, t in tensors.items() if t is not None}, tmp_path / "model.safetensors")
    model = fresh("cpu")
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, tmp_path)


@pytest.mark.parametrize(
    ("given", "name", "value", "text"),
    [
        (
            SCHEMES[1],
            "up.weight_scale",
            torch.full((64,), torch.inf),
            "up.weight_scale has others than finite",
        ),
        (
            SCHEMES[1],
            "gate.input_scale",
            torch.zeros(128).bfloat16(),
            "gate.input_scale has others than positive",
        ),
        (
            SCHEMES[3],
            "up.weight",
            torch.full((64, 128), torch.nan).to(torch.float8_e4m3fn),
            "up has a weight with NaN",
        ),
        (SCHEMES[4], "up.weight", torch.full((64, 128), 0x80, dtype=torch.uint8), "up has a weight with NaN"),
        (
            SCHEMES[5],
            "up.weight_scale",
            torch.full((64, 2, 2), 255, dtype=torch.uint8),
            "up has a weight with NaN",
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Scheme) else "",
)
def test_codes_that_are_no_numbers_are_named(
    given: Scheme, name: str, value: Tensor, text: str, tmp_path: Path
) -> None:
    save_checkpoint(small(given), tmp_path)
    tensors = {**load_file(tmp_path / "model.safetensors"), name: value}
    save_file(tensors, tmp_path / "model.safetensors")
    model = fresh("cpu")
    with refused(model, text, "model.safetensors"):
        load_checkpoint(model, tmp_path)


def test_weights_of_one_dtype_of_input_are_not_for_another(tmp_path: Path) -> None:
    save_checkpoint(small(scheme("int4")), tmp_path)
    model = fresh("cpu", dtype=torch.float16)
    with refused(model, "the layer of the model is torch.float16; accepted: torch.bfloat16"):
        load_checkpoint(model, tmp_path)


def test_a_subclass_is_not_replaced(tmp_path: Path) -> None:
    class Own(nn.Linear):
        pass

    save_checkpoint(small(DYNAMIC), tmp_path)
    model = fresh("cpu")
    model.up = Own(128, 64, dtype=torch.bfloat16)
    with refused(model, "layers.up: the layer of the model is a Own; accepted: Linear"):
        load_checkpoint(model, tmp_path)


def test_saving_refuses_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model is a int"):
        save_checkpoint(3, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is a int"):
        save_checkpoint(Small(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form is 'gguf'; accepted: npu_fusion, ascend"):
        save_checkpoint(Small(), tmp_path, form="gguf")
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="shard_size is"):
            save_checkpoint(Small(), tmp_path, shard_size=size)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="embed.weight is a Parameter on meta; accepted: tensors with values"
    ):
        save_checkpoint(fresh("meta"), tmp_path)
    model = Small()
    model.get_extra_state = lambda: 3  # type: ignore[method-assign]
    Own = type(
        "Own", (Small,), {"get_extra_state": lambda self: 3, "set_extra_state": lambda self, state: None}
    )
    with pytest.raises(ValueError, match="_extra_state is a int; accepted: tensors"):
        save_checkpoint(Own(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_in_calibration_is_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    npu_fusion.quantize(model, "INT8_SMOOTHQUANT_CFG")
    with pytest.raises(ValueError, match="model is being calibrated; call npu_fusion.convert"):
        save_checkpoint(model, tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = small(DYNAMIC)
    save_checkpoint(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for form in ("npu_fusion", "ascend"):
        with pytest.raises(ValueError, match="is there already; accepted: a folder without a checkpoint"):
            save_checkpoint(model, tmp_path, form=form)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="a file; accepted: a folder"):
        save_checkpoint(model, tmp_path / "model.safetensors")


def test_a_failed_save_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import torch as library

    calls = []
    original = library.save_file

    def fails(tensors: Any, path: Any, metadata: Any = None) -> None:
        calls.append(path)
        original(tensors, path, metadata)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr(library, "save_file", fails)
    with unchanged(model := small(DYNAMIC)), pytest.raises(OSError, match="no space"):
        save_checkpoint(model, tmp_path, shard_size=1)
    assert len(calls) == 2 and not list(tmp_path.iterdir())
