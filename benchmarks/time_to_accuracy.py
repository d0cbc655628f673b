"""Validation accuracy by the time spent on training: one layer with our steps, MeZO's on all.

    python benchmarks/time_to_accuracy.py --data DIR [--tasks sst2]

DIR holds a folder for each task with its train and validation.jsonl. The model is
SmolLM2-135M-Instruct (de-quantised Q4_1) in bfloat16, the batch 16 rows in the order that training
draws them. Each method has the learning rate with the lowest validation loss of its grid in
results/quality_runs.csv. MeZO's step is that of mezo.py, on plain transformers. Time is that of the
steps and of what they need first, such as the frozen prefix; validations are left out. Finished
runs are in results/time_to_accuracy.csv and not made again; without --data the figure is drawn.
Nothing else may be running.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mezo import batch_loss, encode_batch, mezo_step, our_step
from quality import BUDGETS, RUNS
from results import RESULTS, ROOT, append, matching, read_rows
from speed import BATCH_SIZE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.evaluation import score
from dlzo.models import decoder_layers, load_model
from dlzo.plots import tidy
from dlzo.sampler import batch_of, step_seed
from dlzo.scoring import PrefixCache, Scorer
from dlzo.tasks import Example, Task, get_task, load_split

CURVES = RESULTS / "time_to_accuracy.csv"
FIGURE = ROOT / "docs" / "time-to-accuracy.png"
TASKS = ("sst2", "rte")
# Methods of results/quality_runs.csv, and what they are called in the figure.
METHODS = {
    "dominant": "layer 11, the dominant one",
    "layer 17": "layer 17",
    "mezo": "MeZO, all parameters",
}
STEPS, EVERY = 300, 25
SEED = 0
FIELDS = (
    *("task", "method", "eps", "lr", "threads"),
    *("step", "seconds", "validation_loss", "validation_accuracy"),
)

Step = Callable[[int], object]  # by its number, from 1


@dataclass(frozen=True)
class Training:
    """One training: a method, its learning rate and eps, and the model that it is to tune."""

    task: Task
    method: str
    settings: dict[str, str]  # a row of RUNS
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def begin(self, examples: Sequence[Example]) -> Step:
        """Gets ready whatever the steps need."""
        return (self._mezo if self.method == "mezo" else self._ours)(examples)

    def _mezo(self, examples: Sequence[Example]) -> Step:
        def step(number: int) -> None:
            rows = batch_of(examples, SEED, number, BATCH_SIZE)
            batch = encode_batch(self.model, self.tokenizer, rows, self.task.loss)
            seed = step_seed(SEED, number)
            mezo_step(self.model, lambda: batch_loss(self.model, batch), seed=seed, **self._size)

        return step

    def _ours(self, examples: Sequence[Example]) -> Step:
        layer = decoder_layers(self.model)[int(self.settings["layer"])]
        cache = PrefixCache(1 << 31)
        scorer = Scorer(self.model, self.tokenizer, layer, loss=self.task.loss, cache=cache)
        encoded = scorer.encode(self.task.drawn(examples))
        scorer.cache_prefixes(encoded)

        def step(number: int) -> None:
            rows = batch_of(encoded, SEED, number, BATCH_SIZE)
            our_step(scorer, rows, step_seed(SEED, number), **self._size)

        return step

    @property
    def _size(self) -> dict[str, float]:
        return {name: float(self.settings[name]) for name in ("eps", "lr")}

    def points(self, data: Path, steps: int) -> Iterator[dict[str, Any]]:
        """Rows of CURVES: a validation every so many steps, and the seconds of training so far."""
        examples, validation = (
            load_split(self.task, data, split) for split in ("train", "validation")
        )
        judge = Scorer(self.model, self.tokenizer, loss=self.task.loss)
        encoded = judge.encode(validation)
        started = time.perf_counter()
        step = self.begin(examples)
        seconds = time.perf_counter() - started
        for number in range(steps + 1):
            if number:
                started = time.perf_counter()
                step(number)
                seconds += time.perf_counter() - started
            if number % EVERY == 0:
                found = score(judge, self.task, encoded)
                yield {
                    "task": self.task.name,
                    "method": self.method,
                    "eps": self.settings["eps"],
                    "lr": self.settings["lr"],
                    "threads": torch.get_num_threads(),
                    "step": number,
                    "seconds": f"{seconds:.1f}",
                    "validation_loss": f"{found['loss']:.4f}",
                    "validation_accuracy": f"{found['accuracy']:.4f}",
                }


def best_settings(task: str, method: str) -> dict[str, str]:
    """The row of RUNS of a method's grid with the lowest validation loss."""
    key = {"task": task, "method": method, "seed": str(SEED), "steps": str(BUDGETS[task].steps)}
    rows = list(matching(RUNS, key))
    if not rows:
        raise SystemExit(f"{RUNS} has no run of {method} on {task}: make it with quality.py")
    return min(rows, key=lambda row: float(row["best_validation_loss"]))


def measure(data: Path, tasks: Sequence[str], methods: Sequence[str], steps: int) -> None:
    """Makes the runs that are not in CURVES."""
    done = {tuple(row[name] for name in FIELDS[:4]) for row in read_rows(CURVES)}
    for task, method in product(tasks, methods):
        settings = best_settings(task, method)
        if (task, method, settings["eps"], settings["lr"]) in done:
            continue
        loaded = load_model("smollm2", dtype=torch.bfloat16)
        training = Training(get_task(task), method, settings, *loaded)
        append(CURVES, FIELDS, list(training.points(data / task, steps)))


def by_task(rows: list[dict[str, str]]) -> dict[str, dict[str, list[dict[str, str]]]]:
    """The curve of each method, in the order of METHODS."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for task, method in product(dict.fromkeys(row["task"] for row in rows), METHODS):
        curve = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        if curve:
            found.setdefault(task, {})[method] = curve
    return found


def compare(task: str, curves: dict[str, list[dict[str, str]]]) -> None:
    """Prints the seconds until each method's validation is as good as MeZO's ever was."""
    if "mezo" not in curves:
        return
    goal = max(float(row["validation_accuracy"]) for row in curves["mezo"])
    times = {
        method: min(
            (float(row["seconds"]) for row in curve if float(row["validation_accuracy"]) >= goal),
            default=math.inf,
        )
        for method, curve in curves.items()
    }
    for method, seconds in times.items():
        ratio = times["mezo"] / seconds
        print(
            f"{task}: {goal} after {seconds:.0f} s of {method}; MeZO takes {ratio:.1f} times that"
        )


def draw(curves: dict[str, dict[str, list[dict[str, str]]]]) -> None:
    figure = Figure(figsize=(9, 3.6 * len(curves)), layout="constrained")
    all_axes = figure.subplots(len(curves), squeeze=False)[:, 0]
    for axes, (task, methods) in zip(all_axes, curves.items(), strict=True):
        for method, curve in methods.items():
            points = [
                (float(row["seconds"]), float(row["validation_accuracy"]))
                for row in curve
                if float(row["seconds"]) > 0  # on a logarithmic axis
            ]
            label = f"{METHODS[method]}, lr {curve[0]['lr']}"
            axes.plot(*zip(*points, strict=True), "o-", ms=3, label=label)
        axes.set(xscale="log", xlabel="seconds of training", ylabel="validation accuracy")
        axes.set_title(f"{task}, SmolLM2-135M-Instruct, bfloat16, batch {BATCH_SIZE}", loc="left")
        axes.legend(frameon=False)
        tidy(axes)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.data:
        measure(arguments.data, arguments.tasks, arguments.methods, arguments.steps)
    curves = by_task(read_rows(CURVES))
    draw(curves)
    for task, methods in curves.items():
        compare(task, methods)


if __name__ == "__main__":
    main()
