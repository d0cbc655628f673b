"""One rank of the runs in tests/test_distributed.py: python ranks.py SCENARIO FOLDER."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from dlzo.distributed import joined, rank, size
from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.trainer import HistoryEntry, resume, train
from runs import CONFIG, TOKENIZER
from tiny import tiny_model

SHORT = replace(CONFIG, steps=6, eval_every=2)


def save(model: torch.nn.Module, folder: Path) -> None:
    """The tuned layer of this rank, and the figures that it has."""
    weights = [parameter.detach().clone() for parameter in decoder_layers(model)[1].parameters()]
    torch.save(weights, folder / f"weights-{rank()}.pt")


def whole_runs(folder: Path) -> None:
    """Runs that go through: by examples, by directions, and one taken up by all ranks."""
    for name, config in (
        ("examples", SHORT),
        ("directions", replace(SHORT, directions=2 * size())),
    ):
        model = tiny_model()
        train(model, TOKENIZER, config, folder / "data", folder / name)
        save(model, folder / name)

    def stop(entry: HistoryEntry) -> None:
        if entry["step"] == 3:
            raise KeyboardInterrupt

    for name in ("taken up", "stopped"):
        with suppress(KeyboardInterrupt):
            train(tiny_model(), TOKENIZER, SHORT, folder / "data", folder / name, on_progress=stop)
    model = tiny_model()
    resume(model, TOKENIZER, folder / "taken up")
    save(model, folder / "taken up")


def differing(folder: Path) -> None:
    """The last rank's weights change by one bit on their way; then its data do."""
    model = tiny_model()
    weight = next(decoder_layers(model)[1].parameters())

    def change(entry: HistoryEntry) -> None:
        if entry["step"] == 3 and rank() == size() - 1:
            with torch.no_grad():
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))

    runs = [
        lambda: train(model, TOKENIZER, SHORT, folder / "data", folder / "bit", on_progress=change),
        lambda: train(
            tiny_model(),
            TOKENIZER,
            SHORT,
            folder / ("other" if rank() == size() - 1 else "data"),
            folder / "other-data",
        ),
        lambda: train(tiny_model(), TOKENIZER, SHORT, folder / "data", folder / "data"),
    ]
    for run in runs:
        try:
            run()
        except UserError as error:
            with (folder / f"errors-{rank()}").open("a") as file:
                file.write(f"{error}\n")


def dying(folder: Path) -> None:
    """Rank 1 is killed after step 3."""

    def die(entry: HistoryEntry) -> None:
        if entry["step"] == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(tiny_model(), TOKENIZER, SHORT, folder / "data", folder / "out", on_progress=die)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        globals()[sys.argv[1]](Path(sys.argv[2]))
