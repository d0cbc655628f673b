"""The kernels, one module each: PyTorch operators, but for add_low_rank, which steps alone use."""
