"""lr = "auto": a line search along some first steps, taken at once."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from dlzo import learning_rate
from dlzo.errors import UserError
from dlzo.evaluation import Evaluation
from dlzo.learning_rate import DOUBLINGS, STEPS, find_lr
from dlzo.models import decoder_layers
from dlzo.sampler import batch_indices, step_seed
from dlzo.scoring import Scorer
from dlzo.target import Target
from dlzo.tasks import get_task, load_split
from dlzo.trainer import resume, train
from dlzo_kernels import gaussian, zo_step
from runs import CONFIG, TOKENIZER, result, same, state, write_data
from tiny import tiny_model

METHODS = {
    "dominant": {},
    "attention": {"part": "attention"},
    "mezo": {"method": "mezo", "layer": None},
    "lozo": {"method": "lozo", "layer": None},
    "directions": {"directions": 2},
    "spread": {"directions": 2, "lr_per_spread": True},
    "weight decay": {"weight_decay": 0.1},
}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def search(model, data, config):
    target = Target(model, config.layers, config.part)
    return find_lr(target, TOKENIZER, config, load_split(get_task("sst2"), data, "train"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finds_a_rate_that_helps_and_leaves_every_bit(data, name, dtype):
    model = tiny_model(dtype=dtype)
    before = state(model)
    lr, losses = search(model, data, replace(CONFIG, **METHODS[name]))
    assert same(state(model), before)
    assert losses[lr] == min(losses.values()) < losses[0.0]
    rates = list(losses)
    assert rates == sorted(rates)
    # The first one is too small to matter, the last one far too large.
    assert rates[1] < lr < rates[-1] or len(rates) == DOUBLINGS + 1


def test_losses_are_those_of_the_steps_taken_at_once(data):
    config = replace(CONFIG, batch_size=8)
    model = tiny_model()
    lr, losses = search(model, data, config)
    layer, base = decoder_layers(model)[1], deepcopy(decoder_layers(model)[1].state_dict())
    scorer = Scorer(model, TOKENIZER)
    train_set = scorer.encode(load_split(get_task("sst2"), data, "train"))

    def loss(number: int) -> float:
        indices = batch_indices(config.seed, number, len(train_set), 8)
        return scorer.losses(scorer.plan([train_set[i] for i in indices]))[0]

    moved = {name: weight.double() for name, weight in base.items()}
    for number in range(1, STEPS + 1):
        seed = step_seed(config.seed, number)
        step = zo_step(layer, seed, config.eps, 0.0, closure=lambda n=number: loss(n))
        for stream, (name, weight) in enumerate(base.items()):
            z = gaussian(weight.shape, seed, stream=stream)
            moved[name] -= lr * step.projected_grad * z.double()
    # An epoch has five batches: they are all there is to judge by.
    untuned = sum(map(loss, range(1, 6))) / 5
    layer.load_state_dict(moved)
    assert losses[0.0] == pytest.approx(untuned, rel=1e-5)
    assert losses[lr] == pytest.approx(sum(map(loss, range(1, 6))) / 5, rel=1e-4)


def test_a_run_with_it_beats_one_with_a_tenth_and_one_with_tenfold(data, tmp_path):
    def best(lr):
        config = replace(CONFIG, lr=lr)
        return train(tiny_model(), TOKENIZER, config, data, tmp_path / f"{lr}")

    found = best("auto")
    lr, loss = found["lr"], found["final"]["loss"]
    assert loss < found["history"][0]["validation_loss"]
    assert loss < best(lr / 10)["final"]["loss"]
    assert loss < best(lr * 10)["final"]["loss"]


def test_a_run_keeps_the_number_that_was_found(data, tmp_path):
    config = replace(CONFIG, lr="auto", steps=6, eval_every=3)
    whole, out = tmp_path / "whole", tmp_path / "out"
    lr = train(tiny_model(), TOKENIZER, config, data, whole)["lr"]
    assert json.loads((whole / "run.json").read_text())["config"]["lr"] == lr > 0

    def stop(entry):
        if entry["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, out, on_progress=stop)
    resume(tiny_model(), TOKENIZER, out)
    assert result(out) == result(whole)


def test_where_no_rate_helps_it_says_so_and_leaves_the_weights(data, monkeypatch):
    model = tiny_model()
    before, losses = state(model), iter(range(1, 99))
    monkeypatch.setattr(learning_rate, "score", lambda *_: Evaluation(loss=float(next(losses))))
    with pytest.raises(UserError, match=r"with none the loss falls below 1\.0000: give a number"):
        search(model, data, CONFIG)
    assert same(state(model), before)


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
