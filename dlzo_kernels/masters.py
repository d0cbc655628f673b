"""The float32 masters of tuned parameters: kept from step to step while they speak for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dlzo_kernels import _C
from dlzo_kernels.ops._common import DTYPE_CODES, overlap, threads
from dlzo_kernels.ops._parts import Operand
from dlzo_kernels.ops.accumulate import accumulate_layer
from dlzo_kernels.parameters import Layer, Numbering, is_whole, storages, tuned_parameters

# Elements at a time, all the scratch memory of a step; a GPU waits after each that are compared.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}


class _Entry:
    """The float32 master of one parameter, and what tells whether it still speaks for it."""

    def __init__(self, live: Tensor) -> None:
        self.storage = StorageWeakRef(live.untyped_storage())
        with torch.inference_mode(False):  # it outlives the mode
            self.master = torch.empty(live.shape, dtype=torch.float32, device=live.device)
        self.moves = 0  # of the master
        self.release(live)

    def release(self, given: Tensor) -> None:
        """Notes that the live weights, given as such or in a DTensor, are those of the master."""
        self.perturbed: Tensor | None = None  # the live weights, while they are not the master's
        self.seen, self.version = weakref.ref(_counted(given)), _version(given)

    def was_written(self, given: Tensor) -> bool:
        """Whether somebody else wrote what was released last, by autograd."""
        return self.seen() is _counted(given) and self.version != _version(given)

    def is_up_to_date(self) -> bool:
        """Whether nobody has written since, by autograd."""
        seen = self.seen()
        return seen is not None and self.version == _version(seen)

    def catch_up(self) -> None:
        """Takes the writes so far for those of steps on other weights."""
        if (seen := self.seen()) is not None:
            self.version = _version(seen)

    def speaks_for(self, live: Tensor) -> bool:
        """Whether the live weights are those of the master."""
        if live.is_cpu and live.is_contiguous():
            addresses = live.data_ptr(), DTYPE_CODES[live.dtype], self.master.data_ptr()
            return _C.is_rounded(*addresses, live.numel(), threads())
        return all(
            torch.equal(_bits(part.to(live.dtype)), _bits(whole))
            for whole, part in _chunks(live, self.master)
        )


@dataclass(frozen=True)
class Tuned:
    """A tuned parameter, with its master."""

    name: str
    given: Tensor  # whose writes autograd counts: a DTensor, or the live weights themselves
    live: Tensor
    operand: Operand  # as the kernels take it, in the memory where it was adopted
    address: int  # of that memory
    entry: _Entry
    moves: int  # of the master so far

    @property
    def is_elsewhere(self) -> bool:
        """Whether it has got other memory since, by `w.data = ...` or resizing, or has lost it."""
        return self.live.data_ptr() != self.address or not is_whole(self.live)


class _Key(NamedTuple):
    """Which memory is tuned, and how it is seen."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


# Threads meet in it, so it is read by way of copies: while a list is made of its items, garbage may
# be collected, whose finalizers let other threads run. A signal could leave a lock locked.
_entries: dict[_Key, _Entry] = {}


def adopted(layer: Layer) -> list[Tuned]:
    """What is tuned, with its masters."""
    _forget_dead()
    collected = tuned_parameters(layer)
    others = [live for e in _entries.copy().values() if (live := e.perturbed) is not None]
    for name, _, live, _ in collected:
        for other in others:
            if live.device == other.device and live.numel() and overlap(live, other):
                raise perturbed_error(name)
    return [_tuned(*item) for item in collected]


def move_masters(
    tuned: Sequence[Tuned],
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    queries: Sequence[int],
    *,
    gate: Tensor | None = None,
    keep: float | Tensor = 1.0,
) -> None:
    """Moves the masters along the directions, in order, and makes the live weights theirs."""
    decays = isinstance(keep, Tensor) or keep != 1
    # An evaluation may have freed the memory of others.
    operands = [t.operand for t in tuned if is_whole(t.operand.out)]
    with moving(tuned) if decays or len(scales) > 0 else nullcontext():
        if decays:
            for t in tuned:
                if t.live.dim() > 1:
                    t.entry.master.mul_(keep)
        with own_writes(tuned):
            accumulate_layer(operands, seeds, scales, queries, gate=gate)
    for t in tuned:
        t.entry.release(t.given)


@contextmanager
def moving(tuned: Sequence[Tuned]) -> Iterator[None]:
    """Around moves of masters and weights: where they fail midway, the masters are dropped."""
    try:
        yield
    except BaseException:
        _forget(t.entry for t in tuned)
        raise
    for t in tuned:
        t.entry.moves += 1


def release(layer: Layer) -> None:
    """Frees the float32 masters of a layer, which are otherwise kept for its next step.

    That is for the end of a run: the next `zo_step` makes them anew of the weights as they are,
    without what was below the last digit of their dtype. Steps that are open on the layer cannot be
    taken any more; what one of them has perturbed is left, for its master alone can restore it. The
    masters of memory that is no more are freed too, with `release([])` these alone.

    Args:
        layer: as in `zo_step`; frozen parameters count, and views stand for all of their memory.

    Raises:
        TypeError: the layer is none of the three.
    """
    found = storages(layer)
    _forget(
        entry
        for key, entry in _entries.copy().items()
        if key.storage in found and entry.perturbed is None
    )
    _forget_dead()


def _forget(entries: Iterable[_Entry]) -> None:
    """Drops masters, and makes steps that are open on them invalid."""
    dropped = {id(entry): entry for entry in entries}
    for key, entry in _entries.copy().items():
        if id(entry) in dropped:
            _entries.pop(key, None)
    for entry in dropped.values():
        entry.moves += 1


def _forget_dead() -> None:
    for key, entry in _entries.copy().items():
        if entry.storage.expired():
            _entries.pop(key, None)


@contextmanager
def own_writes(tuned: Sequence[Tuned]) -> Iterator[None]:
    """Views of one memory have one count of writes: these writes are none to others' masters."""
    storages, own = {t.entry.storage.cdata for t in tuned}, {id(t.entry) for t in tuned}
    others = [
        entry
        for key, entry in _entries.copy().items()
        if key.storage in storages and id(entry) not in own and entry.is_up_to_date()
    ]
    yield
    for entry in others:
        entry.catch_up()


def written_error(name: str) -> RuntimeError:
    """What is raised where weights were written that an open step speaks of."""
    return RuntimeError(f"{name} was written since the step was opened; make another with zo_step")


def perturbed_error(name: str) -> RuntimeError:
    """What is raised where another step has the weights perturbed."""
    return RuntimeError(f"{name} is perturbed by an open step; leave that first")


def _tuned(name: str, given: Tensor, live: Tensor, numbering: Numbering) -> Tuned:
    entry = _adopt(name, given, live)
    operand = Operand(live.detach(), entry.master, **numbering)
    return Tuned(name, given, live, operand, live.data_ptr(), entry, entry.moves)


def _adopt(name: str, given: Tensor, live: Tensor) -> _Entry:
    """The master of a parameter: the one of the step before, where that still holds."""
    key = _Key(
        StorageWeakRef(live.untyped_storage()).cdata,
        int(live.storage_offset()),
        live.shape,
        live.stride(),
        live.dtype,
    )
    entry = _entries.get(key)
    if entry is None or entry.was_written(given) or not entry.speaks_for(live):
        entry = _Entry(live)
        for whole, part in _chunks(live, entry.master):
            if not part.copy_(whole).isfinite().all():
                raise ValueError(f"{name} holds values that are not finite; repair it first")
        _forget_overlapping(live, key)
        _entries[key] = entry
    entry.release(given)
    return entry


def _forget_overlapping(live: Tensor, key: _Key) -> None:
    """Other views of this memory need masters no more: once it moves they speak for nothing."""
    for other, entry in _entries.copy().items():
        if other.storage != key.storage or other == key or entry.perturbed is not None:
            continue
        view = live.detach()
        if other.dtype == key.dtype:
            with suppress(RuntimeError):  # the memory has shrunk: `other` has none
                view = view.as_strided(other.shape, other.stride, other.offset)
        if live.numel() and overlap(live, view):
            _entries.pop(other, None)


def _chunks(live: Tensor, master: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of both, of about CHUNK elements, as views."""
    live = live.detach()
    if live.is_contiguous():
        live, master = live.view(-1), master.view(-1)
    if live.numel() == 0 or live.dim() == 0:
        return iter([(live, master)])
    rows = max(1, CHUNK[live.device.type] * live.shape[0] // live.numel())
    return zip(live.split(rows), master.split(rows), strict=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def _counted(tensor: Tensor) -> Tensor:
    """What has the tensor's count of writes, and outlives a view that is made anew each time."""
    return tensor if tensor._base is None else tensor._base


def _version(tensor: Tensor) -> int:
    """Autograd's count of writes; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version
