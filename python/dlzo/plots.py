"""Figures of what was measured, as PNG or SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dlzo.errors import UserError
from dlzo.files import check_plot, replace_file
from dlzo.metrics import Metrics
from dlzo.probe import ProbeReport
from dlzo.sensitivity import SensitivityReport
from dlzo.target import describe


def tidy(axes: Axes) -> None:
    """Give axes a pale grid, and no frame above and on the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot_probe(report: ProbeReport, path: Path) -> None:
    """Draw maxima and kurtosis by depth, with the decision marked.

    Raises:
        UserError: the suffix is neither .png nor .svg, or the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    depth = [stats.layer for stats in report.layers]
    for site, color in (("attention", "tab:orange"), ("mlp", "tab:purple")):
        inner = [stats for stats in report.sites if stats.site == site]
        where, absmax = [stats.layer for stats in inner], [stats.absmax for stats in inner]
        if inner:
            upper.plot(where, absmax, color=color, lw=1, label=f"{site} output")
    absmax = [stats.absmax for stats in report.layers]
    upper.plot(depth, absmax, "o-", color="tab:blue", ms=4, label="layer output")
    lower.plot(depth, [stats.kurtosis for stats in report.layers], "o-", color="tab:green", ms=4)
    upper.set_ylabel("largest |activation|")
    lower.set_ylabel("kurtosis of the output")
    lower.set_xlabel("decoder layer")
    lower.xaxis.get_major_locator().set_params(integer=True)
    decision = report.decision
    marks = [
        (decision.layer, f"dominant: layer {decision.layer}", "-"),
        (decision.runner_up, f"runner-up: layer {decision.runner_up}", ":"),
    ]
    for axes in (upper, lower):
        axes.set_yscale("log")
        tidy(axes)
        for layer, label, line in marks:
            if layer is not None:
                axes.axvline(layer, label=label, color="tab:red", linestyle=line)
    handles, labels = upper.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    _title(upper, f"{report.model}: {decision.verdict} (confidence {decision.confidence:.2f})")
    _save(figure, path)


def plot_sensitivity(report: SensitivityReport, path: Path) -> None:
    """Draw each layer's signal and its stability, and a heat map of how its effect grows.

    Raises:
        UserError: the suffix is neither .png nor .svg, or the file cannot be written.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    (left, right), names = figure.subplots(1, 2), [found.layer for found in report.layers]
    left.plot(names, [found.signal for found in report.layers], "o-", color="tab:blue", ms=4)
    left.set(xlabel="perturbed layer", ylim=(0, None))
    left.set_ylabel("signal: spread of the projected gradient", color="tab:blue")
    left.grid(alpha=0.3)
    stability = left.twinx()
    values = [found.sign_stability for found in report.layers]
    stability.plot(names, values, "s:", color="tab:orange", ms=3)
    stability.set(ylim=(0, 1.05))
    stability.set_ylabel("sign stability between batches", color="tab:orange")
    _title(left, f"{report.model}: {report.task}, {report.dtype}")
    depth = max(found.layer + len(found.growth) for found in report.layers)
    grid = [[math.nan] * found.layer + found.growth for found in report.layers]
    grew = any(change > 0 for found in report.layers for change in found.growth)
    edges = [i - 0.5 for i in range(len(names) + 1)]
    mesh = right.pcolormesh(
        [i - 0.5 for i in range(depth + 1)],
        edges,
        grid,
        norm=LogNorm() if grew else None,
        cmap="viridis",
    )
    right.set_yticks(range(len(names)), map(str, names), fontsize=7)
    right.set(xlabel="after layer", ylabel="perturbed layer")
    _title(right, f"relative change of the hidden state, eps {report.eps:g}")
    right.invert_yaxis()
    figure.colorbar(mesh, ax=right)
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
    untuned, best, test = metrics["zero_shot"], metrics["best"], metrics["test"]
    quality = "accuracy" if "accuracy" in test else "f1"
    for axes, name in zip(panels, (quality, "loss"), strict=True):
        values = [_value(entry, f"validation_{name}") for entry in validated]
        axes.plot(steps, values, "o-", color="tab:blue", ms=4, label="validation")
        axes.plot(0, _value(untuned, name), "D", color="tab:gray", label="test, untuned")
        tuned = _value(test, name)
        axes.plot(best["step"], tuned, "*", color="tab:red", ms=12, label="test, best")
        axes.set_ylabel(name)
        tidy(axes)
    panels[0].legend(frameon=False)
    panels[1].set_xlabel("step")
    _title(panels[0], f"{metrics['model']}: {metrics['task']}, {describe(metrics)}")
    _save(figure, path)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", parse_math=False)  # a path may have dollars


def _value(found: Mapping[str, object], name: str) -> float:
    """A figure; what was not measured or is not finite is None, and NaN leaves a gap."""
    value = found.get(name)
    return value if isinstance(value, int | float) else math.nan


def _save(figure: Figure, path: Path) -> None:
    check_plot(path)
    form = path.suffix.lower()[1:]
    try:
        replace_file(path, lambda partial: figure.savefig(partial, format=form, dpi=150))
    except OSError as error:
        raise UserError(f"plot {path} cannot be written ({error.strerror})") from error
