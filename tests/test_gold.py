"""Tasks on whose gold option alone the loss is taken: runs, searches and evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dlzo.evaluation import evaluate
from dlzo.generation import exact_match, f1, generate
from dlzo.journal import Reader
from dlzo.learning_rate import find_lr
from dlzo.rule import rule_of
from dlzo.sampler import batch_of
from dlzo.scoring import Scorer
from dlzo.target import Target
from dlzo.tasks import Example, get_task, load_split
from dlzo.trainer import train
from rows import ROWS
from runs import CONFIG, TOKENIZER
from tiny import tiny_model

SHORT = replace(CONFIG, steps=2, batch_size=2, eval_every=2, lr=0.0)


@pytest.fixture(params=["copa", "squad"])
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(task: str, tmp_path: Path) -> Path:
    """Six rows; the model's own answer is right to one of SQuAD's, and half right to another."""
    field = {"copa": "premise", "squad": "question"}[task]
    rows = [ROWS[task] | {field: f"{ROWS[task][field]}{'?' * i}"} for i in range(6)]
    if task == "squad":
        prompts = [get_task(task).render(row).prompt for row in rows]
        said = generate(tiny_model(), TOKENIZER, prompts)
        for i, more in enumerate(("", " or so")):
            rows[i] = rows[i] | {"answers": {"text": [said[i] + more]}}
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def gold_loss(examples: Sequence[Example]) -> float:
    scorer = Scorer(tiny_model(), TOKENIZER, loss="gold")
    return scorer.losses(scorer.plan(scorer.encode(examples)))[0]


def test_a_run_takes_the_loss_of_the_gold_option(task, data, tmp_path):
    model, definition = tiny_model(), get_task(task)
    metrics = train(model, TOKENIZER, replace(SHORT, task=task), data, tmp_path / "out")

    examples, target = load_split(definition, data, "train"), Target(model, (1,))
    scorer = Scorer(model, TOKENIZER, loss="gold")
    steps = list(Reader(tmp_path / "out" / "journal.zo").steps())
    assert len(steps) == 2
    for step in steps:
        batch = batch_of(scorer.encode(examples), SHORT.seed, step.step, SHORT.batch_size)
        _, open_step = rule_of(SHORT).begin(target.modules, step.step, SHORT.eps, 0.0, 1)
        points = scorer.losses(scorer.plan(batch), [open_step.plus, open_step.minus])
        assert step.losses == pytest.approx(points, rel=1e-5) and points[0] != points[1]
    assert metrics["test"] == metrics["zero_shot"] == evaluate(model, TOKENIZER, task, data)
    assert metrics["test"]["loss"] == pytest.approx(gold_loss(examples), rel=1e-5)


def test_an_evaluation_has_the_gold_loss_and_judges_answers(task, data):
    model, examples = tiny_model(), load_split(get_task(task), data, "test")
    found = evaluate(model, TOKENIZER, task, data)
    assert found["loss"] == pytest.approx(gold_loss(examples), rel=1e-5)
    if task == "copa":
        assert found.keys() == {"loss", "accuracy"}
        return
    said = generate(model, TOKENIZER, [example.prompt for example in examples])
    pairs = list(zip(said, (example.answers for example in examples), strict=True))
    assert found["f1"] == pytest.approx(sum(f1(*pair) for pair in pairs) / 6)
    assert found["exact_match"] == pytest.approx(sum(exact_match(*pair) for pair in pairs) / 6)
    assert 0 < found["exact_match"] < found["f1"] < 1


def test_a_search_compares_gold_losses(task, data):
    definition = get_task(task)
    examples = load_split(definition, data, "train")
    config, target = replace(SHORT, task=task), Target(tiny_model(), (1,))
    _, losses = find_lr(target, TOKENIZER, config, definition, examples)
    # An epoch of three batches: all there is to judge by.
    assert losses[0.0] == pytest.approx(gold_loss(examples), rel=1e-5)
