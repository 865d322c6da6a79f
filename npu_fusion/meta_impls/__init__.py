"""Schemas (as torch_npu 2.13.0 has them) and fake implementations, one file per operator family."""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
