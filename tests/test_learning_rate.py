"""lr = "auto": short trials of the run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dlzo import learning_rate
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation
from dlzo.learning_rate import find_lr
from dlzo.lora import take_out
from dlzo.records import Step
from dlzo.scoring import Scorer
from dlzo.tasks import get_task, load_split
from dlzo.trainer import resume, target_of, train
from runs import CONFIG, TOKENIZER, result, same, state, stopping_at
from tiny import tiny_model

METHODS = {
    "dominant": {},
    "attention": {"part": "attention"},
    "mezo": {"method": "mezo", "layer": None},
    "lozo": {"method": "lozo", "layer": None},
    "lora": {"method": "lora", "layer": None},
    "channels": {"channels": [3, 17]},
    "directions": {"directions": 2},
    "spread": {"directions": 2, "lr_per_spread": True},
    "weight decay": {"weight_decay": 0.1},
}


STEPS = 8


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(learning_rate, "STEPS", STEPS)


def search(model, data, config):
    task = get_task("sst2")
    target = target_of(model, config)
    before = target.fingerprint()
    found = find_lr(target, TOKENIZER, config, task, load_split(task, data, "train"))
    assert target.fingerprint() == before
    if target.adapters is not None:
        take_out(model)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_finds_a_rate_that_helps_and_leaves_every_bit(data, name):
    model = tiny_model(dtype=torch.bfloat16)
    before = state(model)
    lr, losses = search(model, data, replace(CONFIG, **METHODS[name], steps=STEPS))
    assert same(state(model), before)
    (_, untuned), *tried = losses.items()
    assert [rate for rate, _ in tried] == sorted(rate for rate, _ in tried)
    best = min(range(len(tried)), key=lambda i: tried[i][1])
    assert tried[best][1] < untuned
    assert 0 < best < len(tried) - 1  # a worse one on either side
    assert tried[best][0] / 2 <= lr <= tried[best][0] * 2


def test_a_trial_is_the_beginning_of_the_run(data, tmp_path):
    config = replace(CONFIG, steps=6)
    _, losses = search(tiny_model(), data, config)
    model, rate = tiny_model(), list(losses)[1]
    # The last step counts, not the best one.
    final = []
    scorer = Scorer(model, TOKENIZER)
    train_set = scorer.encode(load_split(get_task("sst2"), data, "train"))

    def on_progress(entry):
        if entry["step"] == 6:
            final.append(scorer.losses(scorer.plan(train_set))[0])

    config = replace(config, lr=rate)
    train(model, TOKENIZER, config, data, tmp_path / "out", on_progress=on_progress)
    # An epoch has five batches of eight: they are all there is to judge by.
    assert losses[rate] == pytest.approx(final[0], rel=1e-5)


def test_only_what_is_drawn_is_encoded(data, monkeypatch):
    encoded, encode = [], Scorer.encode

    def watched(scorer, examples):
        encoded.append(len(examples))
        return encode(scorer, examples)

    monkeypatch.setattr(Scorer, "encode", watched)
    monkeypatch.setattr(learning_rate, "EXAMPLES", 8)
    search(tiny_model(), data, replace(CONFIG, steps=2))
    assert encoded == [8 + 2 * 8]


def test_more_steps_bear_a_smaller_rate(data):
    rates = [search(tiny_model(), data, replace(CONFIG, steps=n))[0] for n in (16, 64, 1600)]
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.06)
    assert rates[0] / rates[2] == pytest.approx(10, rel=0.06)


@pytest.mark.parametrize(
    "losses, expected, tried",
    [
        ({-1: 3, 0: 1, 1: 3}, 0, [-1, 0, 1]),
        ({-1: 2, 0: 1, 1: 1.5}, 1 / 6, [-1, 0, 1]),
        ({-3: 4, -2: 1, -1: 3, 0: 8}, -2 + 1 / 10, [-3, -2, -1, 0]),
        ({-1: 4, 0: 3, 1: 2, 2: 1, 3: float("inf")}, 2 - 3 / 10, [0, 1, 2, 3]),
        # How it explodes does not matter.
        ({-1: 3, 0: 1, 1: 6}, -1 / 6, [-1, 0, 1]),
        ({-1: 3, 0: 1, 1: 1e9}, -1 / 6, [-1, 0, 1]),
        # Far too large at first: down until it helps.
        ({-4: 4, -3: 2, -2: 9, -1: 9, 0: float("inf")}, -3 - 1 / 10, [-4, -3, -2, -1, 0]),
    ],
)
def test_the_lowest_loss_is_bracketed(losses, expected, tried):
    found = learning_rate._bracket(losses.__getitem__, threshold=5)
    assert sorted(found) == tried
    assert learning_rate._parabola_minimum(found, untuned=5) == pytest.approx(expected)


def test_a_run_keeps_the_number_that_was_found(data, tmp_path):
    config = replace(CONFIG, lr="auto", steps=6, eval_every=3)
    whole, out = tmp_path / "whole", tmp_path / "out"
    lr = train(tiny_model(), TOKENIZER, config, data, whole)["lr"]
    assert json.loads((whole / "run.json").read_text())["config"]["lr"] == lr > 0

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, out, on_progress=stopping_at(4))
    resume(tiny_model(), TOKENIZER, out)
    assert result(out) == result(whole)


@pytest.mark.parametrize(
    "losses",
    [
        [*map(float, range(1, 99))],
        [1.0, *[2.0] * 11, 0.5],  # the last one, with none below it
        [1.0, 2.0, 1 - 4e-8, *[2.0] * 10],
        [1.0, 1 - 4e-8, *[2.0] * 11],
    ],
)
def test_where_no_rate_helps_it_says_so_and_leaves_the_weights(data, monkeypatch, losses):
    model, losses = tiny_model(), iter(losses)
    before = state(model)
    monkeypatch.setattr(learning_rate, "score", lambda *_: Evaluation(loss=next(losses)))
    with pytest.raises(UserError, match=r"the loss falls 0\.1% below 1\.0000 and rises on"):
        search(model, data, CONFIG)
    assert same(state(model), before)


@pytest.mark.parametrize("rank", [1, 4])
def test_directions_of_low_rank_move_weights_by_less(data, monkeypatch, rank):
    step = Step(1, 0, 1.0, gradients=(0.5,), losses=(1.0, 2.0), applied=True)
    monkeypatch.setattr(learning_rate._Trials, "_take", lambda *_: iter([step] * STEPS))
    config = replace(CONFIG, method="lozo", layer=None, rank=rank)
    target, task = target_of(tiny_model(), config), get_task("sst2")
    examples = load_split(task, data, "train")
    trials = learning_rate._Trials(target, TOKENIZER, config, task, examples)
    assert trials.first_move() == pytest.approx(0.5 / rank**0.5)


def test_losses_that_do_not_differ_are_refused(data):
    with pytest.raises(UserError, match="losses are equal or not finite"):
        search(tiny_model(dtype=torch.bfloat16), data, replace(CONFIG, eps=1e-30))


def test_an_error_on_the_way_leaves_the_weights(data, monkeypatch):
    model = tiny_model()
    before = state(model)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_rate, "score", fail)
    with pytest.raises(KeyboardInterrupt):
        search(model, data, CONFIG)
    assert same(state(model), before)


def test_trials_do_not_decay(data):
    found = [
        search(tiny_model(), data, replace(CONFIG, steps=4, lr_decay=decay))
        for decay in ("none", "linear")
    ]
    assert found[0] == found[1]


def test_a_rate_that_decays_everything_is_no_error(data):
    model = tiny_model()
    before = state(model)
    config = replace(CONFIG, steps=4, lr="auto", weight_decay=1e6)
    with pytest.raises(UserError, match="with none tried"):
        search(model, data, config)
    assert same(state(model), before)
