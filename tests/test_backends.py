"""What is built, what runs, and how one is forced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import dlzo_kernels
from dlzo_kernels import _C
from dlzo_kernels.backends import report
from dlzo_kernels.ops import _gpu, _triton
from dlzo_kernels.ops._common import check_tensor
from dlzo_kernels.ops._parts import Directions


def import_with(isa: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import dlzo_kernels as k; print(k._C.selected_isa()); print(k.gaussian((3,), 1).tolist())"
    )
    environment = {**os.environ, "DLZO_ISA": isa}
    # In a folder apart: Python would find the source in that of the project.
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_baseline_is_always_there_and_the_best_is_in_use():
    rows = {backend.name: backend for backend in dlzo_kernels.backends()}
    assert rows["cpu/baseline"].built
    assert rows["cpu/baseline"].runs
    assert _C.selected_isa() == next(name for name, _, runs, _ in _C.isas() if runs)
    for backend in rows.values():
        assert bool(backend.reason) != backend.runs


def test_the_report_names_every_backend_and_why_one_is_missing():
    text = report()
    for backend in dlzo_kernels.backends():
        assert backend.name in text
        assert backend.reason in text


def test_the_environment_forces_an_isa(tmp_path):
    done = import_with("baseline", tmp_path)
    assert done.stdout.splitlines()[0] == "baseline"
    assert done.stdout.splitlines()[1] == str(dlzo_kernels.gaussian((3,), 1).tolist())


def test_an_unknown_isa_is_refused(tmp_path):
    done = import_with("avx1024", tmp_path)
    assert done.returncode != 0
    assert "DLZO_ISA: unknown ISA 'avx1024'; this machine runs: " in done.stderr
    with pytest.raises(ValueError, match="unknown ISA"):
        _C.select_isa("sse9")


@pytest.mark.parametrize("name", [name for name, *_ in _C.isas()])
def test_an_isa_that_cannot_run_is_refused(name):
    _, _, runs, why = next(isa for isa in _C.isas() if isa[0] == name)
    if runs:
        pytest.skip(f"{name} runs here")
    with pytest.raises(ValueError, match=f"the ISA '{name}' cannot run here: {why}"):
        _C.select_isa(name)


def test_torchs_own_openmp_pool_is_used():
    assert _C.thread_pool() == "openmp"


def test_importing_the_kernels_needs_torch_and_numpy_only(tmp_path):
    code = (
        "import sys\n"
        'for n in ("transformers", "triton", "rich", "typer", "dlzo"): sys.modules[n] = None\n'
        "import dlzo_kernels; print(dlzo_kernels.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == dlzo_kernels.__version__


def test_the_source_without_the_extension_says_what_to_do(tmp_path):
    source = Path(dlzo_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "dlzo_kernels", ignore=shutil.ignore_patterns("_C*.so"))
    # An editable install would find the extension where it was built.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
        "sys.path.insert(0, '.'); import dlzo_kernels"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "is the source of dlzo_kernels, without its compiled extension" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.mark.parametrize("column", _gpu.COLUMNS)
def test_a_gpu_column_that_cannot_run_is_refused(monkeypatch, column):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_gpu, "_selected", [])
    with pytest.raises(ValueError, match=f"the GPU column '{column}' cannot run here: "):
        _gpu.select(column)
    with pytest.raises(ValueError, match="unknown GPU column 'metal'; choose one of cuda, triton"):
        _gpu.select("metal")


def test_only_what_is_exact_asks_for_an_exact_column(monkeypatch):
    monkeypatch.setattr(_gpu, "_selected", [])
    monkeypatch.delenv("DLZO_GPU", raising=False)
    monkeypatch.setattr(_gpu, "why_not", lambda column: "another ptxas")
    with FakeTensorMode():
        there = torch.empty(1, 1, 3, 8, device="cuda")
    check_tensor("query", there)  # all that attention asks for, beside Triton
    with pytest.raises(ValueError, match=r"no GPU column can run here \(cuda: another ptxas"):
        dlzo_kernels.zo_step(there, 1, 1e-3, 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_a_gpu_where_there_is_none_says_so():
    with pytest.raises(ValueError, match=r"no GPU column can run here \(cuda: "):
        dlzo_kernels.gaussian((3,), 1, device="cuda")
    if hasattr(_C, "cuda"):
        assert _C.cuda.why_no_device().startswith("no CUDA device (")


def test_the_first_column_that_can_run_is_used_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(_gpu, "_selected", [])
    monkeypatch.setattr(_gpu, "why_not", lambda name: "it is broken" if name == "cuda" else "")
    assert _gpu.selected() == "triton"
    monkeypatch.setattr(_gpu, "_selected", [])
    monkeypatch.setenv("DLZO_GPU", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot run here: it is broken"):
        _gpu.selected()


def test_a_misspelt_column_is_named_where_no_column_can_run(monkeypatch):
    monkeypatch.setattr(_gpu, "_selected", [])
    monkeypatch.setattr(_gpu, "why_not", lambda name: "there is no GPU")
    monkeypatch.setenv("DLZO_GPU", "cudda")
    with pytest.raises(ValueError, match="unknown GPU column 'cudda'"):
        _gpu.selected()


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *(((7, 5), False), ((8, 0), True), ((8, 7), True), ((9, 0), True), ((11, 0), False)),
        *(((10, 3), True), ((12, 0), True), ((12, 1), True), ((13, 0), True)),
    ],
)
def test_machine_code_fits_a_gpu_or_not(capability, runs):
    assert _gpu.has_code_for(*capability, "80, 86, 89, 90, 100, 120") == runs


def test_numbers_for_a_kernel_go_by_value_or_are_made_where_it_runs():
    found, kept = _gpu.directions(torch.device("cpu"), np.int64(5), range(3), np.float32(0.5))
    assert found[:4] == (3, 5, 0, 0.5)
    assert torch.equal(kept[0], torch.arange(3, dtype=torch.int32))
    assert found.queries == kept[0].data_ptr()
    found, kept = _gpu.directions(torch.device("cpu"), [5, 5, 5], range(3), 0.5)
    assert found.seed == 5 and not found.seeds and len(kept) == 1


@pytest.mark.parametrize(
    "seeds",
    [
        range(2**63 - 1, 2**63 + 1),
        np.array([2**63 - 1, 2**63], dtype=np.uint64),
        (np.uint64(2**63 - 1), 2**63),
    ],
    ids=["range", "array", "tuple"],
)
@pytest.mark.parametrize(
    "scales",
    [[0.5, -1e-3], np.array([0.5, -1e-3]), list(torch.tensor([0.5, -1e-3]))],
    ids=["list", "array", "tensors"],
)
def test_seeds_and_scales_of_any_kind_are_copied_in_the_dtypes_of_the_kernels(
    monkeypatch, seeds, scales
):
    monkeypatch.setattr(_gpu, "to_device", lambda numbers, device: numbers)
    found, (copied_seeds, copied_scales) = _gpu.directions(
        torch.device("cpu"), seeds, [0, 0], scales
    )
    assert [found.seeds, found.scales] == [copied_seeds.data_ptr(), copied_scales.data_ptr()]
    assert copied_seeds.dtype is torch.uint64 and copied_seeds.tolist() == [2**63 - 1, 2**63]
    assert torch.equal(copied_scales, torch.tensor([0.5, -1e-3]))


def test_an_assembler_that_changes_bits_keeps_the_column_from_running(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    monkeypatch.setattr(_gpu, "why_no_triton", lambda: "")
    monkeypatch.setattr(_triton, "why_not_exact", lambda arch: f"sm_{arch} is packed")
    assert _gpu.why_not("triton") == "sm_100 is packed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert _gpu.why_not("triton") == ""


def test_what_a_graph_would_not_repeat_is_refused_while_one_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="keep seeds and scales in device memory"):
        _gpu.directions(torch.device("cuda"), [5, 6], range(2), 0.5)


def test_a_step_and_what_restores_it_can_be_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    restoring = _gpu.directions(torch.device("cuda"), [], [], [])
    assert restoring == (Directions(count=0), [])
    seeds, scales = torch.tensor([5, 6]), torch.tensor([0.5, 0.25])
    found, kept = _gpu.directions(torch.device("cuda"), seeds, [7, 7], scales)
    assert found.query == 7 and not found.queries
    assert [found.seeds, found.scales] == [x.data_ptr() for x in kept]


def test_scales_of_both_zeros_keep_their_signs(monkeypatch):
    monkeypatch.setattr(_gpu, "to_device", lambda numbers, device: numbers)
    found, kept = _gpu.directions(torch.device("cpu"), [5], [0], [0.0, -0.0])
    assert found.scales == kept[0].data_ptr()
    assert kept[0].signbit().tolist() == [False, True]
