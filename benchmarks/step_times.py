"""How long a step of each method takes, on the tasks of quality.py.

    python benchmarks/step_times.py --data DIR [--tasks sst2 copa ...]

The steps of `dlzo train`, for each method that results/quality_methods.csv has on a task, at its
rate: SmolLM2-135M-Instruct (de-quantised Q4_1), bfloat16, batch 16, the prefixes computed before,
which is timed by itself, of methods on the same layer the median. The methods take turns, in each
round on another batch, and the first round is not counted; nothing else may be running. Lands in
results/step_times.csv, a task at once: one whose methods are all there is not measured again.
quality.py compares the methods by it.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from quality import ALL, METHODS, STEP_TIMES, method_config
from results import matching, read_rows, write_rows
from timing import processor, seconds

from dlzo.models import load_model
from dlzo.rule import rule_of
from dlzo.sampler import batch_of
from dlzo.scoring import PrefixCache, Scorer
from dlzo.step import take_step
from dlzo.tasks import get_task, load_splits
from dlzo.trainer import resolved, target_of

ROUNDS = 7


class TimedRun:
    """A method's run on a task, to be timed step by step."""

    def __init__(self, data: Path, row: Mapping[str, str]) -> None:
        model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        config = method_config(row["task"], row["method"], lr=float(row["lr"]))
        self.config = resolved(model, tokenizer, config)
        self.rule, self.target = rule_of(self.config), target_of(model, self.config)
        task, cache = get_task(row["task"]), PrefixCache(config.prefix_cache_mb * 10**6)
        layers = self.target.decoder_layers
        self.scorer = Scorer(model, tokenizer, layers, loss=task.loss, cache=cache)
        splits = load_splits(task, data / row["task"])
        self.train_set = self.scorer.encode(task.drawn(splits["train"]))
        self.validation_set = self.scorer.encode(splits["validation"])

    def cache_prefixes(self) -> None:
        """Of all texts, before the first step."""
        self.scorer.cache_prefixes([*self.train_set, *self.validation_set])

    def step(self, number: int) -> None:
        config = self.config
        batch = batch_of(self.train_set, config.seed, number, config.batch_size)
        take_step(self.rule, self.target, self.scorer, batch, config, number, max_loss=math.inf)


def measured(data: Path, rows: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """A row for each method of a task."""
    runs = {row["method"]: TimedRun(data, row) for row in rows}
    prefixes: dict[tuple[int, ...], list[float]] = {}
    for run in runs.values():
        prefixes.setdefault(run.config.layers, []).append(seconds(run.cache_prefixes))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = deque(runs.items())
    for number in range(1, ROUNDS + 2):
        for name, run in order:
            times[name].append(seconds(lambda: run.step(number)))  # noqa: B023
        order.rotate()  # the first is the one that meets rows of a new length
    for name, run in runs.items():
        yield {
            "task": rows[0]["task"],
            "method": name,
            "prefixes_s": f"{median(prefixes[run.config.layers]):.1f}",
            "step_ms": f"{1e3 * median(times[name][1:]):.0f}",
            "threads": torch.get_num_threads(),
            "processor": processor(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=ALL, default=ALL)
    arguments = parser.parse_args()
    for task in arguments.tasks:
        rows = [row for row in matching(METHODS, {"task": task}) if row["lr"]]
        done = {row["method"] for row in matching(STEP_TIMES, {"task": task})}
        if done.issuperset(row["method"] for row in rows):
            continue
        others = [row for row in read_rows(STEP_TIMES) if row["task"] != task]
        new = list(measured(arguments.data, rows))
        write_rows(STEP_TIMES, [*others, *new])
        for row in new:
            print(*row.values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
