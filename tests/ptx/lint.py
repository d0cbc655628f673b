"""What the PTX of a noise kernel must not hold, and what it must."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ptx.parser import entry_body

_UNROUNDED = re.compile(r"\b(?:add|sub|mul|mad|fma)\.(?:sat\.)?f(?:32|64|32x2)\b")
_INEXACT = re.compile(r"\b\w+(?:\.\w+)*\.(?:approx|ftz|full)\b[.\w]*")
_FUSED = re.compile(r"\b(?:fma|mad)(?:\.\w+)*\.(?:f16|bf16|f16x2|bf16x2|f32|f32x2|f64)\b")
_CONSTANT = re.compile(r"\b0[fFxX][0-9a-fA-F]+\b|(?<![\w.%$])-?\d+\b")


def inexact(ptx: str, entry: str | None = None) -> list[str]:
    """Instructions whose result IEEE 754 does not define, or that ptxas may fuse into one."""
    body = entry_body(ptx, entry)
    return _INEXACT.findall(body) + _UNROUNDED.findall(body)


def fused(ptx: str, entry: str | None = None) -> list[str]:
    """Fused multiply-adds of floats: noise v1 has none."""
    return _FUSED.findall(entry_body(ptx, entry))


def missing_words(ptx: str, expected: Iterable[int], entry: str | None = None) -> list[int]:
    """Which of these 32-bit words no constant of the entry spells: signed, unsigned or a float."""
    present = {_word(text) for text in _CONSTANT.findall(entry_body(ptx, entry))}
    return [word for word in expected if word not in present]


def missing_floats(ptx: str, expected: Iterable[float], entry: str | None = None) -> list[float]:
    """Which of these float32 values are no constant of the entry, up to sign.

    A kernel may keep some of its constants scaled: name those as it has them.
    """
    bits = {int(np.float32(abs(value)).view(np.uint32)): value for value in expected}
    present = {_word(text) & 0x7FFFFFFF for text in _CONSTANT.findall(entry_body(ptx, entry))}
    return [value for word, value in bits.items() if word not in present]


def _word(text: str) -> int:
    base = 16 if text[:2].lower() in ("0f", "0x") else 10
    return int(text[2:] if base == 16 else text, base) % (1 << 32)
