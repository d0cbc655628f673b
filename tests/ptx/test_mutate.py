"""Mutation of PTX: every kind of change is made, run and told apart."""

from __future__ import annotations

import numpy as np

from ptx.machine import launch
from ptx.memory import Memory
from ptx.mutate import mutants, run_mutants
from ptx.parser import parse

SOURCE = """
.version 8.0
.visible .entry other() { ret; }
.visible .entry scale(
    .param .u64 to, .param .u32 count
)
{
    .reg .pred %p<2>;
    .reg .b16 %h<2>;
    .reg .b32 %r<9>;
    .reg .b64 %d<3>;
    ld.param.u64 %d0, [to];
    ld.param.u32 %r1, [count];
    mov.u32 %r0, %tid.x;
    setp.ge.u32 %p0, %r0, %r1;      // past the end
    @%p0 bra END;
    mad.wide.u32 %d1, %r0, 4, %d0;
    ld.global.u32 %r2, [%d1+0];
    sub.rn.f32 %r3, %r2, 0f3F800000;
    mul.hi.u32 %r4, %r2, 0xD2511F53;
    xor.b32 %r4, %r4, %r2;
    { cvt.rn.bf16.f32 %h0, %r3; } mov.b32 %r5, {%h0, %h0};
    setp.lt.f32 %p1, %r3, 0f00000000;
    selp.b32 %r6, %r5, %r4, %p1;
    or.b32 %r7, %r6, 0;
    st.global.u32 [%d1], %r7;
END:
    ret;
}
"""


def expected(values: np.ndarray) -> np.ndarray:
    difference = values - np.float32(1)
    bits = difference.view(np.uint32)
    half = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    product = values.view(np.uint32) * np.uint64(0xD2511F53) >> np.uint64(32)
    mixed = product.astype(np.uint32) ^ values.view(np.uint32)
    return np.where(difference < 0, half << 16 | half, mixed)


def check(source: str, count: int = 500) -> None:
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    values[3] = 1.0
    memory, result = Memory(), values.copy()
    launch(parse(source, "scale"), memory, [memory.add(result, "to"), count], grid=1, block=512)
    np.testing.assert_array_equal(result.view(np.uint32), expected(values))


def test_the_changes_that_are_made():
    changes = [(m.line, m.description.split(" -> ")[1]) for m in mutants(SOURCE, "scale")]
    start = 1 + SOURCE[: SOURCE.index("setp.ge")].count("\n")
    for change in (
        (start, "setp.gt.u32 %p0, %r0, %r1;"),
        (start, "setp.ge.u32 %p0, %r1, %r0;"),
        (start + 1, "@!%p0 bra END;"),
        (start + 2, "mad.wide.u32 %d1, %r0, 5, %d0;"),
        (start + 4, "add.rn.f32 %r3, %r2, 0f3F800000;"),
        (start + 4, "sub.rn.f32 %r3, 0f3F800000, %r2;"),
        (start + 4, "sub.rn.f32 %r3, %r2, 0f3F800001;"),
        (start + 5, "mul.lo.u32 %r4, %r2, 0xD2511F53;"),
        (start + 5, "mul.hi.u32 %r4, %r2, 3528531796;"),
        (start + 6, "or.b32 %r4, %r4, %r2;"),
        (start + 7, "cvt.rz.bf16.f32 %h0, %r3;"),
        (start + 8, "setp.le.f32 %p1, %r3, 0f00000000;"),
        (start + 9, "selp.b32 %r6, %r4, %r5, %p1;"),
        (start + 10, "xor.b32 %r7, %r6, 0;"),
        (start + 10, "or.b32 %r7, %r6, 1;"),
    ):
        changes.remove(change)
    # `x < 0` with its operands swapped is the one left.
    assert changes == [(start + 8, "setp.lt.f32 %p1, 0f00000000, %r3;")]


def test_each_mutant_differs_in_its_line_only():
    for mutant in mutants(SOURCE, "scale"):
        pairs = zip(SOURCE.split("\n"), mutant.source.split("\n"), strict=True)
        assert [i for i, (a, b) in enumerate(pairs, 1) if a != b] == [mutant.line]


def test_a_good_check_catches_all_but_what_changes_nothing():
    check(SOURCE)
    report = run_mutants(mutants(SOURCE, "scale"), check)
    assert report.refused == []
    # x | 0 is x ^ 0.
    assert [m.description.split(" -> ")[1] for m in report.survived] == ["xor.b32 %r7, %r6, 0;"]
    assert str(report).startswith(f"{len(report.caught)} caught, 1 survived, 0 refused\n  line ")


def test_a_weak_check_shows():
    """One block, no tail: nobody looks at the bounds."""
    report = run_mutants(mutants(SOURCE, "scale"), lambda source: check(source, 512))
    assert any("setp.gt.u32 %p0" in m.description for m in report.survived)


def test_what_cannot_run_is_told_apart():
    source = SOURCE.replace("or.b32 %r7, %r6, 0;", "shl.b64 %d2, %d0, 3; or.b32 %r7, %r6, 0;")
    report = run_mutants(mutants(source, "scale"), check)
    assert [m.description.split(" -> ")[1] for m in report.refused] == ["shl.b64 %d2, 3, %d0;"]
