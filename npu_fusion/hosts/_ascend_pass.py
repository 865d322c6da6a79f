"""The pipeline as a pass of torchair and npugraph_ex.

Their compile caches take a pass into the key by its disassembly, which for a closure, a partial or a callable
object is the same whatever the configuration. The pass is therefore a plain function made for its
configuration, with the key of that configuration as a constant in its code.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from npu_fusion import _compat
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _admission, _torchair_api
from npu_fusion.hosts._run import optimize
from npu_fusion.report import FusionReport

Pass = Callable[[fx.GraphModule, Any, Any], None]

_NUMBERS_AND_TEXT = (type(None), bool, int, float, str, bytes)
_PLAIN = (*_NUMBERS_AND_TEXT, tuple, list, dict, set, frozenset)

_SOURCE = """\
def npu_fusion_pass(gm, example_inputs, config):
    _run(gm, example_inputs, config, {key!r})
"""


def make_pass(
    config: FusionConfig,
    package: str,
    record: Callable[[FusionReport], None],
    earlier: Pass | None = None,
    name: Callable[[], str] | None = None,
    failed: Callable[[Exception], None] | None = None,
) -> Pass:
    """``fn(gm, example_inputs, config)`` that runs ``earlier`` and then the pipeline, in place.

    ``package``: ``"torchair"`` or ``"npugraph_ex"``. ``name``: names the graph that is being compiled.
    ``failed`` is told what the pipeline raises: both packages raise it again as a new exception with a text.
    """
    if getattr(earlier, "npu_fusion_earlier", None) is not None:  # our own: the new configuration takes over
        (earlier,) = earlier.npu_fusion_earlier  # type: ignore[union-attr]
    named = name or (lambda: _compat.compile_name() or "graph")

    def run(gm: fx.GraphModule, example_inputs: Any, compiler_config: Any, key: str) -> None:
        if earlier is not None:
            earlier(gm, example_inputs, compiler_config)
        _torchair_api.label_streams(gm, package)
        settings, admission = _admission.of(
            config, for_ge=_torchair_api.lowers_to_ge(package, compiler_config)
        )
        try:
            report = optimize(
                gm.graph,
                settings,
                name=named(),
                host=package,
                inference=_compat.aot_stage() in (None, "inference"),
                decomposed=False,
                admission=admission,
            )
        except Exception as error:
            if failed is not None:
                failed(error)
            raise
        record(report)
        if report.fusions:
            gm.recompile()
        if report.dump_dir is not None and _torchair_api.lowers_to_ge(package, compiler_config):
            _torchair_api.dump_ge_graph(compiler_config, report.dump_dir)

    key = hashlib.sha256(f"{config.cache_key()} {_digest(earlier)}".encode()).hexdigest()
    scope: dict[str, Any] = {"_run": run, "__name__": __name__}
    exec(compile(_SOURCE.format(key=key), f"<npu_fusion pass {key[:12]}>", "exec"), scope)
    made: Any = scope["npu_fusion_pass"]
    made.npu_fusion_earlier = (earlier,)
    made.npu_fusion_config = config
    return made


def compile_with(
    backend: Callable[..., Callable[..., Any]],
    settings: Any,
    package: str,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    config: FusionConfig,
    name: str,
    record: Callable[[FusionReport], None],
) -> Callable[..., Any]:
    """Compile with ``backend(compiler_config=settings)`` of ``package``, the pipeline set in ``settings``.

    What the pipeline raises is raised as it is.
    """
    errors: list[Exception] = []
    attach(settings, package, config, record, lambda: name, errors.append)
    try:
        with _torchair_api.without_cpu_kernels():
            return backend(compiler_config=settings)(gm, inputs)
    except Exception:
        if errors:
            raise errors[0] from None
        raise


def attach(
    compiler_config: Any,
    package: str,
    config: FusionConfig,
    record: Callable[[FusionReport], None],
    name: Callable[[], str] | None = None,
    failed: Callable[[Exception], None] | None = None,
) -> None:
    """Set the pipeline as the pass of a ``CompilerConfig`` of ``package``; a pass that is set already runs
    first. The rest is as in :func:`make_pass`."""
    earlier = _torchair_api.given_pass(compiler_config)
    made = make_pass(config, package, record, earlier, name, failed)
    setattr(compiler_config, _torchair_api.PASS, made)


def _digest(value: Any) -> str:
    """What a pass of the user's depends on, as far as its code and the values that it holds tell."""
    return hashlib.sha256(repr(_parts(value, {})).encode()).hexdigest()


def _parts(value: Any, seen: dict[int, int]) -> Any:
    """``value`` as something that prints the same in every process."""
    if isinstance(value, _NUMBERS_AND_TEXT):
        return value
    if id(value) in seen:  # a function may hold itself
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)

    def of(*parts: Any) -> list[Any]:
        return [type(value).__qualname__, *(_parts(part, seen) for part in parts)]

    if isinstance(value, types.CodeType):
        return of(value.co_code, value.co_names, value.co_consts)
    if isinstance(value, types.FunctionType):
        return of(value.__code__, value.__defaults__, value.__kwdefaults__, value.__closure__)
    if isinstance(value, types.CellType):
        try:
            return of(value.cell_contents)
        except ValueError:  # not filled yet
            return of()
    if isinstance(value, types.MethodType):
        return of(value.__func__, value.__self__)
    if isinstance(value, functools.partial):
        return of(value.func, value.args, value.keywords)
    if isinstance(value, (tuple, list)):
        return of(*value)
    if isinstance(value, (set, frozenset)):
        return [type(value).__qualname__, *sorted(repr(_parts(item, {})) for item in value)]
    if isinstance(value, dict):
        return of(*value.items())
    held = {name: v for name, v in getattr(value, "__dict__", {}).items() if isinstance(v, _PLAIN)}
    return of(type(value).__module__, vars(type(value)).get("__call__"), held)
