"""A small byte-level decoder with multi-head latent attention, in plain PyTorch.

``examples/train_byte_mla.py`` trained it. It computes what transformers (5.15 and later) computes for
DeepSeek-V3 with dense layers, and its layers have the same names: queries come from a low rank, a latent and
one rotary key for all heads are cached, keys and values are expanded from the cache at every step.

Letters: B sequences, S new tokens, L places in the cache, N heads, Dr the size of the rotary key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npu_fusion.demo.model import facts, load_weights

CHECKPOINT = Path(__file__).with_name("byte_mla.safetensors")


@dataclass(frozen=True)
class MlaConfig:
    """Sizes, under the names of transformers' ``DeepseekV3Config``."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    max_position_embeddings: int = 256
    vocab_size: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class Cache(NamedTuple):
    """What one layer keeps of the tokens before, written in place."""

    latent: Tensor
    """[B, 1, L, kv_lora_rank]"""
    rotary: Tensor
    """[B, 1, L, qk_rope_head_dim]"""


class Output(NamedTuple):
    logits: Tensor
    """[B, S, vocab_size]"""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn neighbours x[2i], x[2i + 1]; the result has all first numbers, then all second ones.

    q [B, N, S, Dr], k [B, 1, S, Dr]; cos and sin [B, S, Dr], whose two halves are equal.
    """
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    q1, q2, k1, k2 = q[..., 0::2], q[..., 1::2], k[..., 0::2], k[..., 1::2]
    turned_q = torch.cat((q1 * cos - q2 * sin, q2 * cos + q1 * sin), dim=-1)
    turned_k = torch.cat((k1 * cos - k2 * sin, k2 * cos + k1 * sin), dim=-1)
    return turned_q, turned_k


class Attention(nn.Module):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.num_heads, self.v_head_dim = config.num_attention_heads, config.v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        hidden, heads, eps = config.hidden_size, self.num_heads, config.rms_norm_eps
        nope, rope, value = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, heads * (nope + value), bias=False)
        self.o_proj = nn.Linear(heads * value, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(batch, length, self.num_heads, -1).transpose(1, 2)
        q_pass, q_rot = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

        latent, k_rot = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, length, self.kv_lora_rank)
        k_rot = k_rot.view(batch, 1, length, self.qk_rope_head_dim)
        q_rot, k_rot = apply_rotary(q_rot, k_rot, cos, sin)
        if cache is not None:
            latent, k_rot = self.cached(cache, positions, latent, k_rot)

        expanded = self.kv_b_proj(latent)
        expanded = expanded.view(batch, -1, self.num_heads, self.qk_nope_head_dim + self.v_head_dim)
        k_pass, value = expanded.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        query = torch.cat((q_pass, q_rot), dim=-1)
        key = torch.cat((k_pass, k_rot.expand(-1, self.num_heads, -1, -1)), dim=-1)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))

    def cached(self, cache: Cache, positions: Tensor, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new rows [B, 1, S, ...] to their places and return all rows [B, 1, L, ...]."""
        cache.latent.index_copy_(2, positions, latent)
        cache.rotary.index_copy_(2, positions, k_rot)
        return cache.latent, cache.rotary


class MLP(nn.Module):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *of_attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *of_attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class ByteMla(nn.Module):
    """The decoder. ``lm_head`` and ``embed_tokens`` are one weight."""

    def __init__(self, config: MlaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def new_caches(self, batch: int) -> list[Cache]:
        """Caches for ``batch`` sequences of ``max_position_embeddings`` tokens, one for each layer."""
        weight, config = self.embed_tokens.weight, self.config
        places = (batch, 1, config.max_position_embeddings)
        return [
            Cache(
                weight.new_zeros(*places, config.kv_lora_rank),
                weight.new_zeros(*places, config.qk_rope_head_dim),
            )
            for _ in self.layers
        ]

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, caches: Sequence[Cache] | None = None
    ) -> Output:
        """Logits of what follows each of ``tokens`` [B, S].

        Without ``caches`` the tokens are the first ones. With caches ``positions`` [S] says where in the
        sequences they are, and the tokens before them are read from the caches.
        """
        mask = None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if caches is not None:
            places = self.config.max_position_embeddings
            mask = torch.arange(places, device=tokens.device) <= positions.unsqueeze(-1)
        x = self.embed_tokens(tokens)
        cos, sin = self._angles(positions, x)
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, positions, None if caches is None else caches[number], mask)
        return Output(self.lm_head(self.norm(x)))

    def _angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [B, S, Dr] in the dtype of ``x``, computed in float32."""
        width = self.config.qk_rope_head_dim
        exponents = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        angles = positions.float().unsqueeze(-1) * self.config.rope_theta**-exponents
        angles = torch.cat((angles, angles), dim=-1).expand(x.shape[0], -1, -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def new_byte_mla(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> ByteMla:
    """A decoder with random weights, of the sizes that are fields of :class:`MlaConfig`."""
    return ByteMla(MlaConfig(**config)).to(dtype)


def load_byte_mla(dtype: torch.dtype = torch.float32) -> ByteMla:
    """Load the trained decoder that comes with the package, in evaluation mode.

    Raises:
        ImportError: safetensors is not installed.
    """
    model = new_byte_mla(facts(CHECKPOINT)["config"], dtype)
    load_weights(model, CHECKPOINT)
    return model.eval()
