"""The fundamental types of PTX and the numpy types that hold them."""

from __future__ import annotations

import numpy as np

from ptx.errors import Unsupported

# bfloat16 and the packed pairs stay raw bits: instructions.py unpacks them.
_TYPES = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
    "pred": np.dtype("?"),
}


def datatype(name: str) -> np.dtype:
    """The numpy type that holds a PTX type."""
    if name not in _TYPES:
        raise Unsupported(f"the type .{name} is not simulated")
    return _TYPES[name]


def unsigned(dtype: np.dtype) -> np.dtype:
    """The unsigned integer type of this size; bool stays bool."""
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


def widened(name: str, dtype: np.dtype) -> np.dtype:
    """The integer type of the size of `dtype` that extends type `name` by its own sign."""
    return np.dtype(f"{'i' if name[0] == 's' else 'u'}{dtype.itemsize}")
