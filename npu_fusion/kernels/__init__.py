"""What computes the operators where no NPU does."""
