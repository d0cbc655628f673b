"""Whether the tests on the PTX simulator would notice a kernel that is a little wrong.

    python benchmarks/gpu_mutants.py

Changes the PTX of the noise and perturbation kernels (sm_90), one constant, comparison, operation
or operand order at a time, and runs each mutant. Needs nvcc; takes about 8 minutes. Lands in
results/gpu_mutants.json, survivors with their statement; docs/gpu.md explains them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from results import RESULTS, ROOT, write_json
from torch import Tensor

from dlzo_kernels import _C
from dlzo_kernels.ops._common import DTYPE_CODES
from dlzo_kernels.ops._parts import Directions, Operand

sys.path.insert(0, str(ROOT / "tests"))  # where the simulator lies
from bits import assert_same_bits, reference_perturb, weights
from noise_edges import SCALE, cancelled
from ptx.compile import CSRC, nvcc_ptx
from ptx.device import Device, operand_of
from ptx.mutate import Mutant, mutants, run_mutants

BLOCK = 8192  # elements of a block of threads
# Raw normals, and the kernel whose rounding hides most of an error in them.
KERNELS = {"gaussian_float32": torch.float32, "perturb_bfloat16_bfloat16": torch.bfloat16}


class Case(NamedTuple):
    """Operands of one launch, and the direction of its noise."""

    operands: list[Operand]
    seed: int = 0x9E3779B97F4A7C15
    query: int = 0xC0000001


def cases(dtype: torch.dtype) -> list[Case]:
    """Launches as those of the tests: on every way through a kernel, then to its last bits."""
    return [*(Case(operands) for operands in ways(dtype)), *telling(dtype)]


def telling(dtype: torch.dtype) -> Iterator[Case]:
    """A group on its own and a whole block where the last bits of the noise show."""
    for length in (11, BLOCK):
        for w, numbers in cancelled(length, dtype):
            operand = operand_of(w, w, numbers["stream"], numbers["offset"])
            yield Case([operand], numbers["seed"], numbers["query"])


def ways(dtype: torch.dtype) -> list[list[Operand]]:
    """Operands of random weights that reach every way through a kernel; the largest last."""
    matrix, tall = weights(40, 70, dtype=dtype), weights(900, 33, dtype=dtype)
    transposed, shard, two_rows = matrix.t(), matrix[:, 5:24], matrix[:2, 5:24]
    block_of_rows = weights(512, 10, dtype=dtype)[:, :9]  # of two groups each
    layer = [weights(n, dtype=dtype, seed=n) for n in (3, BLOCK + 5, 40, 1, 9000)]
    short = [weights(16 - n, dtype=dtype) for n in range(8)]
    ragged, whole = weights(60 * BLOCK + 29, dtype=dtype), weights(200 * BLOCK, dtype=dtype)
    ahead, carry = weights(3 * BLOCK, dtype=dtype)[8:], 2**34  # elements to the counter's high half
    return [
        [operand_of(transposed, transposed, offset=2**64 - 2800)],
        [
            operand_of(
                shard, shard, stream=0x80000003, offset=(0xDEADBEEF << 32) + 11, row_stride=64
            )
        ],
        [operand_of(two_rows, two_rows, row_stride=64)],
        [operand_of(block_of_rows, block_of_rows)],
        *([operand_of(w, w, offset=n)] for n, w in enumerate(short)),
        [operand_of(w, w, stream=i) for i, w in enumerate(layer)],
        [operand_of(short[0], short[0]), operand_of(tall[:, 1:30], tall[:, 1:30], stream=1)],
        *(
            [operand_of(w, w, offset=carry - BLOCK - gap)]
            for gap in (-8, 0, 8, BLOCK)
            for w in [ahead[: 2 * BLOCK]]
        ),
        [operand_of(ahead[8:], ahead[8:], offset=8 * BLOCK + 4)],  # phases in whole groups
        [operand_of(ahead[4:], ahead[4:], offset=4)],
        [operand_of(ahead[1:], ahead[1:], offset=1)],
        [operand_of(ragged[3:], ragged[3:], stream=1, offset=5)],
        [operand_of(whole, whole, stream=0x80000003, offset=2**36 + 8)],
    ]


def checker(kernel: str, dtype: torch.dtype) -> Callable[[str], None]:
    """Runs all cases on PTX source; raises where bits or the number of instructions differ."""
    op = kernel.split("_")[0]
    right = nvcc_ptx(CSRC / f"{op}.cu", 90)
    # The instructions are counted on weights of their own.
    counts = [run(op, dtype, case, right) for case in cases(dtype)]
    memories = [[memory_after(op, case, w) for w in case.operands] for case in cases(dtype)]
    prepared = list(zip(cases(dtype), memories, counts, strict=True))

    def check(source: str) -> None:
        for case, memories, count in prepared:
            before = [operand.out.untyped_storage().clone() for operand in case.operands]
            try:
                # Another way to the right bits is a longer one.
                assert run(op, dtype, case, source) == count
                for operand, memory in zip(case.operands, memories, strict=True):
                    assert_same_bits(memory_of(operand.out), memory)
            finally:
                for operand, storage in zip(case.operands, before, strict=True):
                    operand.out.untyped_storage().copy_(storage)

    return check


def memory_of(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def memory_after(op: str, case: Case, operand: Operand) -> Tensor:
    """That memory as a right kernel leaves it."""
    base = torch.zeros_like(operand.base) if op == "gaussian" else operand.base
    scale = 1.0 if op == "gaussian" else SCALE
    numbers = {"stream": operand.stream, "offset": operand.offset, "query": case.query}
    stride = operand.row_stride
    found = reference_perturb(base, case.seed, scale, base.dtype, row_stride=stride, **numbers)
    memory = memory_of(operand.out).clone()
    place = operand.out.shape, operand.out.stride(), operand.out.storage_offset()
    memory.as_strided(*place).copy_(found)
    return memory


def run(op: str, dtype: torch.dtype, case: Case, source: str) -> int:
    device, code = Device(sources={op: source}), DTYPE_CODES[dtype]
    parts = device.parts(case.operands)
    directions = Directions(1, seed=case.seed, query=case.query, scale=SCALE)
    if op == "gaussian":
        return device.run(op, _C.gpu.gaussian(code, parts, directions))
    return device.run(op, _C.gpu.perturb(code, code, parts, directions))


def candidates(kernel: str) -> list[Mutant]:
    return list(mutants(nvcc_ptx(CSRC / f"{kernel.split('_')[0]}.cu", 90), kernel))


def sample(kernel: str, count: int) -> list[Mutant]:
    """So many mutants, always the same."""
    return random.Random(0).sample(candidates(kernel), count)


def main() -> None:
    results: dict[str, object] = {"command": "python benchmarks/gpu_mutants.py"}
    for kernel, dtype in KERNELS.items():
        report = run_mutants(candidates(kernel), checker(kernel, dtype))
        caught, survived = len(report.caught), len(report.survived)
        results[kernel] = {
            "caught": caught,
            "survived": survived,
            "refused": len(report.refused),
            "share_caught": round(caught / (caught + survived), 4),
            "survivors": [mutant.description for mutant in report.survived],
        }
        print(kernel, json.dumps(results[kernel], indent=1), flush=True)
    write_json(RESULTS / "gpu_mutants.json", results)


if __name__ == "__main__":
    main()
