"""quantile: AMCT's name for a calibrated hifloat8 input, ``scale = max|x| / 16``.

AMCT follows max|x| by a moving average over batches (0.99 of the old, 0.01 of the new value), which depends
on the order of the batches and starts from the first of them. Here it is the maximum over all calibration
data, as for ``minmax``. hifloat8 loses little by it, for its numbers get coarser only towards the ends of
its range. Weights: ``max|w| / 16``, likewise (AMCT takes the signed maximum of the weight here).
"""

from __future__ import annotations

from npu_fusion.quantization.algorithms._base import algorithm
from npu_fusion.quantization.algorithms.minmax import MinMax


@algorithm
class Quantile(MinMax):
    name = "quantile"
