"""Why torch_npu has to be imported before this package, and the error that says so.

torch_npu defines its operators while its shared library is loaded. If one of them exists by then, the loader
throws where nobody can catch it and the process ends. PyTorch imports torch_npu by itself when it is
installed (``TORCH_DEVICE_BACKEND_AUTOLOAD``), so the order is right unless that is switched off; then a
finder in front of all others turns the import that would end the process into an ``ImportError``.

Asking whether torch_npu is installed (``importlib.util.find_spec``) is answered as before.

Source: ``c10::Dispatcher::registerDef`` of PyTorch 2.13; library and Python part of torch_npu 2.13.0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "torch_npu"


class _TooLate(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        raise ImportError(
            f"{PACKAGE} is imported after npu_fusion, which has defined the operators of the npu namespace "
            f"because {PACKAGE} was not there; accepted: 'import {PACKAGE}' before 'import npu_fusion'",
            name=PACKAGE,
            path=spec.origin,
        )

    def exec_module(self, module: ModuleType) -> None:
        raise AssertionError(f"there is no module to execute: {module}")


class _Guard(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                spec.loader = _TooLate()
                return spec
        return None


def refuse_torch_npu_from_now_on() -> None:
    """Make every later ``import torch_npu`` raise; to be called when operators are defined without it."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())
