"""What the compiled GPU kernels cost by their machine code: no GPU is needed.

    python benchmarks/gpu_static.py

Reads the code of the CUDA column out of the installed extension, one row for each architecture and
kernel: registers of a thread, spilled bytes, shared memory, and the instructions that the shortest
way through the inner loop issues for an element, by class. Lands in results/gpu_static.csv; exits
with an error where a limit is exceeded. Needs nvdisasm and cuobjdump (in Triton's wheel).
"""

from __future__ import annotations

import csv
import heapq
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlzo_kernels import _C

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # where the tools for PTX and machine code lie
from ptx.compile import resources, tool  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_static.csv"
CLASSES = {
    "memory": r"LD|ST|ATOM|RED",
    "float": r"F(ADD|MUL|FMA|SETP|SEL|MNMX|CHK)|D(ADD|MUL|FMA)",
    "multiply": r"IMAD|UIMAD",
    "convert": r"I2F|F2|HADD2|I2I",
    "special": r"MUFU",
    "control": r"BRA|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC|NOP|BAR|YIELD",
}  # whatever else: integer and logic
FIELDS = ("architecture", "kernel", "registers", "spilled_bytes", "shared_bytes", "per_element")
# Instructions for an element that the build must not exceed, on any architecture.
LIMITS = {"gaussian": 47.0, "perturb": 51.0, "accumulate": 64.0, "sum_runs": 16.0}
REGISTERS = {"gaussian": 48, "perturb": 48, "accumulate": 64, "sum_runs": 96, "sum_columns": 64}


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
    """The instructions of each kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("nvdisasm")), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]
    return {re.match(r"[\w$]+", section)[0]: _instructions(section) for section in sections}


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


def required_opcodes(kernel: str) -> dict[str, int]:
    """What marks a kernel's main path: whole groups, and the work on each of their elements."""
    if kernel.startswith("gaussian"):
        return {"STG.E.128": 1, "MUFU.RSQ": 4}
    if kernel.startswith(("perturb", "accumulate")):
        return {"LDG.E.128": 1, "STG.E.128": 1, "MUFU.RSQ": 4}
    return {"LDG.E.128": 1, "FFMA": 16} if kernel.startswith("sum_runs") else {}


def elements(kernel: str, path: Sequence[Instruction]) -> int:
    """Elements that a thread handles on the path: those of its wide loads, or else stores."""
    name = kernel.removesuffix("_indirect")
    dtype = name.split("_into_")[0].rsplit("_", 1)[1]
    access = "STG.E.128" if kernel.startswith("gaussian") else "LDG.E.128"
    wide = sum(instruction.opcode.startswith(access) for instruction in path)
    return wide * (4 if dtype == "float32" else 8)


def rows() -> Iterator[dict[str, object]]:
    """One for each architecture and kernel of the installed extension."""
    for architecture, cubin in cubins(Path(_C.__file__)):
        used = resources(cubin)
        for kernel, code in sorted(machine_code(cubin).items()):
            row: dict[str, object] = {
                "architecture": architecture,
                "kernel": kernel,
                "registers": used[kernel].registers,
                "spilled_bytes": used[kernel].spills,
                "shared_bytes": used[kernel].shared,
            }
            if required := required_opcodes(kernel):
                path = hot_path(code, required)
                count = elements(kernel, path)
                row["per_element"] = round(len(path) / count, 2)
                kinds = Counter(instruction.kind for instruction in path)
                row |= {kind: round(number / count, 2) for kind, number in kinds.items()}
                row["fused"] = sum(x.opcode.startswith("FFMA") for x in path)
                row["roots"] = sum(x.opcode.startswith("MUFU.RSQ") for x in path)
            yield row


def problems(row: dict[str, object]) -> Iterator[str]:
    """What a row has that it must not."""
    kernel = str(row["kernel"])
    where = f"{kernel} on sm_{row['architecture']}"
    op = next((name for name in REGISTERS if kernel.startswith(name)), "")
    if row["spilled_bytes"]:
        yield f"{where} spills {row['spilled_bytes']} bytes"
    if op and int(str(row["registers"])) > REGISTERS[op]:
        yield f"{where} takes {row['registers']} registers, above {REGISTERS[op]}"
    if op in LIMITS and float(str(row["per_element"])) > LIMITS[op]:
        yield f"{where} takes {row['per_element']} instructions an element, above {LIMITS[op]}"
    # A correctly rounded root ends in two fused operations; any other would be a contraction, which
    # some versions of ptxas make of packed products and sums that PTX keeps apart.
    if op in ("gaussian", "perturb", "accumulate") and row["fused"] != 2 * int(str(row["roots"])):
        yield f"{where} has {row['fused']} fused operations for {row['roots']} roots"


def main() -> None:
    if not hasattr(_C, "cuda"):
        sys.exit("this build has no CUDA kernels: install it where nvcc is on the PATH")
    table = sorted(rows(), key=lambda row: (row["architecture"], row["kernel"]))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*FIELDS, *CLASSES, "integer", "fused", "roots"])
        writer.writeheader()
        writer.writerows(table)
    found = [problem for row in table for problem in problems(row)]
    print(*found, sep="\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
