from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from npu_fusion.quantization import presets
from npu_fusion.quantization.config import parse
from npu_fusion.quantization.presets import DEFAULT, PRESETS, Preset, preset
from npu_fusion.quantization.scheme import InputScheme, Scheme, WeightScheme

SMOOTH, AWQ = {"smooth_strength": 0.5}, {"grids_num": 20}
GPTQ = {"act_order": True, "block_size": 128, "percdamp": 0.01}
INT8, INT4 = WeightScheme("int8", True, "channel"), WeightScheme("int4", True, "channel")
EXPECTED = {
    "INT4_AWQ_WEIGHT_QUANT_CFG": Scheme(INT4, None, "awq", AWQ),
    "INT4_GPTQ_WEIGHT_QUANT_CFG": Scheme(INT4, None, "gptq", GPTQ),
    "INT8_SMOOTHQUANT_CFG": Scheme(INT8, InputScheme("int8", True, "tensor"), "smoothquant", SMOOTH),
    "INT8_MINMAX_WEIGHT_QUANT_CFG": Scheme(INT8, None, "minmax"),
    "HIFP8_OFMR_CFG": Scheme(WeightScheme("hifloat8", True, "tensor"), InputScheme("hifloat8"), "ofmr"),
    "FP8_OFMR_CFG": Scheme(
        WeightScheme("float8_e4m3fn", True, "tensor"), InputScheme("float8_e4m3fn"), "ofmr"
    ),
    "MXFP8_QUANT_CFG": Scheme(
        WeightScheme("mxfp8_e4m3fn", True, "group", 32), InputScheme("mxfp8_e4m3fn", True, "group"), "mxquant"
    ),
    "MXFP4_AWQ_WEIGHT_QUANT_CFG": Scheme(WeightScheme("mxfp4_e2m1", True, "group", 32), None, "awq", AWQ),
    "HIFP8_CAST_CFG": Scheme(WeightScheme("hifloat8", True, "channel"), InputScheme("hifloat8"), "cast"),
    "HIFP8_QUANTILE_CFG": Scheme(
        WeightScheme("hifloat8", True, "tensor"), InputScheme("hifloat8"), "quantile"
    ),
    "HIFP8_SMOOTHQUANT_CFG": Scheme(
        WeightScheme("hifloat8", True, "channel"), InputScheme("hifloat8"), "smoothquant", SMOOTH
    ),
    "W8A8_DYNAMIC_CFG": Scheme(INT8, InputScheme("int8", True, "token"), "minmax"),
    "W8A8_DYNAMIC_SMOOTHQUANT_CFG": Scheme(INT8, InputScheme("int8", True, "token"), "smoothquant", SMOOTH),
    "W4A16_AUTOROUND_CFG": Scheme(
        WeightScheme("int4", True, "group", 128), None, "autoround", {"steps": 200, "lr": None}
    ),
}


def test_the_presets_are_these() -> None:
    assert list(PRESETS) == list(EXPECTED)
    assert DEFAULT in PRESETS


@pytest.mark.parametrize("name", EXPECTED)
def test_what_a_preset_asks_for(name: str) -> None:
    parsed = parse(PRESETS[name])
    assert parsed.batch_num == 1
    assert parsed.scheme_for("model.layers.0.fc") == EXPECTED[name]
    assert parsed.excludes("lm_head") is (name != "HIFP8_OFMR_CFG")
    assert getattr(presets, name) is PRESETS[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_names_are_found_in_any_case_and_without_their_end(name: str) -> None:
    for spelling in (name, name.lower(), name.removesuffix("_CFG"), f" {name.removesuffix('_CFG').title()} "):
        assert preset(spelling) is PRESETS[name]
        assert parse(spelling) == parse(PRESETS[name])


def test_unknown_names() -> None:
    message = r"^quantize: config is 'int8_smoothqaunt'; accepted: 'INT4_AWQ_WEIGHT_QUANT_CFG', "
    with pytest.raises(ValueError, match=message) as caught:
        parse("int8_smoothqaunt")
    assert str(caught.value).endswith("(did you mean 'INT8_SMOOTHQUANT_CFG'?)")


CHANGES = {
    "set": lambda d: d.__setitem__("batch_num", 9),
    "delete": lambda d: d.__delitem__("batch_num"),
    "or": lambda d: d.__ior__({"batch_num": 9}),
    "update": lambda d: d.update(batch_num=9),
    "pop": lambda d: d.pop("batch_num"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "setdefault": lambda d: d.setdefault("more", 9),
    "nested": lambda d: d["quant_cfg"]["weights"].__setitem__("type", "int4"),
    "algorithm": lambda d: d["algorithm"]["smoothquant"].update(smooth_strength=0.9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_preset_cannot_be_changed(change: str) -> None:
    before = parse("INT8_SMOOTHQUANT_CFG")
    with pytest.raises(TypeError, match="a preset cannot be changed; change a copy"):
        CHANGES[change](PRESETS["INT8_SMOOTHQUANT_CFG"])
    assert isinstance(PRESETS["INT8_SMOOTHQUANT_CFG"]["skip_layers"], frozenset)
    assert parse("INT8_SMOOTHQUANT_CFG") == before
    with pytest.raises(TypeError):
        PRESETS["MINE"] = Preset()  # type: ignore[index]


@pytest.mark.parametrize(
    "copied",
    [
        lambda preset: preset.copy(),
        copy.copy,
        copy.deepcopy,
        lambda preset: pickle.loads(pickle.dumps(preset)),
    ],
)
@pytest.mark.parametrize("name", EXPECTED)
def test_copies_can_be_changed_and_do_not_share(name: str, copied: Any) -> None:
    own = copied(PRESETS[name])
    assert type(own) is dict
    assert own == PRESETS[name]
    own["batch_num"] = 9
    own["quant_cfg"]["weights"]["symmetric"] = None
    own.setdefault("skip_layers", set()).add("router")
    if isinstance(own["algorithm"], set):
        own["algorithm"].clear()
    else:
        own["algorithm"][next(iter(own["algorithm"]))]["more"] = 1
    assert parse(PRESETS[name]).scheme_for("router") == EXPECTED[name]
    assert parse(PRESETS[name]).batch_num == 1


def test_a_preset_is_a_dict_to_others() -> None:
    changed = {**PRESETS["INT8_SMOOTHQUANT_CFG"], "batch_num": 4}
    assert parse(changed).batch_num == 4
    assert json.loads(json.dumps(PRESETS["INT8_SMOOTHQUANT_CFG"]["quant_cfg"]))["inputs"]["type"] == "int8"
