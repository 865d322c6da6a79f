"""``python -m npu_fusion.kernels.cpu``: compile the kernels of this installation."""

from __future__ import annotations

from npu_fusion.kernels.cpu import _build

if __name__ == "__main__":
    print(_build.build())
