"""The demos' models and text: everything that happens before ``torch.compile``."""

from __future__ import annotations

from npu_fusion.demo.corpus import evaluation_text, training_text
from npu_fusion.demo.mla_model import load_byte_mla
from npu_fusion.demo.model import context_length, evaluate_loss, facts, generate, load_byte_llama

__all__ = [
    "context_length",
    "evaluate_loss",
    "evaluation_text",
    "facts",
    "generate",
    "load_byte_llama",
    "load_byte_mla",
    "training_text",
]
