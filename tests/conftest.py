from __future__ import annotations

import os

# Threads that spin while they wait stall each other where other programs hold the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Workers of pytest-xdist share the cores out.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo_kernels import _C

ISAS = [name for name, *_ in _C.isas()]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a generator of its own is the same each time, in any order."""
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, forced."""
    reason = {name: why for name, _, runs, why in _C.isas() if not runs}.get(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    before = _C.selected_isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def set_threads() -> Iterator[object]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the command in this process: (exit code, stdout, stderr)."""
    from dlzo import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlzo", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of a tiny task's data."""
    from runs import write_data

    return write_data(tmp_path / "data")


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real model, in bfloat16; fetched and converted once into the user's cache."""
    from dlzo.models import load_model

    return load_model("smollm2", dtype=torch.bfloat16)
