"""All calls of the grid."""

from __future__ import annotations

from tests.ascend import _inputs_cache, _inputs_mla, _inputs_norm, _inputs_quant, _inputs_swiglu
from tests.ascend._inputs import Case

CASES: list[Case] = [
    case
    for family in (_inputs_norm, _inputs_swiglu, _inputs_quant, _inputs_cache, _inputs_mla)
    for case in family.CASES
]
