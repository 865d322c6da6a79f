"""The process that imports the real torch_npu for ``lower``: reads a request, writes an answer.

Both are JSON: the request is the only argument, the answer is ``lowering.json`` in the folder that it names.
"""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import npu_fusion
from npu_fusion._cli_model import UsageError, make_model
from npu_fusion.hosts import _torchair_api
from npu_fusion.hosts.offline._lower import RESULT
from npu_fusion.passes.pattern import users_line
from npu_fusion.passes.pipeline import readable

_GE_OPERATOR = re.compile(r'^    op: "([^"]+)"$', re.MULTILINE)
_NODE = re.compile(r"While executing (%\S+) : .*?target=([\w.]+)")


class Failed(Exception):
    """The model cannot be run or lowered."""


def main() -> None:
    request = json.loads(sys.argv[1])
    folder = Path(request["out"])
    try:
        answer = _lower(request, folder)
    except UsageError as error:
        answer = {"error": str(error), "lowering": False}
    except Failed as error:
        answer = {"error": str(error), "lowering": True}
    (folder / RESULT).write_text(json.dumps(answer, indent=2), encoding="utf-8")


def _lower(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    torch_npu: Any = sys.modules["torch_npu"]
    model, args, kwargs = make_model(request["factory"])
    with torch.no_grad():
        expected = _run(
            model, args, kwargs, lambda error: f"the model itself fails, in eager: {_brief(error)}"
        )
        compiled, backend = _compiled(model, request)
        result = _run(compiled, args, kwargs, _explained)
    difference, largest = _compare(expected, result)
    return {
        "torch_npu": torch_npu.__version__,
        "soc": torch_npu.npu.get_device_name(),
        "mode": request["mode"],
        "graphs": [_graph(folder / Path(report.dump_dir or "").name) for report in backend.reports],
        "difference": difference,
        "largest": largest,
    }


def _compiled(model: Any, request: Mapping[str, Any]) -> tuple[Any, npu_fusion.NpuBackend]:
    package = "npugraph_ex" if request["mode"] == "npugraph_ex" else "torchair"
    settings = _torchair_api.load(package).CompilerConfig()
    if package == "torchair":
        settings.mode = request["mode"]
    backend = npu_fusion.get_npu_backend(settings, request["config"])

    def keep_final(gm: fx.GraphModule, inputs: Any, config: Any) -> None:
        last = Path(backend.reports[-1].dump_dir or request["out"])
        (last / "final.py").write_text(readable(gm.graph), encoding="utf-8")

    settings.post_grad_custom_post_pass = keep_final
    return torch.compile(model, backend=backend, dynamic=request["dynamic"]), backend


def _run(model: Any, args: Any, kwargs: Any, explain: Callable[[Exception], str]) -> list[Any]:
    """Outputs of a call and the inputs after it; ``args`` and the state of the model are left as they are."""
    args, kwargs = copy.deepcopy((args, kwargs))
    module = getattr(model, "_orig_mod", model)
    state = dict(module.named_buffers()) if isinstance(module, torch.nn.Module) else {}
    before = {name: buffer.clone() for name, buffer in state.items()}
    try:
        outputs = model(*args, **kwargs)
    except Exception as error:
        raise Failed(explain(error)) from error
    after = pytree.tree_leaves((outputs, args, kwargs, list(state.values())))
    seen = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in after]
    for name, buffer in state.items():
        buffer.copy_(before[name])
    return seen


def _compare(expected: list[Any], result: list[Any]) -> tuple[float, float]:
    """Largest difference, and the largest value. NaN equals NaN; infinities must be equal."""
    difference = largest = 0.0
    if len(expected) != len(result):
        raise Failed(f"the fused model returns {len(result)} values; eager: {len(expected)}")
    for one, other in zip(expected, result, strict=True):
        if not isinstance(one, torch.Tensor):
            continue
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            shown = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (other, one)]
            raise Failed(f"the fused model returns {shown[0]}; eager: {shown[1]}")
        a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (one, other))
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))
        difference = max(difference, apart.max().item() if apart.numel() else 0.0)
        finite = a[a.isfinite()].abs()
        largest = max(largest, finite.max().item() if finite.numel() else 0.0)
    return difference, largest


def ge_operators(dumped: Path) -> list[str]:
    """The operator of every node of a GE graph that torchair has written as text."""
    return _GE_OPERATOR.findall(dumped.read_text(encoding="utf-8"))


def _graph(folder: Path) -> dict[str, Any]:
    """Count operators in torchair's file; its name has the time in it, and becomes one that never changes."""
    operators: Counter[str] = Counter()
    for number, path in enumerate(sorted(folder.glob("dynamo_*.pbtxt"), key=lambda p: p.stat().st_mtime_ns)):
        named = path.rename(folder / (f"ge_{number}.pbtxt" if number else "ge.pbtxt"))
        operators.update(ge_operators(named))
    return {"folder": folder.name, "operators": dict(sorted(operators.items()))}


def _explained(error: Exception) -> str:
    """What torchair says, with the node it failed at and the user's line, without the tracebacks."""
    text, chain = str(error), error.__cause__ or error.__context__
    innermost: BaseException = error
    while chain is not None:
        innermost = chain
        chain = chain.__cause__ or chain.__context__
    node = _NODE.search(text)
    lines = [_brief(innermost)]
    if node is not None:
        lines.append(f"  at {node[1]} = {node[2]}")
    source = users_line(text.partition("Original traceback:")[2].partition("Use tlparse")[0])
    if source is not None:
        lines.append(f"  from {source}")
    return "\n".join(lines)


def _brief(error: BaseException) -> str:
    text = re.split(r"\n\s*\n|\nTraceback |\nWhile executing", str(error).strip())[0]
    return f"{type(error).__name__}: {text}"
