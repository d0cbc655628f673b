"""The command `dlzo`: probe, sensitivity, train, replay, export, eval, lm-eval, demo, journal."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.adapter import WEIGHTS_FILE, check_adapter, load_adapter
from dlzo.calibration import read_texts
from dlzo.cli_journal import app as journal_app
from dlzo.cli_journal import warn
from dlzo.config import CHANNELS, LEARNING_RATES, TrainConfig, parse_config
from dlzo.demo import before_and_after, demo_data, probabilities, shown_examples
from dlzo.distributed import from_first_rank, joined, rank
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.export import Form, export
from dlzo.files import check_plot, replace_text, user_path
from dlzo.harness import check_lm_eval, lm_eval, lm_eval_report
from dlzo.lora import check_peft
from dlzo.metrics import Metrics
from dlzo.models import decoder_layers, load_model, parse_device, parse_dtype
from dlzo.probe import probe
from dlzo.replay import check_replay, replay
from dlzo.run import (
    JOURNAL_FILE,
    check_cache,
    check_free,
    is_file_of_a_run,
    model_name,
    read_settings,
)
from dlzo.sensitivity import check_sensitivity, sensitivity
from dlzo.target import describe
from dlzo.tasks import Split, check_folder, get_task, load_split
from dlzo.tasks.hub import public_data
from dlzo.terminal import complain, console, path_option, say, summary, training_bar
from dlzo.trainer import finished, load_examples, resume, train
from dlzo_kernels import LaunchError, __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(journal_app, name="journal")

_DEFAULTS = TrainConfig("sst2")
_BESIDE_RESUME = ("resume_from", "device", "prefix_cache_dir", "plot")
_NEXT = """What to try next:
  dlzo eval smollm2 --adapter {out} --task sst2 --data DIR    the tuned layer on your sentences
  dlzo train smollm2 --task sst2 --data DIR --out mine --eps 1e-2    your own train.jsonl and so on
  dlzo probe MODEL --plot layers.png                          the dominant layer of another model"""

_MODEL = typer.Argument(help="Folder, GGUF file, hub id, or 'smollm2'.")
_TASK = typer.Option(help="The task, such as sst2, or a .yaml file of your own.")
Model = Annotated[str, _MODEL]
Task = Annotated[str, _TASK]
Data = Annotated[
    Path | None,
    path_option(
        help="Folder of train, validation and test.jsonl; by default the task's public data set, "
        "from the Hugging Face hub."
    ),
]
Adapter = Annotated[str | None, typer.Option(help="Folder of `train`, or a hub id.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or cuda:1 for the second GPU.")]
Json = Annotated[Path | None, path_option("--json", help="Write the result here.")]
Plot = Annotated[Path | None, path_option(help="Draw the result: a .png or .svg file.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.command("probe")
def probe_command(
    model: Model,
    text: Annotated[Path | None, path_option(help="Texts to read, one a paragraph.")] = None,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Find the dominant layer of a model by forward passes."""
    _check_outputs(plot, json_file)
    texts = None if text is None else read_texts(text)
    loaded, tokenizer = load_model(model, dtype=parse_dtype(dtype), device=device)
    report = probe(loaded, tokenizer, texts)
    for table in (report.table(), report.channel_table(), report.variation_table()):
        console.print(table)
    for sentence in report.missing:
        say(sentence)
    _write_json(json_file, report.to_json())
    if plot is not None:
        from dlzo.plots import plot_probe  # matplotlib is slow to import

        plot_probe(report, plot)


@app.command("sensitivity")
def sensitivity_command(
    model: Model,
    task: Task,
    data: Data = None,
    layers: Annotated[str, typer.Option(help="Such as 0-5,11; by default all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Perturbations of each layer.")] = 8,
    batches: Annotated[int, typer.Option(help="On which each is scored.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = _DEFAULTS.batch_size,
    eps: Annotated[float, typer.Option(help="Size of the perturbation.")] = _DEFAULTS.eps,
    seed: Annotated[int, typer.Option(help="Of batches and perturbations.")] = _DEFAULTS.seed,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Measure each layer's zeroth-order signal, its stability and how its effect grows."""
    _check_outputs(plot, json_file)
    chosen = None if layers == "all" else _parse_numbers("layers", layers, "'all'")
    folder = _data_folder(task, data)
    numbers: dict[str, Any] = {
        "seeds": seeds,
        "batches": batches,
        "batch_size": batch_size,
        "eps": eps,
        "seed": seed,
    }
    check_sensitivity(task, folder, **numbers)
    loaded, tokenizer = load_model(model, dtype=parse_dtype(dtype), device=device)
    with Progress(console=console) as bar:
        progress = bar.add_task("measuring layers", total=len(chosen or decoder_layers(loaded)))
        report = sensitivity(
            loaded,
            tokenizer,
            task,
            folder,
            layers=chosen,
            **numbers,
            on_layer=lambda _: bar.advance(progress),
        )
    console.print(report.table())
    _write_json(json_file, report.to_json())
    if plot is not None:
        from dlzo.plots import plot_sensitivity

        plot_sensitivity(report, plot)


@app.command("train")
def train_command(
    context: typer.Context,
    model: Annotated[str | None, _MODEL] = None,
    task: Annotated[str | None, _TASK] = None,
    data: Data = None,
    out: Annotated[Path | None, path_option(help="Folder of the run.")] = None,
    method: Annotated[
        str, typer.Option(help="dominant; mezo, all parameters; lozo, these by low rank; lora.")
    ] = _DEFAULTS.method,
    layer: Annotated[
        str, typer.Option(help="Decoder layer, or several as in 5,11; 'auto' to probe for it.")
    ] = "auto",
    part: Annotated[
        str, typer.Option(help="Of the layer: all, attention or mlp.")
    ] = _DEFAULTS.part,
    channels: Annotated[
        str, typer.Option(help="Of the layer: all, outlier, or their numbers as in 7,23.")
    ] = str(_DEFAULTS.channels),
    top: Annotated[float, typer.Option(help="Share of outlier channels.")] = _DEFAULTS.top,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = _DEFAULTS.steps,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = _DEFAULTS.batch_size,
    eps: Annotated[float, typer.Option(help="Size of the perturbation.")] = _DEFAULTS.eps,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate; 'auto' to search for it. By default that of the method: "
            + ", ".join(f"{name} {lr:g}" for name, lr in LEARNING_RATES.items())
        ),
    ] = None,
    lr_decay: Annotated[
        str, typer.Option(help="How it falls: none, linear or cosine.")
    ] = _DEFAULTS.lr_decay,
    lr_per_spread: Annotated[
        bool, typer.Option(help="Divide it by the spread of a step's losses, as FZOO.")
    ] = _DEFAULTS.lr_per_spread,
    weight_decay: Annotated[
        float, typer.Option(help="Of matrices, times lr a step.")
    ] = _DEFAULTS.weight_decay,
    seed: Annotated[int, typer.Option(help="Of batches and perturbations.")] = _DEFAULTS.seed,
    eval_every: Annotated[int, typer.Option(help="Steps per validation.")] = _DEFAULTS.eval_every,
    prefix_cache_mb: Annotated[
        int, typer.Option(help="Memory for what lies below the tuned layer, 10^6 bytes.")
    ] = _DEFAULTS.prefix_cache_mb,
    prefix_cache_dir: Annotated[
        Path | None,
        path_option(help="Folder for what does not fit into it; of a resumed run, another one."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of lozo's directions (2), or of lora's adapters (8).")
    ] = None,
    interval: Annotated[
        int, typer.Option(help="Steps in a subspace of lozo.")
    ] = _DEFAULTS.interval,
    directions: Annotated[int, typer.Option(help="Averaged in a step.")] = _DEFAULTS.directions,
    sync_steps: Annotated[
        int, typer.Option(help="Most steps that a power cut may take.")
    ] = _DEFAULTS.sync_steps,
    sync_seconds: Annotated[
        float, typer.Option(help="Most seconds that a power cut may take.")
    ] = _DEFAULTS.sync_seconds,
    dtype: Dtype = "bfloat16",
    device: Annotated[
        str | None,
        typer.Option(help="cpu (the default), cuda, or cuda:1; of a resumed run, another one."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    resume_from: Annotated[
        Path | None, path_option("--resume", help="Go on with the run in this folder.")
    ] = None,
    plot: Plot = None,
) -> None:
    """Fine-tune a model, or the part of it that matters, with forward passes only."""
    _check_outputs(plot)
    if resume_from is not None:
        _refuse_beside_resume(context)
        metrics = _resume(resume_from, device, prefix_cache_dir)
    elif model is None or task is None or out is None:
        raise UserError("train needs MODEL, --task and --out, or --resume FOLDER")
    else:
        config = TrainConfig(
            task=task,
            method=method,
            layer=None if layer == "auto" else _parse_numbers("layer", layer, "'auto'"),
            part=part,
            channels=channels
            if channels in CHANNELS
            else _parse_numbers("channels", channels, "all, or outlier"),
            top=top,
            steps=steps,
            batch_size=batch_size,
            eps=eps,
            lr=None if lr is None else _parse_lr(lr),
            lr_decay=lr_decay,
            lr_per_spread=lr_per_spread,
            weight_decay=weight_decay,
            seed=seed,
            eval_every=eval_every,
            prefix_cache_mb=prefix_cache_mb,
            prefix_cache_dir=None if prefix_cache_dir is None else str(prefix_cache_dir),
            rank=rank,
            interval=interval,
            directions=directions,
            sync_steps=sync_steps,
            sync_seconds=sync_seconds,
        )
        _refuse_without_effect(context, config)
        # What can be told before a model is fetched.
        kind, place = parse_dtype(dtype), parse_device(device or "cpu")
        folder = _data_folder(task, data)
        from_first_rank(lambda: check_free(out, overwrite))
        check_cache(config.prefix_cache_dir, out)
        if method == "lora":
            check_peft()
        load_examples(get_task(task), config, folder)
        loaded = load_model(model, dtype=kind, device=place)
        metrics = _train(*loaded, config, folder, out, overwrite)
    console.print(summary(metrics))
    say(f"written to {out or resume_from}")
    if plot is not None:
        from dlzo.plots import plot_history

        plot_history(metrics, plot)


@app.command("replay")
def replay_command(
    model: Model,
    journal: Annotated[Path, typer.Argument(help="A run's journal.zo.", parser=user_path)],
    out: Annotated[Path, path_option(help="Folder of the adapter.")],
    until: Annotated[int | None, typer.Option(help="Last step; by default, of all.")] = None,
) -> None:
    """Rebuild what was tuned from the base model and a journal, bit for bit."""
    reader, _ = check_replay(journal, out, until)  # before a model is fetched
    loaded, _ = load_model(model, dtype=parse_dtype(reader.header.dtype))
    reader = replay(loaded, journal, out, until=until)
    warn(reader)
    header = reader.header
    tuned = describe({"layers": header.layers, **header.settings})
    say(f"{tuned} written to {out}")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="Folder that `train` wrote.", parser=user_path)],
    out: Annotated[Path, path_option(help="Folder to make.")],
    form: Annotated[str, typer.Option(help="adapter, model (merged) or journal.")] = "adapter",
) -> None:
    """Write what a run has tuned, with a model card, in a form to hand on."""
    export(run, out, cast(Form, form))
    say(f"written to {out}")


@app.command("eval")
def eval_command(
    model: Model,
    task: Task,
    data: Data = None,
    adapter: Adapter = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Score a model, as it is or with an adapter, on one split of a task."""
    _check_outputs(None, json_file)
    folder = _data_folder(task, data)
    load_split(get_task(task), folder, cast(Split, split))  # before a model is fetched
    loaded, tokenizer = _load(model, adapter, dtype, device)
    found = evaluate(loaded, tokenizer, task, folder, cast(Split, split))
    console.print_json(json.dumps(found))
    _write_json(json_file, found)


@app.command("lm-eval")
def lm_eval_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, such as a,b.")],
    adapter: Adapter = None,
    include: Annotated[Path | None, path_option(help="Folder of further tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="The most examples of a task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a forward.")] = 1,
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Ask lm-evaluation-harness for a second opinion on a model, with or without an adapter."""
    _check_outputs(None, json_file)
    check_lm_eval(include=include, limit=limit, batch_size=batch_size)
    loaded, tokenizer = _load(model, adapter, dtype, device)
    found = lm_eval(
        loaded, tokenizer, tasks.split(","), include=include, limit=limit, batch_size=batch_size
    )
    from lm_eval.utils import make_table

    say(make_table(found))
    _write_json(json_file, lm_eval_report(found))


@app.command("demo")
def demo_command(
    out: Annotated[Path, path_option(help="Folder of the result.")] = Path("dlzo-demo"),
    steps: Annotated[int, typer.Option(help="Number of steps.")] = _DEFAULTS.steps,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
) -> None:
    """The main job on a real model: fetch SmolLM2, find its dominant layer, fine-tune it."""
    # Of one layer of a small model; the default is for large ones (docs/tuning.md).
    config = TrainConfig("sst2", steps=steps, eps=1e-2)
    check_free(out, overwrite)  # before a model is fetched
    console.rule("1. The model: SmolLM2-135M-Instruct, de-quantised, in bfloat16")
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    console.rule("2. Its dominant layer, found by forward passes")
    report = probe(model, tokenizer)
    console.print(report.table())
    console.rule("3. Fine-tuning that layer: two losses a step, no back-propagation")
    config = replace(config, layer=report.decision.layer)
    examples = shown_examples()
    before = probabilities(model, tokenizer, examples)
    with demo_data() as data:
        metrics = _train(model, tokenizer, config, data, out, overwrite)
    console.rule("4. Before and after, on sentences that it was not tuned on")
    after = probabilities(model, tokenizer, examples)
    console.print(before_and_after(examples, before, after))
    console.print(summary(metrics))
    say(_NEXT.format(out=shlex.quote(str(out))))


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Fine-tune language models with forward passes only."""


def main() -> None:
    """Runs the command; what the user can mend ends in one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # ASCII has no lines of tables
    # Being told to end is as Ctrl-C, but not by way of SIGINT, which a shell lets a background
    # process ignore.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with joined():
            console.quiet = rank() != 0
            app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            # Behind stdout, say.
            _fail(f"writing failed ({error.strerror}): make room, or give another place")
        _fail(f"{str(error.filename)!r} cannot be used ({error.strerror}): give another path")
    except LaunchError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacking and "not enough memory" not in str(error):
            raise
        _fail("out of memory: choose bfloat16, a smaller model or a smaller --batch-size")


def _fail(message: str) -> None:
    complain("error", message)
    sys.exit(2)


def _check_outputs(plot: Path | None, json_file: Path | None = None) -> None:
    """Raises UserError, before any work, where a result could not be written."""
    if plot is not None:
        check_plot(plot)
    if plot is not None and json_file is not None and plot.resolve() == json_file.resolve():
        raise UserError(f"--json and --plot are both {plot}: give two files")
    for path in filter(None, (plot, json_file)):
        reason = None
        if path.is_dir():
            reason = "is a folder"
        elif path.exists() and not path.is_file():
            reason = "is no ordinary file"  # a device, say, which would be replaced
        elif not path.parent.is_dir():
            reason = "is in no folder that exists"
        elif not os.access(path.parent, os.W_OK):
            reason = "is in a folder that cannot be written"
        elif is_file_of_a_run(path):
            reason = "belongs to the run in its folder"
        if reason is not None:
            raise UserError(f"{path} {reason}: give the path of another file")


def _load(
    model: str, adapter: str | None, dtype: str, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    kind, place = parse_dtype(dtype), parse_device(device)
    folder = None if adapter is None else check_adapter(adapter, kind)
    loaded, tokenizer = load_model(model, dtype=kind, device=place)
    if folder is not None:
        load_adapter(loaded, folder)
    return loaded, tokenizer


def _data_folder(task: str, data: Path | None) -> Path:
    """The given folder, or that of the task's public data set.

    Raises:
        UserError: before a model is loaded, where the task or the folder cannot be used.
    """
    get_task(task)
    if data is None:
        return from_first_rank(lambda: public_data(task))
    check_folder(data)
    return data


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_without_effect(context: typer.Context, config: TrainConfig) -> None:
    tunes_layers = bool(config.layers) or config.method == "dominant"
    for name, has_effect, condition in (
        ("rank", config.method in ("lozo", "lora"), "--method lozo or lora"),
        ("interval", config.method == "lozo", "--method lozo"),
        ("top", config.channels == "outlier", "--channels outlier"),
        *(
            (name, tunes_layers, "a layer to tune, --layer")
            for name in ("prefix_cache_mb", "prefix_cache_dir")
        ),
        ("layer", tunes_layers, "--method dominant, which probes for it, or its number"),
    ):
        if _is_given(context, name) and not has_effect:
            raise UserError(f"{name} is given without {condition}: add that or leave it out")


def _refuse_beside_resume(context: typer.Context) -> None:
    for name in context.params:
        if _is_given(context, name) and name not in _BESIDE_RESUME:
            raise UserError(
                f"--resume takes all settings from its folder: leave out {name.replace('_', '-')}"
            )


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    data: Path,
    out: Path,
    overwrite: bool,
) -> Metrics:
    with _resumable(out), training_bar(config.steps) as on_progress:
        return train(
            model, tokenizer, config, data, out, overwrite=overwrite, on_progress=on_progress
        )


def _resume(out: Path, device: str | None, prefix_cache_dir: Path | None) -> Metrics:
    if device is not None:
        parse_device(device)
    if (metrics := from_first_rank(lambda: finished(out))) is not None:
        say(f"the run in {out} is finished")
        return metrics
    settings = from_first_rank(lambda: read_settings(out))
    name = model_name(settings, out, "go on by `dlzo.resume`")
    config, dtype = parse_config(settings["config"], out), parse_dtype(settings["dtype"])
    # Earlier releases had the CPU only, and did not say so.
    device = device or str(settings.get("device", "cpu"))
    check_cache(prefix_cache_dir, out)  # before a model is fetched
    load_examples(get_task(config.task), config, settings["data"])
    loaded, tokenizer = load_model(name, dtype=dtype, device=device)
    with _resumable(out, begun=True), training_bar(config.steps) as on_progress:
        return resume(
            *(loaded, tokenizer, out),
            prefix_cache_dir=prefix_cache_dir,
            on_progress=on_progress,
        )


@contextmanager
def _resumable(out: Path, *, begun: bool = False) -> Iterator[None]:
    """Says, where a run is interrupted, how it goes on; an earlier run in `out` is another."""
    earlier = None if begun else _inode(out / JOURNAL_FILE)
    try:
        yield
    except KeyboardInterrupt:
        if _inode(out / JOURNAL_FILE) in (None, earlier):
            raise
        has_weights = (out / WEIGHTS_FILE).exists()
        kept = f"the best weights so far are in {out}; " if has_weights else ""
        say(f"interrupted: {kept}go on with `dlzo train --resume {shlex.quote(str(out))}`")
        raise typer.Exit(130) from None


def _inode(path: Path) -> tuple[int, int] | None:
    """Of a file, that no later one has: an inode may come back."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_ctime_ns


def _parse_numbers(name: str, text: str, instead: str) -> tuple[int, ...]:
    """The numbers of a list such as 0-5,11; `instead` says what may stand there otherwise."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = found.groups() if found else ("1", "0")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise UserError(f"{name} is {text!r}: give numbers such as 0-5,11, or {instead}")
        numbers += span
    return tuple(numbers)


def _parse_lr(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UserError(f"lr is {text!r}: give a number, such as 3e-4, or 'auto'") from None


def _write_json(path: Path | None, value: object) -> None:
    if path is None:
        return
    text = json.dumps(value, indent=2) + "\n"
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give the path of another file"
        ) from error
