"""`lr="auto"`: a learning rate by short trials.

A trial takes the first steps of the run with one rate, from the untuned weights, and judges by the
loss on the last examples of the first epoch, which in all but small data sets these steps did not
see. Rates lie a factor of four apart, and the best one is interpolated. The rate is limited by the
noise that steps leave in the weights, a random walk: so it falls with the square root of their
number (docs/tuning.md has what was measured).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import score
from dlzo.metrics import loss_of
from dlzo.records import Step
from dlzo.rule import rule_of
from dlzo.sampler import batch_indices
from dlzo.scoring import PrefixCache, Scorer
from dlzo.step import scored_here, take_step, with_lr
from dlzo.target import Target
from dlzo.tasks import Example, Task
from dlzo_kernels import update_scales

STEPS = 32  # of a trial, at most
EXAMPLES = 128  # on which the losses are compared
_LEAST_GAIN = 1e-3  # of the untuned loss; less may be rounding
_RUN_STEPS_PER_TRIAL_STEP = 2  # that bear the rate of a trial as it is
_FACTOR = 4.0
_MOST_TRIALS = 12
# Trials begin where the first steps would add so much to a weight, root mean square.
_FIRST_MOVE, _FIRST_STEPS = 4e-3, 8


def find_lr(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    task: Task,
    examples: Sequence[Example],
) -> tuple[float, dict[float, float]]:
    """The learning rate for a run; takes some 100 to 150 steps, and leaves every weight as it was.

    Args:
        target: what is tuned.
        tokenizer: of its model.
        config: of the run; its lr is not looked at.
        task: of the run.
        examples: to train on.

    Returns:
        The rate, and the loss by rate of the trials, with that of the untuned weights at 0.

    Raises:
        UserError: no loss is a thousandth below that of the untuned weights, or only that of the
            last rate tried at one end; or the untuned one is not finite.
    """
    trials = _Trials(target, tokenizer, config, task, examples)
    untuned, move = trials.loss(), trials.first_move()
    if not (math.isfinite(untuned + move) and move > 0):
        raise UserError("lr is 'auto' and losses are equal or not finite: give a number as --lr")
    start, threshold = _FIRST_MOVE / move, untuned * (1 - _LEAST_GAIN)
    losses = _bracket(lambda power: trials.loss_after(start * _FACTOR**power), threshold)
    best = min(losses, key=losses.__getitem__)
    if losses[best] >= threshold or not {best - 1, best + 1} <= losses.keys():
        raise UserError(
            f"lr is 'auto' and with none tried the loss falls {_LEAST_GAIN:.1%} below "
            f"{untuned:.4f} and rises on either side: give a number as --lr, or tune another layer"
        )
    lr = start * _FACTOR ** _parabola_minimum(losses, untuned)
    if config.steps > _RUN_STEPS_PER_TRIAL_STEP * trials.steps:
        lr *= math.sqrt(_RUN_STEPS_PER_TRIAL_STEP * trials.steps / config.steps)
    tried = {start * _FACTOR**power: loss for power, loss in sorted(losses.items())}
    return float(f"{lr:.2g}"), {0.0: untuned, **tried}


class _Trials:
    """The first steps of a run, to be taken and taken back."""

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        task: Task,
        examples: Sequence[Example],
    ) -> None:
        self.target, self.config, self.rule = target, config, rule_of(config)
        self.task, self.weights = task, target.weights()
        cache, layers = PrefixCache(config.prefix_cache_mb * 10**6), target.decoder_layers
        model = target.model
        self.scorer = Scorer(model, tokenizer, layers, loss=task.loss, cache=cache)
        count = config.batch_size
        self.steps, epoch = min(STEPS, config.steps), len(examples) // count
        last = range(max(1, epoch + 1 - math.ceil(EXAMPLES / count)), epoch + 1)
        batches, judged = (
            [batch_indices(config.seed, number, len(examples), count) for number in numbers]
            for numbers in (range(1, self.steps + 1), last)
        )
        drawn = sorted({i for batch in (*batches, *judged) for i in batch})
        encoded = self.scorer.encode(task.drawn([examples[i] for i in drawn]))
        by_index = dict(zip(drawn, encoded, strict=True))
        self.batches = [[by_index[i] for i in batch] for batch in batches]
        self.judged = [by_index[i] for batch in judged for i in batch]
        shares = (scored_here(batch, config.directions) for batch in (self.judged, *self.batches))
        self.scorer.cache_prefixes([example for share in shares for example in share])

    def loss(self) -> float:
        """Of the weights as they are."""
        return loss_of(score(self.scorer, self.task, self.judged))

    def first_move(self) -> float:
        """Root mean square of what a step with an lr of 1 adds to a weight of the untuned layer."""
        # With lr = 0 a step leaves every bit.
        still = islice(self._take(0.0), _FIRST_STEPS)
        steps = [with_lr(step, 1.0, self.config) for step in still]
        scales = [scale for step in steps for scale in update_scales(step.lr, step.gradients)]
        # An element of U V^T / r has the variance 1 / r.
        variance = 1 / max(1, self.rule.rank)
        return math.sqrt(variance * sum(scale * scale for scale in scales) / len(steps))

    def loss_after(self, lr: float) -> float:
        """The loss when the steps are taken; then the weights are again as they were."""
        if lr * self.config.weight_decay >= 1:  # would leave nothing of the weights
            return math.inf
        try:
            deque(self._take(lr), maxlen=0)
            return self.loss()
        finally:
            self.target.restore(self.weights)

    def _take(self, lr: float) -> Iterator[Step]:
        config = replace(self.config, lr=lr, lr_decay="none")
        for number, batch in enumerate(self.batches, start=1):
            yield take_step(
                self.rule, self.target, self.scorer, batch, config, number, max_loss=math.inf
            )


def _bracket(trial: Callable[[int], float], threshold: float) -> dict[int, float]:
    """Losses by powers of the factor, such that the best power has a worse one on either side.

    Only a loss below the threshold helps.
    """
    losses = {0: trial(0)}
    while len(losses) < _MOST_TRIALS:
        best = min(losses, key=losses.__getitem__)
        # Where nothing helps, the rates are too large.
        wanted = (best + 1, best - 1) if losses[best] < threshold else (min(losses) - 1,)
        power = next((power for power in wanted if power not in losses), None)
        if power is None:
            break
        losses[power] = trial(power)
    return losses


def _parabola_minimum(losses: dict[int, float], untuned: float) -> float:
    """Where a parabola through the lowest loss and its neighbours is lowest.

    How far above the untuned loss a rate explodes says nothing of where the lowest one is.
    """
    best = min(losses, key=losses.__getitem__)
    left, right = (min(losses[best + side], untuned) - losses[best] for side in (-1, 1))
    return best + (left - right) / (2 * (left + right)) if left + right > 0 else best
