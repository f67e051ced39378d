"""What compiled kernels are, read from their machine code."""
