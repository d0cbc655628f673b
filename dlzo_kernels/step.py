"""zo_step: an exact zeroth-order step on one layer (MeZO, arXiv 2305.17333, from a master copy)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from dlzo_kernels.masters import adopted, move_masters, own_writes, perturbed_error, written_error
from dlzo_kernels.ops._common import check_device_numbers, check_range
from dlzo_kernels.ops.accumulate import check_directions
from dlzo_kernels.ops.perturb import perturb_layer
from dlzo_kernels.parameters import Layer, is_whole
from dlzo_kernels.signals import Held

Loss = float | Tensor

LARGEST_NORMAL = 6.77  # of noise v1: sqrt(-2 ln 2^-33) is 6.764


class StepResult:
    """What a step saw and did.

    A step on a GPU does not wait for its losses: a look at any of these does. Of a step in a CUDA
    graph they are those of the last replay.
    """

    def __init__(self, numbers: Sequence[float] | Tensor) -> None:
        """The losses at plus, those at minus, the projected gradients, and whether applied."""
        self._numbers = numbers

    def _parts(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], bool]:
        numbers = self._numbers
        *each, applied = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        count = len(each) // 3
        return (
            tuple(each[:count]),
            tuple(each[count : 2 * count]),
            tuple(each[2 * count :]),
            bool(applied),
        )

    def __eq__(self, other: object) -> bool:
        return self._parts() == other._parts() if isinstance(other, StepResult) else NotImplemented

    def __repr__(self) -> str:
        *each, applied = self._parts()
        plus, minus, grad = map(_mean, each)
        return (
            f"StepResult(loss_plus={plus}, loss_minus={minus}, projected_grad={grad}, "
            f"applied={applied})"
        )

    @property
    def losses_plus(self) -> tuple[float, ...]:
        """Loss at master + eps z, one per direction."""
        return self._parts()[0]

    @property
    def losses_minus(self) -> tuple[float, ...]:
        """Loss at master - eps z, one per direction."""
        return self._parts()[1]

    @property
    def projected_grads(self) -> tuple[float, ...]:
        """(loss_plus - loss_minus) / (2 eps), one per direction."""
        return self._parts()[2]

    @property
    def applied(self) -> bool:
        """False where a loss was not finite or above `max_loss`, or the move beyond the dtype.

        Then nothing was moved.
        """
        return self._parts()[3]

    @property
    def loss_plus(self) -> float:
        """Mean of losses_plus."""
        return _mean(self.losses_plus)

    @property
    def loss_minus(self) -> float:
        """Mean of losses_minus."""
        return _mean(self.losses_minus)

    @property
    def projected_grad(self) -> float:
        """Mean of projected_grads."""
        return _mean(self.projected_grads)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


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
    below half an ulp. The master is derived anew whenever somebody else has written the weights,
    and kept until `release` frees it.
    A pass compares the weights with their master; with `closure` and one direction three more
    write them: plus, minus, update.

    Whatever ends an evaluation early (an exception, Ctrl-C, a loss that is not finite) leaves the
    weights exactly as they were. No global random state is touched.

    Where the layer is on a GPU and the losses are tensors there, nothing waits for the device
    between the evaluations and the update: the projected gradient is computed there. For a CUDA
    graph, first take a whole step as the graph will, by `plus`, `minus` and `update` with a seed in
    device memory, which loads the kernels; then open one before the capture, with the seed that
    replays will change, and keep it as long as the graph, which writes its masters.

    Args:
        layer: a module (its parameters that require grad are tuned), a tensor, or an iterable of
            both. z of the parameter with ordinal i among all parameters has stream i. Of a DTensor,
            each process moves its own shard, by its part of the full tensor's z. A write of others
            anywhere in the base of a view counts as one to the view, whose master is made anew.
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
        TypeError: the layer is none of the three, or a parameter is not float32, bfloat16 or
            float16.
        NotImplementedError: there is no kernel for the device of a parameter.
        RuntimeError: another step has the layer perturbed; or `closure` gave a parameter other
            memory.
        With `closure` also: TypeError where its loss is no number, ValueError where it is several.
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
        self._tuned = adopted(layer)
        self._operands = [t.operand for t in self._tuned]
        for operand in self._operands:
            check_device_numbers("seed", seed, torch.int64, 1, operand.out.device)
        # A move that is beyond the dtype by itself is not made.
        self._most = min(torch.finfo(o.out.dtype).max for o in self._operands) / LARGEST_NORMAL
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
        with Held(__file__):
            return self._finish(plus, minus, max_loss)

    def _run(self, closure: Callable[[], Loss]) -> StepResult:
        plus: list[Loss] = []
        minus: list[Loss] = []
        self._refuse_if_touched()
        with Held(__file__) as held:
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
        with Held(__file__) as held:
            try:
                self._write(scale, direction)
                with held.lifted():
                    yield
            finally:
                self._restore()

    def _refuse_if_touched(self) -> None:
        for t in self._tuned:
            if t.entry.perturbed is not None:
                raise perturbed_error(t.name)
            if t.entry.was_written() or t.entry.moves != t.moves:
                raise written_error(t.name)
        self._refuse_if_elsewhere()

    def _refuse_if_elsewhere(self) -> None:
        for t in self._tuned:
            if t.is_elsewhere:
                raise written_error(t.name)

    def _write(self, scale: float, direction: int) -> None:
        for t in self._tuned:
            t.entry.perturbed = t.operand.out
        with own_writes(self._tuned):
            self._perturb(scale, direction)

    def _perturb(self, scale: float, direction: int) -> None:
        perturb_layer(self._operands, self._seed, scale, direction)

    def _restore(self) -> None:
        move_masters(self._tuned, [], [], [])
        # What an evaluation gave it in place of its memory was made of perturbed weights.
        for t in self._tuned:
            live, out = t.live, t.operand.out
            if t.is_elsewhere and is_whole(live) and live.shape == out.shape:
                # Not of `out`, whose memory may be freed.
                live.detach().copy_(t.entry.master.to(out.dtype))

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
        move_masters(self._tuned, self._seeds(), scales, range(len(scales)), keep=keep)

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
        move_masters(self._tuned, self._seeds(), scales.float(), queries, gate=gate, keep=keep)
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
    tuned = adopted(layer)
    check_directions(seeds, scales, queries, tuned[0].live.device)
    with Held(__file__):
        move_masters(tuned, seeds, scales, [*map(int, queries)], keep=keep)


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
