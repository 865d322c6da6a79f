"""What all tests run with."""

from __future__ import annotations

import torch

# The models and matrices of tests are small: they lose more by waiting for a second core than they gain from
# it, the more so where several workers share the cores. tests/kernels has two again.
torch.set_num_threads(1)
