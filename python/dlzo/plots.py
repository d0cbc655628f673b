"""Figures of what was measured, as PNG or SVG files."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from dlzo.errors import UserError
from dlzo.files import replace_file
from dlzo.metrics import Metrics
from dlzo.probe import ProbeReport
from dlzo.target import describe

FORMATS = (".png", ".svg")


def plot_probe(report: ProbeReport, path: Path) -> None:
    """Draw max|h| and kurtosis by depth, with the decision marked.

    Raises:
        UserError: the suffix is neither .png nor .svg, or the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    depth = [stats.layer for stats in report.layers]
    upper.plot(depth, [stats.absmax for stats in report.layers], "o-", color="tab:blue", ms=4)
    lower.plot(depth, [stats.kurtosis for stats in report.layers], "o-", color="tab:green", ms=4)
    upper.set_ylabel("max |h|")
    lower.set_ylabel("kurtosis")
    lower.set_xlabel("decoder layer")
    lower.xaxis.get_major_locator().set_params(integer=True)
    decision = report.decision
    marks = [
        (decision.layer, f"dominant: layer {decision.layer}", "-"),
        (decision.runner_up, f"runner-up: layer {decision.runner_up}", ":"),
    ]
    for axes in (upper, lower):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for layer, label, line in marks:
            if layer is not None:
                axes.axvline(layer, label=label, color="tab:red", linestyle=line)
    if decision.layer is not None:
        upper.legend(frameon=False)
    upper.set_title(
        f"{report.model}: {decision.verdict} (confidence {decision.confidence:.2f})", loc="left"
    )
    _save(figure, path)


def plot_history(metrics: Metrics, path: Path) -> None:
    """Draw accuracy (or F1) and loss by step, with the test split before and after marked.

    Raises:
        UserError: the suffix is neither .png nor .svg, or the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    validated = [entry for entry in metrics["history"] if "validation_loss" in entry]
    steps = [entry["step"] for entry in validated]
    best, test = metrics["best"], metrics["test"]
    quality = "accuracy" if "accuracy" in test else "f1"
    for axes, name in zip(panels, (quality, "loss"), strict=True):
        # What was not measured or is not finite is None: NaN leaves a gap in the line.
        found = [entry.get(f"validation_{name}") for entry in validated]
        values = [math.nan if value is None else value for value in found]
        axes.plot(steps, values, "o-", color="tab:blue", ms=4, label="validation")
        axes.plot(0, metrics["zero_shot"][name], "D", color="tab:gray", label="test, untuned")
        axes.plot(best["step"], test[name], "*", color="tab:red", ms=12, label="test, best")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    panels[1].set_xlabel("step")
    panels[0].set_title(
        f"{metrics['model']}: {metrics['task']}, {describe(metrics['layers'], metrics['part'])}",
        loc="left",
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"plot {path} has the suffix {suffix!r}: use {' or '.join(FORMATS)}")
    try:
        replace_file(path, lambda partial: figure.savefig(partial, format=suffix[1:], dpi=150))
    except OSError as error:
        raise UserError(f"plot {path} cannot be written ({error.strerror})") from error
