"""One statement of PTX, cut into its parts."""

from __future__ import annotations

from dataclasses import dataclass

from ptx.operands import split_list


@dataclass(frozen=True)
class Statement:
    """`@guard opcode operands;`"""

    line: int
    text: str
    guard: str | None
    opcode: str
    operands: tuple[str, ...]

    @classmethod
    def read(cls, line: int, text: str) -> Statement:
        guard, rest = None, text
        if text.startswith("@"):
            guard, rest = text[1:].split(None, 1)
        opcode, _, operands = rest.partition(" ")
        return cls(line, text, guard, opcode, split_list(operands))

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"
