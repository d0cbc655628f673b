"""Runs a kernel: all threads of some CTAs at once, one numpy lane each.

    kernel = parse(ptx_text, "entry")
    memory = Memory()
    address = memory.add(array, "weights")
    launch(kernel, memory, [address, array.size], grid=3, block=256)

Threads that stand at the lowest instruction run together until they part, so they meet again where
a branch ends. Checked all along: bounds and alignment of every access, reads of what nobody wrote,
races, divergent barriers, exchanges with lanes that do not take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ptx.errors import BadLaunch, Deadlock, InactiveLane, OutOfBounds, PtxError
from ptx.instructions import Instruction, Kind, Mask, pack_lanes
from ptx.memory import SPACES, Actors, Buffer, Memory, split_address
from ptx.operands import Address
from ptx.parser import Kernel, Parameter

Array = np.ndarray
Size = int | tuple[int, ...]

# Lanes of one numpy operation: enough to hide the interpreter, few enough for the cache.
LANES = 16384
# Instructions that one set of CTAs may run before it counts as an endless loop.
MAX_STEPS = 300_000


def launch(
    kernel: Kernel,
    memory: Memory,
    arguments: Sequence[int | float | bytes],
    *,
    grid: Size,
    block: Size,
    dynamic_shared: int = 0,
    ctas: range | None = None,
) -> int:
    """Run a kernel over a grid; the arrays in `memory` change in place.

    Args:
        kernel: from ptx.parser.parse.
        memory: the global buffers.
        arguments: one per parameter: a number, or the bytes of a structure.
        grid: CTAs, or up to three dimensions of them.
        block: threads of a CTA, likewise.
        dynamic_shared: bytes of shared memory beyond the kernel's own.
        ctas: those of the grid to run, where not all.

    Returns:
        How many instructions were carried out, each once for the threads that took it together:
        what tells a long way to the right result from a short one.

    Raises:
        PtxError: what the kernel did wrong, and in which statement.
    """
    machine = Machine(kernel, memory, arguments, _three(grid), _three(block), dynamic_shared)
    with np.errstate(all="ignore"):
        return machine.run(ctas or range(int(np.prod(machine.grid))))


def _three(size: Size) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes + (1,) * (3 - len(sizes))


class Machine:
    """One launch. Instructions reach registers and memory through it.

    Attributes:
        registers: arrays of one value per thread, or of a single value for all.
        alive: threads that exist and have not returned.
        index, lane: each thread's place among all and in its warp.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        arguments: Sequence[int | float | bytes],
        grid: tuple[int, ...],
        block: tuple[int, ...],
        dynamic_shared: int,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.threads = int(np.prod(block))
        _check_threads(kernel, self.threads)
        self.padded = -(-self.threads // 32) * 32
        self.shared_size = kernel.shared_size + dynamic_shared
        self.clock = 1
        granules = kernel.operands.granules
        self.granules = {
            space: min(granules.get(space, 64), granules.get("generic", 64))
            for space in (*SPACES, "global")
        }
        parameters = np.frombuffer(_pack_arguments(kernel, arguments), np.uint8)
        constants = np.frombuffer(kernel.constants, np.uint8)
        self.buffers = {
            SPACES["param"]: Buffer("the parameters", parameters, parameters.size, None),
            SPACES["const"]: Buffer("constant memory", constants, constants.size, None),
        }
        for window, (name, array) in memory.arrays.items():
            self.buffers[window] = Buffer(name, array, array.size, self.granules["global"])
        for window, (name, content) in kernel.variables.items():
            self.buffers[window] = Buffer(
                name, np.frombuffer(content, np.uint8), len(content), None
            )

    def run(self, ctas: range) -> int:
        """Runs CTAs; returns how many instructions the sets of them took."""
        together, total = max(1, LANES // self.padded), 0
        for first in range(0, len(ctas), together):
            self._start(np.array(ctas[first : first + together]))
            self._run_together()
            total += self.steps
        return total

    # What instructions use.

    def write(self, slot: int, value: Array, mask: Mask) -> None:
        """Set a register of the threads of the mask."""
        if mask is not None:
            value = np.where(mask, value, self.registers[slot].view(value.dtype))
        self.registers[slot] = value

    def load(self, space: str, address: Address, dtype: np.dtype, count: int, mask: Mask) -> Array:
        """Values of shape (threads, count), or (1, count) where all threads load the same."""
        base = self.registers[address.slot]
        if space in ("param", "const") and base.size == 1:
            offset = base.astype(np.int64) + address.offset
            return self.buffers[SPACES[space]].load(offset, offset, dtype, count, None)
        lanes = self._lanes(mask)
        values = np.zeros((self.index.size, count), dtype)
        for buffer, offset, chosen, actors in self._resolve(space, address, lanes):
            values[chosen] = buffer.load(offset, self._row(buffer, chosen), dtype, count, actors)
        return values

    def store(self, space: str, address: Address, values: list[Array], mask: Mask) -> None:
        """Store one array per element of the vector."""
        lanes = self._lanes(mask)
        for buffer, offset, chosen, actors in self._resolve(space, address, lanes):
            columns = [v[chosen] if v.size > 1 else np.repeat(v, chosen.size) for v in values]
            buffer.store(offset, self._row(buffer, chosen), np.stack(columns, 1), actors)

    def change(
        self, space: str, address: Address, update: Callable, values: list[Array], mask: Mask
    ) -> Array:
        """Atomic read, update and write, thread by thread; the values found there."""
        lanes = self._lanes(mask)
        values = [np.broadcast_to(v, self.index.shape) for v in values]
        old = np.zeros(self.index.size, values[0].dtype)
        for buffer, offset, chosen, actors in self._resolve(space, address, lanes):
            cells, where = buffer.cells(offset, self._row(buffer, chosen), old.dtype, actors)
            for thread, cell in zip(chosen, where, strict=True):
                old[thread] = cells[cell]
                cells[cell] = update(cells[cell], *(v[thread] for v in values))
        return old

    def order_warps(self, mask: Mask) -> None:
        """What these threads did lies before what they will do, for the threads of their warps."""
        self.clock += 1
        self.warp_synced[self._lanes(mask)] = self.clock

    def place(self, thread: int) -> str:
        """CTA and thread, for messages."""
        cta, inside = divmod(int(self.thread[thread]), self.padded)
        return f"CTA {cta} thread {inside}"

    # Set-up.

    def _start(self, ctas: Array) -> None:
        """Threads of these CTAs at the kernel's first instruction."""
        inside = np.tile(np.arange(self.padded), ctas.size)
        row = np.repeat(np.arange(ctas.size), self.padded)
        self.index = np.arange(inside.size)
        self.lane = inside % 32
        self.row = row
        self.thread = ctas[row] * self.padded + inside
        self.alive = inside < self.threads
        self.waiting = np.zeros(inside.size, bool)
        self.pc = np.zeros(inside.size, np.int64)
        self.warp_synced = np.zeros(inside.size, np.int64)
        self.cta_synced = np.zeros(inside.size, np.int64)
        self._everyone = np.flatnonzero(self.alive)
        self.buffers[SPACES["shared"]] = self._private("shared memory", self.shared_size, ctas.size)
        self.buffers[SPACES["local"]] = self._private(
            "local memory", self.kernel.local_size, inside.size
        )
        self.registers = self._first_registers(inside, ctas[row])

    def _private(self, name: str, size: int, rows: int) -> Buffer:
        """Memory of which each CTA or thread has a row."""
        stride = -(-size // 64) * 64
        granule = self.granules["shared" if rows < self.index.size else "local"]
        return Buffer(name, np.zeros(rows * stride, np.uint8), size, granule, stride, fresh=True)

    def _first_registers(self, inside: Array, cta: Array) -> list[Array]:
        operands = self.kernel.operands
        registers = [np.full(w.itemsize, 0xA5, np.uint8).view(w) for w in operands.widths]
        for slot, value in operands.constants.items():
            registers[slot] = value
        specials = {"%laneid": self.lane, "%warpid": inside // 32}
        for name, number, extent in (("tid", inside, self.block), ("ctaid", cta, self.grid)):
            for axis, size in zip("xyz", extent, strict=True):
                specials[f"%{name}.{axis}"] = number % size
                specials[f"%n{name}.{axis}"] = np.array([size])
                number = number // size
        for name, slot in operands.specials.items():
            registers[slot] = specials[name].astype(np.uint32)
        return registers

    # Scheduling.

    def _run_together(self) -> None:
        self.steps = 0
        while self.alive.any():
            active = self.alive & ~self.waiting
            if active.any():
                at = int(self.pc[active].min())
                self._advance(at, active & (self.pc == at))
            else:
                self._release()

    def _advance(self, at: int, active: Array) -> None:
        """Run threads that stand at one instruction until they part, wait, end or may meet more."""
        everyone = np.array_equal(active, self.alive)
        mask = None if everyone else active
        first = at
        while True:
            if not everyone and at != first and at in self.kernel.labels:
                break
            if at == len(self.kernel.instructions):
                raise PtxError(f"{self.kernel.name}: control falls off the end")
            instruction = self.kernel.instructions[at]
            self._count_step(instruction)
            chosen = self._guarded(instruction, mask)
            if instruction.kind is Kind.PLAIN:
                if chosen is None or chosen.any():
                    self._execute(instruction, chosen)
                at += 1
            elif instruction.kind is Kind.BRANCH:
                if chosen is None or np.array_equal(chosen, active):
                    at = instruction.target
                elif not chosen.any():
                    at += 1
                else:
                    self.pc[active] = np.where(chosen[active], instruction.target, at + 1)
                    return
            elif instruction.kind is Kind.EXIT:
                gone = active if chosen is None else chosen
                self.alive &= ~gone
                self._everyone = np.flatnonzero(self.alive)
                at += 1
                break
            elif everyone and chosen is None and self._needs_nobody_else(instruction):
                self._execute_together(instruction, None)
                at += 1
            else:
                here = active if chosen is None else chosen
                self.waiting |= here
                self.pc[active] = at + 1
                self.pc[here] = at
                return
        self.pc[active] = at

    def _count_step(self, instruction: Instruction) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Deadlock(f"{instruction.statement}: still running after {MAX_STEPS} steps")

    def _guarded(self, instruction: Instruction, mask: Mask) -> Mask:
        """The threads of the mask whose guard holds."""
        if instruction.guard is None:
            return mask
        guard = self.registers[instruction.guard]
        guard = ~guard if instruction.guard_negated else guard
        if guard.size == 1:
            return mask if guard[0] else np.zeros(self.index.size, bool)
        return guard & (self.alive if mask is None else mask)

    def _execute(self, instruction: Instruction, mask: Mask) -> None:
        try:
            instruction.execute(self, mask)
        except PtxError as error:
            raise type(error)(f"{instruction.statement}: {error}") from None

    def _execute_together(self, instruction: Instruction, mask: Mask) -> None:
        """A barrier or a warp instruction whose threads have all come."""
        if instruction.kind is Kind.BARRIER:
            self.clock += 1
            lanes = self._lanes(mask)
            self.warp_synced[lanes] = self.cta_synced[lanes] = self.clock
        else:
            self._execute(instruction, mask)

    def _needs_nobody_else(self, instruction: Instruction) -> bool:
        """Whether all threads that it waits for have come when everyone alive has."""
        if instruction.kind is Kind.BARRIER:
            return self._everyone.size == self.index.size // self.padded * self.threads
        return bool(self._arrived(instruction, self.alive).all())

    def _arrived(self, instruction: Instruction, here: Array) -> Array:
        """Of the threads here, which find all lanes that their mask names here or gone."""
        if instruction.members is None:
            return np.ones(int(here.sum()), bool)
        named = np.broadcast_to(
            self.registers[instruction.members].view(np.uint32), self.index.shape
        )[here]
        if not (named >> self.lane[here].astype(np.uint32) & np.uint32(1)).all():
            raise InactiveLane(
                f"{instruction.statement}: a lane runs it that its mask does not name"
            )
        missing = pack_lanes(self.alive) & ~pack_lanes(here)
        return named & np.repeat(missing, 32)[here] == 0

    def _release(self) -> None:
        """Let go of the threads that wait for nobody; everyone alive waits."""
        released = False
        for at in np.unique(self.pc[self.alive]):
            instruction = self.kernel.instructions[at]
            here = self.alive & (self.pc == at)
            ready = here.copy()
            if instruction.kind is Kind.BARRIER:
                come = np.bincount(self.row[here], minlength=int(self.row[-1]) + 1)
                ready &= (come == self.threads)[self.row]
            else:
                ready[here] = self._arrived(instruction, here)
            if ready.any():
                self._execute_together(instruction, ready)
                self.waiting &= ~ready
                self.pc[ready] = at + 1
                released = True
        if not released:
            self._explain_deadlock()

    def _explain_deadlock(self) -> None:
        thread = int(np.argmax(self.alive))
        statement = self.kernel.instructions[self.pc[thread]].statement
        cta = self.row == self.row[thread]
        elsewhere = cta & self.alive & (self.pc != self.pc[thread])
        if elsewhere.any():
            other = int(np.argmax(elsewhere))
            what = f"{self.place(other)} waits at line "
            what += str(self.kernel.instructions[self.pc[other]].statement.line)
        else:
            what = "other threads of its CTA have returned"
        raise Deadlock(f"{statement}: {self.place(thread)} waits here and {what}")

    # Memory.

    def _lanes(self, mask: Mask) -> Array:
        return self._everyone if mask is None else np.flatnonzero(mask)

    def _row(self, buffer: Buffer, lanes: Array) -> Array:
        """Row of a buffer for each thread: its CTA's, or its own."""
        return self.index[lanes] if buffer is self.buffers[SPACES["local"]] else self.row[lanes]

    def _resolve(
        self, space: str, address: Address, lanes: Array
    ) -> Iterator[tuple[Buffer, Array, Array, Actors]]:
        """For each buffer that these threads address: offsets in it, and the threads."""
        self.clock += 1
        actors = Actors(self.clock, self.thread, self.padded, self.warp_synced, self.cta_synced)
        base = self.registers[address.slot]
        base = base[lanes] if base.size > 1 else np.repeat(base, lanes.size)
        if space in SPACES:
            offset = base.astype(np.int64) + address.offset
            yield self.buffers[SPACES[space]], offset, lanes, actors.at(lanes)
            return
        windows, offset = split_address(
            base.view(np.uint64) + np.uint64(address.offset % (1 << 64))
        )
        for window in np.unique(windows):
            known = window in self.buffers and (space == "generic" or window not in SPACES.values())
            if not known:
                lane = int(np.argmax(windows == window))
                raise OutOfBounds(
                    f"{self.place(lanes[lane])} uses address"
                    f" {int(base[lane]) + address.offset:#x}, which is in no buffer"
                )
            own = windows == window
            chosen = lanes[own]
            yield self.buffers[int(window)], offset[own], chosen, actors.at(chosen)


def _check_threads(kernel: Kernel, threads: int) -> None:
    limit, count = kernel.threads or ("maxntid", 1024)
    if threads > count or (limit == "reqntid" and threads != count):
        raise BadLaunch(
            f"{kernel.name} is compiled for .{limit} {count}, not for {threads} threads"
        )


def _pack_arguments(kernel: Kernel, arguments: Sequence[int | float | bytes]) -> bytes:
    """The parameter space."""
    if len(arguments) != len(kernel.parameters):
        raise BadLaunch(
            f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}"
        )
    packed = bytearray()
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        packed = packed.ljust(parameter.offset, b"\0") + _argument_bytes(parameter, argument)
    return bytes(packed)


def _argument_bytes(parameter: Parameter, argument: int | float | bytes) -> bytes:
    if isinstance(argument, bytes):
        if len(argument) != parameter.size:
            raise BadLaunch(f"{parameter.name} has {parameter.size} bytes, not {len(argument)}")
        return argument
    if parameter.is_structure:
        raise BadLaunch(f"{parameter.name} is a structure of {parameter.size} bytes, not a number")
    if parameter.dtype.kind == "f":
        return np.array(argument, parameter.dtype).tobytes()
    if not isinstance(argument, int | np.integer):
        raise BadLaunch(f"{parameter.name} is an integer, not {argument!r}")
    return (int(argument) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
