"""zo_step: an exact zeroth-order step on one layer (MeZO, arXiv 2305.17333, from a master copy)."""

from __future__ import annotations

import math
import signal
import sys
import threading
import weakref
from _signal import getsignal  # that of `signal` makes an enumeration of each answer: 18 us a step
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import Any, NamedTuple, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dlzo_kernels.ops._common import (
    check_device_numbers,
    check_range,
    check_writable,
    extent,
    overlap,
)
from dlzo_kernels.ops._parts import Operand
from dlzo_kernels.ops.accumulate import accumulate_layer, check_directions
from dlzo_kernels.ops.perturb import perturb_layer

Layer = nn.Module | Tensor | Iterable[nn.Module | Tensor]
Loss = float | Tensor

# Elements compared at a time, the step's only scratch memory; a GPU waits after each.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
# Whose order says nothing, or whose items are no tensors.
_NO_LAYER = (str, bytes, dict, set, frozenset)
_LARGEST_NORMAL = 6.77  # of noise v1: sqrt(-2 ln 2^-33) is 6.764


class StepResult:
    """What a step saw and did.

    A step on a GPU does not wait for its losses: the first look at any of these does.
    """

    def __init__(self, numbers: Sequence[float] | Tensor) -> None:
        """The losses at plus, those at minus, the projected gradients, and whether applied."""
        self._numbers = numbers

    @cached_property
    def _read(self) -> list[float]:
        numbers = self._numbers
        return numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)

    def __eq__(self, other: object) -> bool:
        return self._read == other._read if isinstance(other, StepResult) else NotImplemented

    def __repr__(self) -> str:
        return (
            f"StepResult(loss_plus={self.loss_plus}, loss_minus={self.loss_minus}, "
            f"projected_grad={self.projected_grad}, applied={self.applied})"
        )

    @property
    def losses_plus(self) -> tuple[float, ...]:
        """Loss at master + eps z, one per direction."""
        return tuple(self._read[: len(self._read) // 3])

    @property
    def losses_minus(self) -> tuple[float, ...]:
        """Loss at master - eps z, one per direction."""
        directions = len(self._read) // 3
        return tuple(self._read[directions : 2 * directions])

    @property
    def projected_grads(self) -> tuple[float, ...]:
        """(loss_plus - loss_minus) / (2 eps), one per direction."""
        return tuple(self._read[2 * (len(self._read) // 3) : -1])

    @property
    def applied(self) -> bool:
        """False where a number was not finite, or a loss above `max_loss`: nothing was moved."""
        return bool(self._read[-1])

    @property
    def loss_plus(self) -> float:
        """Mean of losses_plus."""
        return sum(self.losses_plus) / len(self.losses_plus)

    @property
    def loss_minus(self) -> float:
        """Mean of losses_minus."""
        return sum(self.losses_minus) / len(self.losses_minus)

    @property
    def projected_grad(self) -> float:
        """Mean of projected_grads."""
        return sum(self.projected_grads) / len(self.projected_grads)


@overload
def zo_step(
    layer: Layer,
    seed: int | Tensor,
    eps: float,
    lr: float,
    *,
    directions: int = 1,
    weight_decay: float = 0.0,
) -> ZOStep: ...
@overload
def zo_step(
    layer: Layer,
    seed: int | Tensor,
    eps: float,
    lr: float,
    *,
    closure: Callable[[], Loss],
    directions: int = 1,
    weight_decay: float = 0.0,
) -> StepResult: ...
def zo_step(
    layer: Layer,
    seed: int | Tensor,
    eps: float,
    lr: float,
    *,
    closure: Callable[[], Loss] | None = None,
    directions: int = 1,
    weight_decay: float = 0.0,
) -> StepResult | ZOStep:
    """One two-point zeroth-order step: w -= lr / K * sum_k g_k z_k, g_k = (L+ - L-) / (2 eps).

    The weights always come from a float32 master that outlives the step: live = round(master ±
    eps z). So nothing drifts (lr = 0 leaves every bit), and bfloat16 does not stall on updates
    below half an ulp. The master is derived anew whenever somebody else has written the weights.
    With `closure` the layer is passed over three times: plus, minus, update.

    Whatever ends an evaluation early (an exception, Ctrl-C, a loss that is not finite) leaves the
    weights exactly as they were. No global random state is touched.

    Where the layer is on a GPU and the losses are tensors there, nothing waits for the device
    between the evaluations and the update: the projected gradient is computed there. For a CUDA
    graph, take a whole step first, which loads the kernels; then open one before the capture, with
    a seed in device memory, to replay with others.

    Args:
        layer: a module (its parameters that require grad are tuned), a tensor, or an iterable of
            both. z of the parameter with ordinal i among all parameters has stream i. Of a DTensor,
            each process moves its own shard, by its part of the full tensor's z.
        seed: of z, in [0, 2^64); or one int64 in the layer's memory, whose bits it is.
        eps: size of the perturbation, > 0.
        lr: step size, >= 0.
        closure: returns the loss of the current weights (a float or a 0-d tensor); called under
            no_grad, 2 * directions times.
        directions: K, the number of directions averaged; direction k is query k of noise v1.
        weight_decay: tensors of two or more dimensions are first multiplied by 1 - lr *
            weight_decay, where the step moves anything.

    Returns:
        A StepResult with `closure`; without it the open step:
        `with step.plus(): ...`, `with step.minus(): ...`, `step.update(loss_plus, loss_minus)`.

    Raises:
        ValueError: a number is out of range, or a parameter cannot be tuned; it is named.
        TypeError: the layer is none of the three, or a parameter has a dtype of another kind.
        NotImplementedError: there is no kernel for the device of a parameter.
        RuntimeError: another step has the layer perturbed.
    """
    step = ZOStep(layer, seed, eps, lr, directions, weight_decay)
    return step if closure is None else step._run(closure)


class ZOStep:
    """An open step: see `zo_step`, which makes it."""

    def __init__(
        self,
        layer: Layer,
        seed: int | Tensor,
        eps: float,
        lr: float,
        directions: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(seed, Tensor):
            check_range("seed", seed, 1 << 64)
        if not (math.isfinite(eps) and 1e-37 < eps < 1e37):
            raise ValueError(f"eps must be between 1e-37 and 1e37, not {eps}")
        check_range("directions", directions, 1 << 32)
        if directions < 1:
            raise ValueError(f"directions must be at least 1, not {directions}")
        _check_rates(lr, weight_decay)
        # Of numpy or torch they would make the losses' differences theirs.
        self._seed, self._eps, self._lr, self._directions = seed, float(eps), float(lr), directions
        self._weight_decay = float(weight_decay)
        self._tuned = _adopted(layer)
        self._operands = [t.operand for t in self._tuned]
        for operand in self._operands:
            check_device_numbers("seed", seed, torch.int64, 1, operand.out.device)
        # A move that is beyond the dtype by itself is not made.
        self._most = min(torch.finfo(o.out.dtype).max for o in self._operands) / _LARGEST_NORMAL
        self._taken = False

    @contextmanager
    def plus(self, direction: int = 0) -> Iterator[None]:
        """The layer at master + eps z inside the `with`; exactly restored when it is left."""
        with self._perturbed(self._eps, direction):
            yield

    @contextmanager
    def minus(self, direction: int = 0) -> Iterator[None]:
        """The layer at master - eps z inside the `with`; exactly restored when it is left."""
        with self._perturbed(-self._eps, direction):
            yield

    def update(
        self,
        loss_plus: Loss | Sequence[Loss],
        loss_minus: Loss | Sequence[Loss],
        *,
        max_loss: float = math.inf,
        lr: float | None = None,
    ) -> StepResult:
        """Moves the weights by the losses: numbers or 0-d tensors, one per direction.

        Args:
            loss_plus: at master + eps z.
            loss_minus: at master - eps z.
            max_loss: a loss above it leaves the weights as they were, as one that is not finite or
                whose move is by itself beyond the range of the weights' dtype.
            lr: in place of the step's own, where it depends on the losses.

        Raises:
            ValueError: not one loss per direction, or lr or max_loss is out of range.
            RuntimeError: the step was taken already, or the layer is perturbed or was written, by
                another step too (by way of `.data`, or in inference mode, nobody sees it).
            TypeError: a loss is no number.
        """
        if self._taken:
            raise RuntimeError("this step was taken already; make another with zo_step")
        self._refuse_if_touched()
        plus, minus = _as_list(loss_plus), _as_list(loss_minus)
        if not len(plus) == len(minus) == self._directions:
            raise ValueError(
                f"{len(plus)} and {len(minus)} losses for {self._directions} directions: "
                "give one of each per direction"
            )
        if math.isnan(max_loss):
            raise ValueError("max_loss is nan; give a number, or none")
        if lr is not None:
            _check_rates(lr, self._weight_decay)
            self._lr = float(lr)
        self._taken = True
        with _Held():
            return self._finish(plus, minus, max_loss)

    def _run(self, closure: Callable[[], Loss]) -> StepResult:
        plus: list[Loss] = []
        minus: list[Loss] = []
        self._refuse_if_touched()
        with _Held() as held:
            try:
                with torch.no_grad():
                    for direction in range(self._directions):
                        for scale, losses in ((self._eps, plus), (-self._eps, minus)):
                            self._write(scale, direction)
                            with held.lifted():
                                loss = closure()
                            losses.append(_kept(loss))
                            self._refuse_if_elsewhere()
                return self._finish(plus, minus)
            except BaseException:
                self._restore()
                raise

    @contextmanager
    def _perturbed(self, scale: float, direction: int) -> Iterator[None]:
        if direction not in range(self._directions):
            raise ValueError(f"direction must be in [0, {self._directions}), not {direction}")
        self._refuse_if_touched()
        with _Held() as held:
            try:
                self._write(scale, direction)
                with held.lifted():
                    yield
            finally:
                self._restore()

    def _refuse_if_touched(self) -> None:
        for t in self._tuned:
            if t.entry.perturbed is not None:
                raise _is_perturbed(t.name)
            if t.entry.was_written(t.given) or t.entry.moves != t.moves:
                raise _was_written(t.name)
        self._refuse_if_elsewhere()

    def _refuse_if_elsewhere(self) -> None:
        """By `w.data = ...` a tensor gets other memory."""
        for t, operand in zip(self._tuned, self._operands, strict=True):
            if t.live.data_ptr() != operand.out.data_ptr():
                raise _was_written(t.name)

    def _write(self, scale: float, direction: int) -> None:
        for t in self._tuned:
            t.entry.perturbed = t.live
        with _own_writes(self._tuned):
            self._perturb(scale, direction)

    def _perturb(self, scale: float, direction: int) -> None:
        perturb_layer(self._operands, self._seed, scale, direction)

    def _restore(self) -> None:
        _accumulate(self._tuned, [], [], [])

    def _finish(
        self, plus: list[Loss], minus: list[Loss], max_loss: float = math.inf
    ) -> StepResult:
        devices = {operand.out.device for operand in self._operands}
        losses = [loss for loss in (*plus, *minus) if isinstance(loss, Tensor)]
        if len(losses) == 2 * self._directions and {loss.device for loss in losses} == devices:
            (device,) = devices
            if device.type == "cuda":
                return self._finish_on(device, torch.stack(losses), max_loss)
        return self._finish_here([*map(float, plus)], [*map(float, minus)], max_loss)

    def _finish_here(self, plus: list[float], minus: list[float], max_loss: float) -> StepResult:
        grads = [(p - m) / (2 * self._eps) for p, m in zip(plus, minus, strict=True)]
        scales = update_scales(self._lr, grads)
        applied = (
            all(math.isfinite(loss) and loss <= max_loss for loss in (*plus, *minus))
            and sum(map(abs, scales)) < self._most
        )
        # A product of zero and z could still turn -0.0 into 0.0.
        if applied and any(scales):
            self._move(scales, 1 - self._lr * self._weight_decay)
        else:
            self._restore()
        return StepResult([*plus, *minus, *grads, applied])

    def _move(self, scales: Sequence[float], keep: float) -> None:
        _accumulate(self._tuned, self._seeds(), scales, range(len(scales)), keep=keep)

    def _finish_on(self, device: torch.device, losses: Tensor, max_loss: float) -> StepResult:
        """As _finish_here, to the bit, without waiting for the device."""
        losses = losses.double().view(2, -1)
        # torch multiplies by the reciprocal of a number; a tensor divides.
        twice_eps = torch.full((), 2 * self._eps, dtype=torch.float64, device=device)
        grads = (losses[0] - losses[1]) / twice_eps
        scales = grads * (-self._lr / self._directions)
        moves = scales.abs().sum() < self._most
        applied = (losses.isfinite() & (losses <= max_loss)).all() & moves
        gate = (applied & (scales != 0).any()).int()
        keep: float | Tensor = 1.0
        if self._lr * self._weight_decay > 0:
            # Of numbers alone it would have torch's default dtype.
            decayed = torch.full_like(scales[0], 1 - self._lr * self._weight_decay)
            keep = torch.where(gate != 0, decayed, 1.0).float()
        queries = range(self._directions)
        _accumulate(self._tuned, self._seeds(), scales.float(), queries, gate=gate, keep=keep)
        return StepResult(torch.cat([losses.flatten(), grads, applied.double().view(1)]))

    def _seeds(self) -> Sequence[int] | Tensor:
        if isinstance(self._seed, Tensor):
            return self._seed.reshape(1).expand(self._directions).contiguous()
        return [self._seed] * self._directions


def update_scales(lr: float, projected_grads: Sequence[float]) -> list[float]:
    """The multiple of each direction's z that a step adds to the master: -lr / K * g_k."""
    return [-lr / len(projected_grads) * grad for grad in projected_grads]


def zo_replay(
    layer: Layer,
    seeds: Sequence[int],
    scales: Sequence[float],
    queries: Sequence[int],
    *,
    keep: float = 1.0,
) -> None:
    """Adds scales[i] * z(seeds[i], queries[i]) for each i in turn, in one pass over the weights.

    Bit-equal to the updates of the steps that these come from, and the next `zo_step` goes on from
    the same float32 master. A step that was not applied, or whose scales are all zero, moved
    nothing: leave it out.

    Args:
        layer: as in `zo_step`, with the weights that the first of these steps started from.
        seeds: of z, in [0, 2^64).
        scales: `update_scales` of the steps, one after the other.
        queries: number of the direction of each.
        keep: what tensors of two or more dimensions are multiplied by first, in (0, 1]: of a single
            step with weight decay, 1 - lr * weight_decay.

    Raises:
        ValueError: lengths differ, a number is out of range, or a parameter cannot be tuned.
        RuntimeError: a step has the layer perturbed.
    """
    check_keep(keep)
    tuned = _adopted(layer)
    check_directions(seeds, scales, queries, tuned[0].live.device)
    with _Held():
        _accumulate(tuned, seeds, scales, [*map(int, queries)], keep=keep)


def check_keep(keep: float) -> None:
    """Raises ValueError unless 0 < keep <= 1."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], not {keep}")


def _check_rates(lr: float, weight_decay: float) -> None:
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and >= 0, not {lr}")
    if not (0 <= weight_decay < math.inf and lr * weight_decay < 1):
        raise ValueError(
            f"weight_decay must be >= 0, and below 1 when multiplied by lr, not {weight_decay}"
        )


def _accumulate(
    tuned: Sequence[_Tuned],
    seeds: Sequence[int] | Tensor,
    scales: Sequence[float] | Tensor,
    queries: Sequence[int],
    *,
    gate: Tensor | None = None,
    keep: float | Tensor = 1.0,
) -> None:
    """Moves the masters along the directions, in order, and makes the live weights theirs."""
    decays = isinstance(keep, Tensor) or keep != 1
    moves = decays or len(scales) > 0
    if decays:
        for t in tuned:
            if t.live.dim() > 1:
                t.entry.master.mul_(keep)
    with _own_writes(tuned):
        accumulate_layer([t.operand for t in tuned], seeds, scales, queries, gate=gate)
    for t in tuned:
        t.entry.moves += moves
        t.entry.release(t.given)


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
        return all(
            torch.equal(_bits(part.to(live.dtype)), _bits(whole))
            for whole, part in _chunks(live, self.master)
        )


class _Numbering(TypedDict):
    """Which elements of noise a tensor's own are."""

    stream: int
    offset: int
    row_stride: int | None


@dataclass(frozen=True)
class _Tuned:
    name: str
    given: Tensor  # whose writes autograd counts: a DTensor, or the live weights themselves
    live: Tensor
    numbering: _Numbering
    entry: _Entry
    moves: int  # of the master so far

    @property
    def operand(self) -> Operand:
        return Operand(self.live.detach(), self.entry.master, **self.numbering)


class _Key(NamedTuple):
    """Which memory is tuned, and how it is seen."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


# Threads meet in it, so it is read by way of lists. A signal could leave a lock locked.
_entries: dict[_Key, _Entry] = {}


def _adopted(layer: Layer) -> list[_Tuned]:
    """What is tuned, with its masters."""
    for key, entry in list(_entries.items()):
        if entry.storage.expired():
            _entries.pop(key, None)
    collected = _collect(layer)
    others = [live for e in list(_entries.values()) if (live := e.perturbed) is not None]
    for name, _, live, _ in collected:
        for other in others:
            if live.device == other.device and live.numel() and overlap(live, other):
                raise _is_perturbed(name)
    return [_tuned(*item) for item in collected]


@contextmanager
def _own_writes(tuned: Sequence[_Tuned]) -> Iterator[None]:
    """Views of one memory have one count of writes: these writes are none to others' masters."""
    storages, own = {t.entry.storage.cdata for t in tuned}, {id(t.entry) for t in tuned}
    others = [
        entry
        for key, entry in list(_entries.items())
        if key.storage in storages and id(entry) not in own and entry.is_up_to_date()
    ]
    yield
    for entry in others:
        entry.catch_up()


def _was_written(name: str) -> RuntimeError:
    return RuntimeError(f"{name} was written since the step was opened; make another with zo_step")


def _is_perturbed(name: str) -> RuntimeError:
    return RuntimeError(f"{name} is perturbed by an open step; leave that first")


def _tuned(name: str, given: Tensor, live: Tensor, numbering: _Numbering) -> _Tuned:
    entry = _adopt(name, given, live)
    return _Tuned(name, given, live, numbering, entry, entry.moves)


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
    for other, entry in list(_entries.items()):
        if other.storage != key.storage or other == key or entry.perturbed is not None:
            continue
        view = live.detach()
        if other.dtype == key.dtype:
            with suppress(RuntimeError):  # the memory has shrunk: `other` has none
                view = view.as_strided(other.shape, other.stride, other.offset)
        if live.numel() and overlap(live, view):
            _entries.pop(other, None)


def _collect(layer: Layer) -> list[tuple[str, Tensor, Tensor, _Numbering]]:
    """(name, as given, local, numbering) of what is tuned; the stream counts frozen ones too."""
    named: dict[int, tuple[str, Tensor]] = {}
    tuned: set[int] = set()
    for name, tensor, chosen in _named_tensors(layer):
        named.setdefault(id(tensor), (name, tensor))
        if chosen:
            tuned.add(id(tensor))
    found: list[tuple[str, Tensor, Tensor, _Numbering]] = []
    for stream, (key, (name, tensor)) in enumerate(named.items()):
        local, offset, row_stride = _shard(name, tensor)
        _check_parameter(name, local)
        if key in tuned:
            numbering = _Numbering(stream=stream, offset=offset, row_stride=row_stride)
            found.append((name, tensor, local, numbering))
    if not found:
        raise ValueError("the layer has no parameter that requires grad; call requires_grad_(True)")
    _refuse_overlap((name, local) for name, _, local, _ in found if local.numel())
    return found


def _refuse_overlap(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Compares each with those alone whose range of memory it begins in."""
    before: list[tuple[str, Tensor]] = []
    for name, tensor in sorted(tensors, key=lambda item: item[1].data_ptr()):
        before = [(n, t) for n, t in before if tensor.data_ptr() < t.data_ptr() + extent(t)]
        for other, earlier in before:
            if overlap(earlier, tensor):
                raise ValueError(f"{other} and {name} share memory; give one of the two")
        before.append((name, tensor))


def _named_tensors(layer: Layer) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is tuned): tensors that are given as such always are."""
    if isinstance(layer, Tensor):
        yield "the tensor", layer, True
    elif isinstance(layer, nn.Module):
        for name, parameter in layer.named_parameters():
            yield name, parameter, parameter.requires_grad
    elif isinstance(layer, Iterable) and not isinstance(layer, _NO_LAYER):
        for i, part in enumerate(layer):
            if not isinstance(part, Tensor | nn.Module):
                raise TypeError(
                    f"item {i} of the layer is a {type(part).__name__}, not a module or tensor"
                )
            for name, tensor, chosen in _named_tensors(part):
                yield (f"tensor {i}" if part is tensor else f"{i}.{name}"), tensor, chosen
    else:
        raise TypeError(
            f"layer is a {type(layer).__name__}; give a module, a tensor or an iterable of them"
        )


def _shard(name: str, tensor: Tensor) -> tuple[Tensor, int, int | None]:
    """(shard, offset, row stride) of a DTensor in this process; any other tensor is its own."""
    # Where nobody has imported it there is no DTensor, and importing it is slow.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor, 0, None
    if not all(type(p) in (module.Shard, module.Replicate) for p in tensor.placements):
        raise ValueError(f"{name} is placed as {tensor.placements}; only shards can be tuned")
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, live = tuple(tensor.shape), tensor.to_local().detach()
    _, start = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    if len(shape) < 2:
        return live, sum(start), None
    if live.shape[1:-1] != shape[1:-1]:
        raise ValueError(f"{name} is sharded in a middle dimension; use its first or last")
    return live, start[0] * math.prod(shape[1:]) + start[-1], shape[-1]


def _check_parameter(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, not a plain tensor; de-quantise or unwrap it"
        )
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no values; load it first")
    check_writable(name, tensor)


def _chunks(live: Tensor, master: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching parts of both, of about _CHUNK elements, as views."""
    live = live.detach()
    if live.is_contiguous():
        live, master = live.view(-1), master.view(-1)
    if live.numel() == 0 or live.dim() == 0:
        return iter([(live, master)])
    rows = max(1, _CHUNK[live.device.type] * live.shape[0] // live.numel())
    return zip(live.split(rows), master.split(rows), strict=True)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def _counted(tensor: Tensor) -> Tensor:
    """What has the tensor's count of writes, and outlives a view that is made anew each time."""
    return tensor if tensor._base is None else tensor._base


def _version(tensor: Tensor) -> int:
    """Autograd's count of writes; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _as_list(losses: Loss | Sequence[Loss]) -> list[Loss]:
    return [_number(loss) for loss in (losses if isinstance(losses, Sequence) else [losses])]


def _kept(loss: Loss) -> Loss:
    """Its number, on a GPU a copy that the next evaluation cannot overwrite."""
    number = _number(loss)
    return number.clone() if isinstance(number, Tensor) else number


def _number(loss: Loss) -> Loss:
    """A loss as a float, or where it is on a GPU as a 0-d tensor there."""
    if not isinstance(loss, Tensor):
        try:
            return float(loss)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"a loss is {loss!r}; give a number, or a list of one per direction"
            ) from error
    if loss.is_complex():
        raise TypeError(f"a loss is complex ({loss.dtype}); give a real number")
    if loss.numel() != 1:
        raise ValueError(f"a loss has shape {tuple(loss.shape)}; give one number per direction")
    return loss.detach().reshape(()) if loss.is_cuda else loss.item()


class _Held:
    """Delays signals to the end of the block, Ctrl-C too, but for user code in it (`lifted`).

    So a layer is never left half written. Only handlers in Python are stood in for: they run
    between any two instructions of the main thread, whatever its signal mask says.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._late: list[int] = []
        self._is_open = self._is_lifted = False

    def __enter__(self) -> _Held:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._handle)
        self._is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        # First of all: from here on a signal may raise, and whoever is still in place passes it on.
        self._is_open = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:  # unless user code has set its own
                signal.signal(number, _still_open(number, handler))
        for number in self._late:
            signal.raise_signal(number)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Lets signals through, late ones first, until one of them raises."""
        self._is_lifted = True
        try:
            while self._late:
                self._pass_on(self._late.pop(0), None)
            yield
        finally:
            self._is_lifted = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # In the frames of `with` itself an exception could pass the restoring by.
        in_user_code = frame is None or frame.f_code.co_filename not in _WITH
        if self._is_open and not (self._is_lifted and in_user_code):
            self._late.append(number)
        else:
            self._pass_on(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        lifted, self._is_lifted = self._is_lifted, False
        self._handlers[number](number, frame)
        self._is_lifted = lifted


def _still_open(number: int, handler: Any) -> Any:
    """The handler itself, or what is behind it where its block was left before this one."""
    while isinstance(held := getattr(handler, "__self__", None), _Held) and not held._is_open:
        handler = held._handlers[number]
    return handler


_SIGNALS = signal.valid_signals()
_WITH = {contextmanager.__code__.co_filename, _Held.__init__.__code__.co_filename}
