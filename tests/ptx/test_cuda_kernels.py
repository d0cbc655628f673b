"""The CUDA column on the simulator: what is not a test of both columns (test_columns.py)."""

from __future__ import annotations

import pytest
import torch

from bits import assert_same_bits, reference_perturb, weights
from dlzo_kernels import _C
from dlzo_kernels.ops._parts import Directions, Part
from ptx.compile import missing
from ptx.device import SEED, Device
from ptx.mutate import run_mutants
from scripts import load_benchmark

pytestmark = pytest.mark.skipif(missing("nvcc") is not None, reason=str(missing("nvcc")))


def test_the_seam_of_two_rows_of_more_groups_than_32_bits_count():
    """Only the blocks around the seam run, on the elements that they reach."""
    columns, before, gap, after = 2**35 - 6, 8193, 3, 8183
    device, w = Device(), weights(before + gap + after)
    tail, between, head = w.split([before, gap, after])
    first, pitch, kept = columns - before, columns + gap, between.clone()
    there = torch.cat([tail, head])
    expected = reference_perturb(there, SEED, 0.5, w.dtype, offset=7 + first, stream=2)
    at = device.address(w) - first * w.itemsize
    part = Part(at, at, 2, columns, pitch, 1, pitch, 1, offset=7, row_stride=columns, stream=2)
    plan = _C.gpu.perturb(0, 0, [part], Directions(1, seed=SEED, scale=0.5))
    device.run("perturb", plan, range(2**22 - 1, 2**22 + 1))
    assert_same_bits(torch.cat([tail, head]), expected)
    assert_same_bits(between, kept)


@pytest.mark.parametrize("kernel", ["gaussian_float32", "perturb_bfloat16_bfloat16"])
def test_nearly_every_small_change_of_a_kernel_is_noticed(kernel):
    """All changes, and those that are not noticed: benchmarks/gpu_mutants.py, docs/gpu.md."""
    module = load_benchmark("gpu_mutants")
    check = module.checker(kernel, module.KERNELS[kernel])
    check(module.nvcc_ptx(module.CSRC / f"{kernel.split('_')[0]}.cu", 90))
    report = run_mutants(module.sample(kernel, 30), check)
    ran = len(report.caught) + len(report.survived)
    assert ran > 25
    assert len(report.caught) >= 0.9 * ran, report
