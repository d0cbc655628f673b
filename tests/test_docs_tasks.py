"""What docs/tasks.md shows runs as it stands, on a small model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import dlzo
from dlzo.tasks import Example, get_task, load_split
from dlzo.tasks.hub import SOURCES, Source
from rows import EXAMPLES
from tiny import byte_tokenizer, tiny_model

TEXT = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()


def blocks(kind):
    return re.findall(rf"<!-- {kind} -->\n```\w+\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example's files in the current folder, and the small model's."""
    monkeypatch.chdir(tmp_path)
    Path("headlines.yaml").write_text(blocks("yaml")[0])
    Path("headlines").mkdir()
    (rows,) = blocks("rows")
    for split in ("train", "validation", "test"):
        (Path("headlines") / f"{split}.jsonl").write_text(rows)
    tiny_model().save_pretrained("tiny")
    byte_tokenizer().save_pretrained("tiny")


def test_the_described_task_is_trained(example, run):
    (command,) = blocks("command")
    small = "--layer 1 --steps 2 --eval-every 1"
    command = command.replace("smollm2", "tiny").replace("--layer 11", small)
    program, *arguments = shlex.split(command)
    assert program == "dlzo" and run(*arguments)[0] == 0
    metrics = json.loads((Path("out") / "metrics.json").read_text())
    assert metrics["task"] == "headlines" and 0 <= metrics["test"]["accuracy"] <= 1
    found = load_split(get_task("headlines.yaml"), "headlines", "test")
    assert [example.gold for example in found] == [0, 1, 2]
    assert found[2].prompt == "A comet returns after seventy years. The topic is"


def test_the_other_descriptions_are_read(tmp_path):
    rows = {
        "why": {"event": "It is wet.", "reason1": "it rained.", "reason2": "x", "right": 0},
        "capitals": {"country": "Austria", "capital": ["Vienna", "Wien"]},
    }
    examples = {
        "why": Example("It is wet. That is because", (" it rained.", " x"), 0),
        "capitals": Example(
            "What is the capital of Austria?\nAnswer:", (" Vienna\n",), 0, ("Vienna", "Wien")
        ),
    }
    for text in blocks("yaml")[1:]:
        (tmp_path / "task.yaml").write_text(text)
        task = get_task(str(tmp_path / "task.yaml"))
        (tmp_path / "test.jsonl").write_text(json.dumps(rows[task.name]))
        assert load_split(task, tmp_path, "test") == [examples.pop(task.name)]
    assert not examples


def test_the_registered_task_is_trained(example, monkeypatch):
    (code,) = blocks("python")
    rows = [{"title": f"a COMET {i}", "label": i} for i in range(3)]
    for split in ("train", "validation", "test"):
        text = "\n".join(map(json.dumps, rows))
        (Path("headlines") / f"{split}.jsonl").write_text(text)
    load_model = dlzo.load_model
    monkeypatch.setattr(dlzo, "load_model", lambda name: load_model("tiny"))
    small = "layer=1, steps=2, eval_every=1"
    names = {}
    exec(code.replace("layer=11", small), names)
    assert names["metrics"]["task"] == "headlines"
    assert names["headline"](rows[2]).prompt == "A comet 2 The topic is"
    with pytest.raises(ValueError, match="empty"):
        names["headline"]({"title": "", "label": 0})


def test_the_table_of_prompts_is_that_of_the_tasks():
    lines = re.findall(r"^\| `(\w+)` \| (`.*`) \| (.*) \| (options|gold) \|$", TEXT, re.MULTILINE)
    assert {name for name, *_ in lines} == set(EXAMPLES) == set(SOURCES)
    for name, prompt, options, loss in lines:
        assert loss == get_task(name).loss
        if "`" in options and name != "boolq":
            # boolq's options are those of its rows' labels, which the task turns round.
            found = tuple(re.findall("`(.*?)`", options))
            assert found == EXAMPLES[name].options
        # What stands between the fields stands in each prompt.
        for literal in re.split(r"{\w+}|\\n|\\\|", prompt.split("` or `")[0].strip("`")):
            assert literal.strip() in EXAMPLES[name].prompt


def test_the_table_of_data_sets_is_that_of_the_code():
    found = {}
    lines = re.findall(
        r"^\| (`.*`) \| (`.*`)(?:, ([\w.]+))? \| ([\d,]+), (\d+), [\d,]+ \|$", TEXT, re.M
    )
    for tasks, paths, config, _, validation in lines:
        for task, path in zip(tasks.split(", "), paths.split(", "), strict=True):
            found[task.strip("`")] = Source(path.strip("`"), config or None, int(validation))
    assert found == SOURCES
