"""Where the milliseconds of a step go, by kind of operation.

    python benchmarks/profile_step.py --data DIR

Our steps of benchmarks/speed.py, each profiled once by torch after one to warm up; nothing else may
be running. What torch's profiler adds to each call counts as "Python and calls", which is what no
operation takes. Beside it the speed of the matrix products, and of a large square one alone. Lands
in results/profile.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from results import RESULTS, read_rows, write_rows
from speed import BATCH_SIZE, DTYPES, TASKS, Contestants
from timing import Call, seconds
from torch.profiler import ProfilerActivity, profile, record_function

import dlzo_kernels.masters
import dlzo_kernels.step
from dlzo.models import parse_dtype
from dlzo.sampler import batch_of, step_seed
from dlzo.scoring import attention, norms
from dlzo.tasks import get_task, load_split

PROFILE = RESULTS / "profile.csv"
VARIANTS = ("ours_cold", "ours_cached")
MATRIX_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
# Kernels of ours, which torch's profiler does not see by itself.
OURS = (
    (attention, "tree_attention", "attention"),
    (norms, "rms_norm", "norm"),
    (dlzo_kernels.step, "perturb_layer", "noise"),
    (dlzo_kernels.masters, "accumulate_layer", "noise"),
)
SIDE = 2048  # of the matrices of the large product


def kind(name: str) -> str:
    if name in MATRIX_PRODUCTS:
        return "matrix products"
    if "attention" in name:
        return "attention"
    if name in ("noise", "aten::normal_"):
        return "noise"
    return "norms, activations, sums"


def named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, as an operation of that name in a profile."""

    @wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return recorded


def profiled(step: Call) -> tuple[dict[str, float], float]:
    """Milliseconds by kind, and the matrix products' operations."""
    step()
    with ExitStack() as stack:
        for module, function, name in OURS:
            recorded = named(getattr(module, function), name)
            stack.enter_context(patch.object(module, function, recorded))
        cpu = [ProfilerActivity.CPU]
        run = stack.enter_context(profile(activities=cpu, record_shapes=True, with_flops=True))
        whole = 1e3 * seconds(step)
    by_kind: dict[str, float] = {}
    operations = 0.0
    for event in run.key_averages():
        name = kind(event.key)
        by_kind[name] = by_kind.get(name, 0.0) + event.self_cpu_time_total / 1e3
        operations += event.flops if name == "matrix products" else 0
    by_kind["Python and calls"] = whole - sum(by_kind.values())
    return by_kind, operations


def large_product(dtype: torch.dtype) -> float:
    """Operations a second, in units of 1e9."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    times = [seconds(lambda: a @ b) for _ in range(9)]
    return 2 * SIDE**3 / median(times[2:]) / 1e9


def measure(data: Path, tasks: list[str], dtype: str) -> Iterator[dict[str, Any]]:
    contestants = Contestants(dtype)
    for task in tasks:
        rows = load_split(get_task(task), data / task, "train")
        examples = batch_of(rows, 0, 1, BATCH_SIZE)
        for variant, _, step in contestants.steps(task, examples, step_seed(0, 1)):
            if variant not in VARIANTS:
                continue
            by_kind, operations = profiled(step)
            whole = sum(by_kind.values())
            shares = {name: f"{by_kind[name] / whole:.3f}" for name in sorted(by_kind)}
            speed = operations / by_kind["matrix products"] / 1e6
            yield {
                "dtype": dtype,
                "task": task,
                "variant": variant,
                "ms": round(whole),
                **shares,
                "gflops_of_matrix_products": round(speed),
                "gflops_of_a_large_one": round(large_product(parse_dtype(dtype))),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2", "rte", "drop"])
    arguments = parser.parse_args()
    rows = [row for dtype in DTYPES for row in measure(arguments.data, arguments.tasks, dtype)]
    kept = [row for row in read_rows(PROFILE) if row["task"] not in arguments.tasks]
    write_rows(PROFILE, [*kept, *rows])
    for row in rows:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
