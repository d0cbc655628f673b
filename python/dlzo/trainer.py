"""Zeroth-order fine-tuning of one decoder layer, by forward passes only."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, TypedDict, cast, get_args, get_type_hints

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo import distributed
from dlzo.adapter import dtype_name, layer_fingerprint, save_adapter
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation, judge, score
from dlzo.journal import Reader, Writer, create
from dlzo.models import DEFAULT_MODEL, decoder_layers, sole_use
from dlzo.probe import probe
from dlzo.records import Event, Header, Record, Step, encode_header
from dlzo.replay import apply_steps, base_fields, differences
from dlzo.run import (
    JOURNAL_FILE,
    METRICS_FILE,
    check_free,
    existing_run,
    finish,
    new_run,
)
from dlzo.sampler import batch_indices, step_seed
from dlzo.scoring import EncodedExample, PrefixCache, Scorer
from dlzo.tasks import Example, Split, get_task, load_split
from dlzo_kernels import ZOStep, zo_step

METHODS = ("dominant",)
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "eval_every", "directions", "sync_steps"), 1),
    **dict.fromkeys(("seed", "prefix_cache_mb"), 0),
}
_log = logging.getLogger("dlzo")

# A loss this many times that of the untuned model, and at least this many nats, has exploded.
EXPLODED = 10.0
# Steps skipped in a row after which the run is given up.
DIVERGED = 20


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
        directions: perturbations in a step, whose updates are averaged.
        sync_steps: steps from one fsync of the journal to the next: what a power cut may take.
        sync_seconds: the most seconds from one fsync to the next.

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
    directions: int = 1
    sync_steps: int = 100
    sync_seconds: float = 5.0

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
        if not self.sync_seconds >= 0:
            raise UserError(f"sync_seconds is {self.sync_seconds}: give a number of 0 or above")


class StepEvaluation(Evaluation):
    """An evaluation of the weights after a step; step 0 is the untuned model."""

    step: int


class HistoryEntry(TypedDict, total=False):
    """One step; `train_loss` is the mean of the two points, None if it is not finite.

    Of a generation task, validation has a loss alone.
    """

    step: int
    train_loss: float | None
    validation_loss: float | None
    validation_accuracy: float


class Metrics(TypedDict):
    """The result of a run, as in metrics.json.

    `zero_shot` (untuned) and `test` (best weights) are on the test split, `best` and `final` on the
    validation split. `skipped` steps had a loss that was not finite or had exploded. Times and
    memory are those of the process that finished the run; `step_ms_median` is None if it did no
    step.
    """

    model: str
    task: str
    method: str
    layer: int
    steps: int
    batch_size: int
    directions: int
    eps: float
    lr: float
    seed: int
    dtype: str
    zero_shot: Evaluation
    best: StepEvaluation
    final: StepEvaluation
    test: Evaluation
    skipped: int
    step_ms_median: float | None
    seconds: float
    peak_rss_mb: float
    history: list[HistoryEntry]


OnProgress = Callable[[HistoryEntry], None]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    data_dir: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = lambda entry: None,
) -> Metrics:
    """Tunes one decoder layer; its journal, best weights and metrics go to the folder `out`.

    However it ends, the model is left with the best weights so far. A run that was stopped, by
    Ctrl-C or worse, goes on with `resume`; what `overwrite` replaces stays in OUT.replaced until
    the run is finished.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer.
        config: what to train and how.
        data_dir: folder of train.jsonl, validation.jsonl and test.jsonl.
        out: folder of the run; it is finished when it holds metrics.json.
        overwrite: replace an earlier result in `out`.
        on_progress: called with the history's entry of each step, and of step 0.

    Raises:
        UserError: the configuration does not fit the model or the data, or `out` cannot be used,
            and nothing has been changed; or the run had to stop, and can be resumed.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    distributed.from_first_rank(lambda: check_free(out, overwrite))
    with sole_use(model):
        examples = _load_examples(config, data_dir)
        layer = distributed.from_first_rank(lambda: _find_layer(model, tokenizer, config.layer))
        config = replace(config, layer=layer)
        run = _Run(model, tokenizer, config, examples, out)
        untuned = run.evaluate_untuned()
        settings = {
            "model": _absolute(model.name_or_path),
            "dtype": dtype_name(model),
            "data": str(Path(data_dir).resolve()),
            "config": asdict(config),
        }
        with ExitStack() as stack:
            distributed.from_first_rank(
                lambda: stack.enter_context(new_run(out, settings, overwrite=overwrite))
            )
            return run.complete(started, on_progress, untuned)


def resume(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    on_progress: OnProgress = lambda entry: None,
) -> Metrics:
    """Takes up the run in `out` where its journal ends; it ends in the same bits as in one go.

    Args:
        model: the run's base model, untuned.
        tokenizer: its tokenizer.
        out: folder of the run. Of a finished one, the metrics are returned as they are.
        on_progress: called with the history's entry of each step, from the last one done on.

    Raises:
        UserError: `out` holds no run, or is in use; model or data are not those of the run.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    with sole_use(model), ExitStack() as stack:
        settings = distributed.from_first_rank(lambda: stack.enter_context(existing_run(out)))
        if (metrics := distributed.from_first_rank(lambda: _finished(out))) is not None:
            return metrics
        config = _config(settings["config"], out)
        examples = _load_examples(config, settings["data"])
        config = replace(config, layer=_find_layer(model, tokenizer, config.layer))
        run = _Run(model, tokenizer, config, examples, out)
        return run.complete(started, on_progress)


class _Run:
    """A run: what its journal says so far, and the weights that follow from it.

    All that is known of a run comes from its records, one by one, whether they are read from the
    journal or just made: so a run that was taken up cannot differ from one in one go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        examples: Mapping[Split, Sequence[Example]],
        out: Path,
    ) -> None:
        self.model = model
        self.config = config
        self.out = out
        self.layer: nn.Module = decoder_layers(model)[config.layer]
        self.task = get_task(config.task)
        cache = PrefixCache(config.prefix_cache_mb * 10**6, config.prefix_cache_dir)
        self.scorer = Scorer(model, tokenizer, self.layer, loss=self.task.loss, cache=cache)
        drawn = examples["train"]
        if self.task.loss == "gold":
            drawn = [example.gold_only() for example in drawn]
        self.train_set = self.scorer.encode(drawn)
        self.validation_set = self.scorer.encode(examples["validation"])
        self.examples = examples
        self.header = _header(base_fields(model, config.layer), config, _fingerprint(examples))
        self.entry: HistoryEntry = {"step": 0}
        self.untuned: Evaluation | None = None
        self.best: StepEvaluation | None = None
        self.final: StepEvaluation | None = None
        self.test: Evaluation | None = None
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.best_weights = self._weights()
        self.step_ms = array("d")

    def evaluate_untuned(self) -> Evaluation:
        """The base model on the test split.

        Raises:
            UserError: its loss is not finite.
        """
        found = self._evaluate_test()
        if found["loss"] is None:
            raise UserError(
                f"the loss of model {self.model.name_or_path!r} in {dtype_name(self.model)} is not "
                "finite: load it in another dtype"
            )
        return found

    def complete(
        self, started: float, on_progress: OnProgress, untuned: Evaluation | None = None
    ) -> Metrics:
        """Does what is left of the run."""
        distributed.check_equal(self._digest, "the model, the data or the settings")
        try:
            with ExitStack() as stack:
                self._catch_up(distributed.from_first_rank(lambda: self._open_journal(stack)))
                if self.untuned is None:
                    self._record(Event(0, "untuned", untuned or self.evaluate_untuned()))
                self._cache_prefixes()
                self._do_steps(on_progress)
                self._restore_best()
                if self.test is None:
                    self._record(Event(self.config.steps, "test", self._evaluate_test()))
            return distributed.from_first_rank(lambda: self._finish(started))
        except OSError as error:
            raise UserError(
                f"the run in {str(self.out)!r} stopped ({error}): mend that and go on with "
                f"`dlzo train --resume {self.out}`"
            ) from error
        finally:
            self._restore_best()

    def _open_journal(self, stack: ExitStack) -> Iterable[Record]:
        """Opens the journal of the run, a new one if there is none; its records so far."""
        path = self.out / JOURNAL_FILE
        if not path.exists():
            create(path, self.header)
        reader = Reader(path)
        # Another release of dlzo may go on with the run: its noise is checked by its version.
        expected = vars(replace(self.header, library_version=reader.header.library_version))
        if differing := differences(reader.header, expected):
            raise UserError(
                f"journal {str(path)!r} is of another model or other data than there are now: "
                f"{differing}; restore them or start the run again"
            )
        deque(reader, maxlen=0)
        if reader.damage is not None:
            _log.warning("%s; the run goes on from there", reader.damage)
        self.journal = stack.enter_context(
            Writer(reader, self.config.sync_steps, self.config.sync_seconds)
        )
        return reader if distributed.size() == 1 else list(reader)

    def _catch_up(self, records: Iterable[Record]) -> None:
        """Brings state and weights to where the journal ends; of a new run, to its beginning."""
        for record in records:
            self._note(record)
        if self.entry["step"] > 0 and (self.untuned is None or self.best is None):
            raise UserError(
                f"the journal in {str(self.out)!r} has steps but no evaluation of the untuned "
                "model: start the run again"
            )
        steps = (record for record in records if isinstance(record, Step))
        if self.best is not None:
            apply_steps(self.layer, islice(steps, self.best["step"]))
            self._keep_as_best()
        apply_steps(self.layer, steps)

    def _note(self, record: Record) -> None:
        """Takes a record into account."""
        if isinstance(record, Step):
            self.entry = _entry(record)
            self.skipped += not record.applied
            self.skipped_in_a_row = 0 if record.applied else self.skipped_in_a_row + 1
            return
        found = _evaluation(record)
        if record.name == "untuned":
            self.untuned = found
        elif record.name == "test":
            self.test = found
        elif record.name == "validation":
            self.entry.update(_validation(record))
            self.final = {"step": record.step, **found}
            # As in MeZO, the lowest validation loss is kept: it is finer than the accuracy.
            if self.best is None or _loss(self.final) < _loss(self.best):
                self.best = self.final

    def _record(self, record: Record) -> None:
        if distributed.rank() == 0:
            self.journal.append(record)
        self._note(record)

    def _do_steps(self, on_progress: OnProgress) -> None:
        while True:
            if self._validation_is_due():
                self._validate()
            on_progress(self.entry)
            if self.entry["step"] == self.config.steps:
                return
            if self.skipped_in_a_row == DIVERGED:
                raise UserError(
                    f"the losses of the last {DIVERGED} steps were not finite or had exploded: the "
                    f"best weights, of step {self.best['step']}, are in {str(self.out)!r}; start "
                    "another run with a smaller lr or eps"
                )
            self._step(self.entry["step"] + 1)

    def _step(self, step: int) -> None:
        config = self.config
        indices = batch_indices(config.seed, step, len(self.train_set), config.batch_size)
        batch = [self.train_set[i] for i in indices]
        started = time.perf_counter()
        seed = step_seed(config.seed, step)
        zo = zo_step(self.layer, seed, config.eps, config.lr, directions=config.directions)
        losses = self._losses(zo, batch)
        # In a journal the untuned model's loss is finite.
        max_loss = EXPLODED * max(1.0, _loss(self.untuned))
        result = zo.update(losses[::2], losses[1::2], max_loss=max_loss)
        self._record(
            Step(step, seed, config.lr, result.projected_grads, tuple(losses), result.applied)
        )
        self.step_ms.append(1e3 * (time.perf_counter() - started))

    def _losses(self, zo: ZOStep, batch: Sequence[EncodedExample]) -> list[float]:
        """Plus and minus of each direction in turn, over the batch.

        The ranks take directions where these can be shared out evenly, and else examples.
        """
        count = self.config.directions
        mine, share = range(count), batch
        if count % distributed.size() == 0:
            mine = distributed.share_of(mine)
        else:
            share = distributed.share_of(batch)
        sums, weights = [0.0] * (2 * count), [0.0] * (2 * count)
        if share:
            plan = self.scorer.plan(share)
            # One direction at a time, so that its bits do not depend on who else is scored.
            for k in mine:
                pair, points = slice(2 * k, 2 * k + 2), [partial(zo.plus, k), partial(zo.minus, k)]
                sums[pair], weight = self.scorer.loss_sums(plan, points)
                weights[pair] = [weight, weight]
        return distributed.quotients(sums, weights)

    def _evaluate_test(self) -> Evaluation:
        # Without the cache, as in `evaluate`: the same bits.
        scorer = Scorer(self.model, self.scorer.tokenizer, loss=self.task.loss)
        return judge(scorer, self.task, self.examples["test"])

    def _cache_prefixes(self) -> None:
        """Computes once what the layers below the tuned one make of what will be scored."""
        config, size = self.config, len(self.train_set)
        epoch = range(1, min(config.steps, size // config.batch_size) + 1)
        drawn = {i for n in epoch for i in batch_indices(config.seed, n, size, config.batch_size)}
        train_set = [self.train_set[i] for i in sorted(drawn)]
        self.scorer.cache_prefixes([*train_set, *self.validation_set])

    def _validation_is_due(self) -> bool:
        step = self.entry["step"]
        done = self.final is not None and self.final["step"] == step
        return not done and (step % self.config.eval_every == 0 or step == self.config.steps)

    def _validate(self) -> None:
        step = self.entry["step"]
        distributed.check_equal(
            lambda: layer_fingerprint(self.layer), f"the layer after step {step}"
        )
        found = score(self.scorer, self.task, self.validation_set)
        self._record(Event(step, "validation", found))
        if self.best["step"] == step:
            self._keep_as_best()

    def _keep_as_best(self) -> None:
        """Keeps the weights as they are now, in memory and as the adapter in the folder."""
        self.best_weights = self._weights()
        if distributed.rank() != 0:
            return
        config = self.config
        save_adapter(
            self.out,
            self.model,
            config.layer,
            base_fingerprint=self.header.base_fingerprint,
            info={
                "task": config.task,
                "method": config.method,
                "step": self.best["step"],
                "seed": config.seed,
                "eps": config.eps,
                "lr": config.lr,
                "batch_size": config.batch_size,
            },
        )

    def _restore_best(self) -> None:
        with torch.no_grad():
            for parameter, weights in zip(self.layer.parameters(), self.best_weights, strict=True):
                parameter.copy_(weights)

    def _weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.layer.parameters()]

    def _digest(self) -> str:
        """SHA-256 of the run's header, but for the path of the model."""
        return hashlib.sha256(encode_header(replace(self.header, base_model=""))).hexdigest()

    def _finish(self, started: float) -> Metrics:
        """Writes the metrics."""
        config = self.config
        metrics = Metrics(
            model=self.model.name_or_path,
            task=config.task,
            method=config.method,
            layer=config.layer,
            steps=config.steps,
            batch_size=config.batch_size,
            directions=config.directions,
            eps=config.eps,
            lr=config.lr,
            seed=config.seed,
            dtype=dtype_name(self.model),
            zero_shot=self.untuned,
            best=self.best,
            final=self.final,
            test=self.test,
            skipped=self.skipped,
            step_ms_median=median(self.step_ms) if self.step_ms else None,
            seconds=time.perf_counter() - started,
            peak_rss_mb=_peak_rss_mb(),
            history=list(_history(Reader(self.out / JOURNAL_FILE))),
        )
        finish(self.out, _metrics_text(metrics))
        return metrics


def _finished(out: Path) -> Metrics | None:
    """The metrics of a run that is finished."""
    if not (out / METRICS_FILE).exists():
        return None
    text = (out / METRICS_FILE).read_text()
    finish(out, text)
    return json.loads(text)


def _entry(step: Step) -> HistoryEntry:
    return {"step": step.step, "train_loss": _finite_or_none(step.loss)}


def _evaluation(event: Event) -> Evaluation:
    """The figures of an event, which may be from anywhere."""
    figures = event.values.values()
    if "loss" not in event.values or not all(isinstance(f, float | int | None) for f in figures):
        raise UserError(f"the event {event.name[:60]!r} of a journal is no evaluation")
    return cast(Evaluation, dict(event.values))


def _validation(event: Event) -> HistoryEntry:
    return cast(HistoryEntry, {f"validation_{name}": v for name, v in event.values.items()})


def _history(records: Iterable[Record]) -> Iterator[HistoryEntry]:
    entry: HistoryEntry = {"step": 0}
    for record in records:
        if isinstance(record, Step):
            yield entry
            entry = _entry(record)
        elif record.name == "validation":
            entry.update(_validation(record))
    yield entry


def _header(base: Mapping[str, Any], config: TrainConfig, data_fingerprint: str) -> Header:
    settings = asdict(config)
    del settings["layer"]
    return Header(
        **base,
        data_fingerprint=data_fingerprint,
        directions=settings.pop("directions"),
        lr=float(settings.pop("lr")),
        seed=settings.pop("seed"),
        settings=settings,
    )


def _load_examples(config: TrainConfig, data_dir: str | Path) -> dict[Split, list[Example]]:
    task = get_task(config.task)
    examples = {split: load_split(task, data_dir, split) for split in get_args(Split)}
    if config.batch_size > len(examples["train"]):
        raise UserError(
            f"batch_size is {config.batch_size} and {str(data_dir)!r} has {len(examples['train'])} "
            "examples to train on: give a smaller batch"
        )
    return examples


def _fingerprint(examples: Mapping[Split, Sequence[Example]]) -> str:
    """SHA-256 of all splits."""
    digest = hashlib.sha256()
    for split, rows in examples.items():
        digest.update(f"{split} {len(rows)}\n".encode())
        for row in rows:
            digest.update(json.dumps(asdict(row), sort_keys=True).encode())
    return digest.hexdigest()


def _config(values: Mapping[str, Any], out: Path) -> TrainConfig:
    """The configuration in a settings file from anywhere."""
    types = get_type_hints(TrainConfig)
    for name, value in values.items():
        # An int is a float in JSON.
        kind = types.get(name, ())
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"the settings in {str(out)!r} have no valid {name[:60]!r}")
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise UserError(f"the settings in {str(out)!r} are not complete: {error}") from error


def _absolute(name: str) -> str:
    """A model's name; a path holds from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and name != DEFAULT_MODEL else name


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


def _finite_or_none(value: float) -> float | None:
    # JSON has no NaN and no infinity.
    return value if math.isfinite(value) else None


def _loss(found: Evaluation) -> float:
    return math.inf if found["loss"] is None else found["loss"]


def _metrics_text(metrics: Metrics) -> str:
    """Indented JSON, but the history with one line a step."""
    head = json.dumps({**metrics, "history": []}, indent=2, allow_nan=False)
    rows = ",\n    ".join(json.dumps(entry, allow_nan=False) for entry in metrics["history"])
    return head.replace('"history": []', f'"history": [\n    {rows}\n  ]') + "\n"


def _peak_rss_mb() -> float:
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
