"""Which column of kernels runs on a GPU, and what its launches need from torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops import _triton
from dlzo_kernels.ops._parts import Directions

COLUMNS = ("cuda", "triton")
OLDEST_TRITON = (3, 6)  # earlier ones do not compile the kernels


def why_not(column: str) -> str:
    """Why a column cannot run here, in words; empty where it can."""
    if column == "triton":
        reason = why_no_triton() or ("" if torch.cuda.is_available() else "torch sees no GPU")
        return reason or _why_not_exact()
    if not hasattr(_C, "cuda"):
        return "this build has no CUDA kernels: install it where nvcc is on the PATH"
    if torch.version.hip is not None:
        return "torch was built for ROCm"
    reason = _C.cuda.why_no_device() or ("" if torch.cuda.is_available() else "torch sees no GPU")
    if not reason and not has_code_for(*torch.cuda.get_device_capability(), _C.cuda.ARCHITECTURES):
        reason = (
            f"this build has CUDA kernels for sm {_C.cuda.ARCHITECTURES}, none of which the GPU "
            "runs: install it with its architecture in DLZO_CUDA_ARCHS"
        )
    return reason


@cache
def why_no_triton() -> str:
    """Why Triton's kernels cannot be compiled, in words; empty where they can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'dlzo-kernels[triton]'"
    if not _triton.available():
        return "triton cannot be imported: install it anew"
    if (found := _triton_version()) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found[0]}.{found[1]} is too old: pip install 'triton>={oldest}'"
    return ""


def _why_not_exact() -> str:
    major, minor = torch.cuda.get_device_capability()
    packs_pairs = torch.version.hip is None and major >= 10
    return _triton.why_not_exact(10 * major + minor) if packs_pairs else ""


def has_code_for(major: int, minor: int, architectures: str) -> bool:
    """Whether a GPU of this compute capability runs a build for "80, 90" and the like.

    Machine code runs on later minor versions, PTX, which there is of the newest, on all later ones.
    """
    built, own = [int(name) for name in architectures.split(", ")], 10 * major + minor
    return own >= max(built) or any(own // 10 == a // 10 and own >= a for a in built)


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def select(column: str) -> None:
    """Forces one column, until another is selected.

    Raises:
        ValueError: it is neither "cuda" nor "triton", or cannot run here.
    """
    if column not in COLUMNS:
        raise ValueError(f"unknown GPU column {column!r}; choose one of {', '.join(COLUMNS)}")
    reason = why_not(column)
    if reason:
        raise ValueError(f"the GPU column {column!r} cannot run here: {reason}")
    _selected[:] = [column]


def select_best() -> None:
    """Selects the column that DLZO_GPU names; else CUDA where it can run, else Triton.

    Raises:
        ValueError: neither can run, or the named one is unknown or cannot.
    """
    if named := os.environ.get("DLZO_GPU"):
        return select(named)
    runnable = [name for name in COLUMNS if not why_not(name)]
    if not runnable:
        reasons = "; ".join(f"{name}: {why_not(name)}" for name in COLUMNS)
        raise ValueError(f"no GPU column can run here ({reasons})")
    select(runnable[0])


def selected() -> str:
    """The column in use; the best one is found at the first call."""
    if not _selected:
        select_best()
    return _selected[0]


_selected: list[str] = []


def launch(launches: Sequence[_C.gpu.Launch], device: torch.device) -> None:
    """Enqueues CUDA kernels on torch's current stream of the device; waits for nothing."""
    with torch.cuda.device(device):
        _C.cuda.launch(launches, torch.cuda.current_stream().cuda_stream)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy of numbers from the host, for which nothing waits.

    Raises:
        RuntimeError: a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "numbers are copied from the host, which a CUDA graph would not repeat: keep seeds and "
            "scales in device memory, and leave tree_attention out of the capture"
        )
    return numbers.pin_memory().to(device, non_blocking=True)


def directions(
    device: torch.device,
    seeds: int | Sequence[int] | Tensor,
    queries: Sequence[int],
    scales: float | Sequence[float] | Tensor,
) -> tuple[Directions, list[Tensor]]:
    """Directions for a kernel, and the tensors to keep until it is launched.

    A number is for all directions and goes by value, as seeds or queries that are equal; other
    sequences are copied to the device.

    Raises:
        RuntimeError: a CUDA graph is captured and something has to be copied.
    """
    kept: list[Tensor] = []

    def place(values: Any, dtype: torch.dtype) -> tuple[Any, int]:
        if not isinstance(values, Iterable):
            return values, 0
        if not isinstance(values, Tensor):
            numbers = [*map(float if dtype is torch.float32 else int, values)]
            # Those of one step are equal, so that a graph can hold it; scales may be 0.0 and -0.0.
            if len(numbers if dtype is torch.float32 else set(numbers)) <= 1:
                return next(iter(numbers), 0), 0
            if isinstance(values, range) and dtype is torch.uint32:
                # Without a copy, which a graph would have to repeat.
                span = values.start, values.stop, values.step
                values = torch.arange(*span, dtype=torch.int32, device=device)
            else:
                values = to_device(torch.tensor(numbers, dtype=dtype, device="cpu"), device)
        kept.append(values)
        return 0, values.data_ptr()

    seed, seeds_at = place(seeds, torch.uint64)
    query, queries_at = place(queries, torch.uint32)
    scale, scales_at = place(scales, torch.float32)
    count = len(queries)
    return Directions(count, seed, query, scale, seeds_at, queries_at, scales_at), kept
