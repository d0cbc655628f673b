"""A tiny task and runs on it, for tests of what runs leave behind."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dlzo.adapter import load_adapter
from dlzo.config import TrainConfig
from dlzo.evaluation import evaluate
from dlzo.journal import Reader, Writer, compact, create
from dlzo.metrics import HistoryEntry, Metrics
from dlzo.replay import replay
from dlzo.trainer import OnProgress
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer(" terrible", " great")
CONFIG = TrainConfig("sst2", layer=1, steps=60, batch_size=8, eps=1e-2, lr=3e-3, eval_every=20)


def write_data(folder: Path) -> Path:
    """Sentences of a and b; the more frequent letter gives the label."""
    folder.mkdir()
    draw = random.Random(0)
    for split, size in (("train", 40), ("validation", 20), ("test", 20)):
        rows = []
        for i in range(size):
            often, seldom = ("ab", "ba")[i % 2]
            sentence = "".join(draw.choices((often, seldom), (9, 1), k=draw.randint(4, 10)))
            rows.append(json.dumps({"sentence": sentence, "label": i % 2}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def result(out: Path) -> dict[str, object]:
    """All that a finished run leaves, but for the times and memory that it took."""
    metrics = json.loads((out / "metrics.json").read_text())
    for measured in ("step_ms_median", "seconds", "peak_rss_mb"):
        del metrics[measured]
    files = {
        name: (out / name).read_bytes() for name in ("adapter_model.safetensors", "journal.zo")
    }
    return {**files, "metrics": metrics, "names": sorted(path.name for path in out.iterdir())}


def assert_rebuilt(
    out: Path,
    base_model: Callable[[], PreTrainedModel],
    best: dict[str, torch.Tensor],
    last: dict[str, torch.Tensor],
    data: Path,
    metrics: Metrics,
) -> None:
    """The files of a finished run give its bits: journals the last ones, the adapter the best."""
    compact(out / "journal.zo", out.parent / "small.zo")
    for journal in (out / "journal.zo", out.parent / "small.zo"):
        replayed, loaded = base_model(), base_model()
        replay(replayed, journal, out.parent / journal.stem)
        load_adapter(loaded, out.parent / journal.stem)
        assert same(state(replayed), last) and same(state(loaded), last)
    tuned = base_model()
    load_adapter(tuned, out)
    assert same(state(tuned), best)
    assert evaluate(tuned, TOKENIZER, "sst2", data) == metrics["test"]


def stopping_at(step: int, error: type[BaseException] = KeyboardInterrupt) -> OnProgress:
    """Ends a run when it reports this step."""

    def on_progress(entry: HistoryEntry) -> None:
        if entry["step"] == step:
            raise error

    return on_progress


class Killed(BaseException):
    """Stands for the end of the process: nothing in dlzo catches it."""


class FaultyOs:
    """The module os, but the n-th call that touches the disk fails; a write leaves half of it."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left, self.error = number, error

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in ("write", "fsync", "replace", "ftruncate"):
            return call

        def counted(*args):
            self.left -= 1
            if self.left < 0:
                if name == "write" and self.left == -1:
                    os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise self.error
            return call(*args)

        return counted


def with_header(journal, path, **changes):
    """The journal again, under another header."""
    reader = Reader(journal)
    create(path, replace(reader.header, **changes))
    with Writer(Reader(path), 100, 10.0) as writer:
        for record in reader:
            writer.append(record)
    return path


def rewrite_config(folder, text):
    """Gives a finished run's adapter another description, or none."""
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, None if text is None else {"dlzo-layer": text})
