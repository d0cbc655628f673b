"""The PTX lint finds each thing it looks for, and nothing in sound code."""

from __future__ import annotations

import pytest

from ptx import lint

SOUND = """
.visible .entry noise(.param .u64 out)
{
    .reg .b32 %r<9>;
    mul.hi.u32 %r1, %r0, -766435501;      // 0xD2511F53; fma.rn.f32 in a comment
    mul.lo.s32 %r2, %r1, 0xCD9E8D57;
    add.rn.f32 %r3, %r1, 0fBF000000;
    mul.rn.f32x2 %r4, %r3, %r3;
    sqrt.rn.f32 %r5, %r4;
    mad.lo.s32 %r6, %r1, %r2, %r3;
    ret;
}
.visible .entry other(.param .u64 out)
{
    .reg .b32 %r<9>;
    %s
    ret;
}
"""


def test_sound_code_passes():
    assert lint.inexact(SOUND, "noise") == []
    assert lint.fused(SOUND, "noise") == []


@pytest.mark.parametrize(
    "opcode",
    [
        *("sqrt.approx.f32", "ex2.approx.ftz.f32", "add.rn.ftz.f32", "div.full.f32", "add.f32"),
        *("mul.f64", "sub.f32", "mad.f32", "fma.f32x2", "cvt.ftz.f32.f16"),
    ],
)
def test_what_is_inexact(opcode):
    source = SOUND.replace("%s", f"{opcode} %r1, %r2, %r3;")
    assert [found in opcode for found in lint.inexact(source, "other")] == [True]
    assert lint.inexact(source, "noise") == []


@pytest.mark.parametrize("opcode", ["fma.rn.f32", "fma.rn.f64", "fma.rn.f32x2", "fma.rn.bf16x2"])
def test_what_is_fused(opcode):
    source = SOUND.replace("%s", f"{opcode} %r1, %r2, %r3, %r4;")
    assert lint.fused(source, "other") == [opcode]


def test_constants_are_found_in_every_spelling():
    words = [0xD2511F53, 0xCD9E8D57, 0xBF000000]
    assert lint.missing_words(SOUND, [*words, 0xD2511F54], "noise") == [0xD2511F54]
    assert lint.missing_floats(SOUND, [0.5, -0.5, 0.25], "noise") == [0.25]
    # Neither a register's number nor a type's counts.
    assert lint.missing_words(SOUND, [6, 32], "noise") == [6, 32]
