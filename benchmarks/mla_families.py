"""Which of transformers' models with multi-head latent attention are absorbed, and fused with mla_prolog.

::

    python -m benchmarks.mla_families                            a table of all of them
    python -m benchmarks.mla_families minicpm3 youtu             of some
    python -m benchmarks.mla_families --update docs/fusions.md   put the table into the document

Each model is small and random, with one layer of this attention (two where a layer has two). The prompt goes
through it in eager mode into a ``StaticCache``; then tokens are decoded one by one, in eager mode and
compiled with ``numerics="relaxed"`` on copies of the same cache. The script fails where they differ. The
column "prepared" is the same after ``npu_fusion.prepare(model)``.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import npu_fusion
from npu_fusion.report import merged

ABSORB, PROLOG = "mla_absorb", "npu_mla_prolog_v3_functional"
BREAK = "a graph break between the expansion and the attention"
VOCABULARY, PROMPT, DECODED = 64, 5, 4

SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense"],
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_topk": 4,
    "index_kpool": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "dim_model_base": 32,
    "hc_mult": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
"""A field that a model's configuration does not have is left out."""

_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """One model of transformers."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    """What its configuration has otherwise than :data:`SMALL`."""
    vision: Mapping[str, Any] | None = None
    """Of a model that takes images, too."""
    attention: str = "sdpa"
    layers: int = 1


_HYBRID = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense"] * 2,
}

FAMILIES: dict[str, Family] = {
    "axk1": Family(),
    "axk2": Family(),
    "bailing_hybrid": Family(_HYBRID),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "deepseek_v32": Family(),
    "dots3_note": Family(),
    "glm4_moe_lite": Family(),
    "glm5_next": Family({**_HYBRID, "qk_rope_head_dim": 0, "head_dim": 0}, _VISION),
    "glm_moe_dsa": Family(),
    "hy_v4": Family(attention="eager"),
    "kimi_linear": Family(_HYBRID),
    "longcat_flash": Family(layers=2),
    "minicpm3": Family(),
    "mistral4": Family(),
    "mistral_large4": Family(vision={**_VISION, "model_type": "pixtral"}),
    "youtu": Family(),
}
"""Every model of transformers 5.24 whose keys and values come from a ``kv_b_proj``."""


@dataclass(frozen=True)
class Row:
    family: str
    layers: int
    absorbed: int
    prolog: int
    reason: str
    """Why not, where a layer was not absorbed, or else its prolog not fused."""
    same: bool
    """Are the tokens those of eager mode?"""
    prepared: int | None = None
    """Prologs fused in the prepared model."""


def make(name: str) -> Any:
    """The model, small and random."""
    family = FAMILIES[name]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kind = "ForCausalLM" if family.vision is None else "ForConditionalGeneration"
    (cls,) = (
        c
        for n, c in vars(module).items()
        if n.endswith(kind) and inspect.isclass(c) and c.__module__ == module.__name__
    )
    settings: dict[str, Any] = {**SMALL, **family.changes}
    config = cls.config_class
    if family.vision is None:
        given = known(config, settings)
    else:
        given = {
            "text_config": known(config.sub_configs["text_config"], settings),
            "vision_config": family.vision,
        }
    torch.manual_seed(0)
    model = cls(config(**given)).eval()
    model.set_attn_implementation(family.attention)
    return randomized(model)


def randomized(model: Any) -> Any:
    """With weights larger than a fresh model's, so that tokens are told apart."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    return model


def known(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that are fields of the configuration."""
    fields = {name for cls in config.__mro__ for name in getattr(cls, "__annotations__", {})}
    return {name: value for name, value in settings.items() if name in fields}


def decoded(step: Any, token: Tensor, cache: Any) -> Tensor:
    """Greedy tokens after ``token``, one by one."""
    tokens = []
    for _ in range(DECODED):
        token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, -1)


def measure(name: str, *, prepared: bool = False) -> Row:
    """Decode with and without the passes; ``prepared``: after ``prepare``."""
    model = make(name)
    if prepared:
        npu_fusion.prepare(model)
    text = model.config.get_text_config()
    prompt = torch.randint(2, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = transformers.StaticCache(config=text, max_cache_len=PROMPT + DECODED)
    torch._dynamo.reset()
    config = {"strict": True, "numerics": "relaxed"}
    backend = npu_fusion.get_npu_backend(fusion_config=config, host="eager")
    with torch.no_grad():
        token = model(input_ids=prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        expected = decoded(model, token, copy.deepcopy(cache))
        result = decoded(torch.compile(model, backend=backend, dynamic=True), token, copy.deepcopy(cache))
    report = merged(backend.reports)
    layers, absorbed, prolog = FAMILIES[name].layers, report.fused.get(ABSORB, 0), report.fused.get(PROLOG, 0)
    reason = ""
    if absorbed < layers or prolog < layers:
        missing = ABSORB if absorbed < layers else "mla_prolog"
        reasons = [f"`{reason}`" for _, reason in report.refusals(missing)]
        reason = reasons[0] if reasons else BREAK if absorbed < layers and len(backend.reports) > 1 else ""
    return Row(name, layers, absorbed, prolog, reason, torch.equal(result, expected))


def both(name: str) -> Row:
    """The model as it is, and prepared."""
    plain, after = measure(name), measure(name, prepared=True)
    return replace(plain, prepared=after.prolog, same=plain.same and after.same)


def markdown(rows: Sequence[Row]) -> str:
    headings = ("model", "layers", "absorbed", "prolog fused", "prepared", "otherwise because")
    cells = [(r.family, r.layers, r.absorbed, r.prolog, r.prepared, r.reason) for r in rows]
    lines: list[Sequence[Any]] = [headings, ["---"] * len(headings), *cells]
    return "\n".join("|" + "|".join(f" {c} " if c != "" else " " for c in line) + "|" for line in lines)


def update(document: str, rows: Sequence[Row]) -> str:
    """``document`` with the table between its markers."""
    begin, end = "<!-- mla families -->", "<!-- end -->"
    marked = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if marked.search(document) is None:
        raise ValueError(f"the document has no {begin!r} ... {end!r}")
    content = f"{begin}\n{markdown(rows)}\n{end}"
    return marked.sub(lambda _: content, document)


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mla_families", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "families", nargs="*", metavar="MODEL", help=f"one of {', '.join(FAMILIES)}; default: all"
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="replace the marked table of this document"
    )
    arguments = parser.parse_args(argv)
    for name in arguments.families:
        if name not in FAMILIES:
            parser.error(f"MODEL is {name!r}; accepted: {', '.join(FAMILIES)}")
    if arguments.update is not None and arguments.families:
        parser.error("--update writes the table of all models; accepted: no MODEL")
    rows = [both(name) for name in arguments.families or FAMILIES]
    different = [row.family for row in rows if not row.same]
    if different:
        raise RuntimeError(f"other tokens than in eager mode: {', '.join(different)}")
    print(markdown(rows))
    if arguments.update is not None:
        document = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(update(document, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
