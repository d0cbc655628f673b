"""The PTX simulator against values worked out by hand, and each of its checks against a fault."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from ptx import errors
from ptx.instructions import TABLE
from ptx.machine import launch
from ptx.memory import Memory
from ptx.parser import parse

INF, NAN = float("inf"), float("nan")
TOP = 1 << 31
# Bits of float32.
QUIET, ONE, TINY = 0x7FFFFFFF, 0x3F800000, 0x00000001


def module(body: str, parameters: str = "", outside: str = "") -> str:
    return f"""
.version 8.0
.target sm_80
.address_size 64
{outside}
.visible .entry kernel({parameters})
{{
    .reg .pred %p<10>;
    .reg .b16 %h<10>;
    .reg .b32 %r<20>;
    .reg .b64 %d<20>;
    mov.u32 %r0, %tid.x;
    {body}
    ret;
}}
"""


POINTERS = ".param .u64 in, .param .u64 out"


def run(
    body: str,
    data: np.ndarray | None = None,
    *,
    result: np.ndarray | None = None,
    outside: str = "",
    **sizes: object,
) -> np.ndarray:
    """Run a body with %d0 the address of `data` and %d1 that of the result, both also of thread
    x's own 32-bit word: %d2 and %d3.
    """
    prologue = """
    ld.param.u64 %d0, [in];
    ld.param.u64 %d1, [out];
    mad.wide.u32 %d2, %r0, 4, %d0;
    mad.wide.u32 %d3, %r0, 4, %d1;
    """
    kernel = parse(module(prologue + body, POINTERS, outside))
    memory = Memory()
    data = np.zeros(64, np.uint32) if data is None else data
    result = np.zeros(64, np.uint32) if result is None else result
    sizes = {"grid": 1, "block": 32, **sizes}
    launch(kernel, memory, [memory.add(data, "data"), memory.add(result, "result")], **sizes)
    return result


# Every opcode: rows of sources and result. A float stands for itself, an integer for bits.

BITS = {"f32x2": 64, "pred": 8, "b16": 16, "bf16": 16, "f16": 16}
FLOATS = {"f16": "f2", "f32": "f4", "f64": "f8"}


def width(name: str) -> int:
    return BITS.get(name) or int(name.lstrip("busf"))


def raw(value: float | int | tuple[float, float], name: str) -> int:
    """Bits of a value of a type."""
    if isinstance(value, tuple):
        return raw(value[0], "f32") | raw(value[1], "f32") << 32
    if isinstance(value, float):
        return int(np.array(value, FLOATS[name]).view(f"u{width(name) // 8}"))
    return value % (1 << width(name))


def evaluate(opcode: str, types: list[str], rows: list[tuple]) -> np.ndarray:
    """Run one instruction, a thread per row; raw bits of the results."""
    *sources, result = types
    body, names = "", []
    for index, name in enumerate(sources):
        bits = width(name)
        body += f".reg .b{max(bits, 16)} %s{index}; .reg .pred %q{index};"
        body += f"ld.param.u64 %d0, [a{index}]; mad.wide.u32 %d0, %r0, {bits // 8}, %d0;"
        body += f"ld.global.b{bits} %s{index}, [%d0];"
        if name == "pred":
            body += f"setp.ne.b16 %q{index}, %s{index}, 0;"
        names.append(f"%{'q' if name == 'pred' else 's'}{index}")
    out = width(result)
    body += f".reg .b{max(out, 16)} %o; .reg .pred %po;"
    body += f"{opcode} {'%po' if result == 'pred' else '%o'}, {', '.join(names)};"
    if result == "pred":
        body += "selp.b16 %o, 1, 0, %po;"
    body += f"ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r0, {out // 8}, %d1;"
    body += f"st.global.b{out} [%d1], %o;"
    parameters = ", ".join([*(f".param .u64 a{i}" for i in range(len(sources))), ".param .u64 out"])

    memory, addresses = Memory(), []
    for column, name in zip(zip(*rows, strict=True), sources, strict=False):
        array = np.array([raw(v, name) for v in column], f"u{width(name) // 8}")
        addresses.append(memory.add(array, name))
    results = np.zeros(len(rows), f"u{out // 8}")
    addresses.append(memory.add(results, "results"))
    launch(parse(module(body, parameters)), memory, addresses, grid=1, block=len(rows))
    return results


CASES = {
    # Integers: wrap-around, signs, upper halves.
    "add.u32": ("u32 u32 u32", [(0xFFFFFFFF, 2, 1), (7, 8, 15)]),
    "add.s32": ("s32 s32 s32", [(0x7FFFFFFF, 1, TOP), (-5, 3, -2)]),
    "add.s64": ("s64 s64 s64", [(2**63 - 1, 1, 2**63), (-1, 1, 0)]),
    "add.u16": ("u16 u16 u16", [(0xFFFF, 1, 0)]),
    "sub.s32": ("s32 s32 s32", [(TOP, 1, 0x7FFFFFFF), (3, 5, -2)]),
    "sub.u64": ("u64 u64 u64", [(0, 1, 2**64 - 1)]),
    "mul.lo.s32": ("s32 s32 s32", [(0x10001, 0x10001, 0x20001), (-3, 5, -15)]),
    "mul.lo.u16": ("u16 u16 u16", [(0x101, 0x101, 0x201)]),
    "mul.lo.s64": ("s64 s64 s64", [(2**33, 2**31, 0), (-3, 5, -15)]),
    "mul.hi.u32": ("u32 u32 u32", [(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE), (TOP, 2, 1), (9, 9, 0)]),
    "mul.hi.s32": ("s32 s32 s32", [(-1, 1, -1), (TOP, TOP, 0x40000000), (-1, -1, 0)]),
    "mul.hi.u64": (
        "u64 u64 u64",
        [(2**64 - 1, 2**64 - 1, 2**64 - 2), (2**63, 2, 1), (0xFFFFFFFF, 2**32 + 1, 0)],
    ),
    "mul.hi.s64": ("s64 s64 s64", [(-1, 1, -1), (-(2**63), -(2**63), 2**62), (-1, -1, 0)]),
    "mul.hi.u16": ("u16 u16 u16", [(0xFFFF, 0xFFFF, 0xFFFE)]),
    "mul.wide.u32": ("u32 u32 u64", [(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE00000001)]),
    "mul.wide.s32": ("s32 s32 s64", [(-1, 0x7FFFFFFF, -0x7FFFFFFF)]),
    "mul.wide.u16": ("u16 u16 u32", [(0xFFFF, 0xFFFF, 0xFFFE0001)]),
    "mad.lo.s32": ("s32 s32 s32 s32", [(0x10001, 0x10001, -1, 0x20000)]),
    "mad.hi.u32": ("u32 u32 u32 u32", [(TOP, 4, 5, 7)]),
    "mad.wide.u32": ("u32 u32 u64 u64", [(0xFFFFFFFF, 2, 2, 2**33)]),
    "mad.wide.s32": ("s32 s32 s64 s64", [(-1, 2, 1, -1)]),
    "mad.lo.u64": ("u64 u64 u64 u64", [(2**63, 2, 9, 9)]),
    "sad.u32": ("u32 u32 u32 u32", [(3, 10, 1, 8), (10, 3, 1, 8)]),
    "sad.s32": ("s32 s32 s32 s32", [(-3, 4, 1, 8)]),
    "div.s32": ("s32 s32 s32", [(-7, 2, -3), (7, -2, -3), (7, 2, 3), (5, 0, -1), (TOP, -1, TOP)]),
    "div.u32": ("u32 u32 u32", [(0xFFFFFFFF, 2, 0x7FFFFFFF), (5, 0, -1)]),
    "div.u64": ("u64 u64 u64", [(2**64 - 1, 10, (2**64 - 1) // 10)]),
    "div.s64": ("s64 s64 s64", [(-(2**62) - 1, 2, -(2**61))]),
    "rem.s32": ("s32 s32 s32", [(-7, 2, -1), (7, -2, 1), (5, 0, -1)]),
    "rem.u64": ("u64 u64 u64", [(2**64 - 1, 10, 5)]),
    "neg.s32": ("s32 s32", [(5, -5), (TOP, TOP)]),
    "abs.s32": ("s32 s32", [(-5, 5), (TOP, TOP)]),
    "neg.s64": ("s64 s64", [(5, -5)]),
    "min.s32": ("s32 s32 s32", [(-1, 1, -1)]),
    "min.u32": ("u32 u32 u32", [(-1, 1, 1)]),
    "max.s32": ("s32 s32 s32", [(-1, 1, 1)]),
    "max.u32": ("u32 u32 u32", [(-1, 1, -1)]),
    "max.u64": ("u64 u64 u64", [(-1, 1, -1)]),
    "min.s64": ("s64 s64 s64", [(-1, 1, -1)]),
    # Bits.
    "and.b32": ("b32 b32 b32", [(0xF0F0, 0xFF00, 0xF000)]),
    "or.b64": ("b64 b64 b64", [(1, 2**63, 2**63 + 1)]),
    "xor.b16": ("b16 b16 b16", [(0xFF, 0xFFFF, 0xFF00)]),
    "and.pred": ("pred pred pred", [(1, 1, 1), (1, 0, 0), (0, 0, 0)]),
    "or.pred": ("pred pred pred", [(1, 1, 1), (1, 0, 1), (0, 0, 0)]),
    "xor.pred": ("pred pred pred", [(1, 1, 0), (1, 0, 1), (0, 0, 0)]),
    "not.pred": ("pred pred", [(1, 0), (0, 1)]),
    "not.b32": ("b32 b32", [(0xF0F0, 0xFFFF0F0F)]),
    "shl.b32": ("b32 u32 b32", [(3, 31, TOP), (3, 32, 0), (3, 0xFFFFFFFF, 0), (3, 0, 3)]),
    "shl.b64": ("b64 u32 b64", [(3, 63, 2**63), (3, 64, 0)]),
    "shl.b16": ("b16 u32 b16", [(3, 15, 0x8000), (3, 16, 0)]),
    "shr.u32": ("u32 u32 u32", [(TOP, 31, 1), (TOP, 32, 0), (TOP, 64, 0)]),
    "shr.s32": ("s32 u32 s32", [(-8, 1, -4), (-8, 32, -1), (8, 99, 0)]),
    "shr.u64": ("u64 u32 u64", [(2**63, 63, 1), (2**63, 64, 0)]),
    "shr.s64": ("s64 u32 s64", [(-(2**63), 63, -1), (-(2**63), 200, -1)]),
    "shr.b16": ("b16 u32 b16", [(0x8000, 15, 1)]),
    "shf.l.wrap.b32": ("b32 b32 u32 b32", [(0x80000001, 2, 1, 5), (1, 2, 33, 4), (1, 2, 32, 2)]),
    "shf.r.wrap.b32": ("b32 b32 u32 b32", [(2, 1, 1, TOP + 1), (2, 1, 33, TOP + 1)]),
    "shf.l.clamp.b32": ("b32 b32 u32 b32", [(9, 2, 32, 9), (9, 2, 77, 9), (0, 2, 1, 4)]),
    "shf.r.clamp.b32": ("b32 b32 u32 b32", [(9, 2, 32, 2), (9, 2, 77, 2), (2, 1, 1, TOP + 1)]),
    "prmt.b32": (
        "b32 b32 b32 b32",
        [
            (0x33221100, 0x77665544, 0x7650, 0x77665500),
            (0x33221100, 0x77665544, 0x0123, 0x00112233),
            (0x00000080, 0x0000007F, 0xC8C8, 0x00FF00FF),
            (0x00000080, 0x0000007F, 0xFFFF8000, 0xFF808080),
        ],
    ),
    "bfe.u32": (
        "u32 u32 u32 u32",
        [(0xABCD1234, 8, 8, 0x12), (0xABCD1234, 28, 8, 0xA), (5, 0, 0, 0), (-1, 0, 32, -1)],
    ),
    "bfe.s32": (
        "s32 u32 u32 s32",
        [(0xF0, 4, 4, -1), (0x70, 4, 4, 7), (TOP, 31, 8, -1), (TOP, 40, 3, -1), (-1, 3, 0, 0)],
    ),
    "bfe.u64": ("u64 u32 u32 u64", [(0xAB << 40, 40, 8, 0xAB)]),
    "bfe.s64": ("s64 u32 u32 s64", [(0xAB << 40, 40, 8, -0x55)]),
    "bfi.b32": (
        "b32 b32 u32 u32 b32",
        [(0xFF, 0, 4, 4, 0xF0), (0, -1, 28, 8, 0x0FFFFFFF), (7, 9, 0, 0, 9), (7, 9, 40, 3, 9)],
    ),
    "bfi.b64": ("b64 b64 u32 u32 b64", [(0xAB, 0, 60, 8, 0xB << 60)]),
    "popc.b32": ("b32 u32", [(0, 0), (0xFFFFFFFF, 32), (0x80000001, 2)]),
    "popc.b64": ("b64 u32", [(2**64 - 1, 64), (2**63, 1)]),
    "clz.b32": ("b32 u32", [(0, 32), (1, 31), (TOP, 0), (0x00010000, 15)]),
    "clz.b64": ("b64 u32", [(0, 64), (2**40, 23)]),
    "brev.b32": ("b32 b32", [(1, TOP), (0x0000F00D, 0xB00F0000)]),
    "brev.b64": ("b64 b64", [(1, 2**63), (2, 2**62)]),
    "bfind.u32": ("u32 u32", [(0, -1), (1, 0), (TOP, 31)]),
    "bfind.s32": ("s32 u32", [(-1, -1), (-5, 2), (4, 2), (TOP, 30)]),
    "bfind.shiftamt.u32": ("u32 u32", [(0, -1), (1, 31), (TOP, 0)]),
    # float32: signed zeros, infinities, subnormals, the NaN that arithmetic makes.
    "add.rn.f32": (
        "f32 f32 f32",
        [
            (1.0, 2.0**-24, 1.0),
            (1.0 + 2.0**-23, 2.0**-24, 1.0 + 2.0**-22),
            (1.0, 2.0**-24 + 2.0**-40, 1.0 + 2.0**-23),
            (-0.0, -0.0, -0.0),
            (1.0, -1.0, 0.0),
            (2.0**-149, 2.0**-149, 2.0**-148),
            (2.0**-126, -(2.0**-149), 0x007FFFFF),
            (3.4028234663852886e38, 3.4028234663852886e38, INF),
            (INF, -INF, QUIET),
            (0xFFC12345, 1.0, QUIET),
        ],
    ),
    "sub.rn.f32": ("f32 f32 f32", [(0.0, 0.0, 0.0), (-0.0, 0.0, -0.0), (INF, INF, QUIET)]),
    "mul.rn.f32": (
        "f32 f32 f32",
        [
            (2.0**-75, 2.0**-75, 0.0),
            (2.0**-75, 1.5 * 2.0**-75, TINY),
            (-(2.0**-149), 0.5, -0.0),
            (1.5 * 2.0**-148, 0.5, 2.0**-148),
            (0.0, INF, QUIET),
            (1.0 + 2.0**-23, 1.0 + 2.0**-23, 1.0 + 2.0**-22),
            (2.0**127, 2.0, INF),
        ],
    ),
    "div.rn.f32": (
        "f32 f32 f32",
        [(1.0, 3.0, 0x3EAAAAAB), (1.0, -0.0, -INF), (0.0, 0.0, QUIET), (2.0**-149, 2.0, 0.0)],
    ),
    "sqrt.rn.f32": ("f32 f32", [(2.0, 0x3FB504F3), (-0.0, -0.0), (-1.0, QUIET), (INF, INF)]),
    "rcp.rn.f32": ("f32 f32", [(3.0, 0x3EAAAAAB), (-0.0, -INF), (INF, 0.0)]),
    "fma.rn.f32": (
        "f32 f32 f32 f32",
        [
            # The sum in float64 is a tie that the exact sum is not.
            (
                2.0**-14 * (1 + 2.0**-23),
                1 - 2.0**-23,
                2.0**10 * (1 + 2.0**-23),
                2.0**10 * (1 + 2.0**-23),
            ),
            (
                -(2.0**-14) * (1 + 2.0**-23),
                1 - 2.0**-23,
                2.0**10 * (1 + 2.0**-22),
                2.0**10 * (1 + 2.0**-22),
            ),
            # In float64 it is inexact one unit above a tie, the last bit set.
            (8391461 * 2.0**-47, 8385756 * 2.0**-23, 1.0, 1 + 2.0**-23),
            (1.0 + 2.0**-12, 1.0 + 2.0**-12, -(1.0 + 2.0**-11), 2.0**-24),
            (2.0**-100, 2.0**-100, TINY, TINY),
            (2.0**-100, -(2.0**-100), TINY, TINY),
            (2.0**-75, 2.0**-75, 0.0, 0.0),
            (2.0**-75, 2.0**-75, 2.0**-149, 2.0**-148),
            (-1.0, 0.0, 0.0, 0.0),
            (-1.0, 0.0, -0.0, -0.0),
            (2.0**127, 2.0, -(2.0**127), 2.0**127),
            (INF, 0.0, 1.0, QUIET),
            (INF, 1.0, -INF, QUIET),
            (2.0**127, 2.0, INF, INF),
        ],
    ),
    "min.f32": (
        "f32 f32 f32",
        [(0.0, -0.0, -0.0), (-0.0, 0.0, -0.0), (NAN, 1.0, 1.0), (NAN, 0xFFC00001, QUIET)],
    ),
    "max.f32": (
        "f32 f32 f32",
        [(0.0, -0.0, 0.0), (-0.0, 0.0, 0.0), (1.0, NAN, 1.0), (-0.0, -0.0, -0.0), (1.0, 2.0, 2.0)],
    ),
    "min.NaN.f32": ("f32 f32 f32", [(NAN, 1.0, QUIET), (0.0, -0.0, -0.0)]),
    "max.NaN.f32": ("f32 f32 f32", [(1.0, 0xFFC00001, QUIET), (0.0, -0.0, 0.0), (1.0, 2.0, 2.0)]),
    "neg.f32": ("f32 f32", [(0.0, -0.0), (1.5, -1.5), (0x7FC00001, 0xFFC00001)]),
    "abs.f32": ("f32 f32", [(-0.0, 0.0), (-INF, INF), (0xFFC00001, 0x7FC00001)]),
    "copysign.f32": ("f32 f32 f32", [(-0.0, 3.0, -3.0), (1.0, -3.0, 3.0)]),
    "add.rn.f32x2": ("f32x2 f32x2 f32x2", [((1.0, -0.0), (2.0**-24, -0.0), (1.0, -0.0))]),
    "sub.rn.f32x2": ("f32x2 f32x2 f32x2", [((1.0, INF), (2.0, 1.0), (-1.0, INF))]),
    "mul.rn.f32x2": ("f32x2 f32x2 f32x2", [((3.0, -2.0), (2.0, 4.0), (6.0, -8.0))]),
    "fma.rn.f32x2": (
        "f32x2 f32x2 f32x2 f32x2",
        [((3.0, -1.0), (2.0, 0.0), (-6.0, -0.0), (0.0, -0.0))],
    ),
    "add.rn.f32.bf16": ("bf16 f32 f32", [(0x3F80, 2.0**-24, 1.0), (0x7FC0, 1.0, QUIET)]),
    "sub.rn.f32.bf16": ("bf16 f32 f32", [(0x3F80, 3.0, -2.0)]),
    "add.rn.f32.f16": ("f16 f32 f32", [(0x3C00, 3.0, 4.0), (0x0001, 0.0, 2.0**-24)]),
    "sub.rn.f32.f16": ("f16 f32 f32", [(0x3C00, 3.0, -2.0)]),
    # float64.
    "add.rn.f64": ("f64 f64 f64", [(1.0, 2.0**-53, 1.0), (-0.0, -0.0, -0.0)]),
    "sub.rn.f64": ("f64 f64 f64", [(1.0, 2.0**-54, 1.0)]),
    "mul.rn.f64": ("f64 f64 f64", [(2.0**-600, 2.0**-600, 0.0), (3.0, -2.0, -6.0)]),
    "div.rn.f64": ("f64 f64 f64", [(1.0, 3.0, 0x3FD5555555555555), (-1.0, 0.0, -INF)]),
    "sqrt.rn.f64": ("f64 f64", [(2.0, 0x3FF6A09E667F3BCD), (-0.0, -0.0)]),
    "rcp.rn.f64": ("f64 f64", [(3.0, 0x3FD5555555555555)]),
    "fma.rn.f64": (
        "f64 f64 f64 f64",
        [
            (1.0 + 2.0**-27, 1.0 + 2.0**-27, -(1.0 + 2.0**-26), 2.0**-54),
            (
                2.0**-54 * (1 + 2.0**-52),
                1 - 2.0**-52,
                1 + 2.0**-52,
                1 + 2.0**-52,
            ),
            (2.0**-600, 2.0**-600, 2.0**-1074, 2.0**-1074),
            (2.0**-537, 2.0**-537, 2.0**-1074, 2.0**-1073),
            (2.0**-600, -(2.0**-600), 0.0, -0.0),
            (2.0**1000, 2.0**1000, -INF, -INF),
            (2.0**1023, 2.0, -(2.0**1023), 2.0**1023),
            (2.0**1023, -2.0, 0.0, -INF),
            (3.0, 5.0, 0.0, 15.0),
            (-1.0, 0.0, 0.0, 0.0),
        ],
    ),
    "min.f64": ("f64 f64 f64", [(0.0, -0.0, -0.0), (NAN, 1.0, 1.0)]),
    "max.f64": ("f64 f64 f64", [(0.0, -0.0, 0.0), (NAN, 1.0, 1.0)]),
    "neg.f64": ("f64 f64", [(0.0, -0.0)]),
    "abs.f64": ("f64 f64", [(-2.5, 2.5)]),
    "copysign.f64": ("f64 f64 f64", [(-0.0, 3.0, -3.0)]),
    # Comparison and selection.
    "setp.lt.s32": ("s32 s32 pred", [(-1, 0, 1), (0, 0, 0)]),
    "setp.lt.u32": ("u32 u32 pred", [(-1, 0, 0), (0, 1, 1)]),
    "setp.lo.u32": ("u32 u32 pred", [(0, 1, 1), (1, 1, 0)]),
    "setp.ls.u32": ("u32 u32 pred", [(1, 1, 1), (2, 1, 0)]),
    "setp.hi.u32": ("u32 u32 pred", [(-1, 1, 1), (1, 1, 0)]),
    "setp.hs.u64": ("u64 u64 pred", [(-1, 1, 1), (1, 1, 1)]),
    "setp.ge.s64": ("s64 s64 pred", [(-1, 0, 0), (0, 0, 1)]),
    "setp.gt.u16": ("u16 u16 pred", [(0xFFFF, 1, 1), (1, 1, 0)]),
    "setp.eq.b32": ("b32 b32 pred", [(5, 5, 1), (5, 6, 0)]),
    "setp.ne.b64": ("b64 b64 pred", [(5, 5, 0), (5, 2**40 + 5, 1)]),
    "setp.le.s32": ("s32 s32 pred", [(-1, -1, 1), (0, -1, 0)]),
    "setp.eq.f32": ("f32 f32 pred", [(0.0, -0.0, 1), (NAN, NAN, 0)]),
    "setp.ne.f32": ("f32 f32 pred", [(1.0, 2.0, 1), (NAN, 1.0, 0), (1.0, 1.0, 0)]),
    "setp.lt.f32": ("f32 f32 pred", [(-INF, 0.0, 1), (NAN, 1.0, 0)]),
    "setp.ge.f64": ("f64 f64 pred", [(1.0, 1.0, 1), (NAN, 1.0, 0)]),
    "setp.equ.f32": ("f32 f32 pred", [(NAN, 1.0, 1), (2.0, 1.0, 0)]),
    "setp.neu.f32": ("f32 f32 pred", [(NAN, NAN, 1), (1.0, 1.0, 0)]),
    "setp.ltu.f32": ("f32 f32 pred", [(1.0, NAN, 1), (2.0, 1.0, 0)]),
    "setp.leu.f32": ("f32 f32 pred", [(1.0, NAN, 1), (1.0, 1.0, 1), (2.0, 1.0, 0)]),
    "setp.gtu.f32": ("f32 f32 pred", [(1.0, NAN, 1), (1.0, 1.0, 0), (2.0, 1.0, 1)]),
    "setp.geu.f64": ("f64 f64 pred", [(1.0, NAN, 1), (1.0, 1.0, 1), (0.0, 1.0, 0)]),
    "setp.num.f32": ("f32 f32 pred", [(1.0, NAN, 0), (1.0, INF, 1)]),
    "setp.nan.f32": ("f32 f32 pred", [(1.0, NAN, 1), (1.0, INF, 0)]),
    "setp.lt.and.s32": ("s32 s32 pred pred", [(0, 1, 1, 1), (0, 1, 0, 0), (1, 0, 1, 0)]),
    "setp.eq.or.f32": ("f32 f32 pred pred", [(NAN, 1.0, 1, 1), (NAN, 1.0, 0, 0)]),
    "setp.eq.xor.u32": ("u32 u32 pred pred", [(1, 1, 1, 0), (1, 2, 1, 1)]),
    "selp.b32": ("b32 b32 pred b32", [(1, 2, 1, 1), (1, 2, 0, 2)]),
    "selp.f64": ("f64 f64 pred f64", [(1.0, 2.0, 1, 1.0), (1.0, 2.0, 0, 2.0)]),
    "selp.b16": ("b16 b16 pred b16", [(1, 2, 0, 2)]),
    # Conversions.
    "cvt.u64.u32": ("u32 u64", [(-1, 0xFFFFFFFF)]),
    "cvt.s64.s32": ("s32 s64", [(-1, -1)]),
    "cvt.u32.u64": ("u64 u32", [(2**40 + 7, 7)]),
    "cvt.u16.u32": ("u32 u16", [(0x12345, 0x2345)]),
    "cvt.u32.u16": ("u16 u32", [(0xFFFF, 0xFFFF)]),
    "cvt.s32.s16": ("s16 s32", [(0xFFFF, -1)]),
    "cvt.s32.s8": ("u32 s32", [(0x1280, -128), (0x127F, 127)]),
    "cvt.u32.u8": ("u32 u32", [(0x1280, 0x80)]),
    "cvt.rn.f32.s32": ("s32 f32", [(-1, -1.0), (2**24 + 1, 2.0**24), (2**24 + 3, 2.0**24 + 4)]),
    "cvt.rn.f32.u32": ("u32 f32", [(-1, 2.0**32), (0xFFFFFF7F, 0x4F7FFFFF), (0, 0.0)]),
    "cvt.rn.f32.u64": (
        "u64 f32",
        [(-1, 2.0**64), (2**63 + 2**39, 2.0**63), (2**63 + 2**39 + 1, 2.0**63 + 2.0**40)],
    ),
    "cvt.rn.f32.s64": ("s64 f32", [(-(2**63), -(2.0**63)), (2**24 + 1, 2.0**24)]),
    "cvt.rn.f64.s64": ("s64 f64", [(2**53 + 1, 2.0**53), (-1, -1.0)]),
    "cvt.rn.f64.u64": ("u64 f64", [(2**63 + 2**10, 2.0**63), (2**63 + 2**10 + 1, 2.0**63 + 2**11)]),
    "cvt.rn.f64.s32": ("s32 f64", [(-7, -7.0)]),
    "cvt.rn.f64.u32": ("u32 f64", [(-1, 2.0**32 - 1)]),
    "cvt.rz.f32.u32": ("u32 f32", [(-1, 0x4F7FFFFF), (5, 5.0)]),
    "cvt.rz.f32.s32": ("s32 f32", [(-(2**24) - 3, -(2.0**24) - 2)]),
    "cvt.rz.f32.f64": ("f64 f32", [(1 - 2.0**-30, 1 - 2.0**-24), (1e300, 0x7F7FFFFF)]),
    "cvt.rzi.s32.f32": (
        "f32 s32",
        [(-1.9, -1), (1.9, 1), (3e9, 0x7FFFFFFF), (-INF, TOP), (NAN, 0), (-0.5, 0)],
    ),
    "cvt.rzi.u32.f32": ("f32 u32", [(-1.0, 0), (4294967040.0, 0xFFFFFF00), (1e10, -1), (NAN, 0)]),
    "cvt.rzi.s64.f32": ("f32 s64", [(1e30, 2**63 - 1), (-1e30, -(2**63)), (NAN, 2**63)]),
    "cvt.rzi.u64.f64": ("f64 u64", [(2.0**63, 2**63), (1e30, -1), (NAN, 2**63), (-3.0, 0)]),
    "cvt.rni.s32.f32": ("f32 s32", [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2)]),
    "cvt.rmi.s32.f32": ("f32 s32", [(-0.5, -1), (0.5, 0)]),
    "cvt.rpi.s32.f64": ("f64 s32", [(-0.5, 0), (0.5, 1), (NAN, TOP)]),
    "cvt.rzi.u8.f32": ("f32 u32", [(300.0, 255), (-4.0, 0), (7.9, 7)]),
    "cvt.rni.f32.f32": ("f32 f32", [(2.5, 2.0), (-0.5, -0.0)]),
    "cvt.rzi.f32.f32": ("f32 f32", [(-2.5, -2.0)]),
    "cvt.rmi.f32.f32": ("f32 f32", [(-2.5, -3.0)]),
    "cvt.rpi.f64.f64": ("f64 f64", [(2.25, 3.0)]),
    "cvt.f64.f32": ("f32 f64", [(0.1, float(np.float32(0.1))), (TINY, 2.0**-149)]),
    "cvt.rn.f32.f64": (
        "f64 f32",
        [(1 + 2.0**-24, 1.0), (1 + 2.0**-24 + 2.0**-50, 1 + 2.0**-23), (1e300, INF), (NAN, QUIET)],
    ),
    "cvt.f32.f16": ("f16 f32", [(0x0001, 2.0**-24), (0xFC00, -INF), (0xFE01, QUIET)]),
    "cvt.f32.bf16": ("bf16 f32", [(0x3F80, 1.0), (0x0001, 2.0**-133), (0xFF80, -INF)]),
    "cvt.rn.f16.f32": (
        "f32 f16",
        [
            (1 + 2.0**-11, 0x3C00),
            (1 + 3 * 2.0**-11, 0x3C02),
            (65519.99, 0x7BFF),
            (65520.0, 0x7C00),
            (2.0**-25, 0x0000),
            (2.0**-25 + 2.0**-40, 0x0001),
            (-(2.0**-26), 0x8000),
            (0xFFC00001, 0x7FFF),
        ],
    ),
    "cvt.rz.f16.f32": ("f32 f16", [(1 + 2.0**-10 - 2.0**-20, 0x3C00), (-1e9, 0xFBFF)]),
    "cvt.rn.bf16.f32": (
        "f32 bf16",
        [
            (1 + 2.0**-8, 0x3F80),
            (1 + 3 * 2.0**-8, 0x3F82),
            (0x3F808001, 0x3F81),
            (0x7F7FFFFF, 0x7F80),
            (0x00008000, 0x0000),
            (0x00008001, 0x0001),
            (0xFF800001, 0x7FFF),
            (-0.0, 0x8000),
        ],
    ),
    "cvt.rz.bf16.f32": ("f32 bf16", [(0x3F80FFFF, 0x3F80), (0xFFFFFFFF, 0x7FFF)]),
    "cvt.rn.bf16x2.f32": ("f32 f32 b32", [(2.0, 1 + 2.0**-8, 0x40003F80)]),
    "cvt.rn.f16x2.f32": ("f32 f32 b32", [(2.0, 65520.0, 0x40007C00)]),
    "cvt.rz.bf16x2.f32": ("f32 f32 b32", [(2.0, 0x3F80FFFF, 0x40003F80)]),
    "cvt.rz.f16x2.f32": ("f32 f32 b32", [(2.0, -1e9, 0x4000FBFF)]),
    "mov.b32": ("b32 b32", [(0xDEADBEEF, 0xDEADBEEF)]),
}


@pytest.mark.parametrize("opcode", CASES)
def test_values_worked_out_by_hand(opcode):
    signature, rows = CASES[opcode]
    types = signature.split()
    results = evaluate(opcode, types, rows)
    expected = [raw(row[-1], types[-1]) for row in rows]
    assert [hex(r) for r in results.tolist()] == [hex(e) for e in expected]


def test_a_16_bit_result_is_extended_into_a_wider_register():
    assert (
        run(
            "ld.global.s8 %r1, [%d0]; st.global.u32 [%d3], %r1;",
            np.array([0x80] * 4, "u1"),
            block=1,
        )[0]
        == 0xFFFFFF80
    )
    assert (
        run(
            "ld.global.u8 %r1, [%d0]; st.global.u32 [%d3], %r1;",
            np.array([0x80] * 4, "u1"),
            block=1,
        )[0]
        == 0x80
    )
    assert run("cvt.s8.s32 %r1, 0x180; st.global.u32 [%d3], %r1;", block=1)[0] == 0xFFFFFF80


def test_lop3_follows_its_table():
    for table in (0x00, 0xFF, 0x96, 0xE8, 0x1B, 0xCA):
        body = f"""
        mov.b32 %r1, 0xF0; mov.b32 %r2, 0xCC; mov.b32 %r3, 0xAA;
        lop3.b32 %r4, %r1, %r2, %r3, {table}; st.global.u32 [%d3], %r4;
        """
        assert run(body)[0] & 0xFF == table


def test_max_of_three():
    body = "max.f32 %r1, 0f3F800000, 0fC0000000, 0f40000000; st.global.b32 [%d3], %r1;"
    assert run(body).view(np.float32)[0] == 2.0


def rounded(exact: Fraction, digits: int, least: int) -> float:
    """The nearest float of so many binary digits whose last is at least 2^least, ties to even."""
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    return float(round(exact / unit) * unit)


@pytest.mark.parametrize(("name", "digits", "least"), [("f32", 24, -149), ("f64", 53, -1074)])
def test_fma_is_rounded_once(name, digits, least):
    """Few bits, many exponents: cancellation, ties and near-ties are common."""
    rng = np.random.default_rng(0)
    dtype = FLOATS[name]
    mantissa = 1 + rng.choice([0, 1, 2, 3, -1, 2 ** (digits // 2)], (3, 1000)) * 2.0 ** (1 - digits)
    # The widest exponents: products below and above the normal range.
    reach = 40 if name == "f32" else 300
    exponent = rng.integers(-reach, reach, (3, 1000))
    near = rng.random(1000) < 0.7
    exponent[2] = np.where(
        near, exponent[0] + exponent[1] + rng.integers(-3, 60, 1000), exponent[2]
    )
    a, b, c = (rng.choice([-1, 1], (3, 1000)) * np.ldexp(mantissa, exponent)).astype(dtype)
    results = evaluate(
        f"fma.rn.{name}",
        [name] * 4,
        [(float(x), float(y), float(z), 0) for x, y, z in zip(a, b, c, strict=True)],
    )
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), digits, least)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(results.view(dtype), np.array(expected, dtype))


def test_every_instruction_of_the_table_has_a_test():
    """By the first word of the opcode; what is no arithmetic is tested further down."""
    elsewhere = {"ld", "st", "atom", "red", "bra", "ret", "exit", "bar", "barrier", "cvta", "lop3"}
    elsewhere |= {"shfl", "vote", "match", "redux", "activemask"}
    assert {o.split(".")[0] for o in TABLE} == {o.split(".")[0] for o in CASES} | elsewhere


# Memory.


def test_vectors_pack_and_unpack():
    body = """
    ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d0+16];
    mov.b64 %d4, {%r1, %r2};
    mov.b64 {%r5, %r6}, %d4;
    mov.b32 {_, %h1}, %r3;
    mov.b32 %r7, {%h1, %h1};
    st.global.v4.u32 [%d1], {%r6, %r5, %r7, %r4};
    """
    data = np.arange(8, dtype=np.uint32) * 0x10001
    assert run(body, data, block=1)[:4].tolist() == [0x50005, 0x40004, 0x60006, 0x70007]


def test_a_structure_by_value_is_indexed_by_a_register():
    body = """
    mov.b64 %d1, parts;
    ld.param.u64 %d2, [out];
    mad.wide.u32 %d3, %r0, 16, %d1;
    ld.param.u64 %d4, [%d3+8];
    ld.param.u32 %r1, [parts+16];
    cvta.param.u64 %d5, %d3;
    ld.u64 %d6, [%d5];
    mad.wide.u32 %d7, %r0, 16, %d2;
    cvt.u64.u32 %d8, %r1;
    add.s64 %d4, %d4, %d8;
    st.global.v2.b64 [%d7], {%d4, %d6};
    """
    parameters = ".param .align 8 .b8 parts[4064], .param .u64 out"
    kernel, memory = parse(module(body, parameters)), Memory()
    parts = np.arange(508, dtype=np.uint64)
    out = np.zeros((254, 2), np.uint64)
    launch(kernel, memory, [parts.tobytes(), memory.add(out, "out")], grid=1, block=254)
    np.testing.assert_array_equal(out, parts.reshape(-1, 2)[:, ::-1] + np.array([2, 0], "u8"))


def test_constants_variables_and_local_arrays():
    outside = """
    .const .align 4 .b8 bank[8] = {1, 0, 0, 0, 2, 1};
    .global .align 4 .u32 table[3] = {10, 20, 0x1E};
    """
    body = """
    .local .align 16 .b8 depot[16];
    mov.u64 %d5, depot;
    cvta.local.u64 %d6, %d5;
    st.v4.u32 [%d6], {%r0, 1, 2, 3};
    ld.local.u32 %r1, [%d5];
    ld.const.u32 %r2, [bank+4];
    mov.u64 %d7, table;
    ld.global.u32 %r3, [%d7+8];
    add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, %r3;
    st.global.u32 [%d3], %r1;
    """
    assert run(body, outside=outside)[:32].tolist() == [i + 0x102 + 0x1E for i in range(32)]


def test_arguments_grids_and_special_registers():
    parameters = ".param .u64 out, .param .f32 scale, .param .s32 shift, .param .u8 small"
    body = """
    ld.param.u64 %d0, [out];
    ld.param.f32 %r1, [scale];
    ld.param.s32 %r2, [shift];
    ld.param.u8 %r3, [small];
    mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ctaid.x;
    mad.lo.u32 %r4, %r4, %r5, %r6;
    mov.u32 %r5, %ntid.x; mov.u32 %r6, %ntid.y;
    mul.lo.u32 %r5, %r5, %r6;
    mov.u32 %r6, %tid.y; mov.u32 %r7, %ntid.x;
    mad.lo.u32 %r6, %r6, %r7, %r0;
    mad.lo.u32 %r4, %r4, %r5, %r6;
    mad.wide.u32 %d0, %r4, 16, %d0;
    mov.u32 %r8, %laneid;
    st.global.v4.u32 [%d0], {%r1, %r2, %r3, %r8};
    """
    out, memory = np.zeros((2 * 3 * 8 * 5, 4), np.uint32), Memory()
    arguments = [memory.add(out, "out"), 1.5, -2, 255]
    launch(parse(module(body, parameters)), memory, arguments, grid=(2, 3), block=(8, 5))
    assert (out[:, 0].view(np.float32) == 1.5).all()
    assert (out[:, 1].view(np.int32) == -2).all()
    assert (out[:, 2] == 255).all()
    assert out[:40, 3].tolist() == [*range(32), *range(8)]


@pytest.mark.parametrize("arguments", [[0], [0, 0, 0], [0, 1.5], [0, b"12"]])
def test_arguments_that_do_not_fit_are_refused(arguments):
    with pytest.raises(errors.BadLaunch):
        launch(parse(module("", POINTERS)), Memory(), arguments, grid=1, block=32)


def test_a_structure_of_another_size_is_refused():
    kernel = parse(module("", ".param .align 4 .b8 s[12]"))
    launch(kernel, Memory(), [bytes(12)], grid=1, block=32)
    for argument in (bytes(8), 5):
        with pytest.raises(errors.BadLaunch, match=r"s .*12 bytes"):
            launch(kernel, Memory(), [argument], grid=1, block=32)


def test_the_block_must_be_what_the_kernel_was_compiled_for():
    source = module("").replace(")\n{", ") .reqntid 64\n{", 1)
    launch(parse(source), Memory(), [], grid=1, block=64)
    with pytest.raises(errors.BadLaunch, match="reqntid 64"):
        launch(parse(source), Memory(), [], grid=1, block=32)


ATOMICS = {
    "add.u32": (lambda lanes: 100 + lanes.sum(), 100),
    "max.s32": (lambda lanes: 31, -5),
    "min.s32": (lambda lanes: -5, -5),
    "min.u32": (lambda lanes: 0, -5),
    "max.u32": (lambda lanes: 2**32 - 5, -5),
    "or.b32": (lambda lanes: 31, 0),
    "xor.b32": (lambda lanes: 7, 7),
    "and.b32": (lambda lanes: 0, 31),
    "exch.b32": (lambda lanes: 31, 9),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name):
    after, before = ATOMICS[name]
    start = np.full(1, before, np.int64).astype(np.uint32)
    changed = start.copy()
    old = run(f"atom.global.{name} %r1, [%d0], %r0; st.global.u32 [%d3], %r1;", changed)
    assert int(changed[0]) == int(after(np.arange(32))) % 2**32
    assert old[0] == start[0]
    if name != "exch.b32":
        again = start.copy()
        run(f"red.relaxed.gpu.global.{name} [%d0], %r0;", again)
        np.testing.assert_array_equal(again, changed)


def test_compare_and_swap():
    data = np.array([7], np.uint32)
    old = run("atom.global.gpu.acq_rel.cas.b32 %r1, [%d0], 7, %r0; st.global.u32 [%d3], %r1;", data)
    assert data[0] == 0
    assert old[:3].tolist() == [7, 0, 0]


# Warps.


def shuffled(mode: str, b: int, c: int) -> list[int]:
    body = f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {b}, {c}, -1; selp.b32 %r2, 100, 0, %p1;"
    return run(body + "add.u32 %r1, %r1, %r2; st.global.u32 [%d3], %r1;")[:32].tolist()


def test_shuffles():
    lanes = range(32)
    assert shuffled("bfly", 5, 31) == [(i ^ 5) + 100 for i in lanes]
    assert shuffled("up", 3, 0) == [i - 3 + 100 if i >= 3 else i for i in lanes]
    assert shuffled("down", 3, 31) == [i + 3 + 100 if i < 29 else i for i in lanes]
    assert shuffled("idx", 35, 31) == [103] * 32
    # Segments of 8 lanes: the mask 24 in bits 8 to 12 of c.
    assert shuffled("down", 3, 24 << 8 | 31) == [i + 3 + 100 if i % 8 < 5 else i for i in lanes]
    assert shuffled("idx", 2, 24 << 8 | 31) == [i // 8 * 8 + 2 + 100 for i in lanes]


COLLECTIVES = {
    "vote.sync.any.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;": lambda i: 1,
    "vote.sync.all.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;": lambda i: 0,
    "vote.sync.uni.pred %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;": lambda i: 0,
    "vote.sync.ballot.b32 %r1, %p1, -1;": lambda i: 0xFF,
    "vote.sync.ballot.b32 %r1, !%p1, -1;": lambda i: 0xFFFFFF00,
    "match.any.sync.b32 %r1, %r2, -1;": lambda i: 0x01010101 << (i % 8),
    "match.all.sync.b32 %r1, %r2, -1;": lambda i: 0,
    "match.all.sync.b32 %r1, 7, -1;": lambda i: 0xFFFFFFFF,
    "redux.sync.add.u32 %r1, %r0, -1;": lambda i: 496,
    "redux.sync.max.s32 %r1, %r3, -1;": lambda i: 27,
    "redux.sync.min.s32 %r1, %r3, -1;": lambda i: 2**32 - 4,
    "redux.sync.min.u32 %r1, %r3, -1;": lambda i: 0,
    "redux.sync.or.b32 %r1, %r2, -1;": lambda i: 7,
    "redux.sync.and.b32 %r1, %r2, -1;": lambda i: 0,
    "redux.sync.xor.b32 %r1, %r0, -1;": lambda i: 0,
    "redux.sync.max.f32 %r1, %r4, -1;": lambda i: 0x41F80000,
    "redux.sync.max.NaN.f32 %r1, %r4, -1;": lambda i: QUIET,
    "activemask.b32 %r1;": lambda i: 0xFFFFFFFF,
}


@pytest.mark.parametrize("body", COLLECTIVES)
def test_warp_instructions(body):
    prologue = """
    setp.lt.u32 %p1, %r0, 8;
    and.b32 %r2, %r0, 7;
    sub.s32 %r3, %r0, 4;
    cvt.rn.f32.u32 %r4, %r0;
    selp.b32 %r4, 0f7FC00000, %r4, %p1;
    """
    got = run(prologue + body + "st.global.u32 [%d3], %r1;")[:32].tolist()
    assert got == [COLLECTIVES[body](i) for i in range(32)]


def test_lanes_that_parted_meet_at_a_warp_instruction():
    """Half of the warp loops; the shuffle before the loop's body in the text waits for it."""
    body = """
    mov.u32 %r1, 0;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra LOOP;
MEET:
    shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
    st.global.u32 [%d3], %r2;
    bra END;
LOOP:
    add.u32 %r1, %r1, 1;
    setp.lt.u32 %p2, %r1, 10;
    @%p2 bra LOOP;
    bra MEET;
END:
    """
    assert run(body)[:32].tolist() == [0] * 16 + [10] * 16


def test_lanes_that_parted_run_together_again_where_their_branches_end():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra MEET;
    add.u32 %r2, %r0, 1;
MEET:
    activemask.b32 %r1;
    st.global.u32 [%d3], %r1;
    """
    assert (run(body)[:32] == 0xFFFFFFFF).all()


def test_lanes_at_different_warp_instructions_wait_for_ever():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra OTHER;
    shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
    bra END;
OTHER:
    shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;
END:
    """
    with pytest.raises(errors.Deadlock, match=r"thread 0 waits here and CTA 0 thread 16 waits at"):
        run(body)


def test_warps_wait_only_for_lanes_their_mask_names():
    body = """
    setp.lt.u32 %p1, %r0, 16;
    @!%p1 bra UPPER;
    vote.sync.all.pred %p2, %p1, 0xFFFF;
    redux.sync.add.u32 %r1, %r0, 0xFFFF;
    @!%p2 mov.u32 %r1, 0;
    bra END;
UPPER:
    redux.sync.max.u32 %r1, %r0, 0xFFFF0000;
END:
    st.global.u32 [%d3], %r1;
    """
    assert run(body)[:32].tolist() == [120] * 16 + [31] * 16


def test_scopes_may_declare_the_same_name_twice():
    body = """
    .reg .b32 t; mov.b32 t, 100;
    { .reg .b64 t; mov.b64 t, 5; cvt.u32.u64 %r1, t; }
    { .reg .b16 t; mov.b16 t, 6; cvt.u32.u16 %r2, t; }
    add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, t;
    st.global.u32 [%d3], %r1;
    """
    assert run(body)[0] == 111


def test_predicated_instructions_leave_other_threads_alone():
    body = """
    setp.lt.u32 %p1, %r0, 4;
    mov.u32 %r1, 7;
    @%p1 mov.u32 %r1, %r0;
    @!%p1 add.u32 %r1, %r1, 1;
    @%p1 st.global.u32 [%d3], %r1;
    @%p1 ret;
    st.global.u32 [%d3], %r1;
    """
    assert run(body)[:6].tolist() == [0, 1, 2, 3, 8, 8]


# The checks, each against a planted fault.

SHARED = ".shared .align 4 .b8 buffer[512];"
EXCHANGE = """
    mov.u32 %r1, buffer;
    mad.lo.u32 %r2, %r0, 4, %r1;
    st.shared.u32 [%r2], %r0;
    {barrier}
    xor.b32 %r3, %r0, {partner};
    mad.lo.u32 %r3, %r3, 4, %r1;
    ld.shared.u32 %r4, [%r3];
    st.global.u32 [%d3], %r4;
"""


@pytest.mark.parametrize(
    ("partner", "barrier"), [(32, "bar.sync 0;"), (1, "bar.warp.sync -1;"), (0, "")]
)
def test_an_exchange_behind_its_barrier_is_no_race(partner, barrier):
    body = EXCHANGE.format(partner=partner, barrier=barrier)
    assert run(body, block=64, outside=SHARED)[:64].tolist() == [i ^ partner for i in range(64)]


@pytest.mark.parametrize(("partner", "barrier"), [(32, ""), (32, "bar.warp.sync -1;"), (1, "")])
def test_a_missing_barrier_is_a_race(partner, barrier):
    """Whichever order the simulator happened to take."""
    with pytest.raises(errors.Race, match=r"ld\.shared.*reads byte.*wrote with no barrier"):
        run(EXCHANGE.format(partner=partner, barrier=barrier), block=64, outside=SHARED)


def test_a_write_after_an_unordered_read_is_a_race():
    body = EXCHANGE.format(partner=32, barrier="bar.sync 0;") + "st.shared.u32 [%r2], 1;"
    with pytest.raises(errors.Race, match=r"st\.shared.*writes byte 0.*thread 32 read with no"):
        run(body, block=64, outside=SHARED)


def test_all_readers_count():
    """A second reader does not hide the first."""
    body = """
    mov.u32 %r1, buffer;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r1], 1;
    bar.sync 0;
    ld.shared.u32 %r2, [%r1];
    setp.eq.u32 %p2, %r0, 63;
    @%p2 ld.shared.u32 %r2, [%r1];
    @%p2 st.shared.u32 [%r1], 2;
    """
    with pytest.raises(errors.Race, match=r"thread 63 writes"):
        run(body, block=64, outside=SHARED)


def test_lanes_may_repeat_a_store_to_shared_memory_but_not_contradict_it():
    body = "mov.u32 %r1, buffer; st.shared.u32 [%r1], {}; bar.sync 0;"
    run(body.format(5), outside=SHARED)
    with pytest.raises(errors.Race, match="different values"):
        run(body.format("%r0"), outside=SHARED)
    with pytest.raises(errors.Race, match="one instruction"):
        run(body.format(5), block=64, outside=SHARED)


def test_shared_memory_must_be_written_before_it_is_read():
    body = "mov.u32 %r1, buffer; ld.shared.u32 %r2, [%r1]; st.global.u32 [%d3], %r2;"
    with pytest.raises(errors.Uninitialised, match=r"ld\.shared.*byte 0 of shared memory"):
        run(body, outside=SHARED)


def test_dynamic_shared_memory_has_the_size_of_the_launch():
    outside = SHARED + ".extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 %r1, dynamic; mad.lo.u32 %r1, %r0, 4, %r1; st.shared.u32 [%r1], %r0;"
    run(body, outside=outside, dynamic_shared=128)
    with pytest.raises(
        errors.OutOfBounds, match=r"bytes 636 to 639 of shared memory \(636 bytes\)"
    ):
        run(body, outside=outside, dynamic_shared=124)


@pytest.mark.parametrize("offset", [-4, 252, 1 << 20])
def test_an_access_outside_its_buffer(offset):
    with pytest.raises(errors.OutOfBounds, match=r"ld\.global.*of data \(256 bytes\)"):
        run(f"ld.global.v2.u32 {{%r1, %r2}}, [%d0+{offset}]; st.global.u32 [%d3], %r1;")


def test_an_address_of_no_buffer():
    with pytest.raises(errors.OutOfBounds, match="CTA 0 thread 0 uses address 0x10"):
        run("mov.u64 %d5, 12; ld.global.u32 %r1, [%d5+4]; st.global.u32 [%d3], %r1;")


def test_a_shared_address_is_no_global_one():
    body = "mov.u64 %d5, buffer; cvta.shared.u64 %d5, %d5; st{}.u32 [%d5], 1;"
    run(body.format(""), outside=SHARED, block=1)
    with pytest.raises(errors.OutOfBounds, match="in no buffer"):
        run(body.format(".global"), outside=SHARED, block=1)


def test_a_misaligned_access():
    with pytest.raises(
        errors.Misaligned, match=r"st\.global.*byte 4 of result is no multiple of 8"
    ):
        run("st.global.v2.u32 [%d1+4], {%r0, %r0};", block=1)


def test_a_read_only_array_is_not_written():
    data = np.zeros(64, np.uint32)
    data.flags.writeable = False
    with pytest.raises(errors.OutOfBounds, match="data, which is read-only"):
        run("st.global.u32 [%d2], 1;", data)


def test_threads_that_write_one_place():
    with pytest.raises(errors.Race, match="write byte 0 of result in one instruction"):
        run("st.global.u32 [%d1], 1;")


@pytest.mark.parametrize("sizes", [{"block": 1, "grid": 2}, {"block": 1, "grid": 40000}])
def test_ctas_are_never_ordered(sizes):
    """Also CTAs that the simulator runs one after the other."""
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %nctaid.x; sub.u32 %r2, %r2, 1;
    setp.eq.u32 %p1, %r1, 0; setp.eq.u32 %p2, %r1, %r2;
    @%p1 st.global.u32 [%d1], 1;
    bar.sync 0;
    @%p2 ld.global.u32 %r3, [%d1];
    """
    with pytest.raises(errors.Race, match=r"CTA (1|39999) thread 0 reads .*CTA 0 thread 0 wrote"):
        run(body, **sizes)


def test_global_memory_is_exchanged_behind_a_barrier():
    body = """
    st.global.u32 [%d3], %r0;
    {} 0;
    xor.b32 %r1, %r0, 33;
    mad.wide.u32 %d4, %r1, 4, %d1;
    ld.global.u32 %r2, [%d4];
    bar.sync 0;
    st.global.u32 [%d3], %r2;
    """
    assert run(body.format("barrier.sync.aligned"), block=64).tolist() == [
        i ^ 33 for i in range(64)
    ]
    with pytest.raises(errors.Race, match=r"ld\.global"):
        run(body.format("//"), block=64)


def test_bytes_of_one_word_are_separate():
    """Two threads may write neighbouring halves; no false alarm."""
    body = "mad.wide.u32 %d4, %r0, 2, %d1; cvt.u16.u32 %h1, %r0; st.global.u16 [%d4], %h1;"
    assert run(body)[:2].tolist() == [0x10000, 0x30002]


def test_atomics_race_with_plain_accesses_only():
    change, load = "red.global.add.u32 [%d1], 1;", "ld.global.u32 %r1, [%d1];"
    store = "setp.eq.u32 %p1, %r0, 5; @%p1 st.global.u32 [%d1], 1;"
    assert run(change, grid=3)[0] == 96
    run(change + "bar.sync 0;" + load, block=64)
    for first, second in ((change, load), (load, change), (change, store), (store, change)):
        run(first + "bar.sync 0;" + second, block=64)
        with pytest.raises(errors.Race, match="with no barrier between"):
            run(first + second)


def test_a_barrier_that_some_threads_miss():
    body = "setp.lt.u32 %p1, %r0, 40; {}"
    with pytest.raises(errors.Deadlock, match="other threads of its CTA have returned"):
        run(body.format("@%p1 bar.sync 0;"), block=64)
    with pytest.raises(errors.Deadlock, match="other threads of its CTA have returned"):
        run(body.format("@!%p1 ret; bar.sync 0;"), block=64)
    with pytest.raises(errors.Deadlock, match=r"waits here and CTA 0 thread \d+ waits at line"):
        run(body.format("@%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"), block=64)


def test_a_barrier_in_a_uniform_branch_is_well():
    body = "setp.lt.u32 %p1, %r0, 64; @%p1 bra A; bra B; A: bar.sync 0; B:"
    run(body, block=64)
    # One CTA takes it, the other does not.
    run("mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bar.sync 0;", grid=2)


def test_a_shuffle_from_a_lane_that_takes_no_part():
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 {} st.global.u32 [%d3], %r1;"
    with pytest.raises(errors.InactiveLane, match="takes from lane 16"):
        run("mov.u32 %r1, 0;" + body.format("shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xFFFF;"))
    with pytest.raises(errors.InactiveLane, match="its mask does not name"):
        run("shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xFFFF; st.global.u32 [%d3], %r1;")
    # The block has no lane 20 to take from.
    with pytest.raises(errors.InactiveLane, match="takes from lane 20"):
        run("shfl.sync.down.b32 %r1, %r0, 16, 31, -1; st.global.u32 [%d3], %r1;", block=20)


def test_an_endless_loop_ends():
    with pytest.raises(errors.Deadlock, match="still running"):
        run("A: add.u32 %r0, %r0, 1; setp.ne.u32 %p1, %r0, %r0; @!%p1 bra A;", block=1)


# What is refused.


@pytest.mark.parametrize(
    "statement",
    [
        "sqrt.approx.f32 %r1, %r0;",
        "add.rn.ftz.f32 %r1, %r0, %r0;",
        "div.full.f32 %r1, %r0, %r0;",
        "ex2.approx.f32 %r1, %r0;",
        "add.f32 %r1, %r0, %r0;",
        "mul.f32 %r1, %r0, %r0;",
        "mad.rn.f32 %r1, %r0, %r0, %r0;",
        "add.sat.s32 %r1, %r0, %r0;",
        "atom.global.add.f32 %r1, [%d0], %r0;",
        "ld.volatile.global.u32 %r1, [%d0];",
        "st.relaxed.gpu.global.u32 [%d0], %r0;",
        "cp.async.ca.shared.global [%r0], [%d0], 16;",
        "mbarrier.init.shared.b64 [%r0], 1;",
        "isspacep.shared %p1, %d0;",
        "brx.idx %r0, targets;",
        "call.uni helper, ();",
        ".param .b32 argument;",
        "membar.gl;",
        "bar.sync 1, 64;",
        "mov.u32 %r1, %clock;",
        "add.u32 %r1, %r0, %d0;",
        "add.u32 %r1, %r0;",
        "mov.u32 %nosuch, %r0;",
        "mov.u32 %r1, %r9;",
        "bra NOWHERE;",
        ".reg .b128 %q;",
        "ld.global.v8.b64 {%d0,%d0,%d0,%d0,%d0,%d0,%d0,%d0}, [%d0];",
        "frobnicate.u32 %r1, %r0;",
        "mov.u32 %r1, %r0",
    ],
)
def test_what_lies_outside_the_subset_is_refused(statement):
    with pytest.raises(errors.Unsupported) as refusal:
        parse(module("mov.u64 %d0, 0;\n" + statement))
    if "%r9" not in statement:
        assert statement.split()[0].rstrip(";") in str(refusal.value)


def test_the_entry_must_be_clear():
    one = module("")
    two = one + one.replace("kernel", "other").split(".address_size 64")[1]
    assert parse(two, "other").name == "other"
    with pytest.raises(errors.Unsupported, match=r"2 entries \(kernel, other\); name one"):
        parse(two)
    with pytest.raises(errors.Unsupported, match="no entry third; the module has kernel, other"):
        parse(two, "third")


def test_a_fault_names_line_and_statement():
    source = module("mov.u64 %d0, 0;\n\n  ld.global.u32 %r1, [%d0];")
    line = 1 + source[: source.index("ld.global")].count("\n")
    with pytest.raises(errors.OutOfBounds, match=rf"line {line}: ld\.global\.u32 %r1, \[%d0\]:"):
        launch(parse(source), Memory(), [], grid=1, block=32)


def test_views_are_addressed_by_their_offset():
    data = np.arange(64, dtype=np.uint32)
    memory = Memory()
    address, out = memory.add(data, "data"), np.zeros(1, np.uint32)
    body = "ld.param.u64 %d0, [in]; ld.param.u64 %d1, [out]; ld.global.u32 %r1, [%d0];"
    kernel = parse(module(body + "st.global.u32 [%d1], %r1;", POINTERS))
    launch(kernel, memory, [address + 40, memory.add(out, "out")], grid=1, block=1)
    assert out[0] == 10
    with pytest.raises(ValueError, match="strided is not contiguous"):
        memory.add(data[::2], "strided")


def test_struct_layout_matches_the_compilers():
    """Arguments lie at multiples of their size."""
    parameters = ".param .u8 a, .param .u64 b, .param .u16 c, .param .u32 d, .param .u64 out"
    body = """
    mov.u64 %d0, a;
    ld.param.u64 %d1, [%d0+8]; ld.param.u16 %h1, [%d0+16]; ld.param.u32 %r1, [%d0+20];
    ld.param.u64 %d2, [out];
    cvt.u32.u16 %r2, %h1; cvt.u32.u64 %r3, %d1;
    st.global.v4.u32 [%d2], {%r1, %r2, %r3, 0};
    """
    memory, out = Memory(), np.zeros(4, np.uint32)
    launch(
        parse(module(body, parameters)), memory, [1, 2, 3, 4, memory.add(out, "o")], grid=1, block=1
    )
    assert out.tolist() == [4, 3, 2, 0]
    assert struct.calcsize("@BQHI") == 24
