"""What the kernels cost on this machine: ``npu-fusion bench``, and the long form in ``benchmarks/kernels.py``."""
