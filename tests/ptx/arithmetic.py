"""The arithmetic of PTX on numpy arrays, bit for bit. Arrays broadcast; nothing is in place."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

Array = np.ndarray

_QUIET_NAN = {
    2: np.array(0x7FFF, "u2").view("f2")[()],
    4: np.array(0x7FFFFFFF, "u4").view("f4")[()],
}


def _bits(x: Array) -> int:
    return 8 * x.dtype.itemsize


def _as_unsigned(x: Array) -> Array:
    return x.view(f"u{x.dtype.itemsize}")


# Integers.


def shift_left(a: Array, count: Array) -> Array:
    """A count beyond the width shifts everything out."""
    width = _bits(a)
    shifted = a << np.minimum(count, width - 1).astype(a.dtype)
    return np.where(count < width, shifted, a.dtype.type(0))


def shift_right(a: Array, count: Array) -> Array:
    """Arithmetic for signed types; a count beyond the width leaves zeros or copies of the sign."""
    width = _bits(a)
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < width, shifted, a.dtype.type(0))


def multiply_wide(a: Array, b: Array) -> Array:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype.itemsize < 8:
        return (multiply_wide(a, b) >> _bits(a)).astype(a.dtype)
    x, y, low = _as_unsigned(a), _as_unsigned(b), np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, y, zero) - np.where(b < 0, x, zero)
    return high.view(a.dtype)


def divide_integers(a: Array, b: Array) -> Array:
    """Towards zero; all ones where b is 0, as the hardware gives."""
    nonzero = np.where(b == 0, b.dtype.type(1), b)
    quotient = (a - np.fmod(a, nonzero)) // nonzero
    return np.where(b == 0, ~b, quotient)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of a; all ones where b is 0."""
    return np.where(b == 0, ~b, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def absolute_difference_sum(a: Array, b: Array, c: Array) -> Array:
    return np.maximum(a, b) - np.minimum(a, b) + c


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """bfe: the sign of a signed field is extended."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    rest = np.maximum(_bits(a) - length.astype(np.int64), 0)
    return shift_right(shift_left(shift_right(a, position), rest), rest)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low bits of a put into b."""
    position, length = position & np.uint32(255), length & np.uint32(255)
    ones = np.full(1, ~a.dtype.type(0))
    mask = shift_left(~shift_left(ones, length), position)
    return (b & ~mask) | (shift_left(a, position) & mask)


def count_ones(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
    return np.unpackbits(octets, axis=1).sum(1, dtype=np.uint32)


def count_leading_zeros(a: Array) -> Array:
    for distance in (1, 2, 4, 8, 16, 32):
        if distance < _bits(a):
            a = a | a >> a.dtype.type(distance)
    return count_ones(~a)


def leading_bit_shift(a: Array) -> Array:
    """The shift that brings the leading bit (of a signed number: non-sign bit) to the top."""
    if a.dtype.kind == "i":
        a = a ^ (a >> (_bits(a) - 1))
    return np.where(a == 0, np.uint32(0xFFFFFFFF), count_leading_zeros(_as_unsigned(a)))


def find_leading_bit(a: Array) -> Array:
    """Its position; all ones where there is none."""
    shift = leading_bit_shift(a)
    return np.where(shift == 0xFFFFFFFF, shift, np.uint32(_bits(a) - 1) - shift)


def reverse_bits(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
    mirrored = np.packbits(np.unpackbits(octets, axis=1), axis=1, bitorder="little")
    return np.ascontiguousarray(mirrored[:, ::-1]).view(a.dtype)[:, 0]


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: bit 4a + 2b + c of the table."""
    result = a & ~a & b & c
    for row in range(8):
        if table >> row & 1:
            result = result | (
                (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            )
    return result


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: bytes of {b, a}; bit 3 of a selector replicates the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(1, np.uint32)
    for byte in range(4):
        pick = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        octet = (both >> (8 * (pick & np.uint32(7))).astype(np.uint64)).astype(np.uint8)
        sign = (octet.view(np.int8) >> 7).view(np.uint8)
        octet = np.where(pick & np.uint32(8), sign, octet)
        result = result | octet.astype(np.uint32) << np.uint32(8 * byte)
    return result


def _funnel(low: Array, high: Array) -> Array:
    return high.astype(np.uint64) << np.uint64(32) | low


def funnel_left(low: Array, high: Array, count: Array) -> Array:
    """The upper word of {high, low} << count, count at most 32."""
    return (_funnel(low, high) << count.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def funnel_right(low: Array, high: Array, count: Array) -> Array:
    """The lower word of {high, low} >> count, count at most 32."""
    return (_funnel(low, high) >> count.astype(np.uint64)).astype(np.uint32)


# Floating point.


def quiet(result: Array) -> Array:
    """NaNs that arithmetic makes are 0x7fffffff (0x7fff in 16 bits); float64 keeps numpy's."""
    if result.dtype.itemsize < 8 and (nan := np.isnan(result)).any():
        return np.where(nan, _QUIET_NAN[result.dtype.itemsize], result)
    return result


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once to float32.

    The product is exact in float64. The sum is rounded to odd there (Boldo & Melquiond, 2008), so
    that the final rounding of its 53 bits to 24 is that of the exact sum.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    return _add_to_odd(product, addend).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once to float64 (Boldo & Melquiond, 2008), in rationals at the extremes."""
    a, b, c = np.broadcast_arrays(a, b, c)
    product, low = _two_product(a, b)
    sum_low, rest_low = _two_sum(c, low)
    high, rest = _two_sum(product, sum_low)
    result = high + _add_to_odd(rest, rest_low)

    finite = np.isfinite(a) & np.isfinite(b)
    plain = ~(finite & np.isfinite(c)) | (a == 0) | (b == 0)
    # The exact product of finite factors does not overflow, product does.
    result = np.where(plain, np.where(finite & ~np.isfinite(c), c, product + c), result)
    exponents = np.stack([np.frexp(x)[1] for x in (a, b, c)])
    for lane in np.flatnonzero(~plain & (np.abs(exponents) > 240).any(0)):
        result[lane] = _fma_exactly(float(a[lane]), float(b[lane]), float(c[lane]))
    return result


def _fma_exactly(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    sign = -1.0 if exact < 0 else 1.0
    try:
        return sign * float(abs(exact))
    except OverflowError:
        return sign * np.inf


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _split(a: Array) -> tuple[Array, Array]:
    """Veltkamp's halves, of 26 bits each."""
    big = a * 134217729.0
    high = big - (big - a)
    return high, a - high


def _add_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64; where that is inexact, the neighbour whose last bit is 1."""
    total, error = _two_sum(a, b)
    raw = total.view(np.int64)
    move = (error != 0) & ((raw & 1) == 0) & np.isfinite(total)
    outwards = np.where((error > 0) == (total > 0), 1, -1)
    return (raw + np.where(move, outwards, 0)).view(np.float64)


def minimum(a: Array, b: Array) -> Array:
    """The number where the other is NaN; -0 below +0."""
    zeros = (a == 0) & (b == 0)
    signed = (_as_unsigned(a) | _as_unsigned(b)).view(a.dtype)
    return np.where(zeros, signed, quiet(np.fmin(a, b)))


def maximum(a: Array, b: Array) -> Array:
    zeros = (a == 0) & (b == 0)
    signed = (_as_unsigned(a) & _as_unsigned(b)).view(a.dtype)
    return np.where(zeros, signed, quiet(np.fmax(a, b)))


def minimum_or_nan(a: Array, b: Array) -> Array:
    return quiet(np.where(np.isnan(a) | np.isnan(b), a + b, minimum(a, b)))


def maximum_or_nan(a: Array, b: Array) -> Array:
    return quiet(np.where(np.isnan(a) | np.isnan(b), a + b, maximum(a, b)))


def _sign_bit(a: Array) -> np.unsignedinteger:
    return np.dtype(f"u{a.dtype.itemsize}").type(1 << (_bits(a) - 1))


def negate_float(a: Array) -> Array:
    return (_as_unsigned(a) ^ _sign_bit(a)).view(a.dtype)


def absolute_float(a: Array) -> Array:
    return (_as_unsigned(a) & ~_sign_bit(a)).view(a.dtype)


def copy_sign(a: Array, b: Array) -> Array:
    """The sign of a on the magnitude of b."""
    return np.copysign(b, a)


# Conversions.


def round_to_bfloat16(x: Array) -> Array:
    """Bits of float32 values rounded to nearest even."""
    raw = x.view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + (raw >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def truncate_to_bfloat16(x: Array) -> Array:
    raw = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), raw)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def toward_zero(rounded: Array, exact: Array) -> Array:
    """The value next to `rounded` towards zero where rounding went away from zero."""
    away = np.abs(rounded.astype(np.float64)) > np.abs(exact.astype(np.float64))
    return np.where(away, np.nextafter(rounded, rounded.dtype.type(0)), rounded)


def to_integer(x: Array, dtype: np.dtype) -> Array:
    """Integral floats to integers, clamped; what a NaN becomes is in the ISA's table for cvt."""
    limits = np.iinfo(dtype)
    wide = x.astype(np.float64)
    inside = (wide > float(limits.min)) & (wide < float(limits.max))
    result = np.where(inside, wide, 0).astype(dtype)
    result = np.where(wide >= float(limits.max), dtype.type(limits.max), result)
    result = np.where(wide <= float(limits.min), dtype.type(limits.min), result)
    top = 1 << (8 * dtype.itemsize - 1)
    from_nan = top if x.dtype.itemsize == 8 or dtype.itemsize == 8 else 0
    return np.where(np.isnan(x), np.array(from_nan, f"u{dtype.itemsize}").view(dtype), result)


def pack_halves(high: Array, low: Array) -> Array:
    """Two 16-bit patterns as one word."""
    return _as_unsigned(high).astype(np.uint32) << np.uint32(16) | _as_unsigned(low)
