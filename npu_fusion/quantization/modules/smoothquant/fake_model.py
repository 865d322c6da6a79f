"""Fake quantization of all linear layers of a model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from npu_fusion.quantization.modules._replace import matches, patterns, replace_linears
from npu_fusion.quantization.modules.smoothquant.fake_linear import W8A8Linear


def quantize_model(
    model: nn.Module,
    weight_quant: str = "per_channel",
    act_quant: str = "per_token",
    quantize_bmm_input: Iterable[str] = (),
    skip: Iterable[str] = ("lm_head",),
) -> list[str]:
    """Replace each ``torch.nn.Linear`` in ``model`` by its :class:`W8A8Linear`, in place.

    Subclasses of Linear are left alone. A layer that is used under several names stays one layer.

    Args:
        weight_quant: ``"per_channel"`` or ``"per_tensor"``.
        act_quant: ``"per_token"`` or ``"per_tensor"``.
        quantize_bmm_input: names of the layers whose results are quantized, too: those that feed the batched
            products of attention (``("q_proj", "k_proj", "v_proj")``).
        skip: names of the layers to leave in float.

    A name is a full one (``model.layers.0.mlp.down_proj``) or its last parts (``down_proj``), and may have
    the wildcards of file names (``layers.*.mlp.*``).

    Returns:
        The full names of the replaced layers.

    Raises:
        TypeError: ``skip`` or ``quantize_bmm_input`` is a single string.
        ValueError: ``model`` is itself a Linear; a name in ``quantize_bmm_input`` is none of a replaced
            layer; or see :meth:`W8A8Linear.from_float`. Nothing is replaced then.
    """
    who = "quantize_model"
    wanted = patterns(who, "quantize_bmm_input", quantize_bmm_input)
    unused = set(wanted)

    def make(names: list[str], linear: nn.Linear) -> nn.Module:
        found = [p for p in wanted if any(matches(name, p) for name in names)]
        unused.difference_update(found)
        return W8A8Linear.from_float(linear, weight_quant, act_quant, quantize_output=bool(found))

    def check() -> None:
        if unused:
            raise ValueError(
                f"{who}: quantize_bmm_input has {min(unused)!r}; accepted: names of layers that are quantized"
            )

    return replace_linears(who, model, make, skip, check)
