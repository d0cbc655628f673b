"""Mutation of compiled kernels: does a test notice each small change of the machine's work?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ptx.errors import PtxError, Unsupported
from ptx.operands import split_list
from ptx.parser import entry_lines

_STATEMENT = re.compile(
    r"(?P<guard>@!?[%\w$]+\s+)?(?P<opcode>[a-z]\w*(?:\.[\w:]+)*)\s+"
    r"(?P<operands>[^;{}]*(?:\{[^}]*\}[^;{}]*)*);"
)
_OPCODES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(setp\.)lt\b", r"\1le"),
        (r"^(setp\.)le\b", r"\1lt"),
        (r"^(setp\.)gt\b", r"\1ge"),
        (r"^(setp\.)ge\b", r"\1gt"),
        (r"^(setp\.)eq\b", r"\1ne"),
        (r"^(setp\.)ne\b", r"\1eq"),
        (r"^xor\b", "or"),
        (r"^or\b", "xor"),
        (r"^and\b", "or"),
        (r"^shl\.b", "shr.u"),
        (r"^shr\.[us]", "shl.b"),
        (r"^add\b", "sub"),
        (r"^sub\b", "add"),
        (r"^mul\.hi\b", "mul.lo"),
        (r"^mul\.lo\b", "mul.hi"),
        (r"^min\b", "max"),
        (r"^max\b", "min"),
        (r"^cvt\.rn\b", "cvt.rz"),
        (r"^cvt\.rz\b", "cvt.rn"),
        (r"^cvt\.rni\b", "cvt.rzi"),
        (r"^cvt\.rzi\b", "cvt.rni"),
    )
]
# Which two source operands to swap.
_SWAPS = [
    (re.compile(r"^(?:sub|div|rem|shl|shr|shf|copysign|setp\.(?:l|g)|selp)"), (1, 2)),
    (re.compile(r"^(?:fma|mad\.(?:lo|hi))"), (2, 3)),
]
_UNTOUCHED = re.compile(r"^(?:bar|barrier|bra|ret|exit|ld|st)\b")


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    line: int
    description: str
    source: str


@dataclass
class Report:
    """What became of the mutants; `refused` ones lie outside the simulated subset and never ran."""

    caught: list[tuple[Mutant, Exception]] = field(default_factory=list)
    survived: list[Mutant] = field(default_factory=list)
    refused: list[Mutant] = field(default_factory=list)

    def __str__(self) -> str:
        counts = f"{len(self.caught)} caught, {len(self.survived)} survived"
        survivors = [f"  line {m.line}: {m.description}" for m in self.survived]
        return "\n".join([f"{counts}, {len(self.refused)} refused", *survivors])


def mutants(source: str, entry: str | None = None) -> Iterator[Mutant]:
    """Every single change of the entry's statements that we know to make.

    Constants: a float by one unit in the last place, an integer by one (addresses are left alone).
    Opcodes: comparison, or/xor, shift direction, add/sub, upper/lower half, min/max, rounding.
    Operands: two of a non-commutative instruction swapped. Guards: negated.
    """
    lines = source.split("\n")
    for number in entry_lines(source, entry):
        code = lines[number - 1].split("//")[0]
        for statement in _STATEMENT.finditer(code):
            for description, changed in _changes(statement):
                line = code[: statement.start()] + changed + code[statement.end() :]
                mutated = [*lines[: number - 1], line, *lines[number:]]
                yield Mutant(number, description, "\n".join(mutated))


def run_mutants(candidates: Iterable[Mutant], check: Callable[[str], None]) -> Report:
    """Give each mutant to a check of PTX source, which raises where it notices.

    Args:
        candidates: from `mutants`.
        check: raises AssertionError for wrong results; a PtxError of the simulator counts too.
            Anything else it raises is an error of the check.
    """
    report = Report()
    for mutant in candidates:
        try:
            check(mutant.source)
        except Unsupported:
            report.refused.append(mutant)
        except (PtxError, AssertionError) as error:
            report.caught.append((mutant, error))
        else:
            report.survived.append(mutant)
    return report


def _changes(statement: re.Match[str]) -> Iterator[tuple[str, str]]:
    """Description and new text."""
    guard, opcode = statement["guard"] or "", statement["opcode"]
    operands = split_list(statement["operands"])
    before = " ".join(statement[0].split())

    def change(
        guard: str = guard, opcode: str = opcode, operands: tuple[str, ...] = operands
    ) -> tuple[str, str]:
        after = f"{guard}{opcode} {', '.join(operands)};"
        return f"{before} -> {after}", after

    if guard:
        yield change(guard="@" + guard[2:] if guard[1] == "!" else "@!" + guard[1:])
    for pattern, replacement in _OPCODES:
        if pattern.search(opcode):
            yield change(opcode=pattern.sub(replacement, opcode))
    for pattern, (i, j) in _SWAPS:
        if pattern.search(opcode) and operands[i] != operands[j]:
            swapped = list(operands)
            swapped[i], swapped[j] = operands[j], operands[i]
            yield change(operands=tuple(swapped))
    if not _UNTOUCHED.search(opcode):
        for index, operand in enumerate(operands):
            if (other := _next_constant(operand)) is not None:
                yield change(operands=(*operands[:index], other, *operands[index + 1 :]))


def _next_constant(operand: str) -> str | None:
    """The next float or integer; None for what is no constant, and for a float 0."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        bits = int(match[1], 16)
        return f"0f{bits + 1:08X}" if bits & 0x7FFFFFFF else None
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
        bits = int(match[1], 16)
        return f"0d{bits + 1:016X}" if bits & (2**63 - 1) else None
    if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+", operand):
        return str(int(operand, 0) + 1)
    return None
