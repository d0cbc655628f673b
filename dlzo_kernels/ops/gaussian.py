"""gaussian: standard normals of noise v1 as a new tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import (
    DTYPE_CODES,
    LIBRARY,
    as_index,
    check_noise,
    check_tensor,
    is_eager,
    pack,
    row_stride_of,
    shape_of,
    to_signed,
    to_unsigned,
)
from dlzo_kernels.ops._parts import Directions, Operand, Part, parts_of
from dlzo_kernels.ops._triton import (
    ODD,
    WHOLE,
    Direction,
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
    "gaussian(SymInt[] shape, SymInt seed, SymInt stream, SymInt offset, SymInt query, "
    "SymInt? row_stride, ScalarType dtype, Device device) -> Tensor"
)


def gaussian(
    shape: Sequence[int],
    seed: int,
    *,
    stream: int = 0,
    offset: int = 0,
    query: int = 0,
    row_stride: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals as a pure function of (seed, stream, query, element index): noise v1.

    Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller, to the bits of `reference.py`.

    The same bits on every backend, ISA and number of threads; no random state is read or written.
    A shard of a larger tensor makes its own part: element (i, j), seen as rows of the last
    dimension, has the index offset + i * row_stride + j of the full tensor.

    Args:
        shape: of the result.
        seed: 64-bit key, in [0, 2^64).
        stream: 32-bit ordinal of the parameter in its layer.
        offset: index of the first element in the full tensor, 64-bit.
        query: 32-bit number of the direction; 0 for two-point steps.
        row_stride: columns of the full tensor, where `shape` is a column shard of it; by default
            the rows follow one another.
        dtype: torch.float32, torch.bfloat16 or torch.float16 (rounded to nearest even).
        device: where the result lies.

    Returns:
        A contiguous tensor; |z| <= 6.764 in float32.

    Raises:
        ValueError: a number is out of range, or no kernel can run on a GPU here.
        TypeError: the dtype is none of the three.
        NotImplementedError: there is no kernel for the device.
    """
    shape = tuple(map(as_index, shape))
    check_noise(shape, seed, stream, offset, query, row_stride)
    signed = to_signed(seed), stream, to_signed(offset), query
    arguments = (shape, *signed, row_stride, dtype, torch.device(device))
    return _gaussian(*arguments) if is_eager() else torch.ops.dlzo.gaussian(*arguments)


def _gaussian(
    shape: Sequence[int],
    seed: int,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if device.type == "cuda":
        _gpu.selected()  # before torch complains in its own words
    out = torch.empty(shape, dtype=dtype, device=device)
    check_tensor("the result", out)
    offset, seed = to_unsigned(offset), to_unsigned(seed)
    if out.is_cuda:
        parts = parts_of([Operand(out, out, stream, offset, row_stride)])
        _launch(parts, dtype, Directions(count=1, seed=seed, query=query), out.device)
        return out
    sizes = shape_of(out)
    stride = row_stride_of(sizes, row_stride)
    _C.gaussian(pack(out), sizes, offset, stride, seed, stream, query, torch.get_num_threads())
    return out


def _launch(
    parts: list[Part], dtype: torch.dtype, directions: Directions, device: torch.device
) -> None:
    if _gpu.selected() == "cuda":
        _gpu.launch(_C.gpu.gaussian(DTYPE_CODES[dtype], parts, directions), device)
    else:
        launch(triton_plans(parts, dtype, directions), device)


@torch.library.register_fake("dlzo::gaussian", lib=LIBRARY)
def _(
    shape: Sequence[int],
    seed: int,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


LIBRARY.impl("gaussian", _gaussian, "CompositeExplicitAutograd")


@jit
def _fill_tile(
    out: tl.tensor, place: Place, direction: Direction, TILE: tl.constexpr, VECTOR: tl.constexpr
) -> None:
    z = normals(place, direction, TILE, VECTOR)
    tl.store(out + place.out, z.to(out.dtype.element_ty), mask=place.inside)


@jit
def _gaussian_kernel(
    parts: Parts,
    length: tl.tensor,
    directions: Directions,
    OUT: tl.constexpr,
    BASE: tl.constexpr,
    VECTOR: tl.constexpr,
    IN_MEMORY: tl.constexpr,
) -> None:
    part = part_of_program(parts)
    direction = direction_of(directions, 0, part.stream, IN_MEMORY)
    first, last = tiles_of_program(part, length)
    if part.tiles_per_row == 0:
        out = aligned(part.out, OUT)
        for tile in range(first, last):
            _fill_tile(out, whole_place(part, tile, VECTOR), direction, WHOLE, VECTOR)
    else:
        out = part.out.to(tl.pointer_type(OUT))
        for tile in range(first, last):
            _fill_tile(out, odd_place(part, tile), direction, ODD, 4)


def triton_plans(
    parts: Sequence[Part], dtype: torch.dtype, directions: Directions
) -> Iterator[Plan]:
    """The Triton launches that fill parts with normals."""
    return plans(_gaussian_kernel, parts, directions, out=dtype, base=dtype)
