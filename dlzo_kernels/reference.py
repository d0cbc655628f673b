"""Noise v1 and its application, in numpy: the definition that every backend equals bit for bit.

And attention over trees and RMS norms, which the kernels equal to rounding. Arrays only; written to
be read. The tests call its functions; its constants are also those of the Triton kernels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = tuple[npt.NDArray[np.uint32], ...]

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85


def _f32(hexadecimal: str) -> np.float32:
    return np.float32(float.fromhex(hexadecimal))


# log(m) = m' + m'^2 P(m'), m' = m - 1, m in [2/3, 4/3); highest power first.
LOG = [
    _f32(c)
    for c in (
        *("-0x1.0e2994p-3", "0x1.1df3acp-3", "-0x1.f03c90p-4", "0x1.1ef186p-3", "-0x1.55b7e4p-3"),
        *("0x1.99ce44p-3", "-0x1.fffe5ep-3", "0x1.55550cp-2", "-0x1p-1"),
    )
]
LN2 = _f32("0x1.62e430p-1")
# sin(pi/4 z) = z S(z^2) and cos(pi/4 z) = C(z^2) for |z| <= 1; highest power first.
SIN = [_f32(c) for c in ("-0x1.2d9bb8p-15", "0x1.465ec6p-9", "-0x1.4abbbap-4", "0x1.921fb6p-1")]
COS = [
    _f32(c)
    for c in ("0x1.d9f7bap-19", "-0x1.55c664p-12", "0x1.03c1dep-6", "-0x1.3bd3ccp-2", "0x1p0")
]


def philox4x32(counter: Words, seed: int) -> Words:
    """Philox4x32-10 (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: four uint32 arrays of one shape.
        seed: the 64-bit key.

    Returns:
        Four uint32 arrays of that shape.
    """
    key = seed & 0xFFFFFFFF, seed >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = (p1 >> np.uint64(32)).astype(np.uint32) ^ c1 ^ np.uint32(key[0])
        c2 = (p0 >> np.uint64(32)).astype(np.uint32) ^ c3 ^ np.uint32(key[1])
        c1, c3 = p1.astype(np.uint32), p0.astype(np.uint32)
        key = (key[0] + WEYL[0]) & 0xFFFFFFFF, (key[1] + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(
    index: npt.NDArray[np.uint64], seed: int, stream: int = 0, query: int = 0
) -> npt.NDArray[np.uint32]:
    """The pair of words that each element's normal is made of: uint32, shape (..., 2).

    Elements 4b and 4b + 1 share words 0 and 1 of block b, elements 4b + 2 and 4b + 3 words 2 and 3.
    """
    block = index >> np.uint64(2)
    w = philox4x32(
        (
            block.astype(np.uint32),
            (block >> np.uint64(32)).astype(np.uint32),
            np.full(index.shape, stream, np.uint32),
            np.full(index.shape, query, np.uint32),
        ),
        seed,
    )
    second_pair = (index & np.uint64(2)) != 0
    return np.stack([np.where(second_pair, w[2], w[0]), np.where(second_pair, w[3], w[1])], -1)


def _horner(coefficients: list[np.float32], x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    p = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = p * x + c
    return p


def radius(word: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32 rounded once, in float32."""
    u = word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = (u.view(np.uint32) - np.uint32(0x3F2AAAAB)).view(np.int32)
    exponent = (bits >> 23).astype(np.float32)
    mantissa = ((bits & 0x7FFFFF).view(np.uint32) + np.uint32(0x3F2AAAAB)).view(np.float32)
    m = mantissa - np.float32(1)
    log = exponent * LN2 + (_horner(LOG, m) * (m * m) + m)
    return np.sqrt(log * np.float32(-2))


def sincos(
    word: npt.NDArray[np.uint32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Sine and cosine of 2 pi word / 2^32, in float32."""
    quadrant = (word + np.uint32(0x20000000)) >> np.uint32(30)
    rest = (word - (quadrant << np.uint32(30))).view(np.int32)
    z = rest.astype(np.float32) * np.float32(2.0**-29)
    odd, even = _horner(SIN, z * z) * z, _horner(COS, z * z)
    swap = (quadrant & 1) != 0
    sin, cos = np.where(swap, even, odd), np.where(swap, odd, even)
    return (
        np.where((quadrant & 2) != 0, -sin, sin),
        np.where(((quadrant + np.uint32(1)) & 2) != 0, -cos, cos),
    )


def gaussian(
    index: npt.NDArray[np.uint64], seed: int, stream: int = 0, query: int = 0
) -> npt.NDArray[np.float32]:
    """z of the elements with these logical indices: float32, of the shape of `index`.

    Box-Muller: the even element of a pair takes the cosine, the odd one the sine.
    """
    w = words(index, seed, stream, query)
    sin, cos = sincos(w[..., 1])
    return radius(w[..., 0]) * np.where((index & np.uint64(1)) != 0, sin, cos)


def element_index(
    shape: tuple[int, ...], offset: int = 0, row_stride: int | None = None
) -> npt.NDArray[np.uint64]:
    """Logical index of each element: offset + row * row_stride + column, uint64, of this shape."""
    columns = shape[-1] if shape else 1
    flat = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64)
    stride = columns if row_stride is None else row_stride
    row, column = np.divmod(flat, np.uint64(max(columns, 1)))
    return (np.uint64(offset) + row * np.uint64(stride) + column).reshape(shape)


def to_bfloat16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16, to nearest even; a NaN is made quiet."""
    u = x.view(np.uint32)
    rounded = u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
    return (np.where(np.isnan(x), u | np.uint32(0x400000), rounded) >> np.uint32(16)).astype(
        np.uint16
    )


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def perturb(
    base: npt.NDArray[np.float32], z: npt.NDArray[np.float32], scale: float
) -> npt.NDArray[np.float32]:
    """base + scale * z: the product rounded to float32, then the sum; storing rounds once more."""
    return base + np.float32(scale) * z


def rms_norm(
    x: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], eps: float
) -> npt.NDArray[np.float64]:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension; the quotient is rounded first."""
    return weight * (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def visible_tokens(parents: list[int], window: int | None = None) -> npt.NDArray[np.bool_]:
    """Which tokens each one attends to: bool, shape (tokens, tokens), its own in its row.

    Itself, its parent, the parent's parent and so on, `window` of them at most.
    """
    seen = np.zeros((len(parents), len(parents)), bool)
    for token in range(len(parents)):
        at, left = token, len(parents) if window is None else window
        while at >= 0 and left > 0:
            seen[token, at] = True
            at, left = parents[at], left - 1
    return seen


def tree_attention(
    query: npt.NDArray[np.float64],
    key: npt.NDArray[np.float64],
    value: npt.NDArray[np.float64],
    seen: npt.NDArray[np.bool_],
    scale: float,
    softcap: float | None = None,
) -> npt.NDArray[np.float64]:
    """softmax(scale * q k) v over the tokens that each one sees: shape (..., tokens, value size).

    The three have the shape (batch, heads, tokens, size); key and value may have fewer heads, each
    for as many heads of the query that stand side by side.
    """
    group = query.shape[1] // key.shape[1]
    key, value = np.repeat(key, group, 1), np.repeat(value, group, 1)
    scores = scale * query @ np.swapaxes(key, -1, -2)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value
