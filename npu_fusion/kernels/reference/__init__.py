"""Exact, readable PyTorch kernels: the executable specification of every operator, run on the CPU."""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
