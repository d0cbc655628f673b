"""How a step's record moves the weights: along which directions and how far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from dlzo.config import MAX_RANK, TrainConfig, as_float
from dlzo.journal import Reader, setting_error
from dlzo.records import Step
from dlzo.sampler import step_seed
from dlzo_kernels import LowRankStep, ZOStep, low_rank_replay, update_scales, zo_replay, zo_step
from dlzo_kernels.parameters import Layer

_CHUNK = 1024  # updates in one pass over the weights


@dataclass(frozen=True)
class Rule:
    """All that a step needs beside its record, the same in the run and in its replay.

    Attributes:
        seed: of the run, from which those of its steps come.
        weight_decay: as in `zo_step`.
        rank: of the directions of matrices; 0: full.
        interval: steps for which V of low-rank directions stays the same.
    """

    seed: int
    weight_decay: float = 0.0
    rank: int = 0
    interval: int = 1

    def begin(
        self, layer: Layer, number: int, eps: float, lr: float, directions: int
    ) -> tuple[int, ZOStep]:
        """The seed of the step of that number, from 1, and the open step."""
        seed = step_seed(self.seed, number)
        decay = self.weight_decay
        if not self.rank:
            return seed, zo_step(layer, seed, eps, lr, directions=directions, weight_decay=decay)
        return seed, LowRankStep(
            layer,
            seed,
            eps,
            lr,
            rank=self.rank,
            v_seed=self._v_seed(number),
            directions=directions,
            weight_decay=decay,
        )

    def replay(self, layer: Layer, steps: Iterable[Step]) -> None:
        """Moves a layer, and its float32 master, by recorded steps.

        One pass over it per 1,024 updates; with weight decay or low-rank directions per step.
        """
        if not self.rank and not self.weight_decay:
            all_updates = _updates(steps)
            while chunk := list(islice(all_updates, _CHUNK)):
                zo_replay(layer, *zip(*chunk, strict=True))
            return
        for step in steps:
            if updates := list(_updates([step])):
                _, scales, queries = zip(*updates, strict=True)
                keep = 1 - step.lr * self.weight_decay
                if self.rank:
                    v_seed = self._v_seed(step.step)
                    low_rank_replay(layer, step.seed, v_seed, self.rank, scales, keep=keep)
                else:
                    zo_replay(layer, [step.seed] * len(scales), scales, queries, keep=keep)

    def _v_seed(self, number: int) -> int:
        return step_seed(self.seed, number - (number - 1) % self.interval)


def rule_of(config: TrainConfig) -> Rule:
    """The rule of a run."""
    if config.method == "lozo":
        return Rule(config.seed, config.weight_decay, config.given_rank, config.interval)
    return Rule(config.seed, config.weight_decay)


def rule_in(reader: Reader) -> Rule:
    """The rule in a journal's header, which may be from anywhere.

    Raises:
        UserError: it is not valid.
    """
    header, settings = reader.header, reader.header.settings
    weight_decay = settings.get("weight_decay", 0.0)
    is_number = isinstance(weight_decay, int | float)
    if not is_number or not 0 <= header.lr * as_float(weight_decay) < 1:
        raise setting_error(reader, "weight_decay")
    if settings.get("method") != "lozo":
        return Rule(header.seed, weight_decay)
    interval = settings.get("interval")
    if type(interval) is not int or interval < 1:
        raise setting_error(reader, "interval")
    return Rule(header.seed, weight_decay, rank_in(reader), interval)


def rank_in(reader: Reader) -> int:
    """The rank in a journal's header, which may be from anywhere.

    Raises:
        UserError: it is not valid.
    """
    rank = reader.header.settings.get("rank")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise setting_error(reader, "rank")
    return rank


def _updates(steps: Iterable[Step]) -> Iterator[tuple[int, float, int]]:
    """(seed, scale, query) of each direction that moved the weights."""
    for step in steps:
        scales = update_scales(step.lr, step.gradients)
        if step.applied and any(scales):
            for query, scale in enumerate(scales):
                yield step.seed, scale, query
