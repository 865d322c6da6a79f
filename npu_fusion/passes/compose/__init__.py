"""Large operators: what several small ones are together. One file per fusion."""

from __future__ import annotations

from npu_fusion._rooms import import_modules

import_modules(__name__)
