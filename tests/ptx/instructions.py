"""The simulated subset of PTX: every opcode in one table, with a small function that does it.

An opcode is in the subset if one of the patterns below spells it, exactly: `{a,b,}` stands for any
one of its alternatives. Anything else is refused when the kernel is parsed. Refused for a reason:

* `.approx`, `.ftz`, `.full`: no IEEE 754 result.
* `add`, `sub`, `mul` of floats without `.rn`: ptxas may contract them to fused multiply-adds.
* floating-point atomics: their result depends on an order that nobody defines.
* `call`, `brx.idx`, `isspacep`, `fence`, `cp.async`, `mbarrier`, clusters, volatile and acquire
  loads: not needed so far.

Stricter than hardware: a barrier that only some of a CTA's threads reach is a fault, even where the
others have returned. Defined where PTX leaves it open: integer division by zero gives all ones;
registers start as 0xA5 bytes; `neg.f32` and `abs.f32` change the sign of a NaN and nothing else.
"""

from __future__ import annotations

import enum
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ptx import arithmetic as a
from ptx.datatypes import datatype, unsigned, widened
from ptx.errors import InactiveLane, Unsupported
from ptx.memory import SPACES, generic_address
from ptx.operands import Operands, parse_integer, split_list
from ptx.statement import Statement

if TYPE_CHECKING:
    from ptx.machine import Machine

Array = np.ndarray
Mask = Array | None  # None: every thread that is alive
Execute = Callable[["Machine", Mask], None]


class Kind(enum.Enum):
    """What the scheduler has to know of an instruction."""

    PLAIN = enum.auto()
    BRANCH = enum.auto()
    EXIT = enum.auto()
    BARRIER = enum.auto()  # all threads of a CTA
    COLLECTIVE = enum.auto()  # the lanes of a warp that the mask in `members` names


@dataclass
class Instruction:
    """A decoded statement."""

    statement: Statement
    kind: Kind = Kind.PLAIN
    execute: Execute | None = None
    members: int | None = None
    label: str | None = None
    target: int = -1
    guard: int | None = None
    guard_negated: bool = False


Decoder = Callable[[Statement, Operands], Instruction]
TABLE: dict[str, Decoder] = {}


def decode(statement: Statement, operands: Operands) -> Instruction:
    """The instruction of a statement.

    Raises:
        Unsupported: the opcode is outside the table, or the operands do not fit it.
    """
    opcode = statement.opcode
    if re.search(r"\.(approx|ftz|full)\b", opcode):
        raise Unsupported(f"{statement}: {opcode} has no IEEE 754 result")
    if opcode not in TABLE:
        raise Unsupported(f"{statement}: {opcode} is outside the simulated subset")
    try:
        instruction = TABLE[opcode](statement, operands)
        if statement.guard is not None:
            instruction.guard_negated = statement.guard.startswith("!")
            instruction.guard = operands.read(statement.guard.lstrip("!"), datatype("pred"))
    except (Unsupported, ValueError) as error:
        raise Unsupported(f"{statement}: {error}") from None
    return instruction


def _expand(pattern: str) -> list[str]:
    """Every opcode that a pattern spells."""
    parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", pattern)]
    return ["".join(choice) for choice in product(*parts)]


def _decoder(*patterns: str) -> Callable[[Decoder], Decoder]:
    def register(decoder: Decoder) -> Decoder:
        for pattern in patterns:
            for opcode in _expand(pattern):
                assert opcode not in TABLE, opcode
                TABLE[opcode] = decoder
        return decoder

    return register


# Pure instructions: a numpy function of the sources.


def _signature(opcode: str, signature: str) -> tuple[list[str], str]:
    """Types of the sources and of the result: T is the opcode's last type, D its next to last, W
    twice as wide as T, anything else itself.
    """
    parts = opcode.split(".")
    names = {"T": parts[-1], "D": parts[-2]}
    if "W" in signature:
        names["W"] = f"{parts[-1][0]}{2 * int(parts[-1][1:])}"
    sources, result = signature.split("->")
    return [names.get(name, name) for name in sources.split()], names.get(
        result.strip(), result.strip()
    )


def _pure(*patterns: str, signature: str, convert: bool = False) -> Callable:
    """Register a function of arrays; `imm` in the signature is passed as an integer.

    `convert`: registers may be wider than the types, as PTX allows for cvt.
    """

    def register(function: Callable[..., Array]) -> Callable[..., Array]:
        def decoder(statement: Statement, operands: Operands) -> Instruction:
            return _decode_pure(statement, operands, function, signature, convert)

        _decoder(*patterns)(decoder)
        return function

    return register


def _decode_pure(
    statement: Statement,
    operands: Operands,
    function: Callable[..., Array],
    signature: str,
    convert: bool,
) -> Instruction:
    source_types, result_type = _signature(statement.opcode, signature)
    destination, *texts = statement.operands
    if len(texts) != len(source_types):
        raise Unsupported(f"{len(source_types)} source operands expected")
    slot = operands.write(destination, datatype(result_type), convert)
    sources, negated, immediates = [], [], []
    for text, name in zip(texts, source_types, strict=True):
        if name == "imm":
            immediates.append(parse_integer(text))
            continue
        negated.append(name == "pred" and text.startswith("!"))
        dtype = datatype(name)
        sources.append((operands.read(text[negated[-1] :], dtype, convert), dtype))

    narrow = [operands.widths[s] != unsigned(d) for s, d in sources]
    width = operands.widths[slot]
    extend = (
        widened(result_type, width) if width.itemsize > datatype(result_type).itemsize else None
    )
    if any(narrow) or any(negated) or immediates or extend is not None:
        function = _adapted(function, sources, narrow, negated, immediates, extend)
        sources = [
            (s, operands.widths[s] if n else d) for (s, d), n in zip(sources, narrow, strict=True)
        ]

    def execute(machine: Machine, mask: Mask) -> None:
        registers = machine.registers
        values = []
        for source, dtype in sources:
            value = registers[source]
            values.append(value if value.dtype is dtype else value.view(dtype))
        machine.write(slot, function(*values), mask)

    return Instruction(statement, execute=execute)


def _adapted(
    function: Callable[..., Array],
    sources: list[tuple[int, np.dtype]],
    narrow: list[bool],
    negated: list[bool],
    immediates: list[int],
    extend: np.dtype | None,
) -> Callable[..., Array]:
    """The function with its sources cut or negated and its result extended as the operands ask."""

    def adapted(*values: Array) -> Array:
        cut = [
            value.astype(unsigned(dtype)).view(dtype) if n else value
            for value, (_, dtype), n in zip(values, sources, narrow, strict=True)
        ]
        cut = [~value if n else value for value, n in zip(cut, negated, strict=True)]
        result = function(*cut, *immediates)
        return result if extend is None else result.astype(extend)

    return adapted


def _quiet(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: a.quiet(function(*values))


_INTEGERS = "{u16,s16,u32,s32,u64,s64}"
_BITS = "{b16,b32,b64}"

for _name, _function in {
    "add": np.add,
    "sub": np.subtract,
    "mul.lo": np.multiply,
    "mul.hi": a.multiply_high,
    "min": np.minimum,
    "max": np.maximum,
    "div": a.divide_integers,
    "rem": a.remainder,
}.items():
    _pure(f"{_name}.{_INTEGERS}", signature="T T -> T")(_function)
_pure("mul.wide.{u16,s16,u32,s32}", signature="T T -> W")(a.multiply_wide)
_pure(f"mad.lo.{_INTEGERS}", signature="T T T -> T")(lambda x, y, z: x * y + z)
_pure(f"mad.hi.{_INTEGERS}", signature="T T T -> T")(lambda x, y, z: a.multiply_high(x, y) + z)
_pure("mad.wide.{u16,s16,u32,s32}", signature="T T W -> W")(
    lambda x, y, z: a.multiply_wide(x, y) + z
)
_pure(f"sad.{_INTEGERS}", signature="T T T -> T")(a.absolute_difference_sum)
_pure("neg.{s16,s32,s64}", signature="T -> T")(np.negative)
_pure("abs.{s16,s32,s64}", signature="T -> T")(np.abs)

for _name, _function in {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}.items():
    _pure(f"{_name}.{{b16,b32,b64,pred}}", signature="T T -> T")(_function)
_pure("not.{b16,b32,b64,pred}", signature="T -> T")(np.invert)
_pure(f"shl.{_BITS}", signature="T u32 -> T")(a.shift_left)
_pure(f"shr.{{b16,b32,b64,{_INTEGERS[1:]}", signature="T u32 -> T")(a.shift_right)
_pure("shf.l.wrap.b32", signature="T T u32 -> T")(
    lambda x, y, n: a.funnel_left(x, y, n & np.uint32(31))
)
_pure("shf.r.wrap.b32", signature="T T u32 -> T")(
    lambda x, y, n: a.funnel_right(x, y, n & np.uint32(31))
)
_pure("shf.l.clamp.b32", signature="T T u32 -> T")(
    lambda x, y, n: a.funnel_left(x, y, np.minimum(n, np.uint32(32)))
)
_pure("shf.r.clamp.b32", signature="T T u32 -> T")(
    lambda x, y, n: a.funnel_right(x, y, np.minimum(n, np.uint32(32)))
)
_pure("lop3.b32", signature="T T T imm -> T")(a.logic3)
_pure("prmt.b32", signature="T T T -> T")(a.permute_bytes)
_pure("bfe.{u32,s32,u64,s64}", signature="T u32 u32 -> T")(a.extract_field)
_pure("bfi.{b32,b64}", signature="T T u32 u32 -> T")(a.insert_field)
_pure("popc.{b32,b64}", signature="T -> u32")(a.count_ones)
_pure("clz.{b32,b64}", signature="T -> u32")(a.count_leading_zeros)
_pure("bfind.{u32,s32,u64,s64}", signature="T -> u32")(a.find_leading_bit)
_pure("bfind.shiftamt.{u32,s32,u64,s64}", signature="T -> u32")(a.leading_bit_shift)
_pure("brev.{b32,b64}", signature="T -> T")(a.reverse_bits)

for _name, _function in {
    "add.rn": np.add,
    "sub.rn": np.subtract,
    "mul.rn": np.multiply,
    "div.rn": np.divide,
}.items():
    _pure(f"{_name}.{{f32,f64}}", signature="T T -> T")(_quiet(_function))
_pure("sqrt.rn.{f32,f64}", signature="T -> T")(_quiet(np.sqrt))
_pure("rcp.rn.{f32,f64}", signature="T -> T")(_quiet(np.reciprocal))
_pure("fma.rn.f32", signature="T T T -> T")(_quiet(a.fma32))
_pure("fma.rn.f64", signature="T T T -> T")(a.fma64)
_pure("min.f64", signature="T T -> T")(a.minimum)
_pure("max.f64", signature="T T -> T")(a.maximum)
_pure("neg.{f32,f64}", signature="T -> T")(a.negate_float)
_pure("abs.{f32,f64}", signature="T -> T")(a.absolute_float)
_pure("copysign.{f32,f64}", signature="T T -> T")(a.copy_sign)


def _two_or_three(opcode: str, function: Callable[[Array, Array], Array]) -> None:
    """min and max of float32 take a third source since sm_100."""

    def decoder(statement: Statement, operands: Operands) -> Instruction:
        signature = "T T T -> T" if len(statement.operands) == 4 else "T T -> T"
        return _decode_pure(statement, operands, lambda *v: reduce(function, v), signature, False)

    _decoder(opcode)(decoder)


_two_or_three("min.f32", a.minimum)
_two_or_three("max.f32", a.maximum)
_two_or_three("min.NaN.f32", a.minimum_or_nan)
_two_or_three("max.NaN.f32", a.maximum_or_nan)
# Blackwell: a 16-bit operand of a float32 sum, and pairs of float32.
_pure("add.rn.f32.bf16", signature="T D -> D")(lambda x, y: a.quiet(a.from_bfloat16(x) + y))
_pure("sub.rn.f32.bf16", signature="T D -> D")(lambda x, y: a.quiet(a.from_bfloat16(x) - y))
_pure("add.rn.f32.f16", signature="T D -> D")(lambda x, y: a.quiet(x.astype(np.float32) + y))
_pure("sub.rn.f32.f16", signature="T D -> D")(lambda x, y: a.quiet(x.astype(np.float32) - y))


def _on_pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    def paired(*values: Array) -> Array:
        result = function(
            *(v.view(np.float32).reshape(-1, 2) for v in map(np.ascontiguousarray, values))
        )
        return np.ascontiguousarray(a.quiet(result)).view(np.uint64)[:, 0]

    return paired


_pure("add.rn.f32x2", signature="T T -> T")(_on_pairs(np.add))
_pure("sub.rn.f32x2", signature="T T -> T")(_on_pairs(np.subtract))
_pure("mul.rn.f32x2", signature="T T -> T")(_on_pairs(np.multiply))
_pure("fma.rn.f32x2", signature="T T T -> T")(_on_pairs(a.fma32))

# Comparison and selection.

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _nan(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


def _register_comparison(name: str, types: str, compare: Callable[..., Array]) -> None:
    _pure(f"setp.{name}.{types}", signature="T T -> pred")(compare)
    for combination, combine in _COMBINE.items():
        _pure(f"setp.{name}.{combination}.{types}", signature="T T pred -> pred")(
            lambda x, y, p, combine=combine: combine(compare(x, y), p)
        )


for _name, _compare in _ORDERED.items():
    _register_comparison(_name, "{u16,s16,u32,s32,u64,s64}", _compare)
    if _name in ("eq", "ne"):
        _register_comparison(_name, "{b16,b32,b64}", _compare)
    _register_comparison(
        f"{_name}u", "{f32,f64}", lambda x, y, compare=_compare: compare(x, y) | _nan(x, y)
    )
    if _name != "ne":
        _register_comparison(_name, "{f32,f64}", _compare)
for _name, _compare in _UNSIGNED.items():
    _register_comparison(_name, "{u16,u32,u64}", _compare)
_register_comparison("ne", "{f32,f64}", lambda x, y: (x != y) & ~_nan(x, y))
_register_comparison("num", "{f32,f64}", lambda x, y: ~_nan(x, y))
_register_comparison("nan", "{f32,f64}", _nan)
_pure("selp.{b16,b32,b64,u16,s16,u32,s32,u64,s64,f32,f64}", signature="T T pred -> T")(
    lambda x, y, p: np.where(p, x, y)
)

# Conversions.

_ALL_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _register_conversion(opcode: str, function: Callable[[Array], Array]) -> None:
    _pure(opcode, signature="T -> D", convert=True)(function)


def _truncated(dtype: np.dtype) -> Callable[[Array], Array]:
    return lambda x: a.quiet(a.toward_zero(x.astype(dtype), x))


for _to in _ALL_INTEGERS:
    _dtype = datatype(_to)
    for _from in _ALL_INTEGERS:
        _register_conversion(f"cvt.{_to}.{_from}", lambda x, dtype=_dtype: x.astype(dtype))
    for _mode, _function in _ROUND.items():
        _register_conversion(
            f"cvt.{_mode}.{_to}.{{f32,f64}}",
            lambda x, function=_function, dtype=_dtype: a.to_integer(function(x), dtype),
        )
    _register_conversion(f"cvt.rn.f32.{_to}", lambda x: x.astype(np.float32))
    _register_conversion(f"cvt.rn.f64.{_to}", lambda x: x.astype(np.float64))
for _mode, _function in _ROUND.items():
    _register_conversion(f"cvt.{_mode}.f32.f32", _quiet(_function))
    _register_conversion(f"cvt.{_mode}.f64.f64", _function)
_register_conversion("cvt.f64.f32", lambda x: x.astype(np.float64))
_register_conversion("cvt.f32.f16", lambda x: a.quiet(x.astype(np.float32)))
_register_conversion("cvt.f32.bf16", a.from_bfloat16)
_register_conversion("cvt.rn.f32.f64", lambda x: a.quiet(x.astype(np.float32)))
_register_conversion("cvt.rn.f16.f32", lambda x: a.quiet(x.astype(np.float16)))
_register_conversion("cvt.rn.bf16.f32", a.round_to_bfloat16)
# Rounded towards zero: not in our kernels, but in their mutants.
_register_conversion("cvt.rz.f32.{u16,s16,u32,s32,f64}", _truncated(np.dtype("f4")))
_register_conversion("cvt.rz.f16.f32", _truncated(np.dtype("f2")))
_register_conversion("cvt.rz.bf16.f32", a.truncate_to_bfloat16)
for _mode in ("rn", "rz"):
    for _pair, _one in (("f16x2", "f16"), ("bf16x2", "bf16")):
        _half = {
            ("rn", "f16"): lambda x: a.quiet(x.astype(np.float16)),
            ("rz", "f16"): _truncated(np.dtype("f2")),
            ("rn", "bf16"): a.round_to_bfloat16,
            ("rz", "bf16"): a.truncate_to_bfloat16,
        }[_mode, _one]
        _pure(f"cvt.{_mode}.{_pair}.f32", signature="T T -> D")(
            lambda x, y, half=_half: a.pack_halves(half(x), half(y))
        )


# Moves and addresses.


@_decoder("mov.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64,pred}")
def _mov(statement: Statement, operands: Operands) -> Instruction:
    destination, source = statement.operands
    dtype = datatype(statement.opcode.split(".")[-1])
    if destination.startswith("{"):
        return _unpack(statement, operands, dtype)
    if source.startswith("{"):
        return _pack(statement, operands, dtype)
    slot, value = operands.write(destination, dtype), operands.read(source, dtype)

    def execute(machine: Machine, mask: Mask) -> None:
        machine.write(slot, machine.registers[value], mask)

    return Instruction(statement, execute=execute)


def _parts(text: str, dtype: np.dtype) -> tuple[list[str], np.dtype]:
    parts = split_list(text.strip("{} "))
    return list(parts), np.dtype(f"u{dtype.itemsize // len(parts)}")


def _unpack(statement: Statement, operands: Operands, dtype: np.dtype) -> Instruction:
    names, part = _parts(statement.operands[0], dtype)
    slots = [None if name == "_" else operands.write(name, part) for name in names]
    value = operands.read(statement.operands[1], unsigned(dtype))

    def execute(machine: Machine, mask: Mask) -> None:
        whole = machine.registers[value].view(unsigned(dtype))
        for index, slot in enumerate(slots):
            if slot is not None:
                shift = whole.dtype.type(8 * part.itemsize * index)
                machine.write(slot, (whole >> shift).astype(part), mask)

    return Instruction(statement, execute=execute)


def _pack(statement: Statement, operands: Operands, dtype: np.dtype) -> Instruction:
    slot, whole = operands.write(statement.operands[0], dtype), unsigned(dtype)
    names, part = _parts(statement.operands[1], dtype)
    sources = [operands.read(name, part) for name in names]

    def execute(machine: Machine, mask: Mask) -> None:
        result = np.zeros(1, whole)
        for index, source in enumerate(sources):
            shift = whole.type(8 * part.itemsize * index)
            result = result | machine.registers[source].view(part).astype(whole) << shift
        machine.write(slot, result, mask)

    return Instruction(statement, execute=execute)


for _space, _window in SPACES.items():
    _base = np.uint64(generic_address(_window))
    _pure(f"cvta.{_space}.u64", signature="T -> T")(lambda x, base=_base: x + base)
    _pure(f"cvta.to.{_space}.u64", signature="T -> T")(lambda x, base=_base: x - base)
_pure("cvta{,.to}.global.u64", signature="T -> T")(lambda x: x)

# Memory.

_ACCESS = "{b8,u8,s8,b16,u16,s16,f16,b32,u32,s32,f32,b64,u64,s64,f64}"
_VECTORS = "{,.v2,.v4,.v8}"
_LEVEL1 = (
    "{,.L1::evict_normal,.L1::evict_first,.L1::evict_last,.L1::evict_unchanged,.L1::no_allocate}"
)


@dataclass(frozen=True)
class _Access:
    """What the opcode of a load, store or atomic says."""

    space: str
    type_name: str
    count: int

    @classmethod
    def read(cls, opcode: str) -> _Access:
        parts = opcode.split(".")
        vector = next((p for p in parts if re.fullmatch(r"v\d", p)), "v1")
        spaces = [p for p in parts if p in (*SPACES, "global")]
        access = cls(spaces[0] if spaces else "generic", parts[-1], int(vector[1:]))
        if access.size > 32:
            raise Unsupported(f"an access of {access.size} bytes")
        return access

    @property
    def dtype(self) -> np.dtype:
        return datatype(self.type_name)

    @property
    def size(self) -> int:
        return self.count * self.dtype.itemsize

    def elements(self, text: str) -> tuple[str, ...]:
        names = split_list(text.strip("{} ")) if text.startswith("{") else (text,)
        if len(names) != self.count:
            raise Unsupported(f"{text} does not have {self.count} elements")
        return names


@_decoder(
    f"ld{{.param,.const,.local,.shared,}}{_VECTORS}.{_ACCESS}",
    f"ld.global{{,.ca,.cg,.cs,.lu,.cv,.nc}}{_LEVEL1}{_VECTORS}.{_ACCESS}",
)
def _ld(statement: Statement, operands: Operands) -> Instruction:
    access = _Access.read(statement.opcode)
    address = operands.address(statement.operands[1], access.space, access.size)
    slots = [
        operands.write(name, access.dtype, wider=True)
        for name in access.elements(statement.operands[0])
    ]
    extended = [
        widened(access.type_name, operands.widths[slot])
        if operands.widths[slot].itemsize > access.dtype.itemsize
        else access.dtype
        for slot in slots
    ]

    def execute(machine: Machine, mask: Mask) -> None:
        values = machine.load(access.space, address, access.dtype, access.count, mask)
        for index, (slot, dtype) in enumerate(zip(slots, extended, strict=True)):
            machine.write(slot, values[:, index].astype(dtype), mask)

    return Instruction(statement, execute=execute)


@_decoder(
    f"st{{.local,.shared,}}{_VECTORS}.{_ACCESS}",
    f"st.global{{,.wb,.cg,.cs,.wt}}{_LEVEL1}{_VECTORS}.{_ACCESS}",
)
def _st(statement: Statement, operands: Operands) -> Instruction:
    access = _Access.read(statement.opcode)
    address = operands.address(statement.operands[0], access.space, access.size)
    bits = unsigned(access.dtype)
    sources = [
        operands.read(name, access.dtype, wider=True)
        for name in access.elements(statement.operands[1])
    ]

    def execute(machine: Machine, mask: Mask) -> None:
        registers = machine.registers
        values = [registers[s].view(unsigned(registers[s].dtype)).astype(bits) for s in sources]
        machine.store(access.space, address, values, mask)

    return Instruction(statement, execute=execute)


_ATOMICS: dict[str, Callable] = {
    "add": operator.add,
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
}
_ORDER = "{,.relaxed,.acquire,.release,.acq_rel}{,.cta,.gpu,.sys}"
# Triton writes the scope first.
_SCOPE_FIRST = "{.cta,.gpu,.sys}{.relaxed,.acquire,.release,.acq_rel}"
_OPERATIONS = (
    "{min,max}.{u32,s32,u64,s64}",
    "add.{u32,s32,u64}",
    "{and,or,xor}.{b32,b64}",
)


@_decoder(
    *(
        f"{name}{order}{operation}"
        for operation in (*_OPERATIONS, "exch.{b32,b64}", "cas.{b32,b64}")
        for name, order in (
            (f"atom{_ORDER}", "{.global,.shared,}."),
            ("atom{.global,.shared,}", f"{_SCOPE_FIRST}."),
        )
    )
)
def _atom(statement: Statement, operands: Operands) -> Instruction:
    destination, address, *values = statement.operands
    access = _Access.read(statement.opcode)
    slot = None if destination == "_" else operands.write(destination, access.dtype)
    return _atomic(statement, operands, access, address, values, slot)


@_decoder(
    *(
        f"{name}{order}{operation}"
        for operation in _OPERATIONS
        for name, order in (
            (f"red{_ORDER}", "{.global,.shared,}."),
            ("red{.global,.shared,}", f"{_SCOPE_FIRST}."),
        )
    )
)
def _red(statement: Statement, operands: Operands) -> Instruction:
    address, *values = statement.operands
    access = _Access.read(statement.opcode)
    return _atomic(statement, operands, access, address, values, None)


def _atomic(
    statement: Statement,
    operands: Operands,
    access: _Access,
    address: str,
    texts: list[str],
    destination: int | None,
) -> Instruction:
    name = statement.opcode.split(".")[-2]
    at = operands.address(address, access.space, access.size)
    sources = [operands.read(text, access.dtype) for text in texts]
    if len(sources) != (2 if name == "cas" else 1):
        raise Unsupported("the wrong number of operands")

    def update(old: np.generic, *values: np.generic) -> np.generic:
        if name == "cas":
            return values[1] if old == values[0] else old
        return _ATOMICS[name](old, values[0])

    def execute(machine: Machine, mask: Mask) -> None:
        values = [machine.registers[source].view(access.dtype) for source in sources]
        old = machine.change(access.space, at, update, values, mask)
        if destination is not None:
            machine.write(destination, old, mask)

    return Instruction(statement, execute=execute)


# Control.


@_decoder("bra{,.uni}")
def _bra(statement: Statement, operands: Operands) -> Instruction:
    return Instruction(statement, Kind.BRANCH, label=statement.operands[0])


@_decoder("ret{,.uni}", "exit")
def _ret(statement: Statement, operands: Operands) -> Instruction:
    return Instruction(statement, Kind.EXIT)


@_decoder("bar{,.cta}.sync", "barrier{,.cta}.sync{,.aligned}")
def _bar(statement: Statement, operands: Operands) -> Instruction:
    if len(statement.operands) != 1:
        raise Unsupported("a barrier of some of the threads")
    parse_integer(statement.operands[0])
    return Instruction(statement, Kind.BARRIER)


# The lanes of a warp together. Registers are seen as (warps, 32).


def _members(operands: Operands, text: str) -> int:
    return operands.read(text, datatype("b32"))


@_decoder("bar.warp.sync")
def _bar_warp(statement: Statement, operands: Operands) -> Instruction:
    members = _members(operands, statement.operands[0])

    def execute(machine: Machine, mask: Mask) -> None:
        machine.order_warps(mask)

    return Instruction(statement, Kind.COLLECTIVE, execute, members)


@_decoder("activemask.b32")
def _activemask(statement: Statement, operands: Operands) -> Instruction:
    slot = operands.write(statement.operands[0], datatype("b32"))

    def execute(machine: Machine, mask: Mask) -> None:
        here = machine.alive if mask is None else mask
        machine.write(slot, np.repeat(pack_lanes(here), 32), mask)

    return Instruction(statement, execute=execute)


def pack_lanes(flags: Array) -> Array:
    """Bit i of word w is the flag of lane i of warp w."""
    return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]


def _shuffle_source(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The lane to take from, and whether it is in range; as in the ISA's pseudocode."""
    bound, segment, b = c & 31, c >> 8 & 31, b & 31
    first, last = lane & segment, (lane & segment) | (bound & ~segment)
    source = {
        "up": lane - b,
        "down": lane + b,
        "bfly": lane ^ b,
        "idx": first | (b & ~segment),
    }[mode]
    in_range = source >= last if mode == "up" else source <= last
    return np.where(in_range, source, lane), in_range


@_decoder("shfl.sync.{up,down,bfly,idx}.b32")
def _shfl(statement: Statement, operands: Operands) -> Instruction:
    destination, *texts, members = statement.operands
    mode = statement.opcode.split(".")[2]
    names = destination.split("|")
    slot = operands.write(names[0], datatype("b32"))
    flag = operands.write(names[1], datatype("pred")) if len(names) == 2 else None
    value, b, c = (operands.read(text, datatype("b32")) for text in texts)

    def execute(machine: Machine, mask: Mask) -> None:
        lane = machine.lane
        source, in_range = _shuffle_source(
            mode, lane, *(machine.registers[s].view(np.uint32).astype(np.int64) for s in (b, c))
        )
        here = machine.alive if mask is None else mask
        source = machine.index - lane + source
        if not here[source[here]].all():
            thread = machine.index[here][np.argmin(here[source[here]])]
            raise InactiveLane(
                f"{machine.place(thread)} takes from lane {source[thread] % 32},"
                " which does not take part"
            )
        given = np.broadcast_to(machine.registers[value], lane.shape)
        machine.write(slot, given[source], mask)
        if flag is not None:
            machine.write(flag, np.broadcast_to(in_range, lane.shape), mask)

    return Instruction(statement, Kind.COLLECTIVE, execute, _members(operands, members))


def _group(machine: Machine, members: int, mask: Mask) -> Array:
    """(warp, i, j): lane j takes part and is named by lane i's mask."""
    named = np.broadcast_to(machine.registers[members].view(np.uint32), machine.lane.shape)
    bits = named.reshape(-1, 32, 1) >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    here = machine.alive if mask is None else mask
    return bits.astype(bool) & here.reshape(-1, 1, 32)


def _collective(
    statement: Statement,
    operands: Operands,
    source: str,
    result: str,
    combine: Callable[[Array, Array], Array],
) -> Instruction:
    """d = combine((warp, i, j) group, (warp, j) values), one result per lane i."""
    destination, text, mask_text = statement.operands
    slot = operands.write(destination, datatype(result))
    negated = source == "pred" and text.startswith("!")
    dtype = datatype(source)
    value, members = operands.read(text[negated:], dtype), _members(operands, mask_text)

    def execute(machine: Machine, mask: Mask) -> None:
        values = np.broadcast_to(
            machine.registers[value].view(datatype(source)), machine.lane.shape
        )
        values = (~values if negated else values).reshape(-1, 32)
        group = _group(machine, members, mask)
        machine.write(slot, combine(group, values.reshape(-1, 32)).reshape(-1), mask)

    return Instruction(statement, Kind.COLLECTIVE, execute, members)


def _all_equal(group: Array, values: Array) -> Array:
    votes = values[:, None, :]
    return (votes | ~group).all(2) | ~(votes & group).any(2)


_VOTES = {
    "all.pred": lambda group, values: (values[:, None, :] | ~group).all(2),
    "any.pred": lambda group, values: (values[:, None, :] & group).any(2),
    "uni.pred": _all_equal,
    "ballot.b32": lambda group, values: pack_lanes(values[:, None, :] & group),
}
_IDENTITIES = {"add": 0, "or": 0, "xor": 0, "and": -1}


@_decoder("vote.sync.{all,any,uni}.pred", "vote.sync.ballot.b32")
def _vote(statement: Statement, operands: Operands) -> Instruction:
    _, mode = statement.opcode.split(".sync.")
    return _collective(statement, operands, "pred", mode.split(".")[1], _VOTES[mode])


@_decoder("match.{any,all}.sync.{b32,b64}")
def _match(statement: Statement, operands: Operands) -> Instruction:
    _, mode, _, type_name = statement.opcode.split(".")

    def combine(group: Array, values: Array) -> Array:
        same = group & (values[:, None, :] == values[:, :, None])
        if mode == "all":
            same &= (same == group).all(2, keepdims=True)
        return pack_lanes(same)

    return _collective(statement, operands, type_name, "b32", combine)


@_decoder(
    "redux.sync.{add,min,max}.{u32,s32}",
    "redux.sync.{and,or,xor}.b32",
    "redux.sync.{min,max}{,.NaN}.f32",
)
def _redux(statement: Statement, operands: Operands) -> Instruction:
    name, *nan, type_name = statement.opcode.split(".")[2:]
    if type_name == "f32":
        function = {
            "min": a.minimum_or_nan if nan else a.minimum,
            "max": a.maximum_or_nan if nan else a.maximum,
        }[name]
    else:
        function = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[name]

    def combine(group: Array, values: Array) -> Array:
        result = np.broadcast_to(values[:, :, None], group.shape)[:, :, 0]
        own = np.eye(32, dtype=bool)
        for lane in range(32):
            take = group[:, :, lane] & ~own[lane]
            result = np.where(take, function(result, values[:, lane, None]), result)
        return result

    return _collective(statement, operands, type_name, type_name, combine)
