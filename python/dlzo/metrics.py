"""The figures of a run: what its records say so far, and what metrics.json holds in the end."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, TypeVar, cast

from dlzo.config import as_float
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation
from dlzo.records import Event, Record, Step

T = TypeVar("T")


class StepEvaluation(Evaluation):
    """An evaluation of the weights after a step; step 0 is the untuned model."""

    step: int


class HistoryEntry(TypedDict, total=False):
    """One step; `train_loss` is the mean of the two points, None if it is not finite.

    Of a generation task, validation has a loss alone.
    """

    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float


class Metrics(TypedDict):
    """The result of a run, as in metrics.json.

    `zero_shot` (untuned) and `test` (best weights) are on the test split, `best` and `final` on the
    validation split. `skipped` steps had a loss that was not finite or had exploded. Times and
    memory are those of the process that finished the run; `step_ms_median` is None if it did no
    step. `peak_rss_mb` is in 10^6 bytes.
    """

    model: str
    task: str
    method: str
    layers: list[int]
    part: str
    channels: str | Sequence[int]
    steps: int
    batch_size: int
    directions: int
    eps: float
    lr: float
    seed: int
    dtype: str
    zero_shot: Evaluation
    best: StepEvaluation
    final: StepEvaluation
    test: Evaluation
    skipped: int
    step_ms_median: float | None
    seconds: float
    peak_rss_mb: float
    history: list[HistoryEntry]


@dataclass
class Progress:
    """What the records of a run say so far; `take` takes them one by one.

    Attributes:
        entry: the history's entry of the last step.
        untuned: the evaluation of the base model on the test split.
        best: the validation of the lowest loss.
        final: the last validation.
        test: the evaluation of the best weights on the test split.
        skipped: steps that moved no weight.
        skipped_in_a_row: how many of them came last.
    """

    entry: HistoryEntry = field(default_factory=lambda: HistoryEntry(step=0))
    untuned: Evaluation | None = None
    best: StepEvaluation | None = None
    final: StepEvaluation | None = None
    test: Evaluation | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def step(self) -> int:
        """The last step."""
        return self.entry["step"]

    def take(self, record: Record) -> None:
        """Takes the next record into account.

        Raises:
            UserError: it is an event that is no evaluation.
        """
        if isinstance(record, Step):
            # JSON has no NaN and no infinity.
            loss = record.loss if math.isfinite(record.loss) else None
            self.entry = {"step": record.step, "train_loss": loss}
            self.skipped += not record.applied
            self.skipped_in_a_row = 0 if record.applied else self.skipped_in_a_row + 1
            return
        found = _evaluation(record)
        if record.name == "untuned":
            self.untuned = found
        elif record.name == "test":
            self.test = found
        elif record.name == "validation":
            figures = {f"validation_{name}": value for name, value in found.items()}
            self.entry.update(cast(HistoryEntry, figures))
            self.final = {"step": record.step, **found}
            # As in MeZO, the lowest validation loss is kept: it is finer than the accuracy.
            if self.best is None or loss_of(self.final) < loss_of(self.best):
                self.best = self.final


def known(found: T | None) -> T:
    """A value that is certainly recorded by now."""
    assert found is not None
    return found


def loss_of(found: Evaluation) -> float:
    """The loss, infinite where it is not finite."""
    return math.inf if found["loss"] is None else found["loss"]


def history(records: Iterable[Record]) -> Iterator[HistoryEntry]:
    """The entry of each step, and of step 0."""
    progress = Progress()
    for record in records:
        if isinstance(record, Step):
            yield progress.entry
        progress.take(record)
    yield progress.entry


def metrics_text(metrics: Metrics) -> str:
    """Indented JSON, but the history with one line a step."""
    head = json.dumps({**metrics, "history": []}, indent=2, allow_nan=False)
    rows = ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in metrics["history"])
    return head.replace('"history": []', f'"history": [\n    {rows}\n  ]') + "\n"


def peak_rss_mb() -> float:
    """The most memory that this process has held so far, in 10^6 bytes."""
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _evaluation(event: Event) -> Evaluation:
    """The figures of an event, which may be from anywhere."""
    figures = event.values.values()
    if "loss" not in event.values or not all(map(_is_figure, figures)):
        raise UserError(f"the event {event.name[:60]!r} of a journal is no evaluation")
    return cast(Evaluation, dict(event.values))


def _is_figure(value: object) -> bool:
    """Whether it is None, which stands for what is not finite, or a finite number."""
    return value is None or (isinstance(value, float | int) and math.isfinite(as_float(value)))
