"""The command: results on a tiny model, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlzo import cli
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


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlzo", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return run


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
    assert (metrics["task"], metrics["method"], metrics["layer"]) == ("sst2", "dominant", 1)
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


def test_probe_writes_what_it_shows(run, model, tmp_path):
    report, plot, text = tmp_path / "r.json", tmp_path / "p.svg", tmp_path / "t.txt"
    text.write_text("one text\n\nand another")
    code, out, _ = run("probe", model, "--text", text, "--json", report, "--plot", plot)
    assert code == 0
    assert "max|h|" in out
    found = json.loads(report.read_text())
    assert set(found) == {"model", "dominant", "verdict", "runner_up", "confidence", "layers"}
    assert [set(row) for row in found["layers"]] == [{"layer", "absmax", "kurtosis", "jump"}] * 4
    assert "<svg" in plot.read_text()


BAD = {
    "model": (["probe", "no/such-model-here"], "no/such-model-here"),
    "dtype": (["probe", "MODEL", "--dtype", "int8"], "'int8'"),
    "text": (["probe", "MODEL", "--text", "missing.txt"], "missing.txt"),
    "plot": (["probe", "MODEL", "--plot", "x.gif"], ".gif"),
    "json": (["probe", "MODEL", "--json", "no/where/x.json"], "no/where/x.json"),
    "task": (["eval", "MODEL", "--task", "sst9", "--data", "DATA"], "'sst9'"),
    "split": (["eval", "MODEL", "--task", "sst2", "--data", "DATA", "--split", "dev"], "'dev'"),
    "data": (["eval", "MODEL", "--task", "sst2", "--data", "nowhere"], "nowhere"),
    "adapter": (["eval", "MODEL", "--task", "sst2", "--data", "DATA", "--adapter", "x"], "'x'"),
    "layer": ("--layer 4", "layer is 4: the model has layers 0 to 3"),
    "layer text": ("--layer first", "'first'"),
    "negative layer": ("--layer -1", "layer is -1"),
    "eps": ("--eps 0", "eps is 0.0"),
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


def test_an_existing_result_is_kept_unless_it_may_be_replaced(run, model, data, tmp_path):
    out = tmp_path / "out"
    assert run(*train_arguments(model, data, out))[0] == 0
    before = (out / "metrics.json").read_bytes()
    code, _, err = run(*train_arguments(model, data, out))
    assert code == 2
    assert "--overwrite" in err
    assert (out / "metrics.json").read_bytes() == before
    assert run(*train_arguments(model, data, out, "--overwrite", "--seed", "1"))[0] == 0
    assert json.loads((out / "metrics.json").read_text())["seed"] == 1


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


def test_other_errors_keep_their_traceback(model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "probe", fail)
    monkeypatch.setattr(sys, "argv", ["dlzo", "probe", model])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("module", ["dlzo", "dlzo_kernels"])
def test_modules_run_as_programs(module, tmp_path):
    arguments = [sys.executable, "-m", module] + (["--help"] if module == "dlzo" else [])
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ("probe" if module == "dlzo" else "cpu/baseline") in done.stdout
