"""What a data-parallel step sends, and what limits it at 8, 64 and 1,000 workers.

    python benchmarks/scale.py

Measured here: bytes on the loopback device per all-reduce of a step's losses, and its time, for 2
to 4 ranks of gloo on this machine. Simulated from these, from the step on SST-2 in results/
speed_table.csv (bfloat16, prefix cached) and from the kernels' times in results/kernels.csv: the
step of N workers. The figures land in results/scale.json.
"""

from __future__ import annotations

import csv
import json
import math
import random
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from results import RESULTS, find, write_json

ROUNDS = 2000
RANKS = (2, 3, 4)
WORKERS = (8, 64, 1000)
SPREAD = 0.05  # standard deviation of a share's time, as a part of it, assumed
LAYER = 3_540_096


def loopback_bytes() -> int:
    """Bytes that the loopback device has carried, headers and acknowledgements included."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[1])


def measure(rank: int, size: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    sums = torch.ones(2, 2, dtype=torch.float64)
    times = []
    dist.barrier()
    before = loopback_bytes()
    for _ in range(ROUNDS):
        started = time.perf_counter()
        dist.all_reduce(sums)
        times.append(1e6 * (time.perf_counter() - started))
    sent = loopback_bytes() - before
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        write_json(Path(out), {"bytes": sent / ROUNDS, "us": median(times)})


def all_reduce(size: int, work: Path) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = work / str(size)
    mp.spawn(measure, (size, port, str(out)), nprocs=size)
    return json.loads(out.read_text())


def step_and_own_ms() -> tuple[float, float]:
    """A whole step, and what of it every rank does: all but the losses."""
    step = find(RESULTS / "speed_table.csv", {"dtype": "bfloat16", "task": "sst2"})
    with (RESULTS / "kernels.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    ns = {(row["what"], row["threads"]): float(row["ns_per_element"]) for row in rows}
    own = ns["a step but its losses bfloat16", "2"]
    return float(step["ours_cached_ms"]), own * LAYER / 1e6


def simulate(
    workers: int, units: int, step_ms: float, own_ms: float, hop_us: float
) -> dict[str, float]:
    """A step of N workers: median of the slowest share, the rank's own work, and the all-reduce.

    Args:
        workers: N.
        units: examples x directions, each scored by one worker.
        step_ms: of one worker that scores 16 units.
        own_ms: what of it is not shared.
        hop_us: of one message of an all-reduce: a ring, as in gloo, takes 2 (N - 1) of them one
            after the other, a tree 2 log2 N.
    """
    draw = random.Random(0)
    share_ms = -(-units // workers) * (step_ms - own_ms) / 16
    busy = min(workers, units)
    slowest_ms = median(
        max(draw.gauss(share_ms, SPREAD * share_ms) for _ in range(busy)) for _ in range(500)
    )
    ring_ms = 2 * (workers - 1) * hop_us / 1e3
    tree_ms = 2 * math.log2(workers) * hop_us / 1e3
    return {
        "workers": workers,
        "units": units,
        "slowest_share_ms": slowest_ms,
        "own_ms": own_ms,
        "ring_ms": ring_ms,
        "tree_ms": tree_ms,
        "speedup_ring": units / 16 * step_ms / (slowest_ms + own_ms + ring_ms),
        "speedup_tree": units / 16 * step_ms / (slowest_ms + own_ms + tree_ms),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wire = {size: all_reduce(size, Path(folder)) for size in RANKS}
    step_ms, own_ms = step_and_own_ms()
    hop_us = wire[2]["us"] / 2
    simulated = [
        simulate(workers, units, step_ms, own_ms, hop_us)
        for workers in WORKERS
        for units in (16, 16 * workers)
    ]
    found = {"all_reduce": wire, "step_ms": step_ms, "simulated": simulated}
    print(json.dumps(found, indent=1))
    write_json(RESULTS / "scale.json", found)


if __name__ == "__main__":
    main()
