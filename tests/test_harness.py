"""lm-evaluation-harness agrees with our evaluation, on the same prompts and options."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import pytest

from dlzo.adapter import load_adapter
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.harness import lm_eval
from dlzo.models import sole_use
from dlzo.trainer import train
from runs import CONFIG, TOKENIZER, same, state, write_data
from tiny import byte_tokenizer, tiny_model

TASK = """
task: feeling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{sentence}}}} It was"
doc_to_choice: [terrible, great]
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(autouse=True)
def tasks_of_the_tests_alone(monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks", reason="the extra lm-eval is not installed")
    # Thousands of files of the harness's own would be read each time.
    manager = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", manager)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """(data, the harness's tasks)."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    data, tasks = write_data(tmp_path / "data"), tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "feeling.yaml").write_text(TASK.format(rows=data / "test.jsonl"))
    return data, tasks


@pytest.fixture
def tokenizer():
    """One token for each option, so that sums and means of log-probabilities choose alike."""
    tokenizer = byte_tokenizer(" terrible", " great")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


def test_both_find_the_same_accuracy_before_and_after_tuning(folders, tokenizer, tmp_path):
    data, tasks = folders
    model = tiny_model()
    train(model, TOKENIZER, replace(CONFIG, steps=200), data, tmp_path / "out")
    seen, size = [], len(tokenizer)
    for fresh in (tiny_model(), tiny_model()):
        if seen:
            load_adapter(fresh, tmp_path / "out")
        before = state(fresh)
        found = lm_eval(fresh, tokenizer, ["feeling"], include=tasks, batch_size=3)
        assert found["n-samples"]["feeling"]["effective"] == 20
        seen.append(found["results"]["feeling"]["acc,none"])
        assert seen[-1] == evaluate(fresh, tokenizer, "sst2", data)["accuracy"]
        assert same(state(fresh), before) and same(before, state(model)) == (len(seen) == 2)
    assert seen[0] != seen[1]
    assert len(tokenizer) == size and tokenizer.pad_token is None


def test_the_command_judges_a_model_with_its_adapter(folders, tokenizer, tmp_path, run):
    data, tasks = folders
    base, out, found = tmp_path / "base", tmp_path / "out", tmp_path / "found.json"
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = tiny_model()
    train(model, TOKENIZER, CONFIG, data, out)

    common = "--tasks", "feeling", "--include", tasks, "--dtype", "float32"
    judge = partial(run, "lm-eval", base, *common)
    code, text, _ = judge("--adapter", out, "--json", found)
    assert code == 0 and "|feeling|" in text
    expected = evaluate(model, tokenizer, "sst2", data)["accuracy"]
    assert json.loads(found.read_text())["results"]["feeling"]["acc,none"] == expected
    assert judge("--limit", 5, "--json", found)[0] == 0
    few = json.loads(found.read_text())
    assert few["n-samples"]["feeling"] == {"original": 20, "effective": 5}
    code, _, err = judge("--tasks", "feeling,felling")
    assert code == 2 and "no task 'felling'" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"include": "no/folder"}, "'no/folder' is no folder"),
        ({"tasks": ["no_such_task"]}, "no task 'no_such_task'.*--include"),
        ({"tokenizer": byte_tokenizer()}, "a token that begins or ends a text"),
    ],
    ids=["limit", "batch size", "folder", "task", "tokenizer"],
)
def test_bad_input_is_refused(tokenizer, change, says):
    arguments = {"tasks": ["piqa"], "tokenizer": tokenizer} | change
    with pytest.raises(UserError, match=says):
        lm_eval(tiny_model(), **arguments)


def test_rows_that_cannot_be_had_are_one_sentence(folders, tokenizer):
    data, tasks = folders
    (data / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot do feeling \(.*test\.jsonl") as caught:
        lm_eval(tiny_model(), tokenizer, ["feeling"], include=tasks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.models.huggingface"])
def test_without_the_harness_there_is_one_sentence(tokenizer, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'dlzo-kernels\[lm-eval\]'"):
        lm_eval(tiny_model(), tokenizer, ["piqa"])


def test_a_model_in_use_is_not_judged(tokenizer):
    model = tiny_model()
    with sole_use(model), pytest.raises(UserError, match="the model is in use"):
        lm_eval(model, tokenizer, [])
