"""Compiling without a GPU: what comes out runs on the simulator, and is counted right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptx import compile as toolchain
from ptx.machine import launch
from ptx.memory import Memory
from ptx.parser import parse

SOURCE = """
struct Pair { float* to; float add; };
extern "C" __global__ void shift(Pair pair, float scale) {
  extern __shared__ float staged[];
  staged[threadIdx.x] = pair.to[threadIdx.x];
  __syncthreads();
  pair.to[threadIdx.x] = staged[threadIdx.x ^ 32] * scale + pair.add;
}
extern "C" __global__ void still(float* to) { __shared__ float own[64]; own[threadIdx.x] = to[1];
  __syncthreads(); to[threadIdx.x] = own[0]; }
"""


def needs(*tools: str) -> pytest.MarkDecorator:
    reason = toolchain.missing(*tools)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "shift.cu"
    path.write_text(SOURCE)
    return path


@needs("nvcc")
@pytest.mark.parametrize("arch", [80, 100])
def test_a_compiled_kernel_runs_on_the_simulator(source, arch):
    kernel = parse(toolchain.nvcc_ptx(source, arch), "shift")
    values = np.arange(64, dtype=np.float32)
    memory = Memory()
    pair = np.array([(memory.add(values, "values"), 0.5)], "u8, f4").tobytes().ljust(16, b"\0")
    launch(kernel, memory, [pair, 2.0], grid=1, block=64, dynamic_shared=256)
    np.testing.assert_array_equal(values, (np.arange(64) ^ 32) * 2 + 0.5)


@needs("nvcc")
def test_a_changed_header_compiles_anew(source):
    header = source.parent / "sum.h"
    source.write_text('#include "sum.h"\nextern "C" __global__ void k(int* to) { *to = VALUE; }')
    for value in (17, 18):
        header.write_text(f"#define VALUE {value}")
        assert f", {value};" in toolchain.nvcc_ptx(source, 80)


@needs("nvcc")
def test_a_source_that_does_not_compile_is_shown(source):
    source.write_text("int 3;")
    with pytest.raises(RuntimeError, match="expected an identifier"):
        toolchain.nvcc_ptx(source, 80)


@needs("nvcc", "nvdisasm", "cuobjdump")
def test_machine_code_is_listed_and_counted(source):
    cubin = toolchain.nvcc_cubin(source, 80)
    listing = toolchain.sass(cubin)
    assert set(listing) == {"shift", "still"}
    assert any(line.startswith("BAR.SYNC") for line in listing["shift"])
    assert any(line.startswith("EXIT") for line in listing["shift"])
    # Built with --fmad=false.
    assert any(line.startswith("FMUL") for line in listing["shift"])
    assert not any(line.startswith("FFMA") for line in listing["shift"])
    used = toolchain.resources(cubin)
    assert used["still"].shared == 256
    assert used["shift"].shared == 0
    assert used["shift"].stack == 0
    assert 4 < used["shift"].registers < 64


@needs("nvcc", "ptxas", "nvdisasm")
def test_ptx_becomes_machine_code(source):
    assert set(toolchain.sass(toolchain.ptxas(toolchain.nvcc_ptx(source, 80), "sm_80"))) == {
        "shift",
        "still",
    }


def test_a_tool_that_is_not_there_is_named():
    assert toolchain.missing("no-such-tool") == "no-such-tool not installed"
    assert toolchain.missing() is None
