"""Adding the pipeline to a configuration that the user passes to torchair or npugraph_ex himself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from npu_fusion._recorded import RECORDED
from npu_fusion.config import FusionConfig
from npu_fusion.hosts import _torchair_api
from npu_fusion.hosts._ascend_pass import attach, make_pass

C = TypeVar("C")


def enable(compiler_config: C, fusion_config: FusionConfig | Mapping[str, Any] | None = None) -> C:
    """Add the pipeline to ``compiler_config``, in place, and return it::

        config = npu_fusion.enable(torchair.CompilerConfig())
        model = torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config))

    ``compiler_config``: ``torchair.CompilerConfig`` or ``npugraph_ex.CompilerConfig``. A
    ``post_grad_custom_pre_pass`` that is set already runs first; enabling again replaces the fusion
    configuration. The reports are in :func:`npu_fusion.reports`.

    Raises ``TypeError`` for any other object.
    """
    package = _torchair_api.package_of(compiler_config)
    if package is None:
        raise TypeError(
            f"compiler_config is a {type(compiler_config).__name__}; accepted: torchair.CompilerConfig or "
            "npugraph_ex.CompilerConfig (for Inductor: get_npu_backend(compiler_config={...}))"
        )
    attach(compiler_config, package, FusionConfig.make(fusion_config), RECORDED.append)
    return compiler_config


def npugraph_ex_options(
    fusion_config: FusionConfig | Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Options for ``torch.compile(model, backend="npugraph_ex", options=...)`` with the pipeline in them::

        model = torch.compile(model, backend="npugraph_ex",
                              options=npu_fusion.npugraph_ex_options(inplace_pass=False))

    ``options``: npugraph_ex's own, handed on; a ``post_grad_custom_pre_pass`` among them runs first. The
    reports are in :func:`npu_fusion.reports`.
    """
    earlier = options.get(_torchair_api.PASS)
    if earlier is not None and not callable(earlier):
        raise TypeError(f"{_torchair_api.PASS} is a {type(earlier).__name__}; accepted: a function or None")
    config = FusionConfig.make(fusion_config)
    return {**options, _torchair_api.PASS: make_pass(config, "npugraph_ex", RECORDED.append, earlier)}
