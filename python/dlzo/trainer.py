"""Zeroth-order fine-tuning, by forward passes only."""

from __future__ import annotations

import hashlib
import logging
import shlex
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo import distributed
from dlzo.activations import outlier_channels
from dlzo.adapter import save_adapter
from dlzo.channels import chosen_channels
from dlzo.config import TrainConfig, parse_config
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation, judge, score
from dlzo.files import user_path
from dlzo.header import adapter_info, check_same_run, header_of
from dlzo.journal import Reader, Writer, create
from dlzo.learning_rate import find_lr
from dlzo.lora import Lora
from dlzo.metrics import (
    HistoryEntry,
    Metrics,
    Progress,
    history,
    known,
    loss_of,
    metrics_text,
    peak_rss_mb,
)
from dlzo.models import absolute_name, decoder_layers, dtype_name, sole_use
from dlzo.probe import probe
from dlzo.records import Event, Record, Step, encode_header
from dlzo.rule import rule_of
from dlzo.run import (
    JOURNAL_FILE,
    check_cache,
    check_free,
    delete_replaced,
    existing_run,
    finish,
    new_run,
    read_metrics,
)
from dlzo.sampler import batch_indices, batch_of
from dlzo.scoring import EncodedExample, PrefixCache, Scorer
from dlzo.sites import check_keeps_weights
from dlzo.step import scored_here, take_step
from dlzo.target import Target
from dlzo.tasks import (
    Example,
    Split,
    Task,
    absolute_task,
    fingerprint,
    get_task,
    load_splits,
)
from dlzo_kernels import release

_log = logging.getLogger("dlzo")

# A loss this many times that of the untuned model, and at least this many nats, has exploded.
EXPLODED = 10.0
# Steps skipped in a row after which the run is given up.
DIVERGED = 20

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
    """Tunes a model, or a part of it; the journal, best weights and metrics go to the folder `out`.

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

    Returns:
        The figures of the run, as in metrics.json.

    Raises:
        UserError: the configuration does not fit the model or the data, or `out` cannot be used,
            and nothing has been changed; or the run had to stop, and can be resumed.
    """
    started = time.perf_counter()
    out = user_path(out).resolve()
    distributed.from_first_rank(lambda: check_free(out, overwrite))
    check_cache(config.prefix_cache_dir, out)
    with sole_use(model):
        task = get_task(config.task)
        examples = load_examples(task, config, data_dir)
        check_keeps_weights(model.eval())
        config = distributed.from_first_rank(lambda: resolved(model, tokenizer, config))
        config = _with_absolute_paths(config)
        with ExitStack() as stack:
            with target_of(model, config).undone_by_error() as target:
                stack.callback(release, target.modules)  # masters take four bytes a weight
                if config.lr == "auto":
                    lr, _ = find_lr(target, tokenizer, config, task, examples["train"])
                    config = replace(config, lr=lr)
                run = _Run(target, tokenizer, config, task, examples, out)
                untuned = run.evaluate_untuned()
                settings = {
                    "model": absolute_name(model.name_or_path or ""),
                    "dtype": dtype_name(model.dtype),
                    "device": _device_name(model),
                    "data": str(user_path(data_dir).resolve()),
                    "config": asdict(config),
                }
                distributed.from_first_rank(
                    lambda: stack.enter_context(new_run(out, settings, overwrite=overwrite))
                )
            return run.complete(started, on_progress, untuned)


def resume(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    prefix_cache_dir: str | Path | None = None,
    on_progress: OnProgress = lambda entry: None,
) -> Metrics:
    """Takes up the run in `out` where its journal ends; it ends in the same bits as in one go.

    Args:
        model: the run's base model, untuned.
        tokenizer: its tokenizer.
        out: folder of the run. Of a finished one, the metrics are returned as they are.
        prefix_cache_dir: another folder for the prefixes of a run that has one; None for its own.
        on_progress: called with the history's entry of each step, from the last one done on.

    Returns:
        The figures of the run, as in metrics.json.

    Raises:
        UserError: `out` holds no run, or is in use; model or data are not those of the run.
    """
    started = time.perf_counter()
    out = user_path(out).resolve()
    with sole_use(model), ExitStack() as stack:
        settings = distributed.from_first_rank(lambda: stack.enter_context(existing_run(out)))
        if (metrics := distributed.from_first_rank(lambda: _finished(out))) is not None:
            return metrics
        config = parse_config(settings["config"], out)
        if prefix_cache_dir is not None:
            check_cache(prefix_cache_dir, out)
            config = _with_absolute_paths(replace(config, prefix_cache_dir=str(prefix_cache_dir)))
        task = get_task(config.task)
        examples = load_examples(task, config, settings["data"])
        config = resolved(model, tokenizer, config)
        with target_of(model, config).undone_by_error() as target:
            stack.callback(release, target.modules)
            run = _Run(target, tokenizer, config, task, examples, out)
        return run.complete(started, on_progress)


class _Run:
    """A run: what its journal says so far, and the weights that follow from it.

    Its progress comes from records alone, whether they are read from the journal or just made: so a
    run that was taken up cannot differ from one in one go.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        task: Task,
        examples: Mapping[Split, Sequence[Example]],
        out: Path,
    ) -> None:
        self.target = target
        self.model = model = target.model
        self.config = config
        self.rule = rule_of(config)
        self.out = out
        self.task = task
        cache = PrefixCache(config.prefix_cache_mb * 10**6, config.prefix_cache_dir)
        layers = target.decoder_layers
        self.scorer = Scorer(model, tokenizer, layers, loss=task.loss, cache=cache)
        folder, problem = config.prefix_cache_dir, self.scorer.cache_problem
        if folder is not None and problem is not None and distributed.rank() == 0:
            _log.warning("prefix_cache_dir %r has no effect: %s", folder, problem)
        self.train_set = self.scorer.encode(task.drawn(examples["train"]))
        self.validation_set = self.scorer.encode(examples["validation"])
        self.test_set = examples["test"]
        self.header = header_of(target, config, task, fingerprint(examples))
        self.progress = Progress()
        self.best_weights = target.weights()
        self.step_ms = array("d")

    def evaluate_untuned(self) -> Evaluation:
        """The base model on the test split.

        Raises:
            UserError: its loss is not finite.
        """
        found = self._evaluate_test()
        if found["loss"] is None:
            raise UserError(
                f"the loss of model {self.model.name_or_path!r} in "
                f"{dtype_name(self.model.dtype)} is not finite: load it in another dtype"
            )
        return found

    def complete(
        self, started: float, on_progress: OnProgress, untuned: Evaluation | None = None
    ) -> Metrics:
        """Does what is left of the run."""
        distributed.check_equal(self._digest, "the model, the data or the settings")
        try:
            with ExitStack() as stack:
                with self.target.undone_by_error():
                    records = distributed.from_first_rank(lambda: self._open_journal(stack))
                    self._catch_up(records)
                if self.progress.untuned is None:
                    self._record(Event(0, "untuned", untuned or self.evaluate_untuned()))
                if not self._is_validated(self.config.steps):
                    self._cache_prefixes()
                self._do_steps(on_progress)
                self.target.restore(self.best_weights)
                if self.progress.test is None:
                    self._record(Event(self.config.steps, "test", self._evaluate_test()))
            return distributed.from_first_rank(lambda: self._finish(started))
        except OSError as error:
            raise UserError(
                f"the run in {str(self.out)!r} stopped ({error}): mend that and go on with "
                f"`dlzo train --resume {shlex.quote(str(self.out))}`"
            ) from error
        finally:
            self.target.restore(self.best_weights)

    def _open_journal(self, stack: ExitStack) -> Iterable[Record]:
        """Opens the journal of the run, a new one if there is none; its records so far."""
        path = self.out / JOURNAL_FILE
        if not path.exists():
            create(path, self.header)
        reader = Reader(path)
        check_same_run(reader, self.header, self.task)
        deque(reader, maxlen=0)
        if reader.damage is not None:
            _log.warning("%s; the run goes on from there", reader.damage)
        self.journal = stack.enter_context(
            Writer(reader, self.config.sync_steps, self.config.sync_seconds)
        )
        return reader if distributed.size() == 1 else list(reader)

    def _catch_up(self, records: Iterable[Record]) -> None:
        """Brings state and weights to where the journal ends; of a new run, to its beginning."""
        progress = self.progress
        for record in records:
            progress.take(record)
        if progress.step > self.config.steps:
            raise UserError(
                f"the journal in {str(self.out)!r} has {progress.step} steps and the run "
                f"{self.config.steps}: start the run again"
            )
        if progress.step > 0 and (progress.untuned is None or progress.best is None):
            raise UserError(
                f"the journal in {str(self.out)!r} has steps but no evaluation of the untuned "
                "model: start the run again"
            )
        steps = (record for record in records if isinstance(record, Step))
        if progress.best is not None:
            self.rule.replay(self.target.modules, islice(steps, progress.best["step"]))
            self._keep_as_best()
        self.rule.replay(self.target.modules, steps)

    def _record(self, record: Record) -> None:
        if distributed.rank() == 0:
            self.journal.append(record)
        self.progress.take(record)

    def _do_steps(self, on_progress: OnProgress) -> None:
        while True:
            if self._validation_is_due():
                self._validate()
            on_progress(self.progress.entry)
            if self.progress.step == self.config.steps:
                return
            if self.progress.skipped_in_a_row == DIVERGED:
                raise UserError(
                    f"the losses of the last {DIVERGED} steps were not finite or had exploded: the "
                    f"best weights, of step {known(self.progress.best)['step']}, are in "
                    f"{str(self.out)!r}; start another run with a smaller lr or eps"
                )
            self._step(self.progress.step + 1)

    def _step(self, step: int) -> None:
        config = self.config
        batch = batch_of(self.train_set, config.seed, step, config.batch_size)
        started = time.perf_counter()
        # In a journal the untuned model's loss is finite.
        max_loss = EXPLODED * max(1.0, loss_of(known(self.progress.untuned)))
        self._record(take_step(self.rule, self.target, self.scorer, batch, config, step, max_loss))
        self.step_ms.append(1e3 * (time.perf_counter() - started))

    def _evaluate_test(self) -> Evaluation:
        # As in `evaluate`, the same bits: what a scorer finds allowed may depend on the weights.
        scorer = Scorer(self.model, self.scorer.tokenizer, loss=self.task.loss)
        return judge(scorer, self.task, self.test_set)

    def _cache_prefixes(self) -> None:
        """Computes once what the layers below the tuned one make of what this rank will score.

        What is computed together decides how it is rounded. So ranks that take directions each
        compute all that one process would, and have its bits; and a run that was taken up groups
        all texts as in one go, but computes those alone that are left.
        """
        validation_set = scored_here(self.validation_set, self.config.directions)
        all_steps, left = self._drawn_from(1), self._drawn_from(self.progress.step + 1)
        self.scorer.cache_prefixes([*all_steps, *validation_set], [*left, *validation_set])

    def _drawn_from(self, step: int) -> Sequence[EncodedExample]:
        """What this rank scores of the batches from a step on."""
        config, size = self.config, len(self.train_set)
        steps = range(step, config.steps + 1)
        # Each epoch leaves out another remainder, and gives ranks others of its batches.
        if len(steps) > size // config.batch_size:
            return self.train_set
        batches = (batch_indices(config.seed, n, size, config.batch_size) for n in steps)
        shares = (scored_here(batch, config.directions) for batch in batches)
        return [self.train_set[i] for i in sorted({i for share in shares for i in share})]

    def _validation_is_due(self) -> bool:
        step = self.progress.step
        due = step % self.config.eval_every == 0 or step == self.config.steps
        return due and not self._is_validated(step)

    def _is_validated(self, step: int) -> bool:
        final = self.progress.final
        return final is not None and final["step"] == step

    def _validate(self) -> None:
        step = self.progress.step
        distributed.check_equal(self.target.fingerprint, f"the weights after step {step}")
        found = score(self.scorer, self.task, self.validation_set)
        self._record(Event(step, "validation", found))
        if known(self.progress.best)["step"] == step:
            self._keep_as_best()

    def _keep_as_best(self) -> None:
        """Keeps the weights as they are now, in memory and as the adapter in the folder."""
        try:
            self.target.copy_to(self.best_weights)
        except BaseException:  # half copied, they would be those of no step
            self.target.copy_to(self.best_weights)
            raise
        if distributed.rank() != 0:
            return
        save_adapter(
            self.out,
            self.target,
            base_fingerprint=self.header.base_fingerprint,
            info=adapter_info(self.header, known(self.progress.best)["step"]),
        )

    def _digest(self) -> str:
        """SHA-256 of the run's header, but for the path of the model."""
        return hashlib.sha256(encode_header(replace(self.header, base_model=""))).hexdigest()

    def _finish(self, started: float) -> Metrics:
        """Writes the metrics."""
        config, progress = self.config, self.progress
        metrics = Metrics(
            model=self.model.name_or_path or "",
            task=self.task.name,
            method=config.method,
            layers=list(self.target.layers),
            part=config.part,
            channels=config.channels,
            steps=config.steps,
            batch_size=config.batch_size,
            directions=config.directions,
            eps=config.eps,
            lr=config.given_lr,
            seed=config.seed,
            dtype=dtype_name(self.model.dtype),
            zero_shot=known(progress.untuned),
            best=known(progress.best),
            final=known(progress.final),
            test=known(progress.test),
            skipped=progress.skipped,
            step_ms_median=median(self.step_ms) if self.step_ms else None,
            seconds=time.perf_counter() - started,
            peak_rss_mb=peak_rss_mb(),
            history=list(history(Reader(self.out / JOURNAL_FILE))),
        )
        finish(self.out, metrics_text(metrics))
        return metrics


def finished(out: Path) -> Metrics | None:
    """The metrics of the run in a folder, if it is finished.

    Raises:
        UserError: it holds no run, or is in use.
    """
    with existing_run(out):
        return _finished(out)


def _finished(out: Path) -> Metrics | None:
    metrics = read_metrics(out)
    if metrics is not None:
        delete_replaced(out)  # a kill may have come before
    return cast(Metrics | None, metrics)


def _device_name(model: PreTrainedModel) -> str:
    """Where a run's model lies; of ranks, each has a GPU of its own."""
    return str(model.device) if distributed.size() == 1 else model.device.type


def load_examples(
    task: Task, config: TrainConfig, data_dir: str | Path
) -> dict[Split, list[Example]]:
    """The examples of all splits, enough of them to train on.

    Raises:
        UserError: the data cannot be read, or a batch has more examples than there are.
    """
    examples = load_splits(task, data_dir)
    if config.batch_size > len(examples["train"]):
        raise UserError(
            f"batch_size is {config.batch_size} and {str(data_dir)!r} has {len(examples['train'])} "
            "examples to train on: give a smaller batch"
        )
    return examples


def resolved(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> TrainConfig:
    """The configuration with the layers and channels that it leaves to be found, by number."""
    model.eval()  # dropout would find others at each try
    layers, channels = _find_layers(model, tokenizer, config), config.channels
    if channels == "outlier":
        tuned = Target(model, layers).decoder_layers
        channels = outlier_channels(model, tokenizer, tuned, config.top)
    elif not isinstance(channels, str):
        channels = sorted(set(channels))
    return replace(config, layer=layers, channels=channels)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The configuration as it holds from any folder."""
    folder = config.prefix_cache_dir
    return replace(
        config,
        task=absolute_task(config.task),
        prefix_cache_dir=None if folder is None else str(user_path(folder).resolve()),
    )


def target_of(model: PreTrainedModel, config: TrainConfig) -> Target:
    """What a resolved configuration tunes of the model.

    Raises:
        UserError: the model has no such part, or steps cannot be taken on it.
    """
    lora = Lora(config.given_rank, config.seed) if config.method == "lora" else None
    target = Target(model, config.layers, config.part, lora, chosen_channels(config.channels))
    target.check_tunable()
    return target


def _find_layers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> tuple[int, ...]:
    """The layers to tune: those given, or the dominant one; none for all of them."""
    if config.layers or config.method != "dominant":
        return config.layers
    report = probe(model, tokenizer)
    decision = report.decision
    if decision.layer is None:
        raise UserError(
            f"the probe finds no dominant layer in {model.name_or_path!r} ({decision.verdict}): "
            f"choose one of its {len(decoder_layers(model))} with --layer"
        )
    doubts = [decision.reason] if decision.verdict == "ambiguous" else []
    if report.depends_on:
        doubts.append(f"it finds another from {', '.join(report.depends_on)}")
    if doubts:
        _log.warning(
            "layer %d is tuned, and the probe in doubt: %s", decision.layer, "; ".join(doubts)
        )
    return (decision.layer,)
