"""The kernels as PyTorch operators, one module each."""
