"""Operands of statements: every register, constant and symbol gets a slot of the register file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from ptx.datatypes import datatype, unsigned
from ptx.errors import Unsupported

SPECIALS = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid"),
)
_NAME = re.compile(r"[%$A-Za-z_][\w$.]*")
_INTEGER = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?")
_HEX_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def split_list(text: str) -> tuple[str, ...]:
    """The operands of a statement: commas inside braces and brackets do not separate."""
    return tuple(part.strip() for part in re.findall(r"(?:[^,{\[]|\{[^}]*\}|\[[^\]]*\])+", text))


def parse_integer(text: str) -> int:
    """The value of an integer literal."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise Unsupported(f"{text} is no integer literal")
    sign, digits = match.groups()
    octal = re.fullmatch(r"0[0-7]+", digits)
    return (-1 if sign == "-" else 1) * (int(digits, 8) if octal else int(digits, 0))


def parse_constant(text: str, dtype: np.dtype) -> np.ndarray:
    """An immediate as an array of one value."""
    bits = unsigned(dtype)
    match = _HEX_FLOAT.fullmatch(text)
    if match is not None:
        digits = match[1] or match[2]
        if len(digits) != 2 * dtype.itemsize:
            raise Unsupported(f"{text} is no constant of {8 * dtype.itemsize} bits")
        return np.array([int(digits, 16)], bits).view(dtype)
    if dtype.kind == "b":
        return np.array([parse_integer(text) != 0])
    if dtype.kind == "f" and dtype.itemsize > 2:
        return np.array([float(text)], dtype)
    return np.array([parse_integer(text) % (1 << 8 * dtype.itemsize)], bits).view(dtype)


@dataclass(frozen=True)
class Address:
    """A base in a slot and a constant offset."""

    slot: int
    offset: int


@dataclass
class Operands:
    """The register file of a kernel while its statements are read.

    Attributes:
        widths: for each slot the unsigned type of its size, or bool.
        constants: slots that hold a constant.
        specials: slots that the machine fills, by name.
        symbols: addresses of variables and parameters, each in its own space.
        granules: the smallest access to each space, in bytes.
    """

    symbols: dict[str, int]
    widths: list[np.dtype] = field(default_factory=list)
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    specials: dict[str, int] = field(default_factory=dict)
    granules: dict[str, int] = field(default_factory=dict)
    _scopes: list[dict[str, int]] = field(default_factory=lambda: [{}])
    _read: dict[int, str] = field(default_factory=dict)
    _written: set[int] = field(default_factory=set)

    def open_scope(self) -> None:
        self._scopes.append({})

    def close_scope(self) -> None:
        self._scopes.pop()

    def declare(self, type_name: str, names: str) -> None:
        """`.reg` of these names; `%r<9>` stands for %r0 to %r8."""
        for name in split_list(names):
            family = re.fullmatch(r"(.+)<(\d+)>", name)
            for one in [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]:
                self._scopes[-1][one] = self._slot(unsigned(datatype(type_name)))

    def read(self, text: str, dtype: np.dtype, wider: bool = False) -> int:
        """Slot of a source; `wider`: a register may have more bits than the type."""
        slot = self._register(text)
        if slot is None:
            return self._constant(text, dtype)
        self._check_width(text, slot, dtype, wider)
        self._read.setdefault(slot, text)
        return slot

    def write(self, text: str, dtype: np.dtype, wider: bool = False) -> int:
        """Slot of a destination."""
        slot = self._register(text)
        if slot is None or text in self.specials:
            raise Unsupported(f"{text} is no declared register")
        self._check_width(text, slot, dtype, wider)
        self._written.add(slot)
        return slot

    def address(self, text: str, space: str, size: int) -> Address:
        """`[base+offset]` of an access of so many bytes."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise Unsupported(f"{text} is no address of the form [base+offset]")
        self.granules[space] = min(self.granules.get(space, size), size)
        base, offset = match.groups()
        slot = self._register(base)
        dtype = datatype("u64") if slot is None else self.widths[slot]
        return Address(self.read(base, dtype), parse_integer(offset or "0"))

    def check_all_written(self) -> None:
        never = [name for slot, name in self._read.items() if slot not in self._written]
        if never:
            raise Unsupported(f"register {never[0]} is read and nothing ever writes it")

    def _register(self, text: str) -> int | None:
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        if text in SPECIALS:
            if text not in self.specials:
                self.specials[text] = self._slot(datatype("u32"))
                self._written.add(self.specials[text])
            return self.specials[text]
        return None

    def _constant(self, text: str, dtype: np.dtype) -> int:
        if text in self.symbols:
            value = np.array([self.symbols[text]], "u8").astype(unsigned(dtype)).view(dtype)
        elif text == "WARP_SZ":
            value = np.array([32], dtype)
        elif _NAME.fullmatch(text):
            raise Unsupported(f"{text} is no declared register or variable")
        else:
            value = parse_constant(text, dtype)
        slot = self._slot(unsigned(dtype))
        self._written.add(slot)
        self.constants[slot] = value
        return slot

    def _slot(self, width: np.dtype) -> int:
        self.widths.append(width)
        return len(self.widths) - 1

    def _check_width(self, text: str, slot: int, dtype: np.dtype, wider: bool) -> None:
        width = self.widths[slot]
        fits = width.itemsize >= dtype.itemsize if wider else width.itemsize == dtype.itemsize
        if not fits or (width.kind == "b") != (dtype.kind == "b"):
            raise Unsupported(f"{text} does not have the size of a {dtype} operand")
