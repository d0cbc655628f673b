"""What the probe costs on SmolLM2: its time, and the share of the statistics in it.

    python benchmarks/probe.py

The whole probe, and the time within it that hooks take, against the rest: forwards and report.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from results import RESULTS, write_json

from dlzo import activations
from dlzo.models import load_model
from dlzo.probe import probe

ROUNDS = 7


def main() -> None:
    model, tokenizer = load_model("smollm2")
    own, spent = activations._add, 0.0

    def timed(*arguments: Any) -> None:
        nonlocal spent
        start = time.perf_counter()
        own(*arguments)
        spent += time.perf_counter() - start

    activations._add = timed
    rounds = []
    for _ in range(ROUNDS):
        spent, start = 0.0, time.perf_counter()
        probe(model, tokenizer)
        seconds = time.perf_counter() - start
        rounds.append({"seconds": seconds, "statistics_share": spent / (seconds - spent)})
        print(rounds[-1], flush=True)
    found = {
        "first_seconds": rounds[0]["seconds"],
        **{name: median(entry[name] for entry in rounds) for name in rounds[0]},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
    }
    write_json(RESULTS / "probe_cost.json", found)


if __name__ == "__main__":
    main()
