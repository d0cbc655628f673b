"""Triton launches without a GPU: compiled for any architecture, and run on the simulator."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
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


def compile_plan(plan: Plan, target: str) -> Any:
    """The kernel of a plan for one of TARGETS: a triton CompiledKernel."""
    return _compiled(
        plan.kernel,
        tuple(map(type_of, plan.arguments)),
        tuple(plan.constants.items()),
        plan.num_warps,
        target,
    )


class Device:
    """Global memory of the simulator that stands for that of torch tensors.

    Args:
        target: one of TARGETS that has PTX.
    """

    def __init__(self, target: str = "sm_90") -> None:
        self.memory, self.target = Memory(), target
        self.placed: list[tuple[int, int, int]] = []  # host address, bytes, simulated address

    def address(self, tensor: Tensor) -> int:
        """Where a tensor's first element is, its whole storage having been placed."""
        storage = tensor.untyped_storage()
        if not any(begin == storage.data_ptr() for begin, *_ in self.placed):
            raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            place = storage.data_ptr(), raw.size, self.memory.add(raw, f"{tuple(tensor.shape)}")
            self.placed.append(place)
        return self.translate(tensor.data_ptr())

    def translate(self, pointer: int) -> int:
        """Where the simulator has what the host has at this address."""
        places = (at + pointer - begin for begin, n, at in self.placed if 0 <= pointer - begin < n)
        return next(places)

    def parts(self, operands: Iterable[Operand]) -> list[Part]:
        """Their parts, with addresses of the simulator."""
        operands = [operand for operand in operands if operand.out.numel()]
        for operand in operands:
            self.address(operand.out)
            self.address(operand.base)
        return [
            part._replace(out=self.translate(part.out), base=self.translate(part.base))
            for part in parts_of(operands)
        ]

    def run(self, plans: Iterable[Plan]) -> int:
        """Runs plans one after the other; returns how many."""
        plans = list(plans)
        for plan in plans:
            compiled = compile_plan(plan, self.target)
            kernel = _parsed(compiled.asm["ptx"])
            arguments = [*_flat(plan.arguments)]
            # Triton's own scratch memory, of which these kernels use none.
            arguments += [0] * (len(kernel.parameters) - len(arguments))
            launch(
                kernel,
                self.memory,
                arguments,
                grid=plan.grid,
                block=32 * plan.num_warps,
                dynamic_shared=compiled.metadata.shared,
            )
        return len(plans)


@functools.cache
def _compiled(
    kernel: Any, types: tuple[Any, ...], constants: tuple[Any, ...], num_warps: int, target: str
) -> Any:
    return compile_for(TARGETS[target], kernel, types, dict(constants), num_warps)


@functools.cache
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


def _flat(arguments: Iterable[Any]) -> Iterator[int | float]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument
