"""What was built, what this machine runs, and why one is missing."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from dlzo_kernels import _C
from dlzo_kernels._version import NOISE_VERSION, __version__
from dlzo_kernels.ops import _gpu


class Backend(NamedTuple):
    """One column of the kernels: whether it was built, whether it runs here, and why not."""

    name: str
    built: bool
    runs: bool
    reason: str


def backends() -> list[Backend]:
    """Every backend this version knows, the CPU's ISAs first."""
    cpu = [Backend(f"cpu/{name}", built, runs, why) for name, built, runs, why in _C.isas()]
    built = {"cuda": hasattr(_C, "cuda"), "triton": find_spec("triton") is not None}
    reasons = {name: _gpu.why_not(name) for name in _gpu.COLUMNS}
    return [*cpu, *(Backend(name, built[name], not why, why) for name, why in reasons.items())]


def why_no_kernels(device: torch.device) -> str:
    """Why noise, steps and statistics have no kernels on a device, in words; empty where they do.

    On a GPU it settles which column runs.
    """
    if device.type == "cuda":
        try:
            _gpu.selected()
        except ValueError as error:
            return str(error)
    return ""


def roundings(device: torch.device) -> str:
    """What the rounding of a forward on a device depends on, beside releases and threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {_gpu.why_no_triton() or 'triton'}"
    capability = torch.backends.cpu.get_cpu_capability()
    amx, intel = torch.cpu._is_amx_tile_supported(), _C.made_by_intel()
    return f"{_C.selected_isa()} {capability} amx {amx} intel {intel}"


def has_slow_bfloat16() -> bool:
    """Whether the CPU's bfloat16 products are slower than its float32 ones: Intel's without AMX.

    Virtual machines may hide AMX. On such a one torch's products ran at 0.5 to 0.63 of the speed of
    those in float32, in a trial that was not kept.
    """
    return _C.made_by_intel() and not torch.cpu._is_amx_tile_supported()


def report() -> str:
    """The text that `python -m dlzo_kernels` prints."""
    lines = [
        f"dlzo_kernels {__version__}, noise v{NOISE_VERSION}, torch {torch.__version__}",
        f"CPU: {_C.selected_isa()} in use, {torch.get_num_threads()} threads "
        f"({'the OpenMP pool of torch' if _C.thread_pool() == 'openmp' else 'started per call'})",
    ]
    for backend in backends():
        built = "built" if backend.built else "not built"
        if backend.name == "cuda" and backend.built:
            built += f" for sm {_C.cuda.ARCHITECTURES}"
        runs = "runs here" if backend.runs else f"does not run here: {backend.reason}"
        lines.append(f"  {backend.name:14} {built:10} {runs}")
    return "\n".join(lines)


def select_isa_from_environment() -> None:
    """Forces the ISA that DLZO_ISA names, if it is set.

    Raises:
        ImportError: it names an ISA that is unknown or that this machine does not run.
    """
    name = os.environ.get("DLZO_ISA")
    if not name:
        return
    try:
        _C.select_isa(name)
    except ValueError as error:
        raise ImportError(f"DLZO_ISA: {error}") from error
