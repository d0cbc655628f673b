"""PTX source to a kernel: declarations laid out, every statement decoded once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ptx.datatypes import datatype, unsigned
from ptx.errors import Unsupported
from ptx.instructions import Instruction, decode
from ptx.memory import VARIABLES, generic_address
from ptx.operands import Operands, parse_constant, split_list
from ptx.statement import Statement

_FUNCTION = re.compile(
    r"\.(entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{", re.S
)
_VARIABLE = re.compile(
    r"\.(shared|const|global|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s.*?([\w$]+)(?:\[(\d+)\])?$", re.S
)
_THREADS = re.compile(r"\.(maxntid|reqntid)\s+([\d,\s]+)")
_IGNORED = (".loc", ".pragma", ".file")


@dataclass(frozen=True)
class Parameter:
    """An argument of a kernel: a number of a type, or a structure of `size` bytes."""

    name: str
    dtype: np.dtype
    size: int
    offset: int
    is_structure: bool


@dataclass(frozen=True)
class Kernel:
    """An entry, ready to run.

    Attributes:
        operands: the register file: widths, constants, special registers, smallest accesses.
        labels: instructions that something branches to.
        shared_size, local_size: bytes of static shared memory per CTA and of local per thread.
        constants: the `.const` bank.
        variables: module `.global` variables: name and initial bytes, by window.
        threads: most threads of a block, and whether it must be just so many.
    """

    name: str
    parameters: tuple[Parameter, ...]
    instructions: tuple[Instruction, ...]
    labels: frozenset[int]
    operands: Operands
    shared_size: int
    local_size: int
    constants: bytes
    variables: dict[int, tuple[str, bytes]]
    threads: tuple[str, int] | None


def parse(source: str, entry: str | None = None) -> Kernel:
    """Read one entry of a PTX module.

    Args:
        source: PTX text.
        entry: its name; None where the module has only one.

    Raises:
        Unsupported: no such entry, or a statement outside the subset of ptx.instructions.
    """
    module, function = _find(source, entry)
    return _kernel(function, module)


def entry_body(source: str, entry: str | None = None) -> str:
    """The statements of one entry as text, without comments."""
    return _find(source, entry)[1].body


def entry_lines(source: str, entry: str | None = None) -> range:
    """The numbers of the lines that hold its statements, from 1."""
    function = _find(source, entry)[1]
    return range(function.line, function.line + function.body.count("\n") + 1)


def _find(source: str, entry: str | None) -> tuple[str, _Function]:
    """The module around its functions, and the entry."""
    module, functions = _functions(_without_comments(source))
    entries = {f.name: f for f in functions if f.kind == "entry"}
    if entry is None and len(entries) != 1:
        raise Unsupported(f"the module has {len(entries)} entries ({', '.join(entries)}); name one")
    if entry is not None and entry not in entries:
        raise Unsupported(f"no entry {entry}; the module has {', '.join(entries)}")
    return module, entries[entry] if entry is not None else next(iter(entries.values()))


@dataclass(frozen=True)
class _Function:
    kind: str
    name: str
    parameters: str
    directives: str
    body: str
    line: int


class _Layout:
    """Offsets of variables in the spaces they are declared in."""

    def __init__(self) -> None:
        self.symbols: dict[str, int] = {}
        self.sizes = {"shared": 0, "local": 0, "const": 0, "param": 0}
        self.constants = bytearray()
        self.variables: dict[int, tuple[str, bytes]] = {}
        self._dynamic: list[str] = []

    def add(self, declaration: re.Match[str]) -> None:
        space, alignment, type_name, name, count, initial = declaration.groups()
        dtype = datatype(type_name)
        if count == "":
            self._dynamic.append(name)
            return
        size = dtype.itemsize * int(count or 1)
        data = _initial_bytes(initial, dtype).ljust(size, b"\0")
        if space == "global":
            window = VARIABLES + len(self.variables)
            self.symbols[name] = generic_address(window)
            self.variables[window] = name, data
            return
        self.symbols[name] = self.reserve(space, size, int(alignment or dtype.itemsize))
        if space == "const":
            self.constants = self.constants.ljust(self.symbols[name], b"\0") + data

    def reserve(self, space: str, size: int, alignment: int) -> int:
        """Offset of a new variable of a space."""
        offset = -(-self.sizes[space] // alignment) * alignment
        self.sizes[space] = offset + size
        return offset

    def place_dynamic_shared(self) -> None:
        """`.extern .shared` arrays lie behind the static ones."""
        if self._dynamic:
            offset = self.reserve("shared", 0, 16)
            self.sizes["shared"] = offset
            self.symbols.update(dict.fromkeys(self._dynamic, offset))


def _kernel(function: _Function, module: str) -> Kernel:
    layout = _Layout()
    for declaration in _VARIABLE.finditer(module):
        layout.add(declaration)
    for declaration in _VARIABLE.finditer(function.body):
        layout.add(declaration)
    layout.place_dynamic_shared()
    parameters = tuple(_parameters(function.parameters, layout))
    operands = Operands(layout.symbols)
    instructions, labels = _instructions(function, operands)
    threads = _THREADS.search(function.directives)
    return Kernel(
        name=function.name,
        parameters=parameters,
        instructions=tuple(instructions),
        labels=frozenset(labels.values()),
        operands=operands,
        shared_size=layout.sizes["shared"],
        local_size=layout.sizes["local"],
        constants=bytes(layout.constants),
        variables=layout.variables,
        threads=threads and (threads[1], int(np.prod([int(n) for n in threads[2].split(",")]))),
    )


def _instructions(
    function: _Function, operands: Operands
) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, text in _statements(function.body, function.line):
        if text == "{":
            operands.open_scope()
        elif text == "}":
            operands.close_scope()
        elif text.endswith(":"):
            labels[text[:-1]] = len(instructions)
        elif text.startswith(".reg"):
            type_name, names = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text).groups()
            try:
                operands.declare(type_name, names)
            except Unsupported as error:
                raise Unsupported(f"line {line}: {text}: {error}") from None
        elif text.startswith("."):
            if text.startswith(".param"):
                raise Unsupported(f"line {line}: {text}: calls are not simulated; inline them")
            if not _VARIABLE.match(text + ";") and not text.startswith(_IGNORED):
                raise Unsupported(f"line {line}: {text}: this directive is not simulated")
        else:
            instructions.append(decode(Statement.read(line, text), operands))
    for instruction in instructions:
        if instruction.label is not None:
            if instruction.label not in labels:
                raise Unsupported(f"{instruction.statement}: there is no such label")
            instruction.target = labels[instruction.label]
    operands.check_all_written()
    return instructions, labels


def _statements(body: str, line: int) -> Iterator[tuple[int, str]]:
    """Line and text of each statement, label (`name:`) and scope brace."""
    current, start, depth = "", line, 0
    for character in body:
        if not current.strip():
            current, start = current.strip(), line
        if character == "\n":
            line += 1
        if character in "{}" and not current and not depth:
            yield line, character
        elif character == ";":
            yield start, " ".join(current.split())
            current = ""
        elif character == ":" and re.fullmatch(r"[\w$]+", current):
            yield start, f"{current}:"
            current = ""
        else:
            depth += (character == "{") - (character == "}")
            current += character
    if current.strip():
        raise Unsupported(f"line {start}: {current.strip()}: no semicolon ends this statement")


def _without_comments(source: str) -> str:
    """The source with comments and line directives blanked, on the same lines."""
    source = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", source, flags=re.M)
    source = re.sub(r"/\*.*?\*/", lambda c: "\n" * c[0].count("\n"), source, flags=re.S)
    return re.sub(r"//[^\n]*", "", source)


def _functions(source: str) -> tuple[str, list[_Function]]:
    """What lies outside all functions, and the functions."""
    outside, functions, position = "", [], 0
    while header := _FUNCTION.search(source, position):
        end, depth = header.end(), 1
        while depth:
            depth += (source[end] == "{") - (source[end] == "}")
            end += 1
        outside += source[position : header.start()]
        kind, name, parameters, directives = header.groups()
        line = source.count("\n", 0, header.end()) + 1
        body = source[header.end() : end - 1]
        functions.append(_Function(kind, name, parameters or "", directives, body, line))
        position = end
    return outside + source[position:], functions


def _parameters(text: str, layout: _Layout) -> Iterator[Parameter]:
    for declaration in split_list(text):
        alignment, type_name, name, count = _PARAMETER.match(declaration).groups()
        dtype = datatype(type_name)
        size = dtype.itemsize * int(count or 1)
        offset = layout.reserve("param", size, int(alignment or dtype.itemsize))
        layout.symbols[name] = offset
        yield Parameter(name, dtype, size, offset, count is not None)


def _initial_bytes(text: str | None, dtype: np.dtype) -> bytes:
    values = [v.strip() for v in (text or "").strip("{}").split(",") if v.strip()]
    return b"".join(parse_constant(v, dtype).view(unsigned(dtype)).tobytes() for v in values)
