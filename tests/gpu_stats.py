"""activation_stats of the GPU columns in numpy: every operation in their order, bit for bit.

Sums of floating-point numbers depend on their order; CUDA and Triton keep this one. A row (per
tensor and token) is cut into runs of RUN values; value number s * POSITIONS + p of a run belongs to
position p. A channel is cut into segments of SEGMENT rows. Where an output has several of these,
their moments combine in a fixed tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

RUN = 16384  # values of a row that one warp sums
POSITIONS = 256  # running sums that it keeps, and partial results combined side by side
SEGMENT = 256  # rows of a channel that one thread sums
BLOCK = 64  # of them summed in float32
PIVOT_ROWS = 16  # whose mean is the first pivot
NAN_KEY = 0x7F800001  # of every NaN: above infinity's


class Moments(NamedTuple):
    """Of several sets of values: arrays of one shape, m_k being the sum of (x - mean)^k."""

    count: F64
    mean: F64
    m2: F64
    m3: F64
    m4: F64
    key: I64  # bits of the largest |x| as float32
    argmax: I64  # its first position, counted from the start of the row or channel


class Stats(NamedTuple):
    absmax: F32
    argmax: I64
    mean: F64
    variance: F64
    kurtosis: F64


def stats(x: F32, per: str) -> Stats:
    """What activation_stats of a (rows, columns) matrix gives, each result an array of one axis."""
    with np.errstate(all="ignore"):
        if per == "channel":
            starts = range(0, len(x), SEGMENT)
            return _results(_combined([_segment(x[i : i + SEGMENT], i) for i in starts]))
        rows = x.reshape(1, -1) if per == "tensor" else x
        starts = range(0, rows.shape[1], RUN)
        parts = [_stacked([_run(row[i : i + RUN], i) for row in rows]) for i in starts]
        return _results(_combined(parts))


def _stacked(of_rows: list[Moments]) -> Moments:
    return Moments(*(np.concatenate(field) for field in zip(*of_rows, strict=True)))


def _run(values: F32, start: int) -> Moments:
    """Of up to RUN values of a row, the first of which is number `start`."""
    n = len(values)
    steps = -(-n // POSITIONS)
    padded = np.zeros((steps, POSITIONS), np.float32)
    padded.reshape(-1)[:n] = values
    valid = np.arange(padded.size).reshape(padded.shape) < n
    first = np.float32(min(n, POSITIONS))
    differences = np.where(valid[0], padded[0] - padded[0, 0], np.float32(0))
    pivot = padded[0, 0] + adjacent_tree(differences, np.add) / first

    def sums(pivot: F32, scale: F32) -> list[F64]:
        of_positions = _power_sums(padded, valid, pivot, scale)
        return [adjacent_tree(s.astype(np.float64), np.add)[None] for s in of_positions]

    return _moments(values[:, None], start, np.array([pivot]), sums)


def _segment(values: F32, start: int) -> Moments:
    """Of up to SEGMENT rows of every channel, the first of which is row `start`."""
    first = values[:PIVOT_ROWS]
    total = np.zeros_like(first[0])
    for row in first[1:]:
        total = total + (row - first[0])
    pivot = first[0] + total / np.float32(len(first))

    def sums(pivot: F32, scale: F32) -> list[F64]:
        totals = [np.zeros(len(pivot)) for _ in range(4)]
        for i in range(0, len(values), BLOCK):
            block = values[i : i + BLOCK]
            of_block = _power_sums(block, np.ones(block.shape, bool), pivot, scale)
            totals = [t + s for t, s in zip(totals, of_block, strict=True)]
        return totals

    return _moments(values, start, pivot, sums)


def _power_sums(values: F32, valid: npt.NDArray[np.bool_], pivot: F32, scale: F32) -> list[F32]:
    """Of d, d^2, d^3 and d^4 down each column, d = values * scale - pivot, in float32."""
    s = [np.zeros(values.shape[1], np.float32) for _ in range(4)]
    for row, inside in zip(values, valid, strict=True):
        d = row * scale - pivot
        q = d * d
        terms = s[0] + d, s[1] + q, fma(q, d, s[2]), fma(q, q, s[3])
        s = [np.where(inside, term, old) for term, old in zip(terms, s, strict=True)]
    return s


def _moments(values: F32, start: int, pivot: F32, sums: Callable[[F32, F32], list[F64]]) -> Moments:
    """Of each column of `values`, from the power sums about a pivot that serves it well."""
    key = keys(values)
    argmax = key.argmax(0)  # the first of equal ones
    key = key.max(0)
    n = np.full(len(key), float(len(values)))
    scale = scale_for(absmax_of(key))
    pivot = np.where(np.isfinite(pivot) & (scale == 1), pivot, np.float32(0))
    s = sums(pivot, scale)
    poor = 5 * s[0] * s[0] > n * s[1]
    pivot = np.where(poor, (pivot + s[0] / n).astype(np.float32), pivot)
    s = [np.where(poor, again, once) for again, once in zip(sums(pivot, scale), s, strict=True)]
    return _rescaled(_central(n, s, pivot, key, argmax + start), 1 / scale.astype(np.float64))


def keys(values: F32) -> I64:
    """Integers that order as |x| does, a NaN above infinity."""
    key = (values.view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.int64)
    return np.where(np.isnan(values), NAN_KEY, key)


def absmax_of(key: I64) -> F32:
    """The |x| of a key."""
    return np.where(key == NAN_KEY, 0x7FC00000, key).astype(np.uint32).view(np.float32)


def scale_for(absmax: F32) -> F32:
    """The power of two that brings |x| up to absmax near 1; 1 where the powers fit as they are."""
    fits = ((absmax >= 2.0**-12) & (absmax <= 2.0**29)) | (absmax == 0) | ~np.isfinite(absmax)
    _, exponent = np.frexp(np.where(fits, np.float32(0.5), absmax))
    return np.ldexp(np.float32(1), np.minimum(-exponent, 127)).astype(np.float32)


def fma(a: F32, b: F32, c: F32) -> F32:
    """a * b + c rounded once: the sum is rounded to odd in float64, where the product is exact."""
    product, c64 = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c64
    part = total - product
    error = (product - (total - part)) + (c64 - part)  # Knuth's TwoSum
    even = (total.view(np.int64) & 1) == 0
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(total) & (error != 0) & even
    return (total.view(np.int64) + np.where(inexact, step, 0)).view(np.float64).astype(np.float32)


def adjacent_tree(values: npt.NDArray, function: np.ufunc) -> npt.NDArray:
    """((0 + 1) + (2 + 3)) + ... over a power of two of values."""
    while len(values) > 1:
        values = function(values[0::2], values[1::2])
    return values[0]


def _central(n: F64, s: list[F64], pivot: F32, key: I64, argmax: I64) -> Moments:
    """As central() of csrc/moments.h."""
    s1, s2, s3, s4 = s
    m = s1 / n
    m2 = s2 - m * s1
    m3 = s3 - 3 * m * s2 + 2 * m * m * s1
    m4 = s4 - 4 * m * s3 + 6 * m * m * s2 - 3 * m * m * m * s1
    m2, m4 = np.where(m2 < 0, 0, m2), np.where(m4 < 0, 0, m4)
    return Moments(n, pivot + m, m2, m3, m4, key, argmax)


def _rescaled(x: Moments, scale: F64) -> Moments:
    """As rescale() of csrc/moments.h."""
    return x._replace(
        mean=x.mean * scale,
        m2=x.m2 * (scale * scale),
        m3=x.m3 * (scale * scale * scale),
        m4=x.m4 * (scale * scale * scale * scale),
    )


def combine(a: Moments, b: Moments) -> Moments:
    """As combine() of csrc/moments.h; an empty set leaves the other as it is."""
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
    b_wins = (b.key > a.key) | ((b.key == a.key) & (b.argmax < a.argmax))
    key, argmax = np.where(b_wins, b.key, a.key), np.where(b_wins, b.argmax, a.argmax)
    both = Moments(n, mean, m2, m3, m4, key, argmax)
    fields = zip(a, b, both, strict=True)
    return Moments(*(np.where(na == 0, y, np.where(nb == 0, x, z)) for x, y, z in fields))


def _combined(parts: list[Moments]) -> Moments:
    """Part i at position i % POSITIONS, there in ascending order; then neighbours in a tree."""
    empty = Moments(*(np.zeros_like(field) for field in parts[0]))
    positions = [empty] * POSITIONS
    for i, part in enumerate(parts):
        positions[i % POSITIONS] = combine(positions[i % POSITIONS], part)
    while len(positions) > 1:
        pairs = zip(positions[0::2], positions[1::2], strict=True)
        positions = [combine(a, b) for a, b in pairs]
    return positions[0]


def _results(m: Moments) -> Stats:
    return Stats(absmax_of(m.key), m.argmax, m.mean, m.m2 / m.count, m.count * m.m4 / (m.m2 * m.m2))


def samples() -> Iterator[tuple[str, F32]]:
    """Inputs of every kind, by name: shape (tokens, channels)."""
    random = np.random.default_rng(0)
    plain = random.standard_normal((70, 300)).astype(np.float32)
    yield "odd sizes", plain[:5, :33].copy()
    yield "several runs and segments", random.standard_normal((600, 70)).astype(np.float32)
    yield "a mean far away", plain * np.float32(0.5) + np.float32(1000)
    yield "an outlier first", np.concatenate([np.float32([[60000] * 300]), plain])
    yield "tiny", plain * np.float32(1e-7)
    yield "constant", np.full((40, 60), np.float32(3.25))
    yield "one value", np.float32([[-7.5]])
    broken = plain.copy()
    broken[3, 5], broken[60, 7], broken[61, 8] = np.nan, np.inf, np.nan
    yield "not finite", broken
