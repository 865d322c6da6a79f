"""How large the inputs of the linear layers get, channel by channel: what smoothing is computed from.

::

    scales[k] = max over all tokens of all batches of |x[..., k]|

Source: SmoothQuant (arXiv:2211.10438), section 4.1; the name is that of its code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from npu_fusion.quantization._progress import progress as progress_bar
from npu_fusion.quantization.smoothing._running import arguments, evaluating


def get_act_scales(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_samples: int | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Run ``model`` on ``batches`` and return how large the inputs of its linear layers get, by channel.

    The model runs in evaluation mode and without gradients. Nothing is changed: modes and hooks are
    afterwards what they were, also if a forward raises.

    Args:
        model: any module with ``nn.Linear`` layers (subclasses count).
        batches: what the model is called with: a tensor is its only argument, a tuple or list its positional
            arguments, a mapping its keyword arguments.
        num_samples: at most so many of ``batches`` are used. None: all.
        progress: show a bar; None: if stderr is a terminal and rich is installed.

    Returns:
        Name of the layer -> fp32 [in_features] on the CPU. A layer under several names is there under each;
        one that was never called, or only with no rows, is not.

    Raises:
        TypeError: ``model`` is no module, or a batch is something else.
        ValueError: ``num_samples`` is not positive, or there are no batches.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"get_act_scales: model must be a torch.nn.Module, got {type(model).__name__}")
    if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, int)):
        raise TypeError(f"get_act_scales: num_samples must be an int, got {type(num_samples).__name__}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"get_act_scales: num_samples is {num_samples}; accepted: 1 or more, or None")
    total = len(batches) if isinstance(batches, Sized) else None
    if num_samples is not None:
        total = num_samples if total is None else min(total, num_samples)
    largest: dict[nn.Module, Tensor] = {}
    empty = True
    with (
        evaluating(model),
        _watching(model, largest),
        progress_bar(total, "activations", progress) as advance,
    ):
        for batch in islice(batches, num_samples):
            empty = False
            args, kwargs = arguments("get_act_scales: a batch", batch)
            model(*args, **kwargs)
            advance()
    if empty:
        raise ValueError("get_act_scales: batches is empty; accepted: at least one batch")
    layers = model.named_modules(remove_duplicate=False)
    return {name: largest[layer].cpu() for name, layer in layers if layer in largest}


@contextmanager
def _watching(model: nn.Module, largest: dict[nn.Module, Tensor]) -> Iterator[None]:
    def update(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        # Of a tensor in 16 bits the maximum is exact before the conversion, and the copy is small.
        peak = x.detach().abs().reshape(-1, x.size(-1)).amax(0).float()
        largest[layer] = torch.maximum(largest[layer], peak) if layer in largest else peak

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_pre_hook(update, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
