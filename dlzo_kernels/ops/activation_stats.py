"""activation_stats: maximum, mean, variance and kurtosis of activations in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _gpu
from dlzo_kernels.ops._common import DTYPE_CODES, LIBRARY, check_tensor, is_eager
from dlzo_kernels.ops._triton import Plan, aligned, constant, dtype_of, jit, launch, tl

LIBRARY.define("activation_stats(Tensor x, str per) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

_Addresses = tuple[int, int, int, int, int]  # of one array per statistic
_REDUCTIONS = {"tensor": 0, "channel": 1, "token": 2}
_DTYPES = (torch.float32, torch.int64, torch.float64, torch.float64, torch.float64)
# torch.empty_like takes half as long as torch.empty, most of what a call on a small tensor costs.
_SCALARS = tuple(torch.empty((), dtype=dtype, device="cpu") for dtype in _DTYPES)


class ActivationStats(NamedTuple):
    """Statistics of activations.

    Each has shape () per tensor, (C,) per channel, x.shape[:-1] per token.

    Attributes:
        absmax: largest |x|, exact; float32. A NaN counts as the largest.
        argmax: its first position, int64: flat index in x, token index, or channel index.
        mean: float64.
        variance: of the population, float64.
        kurtosis: E[(x - mean)^4] / variance^2, float64: 3 for a normal, NaN for a constant.

    Where a value is not finite, so is the mean, and variance and kurtosis are NaN.
    """

    absmax: Tensor
    argmax: Tensor
    mean: Tensor
    variance: Tensor
    kurtosis: Tensor


def activation_stats(
    x: Tensor, *, per: Literal["tensor", "channel", "token"] = "tensor"
) -> ActivationStats:
    """Maximum and moments of x in one pass over memory.

    Sums of powers run in float32 over 64 terms about a local mean and in float64 from there on
    (Pebay, SAND2008-6212). For finite x the relative error is at most 1e-5 for the variance and
    5e-5 for the kurtosis, and the mean's at most 1e-6 standard deviations plus one float32 ulp;
    large means and maxima (1e5 in bfloat16, 1e30 in float32) included. On the CPU the bits depend
    on neither ISA nor number of threads. The results have no gradient.

    Args:
        x: float32, bfloat16 or float16, of shape (..., C) with the channels last; not empty.
            A tensor that is not contiguous is copied first.
        per: over all of x, over its tokens for each channel, or over its channels for each token.

    Returns:
        ActivationStats of tensors on x's device.

    Raises:
        ValueError: x is empty, or `per` is none of the three, or a 0-d x is not per tensor.
        TypeError: the dtype is none of the three.
        NotImplementedError: there is no kernel for the device.
    """
    if per not in _REDUCTIONS:
        raise ValueError(f"per must be 'tensor', 'channel' or 'token', not {per!r}")
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} is empty: it has no statistics")
    if x.dim() == 0 and per != "tensor":
        raise ValueError(f"a 0-d x has no {per}s; use per='tensor'")
    if is_eager(x):
        return ActivationStats._make(_activation_stats(x, per))
    return ActivationStats._make(torch.ops.dlzo.activation_stats(x, per))


def _empty_results(x: Tensor, per: str) -> tuple[Tensor, ...]:
    shape = () if per == "tensor" else x.shape[-1:] if per == "channel" else x.shape[:-1]
    return tuple(x.new_empty(shape, dtype=dtype) for dtype in _DTYPES)


def _activation_stats(x: Tensor, per: str) -> tuple[Tensor, ...]:
    check_tensor("x", x)
    x = x.contiguous()
    quick = per == "tensor" and x.is_cpu
    results = tuple(map(torch.empty_like, _SCALARS)) if quick else _empty_results(x, per)
    channels = x.shape[-1] if x.dim() else 1
    rows = x.numel() // channels
    a, b, c, d, e = results
    pointers = (a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr())
    sizes = (rows, channels, _REDUCTIONS[per])
    if x.is_cuda:
        _launch(x, sizes, pointers)
    else:
        _C.activation_stats(
            x.data_ptr(), DTYPE_CODES[x.dtype], *sizes, pointers, torch.get_num_threads()
        )
    return results


def _launch(x: Tensor, sizes: tuple[int, int, int], pointers: _Addresses) -> None:
    room = _C.gpu.partials(*sizes) * _C.gpu.PARTIAL_BYTES
    workspace = x.new_empty(room, dtype=torch.uint8)  # until the kernels are enqueued
    addresses = pointers, workspace.data_ptr()
    if _gpu.selected() == "cuda":
        code = DTYPE_CODES[x.dtype]
        arguments = (x.data_ptr(), code, *sizes, *addresses)
        _gpu.launch(_C.gpu.activation_stats(*arguments), x.device)
    else:
        launch(triton_plans(x.data_ptr(), x.dtype, *sizes, *addresses), x.device)


@torch.library.register_fake("dlzo::activation_stats", lib=LIBRARY)
def _(x: Tensor, per: str) -> tuple[Tensor, ...]:
    return _empty_results(x, per)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("activation_stats", _activation_stats, _key)


# Triton. Every order of summation is that of activation_stats.cu.
_RUN = constant(_C.gpu.RUN)  # values of a row that a program sums
_LOG_POSITIONS = constant(8)
_POSITIONS = constant(256)  # values or partial moments that it takes side by side
_SEGMENT = constant(_C.gpu.COLUMN_SEGMENT)  # rows of a channel that a program sums
_BLOCK = constant(64)  # of them in float32
_PIVOT_ROWS = constant(16)  # whose mean is the first pivot
_CHANNELS = constant(64)  # that a program takes side by side
_INFINITE_KEY = constant(0x7F800000)
_NAN_KEY = constant(0x7F800001)


class _Sums(NamedTuple):
    """Inside a kernel: power sums about a pivot, the largest |x| and its place.

    Attributes:
        s1, s2, s3, s4: of d, d^2, d^3 and d^4.
        key: bits of the largest |x|; below those of any value where there is none yet.
        at: its first place.
    """

    s1: Any
    s2: Any
    s3: Any
    s4: Any
    key: Any
    at: Any


class _Moments(NamedTuple):
    """Inside a kernel: see csrc/moments.h; key and at as in _Sums."""

    count: Any
    mean: Any
    m2: Any
    m3: Any
    m4: Any
    key: Any
    at: Any


class _Room(NamedTuple):
    """Where results go: addresses of one array per statistic, and of the partial moments.

    Attributes:
        partials: six arrays of `outputs * pieces` numbers of 8 bytes, one after the other.
        outputs: number of results.
        pieces: partial moments of each.
    """

    absmax: int
    argmax: int
    mean: int
    variance: int
    kurtosis: int
    partials: int
    outputs: int
    pieces: int


@jit
def _key_of(value: tl.tensor) -> tl.tensor:
    """An integer that orders as |x| does, all NaNs equal and above infinity."""
    return tl.minimum(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _NAN_KEY)


@jit
def _no_sums(SIZE: tl.constexpr, DTYPE: tl.constexpr) -> _Sums:
    zero, none = tl.zeros((SIZE,), DTYPE), tl.full((SIZE,), -1, tl.int32)
    return _Sums(zero, zero, zero, zero, none, none)


@jit
def _added(
    sums: _Sums, value: tl.tensor, at: tl.tensor, pivot: tl.tensor, scale: tl.tensor
) -> _Sums:
    """Sums in float32 with one more value each."""
    d = value * scale - pivot
    q = d * d
    s3, s4 = tl.fma(q, d, sums.s3), tl.fma(q, q, sums.s4)
    larger = _key_of(value) > sums.key
    key, at = tl.where(larger, _key_of(value), sums.key), tl.where(larger, at, sums.at)
    return _Sums(sums.s1 + d, sums.s2 + q, s3, s4, key, at)


@jit
def _sum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a + b


@jit
def _tree(x: tl.tensor) -> tl.tensor:
    """The sum of all positions by a tree of neighbours."""
    for level in tl.static_range(_LOG_POSITIONS):
        # Two at a time: what order tl.reduce takes more of them in is its own affair.
        x = tl.reduce(tl.reshape(x, (_POSITIONS >> (level + 1), 2)), 1, _sum)
    return tl.reduce(x, 0, _sum)


@jit
def _first_of_largest(
    key_a: tl.tensor, at_a: tl.tensor, key_b: tl.tensor, at_b: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    b_wins = (key_b > key_a) | ((key_b == key_a) & (at_b < at_a))
    return tl.where(b_wins, key_b, key_a), tl.where(b_wins, at_b, at_a)


@jit
def _scale_for(key: tl.tensor) -> tl.tensor:
    """As scale_for of csrc/moments.h, in float32: at most 2^127."""
    absmax = key.to(tl.float32, bitcast=True).to(tl.float64)
    exponent = (absmax.to(tl.int64, bitcast=True) >> 52) - 1022
    power = ((1023 + tl.minimum(-exponent, 127)) << 52).to(tl.float64, bitcast=True)
    fits = (absmax >= 2.0**-12) & (absmax <= 2.0**29)
    fits = fits | (key <= 0) | (key >= _INFINITE_KEY)
    return tl.where(fits, 1.0, power).to(tl.float32)


@jit
def _finite_or_zero(pivot: tl.tensor) -> tl.tensor:
    return tl.where(_key_of(pivot) < _INFINITE_KEY, pivot, 0.0)


@jit
def _improved(
    sums: _Sums, count: tl.tensor, pivot: tl.tensor, scale: tl.tensor, moved: tl.tensor
) -> tuple[tl.tensor, ...]:
    """A pivot and a scale that serve better, whether the pivot has moved, and which are new.

    First the scale that the largest |x| asks for, then once, where the mean lies more than half a
    standard deviation off the pivot, a pivot at the mean.
    """
    wanted = _scale_for(sums.key)
    rescales = wanted != scale
    poor = 5 * sums.s1 * sums.s1 > count * sums.s2
    moves = poor & ~rescales & ~moved
    mean = (pivot.to(tl.float64) + sums.s1 / count).to(tl.float32)
    pivot = tl.where(rescales, 0.0, tl.where(moves, mean, pivot))
    return pivot, wanted, moved | moves, rescales | moves


@jit
def _moments(
    sums: _Sums, count: tl.tensor, start: tl.tensor, pivot: tl.tensor, scale: tl.tensor
) -> _Moments:
    """As central and rescale of csrc/moments.h; `start` is the first value's place."""
    s1, s2, s3, s4 = sums.s1, sums.s2, sums.s3, sums.s4
    m = s1 / count
    m2 = s2 - m * s1
    m3 = s3 - 3 * m * s2 + 2 * m * m * s1
    m4 = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * m * m * m * s1
    m2, m4 = tl.where(m2 < 0, 0.0, m2), tl.where(m4 < 0, 0.0, m4)
    r = 1 / scale.to(tl.float64)
    mean = (pivot.to(tl.float64) + m) * r
    m2, m3, m4 = m2 * (r * r), m3 * (r * r * r), m4 * (r * r * r * r)
    return _Moments(count, mean, m2, m3, m4, sums.key, start + sums.at)


@jit
def _combined(a: _Moments, b: _Moments) -> _Moments:
    """As combine of csrc/moments.h; an empty set leaves the other as it is."""
    na, nb = a.count, b.count
    n = na + nb
    delta = b.mean - a.mean
    step = delta / n
    weight = delta * step * na * nb
    mean = a.mean + step * nb
    m2 = a.m2 + b.m2 + weight
    m3 = a.m3 + b.m3 + weight * step * (na - nb) + 3 * step * (na * b.m2 - nb * a.m2)
    m4 = (
        a.m4
        + b.m4
        + weight * step * step * (na * na - na * nb + nb * nb)
        + 6 * step * step * (na * na * b.m2 + nb * nb * a.m2)
        + 4 * step * (na * b.m3 - nb * a.m3)
    )
    key, at = _first_of_largest(a.key, a.at, b.key, b.at)
    both = _Moments(n, mean, m2, m3, m4, key, at)
    no_a, no_b = na == 0, nb == 0
    return _Moments(
        *[tl.where(no_a, b[i], tl.where(no_b, a[i], both[i])) for i in (0, 1, 2, 3, 4, 5, 6)]
    )


@jit
def _write_results(m: _Moments, output: tl.tensor, room: _Room, inside: tl.tensor) -> None:
    absmax = tl.where(m.key == _NAN_KEY, 0x7FC00000, m.key).to(tl.int32)
    tl.store(room.absmax.to(tl.pointer_type(tl.int32)) + output, absmax, mask=inside)
    tl.store(room.argmax.to(tl.pointer_type(tl.int64)) + output, m.at, mask=inside)
    tl.store(room.mean.to(tl.pointer_type(tl.float64)) + output, m.mean, mask=inside)
    variance, kurtosis = m.m2 / m.count, m.count * m.m4 / (m.m2 * m.m2)
    tl.store(room.variance.to(tl.pointer_type(tl.float64)) + output, variance, mask=inside)
    tl.store(room.kurtosis.to(tl.pointer_type(tl.float64)) + output, kurtosis, mask=inside)


@jit
def _write(
    m: _Moments, output: tl.tensor, index: tl.tensor, room: _Room, inside: tl.tensor
) -> None:
    """The results, or a partial of them."""
    if room.pieces == 1:
        _write_results(m, output, room, inside)
    else:
        size = room.outputs * room.pieces
        moments = room.partials.to(tl.pointer_type(tl.float64)) + index
        tl.store(moments, m.mean, mask=inside)
        tl.store(moments + size, m.m2, mask=inside)
        tl.store(moments + 2 * size, m.m3, mask=inside)
        tl.store(moments + 3 * size, m.m4, mask=inside)
        largest = room.partials.to(tl.pointer_type(tl.int64)) + index
        tl.store(largest + 4 * size, m.key.to(tl.int64), mask=inside)
        tl.store(largest + 5 * size, m.at, mask=inside)


@jit
def _run_sums(x: tl.tensor, count: tl.tensor, pivot: tl.tensor, scale: tl.tensor) -> _Sums:
    """Scalar sums over the values of a run, in float64."""
    position = tl.arange(0, _POSITIONS)
    sums = _no_sums(_POSITIONS, tl.float32)
    steps = count // _POSITIONS
    for step in tl.range(0, steps, loop_unroll_factor=3):
        value = tl.load(x + (step * _POSITIONS + position)).to(tl.float32)
        sums = _added(sums, value, step, pivot, scale)
    last = steps * _POSITIONS + position
    value = tl.load(x + last, mask=last < count, other=0).to(tl.float32)
    more = _added(sums, value, steps, pivot, scale)
    sums = _Sums(*[tl.where(last < count, more[i], sums[i]) for i in (0, 1, 2, 3, 4, 5)])
    at = sums.at * _POSITIONS + position  # steps until here: one number for all positions
    key, at = tl.reduce((sums.key, at), 0, _first_of_largest)
    s = [_tree(sums[i].to(tl.float64)) for i in (0, 1, 2, 3)]
    return _Sums(s[0], s[1], s[2], s[3], key, at)


@jit
def _run_kernel(
    x: tl.tensor, columns: tl.tensor, room: _Room, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> None:
    """The moments of one run of a row of x."""
    program, pieces = tl.program_id(0), room.pieces.to(tl.int32)  # 64 bits would be a call
    row, start = (program // pieces).to(tl.int64), (program % pieces).to(tl.int64) * _RUN
    if ALIGNED:
        x = aligned(x, DTYPE) + (row * (columns // 8) * 8 + start)
    else:
        x = x.to(tl.pointer_type(DTYPE)) + (row * columns + start)
    count = tl.minimum(columns - start, _RUN).to(tl.int32)

    position = tl.arange(0, _POSITIONS)
    first = tl.load(x).to(tl.float32)
    value = tl.load(x + position, mask=position < count, other=0).to(tl.float32)
    difference = tl.where(position < count, value - first, 0.0)
    terms = tl.minimum(count, _POSITIONS).to(tl.float32)
    pivot = _finite_or_zero(first + tl.div_rn(_tree(difference), terms))

    n, zero, one = count.to(tl.float64), tl.zeros((), tl.float64), tl.full((), 1, tl.int32)
    sums = _Sums(zero, zero, zero, zero, -one, -one)
    scale, moved, again = one.to(tl.float32), one == 0, one == 1
    while again:
        sums = _run_sums(x, count, pivot, scale)
        pivot, scale, moved, again = _improved(sums, n, pivot, scale, moved)
    _write(_moments(sums, n, start, pivot, scale), row, program, room, None)


@jit
def _column_sums(
    x: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    pivot: tl.tensor,
    scale: tl.tensor,
    inside: tl.tensor,
) -> _Sums:
    """Sums over `count` rows of each of _CHANNELS columns, in float64."""
    totals = _no_sums(_CHANNELS, tl.float64)
    for first in range(0, count, _BLOCK):
        sums = _no_sums(_CHANNELS, tl.float32)
        for row in tl.range(first, tl.minimum(first + _BLOCK, count), loop_unroll_factor=8):
            value = tl.load(x + row * step, mask=inside, other=0).to(tl.float32)
            sums = _added(sums, value, row, pivot, scale)
        s = [totals[i] + sums[i].to(tl.float64) for i in (0, 1, 2, 3)]
        key, at = _first_of_largest(totals.key, totals.at, sums.key, sums.at)
        totals = _Sums(s[0], s[1], s[2], s[3], key, at)
    return totals


@jit
def _column_kernel(
    x: tl.tensor, rows: tl.tensor, channels: tl.tensor, room: _Room, DTYPE: tl.constexpr
) -> None:
    """The moments of one segment of _CHANNELS columns of x."""
    program = tl.program_id(0).to(tl.int64)
    piece = program // tl.cdiv(channels, _CHANNELS)
    channel = program % tl.cdiv(channels, _CHANNELS) * _CHANNELS + tl.arange(0, _CHANNELS)
    inside, start = channel < channels, piece * _SEGMENT
    x = x.to(tl.pointer_type(DTYPE)) + start * channels + channel
    count = tl.minimum(rows - start, _SEGMENT).to(tl.int32)

    first = tl.load(x, mask=inside, other=0).to(tl.float32)
    total = tl.zeros((_CHANNELS,), tl.float32)
    terms = tl.minimum(count, _PIVOT_ROWS)
    for row in range(1, terms):
        total += tl.load(x + row * channels, mask=inside, other=0).to(tl.float32) - first
    pivot = _finite_or_zero(first + tl.div_rn(total, terms.to(tl.float32)))

    n, one = count.to(tl.float64), tl.full((_CHANNELS,), 1, tl.int32)
    sums = _no_sums(_CHANNELS, tl.float64)
    scale, moved, again = one.to(tl.float32), one == 0, tl.max(one, 0)
    while again != 0:  # columns that were well served are summed as before, to the same bits
        sums = _column_sums(x, count, channels, pivot, scale, inside)
        pivot, scale, moved, new = _improved(sums, n, pivot, scale, moved)
        again = tl.max(new.to(tl.int32), 0)
    moments = _moments(sums, n, start, pivot, scale)
    _write(moments, channel, piece * channels + channel, room, inside)


@jit
def _combined_neighbours(
    count_a: tl.tensor,
    mean_a: tl.tensor,
    m2_a: tl.tensor,
    m3_a: tl.tensor,
    m4_a: tl.tensor,
    key_a: tl.tensor,
    at_a: tl.tensor,
    place_a: tl.tensor,
    count_b: tl.tensor,
    mean_b: tl.tensor,
    m2_b: tl.tensor,
    m3_b: tl.tensor,
    m4_b: tl.tensor,
    key_b: tl.tensor,
    at_b: tl.tensor,
    place_b: tl.tensor,
) -> tuple[tl.tensor, ...]:
    """For tl.reduce, which does not say in which order it gives the two: `place` does."""
    a = _Moments(count_a, mean_a, m2_a, m3_a, m4_a, key_a, at_a)
    b = _Moments(count_b, mean_b, m2_b, m3_b, m4_b, key_b, at_b)
    swapped = place_b < place_a
    lower = _Moments(*[tl.where(swapped, b[i], a[i]) for i in (0, 1, 2, 3, 4, 5, 6)])
    upper = _Moments(*[tl.where(swapped, a[i], b[i]) for i in (0, 1, 2, 3, 4, 5, 6)])
    both = _combined(lower, upper)
    place = tl.minimum(place_a, place_b)
    return both.count, both.mean, both.m2, both.m3, both.m4, both.key, both.at, place


class _Layout(NamedTuple):
    """Where partial moments lie: at output * output_step + piece * piece_step.

    Attributes:
        length: values of an output.
        size: values of a piece; the last one has the rest.
    """

    length: int
    size: int
    output_step: int
    piece_step: int


@jit
def _partials(output: tl.tensor, piece: tl.tensor, layout: _Layout, room: _Room) -> _Moments:
    """Of pieces that need not exist; those are empty."""
    inside = (piece < room.pieces) & (output < room.outputs)
    values = tl.minimum(layout.length - piece * layout.size, layout.size)
    at, size = output * layout.output_step + piece * layout.piece_step, room.outputs * room.pieces
    moments = room.partials.to(tl.pointer_type(tl.float64)) + at
    largest = room.partials.to(tl.pointer_type(tl.int64)) + at
    return _Moments(
        tl.where(inside, values, 0).to(tl.float64),
        tl.load(moments, mask=inside, other=0),
        tl.load(moments + size, mask=inside, other=0),
        tl.load(moments + 2 * size, mask=inside, other=0),
        tl.load(moments + 3 * size, mask=inside, other=0),
        tl.load(largest + 4 * size, mask=inside, other=0),
        tl.load(largest + 5 * size, mask=inside, other=0),
    )


@jit
def _pairs(x: tl.tensor, OUTPUTS: tl.constexpr, LOG_COUNT: tl.constexpr) -> tl.tensor:
    return tl.reshape(x, (OUTPUTS, 1 << LOG_COUNT, 2))


@jit
def _combine_kernel(
    layout: _Layout, room: _Room, LOG_POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr
) -> None:
    """The results of OUTPUTS outputs from their partial moments."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    position = tl.arange(0, 1 << LOG_POSITIONS)[None, :]
    m = _partials(output[:, None], position, layout, room)
    for first in range(1 << LOG_POSITIONS, room.pieces, 1 << LOG_POSITIONS):
        m = _combined(m, _partials(output[:, None], first + position, layout, room))
    place = tl.broadcast_to(position, (OUTPUTS, 1 << LOG_POSITIONS))
    tree = (m.count, m.mean, m.m2, m.m3, m.m4, m.key, m.at, place)
    for level in tl.static_range(LOG_POSITIONS):
        pairs = [_pairs(field, OUTPUTS, LOG_POSITIONS - level - 1) for field in tree]
        tree = tl.reduce(pairs, 2, _combined_neighbours)
    joined = [tl.reshape(field, (OUTPUTS,)) for field in tree]
    results = _Moments(*[joined[i] for i in (0, 1, 2, 3, 4, 5, 6)])
    _write_results(results, output, room, output < room.outputs)


def triton_plans(
    x: int,
    dtype: torch.dtype,
    rows: int,
    channels: int,
    reduction: int,
    results: _Addresses,
    workspace: int,
) -> Iterator[Plan]:
    """The Triton launches for a (rows, channels) matrix; addresses as for the CUDA kernels."""
    constants = {"DTYPE": dtype_of(dtype)}
    if reduction == _REDUCTIONS["channel"]:
        pieces = -(-rows // _SEGMENT.value)
        room = _Room(*results, workspace, channels, pieces)
        programs = -(-channels // _CHANNELS.value) * pieces
        yield Plan(_column_kernel, programs, (x, rows, channels, room), constants, num_warps=1)
        layout = _Layout(rows, _SEGMENT.value, output_step=1, piece_step=channels)
    else:
        outputs, columns = (1, rows * channels) if reduction == 0 else (rows, channels)
        pieces = -(-columns // _RUN.value)
        room = _Room(*results, workspace, outputs, pieces)
        constants["ALIGNED"] = x % 16 == 0 and (outputs == 1 or columns % 8 == 0)
        yield Plan(_run_kernel, outputs * pieces, (x, columns, room), constants, num_warps=1)
        layout = _Layout(columns, _RUN.value, output_step=pieces, piece_step=1)
    if pieces > 1:
        # Few variants to compile; positions beyond the last piece are empty.
        log_positions, side_by_side = (4, 8) if pieces <= 16 else (6, 2) if pieces <= 64 else (8, 1)
        programs = -(-room.outputs // side_by_side)
        constants = {"LOG_POSITIONS": log_positions, "OUTPUTS": side_by_side}
        yield Plan(_combine_kernel, programs, (layout, room), constants, num_warps=1)
