"""perturb_ and perturb_into: weights moved along noise that is made on the fly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import (
    DTYPE_CODES,
    LIBRARY,
    check_device_numbers,
    check_noise,
    check_same_device,
    check_scale,
    check_tensor,
    check_writable,
    is_eager,
    mark_written,
    not_a_tensor,
    overlap,
    pack,
    register_silent_fake,
    row_stride_of,
    seed_of,
    shape_of,
    to_signed,
    to_unsigned,
)
from dlzo_kernels.ops._parts import Directions, Operand, Part, by_kind, parts_of
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
    "perturb_(Tensor(a!) w, SymInt seed, float scale, SymInt stream, SymInt offset, SymInt query, "
    "SymInt? row_stride) -> ()"
)
LIBRARY.define(
    "perturb_into(Tensor(a!) out, Tensor base, SymInt seed, float scale, SymInt stream, "
    "SymInt offset, SymInt query, SymInt? row_stride) -> ()"
)


def perturb_(
    w: Tensor,
    seed: int | Tensor,
    scale: float | Tensor,
    *,
    stream: int = 0,
    offset: int = 0,
    query: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    """w = round(float32(w) + scale * z) in place, z being `gaussian` with the same numbers.

    One rounded product, one rounded sum, one rounding to nearest even into w's dtype: the same bits
    on every backend, but for those of a NaN. Perturbing by +scale and then by -scale need not
    restore w; `zo_step` does.

    Args:
        w: float32, bfloat16 or float16; any shape and strides, empty too.
        seed: 64-bit key, in [0, 2^64); or one int64 in w's memory, whose bits it is.
        scale: rounded to float32; or one float32 in w's memory. A CUDA graph reads both anew.
        stream: 32-bit ordinal of the parameter in its layer.
        offset: index of w's first element in the full tensor, 64-bit.
        query: 32-bit number of the direction.
        row_stride: columns of the full tensor, where w is a column shard of it.

    Returns:
        w.

    Raises:
        ValueError: a number is out of range, or elements of w share memory.
        TypeError: the dtype is none of the three.
        NotImplementedError: there is no kernel for the device.
    """
    check_noise(w.shape, seed, stream, offset, query, row_stride)
    check_device_numbers("seed", seed, torch.int64, 1, w.device)
    check_device_numbers("scale", scale, torch.float32, 1, w.device)
    check_scale(scale)
    if is_eager(w):
        _perturb_in_place(w, seed, scale, stream, offset, query, row_stride)
    else:
        numbers = _for_schema(seed, scale, stream, offset, query, row_stride)
        torch.ops.dlzo.perturb_(w, *numbers)
    return w


def perturb_into(
    out: Tensor,
    base: Tensor,
    seed: int | Tensor,
    scale: float | Tensor,
    *,
    stream: int = 0,
    offset: int = 0,
    query: int = 0,
    row_stride: int | None = None,
) -> Tensor:
    """out = round(float32(base) + scale * z); base is left as it was.

    Args:
        out: float32, bfloat16 or float16; any strides.
        base: of out's shape; float32 (a master) or out's dtype.
        seed: see `perturb_`, as for the other arguments.
        scale: see `perturb_`.
        stream: 32-bit ordinal of the parameter in its layer.
        offset: index of the first element in the full tensor, 64-bit.
        query: 32-bit number of the direction.
        row_stride: columns of the full tensor, where out is a column shard of it.

    Returns:
        out.

    Raises:
        ValueError: as `perturb_`; shapes that differ; out and base overlap without being the same.
        TypeError: a dtype is none of the three, or base is neither float32 nor of out's dtype.
        NotImplementedError: there is no kernel for the device.
    """
    check_noise(out.shape, seed, stream, offset, query, row_stride)
    check_device_numbers("seed", seed, torch.int64, 1, out.device)
    check_device_numbers("scale", scale, torch.float32, 1, out.device)
    check_scale(scale)
    if is_eager(out, base):
        _perturb_into(out, base, seed, scale, stream, offset, query, row_stride)
    else:
        numbers = _for_schema(seed, scale, stream, offset, query, row_stride)
        torch.ops.dlzo.perturb_into(out, base, *numbers)
    return out


def _for_schema(
    seed: int | Tensor,
    scale: float | Tensor,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
) -> tuple[int | float | None, ...]:
    """The numbers that both operators take."""
    number = to_signed(not_a_tensor("seed", seed))
    return number, not_a_tensor("scale", scale), stream, to_signed(offset), query, row_stride


def perturb_layer(
    operands: Sequence[Operand], seed: int | Tensor, scale: float | Tensor, query: int
) -> None:
    """`perturb_into` for each tensor of a layer.

    On a GPU, those of one kind are in as few launches as their arguments hold.
    """
    for (device, out_dtype, base_dtype), alike in by_kind(operands).items():
        if device.type == "cpu":
            for operand in alike:
                _perturb_cpu(operand, int(seed), float(scale), query)
        else:
            directions, _kept = _gpu.directions(device, seed, [query], scale)
            _launch(parts_of(alike), out_dtype, base_dtype, directions, device)
        for operand in alike:
            mark_written(operand.out)


def _perturb_in_place(
    w: Tensor,
    seed: int | Tensor,
    scale: float | Tensor,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
) -> None:
    check_writable("w", w)
    perturb_layer(
        [Operand(w, w, stream, to_unsigned(offset), row_stride)], seed_of(seed), scale, query
    )


def _perturb_into(
    out: Tensor,
    base: Tensor,
    seed: int | Tensor,
    scale: float | Tensor,
    stream: int,
    offset: int,
    query: int,
    row_stride: int | None,
) -> None:
    check_writable("out", out)
    check_tensor("base", base)
    check_same_device("base", base, "out", out.device)
    if out.shape != base.shape:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and base {tuple(base.shape)}; give tensors alike"
        )
    if base.dtype not in (torch.float32, out.dtype):
        raise TypeError(f"base has dtype {base.dtype}; use torch.float32 or out's {out.dtype}")
    same = out.data_ptr() == base.data_ptr() and out.stride() == base.stride()
    if overlap(out, base) and not (same and out.dtype == base.dtype):
        raise ValueError("out and base overlap in memory without being the same; clone base")
    perturb_layer(
        [Operand(out, base, stream, to_unsigned(offset), row_stride)], seed_of(seed), scale, query
    )


def _perturb_cpu(operand: Operand, seed: int, scale: float, query: int) -> None:
    out, base, stream, offset, row_stride = operand
    shape = shape_of(out)
    packed = pack(out)
    source = packed if base is out else pack(base)
    stride = row_stride_of(shape, row_stride)
    numbers = (to_unsigned(seed), stream, query, scale, torch.get_num_threads())
    _C.perturb(packed, source, shape, offset, stride, *numbers)


def _launch(
    parts: list[Part],
    out: torch.dtype,
    base: torch.dtype,
    directions: Directions,
    device: torch.device,
) -> None:
    if _gpu.selected() == "cuda":
        codes = DTYPE_CODES[out], DTYPE_CODES[base]
        _gpu.launch(_C.gpu.perturb(*codes, parts, directions), device)
    else:
        launch(triton_plans(parts, out, base, directions), device)


register_silent_fake("perturb_")
register_silent_fake("perturb_into")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("perturb_", _perturb_in_place, _key)
    LIBRARY.impl("perturb_into", _perturb_into, _key)


@jit
def _perturb_tile(
    out: tl.tensor,
    base: tl.tensor,
    place: Place,
    direction: Direction,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    value = tl.load(base + place.base, mask=place.inside).to(tl.float32)
    value += direction.scale * normals(place, direction, TILE, VECTOR)
    tl.store(out + place.out, value.to(out.dtype.element_ty), mask=place.inside)


@jit
def _perturb_kernel(
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
        out, base = aligned(part.out, OUT), aligned(part.base, BASE)
        for tile in range(first, last):
            place = whole_place(part, tile, VECTOR)
            _perturb_tile(out, base, place, direction, WHOLE, VECTOR)
    else:
        out, base = part.out.to(tl.pointer_type(OUT)), part.base.to(tl.pointer_type(BASE))
        for tile in range(first, last):
            _perturb_tile(out, base, odd_place(part, tile), direction, ODD, 4)


def triton_plans(
    parts: Sequence[Part], out: torch.dtype, base: torch.dtype, directions: Directions
) -> Iterator[Plan]:
    """The Triton launches that perturb parts along the first of some directions."""
    return plans(_perturb_kernel, parts, directions, out=out, base=base)
