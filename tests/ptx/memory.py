"""Memory that checks its use: bounds, alignment, first writes, and races.

A race is found by order, not by luck: every granule of memory remembers who wrote, read and
atomically changed it last and when, and an access must come after them by a barrier (or be of the
same thread). `bar.sync` orders the threads of a CTA, `bar.warp.sync` those of a warp, nothing
orders two CTAs of a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ptx.errors import Misaligned, OutOfBounds, Race, Uninitialised

Indices = npt.NDArray[np.int64]

# Buffers start in the middle of windows of 2^40 bytes: an overrun of any size that a kernel could
# make by mistake, on either side, lands in no other buffer.
WINDOW_BITS = 40
_MIDDLE = 1 << (WINDOW_BITS - 1)
# Windows of generic addresses and of the module's own variables, above those of any buffer.
SPACES = {"shared": 0x800001, "local": 0x800002, "param": 0x800003, "const": 0x800004}
VARIABLES = 0x900000


def generic_address(window: int, offset: int = 0) -> int:
    """The address of an offset in a window."""
    return (window << WINDOW_BITS) + _MIDDLE + offset


def split_address(address: npt.NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """Window and offset of generic addresses."""
    window = (address >> np.uint64(WINDOW_BITS)).astype(np.int64)
    offset = (address & np.uint64((1 << WINDOW_BITS) - 1)).astype(np.int64) - _MIDDLE
    return window, offset


class Memory:
    """Global memory: numpy arrays, used in place, at addresses far apart.

    An array that is not writeable is read-only for kernels too.
    """

    def __init__(self) -> None:
        self.arrays: dict[int, tuple[str, np.ndarray]] = {}

    def add(self, array: np.ndarray, name: str) -> int:
        """The address of a contiguous array from now on."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous; add its base and offset the address")
        window = len(self.arrays) + 1
        self.arrays[window] = name, array.reshape(-1).view(np.uint8)
        return generic_address(window)


@dataclass
class Actors:
    """Who makes an access, one entry per lane, and since when barriers order their groups."""

    time: int
    thread: Indices
    threads_per_cta: int
    warp_synced: Indices
    cta_synced: Indices

    def at(self, lanes: Indices) -> Actors:
        return Actors(
            self.time,
            self.thread[lanes],
            self.threads_per_cta,
            self.warp_synced[lanes],
            self.cta_synced[lanes],
        )

    def place(self, lane: int) -> str:
        cta, thread = divmod(int(self.thread[lane]), self.threads_per_cta)
        return f"CTA {cta} thread {thread}"


# A stamp is time << 32 | thread << 2 | level: the last access of a granule, by one thread (level
# 0) or by several unordered threads of one warp (1), CTA (2) or of the grid (3).
_THREAD_MASK = (1 << 30) - 1


def _stamp(actors: Actors) -> Indices:
    return (actors.time << 32) | (actors.thread << 2)


def _level(stamp: Indices, actors: Actors) -> Indices:
    """The smallest group that holds both the authors of the stamps and the actors."""
    author = (stamp >> 2) & _THREAD_MASK
    thread = actors.thread[:, None]
    same_cta = author // actors.threads_per_cta == thread // actors.threads_per_cta
    apart = np.where(author >> 5 == thread >> 5, 1, np.where(same_cta, 2, 3))
    return np.maximum(stamp & 3, np.where(author == thread, 0, apart))


def _unordered(stamp: Indices, actors: Actors) -> Indices:
    """Level of the group that has no barrier between stamp and now; 0 where there is order."""
    known = stamp != 0
    if not known.any() or not (known & ((stamp ^ _stamp(actors)[:, None]) << 32 != 0)).any():
        return np.zeros(1, np.int64)
    level = _level(stamp, actors)
    warp, cta = actors.warp_synced[:, None], actors.cta_synced[:, None]
    since = np.where(level == 1, warp, np.where(level == 2, cta, 0))
    return np.where(known & (level > 0) & (stamp >> 32 >= since), level, 0)


class Shadow:
    """The last accesses of each granule of a buffer."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        # Padded, so that the widest access divides it.
        self.stamps = {"wrote": np.zeros(-(-size // 64) * (64 // granule), np.int64)}

    def written(self, offset: Indices, size: int) -> npt.NDArray[np.bool_]:
        """Which accesses find every byte written."""
        return (self._rows("wrote", size)[offset // size] != 0).all(1)

    def read(self, offset: Indices, size: int, actors: Actors) -> None:
        self._check(offset, size, actors, "reads", ("wrote", "changed"))
        self._join("read", offset, size, actors)

    def write(self, offset: Indices, size: int, actors: Actors, together: int) -> None:
        """`together`: largest group whose threads may write a place in one instruction."""
        self._check(offset, size, actors, "writes", ("wrote", "read", "changed"))
        group = self._join("wrote", offset, size, actors).max(1)
        if group.max(initial=0) > together:
            lane = int(np.argmax(group))
            raise Race(
                f"{actors.place(lane)} and another thread write byte {offset[lane]} of"
                " {name} in one instruction"
            )

    def change(self, offset: Indices, size: int, actors: Actors) -> None:
        """Atomics: no race among themselves, but with all else."""
        self._check(offset, size, actors, "changes", ("wrote", "read"))
        self._join("changed", offset, size, actors)

    def _join(self, kind: str, offset: Indices, size: int, actors: Actors) -> Indices:
        """Stamp granules that several threads may use at once: the last one stands for all.

        Returns:
            The level of the group that uses each granule in this instruction.
        """
        rows, row = self._rows(kind, size), offset // size
        mine, level = _stamp(actors)[:, None], _unordered(rows[row], actors)
        rows[row] = mine | level
        last = rows[row]
        if not ((last ^ mine) >> 2 != 0).any():
            return np.zeros((row.size, 1), np.int64)
        group = _level(last & ~3, actors)
        np.maximum.at(rows, row, last | np.maximum(group, level))
        return group

    def _rows(self, kind: str, size: int) -> Indices:
        """Stamps in rows of one access each; made at the first access of this kind."""
        if kind not in self.stamps:
            self.stamps[kind] = np.zeros_like(self.stamps["wrote"])
        return self.stamps[kind].reshape(-1, size // self.granule)

    def _check(
        self, offset: Indices, size: int, actors: Actors, doing: str, kinds: tuple[str, ...]
    ) -> None:
        for kind in kinds:
            if kind not in self.stamps:
                continue
            stamps = self._rows(kind, size)[offset // size]
            level = _unordered(stamps, actors)
            if level.any():
                lane, granule = np.argwhere(level)[0]
                cta, thread = divmod(
                    int(stamps[lane, granule]) >> 2 & _THREAD_MASK, actors.threads_per_cta
                )
                raise Race(
                    f"{actors.place(lane)} {doing} byte {offset[lane] + granule * self.granule} of"
                    f" {{name}}, which CTA {cta} thread {thread} {kind} with no barrier between"
                )


class Buffer:
    """Bytes that one launch uses: one row for all threads, or one per CTA or thread.

    Args:
        name: for messages.
        data: flat bytes, `stride` for each row.
        size: bytes of a row that a kernel may use.
        granule: bytes of the smallest access that the kernel makes here; None where no thread
            can disturb another.
        stride: bytes from one row to the next.
        fresh: nothing is written yet, and reading it is a fault.
    """

    def __init__(
        self,
        name: str,
        data: npt.NDArray[np.uint8],
        size: int,
        granule: int | None,
        stride: int = 0,
        fresh: bool = False,
    ) -> None:
        self.name, self.data, self.size, self.stride, self.fresh = name, data, size, stride, fresh
        self.shadow = None if granule is None else Shadow(data.size, granule)

    def load(
        self, offset: Indices, row: Indices, dtype: np.dtype, count: int, actors: Actors | None
    ) -> np.ndarray:
        """Values of shape (lanes, count)."""
        where, size = self._locate(offset, row, dtype.itemsize * count), dtype.itemsize * count
        if self.shadow is not None:
            if self.fresh and not (written := self.shadow.written(where, size)).all():
                first = int(offset[np.argmin(written)])
                raise Uninitialised(f"byte {first} of {self.name} is read and was never written")
            self._shadowed(self.shadow.read, where, size, actors)
        return self._view(dtype, count)[where // size]

    def store(
        self, offset: Indices, row: Indices, values: np.ndarray, actors: Actors | None
    ) -> None:
        """Write values of shape (lanes, count)."""
        size = values.dtype.itemsize * values.shape[1]
        where = self._locate(offset, row, size)
        self._refuse_read_only()
        if self.shadow is not None:
            # Lanes of a warp may repeat a store to shared memory: Triton's reductions do.
            self._shadowed(self.shadow.write, where, size, actors, 1 if self.stride else 0)
        rows = self._view(values.dtype, values.shape[1])
        rows[where // size] = values
        if self.stride and (lost := (rows[where // size] != values).any(1)).any():
            first = int(offset[np.argmax(lost)])
            raise Race(f"two lanes write different values to byte {first} of {self.name} at once")

    def cells(
        self, offset: Indices, row: Indices, dtype: np.dtype, actors: Actors
    ) -> tuple[np.ndarray, Indices]:
        """The values as one array and the index of each lane's own, for an atomic operation."""
        where = self._locate(offset, row, dtype.itemsize)
        self._refuse_read_only()
        if self.shadow is not None:
            if self.fresh and not self.shadow.written(where, dtype.itemsize).all():
                raise Uninitialised(f"{self.name} is changed and was never written")
            self._shadowed(self.shadow.change, where, dtype.itemsize, actors)
        return self._view(dtype, 1)[:, 0], where // dtype.itemsize

    def _view(self, dtype: np.dtype, count: int) -> np.ndarray:
        size = dtype.itemsize * count
        return self.data[: self.data.size // size * size].view(dtype).reshape(-1, count)

    def _locate(self, offset: Indices, row: Indices, size: int) -> Indices:
        """Index of each access's first byte in `data`."""
        outside = (offset < 0) | (offset + size > self.size)
        if outside.any():
            first = int(offset[np.argmax(outside)])
            raise OutOfBounds(
                f"bytes {first} to {first + size - 1} of {self.name} ({self.size} bytes)"
            )
        if (offset & (size - 1)).any():
            first = int(offset[np.argmax(offset & (size - 1))])
            raise Misaligned(f"byte {first} of {self.name} is no multiple of {size}")
        return offset + row * self.stride if self.stride else offset

    def _refuse_read_only(self) -> None:
        if not self.data.flags.writeable:
            raise OutOfBounds(f"a write to {self.name}, which is read-only")

    def _shadowed(self, action: Callable[..., None], *access: object) -> None:
        try:
            action(*access)
        except Race as race:
            raise Race(str(race).format(name=self.name)) from None
