"""Zeroth-order fine-tuning of one decoder layer, by forward passes only."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.adapter import CONFIG_FILE, dtype_name, layer_fingerprint, save_adapter
from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.probe import probe
from dlzo.scoring import EncodedExample, PrefixCache, Scorer
from dlzo.tasks import Split, get_task, load_split
from dlzo_kernels import zo_step

METHODS = ("dominant",)
METRICS_FILE = "metrics.json"
_LEAST = {"steps": 1, "batch_size": 1, "eval_every": 1, "seed": 0, "prefix_cache_mb": 0}


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how.

    Attributes:
        task: name of the task.
        method: "dominant": two-point zeroth-order steps on one decoder layer.
        layer: index of the tuned decoder layer, None to let the probe find it.
        steps: number of steps.
        batch_size: examples in a step; an epoch's short remainder is left out.
        eps: size of the perturbation.
        lr: learning rate, constant. The default suits a model of 0.1 billion parameters; for
            7 billion, 1e-7 to 5e-6.
        seed: fixes the order of the examples and every perturbation.
        eval_every: steps from one validation to the next; the last step is always validated.
        prefix_cache_mb: the most memory, in 10^6 bytes, for the tuned layer's inputs, which never
            change; 0 computes them anew at each step.
        prefix_cache_dir: folder for those beyond it, found again by later runs; None keeps none.

    Raises:
        UserError: a value is out of its range.
    """

    task: str
    method: str = "dominant"
    layer: int | None = None
    steps: int = 300
    batch_size: int = 16
    eps: float = 1e-3
    lr: float = 3e-4
    seed: int = 0
    eval_every: int = 100
    prefix_cache_mb: int = 1000
    prefix_cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not known: choose {' or '.join(METHODS)}")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}")
        if self.seed >= 1 << 63:
            raise UserError(f"seed is {self.seed}: give one below 2**63")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(f"eps is {self.eps}: give a number above 0, such as 1e-3")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise UserError(f"lr is {self.lr}: give a number of 0 or above, such as 3e-4")


class Evaluation(TypedDict):
    """Share of right answers and mean cross-entropy over the options, None if it is not finite."""

    accuracy: float
    loss: float | None


class StepEvaluation(Evaluation):
    """An evaluation of the weights after a step; step 0 is the untuned model."""

    step: int


class HistoryEntry(TypedDict, total=False):
    """One step; `train_loss` is the mean of the two points, None if it is not finite."""

    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float


class Metrics(TypedDict):
    """The result of a run, as in metrics.json.

    `zero_shot` (untuned) and `test` (best weights; None if interrupted) are on the test split,
    `best` and `final` on the validation split.
    """

    model: str
    task: str
    method: str
    layer: int
    steps: int
    batch_size: int
    eps: float
    lr: float
    seed: int
    dtype: str
    zero_shot: Evaluation
    best: StepEvaluation
    final: StepEvaluation
    test: Evaluation | None
    interrupted: bool
    skipped: int
    step_ms_median: float | None
    seconds: float
    peak_rss_mb: float
    history: list[HistoryEntry]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    data_dir: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[HistoryEntry], None] = lambda entry: None,
) -> Metrics:
    """Tunes one decoder layer and writes its best weights and the metrics to the folder `out`.

    The model is left with the best weights. Ctrl-C ends the run early with the best weights so far;
    it is raised again only where a result in `out` would be lost to an untuned layer.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer.
        config: what to train and how.
        data_dir: folder of train.jsonl, validation.jsonl and test.jsonl.
        out: folder of the result, written as a whole when the run ends.
        overwrite: replace an earlier result in `out`.
        on_progress: called with the history's entry of each step, and of step 0.

    Raises:
        UserError: the configuration does not fit the model or the data, or `out` cannot be written;
            nothing has been changed.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    _check_out(out, overwrite)
    task = get_task(config.task)
    examples = {
        split: load_split(task, data_dir, split) for split in ("train", "validation", "test")
    }
    if config.batch_size > len(examples["train"]):
        raise UserError(
            f"batch_size is {config.batch_size} and {str(data_dir)!r} has {len(examples['train'])} "
            "examples to train on: give a smaller batch"
        )
    layer_index = _find_layer(model, tokenizer, config.layer)
    cache = PrefixCache(config.prefix_cache_mb * 10**6, config.prefix_cache_dir)
    layer = decoder_layers(model)[layer_index]
    scorer = Scorer(model, tokenizer, layer, loss=task.loss, cache=cache)
    if task.loss == "gold":
        examples["train"] = [example.gold_only() for example in examples["train"]]
    encoded = {split: scorer.encode(rows) for split, rows in examples.items()}
    # Without the cache, as in `evaluate`: the same bits.
    test_scorer = Scorer(model, tokenizer, loss=task.loss)
    zero_shot = _evaluate(test_scorer, encoded["test"])
    if zero_shot["loss"] is None:
        raise UserError(
            f"the loss of model {model.name_or_path!r} in {dtype_name(model)} is not finite: load "
            "it in another dtype"
        )
    drawn = _drawn(config, len(encoded["train"]))
    scorer.cache_prefixes([encoded["train"][i] for i in drawn] + encoded["validation"])
    test = None
    with _stage(out) as stage:
        run = _Run(model, scorer, layer_index, config, encoded, stage)
        on_progress(run.history[0])
        try:
            for step in range(1, config.steps + 1):
                run.step(step)
                on_progress(run.history[-1])
            run.restore_best()
            test = _evaluate(test_scorer, encoded["test"])
        except KeyboardInterrupt:
            if run.best["step"] == 0 and out.exists():
                raise
            run.restore_best()
            # Ctrl-C may have come between the two files of an adapter.
            run.save_best()
        metrics = run.metrics(zero_shot, test, time.perf_counter() - started)
        _write_metrics(stage / METRICS_FILE, metrics)
        _swap(stage, out)
    return metrics


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    data_dir: str | Path,
    split: Split = "test",
) -> Evaluation:
    """Scores a model as it is on one split of a task's data: of "test", the same bits as in a run.

    Raises:
        UserError: the task is not known or the data cannot be read.
    """
    task_ = get_task(task)
    examples = load_split(task_, data_dir, split)
    scorer = Scorer(model, tokenizer, loss=task_.loss)
    return _evaluate(scorer, scorer.encode(examples))


class _Run:
    """The state of a run: the tuned layer, its best weights so far and what was measured."""

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: Scorer,
        layer_index: int,
        config: TrainConfig,
        encoded: dict[Split, list[EncodedExample]],
        stage: Path,
    ) -> None:
        self.model = model
        self.scorer = scorer
        self.layer_index = layer_index
        self.layer: nn.Module = decoder_layers(model)[layer_index]
        self.config = config
        self.encoded = encoded
        self.stage = stage
        self.base_fingerprint = layer_fingerprint(self.layer)
        self.history: list[HistoryEntry] = [{"step": 0}]
        self.step_ms: list[float] = []
        self.skipped = 0
        self.final = self._validate()
        self._keep_as_best(self.final)

    def step(self, step: int) -> None:
        """Does a step, and validates when it is due."""
        config = self.config
        train_set = self.encoded["train"]
        indices = batch_indices(config.seed, step, len(train_set), config.batch_size)
        batch = [train_set[i] for i in indices]
        started = time.perf_counter()
        zo = zo_step(self.layer, step_seed(config.seed, step), config.eps, config.lr)
        losses = self.scorer.losses(self.scorer.plan(batch), [zo.plus, zo.minus])
        result = zo.update(*losses)
        self.step_ms.append(1e3 * (time.perf_counter() - started))
        self.skipped += not result.applied
        self.history.append({"step": step, "train_loss": _finite_or_none(sum(losses) / 2)})
        if step % config.eval_every == 0 or step == config.steps:
            self.final = self._validate()
            # As in MeZO, the lowest validation loss is kept: it is finer than the accuracy.
            if _loss(self.final) < _loss(self.best):
                self._keep_as_best(self.final)

    def restore_best(self) -> None:
        with torch.no_grad():
            for parameter, weights in zip(self.layer.parameters(), self.best_weights, strict=True):
                parameter.copy_(weights)

    def metrics(self, zero_shot: Evaluation, test: Evaluation | None, seconds: float) -> Metrics:
        config = self.config
        return Metrics(
            model=self.model.name_or_path,
            task=config.task,
            method=config.method,
            layer=self.layer_index,
            steps=config.steps,
            batch_size=config.batch_size,
            eps=config.eps,
            lr=config.lr,
            seed=config.seed,
            dtype=dtype_name(self.model),
            zero_shot=zero_shot,
            best=self.best,
            final=self.final,
            test=test,
            interrupted=test is None,
            skipped=self.skipped,
            step_ms_median=median(self.step_ms) if self.step_ms else None,
            seconds=seconds,
            peak_rss_mb=_peak_rss_mb(),
            history=self.history,
        )

    def _validate(self) -> StepEvaluation:
        found = _evaluate(self.scorer, self.encoded["validation"])
        entry = self.history[-1]
        entry["validation_loss"] = found["loss"]
        entry["validation_accuracy"] = found["accuracy"]
        return {"step": entry["step"], **found}

    def _keep_as_best(self, found: StepEvaluation) -> None:
        self.best_weights = [parameter.detach().clone() for parameter in self.layer.parameters()]
        self.best = found
        self.save_best()

    def save_best(self) -> None:
        """Writes the adapter; the layer holds the best weights."""
        save_adapter(
            self.stage,
            self.model,
            self.layer_index,
            base_fingerprint=self.base_fingerprint,
            info={
                "task": self.config.task,
                "method": self.config.method,
                "step": self.best["step"],
                "seed": self.config.seed,
                "eps": self.config.eps,
                "lr": self.config.lr,
                "batch_size": self.config.batch_size,
            },
        )


def step_seed(seed: int, step: int) -> int:
    """The 63-bit seed of a step's perturbation: a pure function of the run's seed and the step."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_indices(seed: int, step: int, size: int, batch_size: int) -> Sequence[int]:
    """The examples of a step (from 1): epochs in random order, each without its short remainder.

    A pure function of its arguments, so that a run can be taken up at any step. Sorting raw words
    rests on numpy's promise of stable bit streams, which does not cover its shuffles.
    """
    epoch, position = divmod(step - 1, size // batch_size)
    words = np.random.SeedSequence((seed, epoch), spawn_key=(1,)).generate_state(size, np.uint64)
    order = np.argsort(words, kind="stable")
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def _drawn(config: TrainConfig, size: int) -> list[int]:
    """The examples that the run draws in its first epoch, or in all its steps if they are fewer."""
    steps = range(1, min(config.steps, size // config.batch_size) + 1)
    drawn = {i for n in steps for i in batch_indices(config.seed, n, size, config.batch_size)}
    return sorted(drawn)


def _find_layer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int | None
) -> int:
    count = len(decoder_layers(model))
    if layer is None:
        decision = probe(model, tokenizer).decision
        if decision.layer is None:
            raise UserError(
                f"the probe finds no dominant layer in {model.name_or_path!r} "
                f"({decision.verdict}): choose one of its {count} with --layer"
            )
        return decision.layer
    if not 0 <= layer < count:
        raise UserError(f"layer is {layer}: the model has layers 0 to {count - 1}")
    return layer


def _evaluate(scorer: Scorer, examples: Sequence[EncodedExample]) -> Evaluation:
    accuracy, loss = scorer.evaluate(scorer.plan(examples))
    return {"accuracy": accuracy, "loss": _finite_or_none(loss)}


def _finite_or_none(value: float) -> float | None:
    # JSON has no NaN and no infinity.
    return value if math.isfinite(value) else None


def _loss(found: Evaluation) -> float:
    return math.inf if found["loss"] is None else found["loss"]


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"output {str(out)!r} exists: choose another folder or pass --overwrite")
    if not (out / CONFIG_FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"output {str(out)!r} is not a result of dlzo: choose another folder")


@contextmanager
def _stage(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is removed in the end, unless it has taken the place of `out`."""
    stage = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output {str(out)!r} cannot be written: {error}") from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, out: Path) -> None:
    """Puts the folder `stage` in the place of `out`."""
    if not out.exists():
        os.rename(stage, out)
        return
    replaced = out.with_name(f"{out.name}.replaced-{os.getpid()}")
    os.rename(out, replaced)
    os.rename(stage, out)
    shutil.rmtree(replaced)


def _write_metrics(path: Path, metrics: Metrics) -> None:
    """Indented JSON, but the history with one line a step."""
    head = json.dumps({**metrics, "history": []}, indent=2, allow_nan=False)
    rows = ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in metrics["history"])
    path.write_text(head.replace('"history": []', f'"history": [\n    {rows}\n  ]') + "\n")


def _peak_rss_mb() -> float:
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
