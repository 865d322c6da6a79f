"""Small operators: aten subgraphs that are one NPU operator each. One file per fusion."""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
