"""What a rank does in the runs of test_distributed.py."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import Backend
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from dlzo import learning_rate, trainer
from dlzo.distributed import check_equal, from_first_rank, joined, quotients, rank, size
from dlzo.errors import UserError
from dlzo.learning_rate import find_lr
from dlzo.metrics import HistoryEntry
from dlzo.models import decoder_layers
from dlzo.scoring import PrefixCache
from dlzo.target import Target
from dlzo.tasks import get_task, load_split
from dlzo.trainer import resume, train
from dlzo_kernels import LowRankStep, zo_replay, zo_step
from runs import CONFIG, TOKENIZER, stopping_at
from tiny import tiny_model

SHORT = replace(CONFIG, steps=6, eval_every=2)
TARGETS = {
    "parts": {"layer": (1, 3), "part": "mlp"},
    "low rank": {"method": "lozo", "layer": None, "lr": 1e-3, "interval": 4},
    "all parameters": {"method": "mezo", "layer": None, "lr": 1e-3, "directions": 2},
}


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

    for name in ("taken up", "stopped"):
        with suppress(KeyboardInterrupt):
            train(
                tiny_model(),
                TOKENIZER,
                SHORT,
                folder / "data",
                folder / name,
                on_progress=stopping_at(3),
            )
    model = tiny_model()
    resume(model, TOKENIZER, folder / "taken up")
    save(model, folder / "taken up")


def targets(folder: Path) -> None:
    """Runs on more than one layer, whose ranks share examples, or directions."""
    for name, changes in TARGETS.items():
        model = tiny_model()
        train(model, TOKENIZER, replace(SHORT, **changes), folder / "data", folder / name)
        torch.save(model.state_dict(), folder / name / f"state-{rank()}.pt")


class WatchedCache(PrefixCache):
    """Tells what was put in, and what of it was asked for and used."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.kept, self.asked, self.used = set(), set(), set()
        WatchedCache.last = self

    def put(self, places, hidden, neighbours):
        self.kept |= places.keys()
        super().put(places, hidden, neighbours)

    def __contains__(self, tokens):
        self.asked.add(tokens)
        return super().__contains__(tokens)

    def get(self, tokens):
        self.used.add(tokens)
        return super().get(tokens)


def caching(folder: Path) -> None:
    """All that a rank scores comes from its cache; in one epoch, nothing was cached in vain."""
    trainer.PrefixCache = learning_rate.PrefixCache = WatchedCache
    for name, changes in (
        ("one epoch", {"steps": 5}),
        ("two epochs", {"steps": 10}),
        ("directions", {"steps": 5, "directions": size()}),
    ):
        config = replace(SHORT, **changes)
        train(tiny_model(), TOKENIZER, config, folder / "data", folder / name)
        cache = WatchedCache.last
        assert cache.asked == cache.kept >= cache.used, name
        assert (cache.kept == cache.used) == (name == "one epoch"), name
    for directions in (1, size()):
        config, task = replace(SHORT, steps=2, directions=directions), get_task("sst2")
        target = Target(tiny_model(), (1,))
        with suppress(UserError):  # so few steps need not help
            find_lr(target, TOKENIZER, config, task, load_split(task, folder / "data", "train"))
        cache = WatchedCache.last
        assert cache.kept >= cache.used, directions
        assert (cache.kept == cache.used) == (directions == 1), directions


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


def sharded(folder: Path) -> None:
    """Steps on a layer of DTensors against the same steps on the whole layer, to the last bit."""
    mesh = init_device_mesh("cpu", (size(),))
    low_rank = {"seed": 1, "eps": 1e-2, "lr": 1e-2, "rank": 1, "v_seed": 2}
    for dtype in (torch.float32, torch.bfloat16):
        whole, shards = (decoder_layers(tiny_model(dtype=dtype))[1] for _ in range(2))
        for i, (name, parameter) in enumerate(list(shards.named_parameters())):
            placement = (Shard(0), Shard(parameter.dim() - 1), Replicate())[i % 3]
            owner, _, attribute = name.rpartition(".")
            placed = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
            setattr(shards.get_submodule(owner), attribute, placed)
        for seed in range(3):
            steps = [zo_step(layer, seed, 1e-2, 1e-2, directions=2) for layer in (whole, shards)]
            with steps[0].minus(1), steps[1].minus(1):
                assert_equal(whole, shards)
                with pytest.raises(RuntimeError, match="perturbed by an open step"):
                    zo_step(shards, seed, 1e-2, 1e-2)
            for step in steps:
                assert step.update((0.5, 0.7), (0.4, 0.9)).applied
            assert_equal(whole, shards)
        for layer in (whole, shards):
            zo_replay(layer, [1, 2], [0.1, -0.2], [0, 1])
        assert_equal(whole, shards)
        shards.double()  # which swaps the tensors
    placed = distribute_tensor(torch.ones(6, 6), mesh, [Shard(0)])
    step = zo_step(placed, 1, 1e-2, 1e-2)
    placed.add_(1)
    with pytest.raises(RuntimeError, match="was written since the step was opened"):
        step.update(1.0, 0.5)
    with pytest.raises(ValueError, match="low-rank directions need plain"):
        LowRankStep(distribute_tensor(torch.ones(6, 6), mesh, [Shard(0)]), **low_rank)
    for placement, says in ((Shard(1), "middle dimension"), (Partial(), "only shards")):
        with pytest.raises(ValueError, match=says):
            zo_step(DTensor.from_local(torch.ones(2, 3, 4), mesh, [placement]), 0, 1e-2, 1e-2)


def beside_a_gpu(folder: Path) -> None:
    """What is on the CPU is sent and summed."""
    assert size() == 2
    assert quotients([1.0 + rank()], [2.0]) == [0.75]
    assert from_first_rank(lambda: "said") == "said"
    check_equal(lambda: "ab" * 32, "nothing")


def see_a_gpu() -> None:
    """Shows torch a GPU; gloo stands in for nccl, for what lies on the GPU alone."""
    torch._C._get_accelerator = lambda *_: torch.device("cuda")
    Backend.default_device_backend_map["cuda"] = "gloo"


def assert_equal(whole: torch.nn.Module, shards: torch.nn.Module) -> None:
    for a, b in zip(whole.parameters(), shards.parameters(), strict=True):
        assert b.full_tensor().dtype is a.dtype and torch.equal(a, b.full_tensor())


def run_rank(scenario: str, folder: Path, shared: dict[str, str], rank: int) -> None:
    """Runs a scenario as one rank, in a process of its own; what it says goes to a file."""
    os.environ.update(shared, RANK=str(rank))
    sys.stderr = stderr_of(folder, rank).open("w")
    torch.set_num_threads(1)
    if scenario == "beside_a_gpu":
        see_a_gpu()
    with joined():
        globals()[scenario](folder)


def stderr_of(folder: Path, rank: int) -> Path:
    return folder / f"stderr-{rank}"
