"""The algorithms: from weights and statistics of their input to quantized weights, one file each.

Importing this package fills the registry :data:`ALGORITHMS`.
"""

from __future__ import annotations

from npu_fusion._rooms import import_modules
from npu_fusion.quantization.algorithms._base import ALGORITHMS

__all__ = ["ALGORITHMS"]

import_modules(__name__)
