"""The demo's decoder with latent attention: its checkpoint, its caches, and transformers' model beside it."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from npu_fusion.demo import evaluate_loss, evaluation_text, facts, load_byte_mla, mla_model
from npu_fusion.demo.mla_model import ByteMla, MlaConfig, new_byte_mla
from npu_fusion.demo.model import context_length

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def model() -> ByteMla:
    return load_byte_mla()


def texts(batch: int, length: int) -> Tensor:
    text = evaluation_text()[100_000 : 100_000 + batch * length]
    return torch.tensor(list(text)).view(batch, length)


def test_the_checkpoint_is_small_and_described(model: ByteMla) -> None:
    from safetensors.torch import load_file

    assert mla_model.CHECKPOINT.stat().st_size < 3_000_000
    known = facts(mla_model.CHECKPOINT)
    assert known["training"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert known["training"]["command"] == "python examples/train_byte_mla.py"
    assert known["config"] == asdict(model.config)
    assert context_length(mla_model.CHECKPOINT) == model.config.max_position_embeddings
    stored, state = load_file(mla_model.CHECKPOINT), model.state_dict()
    assert set(stored) | {"lm_head.weight", "embed_tokens.weight"} == set(state)
    assert all(v.dtype == torch.float16 and torch.equal(state[n], v.float()) for n, v in stored.items())
    assert not model.training


def test_loss_of_unseen_text_shows_that_the_model_was_trained(model: ByteMla) -> None:
    text = evaluation_text()[100_000:104_096]
    torch.manual_seed(0)
    assert evaluate_loss(new_byte_mla(asdict(model.config)), text) > 5
    trained = evaluate_loss(model, text)
    expected = facts(mla_model.CHECKPOINT)["training"]["validation_loss_nats_per_byte"]
    assert trained == pytest.approx(expected, abs=0.3)
    assert trained < 1.7


def test_it_computes_what_transformers_computes(model: ByteMla) -> None:
    transformers = pytest.importorskip("transformers")
    config = asdict(model.config)
    theta = config.pop("rope_theta")
    config = transformers.DeepseekV3Config(
        **config,
        num_key_value_heads=config["num_attention_heads"],
        first_k_dense_replace=config["num_hidden_layers"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    other = transformers.DeepseekV3ForCausalLM(config).eval()
    state = {n if n.startswith("lm_head") else f"model.{n}": v for n, v in model.state_dict().items()}
    other.load_state_dict(state)
    tokens = texts(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_change_nothing(dtype: torch.dtype) -> None:
    model = load_byte_mla(dtype)
    tokens = texts(3, 24)
    caches = model.new_caches(3)
    with torch.no_grad():
        whole = model(tokens).logits
        chunks = [
            model(tokens[:, start:stop], torch.arange(start, stop), caches).logits
            for start, stop in ((0, 10), (10, 11), (11, 24))
        ]
    assert whole.dtype == caches[0].latent.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.02 * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=tolerance)
    assert all(
        cache.latent[:, :, 24:].eq(0).all() and cache.rotary[:, :, :24].ne(0).any() for cache in caches
    )


def test_sizes_are_those_asked_for() -> None:
    model = new_byte_mla({"num_hidden_layers": 1, "vocab_size": 7}, torch.bfloat16)
    assert model.config == MlaConfig(num_hidden_layers=1, vocab_size=7)
    assert model(torch.tensor([[1, 6]])).logits.shape == (1, 2, 7)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install npu-fusion\[demo\]"):
        load_byte_mla()
