"""Every accepted call of the grid on CPU tensors: ``python -m tests.ascend._on_cpu FILE`` saves the results.

Run where torch_npu has not been imported, the operators are those of this package alone; the test that starts
it compares with the same calls beside torch_npu.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import npu_fusion  # noqa: F401  (registers the operators)
from npu_fusion.meta_impls._registry import OPERATORS
from tests.ascend._inputs import Case
from tests.ascend._inputs_families import CASES


def results() -> dict[str, Any]:
    """For each call the outputs and the arguments that it wrote, or the text of its error."""
    return {f"{case.operator}: {case.label}": _result(case) for case in CASES if case.accepted}


def _result(case: Case) -> Any:
    seed = zlib.crc32(f"{case.operator}: {case.label}".encode())
    generator = torch.Generator().manual_seed(seed)
    given = {
        name: _values(name, value, generator) if isinstance(value, Tensor) else value
        for name, value in case.arguments.items()
    }
    args, kwargs = Case(case.operator, case.label, given, True).call()
    try:
        outputs = OPERATORS[case.operator].overload(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return [t for t in pytree.tree_leaves((outputs, args, kwargs)) if isinstance(t, Tensor)]


def _values(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers with the layout of ``like``; for indices and counts 0, 1, 1, .., which are valid."""
    data = torch.randn(like.shape, generator=generator)
    if like.dtype in (torch.int32, torch.int64) and name not in ("x", "input", "bias", "weight"):
        data = torch.arange(like.numel()).clamp(max=1).reshape(like.shape)
    elif like.dtype == torch.float8_e8m0fnu:
        data = data.abs()
    elif not like.dtype.is_floating_point:
        data = data * 50
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(data.to(like.dtype))


if __name__ == "__main__":
    torch.save(results(), Path(sys.argv[1]))
    assert "torch_npu" not in sys.modules, "this process is the one without torch_npu"
