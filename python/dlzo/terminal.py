"""What the commands print: tables fitted to the terminal, sentences whole for copies and pipes."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.text import Text

console = Console(highlight=False)
_stderr = Console(stderr=True)


def say(sentence: str) -> None:
    """Prints a sentence as it is, in one line of however many columns."""
    console.print(Text(sentence), soft_wrap=True)


def complain(kind: Literal["error", "warning"], sentence: str) -> None:
    """Prints a sentence on stderr, behind what it is."""
    color = {"error": "red", "warning": "yellow"}[kind]
    _stderr.print(Text.assemble((f"{kind}:", f"bold {color}"), " ", sentence), soft_wrap=True)
