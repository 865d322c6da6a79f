from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npu_fusion.quantization.checkpoints._files import Tensors, locate
from npu_fusion.quantization.checkpoints._json import entry, read_json


def raw(path: Path, header: str | bytes, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def opened(path: Path) -> Tensors:
    return Tensors(locate(path))


def test_all_dtypes_are_read_with_their_values(tmp_path: Path) -> None:
    given = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
    }
    given |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(given, tmp_path / "model.safetensors")
    tensors = opened(tmp_path)
    assert set(tensors) == set(given) == set(tensors.left())
    for name, tensor in given.items():
        assert (tensors.dtype(name), tensors.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        read = tensors.take(name, (tensor.dtype,), tensor.shape)
        assert torch.equal(read.float(), tensor.float())
    assert not tensors.left()


def test_tensors_are_memory_of_their_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    tensors = opened(tmp_path)
    first, second = (tensors.take("a", (torch.float32,)) for _ in range(2))
    first.zero_()
    assert second.tolist() == [1, 1, 1, 1]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert second.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["m.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl", "m.pickle"])
def test_pickles_are_refused_by_their_names_and_never_opened(name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "boom"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}: is a pickle by its name"):
            locate(path)
    # Under another name it is no safetensors file.
    (tmp_path / name).rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: is no safetensors file, or is damaged"):
        opened(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path, text in [
        (tmp_path, "has no .safetensors file"),
        (tmp_path / "none", "is no file and no folder"),
    ]:
        with pytest.raises(ValueError, match=text):
            locate(path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="accepted: a folder, a .safetensors file, or an"):
        locate(tmp_path / "a.txt")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="has 2 of them .a.safetensors, b.safetensors.; accepted: one index"):
        locate(tmp_path)
    os.mkfifo(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="c.safetensors: is no file and no folder"):
        locate(tmp_path / "c.safetensors")


def index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors\0",
        ".model.safetensors",
        "model.bin",
        "",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_names_files_beside_itself(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    index(folder, {"x": name})
    with pytest.raises(
        ValueError, match="index.json: x is in .*accepted: the name of a .safetensors file beside"
    ):
        locate(folder)


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        (None, "weight_map is NoneType"),
        ({}, "weight_map is dict"),
        ([], "weight_map is list"),
        ({"x": "gone.safetensors"}, "index.json: names gone.safetensors, which is not there"),
        ({"x": "a.safetensors"}, "a.safetensors: y is not listed for this file in the index"),
        ({"x": "a.safetensors", "y": "b.safetensors"}, "a.safetensors: y is not listed for this file"),
        (
            {"x": "a.safetensors", "y": "a.safetensors", "z": "a.safetensors", "w": "b.safetensors"},
            "a.safetensors: z is listed in the index, and not there",
        ),
        (
            {"x": "a.safetensors", "y": "a.safetensors", "w": "b.safetensors", "q": "c.safetensors"},
            "x is in a.safe",
        ),
    ],
)
def test_an_index_agrees_with_its_files(weight_map: Any, text: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1), "y": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "b.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=text):
        Tensors(locate(index(tmp_path, weight_map)))


def entry_of(name: str, shape: str, begin: int, end: int, dtype: str = "F32") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


@pytest.mark.parametrize(
    ("header", "body", "text"),
    [
        (
            "{" + entry_of("a", "[1]", 0, 4) + "," + entry_of("a", "[1]", 0, 4) + "}",
            4,
            "has the key 'a' twice",
        ),
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "is no safetensors file"),
        ("{" + entry_of("a", "[-1]", 0, 4) + "}", 4, "is no safetensors file"),
        ("{" + entry_of("a", "[1]", 0, 4) + "}", 3, "is no safetensors file"),
        ("{" + entry_of("a", "[1]", 0, 4) + "}", 5, "is no safetensors file"),
        ("{" + entry_of("a", "[2]", 0, 4) + "}", 4, "is no safetensors file"),
        ("{" + entry_of("a", "[1]", 4, 8) + "}", 8, "is no safetensors file"),
        ("{" + entry_of("a", "[1]", 4, 0) + "}", 4, "is no safetensors file"),
        ("{" + entry_of("a", "[4611686018427387904,4]", 0, 0) + "}", 0, "is no safetensors file"),
        ("{" + entry_of("a", "[18446744073709551616]", 0, 4) + "}", 4, "is no safetensors file"),
        (
            "{" + entry_of("a", "[1]", 0, 4) + "," + entry_of("b", "[1]", 0, 4) + "}",
            4,
            "is no safetensors file",
        ),
        ("{" + entry_of("a", "[1]", 0, 4, "F31") + "}", 4, "is no safetensors file"),
        ("{" + entry_of("a", "[1]", 0, 8, "C64") + "}", 8, "a has dtype C64; accepted: BOOL"),
        ("[]", 0, "is no safetensors file"),
        ("", 0, "is no safetensors file"),
        ("{", 0, "is no safetensors file"),
        (b"\xff\xfe", 0, "is no safetensors file"),
        ("[" * 20_000, 0, "is no safetensors file"),
        ('{"a":' * 20_000, 0, "is no safetensors file"),
    ],
)
def test_damaged_headers_are_refused(header: str | bytes, body: int, text: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "model.safetensors", header, b"\0" * body)
    with pytest.raises(ValueError, match="model.safetensors: ") as caught:
        opened(path)
    assert text in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_a_file_of_a_few_bytes_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match="model.safetensors: is no safetensors file"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        (torch.tensor([1.0, -1.0]), "s has NaN, infinities or negative numbers"),
        (torch.tensor([1.0, torch.nan]), "s has NaN, infinities or negative numbers"),
        (torch.tensor([1.0, torch.inf]), "s has NaN, infinities or negative numbers"),
        (torch.zeros(2), "s is 0 everywhere; accepted: positive scales"),
        (torch.tensor([0.1, 1.0], dtype=torch.float64), "s is float64 with numbers that float32 has not"),
        (torch.ones(2, dtype=torch.int32), "s is int32"),
        (torch.ones(3), r"s has shape \[3\]; accepted: \[2\] or \[2, 1\]"),
    ],
)
def test_scales(scale: Tensor, text: str, tmp_path: Path) -> None:
    save_file({"s": scale}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: {text}"):
        opened(tmp_path).scale("s", (2,), (2, 1))


def test_a_scale_of_0_is_refused_where_it_divides(tmp_path: Path) -> None:
    save_file({"s": torch.tensor([0.0, 1.0]).bfloat16()}, tmp_path / "model.safetensors")
    scale = opened(tmp_path).scale("s", (2,))
    assert scale.dtype == torch.float32 and scale.tolist() == [0, 1]
    with pytest.raises(ValueError, match="s is 0; accepted: positive scales"):
        opened(tmp_path).scale("s", (2,), positive=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "it has the key 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', "it has the key 'b' twice"),
        ('{"a": NaN}', "it has the number NaN, which JSON has not"),
        ('{"a": -Infinity}', "it has the number -Infinity"),
        ("[1]", "it is a list; accepted: an object"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
    ],
)
def test_json_is_refused_with_the_name_of_its_file(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="config.json: cannot be read as JSON") as caught:
        read_json(path)
    assert message in str(caught.value)


def test_a_huge_json_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as stream:
        stream.truncate((100 << 20) + 1)
    with pytest.raises(ValueError, match="it has 104,857,601 bytes; accepted: 104,857,600"):
        read_json(path)
    with pytest.raises(ValueError, match="none.json: cannot be read as JSON"):
        read_json(tmp_path / "none.json")


def test_entries() -> None:
    config = {"a": 1, "b": True, "c": None}
    assert entry(config, "a", int, "f") == 1 and entry(config, "b", bool, "f") is True
    assert entry(config, "c", int, "f", 5) == entry(config, "d", int, "f", 5) == 5
    with pytest.raises(ValueError, match="f: b is True; accepted: int"):
        entry(config, "b", int, "f")
    with pytest.raises(ValueError, match="f: a is 1; accepted: str, list"):
        entry(config, "a", (str, list), "f")
    with pytest.raises(ValueError, match="f: c is missing"):
        entry(config, "c", int, "f")
