"""accumulate_: many directions applied to the weights in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops._common import (
    LIBRARY,
    NO_TENSOR,
    check_noise,
    check_range,
    check_scale,
    check_writable,
    is_eager,
    mark_written,
    overlap,
    pack,
    register_silent_fake,
    row_stride_of,
    shape_of,
    threads,
    to_signed,
    to_unsigned,
)

LIBRARY.define(
    "accumulate_(Tensor(a!) master, int[] seeds, float[] scales, int stream, int offset, "
    "int[] query, int? row_stride, Tensor(b!)? out) -> ()"
)


def accumulate_(
    master: Tensor,
    seeds: Sequence[int],
    scales: Sequence[float],
    *,
    stream: int = 0,
    offset: int = 0,
    query: int | Sequence[int] = 0,
    row_stride: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """master += scales[k] * z_k for k = 0, 1, ..., the weights passing through memory once.

    Bit-equal to `perturb_(master, seeds[k], scales[k], query=query[k])` one after the other.

    Args:
        master: float32, bfloat16 or float16; any shape and strides, empty too.
        seeds: K 64-bit keys, in [0, 2^64).
        scales: K numbers, each rounded to float32.
        stream: 32-bit ordinal of the parameter in its layer.
        offset: index of the first element in the full tensor, 64-bit.
        query: 32-bit number of the direction, one for all or K of them.
        row_stride: columns of the full tensor, where master is a column shard of it.
        out: receives the final master rounded to its own dtype; then master must be float32.

    Returns:
        master.

    Raises:
        ValueError: lengths or shapes differ, a number is out of range, elements share memory.
        TypeError: a dtype is none of the three, or out is given and master is not float32.
        NotImplementedError: no kernel was built for the device.
    """
    queries = [query] * len(seeds) if isinstance(query, int) else list(query)
    if not len(seeds) == len(scales) == len(queries):
        raise ValueError(
            f"{len(seeds)} seeds, {len(scales)} scales and {len(queries)} queries: "
            "give as many of each"
        )
    check_noise(master.shape, 0, stream, offset, 0, row_stride)
    for seed, scale, number in zip(seeds, scales, queries, strict=True):
        check_range("seed", seed, 1 << 64)
        check_range("query", number, 1 << 32)
        check_scale(scale)
    if is_eager(master, *([] if out is None else [out])):
        _accumulate_cpu(master, seeds, scales, stream, offset, queries, row_stride, out)
    else:
        signed = [to_signed(seed) for seed in seeds]
        arguments = (signed, list(scales), stream, to_signed(offset), queries, row_stride, out)
        torch.ops.dlzo.accumulate_(master, *arguments)
    return master


def _accumulate_cpu(
    master: Tensor,
    seeds: Sequence[int],
    scales: Sequence[float],
    stream: int,
    offset: int,
    query: Sequence[int],
    row_stride: int | None,
    out: Tensor | None,
) -> None:
    check_writable("master", master)
    if out is not None:
        _check_out(master, out)
    shape = shape_of(master)
    numbering = (shape, to_unsigned(offset), row_stride_of(shape, row_stride))
    unsigned = [to_unsigned(seed) for seed in seeds]
    _C.accumulate(
        NO_TENSOR if out is None else pack(out),
        pack(master),
        *numbering,
        unsigned,
        stream,
        query,
        scales,
        threads(),
    )
    mark_written(master)
    if out is not None:
        mark_written(out)


def _check_out(master: Tensor, out: Tensor) -> None:
    check_writable("out", out)
    if out.shape != master.shape:
        raise ValueError(f"out has shape {tuple(out.shape)} and master {tuple(master.shape)}")
    if master.dtype is not torch.float32:
        raise TypeError(f"out needs a float32 master, not {master.dtype}")
    if overlap(master, out):
        raise ValueError("out and master overlap in memory; give out its own")


register_silent_fake("accumulate_")
LIBRARY.impl("accumulate_", _accumulate_cpu, "CPU")
