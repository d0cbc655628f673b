"""A device to run the CUDA column's launch plans on: the simulator, with torch's memory in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bits import reference_perturb
from dlzo_kernels import _C
from dlzo_kernels.ops._parts import Operand, Part, parts_of
from ptx.compile import CSRC, nvcc_ptx
from ptx.machine import launch
from ptx.memory import Memory
from ptx.parser import Kernel, parse

SEED = 0xFEDCBA9876543210


def operand_of(
    out: Tensor,
    base: Tensor | None = None,
    stream: int = 0,
    offset: int = 0,
    row_stride: int | None = None,
) -> Operand:
    return Operand(out, out if base is None else base, stream, offset, row_stride)


def normals(*shape: int, dtype: torch.dtype = torch.float32, **numbers: int) -> Tensor:
    """Normals by the reference: zero, perturbed by one z."""
    return reference_perturb(torch.zeros(shape), SEED, 1.0, dtype, **numbers)


class Device:
    """Global memory of the simulator that stands for that of torch tensors."""

    def __init__(self, architecture: int = 90, sources: Mapping[str, str] | None = None) -> None:
        """`sources`: PTX of an op to take instead of what nvcc makes of its file."""
        self.memory = Memory()
        self.architecture = architecture
        self.sources = sources or {}
        self.placed: list[tuple[int, int, int]] = []

    def address(self, tensor: Tensor) -> int:
        """Where a tensor's first element is, its whole storage having been placed."""
        return self.translate(tensor.data_ptr(), tensor)

    def translate(self, pointer: int, tensor: Tensor) -> int:
        """The address here of a pointer into a tensor's storage."""
        storage = tensor.untyped_storage()
        for begin, size, at in self.placed:
            if begin <= pointer < begin + max(size, 1):
                return at + pointer - begin
        raw = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.placed.append((storage.data_ptr(), raw.size, self.memory.add(raw, "tensor")))
        return self.translate(pointer, tensor)

    def parts(self, operands: Sequence[Operand]) -> list[Part]:
        """The parts of operands, at their addresses here."""
        result = []
        for operand in operands:
            for part in parts_of([operand]):
                out = self.translate(part.out, operand.out)
                base = self.translate(part.base, operand.base)
                result.append(part._replace(out=out, base=base))
        return result

    def run(self, op: str, launches: Sequence[_C.gpu.Launch], ctas: range | None = None) -> int:
        """Executes what a GPU would be given, or some CTAs of it; returns the simulator's count of
        instructions.
        """
        count = 0
        for planned in launches:
            source = self.sources.get(op) or nvcc_ptx(CSRC / f"{op}.cu", self.architecture)
            threads = _C.gpu.THREADS
            entry = kernel(source, planned.kernel)
            sizes = {"grid": planned.blocks, "block": threads, "ctas": ctas}
            count += launch(entry, self.memory, [planned.argument], **sizes)
        return count


@functools.lru_cache(maxsize=64)
def kernel(source: str, name: str) -> Kernel:
    """One kernel of a module, parsed once."""
    return parse(source, name)
