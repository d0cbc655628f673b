"""Times of runs on this machine."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

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


def processor() -> str:
    """Its name, and on x86 its family and model: hosts in the cloud hide the rest of the name."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    about = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    if "model name" not in about:
        return about.get("CPU part", platform.machine())
    return f"{about['model name']}, family {about['cpu family']} model {about['model']}"
