"""Compilation of CUDA sources without a GPU, and what the compiled code uses.

The tools are those of the CUDA toolkit on the PATH, or of Triton's wheel.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
# As in CMakeLists.txt, behind what CUDAFLAGS may hold.
EXACT = ("--fmad=false", "--ftz=false", "--prec-sqrt=true", "--prec-div=true")


def tool(name: str) -> str | None:
    """Path of ptxas, nvdisasm, cuobjdump or nvcc; None where it is not installed."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    return found


def missing(*names: str) -> str | None:
    """Why a test that needs these tools is skipped; None where all are there."""
    absent = [name for name in names if tool(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def nvcc_ptx(source: Path, arch: int, options: Sequence[str] = ()) -> str:
    """PTX of a .cu file for compute capability arch / 10; compiled once per process and content."""
    return _nvcc(source, _digest(source), (f"-arch=compute_{arch}", "-ptx", *options)).decode()


def nvcc_cubin(source: Path, arch: int, options: Sequence[str] = ()) -> bytes:
    """Machine code of a .cu file."""
    return _nvcc(source, _digest(source), (f"-arch=sm_{arch}", "-cubin", *options))


def _digest(source: Path) -> str:
    """Of the source and of every header it might include."""
    headers = sorted({*CSRC.glob("*.*h"), *source.parent.glob("*.*h")})
    return hashlib.sha256(b"".join(p.read_bytes() for p in (source, *headers))).hexdigest()


@functools.cache
def _nvcc(source: Path, digest: str, options: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        flags = ("-std=c++17", "-O3", *options, *EXACT, f"-I{CSRC}")
        _run([tool("nvcc"), *flags, str(source), "-o", str(output)])
        return output.read_bytes()


def ptxas(ptx: str, arch: str) -> bytes:
    """Machine code of PTX text; arch as in `.target`, for example sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "input.ptx", Path(folder) / "output.cubin"
        source.write_text(ptx)
        _run([tool("ptxas"), f"-arch={arch}", str(source), "-o", str(output)])
        return output.read_bytes()


def sass(cubin: bytes) -> dict[str, list[str]]:
    """Instructions of each kernel, as nvdisasm writes them."""
    text = _inspect("nvdisasm", ["-c"], cubin)
    kernels = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.match(r"[\w$]+", section)[0]
        kernels[name] = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", section, flags=re.M)
    return kernels


@dataclass(frozen=True)
class Resources:
    """Registers and bytes of stack of a thread, static shared bytes of a CTA."""

    registers: int
    stack: int
    shared: int


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel takes."""
    text = _inspect("cuobjdump", ["-res-usage"], cubin)
    usage = re.findall(r"Function ([\w$]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in usage
    }


def _inspect(name: str, options: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run([tool(name), *options, file.name])


def _run(command: Sequence[str | None]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
