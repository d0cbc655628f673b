"""Bits of tensors, views of them, and the numpy reference applied to any dtype and strides."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dlzo_kernels import reference

# Of perturbed weights and those that they come from, or their master.
PAIRS = [
    *((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
]
VIEWS = {
    "transposed": lambda w: w.t(),
    "columns": lambda w: w[:, 3:40],
    "every other row": lambda w: w[::2],
    "every third column": lambda w: w[:, ::3],
    "permuted": lambda w: w.view(4, 15, 70).permute(2, 0, 1),
    "channels last": lambda w: w.view(60, 7, 5, 2).permute(0, 3, 1, 2),
    "one column": lambda w: w[:, 5],
    "a matrix of one column": lambda w: w[:, 5:6],
    "0-d": lambda w: w[3, 4],
    "empty": lambda w: w[:, :0],
    "flipped sizes of one": lambda w: w.view(60, 1, 70)[:, :, 1:],
}


def low_rank(u: Tensor, v: Tensor) -> np.ndarray:
    """U V^T, each product and each sum rounded to float32 by numpy, in order."""
    columns, rows = u.numpy().T, v.numpy().T
    z = np.outer(columns[0], rows[0])
    for column, row in zip(columns[1:], rows[1:], strict=True):
        z = z + np.outer(column, row)
    return z


def copies(layer: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in layer.parameters()]


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The raw bits as integers of the same size."""
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype is expected.dtype
    assert got.shape == expected.shape
    different = (bits(got) != bits(expected)).sum().item()
    assert different == 0, f"{different} of {got.numel()} elements differ in bits"


def store(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Float32 values rounded to dtype by the reference's rules."""
    if dtype is torch.bfloat16:
        raw = np.asarray(reference.to_bfloat16_bits(values))  # a scalar again where it was 0-d
        return torch.from_numpy(raw.view(np.int16)).view(dtype)
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.asarray(values.astype(np.float16)))
    return torch.from_numpy(values)


def to_float32(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        return reference.from_bfloat16_bits(raw)
    return tensor.contiguous().numpy().astype(np.float32)


def reference_perturb(
    base: Tensor,
    seed: int,
    scale: float,
    dtype: torch.dtype,
    *,
    stream: int = 0,
    offset: int = 0,
    query: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    index = reference.element_index(tuple(base.shape), offset, row_stride)
    z = reference.gaussian(index, seed, stream, query)
    with np.errstate(over="ignore"):
        return store(np.asarray(reference.perturb(to_float32(base), z, scale)), dtype)
