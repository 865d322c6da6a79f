"""What the kernels cost on this machine: ``npu-fusion bench``; the long form is ``benchmarks/kernels.py``."""
