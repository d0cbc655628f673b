"""The Triton column without a GPU: compiled for every target, and its PTX run on the simulator.

The plans are those that a GPU gets; the bits are those of the reference.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from bits import PAIRS, VIEWS, assert_same_bits, reference_perturb, to_float32, weights
from dlzo_kernels.ops._parts import Directions, Operand
from gpu_stats import Stats, samples, stats
from noise_edges import SCALE, cancelled
from trees import chain, inputs

pytest.importorskip("triton")

from dlzo_kernels import _C, LaunchError
from dlzo_kernels.ops import _triton
from dlzo_kernels.ops._triton import Plan
from ptx import lint
from ptx.compile import missing, resources, sass
from ptx.device import SEED, normals, operand_of
from ptx.triton_ptx import (
    BF16,
    DTYPES,
    F16,
    F32,
    TARGETS,
    TritonDevice,
    attention,
    compile_plan,
    every_kernel,
)

gaussian, perturb, accumulate, activation_stats = (
    importlib.import_module(f"dlzo_kernels.ops.{op}")
    for op in ("gaussian", "perturb", "accumulate", "activation_stats")
)

WHOLE, ODD = 2048, 512  # elements of a tile
REDUCTIONS = {"tensor": 0, "channel": 1, "token": 2}


# Compiled for every target.


def stats_plans() -> Iterator[tuple[str, Plan]]:
    for dtype in DTYPES:
        for per, reduction in REDUCTIONS.items():
            plans = activation_stats.triton_plans(64, dtype, 3, 40_001, reduction, (64,) * 5, 64)
            for i, plan in enumerate(plans):
                yield f"{per} {dtype} {i}", plan


STATS_PLANS = dict(stats_plans())
NOISE_PLANS = {
    name: plan
    for name, plan in every_kernel()
    if name.startswith(("gaussian", "accumulate", "perturb")) and name[-8:] != "indirect"
}
INDIRECT = "perturb_bfloat16_float32_indirect"
NOISE_PLANS[INDIRECT] = dict(every_kernel())[INDIRECT]
# The others differ by a type.
CHOSEN = [
    "gaussian_float32",
    "perturb_bfloat16_bfloat16",
    INDIRECT,
    "accumulate_float32_into_bfloat16",
    "tensor torch.bfloat16 0",
    "tensor torch.bfloat16 1",
    "channel torch.bfloat16 0",
]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_for_every_target(target):
    plans = NOISE_PLANS | STATS_PLANS
    for name in plans if os.environ.get("DLZO_TEST_ALL") else CHOSEN:
        asm = compile_plan(plans[name], target).asm
        if target == "gfx942":
            assert asm["hsaco"]
            assert not re.search(r"fpmath|\bcontract\b|\bfast\b", asm["llir"])
            assert '"denormal-fp-math-f32"="ieee"' in asm["llir"]
        else:
            assert asm["cubin"]
            assert lint.inexact(asm["ptx"]) == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "sizes", "options"),
    [
        (BF16, (64, 64), {}),
        (BF16, (128, 128), {}),
        (F16, (256, 256), {"window": 5}),
        (F32, (64, 64), {}),
        (F32, (128, 128), {"softcap": 3.0}),
        (BF16, (80, 20), {"window": 5, "softcap": 3.0}),
    ],
)
def test_attention_compiles_for_every_target(dtype, sizes, options, target):
    plan, *_ = attention(*inputs(40, sizes, (4, 2), dtype), chain(40), **options)
    if target == "gfx942":
        plan = plan._replace(constants={**plan.constants, "PRECISION": "ieee"})
        assert compile_plan(plan, target).asm["hsaco"]
        return
    asm = compile_plan(plan, target).asm
    assert re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma)", asm["ptx"])
    # All vectors move 16 bytes at a time, where they lie for it.
    aligned = sizes[0] == sizes[1]
    assert ("ld.global.b16" in asm["ptx"]) != aligned
    (used,) = resources(asm["cubin"]).values()
    assert used.stack <= (24 if aligned else 88)


@pytest.mark.skipif(missing("nvdisasm") is not None, reason=str(missing("nvdisasm")))
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "gfx942"])
def test_the_machine_code_of_noise_fuses_nothing_but_roots(target):
    for name in set(CHOSEN) & set(NOISE_PLANS):
        (code,) = sass(compile_plan(NOISE_PLANS[name], target).asm["cubin"]).values()
        roots = sum("MUFU.RSQ" in line for line in code)
        # Two of each root, and a third of the one for tiny numbers.
        assert sum(bool(re.search(r"\bFFMA", line)) for line in code) == 2 * roots + 1


def test_an_assembler_that_fuses_packed_products_is_refused(monkeypatch):
    asked: list[int] = []
    check = _triton._check_assembler
    monkeypatch.setattr(_triton, "_check_assembler", asked.append)
    plan = NOISE_PLANS["perturb_bfloat16_bfloat16"]
    types = tuple(map(_triton.type_of, plan.arguments))
    for target, exact in (("sm_90", True), ("sm_100", True), ("sm_100", False), ("gfx942", True)):
        numbers = plan.constants, plan.num_warps, exact
        _triton.compile_for(TARGETS[target], plan.kernel, types, *numbers)
    assert asked == [100]  # where products are packed, and promised
    new, old = SimpleNamespace(version="13.4"), SimpleNamespace(version="13.0")
    compiler = _triton.triton.backends.nvidia.compiler
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: new)
    check(100)
    for get_ptxas in (lambda arch: old, lambda: old):
        monkeypatch.setattr(compiler, "get_ptxas", get_ptxas)
        with pytest.raises(RuntimeError, match=r"ptxas 13\.0 that Triton uses for sm_100 changes"):
            check(100)


def launch_failing(monkeypatch, error, stage="compile"):
    """A launch where compiling, loading or running a kernel raises this."""

    def fail_at(name, result=None):
        if name == stage:
            raise error
        return result

    class Kernel:
        def __getitem__(self, grid):
            return fail_at("load", lambda *_: fail_at("run"))

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(_triton, "_compiled", lambda *_: fail_at("compile", Kernel()))
    _triton.launch([NOISE_PLANS["perturb_bfloat16_bfloat16"]], torch.device("cuda"))


@pytest.mark.parametrize("stage", ["compile", "load"])
@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(1, "gcc"),
        OSError("no ptxas"),
        RuntimeError("Failed to find C compiler"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    ],
    ids=str,
)
def test_a_toolchain_that_fails_is_told_as_one_kind_of_error(monkeypatch, error, stage):
    with pytest.raises(LaunchError, match=r"Triton cannot compile or load a kernel here \("):
        launch_failing(monkeypatch, error, stage)


@pytest.mark.parametrize("stage", ["compile", "load", "run"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory left"), torch.AcceleratorError("an illegal memory access")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_gpu_is_not_the_toolchains(monkeypatch, error, stage):
    with pytest.raises(type(error)) as raised:
        launch_failing(monkeypatch, error, stage)
    assert raised.value is error


@pytest.mark.parametrize(
    ("stage", "says", "kind"),
    [
        ("load", "[CUDA]: out of memory", torch.OutOfMemoryError),
        ("run", "[CUDA]: out of memory", torch.OutOfMemoryError),
        ("run", "[CUDA]: an illegal memory access was encountered", torch.AcceleratorError),
        ("run", "[HIP]:  Code: 700", torch.AcceleratorError),
    ],
)
def test_what_triton_says_of_the_gpu_is_told_as_torch_tells_it(monkeypatch, stage, says, kind):
    with pytest.raises(kind, match=re.escape(says)):
        launch_failing(monkeypatch, RuntimeError(f"Triton Error {says}"), stage)


def test_other_errors_of_a_launch_are_left_as_they_are(monkeypatch):
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError) as raised:
        launch_failing(monkeypatch, error, "run")
    assert raised.value is error


@pytest.mark.parametrize("name", NOISE_PLANS)
def test_noise_is_exact_and_never_fused(name):
    ptx = compile_plan(NOISE_PLANS[name], "sm_90").asm["ptx"]
    assert lint.inexact(ptx) == []
    assert lint.fused(ptx) == []
    assert "sqrt.rn.f32" in ptx


@pytest.mark.parametrize("name", STATS_PLANS)
def test_statistics_are_fused_only_where_said(name):
    ptx = compile_plan(STATS_PLANS[name], "sm_90").asm["ptx"]
    assert lint.inexact(ptx) == []
    assert set(lint.fused(ptx)) <= {"fma.rn.f32"}


@pytest.mark.parametrize("name", NOISE_PLANS)
def test_aligned_memory_moves_16_bytes_at_a_time(name):
    ptx = compile_plan(NOISE_PLANS[name], "sm_90").asm["ptx"]
    assert "st.global.v4.b32" in ptx
    assert "gaussian" in name or "ld.global.v4.b32" in ptx


def test_numbers_do_not_compile_new_variants():
    def types(n: int, seed: int, offset: int, address: int) -> tuple:
        w = torch.empty(n)
        (part,) = TritonDevice().parts([Operand(w, w, 1, offset, None)])
        part = part._replace(out=part.out + address)
        (plan,) = perturb.triton_plans([part], F32, F32, Directions(1, seed, 16, 1.0))
        return tuple(map(_triton.type_of, plan.arguments)), plan.constants

    expected = types(1, 0, 0, 0)
    assert types(16, 1, 1 << 40, 4) == expected
    assert types(WHOLE, (1 << 64) - 1, (1 << 64) - 5000, 16) == expected


# Noise and weights, bit for bit.


def run_gaussian(out: Tensor, architecture: int = 90, query: int = 0, **numbers: int) -> None:
    device = TritonDevice(architecture)
    directions = Directions(1, SEED, query)
    parts = device.parts([operand_of(out, **numbers)])
    device.run_plans(gaussian.triton_plans(parts, out.dtype, directions))


def run_perturb(
    operands: Sequence[Operand], directions: Directions, device: TritonDevice | None = None
) -> list[int]:
    device = device or TritonDevice()
    dtypes = operands[0].out.dtype, operands[0].base.dtype
    return device.run_plans(perturb.triton_plans(device.parts(operands), *dtypes, directions))


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("offset", [0, 5, 2**34 - 4, 2**34 - 3, 2**64 - 9001])
def test_raw_normals(architecture, offset):
    out = torch.full((9001,), torch.nan)
    run_gaussian(out, architecture, offset=offset, stream=3, query=0x80000001)
    assert_same_bits(out, normals(9001, offset=offset, stream=3, query=0x80000001))


@pytest.mark.parametrize(
    "length", [*range(1, 18), *range(ODD - 4, ODD + 9), *range(WHOLE - 2, WHOLE + 10), 3 * WHOLE]
)
def test_every_tail_and_nothing_beyond(length):
    for dtype in DTYPES:
        buffer = torch.full((length + 16,), torch.nan, dtype=dtype)
        offset = length % 11
        run_gaussian(buffer[8 : 8 + length], offset=offset)
        assert_same_bits(buffer[8 : 8 + length], normals(length, dtype=dtype, offset=offset))
        assert buffer[:8].isnan().all()
        assert buffer[-8:].isnan().all()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 4, 8])
@pytest.mark.parametrize("offset", [0, 2])
def test_perturb_at_every_alignment(pair, skip, offset):
    out_dtype, base_dtype = pair
    base = weights(WHOLE + 1000, dtype=base_dtype)[skip:]
    out = base if out_dtype is base_dtype else torch.empty(len(base), dtype=out_dtype)
    expected = reference_perturb(base, SEED, -0.03, out_dtype, offset=offset, stream=9, query=2)
    directions = Directions(1, SEED, 2, -0.03)
    run_perturb([operand_of(out, base, 9, offset)], directions)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("length", [11, WHOLE])
def test_the_last_bits_of_the_noise_show_where_weights_cancel_it(pair, length):
    out_dtype, base_dtype = pair
    for base, numbers in cancelled(length, base_dtype):
        out = torch.full((length,), torch.nan, dtype=out_dtype)
        expected = reference_perturb(base, scale=SCALE, dtype=out_dtype, **numbers)
        directions = Directions(1, numbers["seed"], numbers["query"], SCALE)
        run_perturb([operand_of(out, base, numbers["stream"], numbers["offset"])], directions)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("view", VIEWS)
def test_views(dtype, view):
    w = weights(60, 70, dtype=dtype)
    touched = torch.zeros(60, 70, dtype=torch.bool)
    VIEWS[view](touched).fill_(True)
    before, part = w.clone(), VIEWS[view](w)
    expected = reference_perturb(part, SEED, 2.0, dtype, stream=5)
    run_perturb([operand_of(part, stream=5)], Directions(1, SEED, 0, 2.0))
    assert_same_bits(part.contiguous(), expected)
    assert_same_bits(w[~touched], before[~touched])


@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("columns", [1, 3, 130, 700])
def test_a_column_shard_takes_its_part_of_the_whole(rows, columns):
    whole = normals(rows, 801, stream=4, offset=2**34 - 700)
    shard = torch.full((rows, columns), torch.nan)
    run_gaussian(shard, stream=4, offset=2**34 - 700 + 23, row_stride=801)
    assert_same_bits(shard, whole[:, 23 : 23 + columns].contiguous())


@pytest.mark.parametrize(("count", "launches"), [(3, 1), (16, 1), (17, 2)])
def test_all_tensors_of_a_layer(count, launches):
    sizes = [(i * 37) % 200 + 1 for i in range(count)]
    sizes[1:3] = WHOLE, 2 * WHOLE
    layer = [weights(size, dtype=BF16, seed=size) for size in sizes]
    layer[-1] = weights(9, 10, dtype=BF16).t()
    expected = [reference_perturb(w, SEED, 0.1, w.dtype, stream=i) for i, w in enumerate(layer)]
    operands = [operand_of(w, stream=i) for i, w in enumerate(layer)]
    assert len(run_perturb(operands, Directions(1, SEED, 0, 0.1))) == launches
    for w, right in zip(layer, expected, strict=True):
        assert_same_bits(w.contiguous(), right)


def test_programs_that_make_several_tiles(monkeypatch):
    monkeypatch.setattr(_triton, "_PROGRAMS", 2)
    layer = [weights(11 * WHOLE + 3), weights(5000)[1:], weights(30, 120)[:, :110]]
    expected = [reference_perturb(w, SEED, 0.1, w.dtype, stream=i) for i, w in enumerate(layer)]
    operands = [operand_of(w, stream=i) for i, w in enumerate(layer)]
    device = TritonDevice()
    (plan,) = perturb.triton_plans(device.parts(operands), F32, F32, Directions(1, SEED, 0, 0.1))
    assert plan.grid < 8
    device.run_plans([plan])
    for w, right in zip(layer, expected, strict=True):
        assert_same_bits(w.contiguous(), right)


@pytest.mark.parametrize("seed_there", [False, True])
@pytest.mark.parametrize("scale_there", [False, True])
def test_seed_and_scale_in_device_memory(seed_there, scale_there):
    device, w = TritonDevice(), weights(WHOLE + 77)
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
    run_perturb([operand_of(w)], directions, device)
    assert_same_bits(w, expected)


def run_accumulate(
    master: Tensor, out: Tensor | None, scales: list[float], *, gate: int | None = None
) -> None:
    device, count = TritonDevice(), len(scales)
    seeds = torch.tensor([SEED + k for k in range(count)], dtype=torch.uint64)
    queries = torch.tensor([5 + (k << 31) for k in range(count)], dtype=torch.uint32)
    held = torch.tensor(scales)
    directions = Directions(
        count,
        seeds=device.address(seeds) if count else 0,
        queries=device.address(queries) if count else 0,
        scales=device.address(held) if count else 0,
    )
    flag = torch.tensor([gate or 0], dtype=torch.int32)
    target = operand_of(master if out is None else out, master, stream=2)
    parts, at = device.parts([target]), 0 if gate is None else device.address(flag)
    dtypes = target.out.dtype, master.dtype
    device.run_plans(accumulate.triton_plans(parts, *dtypes, out is not None, directions, at))


@pytest.mark.parametrize("length", [1, 13, WHOLE, WHOLE + 1])
def test_accumulate_is_one_direction_after_the_other(dtype, length):
    master, scales = weights(length, dtype=dtype), [0.5, -0.001]
    expected = master
    for k, scale in enumerate(scales):
        query = 5 + (k << 31)
        expected = reference_perturb(expected, SEED + k, scale, dtype, query=query, stream=2)
    run_accumulate(master, None, scales)
    assert_same_bits(master, expected)


@pytest.mark.parametrize("gate", [None, 1, 0])
@pytest.mark.parametrize("view", [lambda w: w, lambda w: w[::2]], ids=["whole", "strided"])
def test_accumulate_writes_the_rounded_master(dtype, gate, view):
    master = view(weights(2 * WHOLE + 999))
    out = torch.full((len(master),), torch.nan, dtype=dtype)
    expected = master.clone()
    if gate != 0:
        expected = reference_perturb(master, SEED, 0.3, F32, query=5, stream=2)
    run_accumulate(master, out, [0.3], gate=gate)
    assert_same_bits(master.contiguous(), expected)
    assert_same_bits(out, expected.to(dtype))


@pytest.mark.parametrize("gate", [None, 0])
def test_no_direction_keeps_every_bit(gate):
    master = torch.tensor([-0.0, 0.0, 1.0]).repeat(WHOLE)
    out, before = torch.empty_like(master), master.clone()
    run_accumulate(master, out, [] if gate is None else [1.0], gate=gate)
    assert_same_bits(master, before)
    assert_same_bits(out, before)


def test_special_values_round_like_the_reference(dtype):
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = [0.0, -0.0, tiny, -tiny, tiny / 4, largest, -largest, float("inf"), -float("inf")]
    for scale in (1.0, 0.0, largest / 4, 1e-30):
        w = torch.tensor(values).repeat(WHOLE // 8).to(dtype)
        expected = reference_perturb(w, SEED, scale, dtype)
        run_perturb([operand_of(w)], Directions(1, SEED, 0, scale))
        assert_same_bits(w, expected)
    w = torch.full((WHOLE + 1,), torch.nan, dtype=dtype)
    run_perturb([operand_of(w)], Directions(1, SEED, 0, 1.0))
    assert w.isnan().all()


# Statistics, in the order of tests/gpu_stats.py.


SAMPLES = dict(samples()) | {"aligned": weights(3, 16_384 + 520).numpy()}


def run_stats(x: Tensor, per: str, architecture: int = 90) -> Stats:
    device, (rows, channels) = TritonDevice(architecture), x.shape
    sizes = rows, channels, REDUCTIONS[per]
    count = {"tensor": 1, "channel": channels, "token": rows}[per]
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float64, torch.float64)
    results = [torch.full((count,), 77, dtype=dtype) for dtype in dtypes]
    workspace = torch.full(
        (_C.gpu.partials(*sizes) * _C.gpu.PARTIAL_BYTES // 8 + 1,), torch.nan, dtype=torch.float64
    )
    pointers = tuple(device.address(result) for result in results)
    room, at = device.address(workspace), device.address(x)
    device.run_plans(activation_stats.triton_plans(at, x.dtype, *sizes, pointers, room))
    return Stats(*(result.numpy() for result in results))


def assert_statistics(x: Tensor, per: str, architecture: int = 90) -> None:
    got, right = run_stats(x, per, architecture), stats(to_float32(x), per)
    for name, a, b in zip(Stats._fields, got, right, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name} per {per}")


@pytest.mark.parametrize("per", REDUCTIONS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_statistics_have_the_bits_of_the_reference(dtype, per, sample):
    assert_statistics(torch.from_numpy(SAMPLES[sample]).to(dtype), per)


@pytest.mark.parametrize("per", REDUCTIONS)
@pytest.mark.parametrize("scale", [1e30, 1e-38, 1e-42])
def test_statistics_of_the_largest_and_smallest_numbers(per, scale):
    assert_statistics(torch.from_numpy(SAMPLES["odd sizes"]) * scale, per)


@pytest.mark.parametrize("architecture", [80, 100])
def test_statistics_of_a_misaligned_view(architecture):
    assert_statistics(weights(1, 20_001, dtype=BF16)[:, 1:], "tensor", architecture)


@pytest.mark.parametrize("pieces", [17, 65, 300])
def test_statistics_of_many_pieces(pieces):
    x = weights(256 * (pieces - 1) + 3, 3)
    x[-1, 1] = x[7, 1] = -9  # the first of equal maxima, far apart
    assert_statistics(x, "channel")


def test_equal_maxima_are_named_by_the_first():
    x = torch.ones(2, 40_000, dtype=BF16)
    x[1, 30_001] = x[1, 17] = x[1, 16] = -5
    assert run_stats(x, "token").argmax.tolist() == [0, 16]
    assert run_stats(x, "tensor").argmax.tolist() == [40_016]


# Triton's interpreter: another reading of the same source. It truncates bfloat16: left out.

INTERPRETED = """
import importlib, torch
from bits import assert_same_bits, reference_perturb, weights
from dlzo_kernels.ops._parts import Directions, Operand, parts_of
gaussian, perturb, accumulate = (importlib.import_module(f"dlzo_kernels.ops.{op}")
                                 for op in ("gaussian", "perturb", "accumulate"))

def run(plans):
    for plan in plans:
        plan.kernel[plan.grid, 1, 1](*plan.arguments, **plan.constants)

seed = 2**64 - 3
for dtype in (torch.float32, torch.float16):
    for w in (weights(5000, dtype=dtype), weights(70, 31, dtype=dtype).t()):
        expected = reference_perturb(w, seed, 0.1, dtype, stream=3, query=9, offset=5)
        parts = parts_of([Operand(w, w, 3, 5, None)])
        run(perturb.triton_plans(parts, dtype, dtype, Directions(1, seed, 9, 0.1)))
        assert_same_bits(w.contiguous(), expected)
    master, out = weights(3000), torch.empty(3000, dtype=dtype)
    expected = reference_perturb(master, seed, 0.1, torch.float32)
    parts, directions = parts_of([Operand(out, master, 0, 0, None)]), Directions(1, seed, 0, 0.1)
    run(accumulate.triton_plans(parts, dtype, torch.float32, True, directions, 0))
    assert_same_bits(master, expected)
    assert_same_bits(out, expected.to(dtype))
    run(gaussian.triton_plans(parts_of([Operand(out, out, 0, 0, None)]), dtype, directions))
    assert_same_bits(out, reference_perturb(torch.zeros(3000), seed, 1.0, dtype))
"""


INTERPRETED_ATTENTION = """
import itertools, torch
from bits import assert_same_bits
from ptx.triton_ptx import attention
from trees import assert_right, chain, inputs, tree

def run(tensors, parents, **numbers):
    plan, out, _places = attention(*tensors, parents, **numbers)
    plan.kernel[plan.grid, 1, 1](*plan.arguments, **plan.constants)
    return out

cases = [
    (chain, 65, (64, 64), (9, 3), {}),
    (tree, 150, (16, 16), (2, 1), {}),
    (tree, 33, (80, 24), (2, 2), {}),
    (tree, 70, (5, 3), (3, 1), {"window": 9}),
    (chain, 130, (8, 8), (1, 1), {"window": 1}),
    (chain, 200, (8, 8), (1, 1), {"window": 2}),
    (tree, 40, (100, 200), (2, 1), {"softcap": 3.0}),
    (tree, 150, (24, 24), (4, 2), {"softcap": 0.5, "window": 11, "scale": 2.0}),
    (chain, 1, (8, 8), (1, 1), {}),
]
for dtype, (grow, tokens, sizes, heads, numbers) in itertools.product(
    (torch.float32, torch.float16), cases
):
    numbers = {"scale": 0.3, **numbers}
    tensors = inputs(tokens, sizes, heads, dtype)
    assert_right(run(tensors, grow(tokens), **numbers), tensors, grow(tokens), **numbers)

# Tokens in any order, views, and other trees that are not finite.
q, k, v = tensors = inputs(90, (16, 16), (4, 2), torch.float32)
both = [*chain(37), -1, *range(37, 89)]
expected = run(tensors, both)
mixed = [i for pair in zip(range(37), range(37, 74)) for i in pair] + [*range(74, 90)]
back = {token: place for place, token in enumerate(mixed)}
parents = [back[both[token]] if both[token] >= 0 else -1 for token in mixed]
got = run(tuple(x[:, :, mixed] for x in tensors), parents)
assert_same_bits(got, expected[:, :, mixed].contiguous())
apart = [torch.full((2, 4, 90, 33), torch.nan)[..., 3:19].copy_(q),
         *(torch.full((2, 2, 90, 17), torch.nan)[..., 1:].copy_(x) for x in (k, v))]
assert_same_bits(run(apart, both), expected)
k[:, :, :37], v[:, :, :37] = torch.nan, torch.inf
got = run(tensors, both)
assert got[:, :, :37].isnan().all()
assert_same_bits(got[:, :, 37:].contiguous(), expected[:, :, 37:].contiguous())
"""


@pytest.mark.parametrize("code", [INTERPRETED, INTERPRETED_ATTENTION], ids=["noise", "attention"])
def test_the_interpreter_agrees(tmp_path, code):
    pytest.importorskip("triton", minversion="3.7")  # whose interpreter knows numpy 2
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,  # Python would find the source in the project's folder
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
