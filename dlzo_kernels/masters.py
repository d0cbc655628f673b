"""The float32 masters of tuned parameters: kept from step to step while they speak for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dlzo_kernels import _C
from dlzo_kernels.ops._common import DTYPE_CODES, overlap
from dlzo_kernels.ops._parts import Operand
from dlzo_kernels.ops.accumulate import accumulate_layer
from dlzo_kernels.parameters import Layer, Numbering, is_whole, storages, tuned_parameters

# Elements at a time, all the scratch memory of a step; a GPU waits after each that are compared.
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}


class _Entry:
    """The float32 master of one parameter, and what tells whether it still speaks for it."""

    def __init__(self, live: Tensor, counter: Tensor | None) -> None:
        self.storage = StorageWeakRef(live.untyped_storage())
        with torch.inference_mode(False):  # it outlives the mode
            self.master = torch.empty(live.shape, dtype=torch.float32, device=live.device)
        self.moves = 0  # of the master
        self.mark_current(counter)

    def mark_current(self, counter: Tensor | None) -> None:
        """Notes that the live weights, whose writes the counter counts, are those of the master."""
        self.perturbed: Tensor | None = None  # the live weights, while they are not the master's
        self.counter, self.version = counter, _version(counter)

    def was_written(self) -> bool:
        """Whether somebody else has written the live weights since, by autograd."""
        return self.version != _version(self.counter)

    def accept_writes(self) -> None:
        """Accepts the current version: the writes since came from steps on other views."""
        self.version = _version(self.counter)

    def matches(self, live: Tensor) -> bool:
        """Whether the live weights are those of the master."""
        if live.is_cpu and live.is_contiguous():
            addresses = live.data_ptr(), DTYPE_CODES[live.dtype], self.master.data_ptr()
            return _C.is_rounded(*addresses, live.numel(), torch.get_num_threads())
        return all(
            torch.equal(_bits(part.to(live.dtype)), _bits(whole))
            for whole, part in _chunks(live, self.master)
        )


@dataclass(frozen=True)
class Tuned:
    """A tuned parameter, with its master."""

    name: str
    counter: Tensor | None  # of writes, by autograd
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
        t.entry.mark_current(t.counter)


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
    """Keeps the masters of other views of the same storage valid over the writes in the `with`.

    These raise the version counter that the views share.
    """
    storages, own = {t.entry.storage.cdata for t in tuned}, {id(t.entry) for t in tuned}
    others = [
        entry
        for key, entry in _entries.copy().items()
        if key.storage in storages and id(entry) not in own and not entry.was_written()
    ]
    yield
    for entry in others:
        entry.accept_writes()


def written_error(name: str) -> RuntimeError:
    """What is raised where weights were written that an open step speaks of."""
    return RuntimeError(f"{name} was written since the step was opened; make another with zo_step")


def perturbed_error(name: str) -> RuntimeError:
    """What is raised where another step has the weights perturbed."""
    return RuntimeError(f"{name} is perturbed by an open step; leave that first")


def _tuned(name: str, given: Tensor, live: Tensor, numbering: Numbering) -> Tuned:
    counter = _write_counter(given)
    entry = _adopt(name, counter, live)
    operand = Operand(live.detach(), entry.master, **numbering)
    return Tuned(name, counter, live, operand, live.data_ptr(), entry, entry.moves)


def _adopt(name: str, counter: Tensor | None, live: Tensor) -> _Entry:
    """The master of a parameter: the one of the step before, where that still holds."""
    key = _Key(
        StorageWeakRef(live.untyped_storage()).cdata,
        int(live.storage_offset()),
        live.shape,
        live.stride(),
        live.dtype,
    )
    entry = _entries.get(key)
    if entry is None or entry.was_written() or not entry.matches(live):
        entry = _Entry(live, counter)
        for whole, part in _chunks(live, entry.master):
            if not part.copy_(whole).isfinite().all():
                raise ValueError(f"{name} holds values that are not finite; repair it first")
        _forget_overlapping(live, key)
        _entries[key] = entry
    entry.mark_current(counter)
    return entry


def _forget_overlapping(live: Tensor, key: _Key) -> None:
    """Drops the masters of views that overlap these weights: the first move makes them stale."""
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


def _write_counter(given: Tensor) -> Tensor | None:
    """An empty tensor that shares autograd's count of writes; inference tensors have none."""
    if given.is_inference():
        return None
    # A weakref to it would do, but torch swaps no tensor that has one. A DTensor has its own count.
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        counter = given.detach()
        counter.data = torch.empty(0, dtype=given.dtype, device=given.device)  # frees its memory
    return counter


def _version(counter: Tensor | None) -> int:
    return 0 if counter is None else counter._version
