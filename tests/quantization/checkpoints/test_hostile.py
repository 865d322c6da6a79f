"""Files that were damaged at random: an error of one kind, and the model is what it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npu_fusion.quantization.checkpoints import load_checkpoint, save_checkpoint
from tests.quantization.checkpoints._compressed import W4A16_ASYM, W8A8, int8_layer, packed_layer
from tests.quantization.checkpoints._deployed import SCHEMES, small
from tests.quantization.checkpoints._packers import (
    AWQ_CONFIG,
    FP8_CONFIG,
    Small,
    awq_layer,
    fp8_layer,
    gptq_config,
    gptq_layer,
    model_of,
    save,
    save_sharded,
)
from tests.quantization.checkpoints._snapshot import snapshot

MAKERS: dict[str, Callable[[Path], object]] = {
    "awq": lambda folder: save(folder, model_of(awq_layer)[0], AWQ_CONFIG),
    "gptq": lambda folder: save_sharded(folder, model_of(gptq_layer)[0], gptq_config()),
    "int8": lambda folder: save(folder, model_of(int8_layer)[0], W8A8),
    "packed": lambda folder: save(
        folder, model_of(lambda *a: packed_layer(*a, symmetric=False))[0], W4A16_ASYM
    ),
    "fp8": lambda folder: save(folder, model_of(fp8_layer)[0], FP8_CONFIG),
    "npu_fusion": lambda folder: save_checkpoint(small(SCHEMES[2], smooth=True), folder, shard_size=20_000),
    "ascend": lambda folder: save_checkpoint(small(SCHEMES[2]), folder, form="ascend"),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def valid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    return folder


def model_for(folder: Path) -> Small:
    own = folder.name.startswith(("npu_fusion", "ascend"))
    return Small(bias=own, dtype=torch.bfloat16 if own else torch.float32)


def attempt(folder: Path, path: Path, damaged: bytes) -> bool:
    """Load with one file of the checkpoint damaged; whether it was taken. The file is mended again."""
    original = path.read_bytes()
    model = model_for(folder)
    before = snapshot(model)
    path.write_bytes(damaged)
    problem = None
    try:
        load_checkpoint(model, folder)
    except ValueError as error:
        problem = str(error)
    finally:
        path.write_bytes(original)
    if problem is not None:
        assert snapshot(model) == before, "the model was changed"
        assert str(folder) in problem or "load_checkpoint: " in problem
    return problem is None


fuzz = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(suffix))


@pytest.mark.filterwarnings("ignore::npu_fusion.quantization.QuantizationWarning")
@fuzz
@given(data=st.data())
def test_a_file_that_is_cut_off(valid: Path, data: Any) -> None:
    path = data.draw(st.sampled_from([*files(valid, ".safetensors"), *files(valid, ".json")]))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 2))
    assert not attempt(valid, path, whole[:cut])


@pytest.mark.filterwarnings("ignore::npu_fusion.quantization.QuantizationWarning")
@fuzz
@given(data=st.data())
def test_bytes_that_have_changed(valid: Path, data: Any) -> None:
    """In the header, where they matter most, or anywhere. The numbers of a weight may be any."""
    path = data.draw(st.sampled_from([*files(valid, ".safetensors"), *files(valid, ".json")]))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 4))):
        last = header if data.draw(st.booleans()) else len(content)
        content[data.draw(st.integers(0, last - 1))] = data.draw(st.integers(0, 255))
    attempt(valid, path, bytes(content))


VALUES: list[Any] = [None, True, -1, 0, 1 << 63, 1.5, "", "x", "../../x", [], {}, [[]], [1], {"a": {}}]


@pytest.mark.filterwarnings("ignore::npu_fusion.quantization.QuantizationWarning")
@fuzz
@given(seed=st.integers(0, 2**32), value=st.sampled_from(VALUES))
def test_json_with_another_value_in_it(valid: Path, seed: int, value: Any) -> None:
    chosen = random.Random(seed)
    path = chosen.choice(files(valid, ".json"))
    content = json.loads(path.read_text())
    place: Any = content
    while True:
        key = chosen.choice(list(place)) if isinstance(place, dict) else chosen.randrange(len(place))
        if not isinstance(place[key], dict | list) or not place[key] or chosen.random() < 0.2:
            break
        place = place[key]
    place[key] = value
    attempt(valid, path, json.dumps(content).encode())
