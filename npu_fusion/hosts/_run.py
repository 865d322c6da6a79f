"""What every host does with a graph: run the pipeline, then show and check what it did."""

from __future__ import annotations

from torch import fx

from npu_fusion import _trace, dump
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _cpu_products
from npu_fusion.hosts._in_place import write_in_place
from npu_fusion.passes import pipeline
from npu_fusion.passes.rewrite import Admission
from npu_fusion.report import FusionReport


def optimize(
    graph: fx.Graph,
    config: FusionConfig,
    *,
    name: str,
    host: str,
    inference: bool,
    decomposed: bool,
    admission: Admission | None = None,
) -> FusionReport:
    """Run the pipeline on ``graph`` in place; dump, log and trace its report; check ``expect``."""
    directory = config.dump_dir or dump.debug_directory()
    report = pipeline.run(
        graph,
        config,
        name=name,
        host=host,
        inference=inference,
        decomposed=decomposed,
        keep_stages=directory is not None or _trace.tracing(),
        admission=admission,
    )
    if report.fusions and not config.dry_run and host in ("inductor", "eager"):
        _cpu_products.use_compiled(graph)
        if host == "eager":  # Inductor's own passes come first, see inductor.py
            write_in_place(graph)
    if directory is not None:
        dump.write(report, directory)
    _trace.log_report(report)
    _trace.emit_artifact(report)
    pipeline.check_expectation(report, config)
    return report
