"""What the compiled GPU kernels cost by their machine code: no GPU is needed.

    python benchmarks/gpu_static.py

Reads the code of the CUDA column out of the installed extension, and has Triton compile its column
for the same architectures. One row for each column, architecture and kernel: registers of a thread,
bytes of its stack, how many instructions spill to it, shared memory, and the instructions that the
shortest way through the inner loop issues for an element, by class. What a kernel calls (the slow
path of a root) may save registers on the stack; that is no spill, for ptxas neither. Lands in
results/gpu_static.csv; exits with an error where a limit is exceeded. Needs Triton, whose wheel has
nvdisasm and cuobjdump; takes some minutes.
"""

from __future__ import annotations

import functools
import heapq
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from results import RESULTS, ROOT, write_rows

from dlzo_kernels import _C
from dlzo_kernels.ops._triton import Plan

sys.path.insert(0, str(ROOT / "tests"))  # where the tools for PTX and machine code lie
from ptx.compile import Resources, resources, tool

CLASSES = {
    "memory": r"LD|ST|ATOM|RED",
    "float": r"F(ADD|MUL|FMA|SETP|SEL|MNMX|CHK)|D(ADD|MUL|FMA)",
    "multiply": r"IMAD|UIMAD",
    "convert": r"I2F|F2|HADD2|I2I",
    "special": r"MUFU",
    "control": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC|NOP|BAR|YIELD",
}  # whatever else: integer and logic
FIELDS = ("column", "architecture", "kernel", "registers", "stack_bytes", "spills", "shared_bytes")
COUNTS = ("per_element", *CLASSES, "integer", "fused", "roots")
# Instructions for an element, and registers, that no architecture must exceed.
LIMITS = {
    "cuda": {"gaussian": 47.0, "perturb": 51.0, "accumulate": 64.0, "sum_runs": 16.0},
    "triton": {"gaussian": 47.0, "perturb": 52.0, "accumulate": 58.0, "sum_runs": 16.0},
}
REGISTERS = {
    "cuda": {"gaussian": 48, "perturb": 48, "accumulate": 64, "sum_runs": 96, "sum_columns": 64},
    "triton": {
        "gaussian": 72,
        "perturb": 88,
        "accumulate": 120,
        "sum_runs": 160,
        "sum_columns": 96,
    },
}
SPILLING = "tree_attention_float32_256"  # the one kernel that may


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; `target` is the number of the instruction it may branch to."""

    opcode: str
    conditional: bool
    target: int | None

    @property
    def kind(self) -> str:
        found = (name for name, pattern in CLASSES.items() if re.match(pattern, self.opcode))
        return next(found, "integer")


def cubins(extension: Path) -> Iterator[tuple[int, bytes]]:
    """(architecture, machine code) of every piece in the extension."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tool("cuobjdump")), "-xelf", "all", str(extension)]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        for file in sorted(Path(folder).glob("*.cubin")):
            found = re.search(r"sm_(\d+)", file.name)
            assert found is not None
            yield int(found[1]), file.read_bytes()


def machine_code(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, without those of what it calls."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("nvdisasm")), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]
    bodies = [re.split(r"^\$__internal\S+:", section, flags=re.M)[0] for section in sections]
    return {re.match(r"[\w$]+", body)[0]: _instructions(body) for body in bodies}


def _instructions(section: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for line in section.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)", line)
        if code:
            lines.append((code[1] or "", code[2], code[3]))
    result = []
    for guard, opcode, rest in lines:
        # ptxas also leaves loops by a call of what comes next.
        label = re.search(r"\.L_x_\d+", rest) if re.match("BRA|CALL", opcode) else None
        conditional = bool(guard) or re.match(r"\s*!?U?P\d", rest) is not None
        result.append(Instruction(opcode, conditional, labels[label[0]] if label else None))
    return result


def hot_path(code: Sequence[Instruction], required: Mapping[str, int]) -> list[Instruction]:
    """The shortest way once round a loop that has so many of these opcodes; never through a call.

    That leaves out what rare elements need: heads and tails, and roots of tiny numbers.
    """
    loops = [(i, x.target) for i, x in enumerate(code) if x.target is not None and x.target <= i]
    paths = [path for end, begin in loops if (path := _way(code, begin, end, required))]
    if not paths:
        raise ValueError(f"no loop has {required}")
    return [code[i] for i in min(paths, key=len)]


def _way(
    code: Sequence[Instruction], begin: int, end: int, required: Mapping[str, int]
) -> tuple[int, ...] | None:
    lacking = tuple(required.values())
    queue: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = [(0, begin, lacking, ())]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    while queue:
        length, at, lacking, path = heapq.heappop(queue)
        if (at, lacking) in seen:
            continue
        seen.add((at, lacking))
        here = code[at]
        lacking = tuple(
            max(0, count - here.opcode.startswith(opcode))
            for count, opcode in zip(lacking, required, strict=True)
        )
        if at == end:
            if not any(lacking):
                return (*path, at)
            continue
        onward = [at + 1]
        if here.target is not None:
            onward = [here.target, at + 1] if here.conditional else [here.target]
        elif re.match("EXIT|RET|CALL", here.opcode) and not here.conditional:
            onward = []
        for place in onward:
            if place < len(code):
                heapq.heappush(queue, (length + 1, place, lacking, (*path, at)))
    return None


def required_opcodes(column: str, kernel: str) -> dict[str, int]:
    """What marks a kernel's main path: whole groups, and the work on each of their elements."""
    if kernel.startswith("gaussian"):
        return {"STG.E.128": 1, "MUFU.RSQ": 4}
    if kernel.startswith(("perturb", "accumulate")):
        return {"LDG.E.128": 1, "STG.E.128": 1, "MUFU.RSQ": 4}
    if not kernel.startswith("sum_runs"):
        return {}
    # Triton's loop is unrolled three times; on sm_100 it fuses two at a time.
    return {"LDG.E.128": 1, "FFMA": 16} if column == "cuda" else {"LDG.E.128": 3, "FFMA": 24}


def elements(kernel: str, path: Sequence[Instruction]) -> int:
    """Elements that a thread handles on the path: those of its wide loads, or else stores."""
    name = kernel.removesuffix("_indirect")
    dtype = name.split("_into_")[0].rsplit("_", 1)[1]
    access = "STG.E.128" if kernel.startswith("gaussian") else "LDG.E.128"
    wide = sum(instruction.opcode.startswith(access) for instruction in path)
    return wide * (4 if dtype == "float32" else 8)


def row_of(
    column: str, architecture: int, kernel: str, code: Sequence[Instruction], used: Resources
) -> dict[str, object]:
    row: dict[str, object] = {
        "column": column,
        "architecture": architecture,
        "kernel": kernel,
        "registers": used.registers,
        "stack_bytes": used.stack,
        "spills": sum(x.opcode.startswith(("LDL", "STL")) for x in code),
        "shared_bytes": used.shared,
    }
    if required := required_opcodes(column, kernel):
        path = hot_path(code, required)
        count = elements(kernel, path)
        row["per_element"] = round(len(path) / count, 2)
        kinds = Counter(instruction.kind for instruction in path)
        row |= {kind: round(number / count, 2) for kind, number in kinds.items()}
        row["fused"] = sum(x.opcode.startswith("FFMA") for x in path)
        row["roots"] = sum(x.opcode.startswith("MUFU.RSQ") for x in path)
    return row


def cuda_rows() -> Iterator[dict[str, object]]:
    """One for each architecture and kernel of the installed extension."""
    for architecture, cubin in cubins(Path(_C.__file__)):
        used = resources(cubin)
        for kernel, code in machine_code(cubin).items():
            yield row_of("cuda", architecture, kernel, code, used[kernel])


@functools.cache
def plans() -> dict[str, Plan]:
    """A launch of each kernel of Triton's column."""
    from ptx.triton_ptx import every_kernel

    return dict(sorted(every_kernel()))


def triton_row(architecture: int, kernel: str) -> dict[str, object]:
    """What Triton makes of one of `plans`."""
    from ptx.triton_ptx import compile_plan

    compiled = compile_plan(plans()[kernel], f"sm_{architecture}")
    cubin = compiled.asm["cubin"]
    ((name, code),) = machine_code(cubin).items()
    used = resources(cubin)[name]
    used = replace(used, shared=used.shared + compiled.metadata.shared)
    return row_of("triton", architecture, kernel, code, used)


def rows() -> Iterator[dict[str, object]]:
    """All, in order."""
    cuda = sorted(cuda_rows(), key=lambda row: (row["architecture"], row["kernel"]))
    yield from cuda
    architectures = sorted({row["architecture"] for row in cuda})
    # Not forked: torch has threads by now.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(triton_row, *zip(*product(architectures, plans()), strict=True))


def problems(row: dict[str, object]) -> Iterator[str]:
    """What a row has that it must not."""
    kernel = str(row["kernel"])
    column, where = str(row["column"]), f"{kernel} on sm_{row['architecture']}, {row['column']},"
    op = next((name for name in REGISTERS[column] if kernel.startswith(name)), "")
    if row["spills"] and kernel != SPILLING:
        yield f"{where} spills in {row['spills']} instructions"
    registers, limit = REGISTERS[column].get(op), LIMITS[column].get(op)
    if registers and int(str(row["registers"])) > registers:
        yield f"{where} takes {row['registers']} registers, above {registers}"
    if limit and float(str(row["per_element"])) > limit:
        yield f"{where} takes {row['per_element']} instructions an element, above {limit}"
    # A correctly rounded root ends in two fused operations; any other would be a contraction, which
    # some versions of ptxas make of packed products and sums that PTX keeps apart.
    if op in ("gaussian", "perturb", "accumulate") and row["fused"] != 2 * int(str(row["roots"])):
        yield f"{where} has {row['fused']} fused operations for {row['roots']} roots"


def main() -> None:
    if not hasattr(_C, "cuda"):
        sys.exit("this build has no CUDA kernels: install it where nvcc is on the PATH")
    table = [*rows()]
    columns = (*FIELDS, *COUNTS)
    whole = [{name: row.get(name, "") for name in columns} for row in table]
    write_rows(RESULTS / "gpu_static.csv", whole)
    found = [problem for row in table for problem in problems(row)]
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
