"""Rules that map operators to canonical terms, one file per rule group: :mod:`npu_fusion.passes.terms`."""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
