"""What the Triton kernels share: noise v1, the way over parts, compiling and launching.

Triton is optional: without it this module imports, and a launch says how to get it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch

from dlzo_kernels import reference
from dlzo_kernels.ops._common import to_signed
from dlzo_kernels.ops._parts import Directions, Part

try:
    import triton
    import triton.backends.nvidia.compiler
    import triton.language as tl
except ImportError:
    triton = tl = None


def available() -> bool:
    """Whether Triton is there, with its backend for CUDA."""
    return triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit, where there is Triton."""
    return triton.jit(function) if available() else function


def constant(value: Any) -> Any:
    """A global that kernels may read."""
    return tl.constexpr(value) if available() else value


class Plan(NamedTuple):
    """A launch, complete but for the GPU.

    Attributes:
        kernel: the Triton function.
        grid: number of programs.
        arguments: int, float, or nested tuples of them: one per parameter, in order.
        constants: the compile-time parameters, which come last.
        num_warps: of a program.
        exact: whether the bits of its results are promised.
    """

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    exact: bool = True


class LaunchError(RuntimeError):
    """Triton cannot compile or load a kernel here, perhaps as an earlier one failed."""


def launch(plans: Iterable[Plan], device: torch.device) -> None:
    """Enqueues kernels on torch's current stream of the device; waits for nothing.

    Raises:
        LaunchError: triton cannot compile or load one here.
        OutOfMemoryError: the GPU has no memory left for one.
        AcceleratorError: the GPU does not take one; as a LaunchError at the first launch, it may
            be that an earlier kernel failed.
    """
    with torch.cuda.device(device):
        for plan in plans:
            run = _loaded(plan, device)
            try:
                run(*plan.arguments, *plan.constants.values())
            except RuntimeError as error:
                if not str(error).startswith("Triton Error ["):  # of CUDA, or of HIP
                    raise
                kind = torch.OutOfMemoryError if _lacks_memory(error) else torch.AcceleratorError
                raise kind(str(error)) from error


def _loaded(plan: Plan, device: torch.device) -> Callable[..., None]:
    """What launches a plan's kernel, which is on the current device."""
    types, constants = tuple(map(type_of, plan.arguments)), tuple(plan.constants.items())
    try:
        kernel = _compiled(plan.kernel, types, constants, plan.num_warps, plan.exact, device)
        return kernel[plan.grid, 1, 1]  # loaded by this, the first time
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Compilers that fail and registers that do not suffice have nothing else in common.
    except Exception as error:
        if _lacks_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise LaunchError(
            f"Triton cannot compile or load a kernel here ({error}): if no earlier kernel failed, "
            "mend its installation, or uninstall triton"
        ) from error


def _lacks_memory(error: Exception) -> bool:
    """Whether that is what a driver says, for which Triton has no kind of error."""
    return "out of memory" in str(error)


@functools.cache
def _compiled(
    kernel: Any,
    types: tuple[Any, ...],
    constants: tuple[Any, ...],
    num_warps: int,
    exact: bool,
    device: torch.device,
) -> Any:
    # Not through kernel[grid](...): it would compile anew for each number that is 1, a multiple of
    # 16, or beyond 2^31.
    return compile_for(None, kernel, types, dict(constants), num_warps, exact)


def compile_for(
    target: Any,
    kernel: Any,
    types: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    exact: bool,
) -> Any:
    """Compiles a kernel for a triton GPUTarget, or for the current device where that is None.

    Raises:
        RuntimeError: triton's assembler would change bits that are promised.
    """
    names, all_types = kernel.arg_names, types + ("constexpr",) * len(constants)
    source = triton.compiler.ASTSource(kernel, dict(zip(names, all_types, strict=True)), constants)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    if exact and "f32x2" in compiled.asm.get("ptx", ""):
        _check_assembler(compiled.metadata.target.arch)
    return compiled


def _check_assembler(arch: int) -> None:
    if reason := why_not_exact(arch):
        raise RuntimeError(reason)


def why_not_exact(arch: int) -> str:
    """Why the assembler changes bits where it packs pairs of numbers; empty where it does not."""
    # Older ones fuse packed products and sums, in spite of .rn and --fmad=false.
    get_ptxas = triton.backends.nvidia.compiler.get_ptxas
    # Older versions of Triton have one for all architectures.
    tool = get_ptxas(arch) if signature(get_ptxas).parameters else get_ptxas()
    version = tool.version
    if tuple(map(int, version.split("."))) >= (13, 4):
        return ""
    return (
        f"the ptxas {version} that Triton uses for sm_{arch} changes the bits of the noise; "
        "install a Triton that brings ptxas 13.4 or newer, or use the CUDA kernels"
    )


def type_of(argument: Any) -> Any:
    if isinstance(argument, tuple):
        types = map(type_of, argument)
        return type(argument)(*types) if hasattr(argument, "_fields") else tuple(types)
    return "fp32" if isinstance(argument, float) else "i64"


# Noise v1 as kernels compute it. dlzo_kernels/reference.py is the definition; the forms here are
# equal to it bit for bit and save instructions by exact power-of-two scalings, as csrc/noise.h.
_MULTIPLIERS = constant(tuple(int(m) for m in reference.MULTIPLIERS))
_WEYL = constant(reference.WEYL)
# -2 ln m = g + g^2 P(g) with g = -2 (m - 1): the reference's polynomial, scaled power by power.
_LOG = constant(tuple(-2 * float(c) * (-0.5) ** (10 - k) for k, c in enumerate(reference.LOG)))
_MINUS_2_LN2 = constant(-2 * float(reference.LN2))
_SIN = constant(tuple(map(float, reference.SIN)))
_COS = constant(tuple(map(float, reference.COS)))


@jit
def _philox(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, seed: tl.tensor
) -> tuple[tl.tensor, ...]:
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # Words that all elements share are scalars: what they alone decide is computed once.
        p0, p1 = c0.to(tl.uint64) * _MULTIPLIERS[0], c2.to(tl.uint64) * _MULTIPLIERS[1]
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += _WEYL[0]
        k1 += _WEYL[1]
    return c0, c1, c2, c3


@jit
def _horner(coefficients: tl.constexpr, COUNT: tl.constexpr, x: tl.tensor) -> tl.tensor:
    p = x * coefficients[0] + coefficients[1]
    for k in tl.static_range(2, COUNT):
        p = p * x + coefficients[k]
    return p


@jit
def _radius(word: tl.tensor) -> tl.tensor:
    """sqrt(-2 ln u) with u = (word + 1/2) / 2^32 = m 2^e, m in [2/3, 4/3)."""
    u = word.to(tl.float32) + 0.5
    raw = u.to(tl.uint32, bitcast=True) - (0x3F2AAAAB + (32 << 23))
    log_power = (raw.to(tl.int32, bitcast=True) >> 23).to(tl.float32) * _MINUS_2_LN2
    twice_m = (raw & 0x7FFFFF) + (0x3F2AAAAB + (1 << 23))
    g = 2.0 - twice_m.to(tl.float32, bitcast=True)
    return tl.sqrt_rn(log_power + (_horner(_LOG, 9, g) * (g * g) + g))


@jit
def _flip_sign(x: tl.tensor, sign: tl.tensor) -> tl.tensor:
    return (x.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)


@jit
def _cos_sin(word: tl.tensor) -> tuple[tl.tensor, ...]:
    """Of 2 pi word / 2^32: the low 30 bits are the angle inside a quadrant."""
    z = (word << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-31
    odd, even = _horner(_SIN, 4, z * z) * z, _horner(_COS, 5, z * z)
    quadrant = word + 0x20000000  # bit 31: sign of the sine, bit 30: swap
    swap = (quadrant & 0x40000000) != 0
    cos = _flip_sign(tl.where(swap, odd, even), word + 0x60000000)
    return cos, _flip_sign(tl.where(swap, even, odd), quadrant)


@jit
def _box_muller(word0: tl.tensor, word1: tl.tensor) -> tuple[tl.tensor, ...]:
    r = _radius(word0)
    cos, sin = _cos_sin(word1)
    return r * cos, r * sin


@jit
def _block(low: tl.tensor, high: tl.tensor, direction: Direction) -> tuple[tl.tensor, ...]:
    w0, w1, w2, w3 = _philox(low, high, direction.stream, direction.query, direction.seed)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


class Direction(NamedTuple):
    """Inside a kernel: one direction's uint64 seed, uint32 query and stream, float32 scale."""

    seed: Any
    query: Any
    stream: Any
    scale: Any


@jit
def direction_of(
    directions: Directions, k: tl.tensor, stream: tl.tensor, IN_MEMORY: tl.constexpr
) -> Direction:
    """The k-th of some Directions."""
    seed, query, scale = directions.seed, directions.query, directions.scale
    if IN_MEMORY:
        if directions.seeds != 0:
            seed = tl.load(directions.seeds.to(tl.pointer_type(tl.int64)) + k)
        if directions.queries != 0:
            query = tl.load(directions.queries.to(tl.pointer_type(tl.uint32)) + k).to(tl.int64)
        if directions.scales != 0:
            scale = tl.load(directions.scales.to(tl.pointer_type(tl.float32)) + k)
    return Direction(seed.to(tl.uint64), query.to(tl.uint32), stream.to(tl.uint32), scale)


class Place(NamedTuple):
    """Inside a kernel: the elements of a tile.

    Attributes:
        low, high: halves of their block numbers, of every one (VECTOR = 4) or every second (8).
        out, base: how far each element lies from the part's first in memory.
        inside: whether the part has it.
    """

    low: Any
    high: Any
    out: Any
    base: Any
    inside: Any


@jit
def normals(
    place: Place, direction: Direction, TILE: tl.constexpr, VECTOR: tl.constexpr
) -> tl.tensor:
    """z of a tile's elements, float32; VECTOR of them lie together in a thread."""
    z0, z1, z2, z3 = _block(place.low, place.high, direction)
    if VECTOR == 8:
        y0, y1, y2, y3 = _block(place.low + 1, place.high, direction)
        z0, z1, z2, z3 = tl.join(z0, y0), tl.join(z1, y1), tl.join(z2, y2), tl.join(z3, y3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (TILE,))


MAX_PARTS = 16  # of a launch: each costs a program a few selects
WHOLE = constant(2048)  # elements of a tile of an aligned part: 16 per thread
ODD = constant(512)  # and of any other: one block of noise per thread, for want of registers
_LONGEST = 8  # whole tiles of a program, one after the other, at most
_PROGRAMS = 4096  # that keep a GPU evenly busy


class Parts(NamedTuple):
    """What a launch works on: for each attribute a tuple of numbers, one per part.

    An aligned part is a run of whole tiles, contiguous in memory from a 16-byte boundary on and in
    the noise from the beginning of a block on. All others have tiles of ODD elements in one or more
    rows. Attributes that a Part has are its own.

    Attributes:
        program: the part's first program.
        tiles: number of tiles, counted along the rows.
        tiles_per_row: how many of them lie side by side; 0 in an aligned part.
        log_width: how many blocks of noise wide a tile is, as a power of two.
    """

    program: tuple[int, ...]
    tiles: tuple[int, ...]
    tiles_per_row: tuple[int, ...]
    log_width: tuple[int, ...]
    out: tuple[int, ...]
    base: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    out_row: tuple[int, ...]
    out_column: tuple[int, ...]
    base_row: tuple[int, ...]
    base_column: tuple[int, ...]
    offset: tuple[int, ...]
    row_stride: tuple[int, ...]
    stream: tuple[int, ...]


def plans(
    kernel: Any,
    parts: Sequence[Part],
    directions: Directions,
    *arguments: int,
    out: torch.dtype,
    base: torch.dtype,
    **constants: bool,
) -> Iterator[Plan]:
    """The launches that run a kernel over all elements of some parts.

    The kernel's parameters are a Parts, how many whole tiles a program makes, Directions,
    `arguments`, the types OUT and BASE, VECTOR, IN_MEMORY, and `constants`.
    """
    # A thread reads or writes 16 bytes at a time.
    vector = 16 // min(out.itemsize, base.itemsize)
    in_memory = any((directions.seeds, directions.queries, directions.scales))
    fixed = {"OUT": dtype_of(out), "BASE": dtype_of(base), "VECTOR": vector, "IN_MEMORY": in_memory}
    scale = float(directions.scale)
    directions = directions._replace(seed=to_signed(directions.seed), scale=scale)
    pieces = [piece for part in parts for piece in _pieces(part, out.itemsize, base.itemsize)]
    for first in range(0, len(pieces), MAX_PARTS):
        packed, programs, length = _packed(pieces[first : first + MAX_PARTS])
        everything = (packed, length, directions, *arguments)
        yield Plan(kernel, programs, everything, {**fixed, **constants})


def dtype_of(dtype: torch.dtype) -> Any:
    """The same type in Triton's language."""
    return getattr(tl, str(dtype).removeprefix("torch."))


class _Piece(NamedTuple):
    """A part or a piece of one; see Parts."""

    part: Part
    tiles: int
    tiles_per_row: int
    log_width: int


def _packed(pieces: Sequence[_Piece]) -> tuple[Parts, int, int]:
    """Their Parts, the number of programs, and how many whole tiles a program makes."""
    per_whole = [1 if piece.tiles_per_row == 0 else WHOLE.value // ODD.value for piece in pieces]
    whole = sum(-(-p.tiles // n) for p, n in zip(pieces, per_whole, strict=True))
    length = min(max(whole // _PROGRAMS, 1), _LONGEST)
    rows, programs = [], 0
    for (part, tiles, *tiling), n in zip(pieces, per_whole, strict=True):
        numbers = part._replace(offset=to_signed(part.offset))
        rows.append((programs, tiles, *tiling, *numbers))
        programs += -(-tiles // (n * length))
    # Each tuple length is a variant to compile: powers of two. What fills up is never selected.
    unused = (1 << 62, *rows[0][1:])
    rows += [unused] * ((1 << log2(len(rows))) - len(rows))
    return Parts(*zip(*rows, strict=True)), programs, length


def _pieces(part: Part, out_size: int, base_size: int) -> Iterator[_Piece]:
    """The whole tiles at the front of an aligned part, and the rest."""
    whole = part.columns // WHOLE.value * WHOLE.value
    if _is_aligned(part) and whole:
        yield _Piece(part._replace(columns=whole), whole // WHOLE.value, 0, 0)
        if whole == part.columns:
            return
        part = part._replace(
            out=part.out + whole * out_size,
            base=part.base + whole * base_size,
            columns=part.columns - whole,
            offset=part.offset + whole,
        )
    phase = part.offset % 4 if part.row_stride % 4 == 0 or part.rows == 1 else 3  # at most
    blocks = (phase + part.columns + 3) // 4
    # Narrow where there are enough rows, so that little sticks out of them.
    tile = ODD.value // 4
    log_width = min(log2(blocks), max(5, log2(tile) - log2(part.rows)))
    tiles_per_row = -(-blocks >> log_width)
    tiles = tiles_per_row * -(-part.rows // (tile >> log_width))
    yield _Piece(part, tiles, tiles_per_row, log_width)


def _is_aligned(part: Part) -> bool:
    last = part.offset + part.columns - 1
    return (
        part.rows == 1
        and part.out_column == part.base_column == 1
        and part.out % 16 == part.base % 16 == part.offset % 4 == 0
        and part.offset >> 34 == last >> 34  # the high half of the block number stays the same
    )


def log2(x: int) -> int:
    """Rounded up."""
    return (x - 1).bit_length()


@jit
def _select(values: tl.tuple, which: tl.tensor) -> tl.tensor:
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(which >= i, values[i], value)
    return value


@jit
def part_of_program(parts: Parts) -> Parts:
    """This program's part: a Parts of scalars."""
    which = 0
    for i in tl.static_range(1, len(parts.program)):
        which += (tl.program_id(0) >= parts.program[i]).to(tl.int32)
    return Parts(*[_select(values, which) for values in parts])


@jit
def tiles_of_program(part: Parts, length: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """This program's range of tiles of its part."""
    if part.tiles_per_row != 0:
        length *= WHOLE // ODD
    first = (tl.program_id(0) - part.program) * length
    return first, tl.minimum(first + length, part.tiles)


@jit
def whole_place(part: Parts, tile: tl.tensor, VECTOR: tl.constexpr) -> Place:
    """The Place of a tile of an aligned part."""
    start = tile * WHOLE
    block = (part.offset + start).to(tl.uint64) >> 2
    low = block.to(tl.uint32) + tl.arange(0, WHOLE // VECTOR).to(tl.uint32) * (VECTOR // 4)
    column = start + tl.arange(0, WHOLE)
    inside = tl.full((WHOLE,), True, tl.int1)
    return Place(low, (block >> 32).to(tl.uint32), column, column, inside)


@jit
def odd_place(part: Parts, tile: tl.tensor) -> Place:
    """The Place of a tile of any other part; VECTOR is 4."""
    log_width = part.log_width.to(tl.int32)
    tile, tiles_per_row = tl.cast(tile, tl.int32), part.tiles_per_row.to(tl.int32)
    first_row = (tile // tiles_per_row).to(tl.int64) * (ODD // 4 >> log_width)
    first_block = (tile % tiles_per_row).to(tl.int64) << log_width

    i = tl.arange(0, ODD // 4)
    row = first_row + (i >> log_width)
    block = (part.offset + row * part.row_stride).to(tl.uint64) >> 2
    block += (first_block + (i & ((1 << log_width) - 1))).to(tl.uint64)

    i = tl.arange(0, ODD)
    row = first_row + (i >> (log_width + 2))
    skipped = (part.offset + row * part.row_stride) & 3  # of the row's first block
    column = first_block * 4 + (i & ((4 << log_width) - 1)) - skipped
    out = row * part.out_row + column * part.out_column
    base = row * part.base_row + column * part.base_column
    inside = (row < part.rows) & (column >= 0) & (column < part.columns)
    return Place(block.to(tl.uint32), (block >> 32).to(tl.uint32), out, base, inside)


@jit
def aligned(address: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """An address as a pointer that is known to be a multiple of 16 bytes."""
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
