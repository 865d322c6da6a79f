"""SmoothQuant as a library: outliers move from activations into weights, and the model computes the same.

::

    scales = get_act_scales(model, batches)
    print(smooth(model, scales, batches[0], alpha=0.5))

The parts are for quantizers: :func:`trace` records a forward, :func:`find_groups` says which layers read one
tensor and which :class:`Producer` can absorb a factor for each of its channels.

Source: arXiv:2211.10438.
"""

from __future__ import annotations

from npu_fusion.quantization.smoothing.act_scales import get_act_scales
from npu_fusion.quantization.smoothing.dataflow import Dataflow, trace
from npu_fusion.quantization.smoothing.groups import Group, find_groups
from npu_fusion.quantization.smoothing.producer import Producer, power_of_two
from npu_fusion.quantization.smoothing.smooth import SmoothedGroup, Smoothing, smooth

__all__ = [
    "Dataflow",
    "Group",
    "Producer",
    "SmoothedGroup",
    "Smoothing",
    "find_groups",
    "get_act_scales",
    "power_of_two",
    "smooth",
    "trace",
]
