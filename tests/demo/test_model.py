from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from npu_fusion.demo import (
    context_length,
    corpus,
    evaluate_loss,
    evaluation_text,
    facts,
    generate,
    load_byte_llama,
    training_text,
)
from npu_fusion.demo.model import CHECKPOINT, new_byte_llama

pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_byte_llama()


class NextByte:
    """Sure that byte b is followed by b + 1; remembers the lengths it was called with."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        assert (ids.dtype, ids.dim(), ids.size(0)) == (torch.int64, 2, 1)
        self.lengths.append(ids.size(1))
        logits = torch.nn.functional.one_hot((ids + 1) % 256, 256).float() * 100
        return SimpleNamespace(logits=logits)


def test_the_checkpoint_is_small_and_described(model: torch.nn.Module) -> None:
    assert CHECKPOINT.stat().st_size < 6_000_000
    training = facts()["training"]
    assert training["parameters"] == sum(p.numel() for p in model.parameters())
    assert training["bytes_seen"] == training["steps"] * training["batch"] * training["sequence"]
    assert training["command"].startswith("python examples/train_byte_llama.py")
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_every_weight_comes_from_the_checkpoint(model: torch.nn.Module) -> None:
    from safetensors.torch import load_file

    stored = load_file(CHECKPOINT)
    state = model.state_dict()
    # The output head is the embedding; it is stored under one of the two names.
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert set(stored) | tied == set(state)
    assert len(tied & set(stored)) == 1
    for name, value in stored.items():
        assert value.dtype == torch.float16
        assert torch.equal(state[name], value.float())


def test_the_linears_suit_the_npu(model: torch.nn.Module) -> None:
    config = model.config
    assert config.hidden_size % 64 == 0
    assert config.intermediate_size % 64 == 0
    assert config.num_key_value_heads < config.num_attention_heads


def test_loss_of_unseen_text_shows_that_the_model_was_trained(model: torch.nn.Module) -> None:
    text = evaluation_text()[100_000:108_192]
    trained = evaluate_loss(model, text)
    torch.manual_seed(0)
    untrained = evaluate_loss(new_byte_llama(facts()["config"]), text)
    shares = [text.count(byte) / len(text) for byte in set(text)]
    by_frequency = -sum(share * math.log(share) for share in shares)
    assert untrained > 5  # ln 256 = 5.55: knows nothing
    assert 3 < by_frequency < 4  # knows how often each byte occurs in this very text
    assert trained < 1.5
    assert trained == pytest.approx(facts()["training"]["validation_loss_nats_per_byte"], abs=0.3)


def test_loads_in_the_dtype_asked_for() -> None:
    model = load_byte_llama(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert evaluate_loss(model, evaluation_text()[:1024]) < 2


def test_generation_is_deterministic_and_text(model: torch.nn.Module) -> None:
    prompt = b"def __init__(self, "
    seen: list[int] = []
    greedy = generate(model, prompt, 24, on_byte=seen.append)
    assert bytes(seen) == greedy
    assert len(greedy) == 24
    assert greedy == generate(model, prompt, 24)
    assert greedy.isascii()
    drawn = generate(model, prompt, 24, temperature=1.5, seed=1)
    assert drawn == generate(model, prompt, 24, temperature=1.5, seed=1)
    assert drawn != generate(model, prompt, 24, temperature=1.5, seed=2)


def test_one_graph_serves_every_length(model: torch.nn.Module) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(gm: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    compiled = torch.compile(model, backend=count, dynamic=True, fullgraph=True)
    text = evaluation_text()
    assert evaluate_loss(compiled, text[:300], context=128) == pytest.approx(
        evaluate_loss(model, text[:300], context=128), abs=1e-5
    )
    assert generate(compiled, text[:40], 4) == generate(model, text[:40], 4)
    assert len(graphs) == 1


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 17, 18])
def test_the_loss_counts_every_byte_but_the_first_once(length: int) -> None:
    data = bytes(range(length))
    next_byte = NextByte()
    assert evaluate_loss(next_byte, data, context=8) == pytest.approx(0, abs=1e-6)
    assert sum(next_byte.lengths) == length - 1
    assert max(next_byte.lengths) <= 8


def test_the_loss_is_a_mean_over_bytes() -> None:
    def knows_nothing(ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 256))

    assert evaluate_loss(knows_nothing, bytes(100), context=7) == pytest.approx(math.log(256), rel=1e-12)


def test_generation_grows_to_the_context_and_then_slides() -> None:
    next_byte = NextByte()
    assert generate(next_byte, b"abc", 5, context=6) == b"defgh"
    assert next_byte.lengths == [3, 4, 5, 6, 6]
    assert generate(next_byte, b"abc", 0) == b""


def test_the_default_context_is_that_of_the_training(model: torch.nn.Module) -> None:
    next_byte = NextByte()
    assert context_length() == model.config.max_position_embeddings == facts()["training"]["sequence"]
    generate(next_byte, bytes(300), 1)
    assert next_byte.lengths == [context_length()]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="data must have at least 2 bytes to predict one, got 1"):
        evaluate_loss(NextByte(), b"a")
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        evaluate_loss(NextByte(), b"ab", context=0)
    with pytest.raises(ValueError, match="prompt must have at least 1 byte, got 0"):
        generate(NextByte(), b"", 1)
    for wrong in ({"n": -1}, {"n": 1, "temperature": -0.5}, {"n": 1, "context": 0}):
        with pytest.raises(ValueError, match="n and temperature must be at least 0 and context at least 1"):
            generate(NextByte(), b"a", **wrong)


@pytest.mark.parametrize("missing", ["transformers", "safetensors.torch"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs \w+: pip install npu-fusion\[demo\]"):
        load_byte_llama()


def test_the_held_out_files_are_not_trained_on() -> None:
    train, held_out = training_text(), evaluation_text()
    files = held_out.split(corpus.SEPARATOR)
    assert len(files) == len(corpus.HELD_OUT)
    assert train.count(corpus.SEPARATOR) > 300
    assert not any(file in train for file in files)


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "standard_library", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"training text: .* holds no source files"):
        corpus.training_text()
    (tmp_path / "heapq.py").write_bytes(b"import this\r\n")
    assert corpus.evaluation_text() == b"import this\n"
