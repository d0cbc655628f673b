"""The first result: the layer of SmolLM2-135M that stands out, and what tuning it alone gives.

    python benchmarks/first_light.py --data DIR

DIR holds train.jsonl, validation.jsonl and test.jsonl in the form of SST-2. Each run lands as JSON
in benchmarks/results and is not run again while its file is there; the figure is drawn from these.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from results import RESULTS, ROOT, write_json

from dlzo.config import TrainConfig
from dlzo.models import load_model
from dlzo.plots import tidy
from dlzo.probe import probe
from dlzo.trainer import train

FIGURE = ROOT / "docs" / "first-light.png"
SEEDS = (0, 1, 2)
STEPS = 600
EPS = 1e-2  # docs/tuning.md: best for one layer of a small model


def measured(name: str, run: Any) -> dict[str, Any]:
    """The result called `name`: of its file, else of `run`."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        write_json(path, run())
    return json.loads(path.read_text())


def run_probe() -> dict[str, Any]:
    return probe(*load_model("smollm2")).to_json()


def run_seed(seed: int, data: Path | None) -> dict[str, Any]:
    if data is None:
        raise SystemExit(f"{RESULTS} has no run of seed {seed}: give --data")
    config = TrainConfig("sst2", steps=STEPS, seed=seed, eps=EPS)
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(*load_model("smollm2"), config, data, Path(folder) / "out")
    print(f"seed {seed}: test accuracy {metrics['test']['accuracy']:.4f}", flush=True)
    return {**metrics, "threads": torch.get_num_threads(), "torch": torch.__version__}


def draw(report: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    depth = [row["layer"] for row in report["layers"]]
    left.plot(depth, [row["absmax"] for row in report["layers"]], "o-", color="tab:blue", ms=4)
    left.axvline(report["dominant"], color="tab:red", label=f"dominant: layer {report['dominant']}")
    left.set(yscale="log", xlabel="decoder layer", ylabel="max |h| after the layer")
    left.set_title("SmolLM2-135M-Instruct, forward passes only", loc="left")
    for run in runs:
        points = [entry for entry in run["history"] if "validation_accuracy" in entry]
        right.plot(
            [entry["step"] for entry in points],
            [entry["validation_accuracy"] for entry in points],
            "o-",
            ms=4,
            label=f"seed {run['seed']}: test {run['test']['accuracy']:.3f}",
        )
    untuned = runs[0]["zero_shot"]["accuracy"]
    right.axhline(untuned, color="tab:gray", ls=":", label=f"untuned: test {untuned:.3f}")
    right.set(xlabel="step", ylabel="validation accuracy")
    right.set_title(f"SST-2, layer {report['dominant']} tuned alone", loc="left")
    for axes in (left, right):
        axes.legend(frameon=False)
        tidy(axes)
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="not needed where all runs are there")
    data = parser.parse_args().data
    report = measured("probe_smollm2", run_probe)
    runs = [measured(f"sst2_seed{seed}", lambda seed=seed: run_seed(seed, data)) for seed in SEEDS]
    accuracies = [run["test"]["accuracy"] for run in runs]
    print(f"test accuracy {accuracies}, mean {sum(accuracies) / len(accuracies):.4f}")
    draw(report, runs)


if __name__ == "__main__":
    main()
