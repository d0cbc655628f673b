"""Triton launches without a GPU: compiled for any architecture, and run on the simulator."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bits import PAIRS
from dlzo_kernels.ops._parts import Directions, Part
from dlzo_kernels.ops._triton import Plan, compile_for, type_of
from ptx.device import Device, kernel
from ptx.machine import launch
from trees import chain, inputs

gaussian, perturb, accumulate, activation_stats, tree_attention = (
    importlib.import_module(f"dlzo_kernels.ops.{op}")
    for op in ("gaussian", "perturb", "accumulate", "activation_stats", "tree_attention")
)

# From Ampere to consumer Blackwell, and AMD's CDNA 3.
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

F32, BF16, F16 = DTYPES = torch.float32, torch.bfloat16, torch.float16


def every_kernel() -> Iterator[tuple[str, Plan]]:
    """A launch of each kernel, by the name that it has in the CUDA column where it is there too."""
    parts = [
        Part(64, 64, 1, 20_480, 0, 1, 0, 1, offset=0, row_stride=0, stream=i) for i in range(7)
    ]
    one, there = Directions(1, 5, 0, 0.5), Directions(7, seeds=64, queries=64, scales=64)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for plan in gaussian.triton_plans(parts, dtype, one):
            yield f"gaussian_{name}", plan
        for plan in accumulate.triton_plans(parts, dtype, F32, True, there, 64):
            yield f"accumulate_float32_into_{name}", plan
        for plan in accumulate.triton_plans(parts, dtype, dtype, False, there, 0):
            yield f"accumulate_{name}", plan
        for reduction, sums in enumerate(("sum_runs", "sum_columns")):
            sizes = 600, 8000, reduction
            plan, combine = activation_stats.triton_plans(64, dtype, *sizes, (64,) * 5, 64)
            yield f"{sums}_{name}", plan
    yield "combine_partials", combine
    for pair in PAIRS:
        name = "_".join(str(dtype).removeprefix("torch.") for dtype in pair)
        for suffix, directions in (("", one), ("_indirect", there)):
            for plan in perturb.triton_plans(parts, *pair, directions):
                yield f"perturb_{name}{suffix}", plan
    for dtype, size in product(DTYPES, (64, 128, 256)):
        name = str(dtype).removeprefix("torch.")
        tensors = inputs(40, (size, size), (4, 2), dtype)
        yield f"tree_attention_{name}_{size}", attention(*tensors, chain(40))[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: list[int],
    *,
    scale: float = 0.125,
    window: int = 1 << 62,
    softcap: float = 0.0,
) -> tuple[Plan, Tensor, Tensor]:
    """A launch, what it will write, and numbers to keep until it is done."""
    out = torch.full((*query.shape[:3], value.shape[-1]), torch.nan, dtype=query.dtype)
    tile = tree_attention.tile_for(query, value)
    places, count = tree_attention.walk(torch.tensor(parents), tile)
    tensors = query, key, value, out
    numbers = scale, window, softcap
    return tree_attention.triton_plan(tensors, places, count, tile, *numbers), out, places


def compile_plan(plan: Plan, target: str) -> Any:
    """The kernel of a plan for one of TARGETS: a triton CompiledKernel.

    Skips a test where Triton's assembler for that target is refused.
    """
    types, constants = tuple(map(type_of, plan.arguments)), tuple(plan.constants.items())
    try:
        return _compiled(plan.kernel, types, constants, plan.num_warps, plan.exact, target)
    except RuntimeError as error:
        if "changes the bits of the noise" in str(error):
            pytest.skip(str(error))
        raise


@functools.cache
def _compiled(
    function: Any,
    types: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int,
    exact: bool,
    target: str,
) -> Any:
    return compile_for(TARGETS[target], function, types, dict(constants), num_warps, exact)


class TritonDevice(Device):
    """The simulator as a device for the Triton column."""

    def run_plans(self, plans: Iterable[Plan]) -> list[int]:
        """Executes what a GPU would be given; returns the simulator's counts of instructions."""
        return [self._run(plan) for plan in plans]

    def _run(self, plan: Plan) -> int:
        compiled = compile_plan(plan, f"sm_{self.architecture}")
        entry = kernel(compiled.asm["ptx"], compiled.metadata.name)
        arguments = [*_flat(plan.arguments)]
        # Triton's own scratch memory, of which these kernels use none.
        arguments += [0] * (len(entry.parameters) - len(arguments))
        shared = compiled.metadata.shared
        threads = 32 * plan.num_warps
        return launch(
            entry, self.memory, arguments, grid=plan.grid, block=threads, dynamic_shared=shared
        )


def _flat(arguments: Iterable[Any]) -> Iterator[int | float]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument
