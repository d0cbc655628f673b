"""Triton launches without a GPU: compiled for any architecture, and run on the simulator."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from triton.backends.compiler import GPUTarget

from dlzo_kernels.ops._triton import Plan, compile_for, type_of
from ptx.device import Device, kernel
from ptx.machine import launch

# From Ampere to consumer Blackwell, and AMD's CDNA 3.
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_plan(plan: Plan, target: str) -> Any:
    """The kernel of a plan for one of TARGETS: a triton CompiledKernel."""
    types, constants = tuple(map(type_of, plan.arguments)), tuple(plan.constants.items())
    return _compiled(plan.kernel, types, constants, plan.num_warps, target)


@functools.cache
def _compiled(
    function: Any, types: tuple[Any, ...], constants: tuple[Any, ...], num_warps: int, target: str
) -> Any:
    return compile_for(TARGETS[target], function, types, dict(constants), num_warps)


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
