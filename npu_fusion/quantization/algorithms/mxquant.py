"""mxquant: what AMCT calls rounding to nearest for the mx types.

Blocks of 32 neighbours share a power of two (:func:`npu_fusion.formats.mx.shared_exponent`). That of the
input is found at run time, so nothing is calibrated.
"""

from __future__ import annotations

from npu_fusion.quantization.algorithms._base import algorithm
from npu_fusion.quantization.algorithms.minmax import MinMax


@algorithm
class MXQuant(MinMax):
    name = "mxquant"
