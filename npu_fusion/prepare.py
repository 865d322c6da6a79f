"""What a model's weights need once, before it is compiled, so that its graphs can be fused.

Weights are inputs of the graphs that a compiler sees: laying them out there would be done again at every
step. ``_prepare_swiglu`` says what is done for a SwiGLU, ``_prepare_mla`` for multi-head latent attention.
Both keep the keys of the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from npu_fusion import _prepare_mla, _prepare_swiglu
from npu_fusion._mergeable import mergeable
from npu_fusion._prepare_checks import Sharing
from npu_fusion._prepare_result import Merged, Preparation, Prepared, Rearranged, Skipped
from npu_fusion.config import FusionConfig

__all__ = ["Merged", "Preparation", "Prepared", "Rearranged", "Skipped", "mergeable", "prepare"]


def prepare(model: nn.Module, fusion_config: FusionConfig | Mapping[str, Any] | None = None) -> Prepared:
    """Prepare the weights of ``model`` for the fusions, in place and once; a second call finds nothing to do.

    Call it after the model is on its device, and quantized, but before it is compiled, sharded, or given to
    an optimizer. The projections give the same values: bit by bit for ``W8A8DynamicLinear``, up to the order
    in which the backend's matmul adds for ``torch.nn.Linear``. Run eagerly, the activation reads one half
    of each row, for which PyTorch's CPU kernel may round silu otherwise than for a tensor of its own.

    A module with a merged layer keeps its object, class, hooks and ``state_dict`` keys: it saves as, and
    loads from, checkpoints of the model as it was. Its ``parameters()`` are the merged ones. It can be copied
    with ``copy.deepcopy`` and pickled. Its forward becomes that of a ``torch.fx`` trace, in which what it
    read from Python attributes (not children, parameters and buffers) is fixed.

    Multi-head latent attention keeps its forward. Its projections become layers of another class under the
    same names, with the same keys, values and ``weight``; ``parameters()`` are the rearranged ones. What such
    a layer's ``weight`` and ``state_dict`` give may be a copy: load into the model, do not write there. Run
    eagerly, ``kv_b_proj`` puts its weight together at every call; in a fused graph that disappears.

    While a module is prepared, the memory of its largest new weight is needed once more. If that fails, what
    was prepared before stays so, all else is as it was, and the model works; any other error comes before the
    first change.

    Args:
        fusion_config: a :class:`FusionConfig` or a dict of its fields. With ``dry_run`` nothing is changed;
            without any of the fusions ``swiglu``, ``swiglu_quant`` and ``dequant_swiglu_quant`` nothing is
            merged, without ``mla_prolog`` no attention is rearranged.

    Returns:
        What was done, and for each module that looks like a SwiGLU or a latent attention why it was left.

    Raises:
        TypeError: ``model`` is not a module, or ``fusion_config`` of another type.
        ValueError: ``fusion_config`` has an unknown key or value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model is a {type(model).__name__}; accepted: torch.nn.Module")
    config = FusionConfig.make(fusion_config)
    sharing = Sharing(model)
    gated, not_gated = _prepare_swiglu.plan(model, config, sharing)
    latent, not_latent = _prepare_mla.plan(model, config, sharing)
    del sharing  # it holds every tensor of the model, and what is replaced is to be freed at once
    if not config.dry_run:
        for swiglu in gated:
            swiglu.carry_out()
        for attention in latent:
            attention.carry_out()
    merged = tuple(pair for swiglu in gated for pair in swiglu.done)
    rearranged = tuple(attention.done for attention in latent)
    return Prepared(merged, (*not_gated, *not_latent), config.dry_run, rearranged)
