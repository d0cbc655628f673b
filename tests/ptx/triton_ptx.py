"""Triton launches without a GPU: compiled for any architecture, and run on the simulator."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.backends.compiler import GPUTarget

from dlzo_kernels.ops._parts import Operand, Part, parts_of
from dlzo_kernels.ops._triton import Plan, compile_for, type_of
from ptx.machine import launch
from ptx.memory import Memory
from ptx.parser import Kernel, parse

# From Ampere to consumer Blackwell, and AMD's CDNA 3.
TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled(NamedTuple):
    """What a compiler made of a plan's kernel: its code by kind, and bytes of shared memory."""

    asm: dict[str, Any]
    shared: int
    entry: str


def compile_plan(plan: Plan, target: str) -> Compiled:
    """The kernel of a plan for one of TARGETS."""
    types = tuple(map(type_of, plan.arguments))
    compiled = compile_for(TARGETS[target], plan.kernel, types, plan.constants, plan.num_warps)
    return Compiled(compiled.asm, compiled.metadata.shared, compiled.metadata.name)


class Simulator:
    """A GPU's memory with the storage of torch tensors in it, and a processor for plans.

    Args:
        target: one of TARGETS that has PTX.
    """

    def __init__(self, *tensors: torch.Tensor, target: str = "sm_90") -> None:
        self.memory, self.target = Memory(), target
        self.storages: list[tuple[int, int, int]] = []  # host address, bytes, simulated address
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """Tensors of its storage can be used from now on."""
        storage = tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        name = f"{tensor.dtype} {tuple(tensor.shape)}"
        place = storage.data_ptr(), storage.nbytes(), self.memory.add(raw, name)
        self.storages.append(place)

    def address(self, host: int) -> int:
        """Where the simulator sees what lies at this address."""
        for begin, size, simulated in self.storages:
            if begin <= host < begin + size:
                return simulated + host - begin
        raise ValueError(f"no tensor at {host:#x} was added")

    def parts(self, operands: Iterable[Operand]) -> list[Part]:
        """Their parts, as the simulator sees them."""
        return [
            part._replace(out=self.address(part.out), base=self.address(part.base))
            for part in parts_of(operands)
        ]

    def run(self, plans: Iterable[Plan]) -> int:
        """Runs plans one after the other; how many there were."""
        count = 0
        for plan in plans:
            kernel, shared = _parsed(
                plan.kernel,
                tuple(map(type_of, plan.arguments)),
                tuple(plan.constants.items()),
                plan.num_warps,
                self.target,
            )
            arguments = [*_flat(plan.arguments)]
            # Triton's own scratch pointers, which these kernels do not use.
            arguments += [0] * (len(kernel.parameters) - len(arguments))
            block = 32 * plan.num_warps
            launch(
                kernel, self.memory, arguments, grid=plan.grid, block=block, dynamic_shared=shared
            )
            count += 1
        return count


@functools.cache
def _parsed(
    kernel: Any, types: tuple[Any, ...], constants: tuple[Any, ...], num_warps: int, target: str
) -> tuple[Kernel, int]:
    compiled = compile_for(TARGETS[target], kernel, types, dict(constants), num_warps)
    return parse(compiled.asm["ptx"]), compiled.metadata.shared


def _flat(arguments: Iterable[Any]) -> Iterator[int | float]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument if isinstance(argument, float) else np.int64(argument)
