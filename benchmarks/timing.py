"""Times of calls on this machine."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Call = Callable[[], object]
Times = dict[str, list[float]]


def seconds(call: Call) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Mapping[str, Call], rounds: int = 15) -> Times:
    """Seconds of `rounds` calls of each, taken in turn after one to warm up."""
    for call in calls.values():
        call()
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def processor() -> str:
    """Its name, and on x86 its family and model: hosts in the cloud hide the rest of the name."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    about = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    if "model name" not in about:
        return about.get("CPU part", platform.machine())
    return f"{about['model name']}, family {about['cpu family']} model {about['model']}"
