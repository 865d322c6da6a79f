"""FusionConfig: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses

import pytest

from npu_fusion import FusionConfig
from npu_fusion.config import Numerics, fusion_flags
from npu_fusion.passes.pattern import FUSIONS


def test_every_fusion_has_a_flag_and_every_flag_a_fusion() -> None:
    assert set(fusion_flags()) == set(FUSIONS)


def test_it_is_frozen_and_hashable() -> None:
    config = FusionConfig(expect={"npu_swiglu": 1})
    assert hash(config) == hash(FusionConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.verify = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"swiglu": 1}, r"FusionConfig.swiglu is 1; accepted: True or False"),
        ({"numerics": "exact"}, r"numerics is 'exact'; accepted: 'strict', 'accurate', 'relaxed'"),
        ({"symbolic": "maybe"}, r"symbolic is 'maybe'; accepted: 'refuse', 'guard'"),
        ({"target": "ascend310"}, r"target is 'ascend310'; accepted: None, 'ascend910b'"),
        ({"expect": 3}, r"expect is 3; accepted: a dict operator name -> count"),
        ({"expect": {"npu_swiglu": -1}}, r"expect\['npu_swiglu'\] is -1"),
        ({"int32_bytes_per_token": -4}, r"int32_bytes_per_token is -4; accepted: a number of bytes"),
        ({"int32_bytes_per_token": True}, r"int32_bytes_per_token is True"),
        ({"dump_dir": 3}, r"dump_dir is 3; accepted: a path"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FusionConfig(**fields)


def test_make_takes_a_dict_and_refuses_unknown_keys_and_other_types() -> None:
    assert FusionConfig.make({"verify": True}) == FusionConfig(verify=True)
    with pytest.raises(ValueError, match=r"no key 'fuse_swiglu'; accepted: .*dequant_swiglu_quant"):
        FusionConfig.make({"fuse_swiglu": True})
    with pytest.raises(TypeError, match="fusion_config is a list"):
        FusionConfig.make([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no key 'nope'"):
        FusionConfig().replace(nope=1)


def test_the_environment_overrides_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPU_FUSION_DEQUANT_SWIGLU_QUANT", "0")
    monkeypatch.setenv("NPU_FUSION_NUMERICS", "strict")
    monkeypatch.setenv("NPU_FUSION_EXPECT", '{"npu_swiglu": 2}')
    monkeypatch.setenv("NPU_FUSION_INT32_PRODUCT_BYTES", "1024")
    config = FusionConfig.make({"dequant_swiglu_quant": True})
    assert not config.dequant_swiglu_quant
    assert config.level is Numerics.STRICT
    assert config.expect == {"npu_swiglu": 2}
    assert config.int32_product_bytes == 1024


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NPU_FUSION_SWIGLU", "yes", "NPU_FUSION_SWIGLU is 'yes'; accepted: 0, 1, false, true"),
        ("NPU_FUSION_SWIGLUU", "1", "NPU_FUSION_SWIGLUU is not known; accepted: .*NPU_FUSION_SWIGLU"),
        ("NPU_FUSION_EXPECT", "{", "NPU_FUSION_EXPECT is '{'; accepted: JSON"),
        ("NPU_FUSION_INT32_PRODUCT_BYTES", "many", "accepted: a whole number"),
    ],
)
def test_a_bad_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        FusionConfig.make()


def test_the_cache_key_is_stable_and_covers_what_changes_a_graph() -> None:
    key = FusionConfig().cache_key()
    assert key == FusionConfig().cache_key()
    assert key == FusionConfig(dump_dir="x", expect={"npu_swiglu": 1}).cache_key()
    for changed in ({"swiglu": False}, {"numerics": "strict"}, {"target": "ascend910b"}, {"verify": True}):
        assert FusionConfig(**changed).cache_key() != key
