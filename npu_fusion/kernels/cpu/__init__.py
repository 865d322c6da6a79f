"""Compiled CPU kernels: what :mod:`npu_fusion.kernels.reference` computes, at the machine's speed.

``src/<family>.cpp`` holds a family's loops, ``<family>.py`` decides which calls they take; all others, and
machines without a compiled library, run the reference kernels.
"""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
