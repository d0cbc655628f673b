"""A step of a run: both losses of each direction over a batch, and the move along it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from statistics import stdev
from typing import TypeVar

from dlzo import distributed
from dlzo.config import TrainConfig
from dlzo.records import Step
from dlzo.rule import Rule
from dlzo.scoring import EncodedExample, Scorer
from dlzo.target import Target
from dlzo_kernels import ZOStep

T = TypeVar("T")


def take_step(
    rule: Rule,
    target: Target,
    scorer: Scorer,
    batch: Sequence[EncodedExample],
    config: TrainConfig,
    number: int,
    max_loss: float,
) -> Step:
    """Moves the target by one step, or leaves it where it is if a loss is above `max_loss`.

    Args:
        rule: how it moves.
        target: what is tuned.
        scorer: of its layers.
        batch: what all ranks score together.
        config: of the run.
        number: of the step, from 1.
        max_loss: a loss above it has exploded.

    Returns:
        The step's record, the same on all ranks.
    """
    lr = config.lr_at(number)
    seed, step = rule.begin(target.modules, number, config.eps, lr, config.directions)
    losses = _losses(scorer, step, batch, config.directions)
    lr = _lr_of(losses, lr, config)
    result = step.update(losses[::2], losses[1::2], max_loss=max_loss, lr=lr)
    return Step(number, seed, lr, result.projected_grads, tuple(losses), result.applied)


def with_lr(step: Step, lr: float, config: TrainConfig) -> Step:
    """The step as it would have been with another learning rate."""
    return step._replace(lr=_lr_of(step.losses, lr, config))


def _lr_of(losses: Sequence[float], lr: float, config: TrainConfig) -> float:
    """lr, or lr / std(losses) if so configured.

    Where the losses are equal or not finite it is lr, for then nothing moves. A quotient that
    overflows becomes the largest float, which a journal can hold and whose step is not applied.
    """
    if not config.lr_per_spread or not all(map(math.isfinite, losses)):
        return lr
    spread = stdev(losses)
    return min(lr / spread, sys.float_info.max) if spread > 0 else lr


def scored_here(batch: Sequence[T], directions: int) -> Sequence[T]:
    """What of a batch this rank scores: its share, or all of it where ranks take directions."""
    return distributed.share_of(batch) if _shares_examples(directions) else batch


def _shares_examples(directions: int) -> bool:
    return directions % distributed.size() != 0


def _losses(
    scorer: Scorer, step: ZOStep, batch: Sequence[EncodedExample], directions: int
) -> list[float]:
    """Plus and minus of each direction in turn, over the batch.

    The ranks take directions where these can be shared out evenly, and else examples.
    """
    mine: Sequence[int] = range(directions)
    if not _shares_examples(directions):
        mine = distributed.share_of(mine)
    sums, weights = [0.0] * (2 * directions), [0.0] * (2 * directions)
    if share := scored_here(batch, directions):
        plan = scorer.plan(share)
        # One direction at a time, so that its bits do not depend on who else is scored.
        for k in mine:
            pair, points = slice(2 * k, 2 * k + 2), [partial(step.plus, k), partial(step.minus, k)]
            sums[pair], weight = scorer.loss_sums(plan, points)
            weights[pair] = [weight, weight]
    return distributed.quotients(sums, weights)
