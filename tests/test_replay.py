"""The tuned layer from base model and journal, bit for bit."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from bits import assert_same_bits
from dlzo.adapter import load_adapter, read_config
from dlzo.errors import UserError
from dlzo.export import export
from dlzo.header import base_fields
from dlzo.journal import Reader, Writer, compact, create
from dlzo.models import decoder_layers
from dlzo.records import Header, Step
from dlzo.replay import replay
from dlzo.rule import Rule
from dlzo.target import Target
from dlzo.trainer import train
from dlzo_kernels import zo_step
from runs import CONFIG, TOKENIZER, rewrite_config, same, state, with_header, write_data
from tiny import tiny_model

SHORT = replace(CONFIG, steps=7, eval_every=3)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def run(request, tmp_path):
    """(journal, dtype, the weights after each step of a run)."""
    model, states = tiny_model(dtype=request.param), []
    data = write_data(tmp_path / "data")
    train(
        model,
        TOKENIZER,
        SHORT,
        data,
        tmp_path / "run",
        on_progress=lambda entry: states.append(state(model)),
    )
    return tmp_path / "run" / "journal.zo", request.param, states


@pytest.mark.parametrize("until", [None, 0, 1, 6])
def test_replay_gives_the_bits_of_the_run(run, tmp_path, until):
    journal, dtype, states = run
    model, fresh = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    reader = replay(model, journal, tmp_path / "rebuilt", until=until)
    assert reader.damage is None
    last = SHORT.steps if until is None else until
    assert same(state(model), states[last])
    assert not same(states[6], states[7])
    assert load_adapter(fresh, tmp_path / "rebuilt")["step"] == last
    assert same(state(fresh), states[last])


def test_where_no_adapter_can_be_made_the_model_stays(run, tmp_path):
    model = tiny_model(dtype=run[1])
    before = state(model)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        replay(model, run[0], tmp_path / "file")
    assert same(state(model), before)


def test_a_replayed_adapter_is_no_run_to_export(run, tmp_path):
    replay(tiny_model(dtype=run[1]), run[0], tmp_path / "rebuilt", until=1)
    with pytest.raises(UserError, match="holds no run"):
        export(tmp_path / "rebuilt", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_disk_that_is_full_is_told_and_leaves_nothing(data, tmp_path, monkeypatch):
    model = tiny_model()
    model.name_or_path = "tiny"
    train(model, TOKENIZER, replace(CONFIG, steps=1), data, tmp_path / "out")

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    module = sys.modules["dlzo.export"]  # as an attribute of dlzo it is the function
    monkeypatch.setattr(module, "load_model", lambda *_, **__: (tiny_model(), TOKENIZER))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        export(tmp_path / "out", tmp_path / "exported", "model")
    assert not list(tmp_path.glob("*exported*"))


@pytest.mark.parametrize(("name", "card"), [("", "unknown"), (".", "here"), ("a/b", "a/b")])
def test_the_card_names_the_model_as_it_may_be_found(data, tmp_path, monkeypatch, name, card):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(tiny_model(), TOKENIZER, replace(CONFIG, steps=1), data, tmp_path / "out")
    config = read_config(tmp_path / "out") | {"base_model": name}
    rewrite_config(tmp_path / "out", json.dumps(config))
    export(tmp_path / "out", tmp_path / "exported")
    assert f'\nbase_model: "{card}"\n' in (tmp_path / "exported" / "README.md").read_text()


def test_a_compact_journal_gives_the_same_bits(run, tmp_path):
    journal, dtype, states = run
    compact(journal, tmp_path / "small.zo")
    model = tiny_model(dtype=dtype)
    replay(model, tmp_path / "small.zo", tmp_path / "rebuilt")
    assert same(state(model), states[-1])


def test_what_a_damaged_tail_leaves_is_replayed(run, tmp_path):
    journal, dtype, states = run
    journal.write_bytes(journal.read_bytes()[:-300])
    model = tiny_model(dtype=dtype)
    reader = replay(model, journal, tmp_path / "rebuilt")
    assert 0 < reader.last < SHORT.steps and "cut off" in reader.damage
    assert same(state(model), states[reader.last])


def test_several_directions_and_skipped_steps(tmp_path):
    """A journal of zo_step itself: three directions, one step that was not applied, one of zero."""
    live, replayed = (decoder_layers(tiny_model(dtype=torch.bfloat16))[0] for _ in range(2))
    base = tiny_model(dtype=torch.bfloat16)
    header = Header(
        **base_fields(Target(base, (0,))),
        data_fingerprint="",
        directions=3,
        lr=1e-2,
        seed=0,
        settings={},
    )
    create(tmp_path / "journal.zo", header)
    losses = [(0.5, 0.7, 0.1, 0.4, 0.2, 0.3), (float("nan"), *[0.1] * 5), (0.5,) * 6]
    losses += [(0.5, 0.5, 0.9, 0.4, 0.2, 0.2)] * 2
    with Writer(Reader(tmp_path / "journal.zo"), 100, 10.0) as journal:
        for number, points in enumerate(losses, start=1):
            step = zo_step(live, number, 1e-2, 1e-2, directions=3)
            found = step.update(points[::2], points[1::2])
            journal.append(Step(number, number, 1e-2, found.projected_grads, points, found.applied))
    steps = list(Reader(tmp_path / "journal.zo").steps())
    assert [step.applied for step in steps] == [True, False, True, True, True]
    Rule(seed=0).replay(replayed, steps)
    for a, b, untuned in zip(
        live.parameters(),
        replayed.parameters(),
        decoder_layers(base)[0].parameters(),
        strict=True,
    ):
        assert_same_bits(a, b)
        assert not torch.equal(a, untuned)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"noise_version": 2}, "noise version is 2, not 1"),
        ({"dtype": "float16"}, "dtype is float16"),
        ({"layers": (2,)}, "base fingerprint"),
        ({"layers": (4,)}, "layer is 4: the model has layers 0 to 3"),
        ({"parameters": ()}, "parameters differ"),
        ({"base_fingerprint": "00"}, "base fingerprint is 00"),
    ],
)
def test_a_journal_of_something_else_is_refused_by_what_differs(run, tmp_path, changes, says):
    journal, dtype, _ = run
    other = with_header(journal, tmp_path / "other.zo", **changes)
    model = tiny_model(dtype=dtype)
    before = state(model)
    with pytest.raises(UserError, match=says):
        replay(model, other, tmp_path / "rebuilt")
    assert same(state(model), before) and not (tmp_path / "rebuilt").exists()


def test_the_name_of_the_model_and_the_release_do_not_bind(run, tmp_path):
    journal, dtype, states = run
    other = with_header(journal, tmp_path / "other.zo", base_model="moved", library_version="9.9.9")
    model = tiny_model(dtype=dtype)
    replay(model, other, tmp_path / "rebuilt")
    assert same(state(model), states[-1])


def test_a_tuned_model_another_family_and_a_step_too_many_are_refused(run, tmp_path):
    journal, dtype, _ = run
    model = tiny_model(dtype=dtype)
    for until in (-1, 8):
        with pytest.raises(UserError, match=f"step {until} is not in journal"):
            replay(model, journal, tmp_path / "rebuilt", until=until)
    with pytest.raises(UserError, match="parameters"):
        replay(tiny_model("gpt2", dtype), journal, tmp_path / "rebuilt")
    replay(model, journal, tmp_path / "rebuilt")
    with pytest.raises(UserError, match=r"base fingerprint.*untuned"):
        replay(model, journal, tmp_path / "again")
    with pytest.raises(UserError, match="holds an adapter"):
        replay(tiny_model(dtype=dtype), journal, tmp_path / "rebuilt")


def test_other_settings_of_the_model_are_told_and_move_no_bit(run, tmp_path, caplog):
    journal, dtype, states = run
    model = tiny_model(dtype=dtype)
    model.config.transformers_version, model.config._name_or_path = "0.0.1", "elsewhere"
    replay(model, journal, tmp_path / "rebuilt")
    assert not caplog.records
    model = tiny_model(dtype=dtype)
    model.config.rms_norm_eps = 0.5
    replay(model, journal, tmp_path / "again")
    assert "config fingerprint" in caplog.text and "the weights are those of the run" in caplog.text
    assert same(state(model), states[-1])


def test_parameters_in_another_order_or_repeated_are_refused(run, tmp_path):
    journal, dtype, _ = run
    parameters = Reader(journal).header.parameters
    for odd in (parameters[::-1], (*parameters, parameters[0])):
        other = with_header(journal, tmp_path / "other.zo", parameters=odd)
        with pytest.raises(UserError, match="another order, or some are repeated"):
            replay(tiny_model(dtype=dtype), other, tmp_path / "rebuilt")
