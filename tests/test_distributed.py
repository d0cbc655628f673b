"""Runs on several ranks, against one process on the same batches."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlzo import distributed
from dlzo.journal import Reader
from dlzo.models import decoder_layers
from dlzo.records import Event
from dlzo.replay import replay
from dlzo.rule import Rule
from dlzo.trainer import resume, train
from ranks import SHORT, TARGETS, run_rank, stderr_of
from runs import TOKENIZER, same, state, write_data
from tiny import byte_tokenizer, tiny_model

# Forks ranks off a process that has imported once what takes long. Not dlzo: that process looks for
# modules in the working folder first, whose dlzo_kernels may have no extension in it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.tensor", "transformers.models.llama.modeling_llama", "peft"]
)


def start(scenario: str, folder: Path, size: int) -> list[tuple[int, str]]:
    """(exit code, stderr) of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        FORKS.Process(target=run_rank, args=(scenario, folder, shared, rank))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [(p.exitcode, stderr_of(folder, rank).read_text()) for rank, p in enumerate(processes)]


@pytest.fixture(scope="module", params=[2, 3])
def runs(request, tmp_path_factory):
    """(number of ranks, folder of their runs)."""
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder / "data")
    for code, error in start("whole_runs", folder, request.param):
        assert code == 0, error
    return request.param, folder


def weights(folder: Path, rank: int = 0) -> list[torch.Tensor]:
    return torch.load(folder / f"weights-{rank}.pt", weights_only=True)


def evaluations(folder: Path) -> list[Event]:
    return [record for record in Reader(folder / "journal.zo") if isinstance(record, Event)]


def assert_close(folder: Path, other: Path) -> None:
    """Two runs that differ in the order of the loss sums, in float32, alone."""
    for ours, theirs in zip(evaluations(folder), evaluations(other), strict=True):
        assert (ours.step, ours.name) == (theirs.step, theirs.name)
        assert ours.values == pytest.approx(theirs.values, rel=1e-4)
    steps = [list(Reader(run / "journal.zo").steps()) for run in (folder, other)]
    for ours, theirs in zip(*steps, strict=True):
        assert ours[:3] == theirs[:3]
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)


@pytest.mark.parametrize("name", ["examples", "directions", "taken up"])
def test_all_ranks_end_with_the_same_bits_and_rank_0s_journal_has_them(runs, name):
    size, folder = runs
    metrics = json.loads((folder / name / "metrics.json").read_text())
    replayed = decoder_layers(tiny_model())[1]
    steps = list(Reader(folder / name / "journal.zo").steps())
    Rule(SHORT.seed).replay(replayed, steps[: metrics["best"]["step"]])
    for rank in range(size):
        assert all(map(torch.equal, weights(folder / name, rank), replayed.parameters()))
    assert not torch.equal(
        weights(folder / name)[0], next(tiny_model().model.layers[1].parameters())
    )


def test_examples_shared_out_give_the_losses_of_one_process(runs, tmp_path):
    _, folder = runs
    train(tiny_model(), TOKENIZER, SHORT, folder / "data", tmp_path / "one")
    assert_close(folder / "examples", tmp_path / "one")


def test_directions_shared_out_give_the_bits_of_one_process(runs, tmp_path, set_threads):
    size, folder = runs
    # As torchrun sets for each rank: matrix products may round otherwise with more.
    set_threads(1)
    config = replace(SHORT, directions=2 * size)
    train(tiny_model(), TOKENIZER, config, folder / "data", tmp_path / "one")
    steps = [
        list(Reader(run / "journal.zo").steps())
        for run in (folder / "directions", tmp_path / "one")
    ]
    assert steps[0] == steps[1]
    assert len(steps[0][0].gradients) == 2 * size


def test_a_stopped_run_goes_on_with_the_same_or_another_number_of_ranks(runs, tmp_path):
    _, folder = runs
    assert (folder / "taken up" / "journal.zo").read_bytes() == (
        folder / "examples" / "journal.zo"
    ).read_bytes()
    shutil.copytree(folder / "stopped", tmp_path / "alone")
    resume(tiny_model(), TOKENIZER, tmp_path / "alone")
    assert_close(folder / "examples", tmp_path / "alone")


def test_runs_on_more_than_a_layer_end_in_the_bits_of_rank_0s_journal(tmp_path):
    write_data(tmp_path / "data")
    for code, error in start("targets", tmp_path, 2):
        assert code == 0, error
    for name in TARGETS:
        best = json.loads((tmp_path / name / "metrics.json").read_text())["best"]["step"]
        model = tiny_model()
        replay(model, tmp_path / name / "journal.zo", tmp_path / name / "rebuilt", until=best)
        for rank in range(2):
            found = torch.load(tmp_path / name / f"state-{rank}.pt", weights_only=True)
            assert same(found, state(model))
        assert best > 0


def test_a_rank_caches_what_it_scores(tmp_path):
    write_data(tmp_path / "data")
    for code, error in start("caching", tmp_path, 3):
        assert code == 0, error


def test_what_differs_between_ranks_is_said_and_by_which(tmp_path):
    write_data(tmp_path / "data")
    write_data(tmp_path / "other")
    with (tmp_path / "other" / "train.jsonl").open("a") as file:
        file.write('{"sentence": "aab", "label": 0}\n')
    for code, error in start("differing", tmp_path, 3):
        assert code == 0, error
    for rank in range(3):
        errors = (tmp_path / f"errors-{rank}").read_text().splitlines()
        assert "the weights after step 4 on rank 2 differs" in errors[0]
        assert "data or the settings on rank 2 differs" in errors[1]
        assert "exists: choose another folder" in errors[2]


def test_when_a_rank_dies_the_others_stop_and_the_run_goes_on(tmp_path):
    write_data(tmp_path / "data")
    (first, said), (killed, _), (last, said_too) = start("dying", tmp_path, 3)
    assert killed == -9
    assert first == last == 1
    for error in (said, said_too):
        assert "UserError: another rank has died or cannot be reached" in error
    resume(tiny_model(), TOKENIZER, tmp_path / "out")
    train(tiny_model(), TOKENIZER, SHORT, tmp_path / "data", tmp_path / "one")
    assert_close(tmp_path / "out", tmp_path / "one")


@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_layer_moves_by_the_bits_of_the_whole_one(tmp_path, size):
    for code, error in start("sharded", tmp_path, size):
        assert code == 0, error


def test_what_lies_on_the_cpu_is_sent_beside_a_gpu_too(tmp_path):
    for code, error in start("beside_a_gpu", tmp_path, 2):
        assert code == 0, error


@pytest.mark.parametrize("size", ["4", ""])
def test_a_number_of_ranks_without_a_rank_starts_none(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    with distributed.joined():
        assert (distributed.size(), distributed.rank()) == (1, 0)


def test_torchrun_starts_the_command(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer(" terrible", " great").save_pretrained(tmp_path / "model")
    write_data(tmp_path / "data")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "dlzo", "train", tmp_path / "model"]
    options = ["--task", "sst2", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    shape = ["--layer", "1", "--steps", "4", "--batch-size", "8", "--dtype", "float32"]
    # Away from this folder, whose dlzo_kernels has no extension in it.
    done = subprocess.run(
        [*command, *options, *shape], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("untuned") == 1
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 4
