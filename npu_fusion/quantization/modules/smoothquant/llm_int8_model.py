"""LLM.int8() for all linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from npu_fusion.quantization.modules._replace import replace_linears
from npu_fusion.quantization.modules.smoothquant.llm_int8_linear import THRESHOLD, LLMInt8Linear


def split_outliers(
    model: nn.Module,
    act_scales: Mapping[str, Tensor],
    threshold: float = THRESHOLD,
    skip: Iterable[str] = ("lm_head",),
) -> list[str]:
    """Replace each ``torch.nn.Linear`` in ``model`` by its :class:`LLMInt8Linear`, in place.

    Subclasses of Linear are left alone. A layer that is used under several names stays one layer.

    Args:
        act_scales: the largest magnitude of each input channel of each layer, as
            :func:`npu_fusion.quantization.smoothing.get_act_scales` gives it.
        threshold: positive; channels that reach it are outliers.
        skip: layers to leave in float: full names or their last parts, wildcards as in file names.

    Returns:
        The full names of the replaced layers.

    Raises:
        TypeError: ``skip`` is a single string.
        ValueError: ``model`` is itself a Linear; ``act_scales`` lacks a layer (one that never ran); or see
            :meth:`LLMInt8Linear.from_float`. Nothing is replaced then.
    """

    def make(names: list[str], linear: nn.Linear) -> nn.Module:
        known = next((name for name in names if name in act_scales), None)
        if known is None:
            raise ValueError("act_scales has no entry for it; accepted: one for each layer that skip leaves")
        return LLMInt8Linear.from_float(linear, act_scales=act_scales[known], threshold=threshold)

    return replace_linears("split_outliers", model, make, skip)
