"""The random choices of a run, each a pure function of its seed, so that it can be taken up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of a step's perturbation: a pure function of the run's seed and the step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_indices(seed: int, step: int, size: int, batch_size: int) -> Sequence[int]:
    """The examples of a step (from 1): epochs in random order, each without its short remainder.

    A pure function of its arguments, so that a run can be taken up at any step.
    """
    epoch, position = divmod(step - 1, size // batch_size)
    order = _order_of(seed, epoch, size)
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def batch_of(examples: Sequence[T], seed: int, step: int, batch_size: int) -> list[T]:
    """Those of a step (from 1), by `batch_indices`."""
    return [examples[i] for i in batch_indices(seed, step, len(examples), batch_size)]


@lru_cache(maxsize=2)  # sorting a large set takes longer than many a step
def _order_of(seed: int, epoch: int, size: int) -> NDArray[np.intp]:
    """The examples in the order of an epoch, from 0; not to be written to.

    Sorting raw words rests on numpy's promise of stable bit streams, which does not cover its
    shuffles.
    """
    words = np.random.SeedSequence((seed, epoch), spawn_key=(1,)).generate_state(size, np.uint64)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
