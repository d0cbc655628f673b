"""The commands `dlzo journal show | verify | diff | compact`."""

from __future__ import annotations

import sys
from collections import deque
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from dlzo.errors import UserError
from dlzo.files import user_path
from dlzo.header import differences
from dlzo.journal import Reader, compact
from dlzo.records import Event, Record, Step
from dlzo.terminal import complain, console, path_option, say

app = typer.Typer(help="Look into the journals of runs.", no_args_is_help=True)

Journal = Annotated[Path, typer.Argument(help="A run's journal.zo.", parser=user_path)]


@app.command("show")
def show_command(
    journal: Journal,
    steps: Annotated[int, typer.Option(min=0, help="How many of the last steps.")] = 10,
) -> None:
    """Show what a journal belongs to, its evaluations and its last steps."""
    reader = Reader(journal)
    header = Table("header", Column(overflow="fold"), title=escape(str(journal)))
    for name, value in vars(reader.header).items():
        text = "\n".join(map(_parameter, value)) if name == "parameters" else str(value)
        header.add_row(name.replace("_", " "), escape(text))
    evaluations = Table("evaluation", "after step", "")
    last: deque[Step] = deque(maxlen=min(steps, sys.maxsize))
    for record in reader:
        if isinstance(record, Step):
            last.append(record)
        else:
            values = ", ".join(f"{name} {value}" for name, value in record.values.items())
            evaluations.add_row(escape(record.name), str(record.step), escape(values))
    seed = Column("seed", overflow="fold")
    rows = Table("step", seed, "lr", "projected gradient", "losses", "applied")
    for step in last:
        numbers = ("\n".join(f"{n:.6g}" for n in part) for part in (step.gradients, step.losses))
        rows.add_row(
            str(step.step),
            str(step.seed),
            f"{step.lr:g}",
            *numbers,
            "yes" if step.applied else "no",
        )
    for table in (header, evaluations, rows):
        console.print(table)
    warn(reader)


@app.command("verify")
def verify_command(journal: Journal) -> None:
    """Check every byte of a journal; what is damaged is an error."""
    reader = Reader(journal)
    skipped = sum(not step.applied for step in reader.steps())
    if reader.damage is not None:
        raise UserError(reader.damage)
    say(f"whole: {reader.last} steps, {skipped} of them skipped, {reader.end:,} bytes")


@app.command("diff")
def diff_command(journal: Journal, other: Journal) -> None:
    """Say where two journals part; exit code 1 if they do."""
    a, b = Reader(journal), Reader(other)
    found = differences(a.header, vars(b.header), other=str(other))
    if found:
        say(f"{journal}: {found}")
    parting = next((pair for pair in zip_longest(a, b) if repr(pair[0]) != repr(pair[1])), None)
    if parting is not None:
        for path, record in zip((journal, other), parting, strict=True):
            say(f"{path}: {_record(record)}")
    for reader in (a, b):
        warn(reader)
    if found or parting is not None:
        raise typer.Exit(1)
    say("the same")


@app.command("compact")
def compact_command(
    journal: Journal,
    out: Annotated[Path, path_option(help="The file to write.")],
) -> None:
    """Write a journal again, 13 bytes a step of one direction; its replay has the same bits."""
    compact(journal, out)
    sizes = [path.stat().st_size for path in (journal, out)]
    say(f"written to {out}: {sizes[1]:,} bytes, from {sizes[0]:,}")


def warn(reader: Reader) -> None:
    """Says on stderr what a journal that was read has lost."""
    if reader.damage is not None:
        complain("warning", reader.damage)


def _parameter(parameter: tuple[Any, ...]) -> str:
    name, dtype, shape, stream = parameter
    return f"{name} {list(shape)} {dtype}, stream {stream}"


def _record(record: Record | None) -> str:
    if record is None:
        return "ends here"
    if isinstance(record, Event):
        return f"after step {record.step}: {record.name} {dict(record.values)}"
    return (
        f"step {record.step}: gradient {record.gradients}, losses {record.losses}, "
        f"seed {record.seed}, lr {record.lr}, {'applied' if record.applied else 'skipped'}"
    )
