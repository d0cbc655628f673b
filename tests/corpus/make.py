"""Writes the whole files that the fuzzers garble: python tests/corpus/make.py (see tests/fuzz.py).

The broken ones beside them were found by benchmarks/reliability.py; whole-v1 is of older format.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dlzo.config import TrainConfig  # noqa: E402
from dlzo.journal import Reader, Writer, compact, create  # noqa: E402
from dlzo.metrics import Metrics, metrics_text  # noqa: E402
from test_journal import HEADER, RECORDS  # noqa: E402


def main() -> None:
    whole, small = HERE / "whole", HERE / "whole-compact"
    for folder in (whole, small):
        folder.mkdir(exist_ok=True)
        (folder / "journal.zo").unlink(missing_ok=True)
    create(whole / "journal.zo", HEADER)
    with Writer(Reader(whole / "journal.zo"), 10, 10.0) as journal:
        for record in RECORDS:
            journal.append(record)
    compact(whole / "journal.zo", small / "journal.zo")
    settings = {"version": 1, "model": "tiny", "dtype": "bfloat16", "data": "data"}
    config = asdict(TrainConfig("sst2", layer=1))
    (whole / "run.json").write_text(json.dumps(settings | {"config": config}, indent=2) + "\n")
    figures = {"loss": 0.5, "accuracy": 0.75}
    metrics: dict[str, Any] = dict.fromkeys(Metrics.__required_keys__, 1) | {
        **{"model": "tiny", "task": "sst2", "method": "dominant", "dtype": "bfloat16"},
        **{"layers": [1], "part": "all", "channels": "all", "zero_shot": figures, "test": figures},
        **{name: {"step": 1, **figures} for name in ("best", "final")},
        "history": [{"step": 0, "validation_loss": 0.69}, {"step": 1, "train_loss": None}],
    }
    text = metrics_text(cast(Metrics, dict(sorted(metrics.items()))))
    (whole / "metrics.json").write_text(text)
    adapter = {"version": 3, "base_model": "tiny", "base_fingerprint": "", "dtype": "bfloat16"}
    save_file(
        {"w": torch.ones(2)},
        whole / "adapter_model.safetensors",
        {"dlzo-layer": json.dumps(adapter | {"layers": [1], "part": "all"})},
    )


if __name__ == "__main__":
    main()
