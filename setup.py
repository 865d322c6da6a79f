"""Everything is in pyproject.toml but the CPU kernels, which installation compiles.

Where that fails the package is installed without them: it then runs its reference kernels, and says so.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "npu_fusion.kernels.cpu._kernels"


def _builder():
    """npu_fusion/kernels/cpu/_build.py, without importing the package: that needs PyTorch."""
    path = Path(__file__).parent / "npu_fusion" / "kernels" / "cpu" / "_build.py"
    spec = importlib.util.spec_from_file_location("_npu_fusion_build", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """The library is loaded by its path, so its name has no tag of a Python version."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext):
        builder = _builder()
        output = Path(self.get_ext_fullpath(ext.name))
        output.unlink(missing_ok=True)  # of an earlier build, which would be taken if this one fails
        try:
            builder.build(output)
        except builder.BuildError as error:
            self.warn(f"npu_fusion is installed without compiled CPU kernels: {error}")


class AnyPython(bdist_wheel):
    """One wheel for every version of Python: the kernels use none of its symbols."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(KERNELS, sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython},
)
