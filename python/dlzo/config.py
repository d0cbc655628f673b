"""The configuration of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np

from dlzo.errors import UserError

DECAYS = ("none", "linear", "cosine")
PARTS = ("all", "attention", "mlp")
CHANNELS = ("all", "outlier")
MAX_DIRECTIONS, MAX_STEPS = (1 << 16) - 1, (1 << 32) - 1  # what a journal holds
MAX_RANK = 1024  # a larger one is not low, and takes memory
# By method: the best of three on SST-2 (docs/tuning.md).
LEARNING_RATES = {"dominant": 3e-4, "mezo": 3e-5, "lozo": 3e-5, "lora": 3e-3}
_LORA_RANK, _LOZO_RANK = 8, 2  # as in MeZO and in LOZO
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "eval_every", "directions", "sync_steps"), 1),
    **dict.fromkeys(("rank", "interval"), 1),
    **dict.fromkeys(("seed", "prefix_cache_mb"), 0),
}


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how.

    `dataclasses.replace` with another method keeps the lr and rank of the first one, which are
    numbers by then: give `lr=None, rank=None` beside it for those of the new one.

    Attributes:
        task: name of the task, or path of a .yaml file that describes it.
        method: two-point zeroth-order steps, "dominant" on one decoder layer or a few, "mezo"
            (arXiv 2305.17333) on all parameters of the model, but exact, from a float32 master of
            all of them: 4 bytes a parameter beside the weights and a copy of the best ones;
            "lozo" (arXiv 2410.07698) on all parameters or the given layers, along directions of
            low rank, as exact; "lora" on LoRA adapters of all layers or of the given ones, by PEFT,
            with MeZO's choice of matrices (it has eps 1e-2 and lr 5e-5 to 1e-4 for them).
        layer: index of the tuned decoder layer, or of several; None to let the probe find it, or
            for all of them, by the method.
        part: what of the layer is tuned: "all", "attention" or "mlp".
        channels: of the residual stream, into which what is tuned of the layer writes: "all",
            "outlier" for the `top` ones by their largest activation, or their numbers.
        top: which share of the channels are outliers.
        steps: number of steps.
        batch_size: examples in a step; an epoch's short remainder is left out.
        eps: size of the perturbation.
        lr: learning rate; "auto" to find it by short trials; None for that of the method in
            LEARNING_RATES, which suits a model of 0.1 billion parameters; for 7 billion, 1e-7 to
            5e-6.
        lr_decay: how it falls towards 0 over the steps: "none", "linear" or "cosine".
        lr_per_spread: whether each step divides it by the standard deviation of its own losses, as
            FZOO does (arXiv 2506.09034, there with one-sided differences); a good lr is then
            smaller, by about that deviation. It takes several directions: with one, every step has
            the same length, whatever its losses.
        weight_decay: before it moves, a step multiplies matrices by 1 - lr * weight_decay.
        seed: fixes the order of the examples and every perturbation.
        eval_every: steps from one validation to the next; the last step is always validated.
        prefix_cache_mb: the most memory, in 10^6 bytes, for the tuned layer's inputs, which never
            change; 0 computes them anew at each step.
        prefix_cache_dir: folder for those beyond it, found again by later runs; None keeps none.
        rank: of the directions of "lozo", or of the adapters of "lora"; None for 2 or 8.
        interval: steps for which "lozo" stays in one subspace.
        directions: perturbations in a step, whose updates are averaged.
        sync_steps: steps from one fsync of the journal to the next: what a power cut may take.
        sync_seconds: the most seconds from one fsync to the next.

    Raises:
        UserError: a value is out of its range.
    """

    task: str
    method: str = "dominant"
    layer: int | Sequence[int] | None = None
    part: str = "all"
    channels: str | Sequence[int] = "all"
    top: float = 0.01
    steps: int = 300
    batch_size: int = 16
    eps: float = 1e-3
    lr: float | Literal["auto"] | None = None
    lr_decay: str = "none"
    lr_per_spread: bool = False
    weight_decay: float = 0.0
    seed: int = 0
    eval_every: int = 100
    prefix_cache_mb: int = 1000
    prefix_cache_dir: str | None = None
    rank: int | None = None
    interval: int = 50
    directions: int = 1
    sync_steps: int = 100
    sync_seconds: float = 5.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are given, lowest first."""
        given = [self.layer] if isinstance(self.layer, int) else self.layer or ()
        return tuple(sorted(set(given)))

    @property
    def given_rank(self) -> int:
        """The rank, which is a number from the beginning, whatever was left out."""
        assert self.rank is not None
        return self.rank

    @property
    def given_lr(self) -> float:
        """The learning rate, which is a number once "auto" has been found."""
        assert isinstance(self.lr, int | float)
        return float(self.lr)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 1: the whole lr at the first one."""
        lr, done = self.given_lr, (step - 1) / self.steps
        if self.lr_decay == "linear":
            return lr * (1 - done)
        if self.lr_decay == "cosine":
            return lr * (1 + math.cos(math.pi * done)) / 2
        return lr

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, _plain(value))
        self._check_types()
        for name in ("lr", *(name for name, kind in _kinds().items() if kind is float)):
            if type(value := getattr(self, name)) is int:
                object.__setattr__(self, name, as_float(value))
        if self.rank is None:
            rank = _LORA_RANK if self.method == "lora" else _LOZO_RANK
            object.__setattr__(self, "rank", rank)
        if self.lr is None:
            object.__setattr__(self, "lr", LEARNING_RATES.get(self.method))
        self._check_what_is_tuned()
        self._check_channels()
        self._check_numbers()
        self._check_rates()

    def _check_what_is_tuned(self) -> None:
        if self.method not in LEARNING_RATES:
            known = " or ".join(LEARNING_RATES)
            raise UserError(f"method {self.method!r} is not known: choose {known}")
        if self.part not in PARTS:
            raise UserError(f"part {self.part!r} is not known: choose {' or '.join(PARTS)}")
        if isinstance(self.layer, Sequence) and not all(type(i) is int for i in self.layer):
            raise UserError(f"layer is {repr(self.layer)[:60]}: give one number, or a few")
        if self.method == "mezo" and self.layers:
            raise UserError("method 'mezo' tunes all parameters: leave out layer")
        if self.method == "lora" and self.part != "all":
            raise UserError(f"part is {self.part!r} and method 'lora' has its own: leave it out")
        if self.method != "dominant" and self.part != "all" and not self.layers:
            raise UserError(f"part is {self.part!r} of all parameters: leave it out")

    def _check_channels(self) -> None:
        if isinstance(self.channels, str) and self.channels not in CHANNELS:
            raise UserError(f"channels are {self.channels!r}: choose {' or '.join(CHANNELS)}")
        if not isinstance(self.channels, str) and not (
            self.channels and all(type(i) is int and i >= 0 for i in self.channels)
        ):
            raise UserError(f"channels are {str(self.channels)[:60]}: give their numbers, from 0")
        if self.channels != "all" and self.method != "dominant":
            raise UserError(f"method {self.method!r} tunes all channels: leave out channels")
        if not 0 < self.top <= 1:
            raise UserError(f"top is {self.top}: give a share of the channels, such as 0.01")

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}")
        most = {"steps": MAX_STEPS, "directions": MAX_DIRECTIONS, "rank": MAX_RANK}
        for name, bound in most.items():
            if getattr(self, name) > bound:
                raise UserError(f"{name} is {getattr(self, name)}: give at most {bound}")
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}: give one below 2**63")
        if not 0 <= self.sync_seconds < math.inf:
            raise UserError(
                f"sync_seconds is {self.sync_seconds}: give a finite number of 0 or above"
            )

    def _check_rates(self) -> None:
        check_eps(self.eps)
        lr = 0.0 if self.lr == "auto" else self.lr
        if not isinstance(lr, float) or not (math.isfinite(lr) and lr >= 0):
            raise UserError(f"lr is {lr!r}: give a number of 0 or above, such as 3e-4, or 'auto'")
        if self.lr_decay not in DECAYS:
            raise UserError(f"lr_decay {self.lr_decay!r}: choose {' or '.join(DECAYS)}")
        if not (self.weight_decay >= 0 and lr * self.weight_decay < 1):
            raise UserError(
                f"weight_decay is {self.weight_decay}: give a number of 0 or above, such as 0.01, "
                "that is below 1 when multiplied by lr"
            )
        if self.lr_per_spread and self.weight_decay:
            raise UserError("lr_per_spread has no weight decay: leave one of the two out")

    def _check_types(self) -> None:
        for name, kind in _kinds().items():
            value = getattr(self, name)
            if not _is_of(kind, value):
                raise UserError(
                    f"{name} is {value!r}: give {_WORDS.get(kind, 'a number or several')}"
                )


def as_float(number: float) -> float:
    """A number from anywhere; a whole one that no float holds is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def check_eps(eps: float) -> None:
    """Raises UserError unless a perturbation can have this size: that of `zo_step`."""
    if not 1e-37 < eps < 1e37:
        raise UserError(f"eps is {eps}: give a number between 1e-37 and 1e37, such as 1e-3")


_WORDS: dict[Any, str] = {
    **{int: "a whole number", int | None: "a whole number", float: "a number"},
    **{bool: "True or False", str: "a text", str | None: "a path"},
}


@cache
def _kinds() -> dict[str, Any]:
    """What isinstance takes for each value; that of lr is checked with its range."""
    own = {"layer": int | Sequence | None, "channels": str | Sequence}
    kinds = get_type_hints(TrainConfig) | own
    return {name: kind for name, kind in kinds.items() if name != "lr"}


def _is_of(kind: Any, value: object) -> bool:
    """Whether a value is of a kind: a bool is no int here, an int is a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _plain(value: Any) -> Any:
    """The value without paths and numbers of numpy, which JSON does not take."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def parse_config(values: Mapping[str, Any], out: Path) -> TrainConfig:
    """The configuration in a settings file from anywhere."""
    # The hints of others may have parameters, which isinstance does not take; a run has a number.
    kinds = {**_kinds(), "layer": int | list | None, "channels": str | list, "lr": float}
    for name, value in values.items():
        if not _is_of(kinds.get(name, ()), value):
            raise UserError(f"the settings in {str(out)!r} have no valid {name[:60]!r}")
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise UserError(f"the settings in {str(out)!r} are not complete: {error}") from error
