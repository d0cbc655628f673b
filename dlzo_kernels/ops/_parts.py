"""What kernels work on: the tensors of a layer, cut into matrices for a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Operand(NamedTuple):
    """A tensor of a layer and the noise that belongs to it.

    Attributes:
        out: what is written.
        base: what is read (or read and written), of out's shape.
        stream: 32-bit ordinal of the parameter in its layer.
        offset: index of the first element in the full tensor, in [0, 2^64).
        row_stride: columns of the full tensor, where out is a column shard of it.
    """

    out: Tensor
    base: Tensor
    stream: int
    offset: int
    row_stride: int | None


Kind = tuple[torch.device, torch.dtype, torch.dtype]


def by_kind(operands: Iterable[Operand]) -> dict[Kind, list[Operand]]:
    """The operands that one kernel can take together: same device, dtypes of out and base."""
    kinds: dict[Kind, list[Operand]] = {}
    for operand in operands:
        kind = operand.out.device, operand.out.dtype, operand.base.dtype
        kinds.setdefault(kind, []).append(operand)
    return kinds


class Directions(NamedTuple):
    """K directions of noise and their scales, as a GPU kernel takes them.

    What is given by value is one number for all; an address that is not 0 wins over it.

    Attributes:
        count: K.
        seed: in [0, 2^64).
        query: 32-bit number of the direction.
        scale: rounded to float32.
        seeds: address of K 64-bit integers.
        queries: address of K 32-bit integers.
        scales: address of K float32 numbers.
    """

    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    seed: int = 0
    query: int = 0
    scale: float = 0.0
    seeds: int = 0
    queries: int = 0
    scales: int = 0


class Part(NamedTuple):
    """A matrix whose element (i, j) has the logical index offset + i * row_stride + j.

    Attributes:
        out: address of the first element that is written.
        base: address of the first element that is read; out where nothing is.
        rows: number of rows, at least 1.
        columns: number of columns, at least 1.
        out_row: distance in memory between the rows of out, in elements.
        out_column: distance in memory between its columns, in elements.
        base_row: distance in memory between the rows of base, in elements.
        base_column: distance in memory between its columns, in elements.
        offset: logical index of element (0, 0), in [0, 2^64).
        row_stride: distance between rows in logical indices.
        stream: 32-bit ordinal of the parameter in its layer.
    """

    out: int
    base: int
    rows: int
    columns: int
    out_row: int
    out_column: int
    base_row: int
    base_column: int
    offset: int
    row_stride: int
    stream: int


def parts_of(operands: Iterable[Operand]) -> list[Part]:
    """The matrices of all operands, one operand after the other."""
    return [part for operand in operands for part in _parts_of(operand)]


def _parts_of(operand: Operand) -> Iterator[Part]:
    """The fewest matrices that cover an operand, in the order of its elements."""
    out, base, stream, offset, row_stride = operand
    if out.numel() == 0:
        return
    dimensions = _merged(out, base, row_stride)
    *leading, (rows, out_row, base_row, logical_row), columns = dimensions
    for place in product(*(range(size) for size, *_ in leading)):
        steps = [
            sum(i * dimension[axis] for i, dimension in zip(place, leading, strict=True))
            for axis in (1, 2, 3)
        ]
        yield Part(
            out=out.data_ptr() + steps[0] * out.element_size(),
            base=base.data_ptr() + steps[1] * base.element_size(),
            rows=rows,
            columns=columns[0],
            out_row=out_row,
            out_column=columns[1],
            base_row=base_row,
            base_column=columns[2],
            offset=offset + steps[2],
            row_stride=logical_row,
            stream=stream,
        )


_Dimension = tuple[int, int, int, int]  # size, and the strides in out, base and logical indices


def _merged(out: Tensor, base: Tensor, row_stride: int | None) -> list[_Dimension]:
    """At least two dimensions, the last one numbered without gaps; those that can be are joined."""
    columns = out.shape[-1] if out.dim() else 1
    last_row = columns if row_stride is None else row_stride
    merged: list[_Dimension] = [(1, 0, 0, 0)]
    for axis in range(out.dim()):
        size = out.shape[axis]
        if size == 1 and axis < out.dim() - 1:
            continue
        last = axis == out.dim() - 1
        logical = 1 if last else math.prod(out.shape[axis + 1 : -1]) * last_row
        steps = (out.stride(axis), base.stride(axis), logical)
        before = merged[-1]
        if all(b == s * size for b, s in zip(before[1:], steps, strict=True)):
            merged[-1] = (before[0] * size, *steps)
        else:
            merged.append((size, *steps))
    if merged[-1][3] != 1:
        merged.append((1, 1, 1, 1))
    return merged if len(merged) > 1 else [(1, 0, 0, 0), *merged]
