"""Both GPU columns on the simulator, by the plans that a GPU gets: bits of the reference."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bits import PAIRS, VIEWS, assert_same_bits, reference_perturb, to_float32, weights
from dlzo_kernels import _C
from dlzo_kernels.ops._common import DTYPE_CODES
from dlzo_kernels.ops._parts import Directions, Operand
from gpu_stats import Stats, samples, stats
from noise_edges import PLACES, SCALE, cancelled
from ptx.compile import missing
from ptx.device import SEED, Device, normals, operand_of

REDUCTIONS = ("tensor", "channel", "token")


class Column:
    """The ops of a column, on tensors in the simulator's memory.

    Attributes:
        problem: why it cannot run here; None where it can.
        tile: elements that are done at once.
        tails: lengths around the groups and tiles of the column.
        counts: tensors of a layer, in one launch and in several.
    """

    problem: str | None
    tile: int
    tails: Sequence[int]
    counts: Sequence[int]

    def device(self, architecture: int = 90) -> Device:
        return Device(architecture)

    def launch(self, device: Device, op: str, *arguments: object) -> None:
        """Runs the plans that the op makes of the arguments of its `triton_plans`."""
        raise NotImplementedError

    def gaussian(
        self, out: Tensor, architecture: int = 90, *, seed: int = SEED, query: int = 0, **place: int
    ) -> None:
        device, directions = self.device(architecture), Directions(1, seed, query)
        parts = device.parts([operand_of(out, **place)])
        self.launch(device, "gaussian", parts, out.dtype, directions)

    def perturb(
        self, operands: Sequence[Operand], directions: Directions, device: Device | None = None
    ) -> None:
        device = device or self.device()
        dtypes = operands[0].out.dtype, operands[0].base.dtype
        self.launch(device, "perturb", device.parts(operands), *dtypes, directions)

    def accumulate(
        self, master: Tensor, out: Tensor | None, scales: list[float], *, gate: int | None = None
    ) -> None:
        """Direction k has seed SEED + k, query 5 + (k << 30) and stream 2."""
        device, count = self.device(), len(scales)
        seeds = torch.tensor([SEED + k for k in range(count)], dtype=torch.uint64)
        queries = torch.tensor([5 + (k << 30) for k in range(count)], dtype=torch.uint32)
        held = torch.tensor(scales)
        directions = Directions(
            count,
            seeds=device.address(seeds) if count else 0,
            queries=device.address(queries) if count else 0,
            scales=device.address(held) if count else 0,
        )
        flag = torch.tensor([gate or 0], dtype=torch.int32)
        operand = operand_of(master if out is None else out, master, stream=2)
        parts, at = device.parts([operand]), 0 if gate is None else device.address(flag)
        dtypes = operand.out.dtype, master.dtype
        self.launch(device, "accumulate", parts, *dtypes, out is not None, directions, at)

    def stats(self, x: Tensor, per: str, architecture: int = 90) -> Stats:
        device, (rows, channels) = self.device(architecture), x.shape
        sizes = rows, channels, REDUCTIONS.index(per)
        count = {"tensor": 1, "channel": channels, "token": rows}[per]
        dtypes = (torch.float32, torch.int64, torch.float64, torch.float64, torch.float64)
        results = [torch.full((count,), 77, dtype=dtype) for dtype in dtypes]
        numbers = _C.gpu.partials(*sizes) * _C.gpu.PARTIAL_BYTES // 8 + 1
        workspace = torch.full((numbers,), torch.nan, dtype=torch.float64)
        pointers = tuple(device.address(result) for result in results)
        addresses = pointers, device.address(workspace)
        self.launch(device, "activation_stats", device.address(x), x.dtype, *sizes, *addresses)
        return Stats(*(result.numpy() for result in results))


# The CUDA plans, of the arguments of Triton's.
CUDA_PLANS = {
    "gaussian": lambda parts, out, *rest: _C.gpu.gaussian(DTYPE_CODES[out], parts, *rest),
    "perturb": lambda parts, out, base, *rest: _C.gpu.perturb(
        DTYPE_CODES[out], DTYPE_CODES[base], parts, *rest
    ),
    "accumulate": lambda parts, out, base, writes_out, *rest: _C.gpu.accumulate(
        DTYPE_CODES[out], DTYPE_CODES[base], writes_out, parts, *rest
    ),
    "activation_stats": lambda x, dtype, *rest: _C.gpu.activation_stats(
        x, DTYPE_CODES[dtype], *rest
    ),
}


class Cuda(Column):
    problem = missing("nvcc")
    tile = 8192
    tails = (*range(1, 34), 8191, 8192, 8193, 8200)
    counts = (3, 80)

    def launch(self, device: Device, op: str, *arguments: object) -> None:
        device.run(op, CUDA_PLANS[op](*arguments))


class Triton(Column):
    problem = None if importlib.util.find_spec("triton") else "triton not installed"
    tile = 2048
    tails = (*range(1, 18), *range(508, 521), *range(2046, 2058), 6144)
    counts = (3, 16, 17)

    def device(self, architecture: int = 90) -> Device:
        from ptx.triton_ptx import TritonDevice

        return TritonDevice(architecture)

    def launch(self, device: Device, op: str, *arguments: object) -> None:
        module = importlib.import_module(f"dlzo_kernels.ops.{op}")
        device.run_plans(module.triton_plans(*arguments))


COLUMNS = {"cuda": Cuda(), "triton": Triton()}


@pytest.fixture(params=COLUMNS)
def column(request: pytest.FixtureRequest) -> Column:
    found = COLUMNS[request.param]
    if found.problem:
        pytest.skip(found.problem)
    return found


def each_of_its(name: str, numbers: str) -> pytest.MarkDecorator:
    """Gives a test the numbers that a column has of its own."""
    cases = [(key, n) for key, column in COLUMNS.items() for n in getattr(column, numbers)]
    return pytest.mark.parametrize(("column", name), cases, indirect=["column"])


# Noise and weights.


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("offset", [0, 5, 2**34 - 4, 2**34 - 3, 2**64 - 9001])
def test_raw_normals(column, architecture, offset):
    out = torch.full((9001,), torch.nan)
    column.gaussian(out, architecture, offset=offset, stream=3, query=0x80000001)
    assert_same_bits(out, normals(9001, offset=offset, stream=3, query=0x80000001))


@pytest.mark.parametrize("tiles", [0, 1])
def test_words_that_show_the_last_bits(column, tiles):
    length = tiles * column.tile or 11
    for numbers in PLACES:
        out, zero = torch.full((length,), torch.nan), torch.zeros(length)
        column.gaussian(out, **numbers)
        assert_same_bits(out, reference_perturb(zero, scale=1.0, dtype=out.dtype, **numbers))


def test_tiles_around_a_carry_of_the_counter(column, dtype):
    length, offset = 5 * column.tile, 2**34 - 2 * column.tile - 16
    out = torch.full((length,), torch.nan, dtype=dtype)
    column.gaussian(out, offset=offset)
    assert_same_bits(out, normals(length, dtype=dtype, offset=offset))


@each_of_its("length", "tails")
def test_every_tail_and_nothing_beyond(column, length):
    for dtype in DTYPE_CODES:
        buffer = torch.full((length + 16,), torch.nan, dtype=dtype)
        column.gaussian(buffer[8 : 8 + length], offset=length % 11)
        assert_same_bits(buffer[8 : 8 + length], normals(length, dtype=dtype, offset=length % 11))
        assert buffer[:8].isnan().all()
        assert buffer[-8:].isnan().all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4, 7, 8])
def test_perturb_at_every_alignment(column, pair, skip):
    out_dtype, base_dtype = pair
    # An output of its own has the alignment of the weights, or that of whole memory.
    for offset, skipped in ((0, 0), (0, skip), (2, 0), (skip, skip)):
        base = weights(3000, dtype=base_dtype)[skip:]
        apart = torch.empty(len(base) + skipped, dtype=out_dtype)[skipped:]
        out = base if out_dtype is base_dtype else apart
        expected = reference_perturb(base, SEED, -0.03, out_dtype, offset=offset, stream=9, query=2)
        column.perturb([operand_of(out, base, 9, offset)], Directions(1, SEED, 2, -0.03))
        assert_same_bits(out, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("tiles", [0, 1])  # a group on its own, and a whole tile
def test_the_last_bits_of_the_noise_show_where_weights_cancel_it(column, pair, tiles):
    out_dtype, base_dtype = pair
    length = tiles * column.tile or 11
    for base, numbers in cancelled(length, base_dtype):
        out = torch.full((length,), torch.nan, dtype=out_dtype)
        expected = reference_perturb(base, scale=SCALE, dtype=out_dtype, **numbers)
        directions = Directions(1, numbers["seed"], numbers["query"], SCALE)
        column.perturb([operand_of(out, base, numbers["stream"], numbers["offset"])], directions)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("view", VIEWS)
def test_views(column, dtype, view):
    w = weights(60, 70, dtype=dtype)
    touched = torch.zeros(60, 70, dtype=torch.bool)
    VIEWS[view](touched).fill_(True)
    before, part = w.clone(), VIEWS[view](w)
    expected = reference_perturb(part, SEED, 2.0, dtype, stream=5)
    column.perturb([operand_of(part, stream=5)], Directions(1, SEED, 0, 2.0))
    assert_same_bits(part.contiguous(), expected)
    assert_same_bits(w[~touched], before[~touched])


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("columns", [1, 3, 130, 700])
def test_a_column_shard_takes_its_part_of_the_whole(column, rows, columns):
    whole = normals(rows, 801, stream=4, offset=2**34 - 700)
    shard = torch.full((rows, columns), torch.nan)
    column.gaussian(shard, stream=4, offset=2**34 - 700 + 23, row_stride=801)
    assert_same_bits(shard, whole[:, 23 : 23 + columns].contiguous())


@each_of_its("count", "counts")
def test_all_tensors_of_a_layer(column, count):
    sizes = [(i * 37) % 200 + 1 for i in range(count)]
    sizes[1:3] = column.tile, 2 * column.tile
    layer = [weights(size, dtype=torch.bfloat16, seed=size) for size in sizes]
    layer[-1] = weights(9, 10, dtype=torch.bfloat16).t()
    expected = [reference_perturb(w, SEED, 0.1, w.dtype, stream=i) for i, w in enumerate(layer)]
    operands = [operand_of(w, stream=i) for i, w in enumerate(layer)]
    column.perturb(operands, Directions(1, SEED, 0, 0.1))
    for w, right in zip(layer, expected, strict=True):
        assert_same_bits(w.contiguous(), right)


@pytest.mark.parametrize("seed_there", [False, True])
@pytest.mark.parametrize("scale_there", [False, True])
def test_seed_and_scale_in_device_memory(column, seed_there, scale_there):
    device, w = column.device(), weights(column.tile + 77)
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
    column.perturb([operand_of(w)], directions, device)
    assert_same_bits(w, expected)


def test_special_values_round_like_the_reference(column, dtype):
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, largest, -largest, float("inf"), -float("inf")]
    for scale in (1.0, 0.0, largest / 4, 1e-30):
        w = torch.tensor(values).repeat(column.tile // 8).to(dtype)
        expected = reference_perturb(w, SEED, scale, dtype)
        column.perturb([operand_of(w)], Directions(1, SEED, 0, scale))
        assert_same_bits(w, expected)
    w = torch.full((column.tile + 1,), torch.nan, dtype=dtype)
    column.perturb([operand_of(w)], Directions(1, SEED, 0, 1.0))
    assert w.isnan().all()


@pytest.mark.parametrize(("tiles", "more"), [(0, 1), (0, 13), (1, 0), (1, 1)])
def test_accumulate_is_one_direction_after_the_other(column, dtype, tiles, more):
    master, scales = weights(tiles * column.tile + more, dtype=dtype), [0.5, -0.001, 3.0]
    expected = master
    for k, scale in enumerate(scales):
        query = 5 + (k << 30)
        expected = reference_perturb(expected, SEED + k, scale, dtype, query=query, stream=2)
    column.accumulate(master, None, scales)
    assert_same_bits(master, expected)


@pytest.mark.parametrize("gate", [None, 1, 0])
@pytest.mark.parametrize("view", [lambda w: w, lambda w: w[::2]], ids=["whole", "strided"])
def test_accumulate_writes_the_rounded_master(column, dtype, gate, view):
    master = view(weights(5095))
    out = torch.full((len(master),), torch.nan, dtype=dtype)
    expected = master.clone()
    if gate != 0:
        expected = reference_perturb(master, SEED, 0.3, torch.float32, query=5, stream=2)
    column.accumulate(master, out, [0.3], gate=gate)
    assert_same_bits(master.contiguous(), expected)
    assert_same_bits(out, expected.to(dtype))


@pytest.mark.parametrize("gate", [None, 0])
def test_no_direction_keeps_every_bit(column, gate):
    master = torch.tensor([-0.0, 0.0, 1.0]).repeat(column.tile)
    out, before = torch.empty_like(master), master.clone()
    column.accumulate(master, out, [] if gate is None else [1.0], gate=gate)
    assert_same_bits(master, before)
    assert_same_bits(out, before)


# Statistics, in the order of tests/gpu_stats.py.


SAMPLES = dict(samples()) | {
    "more pieces than lanes": weights(1, 300 * 256).numpy(),
    "aligned": weights(3, 16_384 + 520).numpy(),
}


def assert_statistics(column: Column, x: Tensor, per: str, architecture: int = 90) -> None:
    got, right = column.stats(x, per, architecture), stats(to_float32(x), per)
    for name, a, b in zip(Stats._fields, got, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name} per {per}")


@pytest.mark.parametrize("per", REDUCTIONS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_statistics_have_the_bits_of_the_reference(column, dtype, per, sample):
    assert_statistics(column, torch.from_numpy(SAMPLES[sample]).to(dtype), per)


@pytest.mark.parametrize("per", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e30, 1e-38, 1e-42])
def test_statistics_of_the_largest_and_smallest_numbers(column, per, scale):
    assert_statistics(column, torch.from_numpy(SAMPLES["odd sizes"]) * scale, per)


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_statistics_of_a_misaligned_view(column, architecture):
    x = weights(1, 20_001, dtype=torch.bfloat16)[:, 1:]
    assert_statistics(column, x, "tensor", architecture)


@pytest.mark.parametrize("pieces", [17, 65, 300])
def test_statistics_of_many_pieces(column, pieces):
    x = weights(256 * (pieces - 1) + 3, 3)
    x[-1, 1] = x[7, 1] = -9  # the first of equal maxima, far apart
    assert_statistics(column, x, "channel")


def test_equal_maxima_are_named_by_the_first(column):
    x = torch.ones(2, 40_000, dtype=torch.bfloat16)
    x[1, 30_001] = x[1, 17] = x[1, 16] = -5
    assert column.stats(x, "token").argmax.tolist() == [0, 16]
    assert column.stats(x, "tensor").argmax.tolist() == [40_016]
