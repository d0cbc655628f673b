"""The Triton column without a GPU: compiled for every target, and what is its own on the simulator.

What it shares with the CUDA column is in test_columns.py.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bits import assert_same_bits, reference_perturb, weights
from dlzo_kernels.ops._parts import Directions, Operand
from trees import chain, inputs

pytest.importorskip("triton")

from dlzo_kernels import LaunchError
from dlzo_kernels.ops import _triton
from dlzo_kernels.ops._triton import Plan
from ptx import lint
from ptx.compile import missing, resources, sass
from ptx.device import SEED, operand_of
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

WHOLE = 2048  # elements of a tile
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


@pytest.mark.parametrize(("count", "launches"), [(16, 1), (17, 2)])
def test_sixteen_tensors_take_one_launch(count, launches):
    operands = [operand_of(weights(5), stream=i) for i in range(count)]
    parts = TritonDevice().parts(operands)
    assert len([*perturb.triton_plans(parts, F32, F32, Directions(1, SEED))]) == launches


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
