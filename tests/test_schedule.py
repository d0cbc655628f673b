"""What changes the size of a step: decaying lr, lr by the spread of the losses, weight decay."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from statistics import stdev

import pytest
import torch

from dlzo import trainer
from dlzo.errors import UserError
from dlzo.journal import Reader, compact, create
from dlzo.replay import replay
from dlzo.rule import Rule
from dlzo.sampler import step_seed
from dlzo.trainer import resume, train
from runs import CONFIG, TOKENIZER, result, same, state, stopping_at
from tiny import tiny_model

SHORT = replace(CONFIG, steps=6, eval_every=2)
OPTIONS = {
    "linear": {"lr_decay": "linear"},
    "cosine": {"lr_decay": "cosine", "directions": 2},
    "spread": {"lr_per_spread": True, "directions": 3, "lr": 3e-5},
    "spread of two": {"lr_per_spread": True, "lr_decay": "linear", "lr": 3e-5},
    "weight decay": {"weight_decay": 0.5},
    "both decay": {"weight_decay": 0.5, "lr_decay": "linear", "directions": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_and_resume_give_the_bits_of_the_run(data, tmp_path, name, dtype):
    config = replace(SHORT, **OPTIONS[name])
    model, states = tiny_model(dtype=dtype), []

    whole, out = tmp_path / "whole", tmp_path / "out"
    train(
        model,
        TOKENIZER,
        config,
        data,
        whole,
        on_progress=lambda entry: states.append(state(model)),
    )
    for until in (3, 6):
        replayed = tiny_model(dtype=dtype)
        replay(replayed, whole / "journal.zo", tmp_path / f"rebuilt-{until}", until=until)
        assert same(state(replayed), states[until])
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(dtype=dtype), TOKENIZER, config, data, out, on_progress=stopping_at(3))
    resume(tiny_model(dtype=dtype), TOKENIZER, out)
    assert result(out) == result(whole)


@pytest.mark.parametrize("name", [*OPTIONS, "constant"])
def test_the_journal_has_the_lr_of_each_step(data, tmp_path, name):
    config = replace(SHORT, **OPTIONS.get(name, {}))
    train(tiny_model(), TOKENIZER, config, data, tmp_path / "out")
    factors = {
        "none": [1.0] * 6,
        "linear": [1 - n / 6 for n in range(6)],
        "cosine": [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)],
    }[config.lr_decay]
    for step, factor in zip(Reader(tmp_path / "out" / "journal.zo").steps(), factors, strict=True):
        spread = stdev(step.losses) if config.lr_per_spread else 1.0
        assert step.lr == pytest.approx(config.lr * factor / spread, rel=1e-12)


def test_a_compact_journal_takes_weight_decay_but_no_lr_of_its_own(data, tmp_path):
    states = []
    model, replayed = tiny_model(), tiny_model()
    train(
        model,
        TOKENIZER,
        replace(SHORT, weight_decay=0.5),
        data,
        tmp_path / "decay",
        on_progress=lambda entry: states.append(state(model)),
    )
    compact(tmp_path / "decay" / "journal.zo", tmp_path / "small.zo")
    replay(replayed, tmp_path / "small.zo", tmp_path / "rebuilt")
    assert same(state(replayed), states[-1])
    train(tiny_model(), TOKENIZER, replace(SHORT, lr_decay="linear"), data, tmp_path / "linear")
    with pytest.raises(UserError, match="lr of its own"):
        compact(tmp_path / "linear" / "journal.zo", tmp_path / "smaller.zo")


@pytest.mark.parametrize("losses", [[0.5, 0.5], [0.5, math.nan]])
def test_losses_without_a_spread_leave_lr_and_weights(data, tmp_path, monkeypatch, losses):
    monkeypatch.setattr(trainer.Scorer, "loss_sums", lambda *_: (losses, 1))
    model = tiny_model()
    before = state(model)
    train(model, TOKENIZER, replace(SHORT, lr_per_spread=True), data, tmp_path / "out")
    steps = list(Reader(tmp_path / "out" / "journal.zo").steps())
    assert [step.lr for step in steps] == [SHORT.lr] * 6
    assert same(state(model), before)


def test_a_rate_that_the_spread_makes_infinite_moves_nothing(data, tmp_path):
    model = tiny_model()
    before = state(model)
    config = replace(SHORT, lr_per_spread=True, lr=1e308)
    assert train(model, TOKENIZER, config, data, tmp_path / "out")["skipped"] == config.steps
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("weight_decay", value) for value in ("0.1", None, -1, 1e9)),
        *(("rank", value) for value in ("2", None, True, 0, 1025)),
        *(("interval", value) for value in (2.0, None, 0)),
    ],
)
def test_settings_of_a_stranger_are_checked(data, tmp_path, name, value):
    config = replace(SHORT, method="lozo", steps=1)
    train(tiny_model(), TOKENIZER, config, data, tmp_path / "out")
    header = Reader(tmp_path / "out" / "journal.zo").header
    forged = replace(header, settings=header.settings | {name: value})
    create(tmp_path / "forged.zo", forged)
    says = f"journal '.*forged.zo' has the invalid setting {name} = {re.escape(repr(value))}:"
    with pytest.raises(UserError, match=says):
        replay(tiny_model(), tmp_path / "forged.zo", tmp_path / "rebuilt")


def test_the_subspace_stays_for_an_interval():
    rule, w = Rule(seed=7, rank=1, interval=3), torch.zeros(5, 4)
    spans = []
    for number in range(1, 8):
        _, step = rule.begin([w], number, 1.0, 1.0, 1)
        with step.plus():
            spans.append(w[0] / w[0].norm())
    for number, span in enumerate(spans):
        first = spans[number - number % 3]
        assert abs(float(span @ first)) == pytest.approx(1, abs=1e-6)
    assert abs(float(spans[0] @ spans[3])) < 0.99 and abs(float(spans[3] @ spans[6])) < 0.99


def test_v_of_an_interval_is_drawn_by_its_first_step():
    rule = Rule(seed=7, rank=1, interval=3)
    assert [rule._v_seed(n) for n in (1, 3, 4, 7)] == [step_seed(7, n) for n in (1, 1, 4, 7)]
