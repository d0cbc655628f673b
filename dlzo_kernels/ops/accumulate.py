"""accumulate_: many directions applied to the weights in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import (
    DTYPE_CODES,
    LIBRARY,
    NO_TENSOR,
    check_device_numbers,
    check_noise,
    check_range,
    check_same_device,
    check_scale,
    check_writable,
    is_eager,
    is_unread,
    mark_written,
    not_a_tensor,
    overlap,
    pack,
    register_silent_fake,
    row_stride_of,
    shape_of,
    to_signed,
    to_unsigned,
)
from dlzo_kernels.ops._parts import Directions, Operand, Part, by_kind, parts_of
from dlzo_kernels.ops._triton import (
    ODD,
    WHOLE,
    Parts,
    Place,
    Plan,
    aligned,
    direction_of,
    jit,
    launch,
    normals,
    odd_place,
    part_of_program,
    plans,
    tiles_of_program,
    tl,
    whole_place,
)

LIBRARY.define(
    "accumulate_(Tensor(a!) master, SymInt[] seeds, float[] scales, SymInt stream, SymInt offset, "
    "SymInt[] query, SymInt? row_stride, Tensor(b!)? out) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def accumulate_(
    master: Tensor,
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
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
        seeds: K 64-bit keys, in [0, 2^64); or K int64 in master's memory, whose bits they are.
        scales: K numbers, each rounded to float32; or K float32 in master's memory.
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
        NotImplementedError: there is no kernel for the device.
        RuntimeError: a CUDA graph is captured, and seeds or scales are lists of several, or query
            is: only one of each, or a tensor, is known to the graph.
    """
    queries = list(query) if isinstance(query, Iterable) else [query] * len(seeds)
    check_directions(seeds, scales, queries, master.device)
    check_noise(master.shape, 0, stream, offset, 0, row_stride)
    if is_eager(master, *([] if out is None else [out])):
        _accumulate(master, seeds, scales, stream, offset, queries, row_stride, out)
    else:
        signed = [to_signed(seed) for seed in not_a_tensor("seeds", seeds)]
        numbers = list(not_a_tensor("scales", scales))
        arguments = (signed, numbers, stream, to_signed(offset), queries, row_stride, out)
        torch.ops.dlzo.accumulate_(master, *arguments)
    return master


def check_directions(
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    queries: Sequence[int],
    device: torch.device,
) -> None:
    """Raises ValueError or TypeError unless there are as many of each, all in range."""
    if not len(seeds) == len(scales) == len(queries):
        raise ValueError(
            f"{len(seeds)} seeds, {len(scales)} scales and {len(queries)} queries: "
            "give as many of each"
        )
    check_device_numbers("seeds", seeds, torch.int64, len(queries), device)
    check_device_numbers("scales", scales, torch.float32, len(queries), device)
    for number in queries:
        check_range("query", number, 1 << 32)
    for seed in () if isinstance(seeds, Tensor) else seeds:
        check_range("seed", seed, 1 << 64)
    for scale in () if is_unread(scales) else scales:
        check_scale(float(scale) if isinstance(scale, Tensor) else scale)


def accumulate_layer(
    operands: Sequence[Operand],
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    queries: Sequence[int],
    *,
    gate: Tensor | None = None,
    writes_out: bool = True,
) -> None:
    """`accumulate_` for each tensor of a layer.

    On a GPU, those of one kind are in as few launches as their arguments hold.

    Args:
        operands: base is the master, out what receives it rounded.
        seeds: as in `accumulate_`.
        scales: as in `accumulate_`.
        queries: K numbers of directions.
        gate: one int32 in the masters' memory; 0 there leaves them as they are.
        writes_out: False where no out is written.
    """
    for (device, out_dtype, base_dtype), alike in by_kind(operands).items():
        if device.type == "cpu":
            count = len(queries) if gate is None or gate.item() else 0
            unsigned = [to_unsigned(int(seed)) for seed in seeds][:count]
            numbers = [float(scale) for scale in scales][:count]
            for operand in alike:
                _accumulate_cpu(operand, unsigned, numbers, queries[:count], writes_out)
        else:
            directions, _kept = _gpu.directions(device, seeds, queries, scales)
            dtypes = out_dtype, base_dtype
            _launch(parts_of(alike), *dtypes, writes_out, directions, gate, device)
        for operand in alike:
            mark_written(operand.base)
            if writes_out:
                mark_written(operand.out)


def _accumulate(
    master: Tensor,
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    stream: int,
    offset: int,
    query: Sequence[int],
    row_stride: int | None,
    out: Tensor | None,
) -> None:
    check_writable("master", master)
    if out is not None:
        _check_out(master, out)
    operand = Operand(
        master if out is None else out, master, stream, to_unsigned(offset), row_stride
    )
    unsigned = seeds if isinstance(seeds, Tensor) else [to_unsigned(seed) for seed in seeds]
    accumulate_layer([operand], unsigned, scales, query, writes_out=out is not None)


def _accumulate_cpu(
    operand: Operand,
    seeds: Sequence[int],
    scales: Sequence[float],
    queries: Sequence[int],
    writes_out: bool,
) -> None:
    out, base, stream, offset, row_stride = operand
    shape = shape_of(base)
    _C.accumulate(
        pack(out) if writes_out else NO_TENSOR,
        pack(base),
        shape,
        offset,
        row_stride_of(shape, row_stride),
        seeds,
        stream,
        queries,
        scales,
        torch.get_num_threads(),
    )


def _launch(
    parts: list[Part],
    out: torch.dtype,
    base: torch.dtype,
    writes_out: bool,
    directions: Directions,
    gate: Tensor | None,
    device: torch.device,
) -> None:
    gate_at = 0 if gate is None else gate.data_ptr()
    if _gpu.selected() == "cuda":
        codes = DTYPE_CODES[out], DTYPE_CODES[base]
        plan = _C.gpu.accumulate(*codes, writes_out, parts, directions, gate_at)
        _gpu.launch(plan, device)
    else:
        launch(triton_plans(parts, out, base, writes_out, directions, gate_at), device)


def _check_out(master: Tensor, out: Tensor) -> None:
    check_writable("out", out)
    check_same_device("out", out, "master", master.device)
    if out.shape != master.shape:
        raise ValueError(f"out has shape {tuple(out.shape)} and master {tuple(master.shape)}")
    if master.dtype is not torch.float32:
        raise TypeError(f"out needs a float32 master, not {master.dtype}")
    if overlap(master, out):
        raise ValueError("out and master overlap in memory; give out its own")


register_silent_fake("accumulate_")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("accumulate_", _accumulate, _key)


@jit
def _accumulate_tile(
    out: tl.tensor,
    base: tl.tensor,
    place: Place,
    directions: Directions,
    count: tl.tensor,
    stream: tl.tensor,
    IN_MEMORY: tl.constexpr,
    WRITES_OUT: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    value = tl.load(base + place.base, mask=place.inside)
    for k in range(count):
        direction = direction_of(directions, k, stream, IN_MEMORY)
        moved = value.to(tl.float32) + direction.scale * normals(place, direction, TILE, VECTOR)
        value = moved.to(value.dtype)
    if count > 0:
        tl.store(base + place.base, value, mask=place.inside)
    if WRITES_OUT:
        tl.store(out + place.out, value.to(out.dtype.element_ty), mask=place.inside)


@jit
def _accumulate_kernel(
    parts: Parts,
    length: tl.tensor,
    directions: Directions,
    gate: tl.tensor,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    VECTOR: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    WRITES_OUT: tl.constexpr,
) -> None:
    part = part_of_program(parts)
    count = directions.count
    if gate != 0:
        count *= (tl.load(gate.to(tl.pointer_type(tl.int32))) != 0).to(tl.int64)
    first, last = tiles_of_program(part, length)
    if part.tiles_per_row == 0:
        out, base = aligned(part.out, OUT), aligned(part.base, BASE)
        for tile in range(first, last):
            place = whole_place(part, tile, VECTOR)
            _accumulate_tile(
                out,
                base,
                place,
                directions,
                count,
                part.stream,
                IN_MEMORY,
                WRITES_OUT,
                WHOLE,
                VECTOR,
            )
    else:
        out, base = part.out.to(tl.pointer_type(OUT)), part.base.to(tl.pointer_type(BASE))
        for tile in range(first, last):
            place = odd_place(part, tile)
            _accumulate_tile(
                out, base, place, directions, count, part.stream, IN_MEMORY, WRITES_OUT, ODD, 4
            )


def triton_plans(
    parts: Sequence[Part],
    out: torch.dtype,
    base: torch.dtype,
    writes_out: bool,
    directions: Directions,
    gate: int,
) -> Iterator[Plan]:
    """The Triton launches that move parts along directions; `gate` is an address or 0."""
    return plans(
        _accumulate_kernel, parts, directions, gate, out=out, base=base, WRITES_OUT=writes_out
    )
