"""What would fuse in a model and what would not, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from npu_fusion import _compat
from npu_fusion.config import FusionConfig
from npu_fusion.hosts._run import optimize
from npu_fusion.passes.pipeline import check_expectation
from npu_fusion.report import FusionReport, merged


def explain(
    fn_or_module: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    fusion_config: FusionConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> FusionReport:
    """Trace ``fn_or_module(*args, **kwargs)`` and report what fuses and, for every near miss, why not.

    A dry run: the model is traced as ``torch.compile(..., dynamic=dynamic)`` would, under
    ``torch.no_grad()``, and no operator of it is executed. Where the model breaks into several graphs, the
    parts after a break are traced with zeros for what the parts before it would have computed; the report
    covers all graphs.

    Raises what ``torch.compile`` raises for the model, :class:`npu_fusion.FusionExpectationError` where
    ``expect`` (summed over all graphs) is not met, and ``TypeError`` if ``fn_or_module`` is not callable.
    """
    if not callable(fn_or_module):
        raise TypeError(
            f"fn_or_module is a {type(fn_or_module).__name__}; accepted: a function or torch.nn.Module"
        )
    config = FusionConfig.make(fusion_config)
    each = config.replace(dry_run=True, expect=None)
    target = getattr(fn_or_module, "_torchdynamo_orig_callable", fn_or_module)
    target = getattr(target, "_orig_mod", target)
    found: list[FusionReport] = []

    def compile_one(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(
            optimize(
                gm.graph,
                each,
                name=_compat.compile_name() or f"graph_{len(found)}",
                host="explain",
                inference=True,
                decomposed=False,
            )
        )
        return make_boxed_func(_shapes_only(gm))

    trace = aot_autograd(fw_compiler=compile_one, keep_inference_input_mutations=True)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        _compat.specialize_floats(gm)
        return trace(gm, inputs)

    with torch.no_grad(), _compat.no_recompile_limit():
        torch.compile(target, backend=backend, dynamic=dynamic)(*args, **kwargs)
    report = merged(found)
    check_expectation(report, config)
    return report


def _shapes_only(gm: fx.GraphModule) -> Callable[..., Any]:
    """Stands for the compiled graph: outputs of the right shapes, full of zeros, and no side effect."""

    def run(*args: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        with mode:
            outputs = gm.forward(*fakes)
        return tuple(
            torch.zeros(tuple(o.shape), dtype=o.dtype, device=o.device) if isinstance(o, torch.Tensor) else o
            for o in outputs
        )

    return run
