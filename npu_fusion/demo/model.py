"""The demo's model: a small byte-level Llama (see ``examples/train_byte_llama.py``), its loss and its text.

The vocabulary is the 256 bytes, so no tokenizer is needed and a loss in nats is a loss per byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CHECKPOINT = Path(__file__).with_name("byte_llama.safetensors")

# Called with token ids [1, S] (int64) and returns something whose ``logits`` are [1, S, 256]: the model of
# load_byte_llama, or what torch.compile made of it.
ByteModel = Callable[[torch.Tensor], Any]


def new_byte_llama(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build a Llama with random weights from the keyword arguments of ``transformers.LlamaConfig``.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoModelForCausalLM, LlamaConfig
    except ImportError as error:
        raise ImportError("the demo's model needs transformers: pip install npu-fusion[demo]") from error
    return AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=dtype, attn_implementation="sdpa")


def facts(checkpoint: Path = CHECKPOINT) -> dict[str, Any]:
    """Return what is known of a checkpoint: ``config`` (of the model), ``training`` (how it was made)."""
    return json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))


def context_length(checkpoint: Path = CHECKPOINT) -> int:
    """Return the number of bytes the model of a checkpoint was trained to look at."""
    return facts(checkpoint)["config"]["max_position_embeddings"]


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint into a model of its configuration.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import load_model
    except ImportError as error:
        raise ImportError("the demo's checkpoint needs safetensors: pip install npu-fusion[demo]") from error
    load_model(model, checkpoint)


def load_byte_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Load the trained byte-level Llama that comes with the package, in evaluation mode.

    Raises:
        ImportError: transformers or safetensors is not installed.
    """
    model = new_byte_llama(facts()["config"], dtype)
    load_weights(model, CHECKPOINT)
    return model.eval()


@torch.no_grad()
def evaluate_loss(model: ByteModel, data: bytes, context: int | None = None) -> float:
    """Return the mean cross entropy of ``data`` under the model, in nats per byte.

    The text is cut into windows of ``context`` bytes (default: :func:`context_length`). Each byte but the
    first of the text is predicted exactly once, from the bytes of its window before it; the last window may
    be shorter. A model that knows nothing has ln 256 = 5.545.

    Raises:
        ValueError: ``data`` has fewer than two bytes, or ``context`` is less than one.
    """
    if context is None:
        context = context_length()
    if context < 1:
        raise ValueError(f"evaluate_loss: context must be at least 1, got {context}")
    if len(data) < 2:
        raise ValueError(f"evaluate_loss: data must have at least 2 bytes to predict one, got {len(data)}")
    losses = []
    for start in range(0, len(data) - 1, context):
        window = data[start : start + context + 1]
        # A tensor of its own, as in generate, and not a slice: torch.compile guards on views and would
        # compile again.
        logits = model(_tokens(window[:-1])).logits[0].double()
        losses.append(
            torch.nn.functional.cross_entropy(logits, _tokens(window[1:])[0], reduction="sum").item()
        )
    return math.fsum(losses) / (len(data) - 1)


@torch.no_grad()
def generate(
    model: ByteModel,
    prompt: bytes,
    n: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    context: int | None = None,
    on_byte: Callable[[int], None] | None = None,
) -> bytes:
    """Continue ``prompt`` by ``n`` bytes and return the continuation, without the prompt.

    The model is run again on the whole text for every byte (no KV cache), so the sequence grows by one each
    time until it reaches ``context`` bytes (default: :func:`context_length`); from there on the model sees
    the last ``context``.

    Args:
        temperature: 0 takes the likeliest byte; above 0 draws from softmax(logits / temperature).
        seed: of the draws.
        on_byte: called with each new byte as soon as it is known.

    Raises:
        ValueError: ``prompt`` is empty, ``n`` or ``temperature`` negative, or ``context`` less than one.
    """
    if context is None:
        context = context_length()
    if not prompt:
        raise ValueError("generate: prompt must have at least 1 byte, got 0")
    if n < 0 or temperature < 0 or context < 1:
        raise ValueError(
            f"generate: n and temperature must be at least 0 and context at least 1, "
            f"got n={n}, temperature={temperature}, context={context}"
        )
    generator = torch.Generator().manual_seed(seed)
    text = bytearray(prompt)
    for _ in range(n):
        logits = model(_tokens(bytes(text[-context:]))).logits[0, -1].float().cpu()
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            byte = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        text.append(byte)
        if on_byte is not None:
            on_byte(byte)
    return bytes(text[len(prompt) :])


def _tokens(data: bytes) -> torch.Tensor:
    return torch.tensor([list(data)], dtype=torch.int64)
