"""Where the noise shows the smallest errors: chosen words, and weights that cancel it.

Rounding to 16 bits hides the last bits of the noise. Weights that are the noise, rounded and
negated, leave the small difference, which has them; and some words show what others round away.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from bits import reference_perturb
from dlzo_kernels import reference

# Pairs of words (of the radius, of the angle) found by search: in one or the other of their two
# normals, each constant of noise v1 moved by one unit in the last place, up or down, changes the
# bits, raw and in every dtype where SCALE times the noise is cancelled; and so does the sign of the
# 1/2 of a word, and a quadrant that begins one word too early.
WORDS = (
    (0x00000000, 0x5FFFFFFF),
    (0xA9D7D600, 0x1FFFFFFF),
    (0x53E0B200, 0x1C6092E0),
    (0x00C91EA7, 0x1D9F3448),
    (0x00F509CE, 0x1C3A0798),
    (0x002988AD, 0x1D3A8490),
    (0x00157661, 0x191502B8),
)
SCALE = 0.75


def counter_of(words: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """The counter whose Philox words these are: ten rounds backwards."""
    c0, c1, c2, c3 = words
    m0, m1 = map(int, reference.MULTIPLIERS)
    size = 1 << 32
    for n in reversed(range(10)):
        k0, k1 = seed + n * reference.WEYL[0], (seed >> 32) + n * reference.WEYL[1]
        before0, before2 = c3 * pow(m0, -1, size) % size, c1 * pow(m1, -1, size) % size
        c1 = (c0 ^ (m1 * before2 >> 32) ^ k0) % size
        c3 = (c2 ^ (m0 * before0 >> 32) ^ k1) % size
        c0, c2 = before0, before2
    return c0, c1, c2, c3


def _place(words: tuple[int, int], odd: int) -> dict[str, int]:
    """Numbers of the noise whose first block, or second where odd is 1, has a pair twice."""
    for seed in count():
        low, high, stream, query = counter_of(words * 2, seed)
        if high < 1 << 30 and low % 2 == odd:
            offset = 4 * (high << 32 | low - odd)
            return {"seed": seed, "stream": stream, "query": query, "offset": offset}


# Each pair in the first and in the second half of a group of eight elements.
PLACES = [_place(words, odd) for words in WORDS for odd in (0, 1)]


def cancelled(length: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, int]]]:
    """Weights that SCALE * z nearly cancels, with the numbers of z; a pair lies in the first 8."""
    for numbers in PLACES:
        zero = torch.zeros(length)
        yield reference_perturb(zero, scale=-SCALE, dtype=dtype, **numbers), numbers
