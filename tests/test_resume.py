"""Runs that are stopped, by whatever, end in the same bits as in one go."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from dlzo import files, run, trainer
from dlzo.adapter import load_adapter
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.journal import Reader, Writer, create
from dlzo.records import Event, Step
from dlzo.replay import replay
from dlzo.scoring import PrefixCache, scorer
from dlzo.scoring.runner import Runner
from dlzo.sensitivity import sensitivity
from dlzo.target import Target
from dlzo.trainer import resume, train
from runs import (
    CONFIG,
    TOKENIZER,
    FaultyOs,
    Killed,
    result,
    same,
    state,
    stopping_at,
    with_header,
    write_data,
)
from tiny import tiny_model

SHORT = replace(CONFIG, steps=6, eval_every=2, sync_steps=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("task") / "data")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def expected(request, data, tmp_path_factory):
    """(dtype, what a run in one go leaves, its weights)."""
    out, model = tmp_path_factory.mktemp("whole") / "out", tiny(request.param)
    train(model, TOKENIZER, SHORT, data, out)
    return request.param, result(out), state(model)


def tiny(dtype=torch.float32):
    model = tiny_model(dtype=dtype)
    model.name_or_path = "tiny"
    return model


def stop_in_call(monkeypatch, name, number):
    """Ctrl-C in the n-th call of a method of the scorer."""
    method, calls = getattr(trainer.Scorer, name), iter(range(1000))

    def interrupted(*args):
        if next(calls) == number:
            raise KeyboardInterrupt
        return method(*args)

    monkeypatch.setattr(trainer.Scorer, name, interrupted)


@pytest.mark.parametrize("stops", [[0], [1], [2], [5], [6], [1, 2, 3, 4, 5]], ids=str)
def test_a_run_stopped_between_steps_ends_in_the_same_bits(expected, data, tmp_path, stops):
    dtype, whole, weights = expected
    out, first, *others = tmp_path / "out", *stops
    with pytest.raises(KeyboardInterrupt):
        train(tiny(dtype), TOKENIZER, SHORT, data, out, on_progress=stopping_at(first))
    for stop in others:
        with pytest.raises(KeyboardInterrupt):
            resume(tiny(dtype), TOKENIZER, out, on_progress=stopping_at(stop))
    model = tiny(dtype)
    resume(model, TOKENIZER, out)
    assert result(out) == whole
    assert same(state(model), weights)


@pytest.mark.parametrize(("method", "number"), [("loss_sums", 2), ("evaluate", 1), ("evaluate", 3)])
def test_a_run_stopped_in_a_forward_ends_in_the_same_bits(
    expected, data, tmp_path, monkeypatch, method, number
):
    dtype, whole, weights = expected
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_in_call(patch, method, number)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(dtype), TOKENIZER, SHORT, data, out)
    model = tiny(dtype)
    resume(model, TOKENIZER, out)
    assert result(out) == whole
    assert same(state(model), weights)


@pytest.mark.parametrize("kind", ["disk full", "killed"])
def test_a_fault_at_any_write_loses_nothing(data, tmp_path, monkeypatch, kind):
    """The n-th write, fsync or rename fails, and all after it, for each n; then the run goes on."""
    whole = None
    error = OSError(errno.ENOSPC, "No space left on device") if kind == "disk full" else Killed()
    for number in range(1000):
        out = tmp_path / str(number)
        faulty = FaultyOs(number, error)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", faulty)
            try:
                train(tiny(), TOKENIZER, SHORT, data, out)
            except (UserError, Killed) as raised:
                assert isinstance(raised, Killed) or "No space left" in str(raised)
        if faulty.left >= 0:
            break
        if not (out / "run.json").exists():
            assert number < 3
            train(tiny(), TOKENIZER, SHORT, data, out)
        else:
            resume(tiny(), TOKENIZER, out)
        whole = whole or result(out)
        assert result(out) == whole
    assert result(out) == whole
    assert number > 20


def test_the_name_of_a_runs_folder_is_on_the_disk_before_its_settings(data, tmp_path, monkeypatch):
    out, synced, sync = tmp_path / "a" / "out", [], files.sync

    def watched(path):
        if path.is_dir() and not (out / "run.json").exists():
            assert out.is_dir()
            synced.append(path)
        sync(path)

    for module in (files, run):
        monkeypatch.setattr(module, "sync", watched)
    for overwrite, parents in ((False, [out.parent, tmp_path]), (True, [out.parent])):
        synced.clear()
        train(tiny(), TOKENIZER, SHORT, data, out, overwrite=overwrite)
        assert synced == parents
    # Of a folder that is there already, the parent may be one that cannot be read.
    out = tmp_path / "empty"
    out.mkdir()
    synced.clear()
    train(tiny(), TOKENIZER, SHORT, data, out)
    assert synced == []


def stopped_run(data, out, step=3, config=SHORT):
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), TOKENIZER, config, data, out, on_progress=stopping_at(step))
    return out


def test_a_stopped_run_leaves_the_best_layer_so_far(data, tmp_path):
    model = tiny()
    with pytest.raises(KeyboardInterrupt):
        train(model, TOKENIZER, CONFIG, data, tmp_path / "out", on_progress=stopping_at(33))
    fresh = tiny()
    assert load_adapter(fresh, tmp_path / "out")["step"] == 20
    assert same(state(fresh), state(model))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_damaged_tail_is_said_and_made_anew(data, tmp_path, caplog):
    whole, out = tmp_path / "whole", stopped_run(data, tmp_path / "out", step=4)
    train(tiny(), TOKENIZER, SHORT, data, whole)
    journal = out / "journal.zo"
    reader = Reader(journal)
    ends = [reader.end for record in reader if isinstance(record, Step)]
    broken = bytearray(journal.read_bytes())
    broken[ends[1] + 30] ^= 1
    journal.write_bytes(broken)
    resume(tiny(), TOKENIZER, out)
    assert "whole up to step 2" in caplog.text and "goes on from there" in caplog.text
    assert result(out) == result(whole)


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    out, model = tmp_path / "out", tiny()
    metrics = train(model, TOKENIZER, SHORT, data, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert resume(tiny(), TOKENIZER, out) == metrics
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("history", 5), ("zero_shot", None), ("best", []), ("final", ...), ("layers", 1), ("lr", ...)],
)
def test_metrics_that_are_none_are_refused(data, tmp_path, name, value):
    out = tmp_path / "out"
    metrics = train(tiny(), TOKENIZER, replace(SHORT, steps=1), data, out)
    broken = {key: found for key, found in metrics.items() if key != name}
    if value is not ...:
        broken[name] = value
    (out / "metrics.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=f"has no valid '{name}'.: delete it, and resume"):
        resume(tiny(), TOKENIZER, out)
    (out / "metrics.json").unlink()
    assert resume(tiny(), TOKENIZER, out)["test"] == metrics["test"]


def test_the_command_that_goes_on_can_be_pasted(data, tmp_path, monkeypatch):
    out = tmp_path / "my runs"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.Writer, "append", full)
    with pytest.raises(UserError, match=f"`dlzo train --resume '{out}'`"):
        train(tiny(), TOKENIZER, SHORT, data, out)


def test_only_what_is_left_to_score_is_cached(data, tmp_path, monkeypatch):
    caches = []

    def watched(*args):
        caches.append(PrefixCache(*args))
        return caches[-1]

    monkeypatch.setattr(trainer, "PrefixCache", watched)
    with monkeypatch.context() as patch:
        # The test of the best weights, after the untuned model's and the validations.
        stop_in_call(patch, "evaluate", 5)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), TOKENIZER, SHORT, data, tmp_path / "out")
    resume(tiny(), TOKENIZER, tmp_path / "out")
    assert [cache.used_bytes > 0 for cache in caches] == [True, False]


@pytest.mark.parametrize("room", [1 << 20, 40_000])
def test_prefixes_of_steps_that_are_done_are_not_computed_again(data, tmp_path, monkeypatch, room):
    forwards, layer_input = [], Runner.layer_input

    def watched(*args):
        forwards.append(0)
        return layer_input(*args)

    monkeypatch.setattr(Runner, "layer_input", watched)
    monkeypatch.setattr(trainer, "PrefixCache", lambda _, folder: PrefixCache(room, folder))
    monkeypatch.setattr(scorer, "ROW_TOKENS", dict.fromkeys((2, 4, 8), 32))
    config = replace(SHORT, steps=5, eval_every=5)  # an epoch
    train(tiny(), TOKENIZER, config, data, tmp_path / "whole")
    whole = len(forwards)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), TOKENIZER, config, data, tmp_path / "out", on_progress=stopping_at(4))
    forwards.clear()
    resume(tiny(), TOKENIZER, tmp_path / "out")
    assert 0 < len(forwards) < whole
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_a_run_goes_on_only_with_its_model_and_data(data, tmp_path):
    out = stopped_run(data, tmp_path / "out")
    journal = (out / "journal.zo").read_bytes()
    other = tiny()
    with torch.no_grad():
        next(trainer.decoder_layers(other)[1].parameters())[0] += 0.5
    with pytest.raises(UserError, match="base fingerprint"):
        resume(other, TOKENIZER, out)
    with pytest.raises(UserError, match="dtype is float32, not bfloat16"):
        resume(tiny(torch.bfloat16), TOKENIZER, out)
    other = tiny()
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(UserError, match="model fingerprint"):
        resume(other, TOKENIZER, out)
    frozen = tiny()
    next(trainer.decoder_layers(frozen)[1].parameters()).requires_grad_(False)
    with pytest.raises(UserError, match=r"only it tunes 'model\.layers\.1\."):
        resume(frozen, TOKENIZER, out)
    (out / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged .it has no"):
        resume(tiny(), TOKENIZER, out)
    (out / "metrics.json").unlink()
    moved = write_data(tmp_path / "data")
    with (moved / "train.jsonl").open("a") as file:
        file.write('{"sentence": "aab", "label": 0}\n')
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(settings | {"data": str(moved)}))
    with pytest.raises(UserError, match="data fingerprint"):
        resume(tiny(), TOKENIZER, out)
    assert (out / "journal.zo").read_bytes() == journal


def test_what_moves_no_bit_may_be_another_when_a_run_goes_on(data, tmp_path):
    config = replace(SHORT, prefix_cache_mb=0, prefix_cache_dir=tmp_path / "gone")
    train(tiny(), TOKENIZER, config, data, tmp_path / "whole")
    shutil.rmtree(tmp_path / "gone")
    out = stopped_run(data, tmp_path / "out", config=config)
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").touch()
    settings = json.loads((out / "run.json").read_text())
    settings["config"] |= {"sync_steps": 1, "sync_seconds": 0.0}
    (out / "run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"prefix cache .*gone' cannot be written"):
        resume(tiny(), TOKENIZER, out)
    with pytest.raises(UserError, match="lies in the output folder"):
        resume(tiny(), TOKENIZER, out, prefix_cache_dir=out / "cache")
    resume(tiny(), TOKENIZER, out, prefix_cache_dir=tmp_path / "cache")
    assert any((tmp_path / "cache").iterdir())
    assert result(out) == result(tmp_path / "whole")


def test_a_folder_for_prefixes_is_none_of_a_run_without(data, tmp_path):
    """What does not fit into memory is then computed with each batch, in other roundings."""
    out = stopped_run(data, tmp_path / "out")
    with pytest.raises(UserError, match="prefix cache dir is None"):
        resume(tiny(), TOKENIZER, out, prefix_cache_dir=tmp_path / "cache")


def test_a_run_goes_on_with_its_settings_of_the_model(data, tmp_path):
    out, other = stopped_run(data, tmp_path / "out"), tiny()
    other.config.rms_norm_eps = 0.5
    with pytest.raises(UserError, match="changed after loading, or transformers is of another"):
        resume(other, TOKENIZER, out)
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    assert model.config.architectures != tiny().config.architectures
    assert resume(model, TOKENIZER, out)["final"]["step"] == SHORT.steps


def test_a_journal_of_an_earlier_release_says_nothing_of_other_weights(data, tmp_path):
    out = stopped_run(data, tmp_path / "out")
    path = out / "journal.zo"
    records = list(reader := Reader(path))
    settings = {k: v for k, v in reader.header.settings.items() if k != "model_fingerprint"}
    path.unlink()
    create(path, replace(reader.header, settings=settings))
    with Writer(Reader(path), 1, 1.0) as writer:
        for record in records:
            writer.append(record)
    assert resume(tiny(), TOKENIZER, out)["final"]["step"] == SHORT.steps


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 9}, "version 9 and this dlzo reads version 1"),
        ({"data": 1}, "no valid 'data'"),
        ({"config": {"task": "sst2", "steps": "six"}}, "no valid 'steps'"),
        ({"config": {"task": "sst2", "shell": "rm"}}, "no valid 'shell'"),
        ({"config": {"steps": 6}}, "not complete"),
        ({"config": {"task": "sst2", "steps": -6}}, "steps is -6"),
    ],
)
def test_settings_from_a_stranger_are_checked(data, tmp_path, change, says):
    out = stopped_run(data, tmp_path / "out")
    settings = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match=says):
        resume(tiny(), TOKENIZER, out)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=["torn", "a list", "deep"])
def test_settings_that_are_none_are_refused(data, tmp_path, text):
    out = stopped_run(data, tmp_path / "out")
    (out / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json.*damaged"):
        resume(tiny(), TOKENIZER, out)
    (out / "run.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        resume(tiny(), TOKENIZER, out)


def step_of(number):
    return Step(number, number, 3e-3, (0.1,), (0.5, 0.4), True)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([Event(0, "validation", {"accuracy": 0.5})], "'validation'.*no evaluation"),
        ([Event(0, "untuned", {"loss": "low"})], "'untuned'.*no evaluation"),
        ([Event(0, "untuned", {"loss": math.nan})], "'untuned'.*no evaluation"),
        ([Event(0, "untuned", {"loss": 0.5, "accuracy": math.inf})], "'untuned'.*no evaluation"),
        ([Event(0, "untuned", {"loss": 10**400})], "'untuned'.*no evaluation"),
        ([step_of(1)], "no evaluation of the untuned"),
        (
            [
                *(Event(0, name, {"loss": 0.5}) for name in ("untuned", "validation")),
                *map(step_of, range(1, SHORT.steps + 2)),
            ],
            "has 7 steps and the run 6",
        ),
    ],
)
def test_a_forged_journal_is_refused(data, tmp_path, monkeypatch, records, says):
    out = stopped_run(data, tmp_path / "out")
    # JSON as dlzo writes it has no NaN.
    monkeypatch.setattr("dlzo.records._json", lambda value: json.dumps(value).encode())
    header = Reader(out / "journal.zo").header
    create(out / "journal.zo", header)
    with Writer(Reader(out / "journal.zo"), 1, 0.0) as journal:
        for record in records:
            journal.append(record)
    model = tiny()
    before = state(model)
    with pytest.raises(UserError, match=says):
        resume(model, TOKENIZER, out, on_progress=stopping_at(SHORT.steps + 2, AssertionError))
    assert same(state(model), before)


def test_a_result_is_kept_until_the_run_that_replaces_it_is_finished(data, tmp_path):
    out, aside = tmp_path / "out", tmp_path / "out.replaced"
    train(tiny(), TOKENIZER, SHORT, data, out)
    first = result(out)
    # Twice: an unfinished run does not push the finished one out.
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(
                tiny(),
                TOKENIZER,
                replace(SHORT, seed=5),
                data,
                out,
                overwrite=True,
                on_progress=stopping_at(3),
            )
        assert result(aside) == first and not (out / "metrics.json").exists()
    resume(tiny(), TOKENIZER, out)
    assert not aside.exists()
    assert json.loads((out / "metrics.json").read_text())["seed"] == 5


@pytest.mark.parametrize("what", ["another run", "a file of others"])
def test_what_came_to_lie_where_a_result_was_kept_is_left_alone(data, tmp_path, what):
    out, aside = tmp_path / "out", tmp_path / "out.replaced"
    train(tiny(), TOKENIZER, SHORT, data, out)
    with pytest.raises(KeyboardInterrupt):
        train(*(tiny(), TOKENIZER, SHORT, data, out), overwrite=True, on_progress=stopping_at(3))
    if what == "another run":
        shutil.rmtree(aside)
        train(tiny(), TOKENIZER, replace(SHORT, seed=9), data, aside)
    else:
        (aside / "thesis.txt").write_text("precious")
    kept = sorted(aside.iterdir())
    for _ in range(2):
        resume(tiny(), TOKENIZER, out)
        assert sorted(aside.iterdir()) == kept


def test_a_replaced_result_that_cannot_be_deleted_stays(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    train(tiny(), TOKENIZER, SHORT, data, out)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(run, "delete", refuse)
    metrics = train(tiny(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert metrics["final"]["step"] == SHORT.steps and (tmp_path / "out.replaced").is_dir()


def test_what_a_kill_leaves_is_overwritten(data, tmp_path, monkeypatch):
    out, aside = tmp_path / "out", tmp_path / "out.replaced"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".run.json.partial-77").write_text("{")
    train(tiny(), TOKENIZER, SHORT, data, out)
    assert not [path for path in out.iterdir() if "partial" in path.name]
    aside.mkdir()
    train(tiny(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert not aside.exists()
    shutil.copytree(out, aside)
    deleted, delete = [], run.delete

    def killed(path):
        if len(deleted) == 2:
            raise Killed
        deleted.append(path)
        delete(path)

    monkeypatch.setattr(run, "delete", killed)
    with pytest.raises(Killed):
        train(tiny(), TOKENIZER, SHORT, data, out, overwrite=True)
    monkeypatch.undo()
    assert len(deleted) == 2
    train(tiny(), TOKENIZER, SHORT, data, out, overwrite=True)


def test_an_interrupt_while_the_best_weights_are_copied_leaves_those(data, tmp_path, monkeypatch):
    model, copy_to, seen = tiny(), Target.copy_to, []

    def interrupted(target, weights):
        if len(seen) == 1:
            seen.append(state(model))
            weights[0].copy_(next(iter(target.parameters.values())).detach())
            raise KeyboardInterrupt
        seen.append(None)
        copy_to(target, weights)

    monkeypatch.setattr(Target, "copy_to", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, TOKENIZER, replace(SHORT, eval_every=1), data, tmp_path / "out")
    assert same(state(model), seen[1]) and not same(seen[1], state(tiny()))


def test_an_unfinished_run_is_not_started_over_by_mistake(data, tmp_path):
    out = stopped_run(data, tmp_path / "out")
    with pytest.raises(UserError, match="--resume"):
        train(tiny(), TOKENIZER, SHORT, data, out)


def test_two_runs_do_not_share_a_folder(data, tmp_path):
    out = tmp_path / "out"
    refused = []

    def second_run(entry):
        for start in (
            lambda: resume(tiny(), TOKENIZER, out),
            lambda: train(tiny(), TOKENIZER, SHORT, data, out, overwrite=True),
        ):
            with pytest.raises(UserError, match="in use by another run") as error:
                start()
            refused.append(error)

    metrics = train(tiny(), TOKENIZER, SHORT, data, out, on_progress=second_run)
    assert len(refused) == 2 * 7
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_two_runs_do_not_share_a_model(data, tmp_path):
    model, errors = tiny(), []

    def use_elsewhere(use):
        def run():
            with pytest.raises(UserError, match="the model is in use") as error:
                use()
            errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def on_progress(entry):
        if entry["step"] == 1:
            use_elsewhere(lambda: train(model, TOKENIZER, SHORT, data, tmp_path / "other"))
            use_elsewhere(lambda: evaluate(model, TOKENIZER, "sst2", data))

    metrics = train(model, TOKENIZER, SHORT, data, tmp_path / "out", on_progress=on_progress)
    assert len(errors) == 2
    assert evaluate(model, TOKENIZER, "sst2", data) == metrics["test"]


def test_a_run_that_diverges_is_given_up_with_its_best_layer(data, tmp_path, monkeypatch):
    out, model = tmp_path / "out", tiny()
    loss_sums, calls = trainer.Scorer.loss_sums, iter(range(1000))

    def exploding(scorer, plan, states):
        sums, weight = loss_sums(scorer, plan, states)
        return (sums if next(calls) < 25 else [1e4 * weight, sums[1]]), weight

    monkeypatch.setattr(trainer.Scorer, "loss_sums", exploding)
    says = r"last 20 steps.*best weights, of step 40.*smaller lr"
    with pytest.raises(UserError, match=says):
        train(model, TOKENIZER, CONFIG, data, out)
    with pytest.raises(UserError, match=says):
        resume(tiny(), TOKENIZER, out)
    steps = list(Reader(out / "journal.zo").steps())
    assert [step.applied for step in steps] == [True] * 25 + [False] * 20
    assert steps[-1].losses[0] == 1e4
    fresh = tiny()
    load_adapter(fresh, out)
    assert same(state(fresh), state(model))


@pytest.mark.parametrize("changes", [{"library_version": "9.9"}, {"base_model": "moved"}], ids=str)
def test_another_release_or_place_of_the_model_goes_on(data, tmp_path, changes):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(3))
    with_header(out / "journal.zo", tmp_path / "other.zo", **changes)
    (tmp_path / "other.zo").replace(out / "journal.zo")
    assert resume(tiny_model(), TOKENIZER, out)["final"]["step"] == SHORT.steps


def test_a_model_in_use_is_not_resumed_measured_or_moved(data, tmp_path):
    out, model, errors = tmp_path / "out", tiny_model(), []
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(1))

    def on_progress(entry):
        if entry["step"] == 1:
            for use in (
                lambda: resume(model, TOKENIZER, out),
                lambda: sensitivity(
                    *(model, TOKENIZER, "sst2", data), layers=[1], seeds=2, batches=2, batch_size=2
                ),
                lambda: load_adapter(model, out),
                lambda: replay(model, out / "journal.zo", tmp_path / "rebuilt"),
            ):
                with pytest.raises(UserError, match="the model is in use") as error:
                    use()
                errors.append(error)

    train(model, TOKENIZER, SHORT, data, tmp_path / "other", on_progress=on_progress)
    assert len(errors) == 4


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(3))
    (out / ".adapter_model.safetensors.partial-77").write_text("half")
    resume(tiny_model(), TOKENIZER, out)
    assert not [path for path in out.iterdir() if "partial" in path.name]


def test_a_run_has_a_number_as_its_lr(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(1))
    settings = json.loads((out / "run.json").read_text())
    settings["config"]["lr"] = "auto"
    (out / "run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no valid 'lr'"):
        resume(tiny_model(), TOKENIZER, out)
