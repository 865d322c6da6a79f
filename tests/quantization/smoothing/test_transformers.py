"""Smoothing of Transformers' models, tiny and random: they compute the same with any kind of attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_fusion.quantization.smoothing import find_groups, get_act_scales, smooth, trace
from tests.quantization.smoothing._fold import assert_exact, groups_of, linears, producers

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ATTENTION = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
}
MLP = {
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
LATENT = {
    "self_attn.q_a_proj": "input_layernorm",
    "self_attn.kv_a_proj_with_mqa": "input_layernorm",
    "self_attn.q_b_proj": "self_attn.q_a_layernorm",
    "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
    "self_attn.o_proj": "self_attn.kv_b_proj",
}
# name: architecture, what its configuration has beside SIZES, the layers of a block with their producers
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str | None]]] = {
    "llama": ("Llama", {}, ATTENTION | MLP),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, ATTENTION | MLP),
    "qwen3": ("Qwen3", {"head_dim": 8}, ATTENTION | MLP),
    "mistral": ("Mistral", {"sliding_window": 4}, ATTENTION | MLP),
    "gemma": ("Gemma", {"head_dim": 8}, ATTENTION | MLP),
    "gemma2": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 4},
        ATTENTION | MLP | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm"),
    ),
    "phi3": (
        "Phi3",
        {},
        {
            "self_attn.qkv_proj": "input_layernorm",
            "self_attn.o_proj": "self_attn.qkv_proj",
            "mlp.gate_up_proj": "post_attention_layernorm",
            "mlp.down_proj": "mlp.gate_up_proj",
        },
    ),
    "opt": (
        "OPT",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {
            "self_attn.q_proj": "self_attn_layer_norm",
            "self_attn.k_proj": "self_attn_layer_norm",
            "self_attn.v_proj": "self_attn_layer_norm",
            "self_attn.out_proj": "self_attn.v_proj",
            "fc1": "final_layer_norm",
            "fc2": "fc1",
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {"use_parallel_residual": True},
        {
            "attention.query_key_value": "input_layernorm",
            "attention.dense": "attention.query_key_value",
            "mlp.dense_h_to_4h": "post_attention_layernorm",
            "mlp.dense_4h_to_h": None,
        },
    ),
    "deepseek": ("DeepseekV3", {**MLA, "first_k_dense_replace": 2}, LATENT | MLP),
}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def build(name: str, attention: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    architecture, options, _ = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():  # ones and zeros would hide wrong factors
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    found = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    prefix = next(name for name, m in model.named_modules() if m is found)
    return {f"{prefix}.{index}": block for index, block in enumerate(found)}


def expected(name: str, model: nn.Module) -> Mapping[str, str | None]:
    return {
        f"{block}.{layer}": source and f"{block}.{source}"
        for block in blocks(model)
        for layer, source in MODELS[name][2].items()
    }


def of_blocks(model: nn.Module, found: Mapping[str, str | None]) -> Mapping[str, str | None]:
    return {name: source for name, source in found.items() if name.startswith(tuple(blocks(model)))}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_any_factors_are_exact(name: str, attention: str) -> None:
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no sdpa")
    model = build(name, attention)
    assert expected(name, model) == of_blocks(model, assert_exact(model, IDS, tolerance=1e-5))
    # Gemma's norm computes in float32 in any case.
    model = build(name, attention).double()
    tolerance = 1e-6 if name.startswith("gemma") else 1e-12
    assert expected(name, model) == of_blocks(model, assert_exact(model, IDS, tolerance=tolerance))


def generated(model: Any, cache: bool) -> Tensor:
    """Logits of a prompt and of the tokens after it, one at a time if there is a cache."""
    with torch.no_grad():
        if not cache:
            return model(IDS, use_cache=False).logits
        state = model(IDS[:, :4], use_cache=True)
        logits = [state.logits]
        for position in range(4, IDS.size(1)):
            past = {"past_key_values": state.past_key_values}
            state = model(IDS[:, position : position + 1], use_cache=True, **past)
            logits.append(state.logits)
        return torch.cat(logits, 1)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma", "opt", "deepseek"])
def test_smoothing_is_exact(name: str, attention: str, cache: bool) -> None:
    model = build(name, attention)
    before = generated(model, cache)
    act = get_act_scales(model, [IDS])
    done = smooth(model, act, {"input_ids": IDS[:, :5], "use_cache": cache})
    assert len(done.smoothed) >= 2 * len(set(MODELS[name][2].values()))
    after = generated(model, cache)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_outliers_of_llama_shrink() -> None:
    model = build("llama")
    with torch.no_grad():
        for block in blocks(model).values():
            block.input_layernorm.weight[[3, 9]] *= 200
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                layer.weight[:, [3, 9]] /= 200
    name = "model.layers.1.self_attn.k_proj"
    before = get_act_scales(model, [IDS])
    smooth(model, before, IDS)
    after = get_act_scales(model, [IDS])
    assert before[name].max() > 50 * before[name].median()
    assert after[name].max() < 5 * after[name].median()


@pytest.mark.parametrize("name", MODELS)
def test_one_block_alone_gives_the_same_groups(name: str) -> None:
    model = build(name)
    path, block = list(blocks(model).items())[1]
    calls: list[tuple[Any, Any]] = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    own = {f"{path}.{layer}": linear for layer, linear in linears(block).items()}
    args, kwargs = calls[0]
    found = producers(find_groups(block, trace(block, args, kwargs), own, model=model))
    assert found == {layer: source for layer, source in expected(name, model).items() if layer in own}


def test_the_reasons_for_what_cannot_be_folded() -> None:
    reasons = {name: g.reason for g in groups_of(build("gpt_neox"), IDS) for name in g.consumers}
    assert reasons["gpt_neox.layers.0.mlp.dense_4h_to_h"] == (
        "nothing multiplies its input by a parameter for each channel; "
        "it comes from aten.gelu in gpt_neox.layers.0.mlp.act"
    )
    reasons = {name: g.reason for g in groups_of(build("gemma"), IDS) for name in g.consumers}
    assert reasons["lm_head"] == "lm_head shares a parameter with model.embed_tokens.weight"


def test_experts_and_their_router_keep_the_norm() -> None:
    torch.manual_seed(0)
    routing = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    config = transformers.DeepseekV3Config(
        **{**SIZES, **MLA, **routing, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    reasons = {name: g.reason for g in groups_of(model, IDS) for name in g.consumers}
    shared = "model.layers.1.mlp.shared_experts"
    assert reasons[f"{shared}.gate_proj"] == (
        "the output of model.layers.1.post_attention_layernorm also goes into "
        "aten.mm in model.layers.1.mlp.gate"
    )
    assert reasons[f"{shared}.down_proj"] == reasons["model.layers.1.self_attn.kv_b_proj"] == ""
    assert_exact(copy.deepcopy(model), IDS, tolerance=1e-4)
