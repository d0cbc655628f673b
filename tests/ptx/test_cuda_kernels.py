"""The CUDA column on the simulator, by the plans that launch it on a GPU: bits of the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bits import PAIRS, VIEWS, assert_same_bits, reference_perturb, weights
from dlzo_kernels import _C
from dlzo_kernels.ops._common import DTYPE_CODES
from dlzo_kernels.ops._parts import Directions, Operand, Part
from gpu_stats import samples, stats
from noise_edges import PLACES, SCALE, cancelled
from ptx.compile import missing
from ptx.device import SEED, Device, normals, operand_of
from ptx.mutate import run_mutants
from scripts import load_benchmark

pytestmark = pytest.mark.skipif(missing("nvcc") is not None, reason=str(missing("nvcc")))
ARCHITECTURES = (80, 90, 120)


def gaussian(
    out: Tensor, device: Device | None = None, *, seed: int = SEED, **numbers: int
) -> None:
    device = device or Device()
    query = numbers.pop("query", 0)
    operand = operand_of(out, out, **numbers)
    directions = Directions(1, seed=seed, query=query)
    device.run(
        "gaussian",
        _C.gpu.gaussian(DTYPE_CODES[out.dtype], device.parts([operand]), directions),
    )


def perturb(
    operands: Sequence[Operand], directions: Directions, device: Device | None = None
) -> None:
    device = device or Device()
    codes = DTYPE_CODES[operands[0].out.dtype], DTYPE_CODES[operands[0].base.dtype]
    device.run("perturb", _C.gpu.perturb(*codes, device.parts(operands), directions))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("offset", [0, 5, 2**34 - 4, 2**64 - 9001])
def test_raw_normals(architecture, offset):
    out = torch.full((9001,), torch.nan)
    gaussian(out, Device(architecture), offset=offset, stream=3, query=0x80000001)
    assert_same_bits(out, normals(9001, offset=offset, stream=3, query=0x80000001))


@pytest.mark.parametrize("length", [11, 8192])
def test_words_that_show_the_last_bits(length):
    for numbers in PLACES:
        out, zero = torch.full((length,), torch.nan), torch.zeros(length)
        gaussian(out, **numbers)
        assert_same_bits(out, reference_perturb(zero, scale=1.0, dtype=out.dtype, **numbers))


def test_blocks_around_a_carry_of_the_counter(dtype):
    out = torch.full((5 * 8192,), torch.nan, dtype=dtype)
    offset = 2**34 - 2 * 8192 - 16
    gaussian(out, offset=offset)
    assert_same_bits(out, normals(5 * 8192, dtype=dtype, offset=offset))


@pytest.mark.parametrize("length", [*range(1, 34), 8191, 8192, 8193, 8200])
def test_every_tail_and_nothing_beyond(length):
    for dtype in DTYPE_CODES:
        buffer = torch.full((length + 16,), torch.nan, dtype=dtype)
        gaussian(buffer[8 : 8 + length], offset=length % 11)
        assert_same_bits(buffer[8 : 8 + length], normals(length, dtype=dtype, offset=length % 11))
        assert buffer[:8].isnan().all()
        assert buffer[-8:].isnan().all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4, 7])
def test_perturb_at_every_alignment(pair, skip):
    out_dtype, base_dtype = pair
    base = weights(3000, dtype=base_dtype)[skip:]
    out = base if out_dtype is base_dtype else torch.empty(3000, dtype=out_dtype)[skip:]
    expected = reference_perturb(base, SEED, -0.03, out_dtype, offset=skip, stream=9, query=2)
    directions = Directions(1, seed=SEED, query=2, scale=-0.03)
    perturb([operand_of(out, base, stream=9, offset=skip)], directions)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("length", [11, 8192])  # a group on its own, and whole blocks
def test_the_last_bits_of_the_noise_show_where_weights_cancel_it(pair, length):
    out_dtype, base_dtype = pair
    for base, numbers in cancelled(length, base_dtype):
        out = torch.full((length,), torch.nan, dtype=out_dtype)
        expected = reference_perturb(base, scale=SCALE, dtype=out_dtype, **numbers)
        directions = Directions(1, numbers["seed"], numbers["query"], SCALE)
        perturb([operand_of(out, base, numbers["stream"], numbers["offset"])], directions)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("view", VIEWS)
def test_views(dtype, view):
    w = weights(60, 70, dtype=dtype)
    touched = torch.zeros(60, 70, dtype=torch.bool)
    VIEWS[view](touched).fill_(True)
    before, part = w.clone(), VIEWS[view](w)
    expected = reference_perturb(part, SEED, 2.0, dtype, stream=5)
    if part.numel():
        perturb([operand_of(part, part, stream=5)], Directions(1, seed=SEED, scale=2.0))
    assert_same_bits(part.contiguous(), expected)
    assert_same_bits(w[~touched], before[~touched])


def test_a_column_shard_takes_its_part_of_the_whole():
    whole = normals(50, 64, stream=4)
    shard = torch.full((50, 19), torch.nan)
    gaussian(shard, stream=4, offset=23, row_stride=64)
    assert_same_bits(shard, whole[:, 23:42].contiguous())


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


@pytest.mark.parametrize("count", [3, 80])  # 80: more parts than one launch takes
def test_all_tensors_of_a_layer(count):
    sizes = [(i * 37) % 200 + 1 for i in range(count)]
    layer = [weights(size, 3, dtype=torch.bfloat16, seed=size) for size in sizes]
    expected = [reference_perturb(w, SEED, 0.1, w.dtype, stream=i) for i, w in enumerate(layer)]
    operands = [operand_of(w, w, stream=i) for i, w in enumerate(layer)]
    perturb(operands, Directions(1, seed=SEED, scale=0.1))
    for w, right in zip(layer, expected, strict=True):
        assert_same_bits(w, right)


@pytest.mark.parametrize("seed_there", [False, True])
@pytest.mark.parametrize("scale_there", [False, True])
def test_seed_and_scale_in_device_memory(seed_there, scale_there):
    device, w = Device(), weights(777)
    expected = reference_perturb(w, SEED, 0.25, w.dtype, query=6)
    seed, scale = torch.tensor([SEED], dtype=torch.uint64), torch.tensor([0.25])
    directions = Directions(
        1,
        seed=0 if seed_there else SEED,
        query=6,
        scale=9.0 if scale_there else 0.25,
        seeds=device.address(seed) if seed_there else 0,
        scales=device.address(scale) if scale_there else 0,
    )
    perturb([operand_of(w, w)], directions, device)
    assert_same_bits(w, expected)


def accumulated(
    master: Tensor, out: Tensor | None, scales: list[float], *, gate: int | None = None
) -> None:
    device, count = Device(), len(scales)
    seeds = torch.tensor([SEED + k for k in range(count)], dtype=torch.uint64)
    queries = torch.tensor(range(5, 5 + count), dtype=torch.uint32)
    held = torch.tensor(scales)
    directions = Directions(
        count,
        seeds=device.address(seeds) if count else 0,
        queries=device.address(queries) if count else 0,
        scales=device.address(held) if count else 0,
    )
    flag = torch.tensor([gate or 0], dtype=torch.int32)
    operand = operand_of(master if out is None else out, master, stream=2)
    codes = DTYPE_CODES[operand.out.dtype], DTYPE_CODES[master.dtype]
    parts, at = device.parts([operand]), 0 if gate is None else device.address(flag)
    device.run("accumulate", _C.gpu.accumulate(*codes, out is not None, parts, directions, at))


@pytest.mark.parametrize("length", [1, 13, 8193])
def test_accumulate_is_one_direction_after_the_other(dtype, length):
    master, scales = weights(length, dtype=dtype), [0.5, -0.001, 3.0]
    expected = master
    for k, scale in enumerate(scales):
        expected = reference_perturb(expected, SEED + k, scale, dtype, query=5 + k, stream=2)
    accumulated(master, None, scales)
    assert_same_bits(master, expected)


@pytest.mark.parametrize("gate", [None, 1, 0])
def test_accumulate_writes_the_rounded_master(dtype, gate):
    master, out = weights(999), torch.full((999,), torch.nan, dtype=dtype)
    expected = master.clone()
    if gate != 0:
        expected = reference_perturb(master, SEED, 0.3, torch.float32, query=5, stream=2)
    accumulated(master, out, [0.3], gate=gate)
    assert_same_bits(master, expected)
    assert_same_bits(out, expected.to(dtype))


def test_no_direction_keeps_every_bit():
    master, out = torch.tensor([-0.0, 0.0, 1.0]), torch.empty(3)
    accumulated(master, out, [])
    assert_same_bits(master, torch.tensor([-0.0, 0.0, 1.0]))
    assert_same_bits(out, master)


SAMPLES = dict(samples()) | {"more pieces than lanes": weights(1, 300 * 256).numpy()}


@pytest.mark.parametrize("per", ["tensor", "channel", "token"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_statistics_have_the_bits_of_the_reference(dtype, per, sample):
    x = torch.from_numpy(SAMPLES[sample]).to(dtype)
    assert_statistics(x, per)


def test_statistics_of_the_largest_and_smallest_numbers():
    x = torch.from_numpy(SAMPLES["odd sizes"])
    for scale in (1e30, 1e-38, 1e-42):
        for per in ("tensor", "channel", "token"):
            assert_statistics(x * scale, per)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_of_a_misaligned_view(architecture):
    x = weights(1, 20001, dtype=torch.bfloat16)[:, 1:]
    assert_statistics(x, "tensor", Device(architecture))


def assert_statistics(x: Tensor, per: str, device: Device | None = None) -> None:
    device = device or Device()
    rows, channels = x.shape
    reduction = ["tensor", "channel", "token"].index(per)
    count = {"tensor": 1, "channel": channels, "token": rows}[per]
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float64, torch.float64)
    results = [torch.full((count,), 77, dtype=dtype) for dtype in dtypes]
    sizes = (rows, channels, reduction)
    workspace = torch.zeros(max(1, _C.gpu.partials(*sizes) * _C.gpu.PARTIAL_BYTES // 8)).double()
    pointers = [device.address(result) for result in results]
    code, room = DTYPE_CODES[x.dtype], device.address(workspace)
    plan = _C.gpu.activation_stats(device.address(x), code, *sizes, pointers, room)
    device.run("activation_stats", plan)
    for name, got, right in zip(
        ("absmax", "argmax", "mean", "variance", "kurtosis"),
        results,
        stats(x.float().numpy(), per),
        strict=True,
    ):
        np.testing.assert_array_equal(got.numpy(), right, err_msg=f"{name} per {per}")


@pytest.mark.parametrize("kernel", ["gaussian_float32", "perturb_bfloat16_bfloat16"])
def test_nearly_every_small_change_of_a_kernel_is_noticed(kernel):
    """All changes, and those that are not noticed: benchmarks/gpu_mutants.py, docs/gpu.md."""
    load_benchmark("results")  # which it imports
    module = load_benchmark("gpu_mutants")
    check = module.checker(kernel, module.KERNELS[kernel])
    check(module.nvcc_ptx(module.CSRC / f"{kernel.split('_')[0]}.cu", 90))
    report = run_mutants(module.sample(kernel, 30), check)
    ran = len(report.caught) + len(report.survived)
    assert ran > 25
    assert len(report.caught) >= 0.9 * ran, report
