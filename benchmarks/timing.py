"""Times of runs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

Run = Callable[[], object]
Times = dict[str, list[float]]


def seconds(run: Run) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleaved(runs: Mapping[str, Run], rounds: int = 15) -> Times:
    """Seconds of `rounds` runs of each, taken in turn after one to warm up."""
    for run in runs.values():
        run()
    times: Times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times
