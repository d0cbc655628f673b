"""What the commands print, and how they take paths.

Tables are fitted to the terminal, sentences are whole for copies and pipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dlzo.files import user_path
from dlzo.metrics import HistoryEntry, Metrics
from dlzo.target import describe

console = Console(highlight=False)
_stderr = Console(stderr=True)
# A shell leaves the ~ of --out=~/x to the command.
path_option = partial(typer.Option, parser=user_path)


def say(sentence: str) -> None:
    """Prints a sentence as it is, in one line of however many columns."""
    console.print(Text(sentence), soft_wrap=True)


def complain(kind: Literal["error", "warning"], sentence: str) -> None:
    """Prints a sentence on stderr, behind what it is."""
    color = {"error": "red", "warning": "yellow"}[kind]
    _stderr.print(Text.assemble((f"{kind}:", f"bold {color}"), " ", sentence), soft_wrap=True)


@contextmanager
def training_bar(steps: int) -> Iterator[Callable[[HistoryEntry], None]]:
    """A bar that shows the last training loss and the last validation."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown = {"training": "", "validation": ""}
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=steps)

        def on_progress(entry: HistoryEntry) -> None:
            if (loss := entry.get("train_loss")) is not None:
                shown["training"] = f"loss {loss:.3f}  "
            if "validation_accuracy" in entry:
                shown["validation"] = f"validation accuracy {entry['validation_accuracy']:.3f}"
            elif entry.get("validation_loss") is not None:
                shown["validation"] = f"validation loss {entry['validation_loss']:.3f}"
            bar.update(task, completed=entry["step"], description="".join(shown.values()))

        yield on_progress


def summary(metrics: Metrics) -> Table:
    """The four evaluations of a run, and what it cost."""
    tuned = describe(metrics)
    title = f"{metrics['task']}, {tuned}, lr {metrics['lr']:g}, {metrics['dtype']}"
    table = Table(title=escape(title))
    measured = [name for name in ("accuracy", "f1", "exact_match") if name in metrics["test"]]
    for heading in ("", "split", *measured, "loss"):
        table.add_column(heading, justify="left" if heading in ("", "split") else "right")
    rows = [
        ("untuned", "test", metrics["zero_shot"]),
        (f"best, step {metrics['best']['step']}", "validation", metrics["best"]),
        (f"last, step {metrics['final']['step']}", "validation", metrics["final"]),
        ("best", "test", metrics["test"]),
    ]
    for name, split, found in rows:
        loss = "not finite" if found["loss"] is None else f"{found['loss']:.4f}"
        # Validation generates no answers.
        figures = [f"{found[key]:.3f}" if key in found else "" for key in measured]
        table.add_row(name, split, *figures, loss)
    step_ms = metrics["step_ms_median"]
    table.caption = (
        f"{metrics['seconds']:.0f} s, "
        + ("" if step_ms is None else f"{step_ms:.0f} ms a step, ")
        + f"peak memory {metrics['peak_rss_mb']:.0f} MB"
    )
    return table
