"""How good a tuned model gets: layer by layer, with the rate of lr "auto", and method by method.

    python benchmarks/quality.py sweep [--data DIR] [--tasks sst2]
    python benchmarks/quality.py rates [--data DIR] [--tasks sst2]
    python benchmarks/quality.py methods [--data DIR] [--tasks sst2 copa ...]

DIR holds a folder for each task with its train, validation and test.jsonl. The model is
SmolLM2-135M-Instruct (de-quantised Q4_1) in bfloat16. Each finished run is a row of
results/quality_runs.csv, each of its validations one of results/quality_curves.csv; neither is made
again, and a run that was killed goes on from its journal in --runs. Tables and figures are drawn
from these files, without --data nothing else is done. Accuracies do not depend on what else runs on
the machine, the times of a run's steps do: methods are compared by those of step_times.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from results import RESULTS, ROOT, append, find, matching, read_rows, write_rows

from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation, evaluate
from dlzo.journal import Reader
from dlzo.learning_rate import find_lr
from dlzo.metrics import Progress, history
from dlzo.models import load_model
from dlzo.plots import tidy
from dlzo.run import JOURNAL_FILE
from dlzo.target import Target
from dlzo.tasks import get_task, load_split
from dlzo.trainer import DIVERGED, resume, train

RUNS, CURVES = RESULTS / "quality_runs.csv", RESULTS / "quality_curves.csv"
SEARCHES, RATES = RESULTS / "quality_searches.csv", RESULTS / "quality_rates.csv"
SWEEP, METHODS = RESULTS / "quality_sweep.csv", RESULTS / "quality_methods.csv"
STEP_TIMES, EQUAL_TIME = RESULTS / "step_times.csv", RESULTS / "quality_equal_time.csv"
SWEEP_FIGURE, METHODS_FIGURE = ROOT / "docs" / "sweep.png", ROOT / "docs" / "methods.png"
SHORT, LONG = ("sst2", "copa", "wsc", "cb", "rte"), ("boolq", "squad", "multirc", "drop")
ALL = (*SHORT, *LONG)
LAYER, LAYERS = 11, 30  # of SmolLM2-135M: the dominant one, found by `dlzo probe`, and all
SWEEP_STEPS = dict.fromkeys(SHORT, 200) | dict.fromkeys(LONG, 100)
SWEEP_LRS, SWEEP_SEEDS = (3e-4, 1e-3, 3e-3), (0, 1)
# Beside the dominant one with the budget of the methods.
SWEPT = {"sst2": (11, 17, 21, 25, 29)} | dict.fromkeys(
    ("copa", "wsc", "cb", "rte", "boolq"), (LAYER,)
)
# Of one layer. At the default, 1e-3, bfloat16 drowns the losses' difference for a layer such as 5,
# and the sweep would show that (docs/numerics.md).
EPS = 1e-2


@dataclass(frozen=True)
class Budget:
    """What each method gets on a task."""

    steps: int
    eval_every: int
    seeds: tuple[int, ...]


# A step takes as long as its texts: what 300 take on COPA is about what 50 take on CB.
BUDGETS = {
    **dict.fromkeys(("sst2", "copa"), Budget(300, 100, (0, 1, 2))),
    **dict.fromkeys(("wsc", "cb", "rte"), Budget(100, 50, (0, 1, 2))),
    **dict.fromkeys(LONG, Budget(50, 25, (0,))),
}


@dataclass(frozen=True)
class Method:
    """Settings of a run, and the grid from which validation chooses its learning rate."""

    settings: dict[str, Any]
    lrs: tuple[float, ...]


FOUR_DIRECTIONS = {"layer": LAYER, "eps": EPS, "directions": 4, "steps": 75, "eval_every": 25}
CANDIDATES = {
    "dominant": Method({"layer": LAYER, "eps": EPS}, (1e-4, 3e-4, 1e-3)),
    "dominant mlp": Method({"layer": LAYER, "eps": EPS, "part": "mlp"}, (3e-4, 1e-3, 3e-3)),
    "layer 17": Method({"layer": 17, "eps": EPS}, (3e-4, 1e-3, 3e-3)),
    "layer 29": Method({"layer": 29, "eps": EPS}, (3e-4, 1e-3, 3e-3)),
    "mezo": Method({"method": "mezo"}, (1e-5, 3e-5, 1e-4)),
    "lozo": Method({"method": "lozo"}, (1e-5, 3e-5, 1e-4)),
    "lora": Method({"method": "lora", "eps": EPS}, (1e-3, 3e-3, 1e-2)),
    "lora dominant": Method({"method": "lora", "layer": LAYER, "eps": EPS}, (3e-3, 1e-2, 3e-2)),
    # 12,672 parameters: a move as long as that of the layer takes a larger eps.
    "dominant channels": Method(
        {"layer": LAYER, "eps": 1e-1, "channels": "outlier"}, (3e-2, 1e-1, 3e-1)
    ),
    "dominant cosine": Method(
        {"layer": LAYER, "eps": EPS, "lr_decay": "cosine"}, (3e-4, 1e-3, 3e-3)
    ),
    # In 300 steps at 3e-4 a tenth of the weights.
    "dominant weight decay": Method(
        {"layer": LAYER, "eps": EPS, "weight_decay": 1.0}, (1e-4, 3e-4, 1e-3)
    ),
    # With as many forwards as the 300 steps of SST-2.
    "dominant 4 directions": Method(FOUR_DIRECTIONS, (3e-4, 1e-3, 3e-3)),
    "dominant 4 directions by spread": Method(
        FOUR_DIRECTIONS | {"lr_per_spread": True}, (3e-5, 1e-4, 3e-4)
    ),
}


@dataclass(frozen=True)
class RunKey:
    """One run: what a row of RUNS begins with."""

    task: str
    method: str
    layer: str
    eps: str
    lr: str
    seed: str
    steps: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return "_".join(asdict(self).values()).replace(" ", "-")


KEY = tuple(RunKey.__dataclass_fields__)
FIGURES = ("loss", "accuracy", "f1", "exact_match")
RUN_FIELDS = (
    *KEY,
    "best_step",
    *(f"best_validation_{name}" for name in FIGURES[:2]),
    *(f"final_validation_{name}" for name in FIGURES[:2]),
    *(f"test_{name}" for name in FIGURES),
    "skipped",
    "step_ms",
    "threads",
)
CURVE_FIELDS = (*KEY, "step", "validation_loss", "validation_accuracy")
SEARCH_KEY = ("task", "layer", "eps", "seed", "steps")
SEARCH_FIELDS = (*SEARCH_KEY, "lr", "losses")  # of the trials, by their rates


class Bench:
    """Makes the runs that RUNS does not have."""

    def __init__(self, data: Path | None, folder: Path) -> None:
        self.data, self.folder = data, folder

    def run(self, method: str, config: TrainConfig, *, test: bool) -> dict[str, str] | None:
        """The row of a run, made now if it is missing and there is data."""
        layer, eps, lr = ",".join(map(str, config.layers)), f"{config.eps:g}", f"{config.lr:g}"
        run = RunKey(config.task, method, layer, eps, lr, str(config.seed), str(config.steps))
        found = find_run(run, test)
        if found or self.data is None:
            return found
        model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        out = self.folder / run.name
        try:
            if (out / "run.json").exists():
                metrics: Mapping[str, Any] = resume(model, tokenizer, out)
            else:
                shutil.rmtree(out, ignore_errors=True)
                metrics = train(model, tokenizer, config, self._training_data(config.task), out)
        except UserError:
            if (given_up := figures_if_given_up(out)) is None:
                raise
            metrics = given_up
        # The model is left with the best weights.
        tested = evaluate(model, tokenizer, config.task, self.data / config.task) if test else {}
        if found := find_run(run, test):  # by another process meanwhile
            return found
        append(CURVES, CURVE_FIELDS, curve(run, metrics["history"]))
        row = asdict(run) | {"best_step": metrics["best"]["step"], "skipped": metrics["skipped"]}
        row |= figures("best_validation", metrics["best"])
        row |= figures("final_validation", metrics["final"]) | figures("test", tested)
        row |= {"step_ms": metrics["step_ms_median"], "threads": torch.get_num_threads()}
        append(RUNS, RUN_FIELDS, [row])
        shutil.rmtree(out)
        return find_run(run, test)

    def search(self, config: TrainConfig) -> dict[str, str] | None:
        """The row of what lr "auto" finds for a layer, as `run`."""
        values = config.task, str(config.layers[0]), f"{config.eps:g}", str(config.seed)
        key = dict(zip(SEARCH_KEY, (*values, str(config.steps)), strict=True))
        if find(SEARCHES, key) is None and self.data is not None:
            model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
            target, task = Target(model, config.layers), get_task(config.task)
            examples = load_split(task, self.data / config.task, "train")
            lr, losses = find_lr(target, tokenizer, config, task, examples)
            tried = " ".join(f"{rate:.2g}:{loss:.4f}" for rate, loss in losses.items())
            append(SEARCHES, SEARCH_FIELDS, [{**key, "lr": f"{lr:g}", "losses": tried}])
        return find(SEARCHES, key)

    def zero_shot(self, task: str) -> dict[str, str] | None:
        """The row of the untuned model."""
        run = RunKey(task, "zero-shot", "", "", "", "", "0")
        if find(RUNS, asdict(run)) is None and self.data is not None:
            tested = evaluate(*load_model("smollm2", dtype=torch.bfloat16), task, self.data / task)
            append(RUNS, RUN_FIELDS, [asdict(run) | figures("test", tested)])
        return find(RUNS, asdict(run))

    def _training_data(self, task: str) -> Path:
        """The task's data with a short test split: a run would score it twice, the bench once."""
        folder = self.folder / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
            with (self.data / task / name).open(encoding="utf-8") as file:
                lines = file.readlines()
            (folder / name).write_text("".join(lines[: 8 if name == "test.jsonl" else None]))
        return folder


def figures_if_given_up(out: Path) -> dict[str, Any] | None:
    """Of a run that ended early because its losses exploded; None of any other."""
    progress, records = Progress(), list(Reader(out / JOURNAL_FILE))
    for record in records:
        progress.take(record)
    if progress.skipped_in_a_row < DIVERGED:
        return None
    return {
        "best": progress.best,
        "final": {"loss": None, "accuracy": math.nan},
        "skipped": progress.skipped,
        "step_ms_median": None,
        "history": list(history(records)),
    }


def find_run(run: RunKey, test: bool) -> dict[str, str] | None:
    """The row of a finished run; with `test` only if it was tested, as those of a sweep are not."""
    rows = matching(RUNS, asdict(run))
    return next((row for row in rows if row["test_loss"] or not test), None)


def figures(prefix: str, found: Evaluation) -> dict[str, str]:
    """As text; a loss that is not finite stands as None in an evaluation."""
    return {
        f"{prefix}_{name}": f"{math.inf if value is None else value:.4f}"
        for name, value in found.items()
        if name in FIGURES
    }


def curve(run: RunKey, history: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in history:
        if "validation_loss" in entry:
            yield asdict(run) | {name: entry.get(name) for name in CURVE_FIELDS[len(KEY) :]}


def bisected(count: int, first: int) -> list[int]:
    """All numbers below count, `first` ahead, the others so that any few of them are spread out."""
    step, order = 1 << count.bit_length(), [first]
    while step > 1:
        step //= 2
        order += [i for i in range(count - 1, -1, -step) if i not in order]
    return order


def sweep(bench: Bench, task: str) -> list[dict[str, Any]]:
    """Each layer alone, with the same budget: validation after the last step, the mean of seeds."""
    configs = [
        sweep_config(task, layer=layer, lr=lr, seed=seed)
        for seed in SWEEP_SEEDS
        for lr in SWEEP_LRS
        for layer in bisected(LAYERS, LAYER)
    ]
    rows = [row for config in configs if (row := bench.run("dominant", config, test=False))]
    cells: dict[tuple[int, str], list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault((int(row["layer"]), row["lr"]), []).append(row)
    return [
        {
            "task": task,
            "layer": layer,
            "lr": lr,
            "seeds": len(found),
            **{
                name: f"{mean(float(row[f'final_validation_{name}']) for row in found):.4f}"
                for name in ("loss", "accuracy")
            },
            "step_ms": round(median(float(row["step_ms"]) for row in found)),
        }
        for (layer, lr), found in sorted(cells.items())
    ]


def sweep_config(task: str, **settings: Any) -> TrainConfig:
    steps = SWEEP_STEPS[task]
    return TrainConfig(task, steps=steps, eval_every=steps, eps=EPS, **settings)


def rates(bench: Bench, task: str) -> list[dict[str, Any]]:
    """What lr "auto" finds, beside the rate of a grid with the lowest loss after the last step."""
    table, layers = [], SWEPT.get(task, ())
    studies = [(partial(sweep_config, task, layer=layer), False) for layer in layers]
    for make, test in (*studies, (partial(method_config, task, "dominant"), True)):
        layer, steps = make().layers[0], make().steps
        lrs = CANDIDATES["dominant"].lrs if layer == LAYER else SWEEP_LRS
        found = bench.search(make())
        runs = [bench.run("dominant", make(lr=lr), test=test) for lr in lrs]
        if found is None or None in runs:
            continue
        best = min(runs, key=lambda row: float(row["final_validation_loss"]))["lr"]
        row = {"task": task, "layer": layer, "steps": steps, "found": found["lr"], "best": best}
        table.append(row | {"ratio": f"{float(found['lr']) / float(best):.2f}"})
    return table


def methods(
    bench: Bench, task: str, names: Sequence[str] = tuple(CANDIDATES)
) -> list[dict[str, Any]]:
    """Each method with its best lr of the grid, by validation loss: its mean on the test split."""
    table = []
    if (row := bench.zero_shot(task)) is not None:
        table.append(summary(task, "zero-shot", [row]))
    budget = BUDGETS[task]
    for name in names:
        lrs = CANDIDATES[name].lrs

        def run(lr: float, seed: int, name: str = name) -> Any:
            return bench.run(name, method_config(task, name, lr=lr, seed=seed), test=True)

        grid = {lr: row for lr in lrs if (row := run(lr, budget.seeds[0]))}
        if len(grid) < len(lrs):
            continue
        best = min(grid, key=lambda lr: float(grid[lr]["best_validation_loss"]))
        rows = [grid[best], *(run(best, seed) for seed in budget.seeds[1:])]
        table.append(summary(task, name, [row for row in rows if row]))
    return table


def method_config(task: str, name: str, **settings: Any) -> TrainConfig:
    budget = BUDGETS[task]
    fixed = {"steps": budget.steps, "eval_every": budget.eval_every, **CANDIDATES[name].settings}
    return TrainConfig(task, **fixed, **settings)


def summary(task: str, method: str, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """A row of the table: accuracy, or F1 of a generation task, on the test split."""
    metric = "test_f1" if rows[0]["test_f1"] else "test_accuracy"
    values = [float(row[metric]) for row in rows]
    return {
        "task": task,
        "method": method,
        "metric": metric,
        "steps": rows[0]["steps"],
        "eps": rows[0]["eps"],
        "lr": rows[0]["lr"],
        "seeds": len(values),
        "mean": f"{mean(values):.6f}",
        "stdev": f"{stdev(values):.6f}" if len(values) > 1 else "",
        "loss": f"{mean(float(row['test_loss']) for row in rows):.4f}",
    }


def averages(table: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The mean over all nine tasks, of accuracies and F1, of each method that was run on all."""
    for method in ("zero-shot", *CANDIDATES):
        rows = [row for row in table if row["method"] == method]
        if len(rows) == len(ALL):
            value = mean(float(row["mean"]) for row in rows)
            found = {"task": "mean of nine", "method": method, "mean": f"{value:.6f}"}
            yield dict.fromkeys(rows[0], "") | found


def in_equal_time(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation in the time that one dominant layer's run takes, on a line from one to the next.

    A method that takes less time has its last one.
    """
    curves, found = read_rows(CURVES), []
    for task in dict.fromkeys(row["task"] for row in table if row["lr"]):
        rows = {row["method"]: row for row in table if row["task"] == task and row["lr"]}
        seconds = after(rows["dominant"])(int(rows["dominant"]["steps"]))
        for method, row in rows.items():
            time = after(row)
            steps = next(n for n in itertools.count() if time(n + 1) > seconds)
            loss, accuracy = (mean_curve(curves, row, name) for name in ("loss", "accuracy"))
            found.append(
                {
                    "task": task,
                    "method": method,
                    "seconds": round(seconds),
                    "steps_done": min(steps, int(row["steps"])),
                    "loss": f"{on_the_curve(loss, steps):.6f}",
                    "accuracy": f"{on_the_curve(accuracy, steps):.6f}" if accuracy else "",
                }
            )
    return found


def on_the_curve(points: Mapping[int, float], steps: int) -> float:
    return float(np.interp(steps, list(points), list(points.values())))


def after(row: dict[str, Any]) -> Callable[[int], float]:
    """Seconds by the number of steps of a row of the table, the frozen prefix included."""
    times = find(STEP_TIMES, {name: row[name] for name in ("task", "method")})
    if times is None:
        raise SystemExit(f"no times of {row['method']!r} on {row['task']!r}: run step_times.py")
    prefixes, step = float(times["prefixes_s"]), float(times["step_ms"]) / 1e3
    return lambda steps: prefixes + steps * step


def draw_methods(table: Sequence[dict[str, Any]]) -> None:
    """Validation, the mean over seeds, against the time that the steps take."""
    tuned, curves = [row for row in table if row["lr"]], read_rows(CURVES)
    tasks = list(dict.fromkeys(row["task"] for row in tuned))
    figure = Figure(figsize=(11, 3.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False)
    names = itertools.product(tasks, ("accuracy", "loss"))
    for axes, (task, name) in zip(grid.flat, names, strict=True):
        for row in tuned:
            if row["task"] != task:
                continue
            points = mean_curve(curves, row, name)
            # No answers are generated for validation, so some tasks have a loss alone.
            axes.set_visible(bool(points))
            index = list(CANDIDATES).index(row["method"])
            style = {"color": f"C{index}", "ls": "-" if index < 10 else "--"}  # of ten colours
            places = [*map(after(row), points)]
            axes.plot(places, list(points.values()), "o", ms=4, label=row["method"], **style)
        axes.set(xlabel="seconds of prefixes and steps", ylabel=f"validation {name}")
        tidy(axes)
        axes.set_title(f"{task}, equal steps for all methods", loc="left")
        if name == "loss":
            # Beside the untuned model's: a run that explodes leaves the picture.
            axes.set_ylim(top=1.15 * points[0])
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(METHODS_FIGURE, dpi=110)


def mean_curve(
    curves: Iterable[dict[str, str]], row: dict[str, Any], name: str
) -> dict[int, float]:
    """Validation accuracy or loss by step of a row of the table, the mean over its seeds."""
    found: dict[int, list[float]] = {}
    for point in curves:
        value = point[f"validation_{name}"]
        same = all(point[key] == row[key] for key in ("task", "method", "eps", "lr", "steps"))
        if same and value:
            found.setdefault(int(point["step"]), []).append(float(value))
    return {step: mean(values) for step, values in sorted(found.items())}


def draw_sweep(table: Sequence[dict[str, Any]]) -> None:
    layers = {task: {row["layer"] for row in table if row["task"] == task} for task in ALL}
    tasks = [task for task in ALL if len(layers[task]) > 1]
    figure = Figure(figsize=(9, 3.8 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), squeeze=False)
    for axes, task in zip(panels.flat, tasks, strict=True):
        rows = [row for row in table if row["task"] == task]
        for lr in sorted({row["lr"] for row in rows}, key=float):
            points = [(row["layer"], float(row["accuracy"])) for row in rows if row["lr"] == lr]
            axes.plot(*zip(*points, strict=True), "o-", ms=4, label=f"lr {lr}")
        axes.axvline(LAYER, color="tab:red", lw=1, label=f"found by the probe: layer {LAYER}")
        axes.set(xlabel="the one decoder layer that is tuned", ylabel="validation accuracy")
        axes.set_title(
            f"{task}, SmolLM2-135M-Instruct, {SWEEP_STEPS[task]} zeroth-order steps", loc="left"
        )
        axes.margins(y=0.25)  # room for the legend
        axes.legend(ncols=4, loc="upper left", framealpha=1, edgecolor="none")
        tidy(axes)
    figure.savefig(SWEEP_FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=("sweep", "rates", "methods"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=ALL)
    parser.add_argument("--methods", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--runs", type=Path, default=ROOT / "quality-runs", help="scratch folder")
    arguments = parser.parse_args()
    chosen = arguments.tasks or ALL if arguments.data else ()
    bench, finished = Bench(arguments.data, arguments.runs), Bench(None, arguments.runs)
    path, study = {
        "sweep": (SWEEP, sweep),
        "rates": (RATES, rates),
        "methods": (METHODS, methods),
    }[arguments.study]
    make = partial(methods, names=arguments.methods) if study is methods else study
    for task in chosen:
        make(bench, task)
    table = [row for task in ALL for row in study(finished, task)]
    if not table:
        raise SystemExit(f"{RUNS} has no such runs: give --data")
    if study is methods:
        table += averages(table)
    write_rows(path, table)
    for row in table:
        print(*row.values(), sep="\t")
    if study is sweep:
        draw_sweep(table)
    elif study is methods:
        draw_methods(table)
        write_rows(EQUAL_TIME, in_equal_time(table))


if __name__ == "__main__":
    main()
