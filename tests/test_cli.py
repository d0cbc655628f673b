"""The command: results on a tiny model, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dlzo import cli
from dlzo.adapter import read_config
from dlzo.cli_journal import show_command
from dlzo.config import TrainConfig
from dlzo.demo import demo_data
from dlzo.export import export
from dlzo.journal import Reader
from dlzo.models import load_model
from dlzo.plots import plot_history
from dlzo.terminal import console
from dlzo.trainer import train
from dlzo_kernels import LaunchError, __version__
from runs import rewrite_config
from tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny random Llama on disk."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer(" terrible", " great").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation", "test"):
        rows = [{"sentence": "ab"[i % 2] * (3 + i % 5), "label": i % 2} for i in range(24)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder)


def train_arguments(model: str, data: str, out: Path, *more: object) -> list[object]:
    return ["train", model, "--task", "sst2", "--data", data, "--out", out, "--layer", 1, "--steps",
            4, "--eval-every", 2, "--dtype", "float32", *more]  # fmt: skip


def test_train_then_eval_gives_the_same_figures(run, model, data, tmp_path):
    out = tmp_path / "out"
    plot = tmp_path / "history.png"
    code, text, _ = run(*train_arguments(model, data, out, "--plot", plot))
    assert code == 0
    assert "untuned" in text
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("zero_shot", "best", "final", "test"):
        assert 0 <= metrics[name]["accuracy"] <= 1
    assert (metrics["task"], metrics["method"], metrics["layers"]) == ("sst2", "dominant", [1])
    assert (metrics["steps"], metrics["seed"], metrics["dtype"]) == (4, 0, "float32")
    assert metrics["step_ms_median"] > 0
    assert metrics["peak_rss_mb"] > 100
    assert len(metrics["history"]) == 5
    assert plot.stat().st_size > 1000
    found = tmp_path / "eval.json"
    common = ["--task", "sst2", "--data", data, "--dtype", "float32", "--json", found]
    code, _, _ = run("eval", model, "--adapter", out, *common)
    assert code == 0
    assert json.loads(found.read_text()) == metrics["test"]
    run("eval", model, *common)
    assert json.loads(found.read_text()) == metrics["zero_shot"]


def test_parts_of_several_layers_are_tuned_and_named(run, model, data, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run(*train_arguments(model, data, out, "--layer", "1,3", "--part", "mlp"))
    assert code == 0 and "the MLP of layers 1 and 3" in text
    names = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in names} == {"1", "3"}
    assert all(".mlp." in name for name in names)
    code, text, _ = run("replay", model, out / "journal.zo", "--out", tmp_path / "rebuilt")
    assert code == 0 and "the MLP of layers 1 and 3 written to" in text


def test_lora_is_tuned_and_named(run, model, data, tmp_path):
    out, found = tmp_path / "out", tmp_path / "eval.json"
    code, text, _ = run(*train_arguments(model, data, out, "--method", "lora", "--rank", 4))
    assert code == 0 and "LoRA on layer 1" in text
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    common = ["--task", "sst2", "--data", data, "--dtype", "float32", "--json", found]
    assert run("eval", model, "--adapter", out, *common)[0] == 0
    assert json.loads(found.read_text()) == json.loads((out / "metrics.json").read_text())["test"]
    code, text, _ = run("replay", model, out / "journal.zo", "--out", tmp_path / "rebuilt")
    assert code == 0 and "LoRA on layer 1 written to" in text
    code, text, _ = run("train", "--resume", out)
    assert code == 0 and "LoRA on layer 1" in text


def test_channels_are_tuned_and_named(run, model, data, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run(*train_arguments(model, data, out, "--channels", "7,23"))
    assert code == 0 and "2 channels of layer 1" in text
    code, text, _ = run("replay", model, out / "journal.zo", "--out", tmp_path / "rebuilt")
    assert code == 0 and "2 channels of layer 1 written to" in text
    more = ("--channels", "outlier", "--top", 0.1, "--plot", tmp_path / "history.svg")
    code, text, _ = run(*train_arguments(model, data, tmp_path / "outlier", *more))
    assert code == 0 and "4 channels of layer 1" in text
    assert "4 channels of layer 1" in (tmp_path / "history.svg").read_text()


def test_probe_writes_what_it_shows(run, model, tmp_path):
    report, plot, text = tmp_path / "r.json", tmp_path / "p.svg", tmp_path / "t.txt"
    text.write_text("one text\n\nand another")
    code, out, _ = run("probe", model, "--text", text, "--json", report, "--plot", plot)
    assert code == 0
    assert "max|h|" in out
    found = json.loads(report.read_text())
    assert {"model", "dominant", "verdict", "runner_up", "confidence", "layers"} < set(found)
    assert [row["site"] for row in found["sites"]][:4] == [
        "block",
        "attention",
        "mlp",
        "down_input",
    ]
    assert "first 8 tokens" in out
    assert [set(row) for row in found["layers"]] == [{"layer", "absmax", "kurtosis", "jump"}] * 4
    assert "<svg" in plot.read_text()


def test_sensitivity_writes_what_it_shows(run, model, data, tmp_path):
    report, plot = tmp_path / "s.json", tmp_path / "s.png"
    code, out, _ = run("sensitivity", model, "--task", "sst2", "--data", data, "--layers", "0-1,3",
                       "--seeds", 2, "--batches", 2, "--batch-size", 12, "--json", report,
                       "--plot", plot)  # fmt: skip
    assert code == 0
    assert "sign stability" in out
    found = json.loads(report.read_text())
    assert [row["layer"] for row in found["layers"]] == [0, 1, 3]
    assert [len(row["growth"]) for row in found["layers"]] == [4, 3, 1]
    assert (found["task"], found["dtype"], found["seeds"]) == ("sst2", "float32", 2)
    assert plot.stat().st_size > 1000


def test_without_data_the_task_has_its_public_data_set(run, model, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "public_data", lambda task: asked.append(task) or Path(data))
    given = ["--task", "sst2", "--dtype", "float32", "--json", tmp_path / "found.json"]
    assert run("eval", model, *given)[0] == 0
    found = json.loads((tmp_path / "found.json").read_text())
    arguments = train_arguments(model, data, tmp_path / "out")
    arguments[arguments.index("--data") : arguments.index("--out")] = []
    assert run(*arguments)[0] == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["zero_shot"] == found
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"] == data
    few = ["--layers", "1", "--seeds", 2, "--batches", 2, "--batch-size", 12]
    assert run("sensitivity", model, *given, *few)[0] == 0
    assert asked == ["sst2"] * 3


BAD = {
    "model": (["probe", "no/such-model-here"], "no/such-model-here"),
    "dtype": (["probe", "MODEL", "--dtype", "int8"], "'int8'"),
    "device": (["probe", "MODEL", "--device", "gpu"], "'gpu'"),
    "text": (["probe", "MODEL", "--text", "missing.txt"], "missing.txt"),
    "plot": (["probe", "MODEL", "--plot", "x.gif"], ".gif"),
    "json": (["probe", "MODEL", "--json", "no/where/x.json"], "no/where/x.json"),
    "task": (["eval", "MODEL", "--task", "sst9", "--data", "DATA"], "'sst9'"),
    "sensitivity layers": (
        ["sensitivity", "MODEL", "--task", "sst2", "--data", "DATA", "--layers", "1-x"],
        "'1-x'",
    ),
    "task file": (
        ["eval", "MODEL", "--task", "no/task.yaml", "--data", "DATA"],
        "'no/task.yaml'",
    ),
    "no public data": (["eval", "MODEL", "--task", "sst9"], "'sst9' is not known"),
    "split": (["eval", "MODEL", "--task", "sst2", "--data", "DATA", "--split", "dev"], "'dev'"),
    "data": (["eval", "MODEL", "--task", "sst2", "--data", "nowhere"], "nowhere"),
    "adapter": (["eval", "MODEL", "--task", "sst2", "--data", "DATA", "--adapter", "x"], "'x'"),
    "layer": ("--layer 4", "layer is 4: the model has layers 0 to 3"),
    "layer to probe for": (
        "--layer auto --method lozo",
        "layer is given without --method dominant",
    ),
    "layer text": ("--layer first", "'first'"),
    "layers": ("--layer 1,7", "layer is 7"),
    "layers text": ("--layer 1,", "'1,'"),
    "layers from the end": ("--layer 3-1", "'3-1'"),
    "layer with a line": ("--layer 1_1", "'1_1'"),
    "a span without end": (
        ["sensitivity", "MODEL", "--task", "sst2", "--data", "DATA", "--layers", "0-3000000000"],
        "'0-3000000000'",
    ),
    "home": (["probe", "~nobody9/m"], "'~nobody9/m' has no home folder here"),
    "home of a task": (
        ["eval", "MODEL", "--task", "~nobody9/t.yaml", "--data", "DATA"],
        "'~nobody9/t.yaml' has no home folder here",
    ),
    "no model": (["probe", ""], "model is ''"),
    "no adapter": (["eval", "MODEL", "--task", "sst2", "--data", "DATA", "--adapter", ""], "''"),
    "journal": (["journal", "verify", "nowhere"], "'nowhere' cannot be read (No such file"),
    "folder of a journal": (["journal", "verify", "."], "give the path of a journal.zo"),
    "export": (["export", "nowhere", "--out", "x"], "'nowhere' holds no run (No such file"),
    "export in the place of": (["export", "nowhere", "--out", "."], "'.' exists: choose another"),
    "part": ("--part head", "'head'"),
    "mezo with a layer": ("--method mezo", "leave out layer"),
    "lora with a part": ("--method lora --part mlp", "part is 'mlp'"),
    "channels": ("--channels most", "'most'"),
    "channels text": ("--channels 7,x", "'7,x'"),
    "channel": ("--channels 99", "the model has 0 to 31"),
    "channels of mezo": ("--method lozo --channels 7", "tunes all channels"),
    "top": ("--channels outlier --top 0", "top is 0.0"),
    "negative layer": ("--layer -1", "layer is '-1'"),
    "rank": ("--rank 4", "rank is given without --method lozo or lora"),
    "interval": ("--method lora --interval 4", "interval is given without --method lozo"),
    "cache of nothing": (
        "--layer auto --method mezo --prefix-cache-mb 9",
        "prefix_cache_mb is given without a layer to tune",
    ),
    "top alone": ("--top 0.1", "top is given without --channels outlier"),
    "directions": ("--directions 65536", "directions is 65536"),
    "eps": ("--eps 0", "eps is 0.0"),
    "large eps": ("--eps 1e38", "eps is 1e+38"),
    "small eps": (
        ["sensitivity", "MODEL", "--task", "sst2", "--data", "DATA", "--eps", "1e-40"],
        "eps is 1e-40",
    ),
    "long name": (["probe", "x" * 300], "cannot be used (File name too long)"),
    "eps nan": ("--eps nan", "eps is nan"),
    "lr": ("--lr inf", "lr is inf"),
    "steps": ("--steps 0", "steps is 0"),
    "batch": ("--batch-size 999", "batch_size is 999"),
    "method": ("--method adam", "'adam'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(run, model, data, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, named = BAD[case]
    if isinstance(arguments, str):
        arguments = [*train_arguments(model, data, tmp_path / "out"), *arguments.split()]
    arguments = [{"MODEL": model, "DATA": data}.get(str(a), a) for a in arguments]
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert named in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_used_is_told_before_a_model_is_fetched(run, monkeypatch, data, tmp_path):
    monkeypatch.delattr(cli, "load_model")
    arguments = train_arguments("m", data, tmp_path / "out")
    for more, named in (("--task SST2", "'SST2'"), ("--data no", "'no' does not exist")):
        code, _, err = run(*arguments, *more.split())
        assert code == 2 and named in err


EARLY = {
    "split": ("eval --task sst2 --data DATA --split dev", "'dev'"),
    "rows": ("eval --task rte --data DATA", "line 1 has no field 'premise'"),
    "adapter": ("eval --task sst2 --data DATA --adapter nowhere", "'nowhere' is not a folder"),
    "adapter of another dtype": (
        "eval --task sst2 --data DATA --adapter OUT",
        "is for a float32 model and this one is bfloat16",
    ),
    "file as an adapter": ("lm-eval --tasks piqa --adapter OUT/run.json", "is a file"),
    "seeds": ("sensitivity --task sst2 --data DATA --seeds 1", "seeds is 1"),
    "batches": ("sensitivity --task sst2 --data DATA --batches 1", "batches is 1"),
    "eps": ("sensitivity --task sst2 --data DATA --eps 0", "eps is 0.0"),
    "few rows": ("sensitivity --task sst2 --data DATA", "4 batches of 16 share examples"),
    "limit": ("lm-eval --tasks piqa --limit 0", "limit is 0"),
    "texts": ("lm-eval --tasks piqa --batch-size 0", "batch_size is 0"),
    "folder of tasks": ("lm-eval --tasks piqa --include no", "'no' is no folder"),
    "batch": ("train --task sst2 --data DATA --out o --batch-size 25", "has 24 examples"),
    "rows of train": ("train --task rte --data DATA --out o", "line 1 has no field 'premise'"),
    "cache": (
        "train --task sst2 --data DATA --out o --prefix-cache-dir o/c",
        "prefix_cache_dir 'o/c' lies in the output folder 'o'",
    ),
    "PEFT": ("train --task sst2 --data DATA --out o --method lora", "LoRA needs PEFT 99"),
}


@pytest.mark.parametrize("case", EARLY)
def test_what_needs_no_model_is_told_before_one_is_fetched(
    run, monkeypatch, data, finished, tmp_path, case
):
    if "lm-eval" in EARLY[case][0]:
        pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(cli, "load_model")
    monkeypatch.setattr("dlzo.lora.MIN_PEFT", "99")
    arguments, named = EARLY[case]
    command, *options = arguments.replace("DATA", data).replace("OUT", str(finished)).split()
    code, _, err = run(command, "m", *options)
    assert code == 2 and named in err and "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_a_resumed_run_needs_its_data_before_a_model(run, monkeypatch, finished, tmp_path):
    monkeypatch.delattr(cli, "load_model")
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    settings = json.loads((finished / "run.json").read_text()) | {"data": "/gone"}
    (tmp_path / "out" / "run.json").write_text(json.dumps(settings))
    code, _, err = run("train", "--resume", tmp_path / "out")
    assert code == 2 and "data folder '/gone' does not exist" in err
    code, _, err = run("train", "--resume", finished, "--device", "gpu")
    assert code == 2 and "device 'gpu' is not supported" in err


def test_the_home_folder_is_meant_behind_an_equals_sign_too(
    run, monkeypatch, model, data, finished, tmp_path
):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "data").symlink_to(data)
    (home / "t.txt").write_text("a text")
    (home / "run").symlink_to(finished)
    made = ("out", "cache", "p.png", "p.json", "rebuilt", "exported", "small.zo")
    out, cache, plot, report, rebuilt, exported, small = (f"~/{name}" for name in made)
    options = f"--out={out}", f"--prefix-cache-dir={cache}", f"--plot={plot}"
    arguments = [*train_arguments(model, "~/data", Path("x")), "--prefix-cache-mb=0", *options]
    assert run(*arguments)[0] == 0
    assert run("train", "--resume=~/run")[0] == 0
    assert run("probe", model, "--text=~/t.txt", f"--json={report}")[0] == 0
    assert run("replay", model, "~/run/journal.zo", f"--out={rebuilt}")[0] == 0
    assert run("export", "~/run", f"--out={exported}")[0] == 0
    assert run("journal", "compact", "~/run/journal.zo", f"--out={small}")[0] == 0
    assert all((home / name).exists() for name in made)
    assert not any(here.iterdir())
    code, _, err = run("journal", "verify", "~nobody9/journal.zo")
    assert code == 2 and "'~nobody9/journal.zo' has no home folder here" in err


def test_a_full_disk_behind_the_output_is_one_sentence(run, finished, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    code, _, err = run("journal", "verify", finished / "journal.zo")
    assert code == 2 and err.startswith("error: writing failed (No space left")


def test_figures_are_drawn_of_any_name_and_without_what_is_not_finite(finished, tmp_path):
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics |= {"model": "a$\\b$", "test": {"loss": None, "accuracy": 0.5}}
    plot_history(metrics, tmp_path / "history.svg")
    assert "a$\\b$: sst2, layer 1" in (tmp_path / "history.svg").read_text()


def test_a_journal_is_shown_whole_in_a_narrow_terminal(finished, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 60)
    show_command(finished / "journal.zo")
    shown = "".join(re.findall(r"[0-9a-f]+", capsys.readouterr().out))
    header = Reader(finished / "journal.zo").header
    assert header.base_fingerprint[:40] in shown


def test_a_command_that_draws_nothing_does_without_matplotlib(tmp_path):
    code = "import sys, dlzo.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_replay_and_a_finished_run_are_known_before_a_model_is_fetched(
    run, monkeypatch, finished, tmp_path
):
    monkeypatch.delattr(cli, "load_model")
    journal = finished / "journal.zo"
    for more, says in (
        (["--out", tmp_path, "--until", 5], "step 5 is not in"),
        (["--out", finished], "holds an adapter"),
    ):
        code, _, err = run("replay", "m", journal, *more)
        assert code == 2 and says in err
    code, text, _ = run("train", "--resume", finished)
    assert code == 0 and "is finished" in text and "untuned" in text


def test_the_folder_that_one_is_in_may_be_replaced(run, model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(*train_arguments(model, data, out))[0] == 0
    monkeypatch.chdir(out)
    assert run(*train_arguments(model, data, Path(), "--overwrite", "--seed", "1"))[0] == 0
    assert json.loads((out / "metrics.json").read_text())["seed"] == 1
    assert not (tmp_path / "out.replaced").exists()


def test_all_files_of_a_run_may_be_read_by_the_same(finished):
    modes = {path.name: path.stat().st_mode for path in finished.iterdir()}
    assert len({mode for name, mode in modes.items() if name != ".lock"}) == 1


def test_the_version_and_all_steps_are_shown(run, finished):
    assert run("--version")[:2] == (0, f"{__version__}\n")
    code, text, _ = run("journal", "show", finished / "journal.zo", "--steps", 10**20)
    assert code == 0 and text.count(" yes") == 4


def test_tables_are_shown_where_there_are_no_letters_for_them(finished, tmp_path):
    command = [sys.executable, "-m", "dlzo", "journal", "show", finished / "journal.zo"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"projected" in done.stdout


def test_an_existing_result_is_kept_unless_it_may_be_replaced(
    run, model, data, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    assert run(*train_arguments(model, data, out))[0] == 0
    before = (out / "metrics.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.delattr(cli, "load_model")  # it is told before a model is fetched
        code, _, err = run(*train_arguments(model, data, out))
        assert code == 2 and "--overwrite" in err
        code, _, err = run("demo", "--out", out)
        assert code == 2 and "--overwrite" in err
    assert (out / "metrics.json").read_bytes() == before
    assert run(*train_arguments(model, data, out, "--overwrite", "--seed", "1"))[0] == 0
    assert json.loads((out / "metrics.json").read_text())["seed"] == 1


def test_the_demo_tunes_the_layer_that_it_finds_and_shows_the_difference(
    run, tmp_path, monkeypatch
):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 7] = 1e4
    tokenizer = byte_tokenizer(" terrible", " great")
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: (model, tokenizer))
    code, text, _ = run("demo", "--out", tmp_path / "out", "--steps", 2)
    assert code == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["layers"], metrics["steps"], metrics["eps"]) == ([2], 2, 1e-2)
    with demo_data() as folder:
        rows = [json.loads(line) for line in (folder / "test.jsonl").open()]
    for row in rows[:10]:
        assert row["sentence"][:12] in text  # a long one goes on in the next line
    assert f"{metrics['test']['accuracy']:.3f}" in text


def test_the_demo_is_checked_before_a_model_is_fetched(run, tmp_path, monkeypatch):
    monkeypatch.delattr(cli, "load_model")
    code, _, err = run("demo", "--out", tmp_path / "out", "--steps", 0)
    assert code == 2 and "steps is 0" in err


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    train(
        *load_model(model, dtype=torch.float32),
        TrainConfig("sst2", layer=1, steps=4, eval_every=2),
        data,
        out,
    )
    return out


def ctrl_c(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_says_how_it_goes_on(run, model, data, tmp_path, finished, monkeypatch):
    out = tmp_path / "the out"

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("dlzo.trainer.Scorer.loss_sums", interrupt)
        code, text, _ = run(*train_arguments(model, data, out))
    assert code == 130
    assert f"dlzo train --resume '{out}'" in text
    assert not (out / "metrics.json").exists()
    for finished_before in (False, True):
        code, text, _ = run("train", "--resume", out)
        assert code == 0 and "untuned" in text
        assert ("is finished" in text) == finished_before
    for name in ("journal.zo", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_each_interrupted_run_that_replaces_another_says_how_it_goes_on(
    run, model, data, tmp_path, finished, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    for when, weights in (("_step", True), ("_step", True), ("_cache_prefixes", False)):
        with monkeypatch.context() as patch:
            patch.setattr(f"dlzo.trainer._Run.{when}", ctrl_c)
            code, text, _ = run(*train_arguments(model, data, out, "--overwrite"))
        assert code == 130 and f"dlzo train --resume {out}" in text
        assert ("best weights so far" in text) == weights


def test_a_run_of_another_device_goes_on_here(run, tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "metrics.json").unlink()
    settings = json.loads((out / "run.json").read_text())
    assert settings["device"] == "cpu"
    (out / "run.json").write_text(json.dumps({**settings, "device": "mps:0"}))
    code, _, err = run("train", "--resume", out)
    assert code == 2 and "device 'mps:0' is not supported" in err
    assert run("train", "--resume", out, "--device", "cpu")[0] == 0
    assert (out / "metrics.json").exists()


def test_a_run_goes_on_with_another_folder_for_prefixes(run, model, data, tmp_path):
    out, cache, another = (tmp_path / name for name in ("out", "cache", "another"))
    more = ("--prefix-cache-mb", 0, "--prefix-cache-dir", cache)
    assert run(*train_arguments(model, data, out, *more))[0] == 0
    (out / "metrics.json").unlink()
    shutil.rmtree(cache)
    cache.touch()
    code, _, err = run("train", "--resume", out)
    assert code == 2 and f"{str(cache)!r} cannot be written" in err and "another folder" in err
    assert run("train", "--resume", out, "--prefix-cache-dir", another)[0] == 0
    assert another.is_dir() and (out / "metrics.json").exists()


def test_a_model_without_a_name_is_for_python_alone(run, tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "metrics.json").unlink()
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**settings, "model": ""}))
    for command, named in (
        (("export", out, "--out", tmp_path / "merged", "--form", "model"), "`save_pretrained`"),
        (("train", "--resume", out), "`dlzo.resume`"),
    ):
        code, _, err = run(*command)
        assert code == 2 and "has no name to load it by" in err and named in err


def test_damaged_settings_are_named(run, tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    settings = json.loads((out / "run.json").read_text())
    settings["config"]["steps"] = "x"
    (out / "run.json").write_text(json.dumps(settings))
    (out / "metrics.json").unlink()  # a finished run is shown without them
    code, _, err = run("train", "--resume", out)
    assert code == 2 and "have no valid 'steps'" in err


def test_a_name_with_brackets_is_shown_as_it_is(run, model, tmp_path):
    odd = tmp_path / "b[/x]"
    shutil.copytree(model, odd)
    code, text, _ = run("probe", odd, "--dtype", "float32")
    # A path that is too long for a line is broken somewhere.
    assert code == 0 and "b[/x]:none" in "".join(text.split())


def test_a_run_of_a_model_in_a_relative_folder_goes_on(run, model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.chdir(Path(model).parent)
    assert run(*train_arguments(Path(model).name, data, out))[0] == 0
    expected = (out / "journal.zo").read_bytes()
    (out / "metrics.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert run("train", "--resume", out)[0] == 0
    assert (out / "journal.zo").read_bytes() == expected


def test_interrupted_before_it_began_a_run_does_not_name_the_one_before(
    run, model, data, tmp_path, finished, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    monkeypatch.setattr("dlzo.trainer.Scorer.evaluate", ctrl_c)
    code, text, _ = run(*train_arguments(model, data, out, "--overwrite"))
    assert code not in (0, 2) and "--resume" not in text
    assert (out / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--plot", "x.jpg"), "has the suffix '.jpg'"),
        (("--plot", "nowhere/x.png"), "is in no folder that exists"),
        (("--json", "."), "is a folder"),
        (("--json", "/dev/null"), "is no ordinary file"),
        (("--json", "OUT/metrics.json"), "belongs to the run in its folder"),
        (("--json", "./x.png", "--plot", "x.png"), "--json and --plot are both x.png"),
    ],
)
def test_where_a_result_goes_is_checked_before_any_work(run, tmp_path, finished, options, says):
    options = [option.replace("OUT", str(finished)) for option in options]
    code, _, err = run("probe", tmp_path / "no model", *options)
    assert code == 2 and says in err


@pytest.mark.parametrize("layers", ["3-1", "1-2-9", "", "a"])
def test_layers_that_are_no_range_are_refused(run, tmp_path, data, layers):
    code, _, err = run(
        "sensitivity", tmp_path, "--task", "sst2", "--data", data, "--layers", layers
    )
    assert code == 2 and "give numbers such as 0-5,11" in err


def test_damaged_metrics_are_named(run, tmp_path, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "metrics.json").write_text("{")
    for command in (("export", out, "--out", tmp_path / "exported"), ("train", "--resume", out)):
        code, _, err = run(*command)
        assert code == 2 and "metrics.json' is damaged" in err and "delete it" in err
    (out / "metrics.json").unlink()
    assert run("train", "--resume", out)[0] == 0


def test_resume_takes_no_other_setting(run, model, tmp_path):
    code, _, err = run("train", "--resume", tmp_path, "--steps", 5)
    assert code == 2 and "leave out steps" in err
    code, _, err = run("train", model, "--resume", tmp_path)
    assert code == 2 and "leave out model" in err
    code, _, err = run("train", "--resume", tmp_path)
    assert code == 2 and "holds no run" in err
    code, _, err = run("train", model)
    assert code == 2 and "--resume FOLDER" in err


def test_replay_rebuilds_the_best_layer(run, model, tmp_path, finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    best = metrics["best"]["step"]
    journal, out = finished / "journal.zo", tmp_path / "rebuilt"
    assert run("replay", model, journal, "--out", out, "--until", best)[0] == 0
    rebuilt, kept = (load_file(f / "adapter_model.safetensors") for f in (out, finished))
    assert all(torch.equal(rebuilt[name], kept[name]) for name in kept)
    code, _, err = run("replay", model, journal, "--out", out)
    assert code == 2 and "holds an adapter" in err
    torn = tmp_path / "torn.zo"
    torn.write_bytes(journal.read_bytes()[:-1])
    code, _, err = run("replay", model, torn, "--out", tmp_path / "torn")
    assert code == 0 and err.startswith("warning: ") and "whole up to step 4" in err


def test_sentences_stay_whole(run, tmp_path, finished):
    out = tmp_path / f"[bold]{'x' * 100}.zo"
    code, text, _ = run("journal", "compact", finished / "journal.zo", "--out", out)
    assert code == 0 and text.startswith(f"written to {out}: ") and text.count("\n") == 1
    assert "[bold]" in run("journal", "show", out)[1]
    out.write_bytes(out.read_bytes()[:-1])
    _, _, error = run("journal", "show", out)
    assert error.startswith(f"warning: journal {str(out)!r}") and error.count("\n") == 1


def test_journals_are_shown_verified_compared_and_shortened(run, tmp_path, finished):
    journal = finished / "journal.zo"
    code, text, _ = run("journal", "show", journal, "--steps", 2)
    assert code == 0
    for shown in ("noise version", "sst2", "layers.1.mlp.up_proj.weight", "validation", "yes"):
        assert shown in text
    code, text, _ = run("journal", "verify", journal)
    assert code == 0 and "whole: 4 steps, 0 of them skipped" in text
    small, torn = tmp_path / "small.zo", tmp_path / "torn.zo"
    code, text, _ = run("journal", "compact", journal, "--out", small)
    assert code == 0 and f"{small.stat().st_size:,} bytes" in text
    assert run("journal", "diff", journal, journal)[:2] == (0, "the same\n")
    code, text, _ = run("journal", "diff", journal, small)
    assert code == 1 and "its compact is False, not True" in text and "step 1: gradient" in text
    torn.write_bytes(journal.read_bytes()[:-1])
    code, _, err = run("journal", "verify", torn)
    assert code == 2 and err.startswith("error: ") and "whole up to step 4" in err
    code, text, err = run("journal", "diff", journal, torn)
    assert code == 1 and "ends here" in text and "after step 4: test" in text and "lost" in err
    code, _, err = run("journal", "show", finished / "metrics.json")
    assert code == 2 and "not a dlzo journal" in err


def test_a_run_is_exported_in_each_form(run, model, data, tmp_path, finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    for form, names in (
        ("adapter", {"adapter_model.safetensors"}),
        ("journal", {"journal.zo"}),
        ("model", {"model.safetensors", "config.json", "tokenizer.json"}),
    ):
        out = tmp_path / form
        assert run("export", finished, "--out", out, "--form", form)[0] == 0
        assert {path.name for path in out.iterdir()} >= {*names, "README.md"}
        card = (out / "README.md").read_text()
        assert "forward passes only: layer 1 of" in card and str(metrics["test"]["loss"]) in card
        assert "/" not in card.split("---")[1] and "rounded" not in card
    found = tmp_path / "eval.json"
    common = ["--task", "sst2", "--data", data, "--dtype", "float32", "--json", found]
    run("eval", tmp_path / "model", *common)
    assert json.loads(found.read_text()) == metrics["test"]
    run("eval", model, "--adapter", tmp_path / "adapter", *common)
    assert json.loads(found.read_text()) == metrics["test"]


def test_a_card_is_yaml_whatever_the_model_is_called(tmp_path, finished):
    odd, out = tmp_path / "odd", tmp_path / "out"
    shutil.copytree(finished, odd)
    rewrite_config(odd, json.dumps(read_config(odd) | {"base_model": "a: 'b' #\\é"}))
    export(odd, out)
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "a: 'b' #\\é"


def test_exports_that_cannot_be_are_refused(run, tmp_path, finished):
    code, _, err = run("export", finished, "--out", tmp_path / "x", "--form", "pickle")
    assert code == 2 and "'pickle'" in err
    code, _, err = run("export", tmp_path, "--out", tmp_path / "x")
    assert code == 2 and "holds no run" in err
    code, _, err = run("export", finished, "--out", tmp_path)
    assert code == 2 and "exists" in err
    assert not any(tmp_path.iterdir())


def test_a_malformed_row_is_named_with_file_and_line(run, model, data, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for split in ("train", "validation", "test"):
        (broken / f"{split}.jsonl").write_text((Path(data) / f"{split}.jsonl").read_text())
    with (broken / "validation.jsonl").open("a") as file:
        file.write('{"sentence": "no label"}\n')
    code, _, err = run(*train_arguments(model, str(broken), tmp_path / "out"))
    assert code == 2
    assert "validation.jsonl' line 25" in err


def test_running_out_of_memory_is_one_sentence(run, model, monkeypatch):
    def allocate(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(cli, "probe", allocate)
    code, _, err = run("probe", model)
    assert code == 2
    assert "out of memory" in err


def test_a_triton_that_cannot_compile_is_one_sentence(run, model, monkeypatch):
    def launch(*_, **__):
        raise LaunchError("Triton cannot compile or load a kernel here: mend its installation")

    monkeypatch.setattr(cli, "probe", launch)
    code, _, err = run("probe", model)
    assert code == 2
    assert "error: Triton cannot compile" in err


def test_other_errors_keep_their_traceback(run, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "probe", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("probe", model)


@pytest.mark.parametrize("module", ["dlzo", "dlzo_kernels"])
def test_modules_run_as_programs(module, tmp_path):
    arguments = [sys.executable, "-m", module] + (["--help"] if module == "dlzo" else [])
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("probe" if module == "dlzo" else "cpu/baseline") in done.stdout


class EnoughError(Exception):
    pass


@pytest.fixture
def passed_on(run, monkeypatch):
    """What a command hands to the function of its name, behind model and tokenizer."""

    def passed_on(command: str, *options: object) -> tuple[tuple, dict]:
        def caught(_model, _tokenizer, *arguments, **more):
            seen.append((arguments, more))
            raise EnoughError

        seen = []
        monkeypatch.setattr(cli, command, caught)
        monkeypatch.setattr(cli, "load_model", lambda *_, **__: (None, None))
        with pytest.raises(EnoughError):
            run(command, "m", *options)
        return seen[0]

    return passed_on


def test_every_option_of_train_is_one_of_the_run(data, tmp_path, passed_on):
    common = ["--task", "sst2", "--data", data, "--out", str(tmp_path / "out")]
    given = {
        **{"method": "lozo", "layer": (1, 3), "part": "mlp", "steps": 7, "batch_size": 3},
        **{"eps": 0.25, "lr": 0.5, "lr_decay": "linear", "weight_decay": 0.125, "seed": 9},
        **{"eval_every": 5, "prefix_cache_mb": 11, "prefix_cache_dir": str(tmp_path / "cache")},
        **{"rank": 4, "interval": 6, "directions": 2, "sync_steps": 8, "sync_seconds": 2.5},
    }
    options = []
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        options += [f"--{name.replace('_', '-')}", text]
    assert passed_on("train", *common, *options)[0][0] == TrainConfig("sst2", **given)
    options = ["--channels", "outlier", "--top", "0.1", "--lr-per-spread", "--lr", "auto"]
    given = {"channels": "outlier", "top": 0.1, "lr_per_spread": True, "lr": "auto"}
    assert passed_on("train", *common, *options)[0][0] == TrainConfig("sst2", **given)
    assert passed_on("train", *common)[0][0] == TrainConfig("sst2")


def test_every_option_of_sensitivity_is_passed_on(data, passed_on):
    given = {"layers": "1,3", "seeds": 5, "batches": 6, "batch-size": 4, "eps": 0.25, "seed": 9}
    options = [f"--{name}={value}" for name, value in given.items()]
    common = "--task", "sst2", "--data", data
    arguments, options = passed_on("sensitivity", *common, *options)
    del options["on_layer"]
    assert arguments == ("sst2", Path(data))
    assert options == {
        **{"layers": (1, 3), "seeds": 5, "batches": 6, "batch_size": 4, "eps": 0.25, "seed": 9}
    }
