"""A learning rate by forward passes: a line search along some first steps, all taken at once.

To second order and on average, a step with projected gradient p along a Gaussian z changes the loss
by -lr |g|^2 + lr^2 / 2 E[p^2] tr H, with gradient g and Hessian H: MeZO's descent lemma (arXiv
2305.17333, section 4). K such steps from the same weights, taken at once, change it by K times that
and by lr^2 K^2 / 2 g'Hg, which is small for few steps in many dimensions. So one lr is the best for
both, and the sum is large enough to be seen on a few examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import score
from dlzo.metrics import loss_of
from dlzo.rule import rule_of
from dlzo.sampler import batch_indices
from dlzo.scoring import EncodedExample, Scorer
from dlzo.step import take_step, with_lr
from dlzo.target import Target
from dlzo.tasks import Example, get_task

STEPS = 32
EXAMPLES = 128  # on which the losses are compared
DOUBLINGS = 16
_ENOUGH = 1.05  # times the untuned loss: beyond it no larger lr is tried


def find_lr(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    examples: Sequence[Example],
) -> tuple[float, dict[float, float]]:
    """The learning rate for a run; costs about as much as 50 steps.

    Projected gradients are taken at the untuned weights on the first batches of the run, losses on
    the last ones of its first epoch. The weights are left as they were.

    Args:
        target: what is tuned.
        tokenizer: of its model.
        config: of the run; its lr is not looked at.
        examples: to train on.

    Returns:
        The rate with the lowest loss, and the losses by rate: doubled from far too small ones on,
        and with 0.

    Raises:
        UserError: the losses are all the same or not finite, or fall with no rate.
    """
    # With lr = 0 a step leaves every bit.
    still = replace(config, lr=0.0)
    rule, weights = rule_of(config), target.weights()
    task = get_task(config.task)
    scorer = Scorer(target.model, tokenizer, target.decoder_layers, loss=task.loss)
    train_set = scorer.encode(task.drawn(examples))

    def batch(number: int) -> list[EncodedExample]:
        size = len(train_set)
        return [train_set[i] for i in batch_indices(config.seed, number, size, config.batch_size)]

    steps = [
        take_step(rule, target, scorer, batch(number), still, number, math.inf)
        for number in range(1, STEPS + 1)
    ]
    last = len(train_set) // config.batch_size
    first = max(1, last + 1 - max(1, EXAMPLES // config.batch_size))
    judged = [example for number in range(first, last + 1) for example in batch(number)]

    def loss(lr: float) -> float:
        rule.replay(target.modules, [with_lr(step, lr, config) for step in steps])
        try:
            return loss_of(score(scorer, task, judged))
        finally:
            target.restore(weights)

    losses = {0.0: loss(0.0)}
    norm = math.sqrt(
        sum(g * g * with_lr(s, 1.0, config).lr ** 2 for s in steps for g in s.gradients)
    )
    if not (math.isfinite(losses[0.0] + norm) and norm > 0):
        raise UserError("lr is 'auto' and losses are equal or not finite: give a number as --lr")
    lr = config.eps * config.directions / (8 * norm)
    for _ in range(DOUBLINGS):
        lr = float(f"{2 * lr:.1e}")
        losses[lr] = loss(lr)
        if not losses[lr] <= _ENOUGH * losses[0.0]:
            break
    best = min(losses, key=losses.__getitem__)
    if best == 0:
        raise UserError(
            f"lr is 'auto' and with none the loss falls below {losses[0.0]:.4f}: give a number as "
            "--lr, or tune another layer"
        )
    return best, losses
