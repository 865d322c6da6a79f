"""The way of a graph: canonicalize, recognize, rewrite the largest first, check, report.

::

    FX graph ─▶ TermGraph (canonical view, graph untouched) ─▶ absorb ─▶ compose ─▶ lift ─▶ order, clean, lint
                    ▲                                            │
                    └───────── anew, if it did anything ─────────┘

Composition comes before lifting on purpose: both recognize on the canonical view, so a large fusion does not
need its small parts to be in the graph, and what is never emitted costs nothing. What a large fusion refuses,
the small ones then find as it was.

Absorbing (MLA) changes what is computed, and the other fusions are to find the result: only after it, and
only if something was absorbed, the canonical view is made a second time, of the graph as it then is.

A failing fusion is undone alone; a failure of the whole leaves the graph as it came. Both warn, or raise in
strict mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import fx

from npu_fusion.config import FusionConfig
from npu_fusion.passes import canonicalize, compose, lift
from npu_fusion.passes.checks import Sizes
from npu_fusion.passes.compose._mla_pairs import kept_pairs
from npu_fusion.passes.pattern import FUSIONS, Context, Fusion, Hazards, source_of
from npu_fusion.passes.rewrite import Admission, Rewriter
from npu_fusion.passes.terms import Term, TermGraph
from npu_fusion.passes.values import complete
from npu_fusion.passes.verify import FusionVerificationError
from npu_fusion.report import FusionReport, Refusal
from npu_fusion.targets import missing, resolve

_ROOMS = (canonicalize, compose, lift)

Snapshot = Callable[[str, fx.Graph], None]


class FusionError(RuntimeError):
    """A pass failed in strict mode."""


class FusionExpectationError(RuntimeError):
    """The number of fusions is not the one that ``FusionConfig.expect`` asks for.

    ``report`` has the account. torchair raises what a pass raises again, made from the text alone: from a
    graph that torchair compiles with an enabled configuration it is None.
    """

    def __init__(self, message: str, report: FusionReport | None = None) -> None:
        super().__init__(message)
        self.report = report


def run(
    graph: fx.Graph,
    config: FusionConfig,
    *,
    name: str = "graph",
    host: str = "eager",
    inference: bool = True,
    decomposed: bool = False,
    keep_stages: bool = False,
    admission: Admission | None = None,
) -> FusionReport:
    """Run the whole pipeline on ``graph`` in place and return the account of it.

    ``inference``: False refuses everything (a training graph saves intermediates that a fused operator does
    not return). ``decomposed``: the graph is in Inductor's dialect. ``keep_stages``: keep readable code of
    every stage in the report. ``admission``: says which calls host and target take (None: those that
    the target takes).
    """
    started = time.perf_counter()
    report = FusionReport(graph=name, host=host, dry_run=config.dry_run, began=started)
    report.operators_before = operators(graph)
    report.timing["count"] = time.perf_counter() - started
    if keep_stages:
        report.stages.append(("before", readable(graph)))
    if not inference:
        report.refused.append(
            Refusal("all", "the graph is traced for training", "run the model under torch.no_grad()")
        )
    else:
        with _no_collection():
            _run_stages(graph, config, report, decomposed, keep_stages, admission)
    report.operators_after = (
        operators(graph) if report.fusions and not config.dry_run else report.operators_before
    )
    return report


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would walk the heap of the whole process for objects that are in
    use until the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run_stages(
    graph: fx.Graph,
    config: FusionConfig,
    report: FusionReport,
    decomposed: bool,
    keep_stages: bool,
    admission: Admission | None,
) -> None:
    clock = time.perf_counter
    started = clock()
    try:
        complete(graph)
        view = TermGraph(graph)
        target = resolve(config)
        if admission is None and target is not None:
            admission = functools.partial(missing, target)
        rewriter = Rewriter(view, decomposed, admission)
        context = Context(view, Sizes(graph), config, rewriter, report, Hazards(graph))
        anchors = _anchors(view)
    except Exception as error:
        _failed("canonicalize", error, config, report)
        return
    report.timing["canonicalize"] = clock() - started
    started = clock()
    absorbed = _absorb(anchors, context)
    report.timing["absorb"] = clock() - started
    if absorbed:
        if keep_stages and not config.dry_run:
            report.stages.append(("absorb", readable(graph)))
        started = clock()
        try:
            context = dataclasses.replace(context, view=rewriter.look_again(), memo={})
            anchors = _anchors(context.view)
        except Exception as error:
            rewriter.rollback()
            report.fusions.clear()
            _failed("canonicalize", error, config, report)
            return
        report.timing["canonicalize"] += clock() - started
    for stage in ("compose", "lift"):
        started = clock()
        _run_stage(stage, anchors, context)
        report.timing[stage] = clock() - started
        if keep_stages and report.fusions and not config.dry_run:
            report.stages.append((stage, readable(graph)))
    mixed = kept_pairs(context) if config.cache_layout == "npu" and not config.dry_run else []
    if mixed:
        rewriter.rollback()
        raise FusionError(_mixed_layouts(mixed[0].term, report))
    if config.dry_run:
        rewriter.rollback()
        _forget(report, {node.name for node in graph.nodes})
        return
    if not report.fusions:
        return
    started = clock()
    order = {node.name: position for position, node in enumerate(graph.nodes)}
    report.fusions.sort(key=lambda fused: order[fused.nodes[-1]])
    try:
        rewriter.commit()
    except Exception as error:
        rewriter.rollback()
        report.fusions.clear()
        _failed("clean up", error, config, report)
        return
    report.timing["clean up"] = clock() - started
    if keep_stages:
        report.stages.append(("after", readable(graph)))


def _mixed_layouts(rotated: Term, report: FusionReport) -> str:
    place = source_of(rotated.nodes[0]) if rotated.nodes else None
    because = dict.fromkeys(r.reason for r in report.refused if r.fusion in ("mla_prolog", "mla_absorb"))
    return (
        f"cache_layout='npu': graph {report.graph!r} would write rotated pairs to a cache ({place}), which "
        f"other graphs read as halves; mla_prolog did not take it over: {'; '.join(because)}"
    )


def _absorb(anchors: dict[str, list[Term]], context: Context) -> bool:
    """Rewrite what later stages are to see rewritten; was anything? A dry run does it, too, and takes it back
    at the end, so that it finds what the real run would."""
    if context.config.dry_run:
        context = dataclasses.replace(context, config=context.config.replace(dry_run=False))
    _run_stage("absorb", anchors, context)
    return bool(context.report.fusions)


def _forget(report: FusionReport, names: Container[str]) -> None:
    """Leave out of the account of a dry run the nodes that were there only while it ran."""
    for i, fused in enumerate(report.fusions):
        nodes = tuple(name for name in fused.nodes if name in names)
        report.fusions[i] = dataclasses.replace(fused, nodes=nodes, emitted=())
    for i, refusal in enumerate(report.refused):
        nodes = tuple(name for name in refusal.nodes if name in names)
        report.refused[i] = dataclasses.replace(refusal, nodes=nodes)


def _run_stage(stage: str, anchors: dict[str, list[Term]], context: Context) -> None:
    for fusion in sorted(FUSIONS.values(), key=lambda f: f.priority):
        if fusion.stage == stage and context.config.enabled(fusion.name):
            _run_fusion(fusion, anchors, context)
            context.rewriter.sort()  # or every later region would be searched for what depends on it


def _anchors(view: TermGraph) -> dict[str, list[Term]]:
    """Terms by canonical operator; one rounded to 16 bits also by what is rounded."""
    anchors: dict[str, list[Term]] = defaultdict(list)
    for term in view.terms:
        anchors[term.op].append(term)
        if term.op == "cast" and isinstance(term.args[0], Term) and not term.args[0].nodes:
            anchors[term.args[0].op].append(term)
    return anchors


def _run_fusion(fusion: Fusion, anchors: dict[str, list[Term]], context: Context) -> None:
    dead, made = context.rewriter.dead, context.rewriter.made
    # A rounded term is listed under two operators; it is one place.
    for term in dict.fromkeys(t for op in fusion.anchors for t in anchors.get(op, ())):
        for node in term.nodes:
            if node not in dead and node not in made:
                break
        else:
            continue
        try:
            fusion.apply(term, context)
        except FusionVerificationError:
            raise
        except Exception as error:
            _failed(fusion.name, error, context.config, context.report)


def _failed(what: str, error: Exception, config: FusionConfig, report: FusionReport) -> None:
    message = f"{what}: {type(error).__name__}: {error}"
    if config.strict:
        raise FusionError(f"npu_fusion pass failed: {message}") from error
    report.failures.append(message)
    warnings.warn(f"npu_fusion pass failed and was undone: {message}", RuntimeWarning, stacklevel=2)


def operators(graph: fx.Graph) -> dict[str, int]:
    """Operator name -> count, without views of tuples and sizes."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            target: Any = node.target
            namespace = getattr(target, "namespace", None)
            if namespace is not None:
                name = (
                    getattr(target, "_opname", None) or target.name()
                )  # a higher-order operator has no overloads
                counts[f"{namespace}.{name}"] += 1
    return dict(counts)


def readable(graph: fx.Graph) -> str:
    """The graph as Python code with shapes and source lines."""
    module = graph.owning_module
    if isinstance(module, fx.GraphModule):
        module.recompile()
        return module.print_readable(print_output=False)
    return str(graph.python_code("self").src)


def check_expectation(report: FusionReport, config: FusionConfig) -> None:
    """Raise :class:`FusionExpectationError`, with the near misses, if a count is not the expected one."""
    if config.expect is None:
        return
    fused = report.fused
    wrong = {n: (fused.get(n, 0), c) for n, c in config.expect.items() if fused.get(n, 0) != c}
    if not wrong:
        return
    lines = [f"{name}: {got} instead of {want}" for name, (got, want) in wrong.items()]
    for (fusion, reason), items in report.refusals().items():
        lines.append(
            f"  not fused {len(items)} x ({fusion}): {reason}; {items[0].detail} {items[0].source or ''}"
        )
    message = f"graph {report.graph!r}: expected fusions were not made\n" + "\n".join(lines)
    raise FusionExpectationError(message, report)
