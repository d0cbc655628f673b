from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import RwkvConfig

from dlzo import trainer
from dlzo.adapter import load_adapter
from dlzo.config import TrainConfig
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.export import export
from dlzo.models import decoder_layers
from dlzo.plots import plot_history
from dlzo.replay import replay
from dlzo.sampler import batch_indices, step_seed
from dlzo.sensitivity import sensitivity
from dlzo.trainer import resume, train
from dlzo_kernels import masters
from dlzo_kernels.parameters import storages
from runs import CONFIG, TOKENIZER, same, state, write_data
from tiny import VOCABULARY, random_model, tiny_model

SHORT = replace(CONFIG, steps=4, eval_every=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss(data, tmp_path, dtype):
    model, out = tiny_model(dtype=dtype), tmp_path / "out"
    model.name_or_path = "tiny"
    before = state(model)
    entries = []
    metrics = train(model, TOKENIZER, CONFIG, data, out, on_progress=entries.append)

    losses = [entry["train_loss"] for entry in metrics["history"][1:]]
    assert len(losses) == CONFIG.steps
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert metrics["best"]["loss"] < 0.8 * metrics["history"][0]["validation_loss"]
    assert metrics["test"]["loss"] < 0.8 * metrics["zero_shot"]["loss"]
    assert [e["step"] for e in entries if "validation_loss" in e] == [0, 20, 40, 60]
    assert entries == metrics["history"]
    validated = [e for e in entries if "validation_loss" in e]
    best = min(validated, key=lambda e: e["validation_loss"])
    assert metrics["best"] == {
        "step": best["step"],
        "accuracy": best["validation_accuracy"],
        "loss": best["validation_loss"],
    }
    assert metrics["final"]["step"] == 60
    assert metrics["skipped"] == 0
    assert metrics["step_ms_median"] > 0 and metrics["seconds"] > 0 and metrics["peak_rss_mb"] > 50
    assert metrics["dtype"] == str(dtype).removeprefix("torch.")

    assert json.loads((out / "metrics.json").read_text()) == metrics
    changed = {name for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "adapter_model.safetensors",
        "journal.zo",
        "metrics.json",
        "run.json",
    ]
    assert not list(tmp_path.glob("out.*"))


def test_a_loaded_adapter_gives_the_same_figures_again(data, tmp_path):
    out = tmp_path / "out"
    tuned = tiny_model()
    metrics = train(tuned, TOKENIZER, CONFIG, data, out)
    model = tiny_model()
    assert evaluate(model, TOKENIZER, "sst2", data) == metrics["zero_shot"]
    load_adapter(model, out)
    assert same(state(model), state(tuned))
    assert evaluate(model, TOKENIZER, "sst2", data) == metrics["test"]
    best = metrics["best"]
    # Validation takes the layer's inputs from the cache, and so may round otherwise.
    validated = evaluate(model, TOKENIZER, "sst2", data, "validation")
    assert validated["accuracy"] == best["accuracy"]
    assert validated["loss"] == pytest.approx(best["loss"], abs=1e-6)


def test_a_seed_fixes_every_bit(data, tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        model = tiny_model()
        metrics = train(model, TOKENIZER, replace(SHORT, seed=seed), data, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((metrics["history"], state(model)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_lr_zero_changes_no_bit(data, tmp_path):
    model = tiny_model(dtype=torch.bfloat16)
    before = state(model)
    metrics = train(model, TOKENIZER, replace(SHORT, lr=0.0), data, tmp_path / "out")
    assert same(state(model), before)
    assert metrics["final"]["loss"] == metrics["history"][0]["validation_loss"]


@pytest.mark.parametrize("changes", [{}, {"method": "mezo", "layer": None, "lr": 1e-4}])
def test_no_master_outlives_a_run_or_a_replay(data, tmp_path, changes):
    model, again = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    train(model, TOKENIZER, replace(CONFIG, steps=2, **changes), data, tmp_path / "out")
    replay(again, tmp_path / "out" / "journal.zo", tmp_path / "again")
    kept = {key.storage for key in masters._entries}
    assert kept.isdisjoint(storages([model, again]))


def test_the_best_weights_are_kept_not_the_last(data, tmp_path, monkeypatch):
    found = iter([(0.5, 1.0), (0.5, 9.0), (0.6, 0.5), (0.9, 0.7), (0.7, 0.6)])
    seen = []

    def scripted(scorer, plan):
        seen.append(state(scorer.model))
        accuracy, loss = next(found)
        return accuracy * len(plan.batch), loss * len(plan.batch), len(plan.batch)

    monkeypatch.setattr(trainer.Scorer, "evaluate", scripted)
    model = tiny_model()
    metrics = train(model, TOKENIZER, SHORT, data, tmp_path / "out")
    # The order of evaluations: test untuned; validation after steps 0, 2 and 4; test.
    assert metrics["best"] == pytest.approx({"step": 2, "accuracy": 0.6, "loss": 0.5})
    assert metrics["final"] == pytest.approx({"step": 4, "accuracy": 0.9, "loss": 0.7})
    assert metrics["test"] == pytest.approx({"accuracy": 0.7, "loss": 0.6})
    assert same(seen[2], seen[4]) and not same(seen[2], seen[3])
    assert same(state(model), seen[2])


@pytest.mark.parametrize("verdict", ["dominant", "ambiguous"])
@pytest.mark.parametrize("depends_on", [[], ["first 8 tokens"]], ids=str)
def test_the_probe_finds_the_layer_and_says_if_it_is_in_doubt(
    data, tmp_path, monkeypatch, caplog, verdict, depends_on
):
    decision = SimpleNamespace(layer=2, verdict=verdict, reason="1 is as high")
    report = SimpleNamespace(decision=decision, depends_on=depends_on)
    monkeypatch.setattr(trainer, "probe", lambda *_: report)
    metrics = train(tiny_model(), TOKENIZER, replace(SHORT, layer=None), data, tmp_path / "out")
    assert metrics["layers"] == [2]
    assert ("1 is as high" in caplog.text) == (verdict == "ambiguous")
    assert ("another from first 8 tokens" in caplog.text) == bool(depends_on)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped(data, tmp_path, monkeypatch):
    loss_sums = trainer.Scorer.loss_sums
    calls = iter(range(100))

    def sometimes_nan(scorer, plan, states):
        (plus, minus), weight = loss_sums(scorer, plan, states)
        return [float("nan") if next(calls) in (0, 3) else plus, minus], weight

    monkeypatch.setattr(trainer.Scorer, "loss_sums", sometimes_nan)
    metrics = train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    assert metrics["skipped"] == 2
    assert [e.get("train_loss") is None for e in metrics["history"][1:]] == [
        True,
        False,
        False,
        True,
    ]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_a_model_whose_loss_is_not_finite_is_refused(data, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        train(model, TOKENIZER, SHORT, data, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("change", [{"lr": "auto"}, {"method": "mezo", "layer": None}])
def test_weights_that_are_not_finite_are_refused_though_no_text_meets_them(data, tmp_path, change):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds values"):
        train(model, TOKENIZER, replace(SHORT, **change), data, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("inside", [".", "prefixes"])
def test_a_cache_in_the_folder_of_the_run_is_refused_before_any_work(data, tmp_path, inside):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"prefix_cache_dir .* lies in the output folder"):
        train(tiny_model(), TOKENIZER, replace(SHORT, prefix_cache_dir=out / inside), data, out)
    assert not out.exists()


def test_the_prefix_of_each_text_is_computed_once(data, tmp_path, monkeypatch):
    model, seen = tiny_model(), []
    below = model.model.layers[0]
    # 40 texts, of which each epoch of five batches leaves out four.
    config = replace(SHORT, steps=12, batch_size=7, eval_every=12)

    def watch(real):
        def watched(*arguments):
            handle = below.mlp.register_forward_hook(lambda *_: seen.append(0))
            found = real(*arguments)
            handle.remove()
            return found

        return watched

    for name in ("take_step", "score"):
        monkeypatch.setattr(trainer, name, watch(getattr(trainer, name)))
    train(model, TOKENIZER, config, data, tmp_path / "out")
    assert not seen


def test_an_existing_result_is_replaced_only_when_asked(data, tmp_path):
    out = tmp_path / "out"
    train(tiny_model(), TOKENIZER, SHORT, data, out)
    (out / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        train(tiny_model(), TOKENIZER, SHORT, data, out)
    with pytest.raises(UserError, match=r"note\.txt' is not of a run"):
        train(tiny_model(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert (out / "note.txt").read_text() == "mine" and (out / "metrics.json").exists()
    (out / "note.txt").unlink()
    (out / "curve.png").write_text("of --plot")
    metrics = train(tiny_model(), TOKENIZER, replace(SHORT, seed=5), data, out, overwrite=True)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert not (out / "curve.png").exists() and not list(tmp_path.glob("out.*"))


def test_an_adapter_of_others_is_no_result(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_text("of PEFT")
    with pytest.raises(UserError, match="not a result of dlzo"):
        train(tiny_model(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert (out / "adapter_model.safetensors").read_text() == "of PEFT"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", 6.0, "a whole number"),
        ("batch_size", "4", "a whole number"),
        ("seed", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("directions", 2.0, "a whole number"),
        ("rank", 2.5, "a whole number"),
        ("layer", True, "a number or several"),
        ("eps", "1e-3", "a number"),
        ("weight_decay", None, "a number"),
        ("lr", "3e-4", "'auto'"),
        ("lr", True, "'auto'"),
        ("lr_per_spread", 1, "True or False"),
        ("task", 3, "a text"),
        ("prefix_cache_dir", 3, "a path"),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(name, value, says):
    with pytest.raises(UserError, match=f"{name} is {value!r}: give .*{says}"):
        replace(SHORT, **{name: value})


@pytest.mark.parametrize(
    ("method", "lr"), [("dominant", 3e-4), ("mezo", 3e-5), ("lozo", 3e-5), ("lora", 3e-3)]
)
def test_each_method_has_a_rate_of_its_own(method, lr):
    assert TrainConfig("sst2", method=method).lr == lr
    assert TrainConfig("sst2", method=method, lr=1).lr == 1.0


def test_another_method_has_its_rate_when_asked():
    config = TrainConfig("sst2")
    assert replace(config, method="lora").lr == config.lr
    lora = replace(config, method="lora", lr=None, rank=None)
    assert (lora.lr, lora.rank) == (3e-3, 8)


def test_a_home_folder_may_be_left_out(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    metrics = train(tiny_model(), TOKENIZER, replace(SHORT, steps=1), "~/data", "~/out")
    assert resume(tiny_model(), TOKENIZER, "~/out") == metrics
    settings = json.loads((tmp_path / "out" / "run.json").read_text())
    assert settings["data"] == str(data)
    assert evaluate(tiny_model(), TOKENIZER, "sst2", "~/data") == metrics["zero_shot"]
    few = {"layers": [1], "seeds": 2, "batches": 2, "batch_size": 2}
    sensitivity(tiny_model(), TOKENIZER, "sst2", "~/data", **few)
    replay(tiny_model(), "~/out/journal.zo", "~/rebuilt")
    export("~/out", "~/exported")
    for name in ("rebuilt", "exported"):
        assert load_adapter(tiny_model(), tmp_path / name)["step"] in (0, 1)
    assert not any((tmp_path / "here").iterdir())


def test_paths_are_texts(tmp_path):
    config = replace(SHORT, prefix_cache_dir=tmp_path / "prefixes", task=Path("mine.yaml"))
    assert config.prefix_cache_dir == str(tmp_path / "prefixes")
    assert config.task == "mine.yaml"


@pytest.mark.parametrize(
    ("change", "method"), [("frozen", "dominant"), ("float64", "dominant"), ("float64", "lora")]
)
def test_a_model_that_cannot_be_tuned_is_refused_before_anything_is_written(
    data, tmp_path, change, method
):
    model = tiny_model()
    if change == "frozen":
        model.requires_grad_(False)
    else:
        model.double()
    config = replace(SHORT, method=method, rank=None)
    with pytest.raises(UserError, match="requires a gradient" if change == "frozen" else "float64"):
        train(model, TOKENIZER, config, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        ({"layer": 0}, "no decoder layer lies below the tuned one"),
        ({"method": "mezo", "layer": None}, "no layer is tuned by itself"),
        ({"layer": 1}, None),
    ],
)
def test_a_folder_for_prefixes_without_effect_is_told(data, tmp_path, caplog, tuned, says):
    config, cache = replace(SHORT, steps=1, **tuned), tmp_path / "cache"
    train(tiny_model(), TOKENIZER, config, data, tmp_path / "without")
    assert not caplog.messages
    train(tiny_model(), TOKENIZER, replace(config, prefix_cache_dir=cache), data, tmp_path / "with")
    said = [f"prefix_cache_dir {str(cache)!r} has no effect: {says}"] if says else []
    assert caplog.messages == said


def test_the_layer_is_found_without_dropout(data, tmp_path, monkeypatch):
    seen = []

    def probe(model, *_):
        seen.append(model.training)
        raise UserError("enough")

    monkeypatch.setattr(trainer, "_find_layers", probe)
    with pytest.raises(UserError, match="enough"):
        train(tiny_model().train(), TOKENIZER, SHORT, data, tmp_path / "out")
    assert seen == [False]


def test_what_only_looks_like_an_earlier_result_is_left_alone(data, tmp_path):
    out, theirs = tmp_path / "out", tmp_path / "out.replaced"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    train(tiny_model(), TOKENIZER, SHORT, data, out)
    with pytest.raises(UserError, match=r"out\.replaced.* is not a result of dlzo"):
        train(tiny_model(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert (out / "metrics.json").exists() and (theirs / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder of others", "file"])
def test_what_is_no_result_is_never_overwritten(data, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a result of dlzo"):
        train(tiny_model(), TOKENIZER, SHORT, data, out, overwrite=True)
    assert (out if kind == "file" else out / "thesis.txt").read_text() == "mine"


def test_an_output_that_cannot_be_written_is_refused_before_any_work(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delattr(trainer, "load_splits")
    with pytest.raises(UserError, match="cannot be written"):
        train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "adam"}, "'adam'.*dominant"),
        ({"method": "mezo"}, "leave out layer"),
        ({"method": "mezo", "layer": None, "part": "mlp"}, "'mlp' of all parameters"),
        ({"method": "lozo", "layer": None, "part": "mlp"}, "'mlp' of all parameters"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1025}, "rank is 1025"),
        ({"interval": 0}, "interval is 0"),
        ({"part": "head"}, "'head'.*attention"),
        ({"layer": [1, "2"]}, "give one number, or a few"),
        ({"layer": "11"}, "layer is '11': give one number, or a few"),
        ({"steps": 1 << 32}, "steps is 4294967296: give at most 4294967295"),
        ({"lr_decay": "exponential"}, "lr_decay 'exponential'.*cosine"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"weight_decay": 0.1, "lr_per_spread": True}, "leave one of the two out"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 63}, "seed is"),
        ({"eps": 0.0}, r"eps is 0\.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"lr": -1e-4}, "lr is -0.0001"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"weight_decay": 5000.0}, r"weight_decay is 5000\.0.*below 1 when multiplied by lr"),
        ({"sync_seconds": float("inf")}, "sync_seconds is inf"),
        ({"lr": 10**400}, "lr is inf"),
        ({"weight_decay": 10**400}, "weight_decay is inf"),
    ],
)
def test_bad_values_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"task": "sst3"}, "'sst3'"),
        ({"layer": 4}, "layer is 4: the model has layers 0 to 3"),
        ({"layer": -1}, "layer is -1"),
        ({"batch_size": 41}, "batch_size is 41.*40"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_is_written(
    data, tmp_path, change, says
):
    model = tiny_model()
    before = state(model)
    with pytest.raises(UserError, match=says):
        train(model, TOKENIZER, replace(CONFIG, **change), data, tmp_path / "new" / "out")
    assert same(state(model), before) and not (tmp_path / "new").exists()


def test_no_dominant_layer_asks_for_one(data, tmp_path, monkeypatch):
    decision = SimpleNamespace(layer=None, verdict="gradual")
    monkeypatch.setattr(trainer, "probe", lambda *_: SimpleNamespace(decision=decision))
    with pytest.raises(UserError, match=r"gradual.*--layer"):
        train(tiny_model(), TOKENIZER, replace(SHORT, layer=None), data, tmp_path / "out")


def test_missing_data_is_refused_before_anything_is_written(data, tmp_path):
    (data / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl"):
        train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_epoch_visits_each_example_at_most_once_in_its_own_order():
    epochs = [
        [i for step in steps for i in batch_indices(3, step, size=50, batch_size=16)]
        for steps in ((1, 2, 3), (4, 5, 6))
    ]
    for epoch in epochs:
        assert len(set(epoch)) == 48 and set(epoch) < set(range(50))
    assert epochs[0] != epochs[1]
    assert batch_indices(4, 1, 50, 16) != batch_indices(3, 1, 50, 16)


def test_an_epoch_is_drawn_once(monkeypatch):
    sorts, argsort = [], np.argsort
    monkeypatch.setattr(np, "argsort", lambda *a, **kw: sorts.append(0) or argsort(*a, **kw))
    for step in range(1, 10):
        batch_indices(11, step, size=50, batch_size=16)
    assert len(sorts) == 3


def test_step_seeds_are_distinct_and_positive_int64():
    seeds = {step_seed(seed, step) for seed in range(10) for step in range(1, 200)}
    assert len(seeds) == 10 * 199
    assert all(0 <= seed < 1 << 63 for seed in seeds) and max(seeds) > 1 << 60


def test_a_run_of_more_tensors_than_a_journal_names_is_refused_before_there_is_one(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr("dlzo.journal.MAX_HEADER", 1000)
    with pytest.raises(UserError, match=r"the run tunes 9 tensors.*tune fewer layers"):
        train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_history_is_drawn(data, tmp_path):
    metrics = train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    plot_history(metrics, tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    metrics["history"][2]["validation_loss"] = None
    plot_history(metrics, tmp_path / "history.svg")
    assert "validation" in (tmp_path / "history.svg").read_text()


def test_the_layer_runs_under_the_models_own_forward_afterwards(data, tmp_path):
    model = tiny_model()
    train(model, TOKENIZER, SHORT, data, tmp_path / "out")
    assert all("forward" not in vars(layer) for layer in decoder_layers(model))


def test_settings_may_be_numbers_of_numpy(tmp_path):
    data = write_data(tmp_path / "data")
    numbers = {"steps": 2, "eval_every": 2, "seed": 3, "layer": (1, 2), "eps": 0.25, "lr": 0.5**10}
    plain = replace(CONFIG, **numbers)
    odd = replace(CONFIG, **{name: np.array(value)[()] for name, value in numbers.items()})
    assert odd == replace(plain, layer=[1, 2])
    assert replace(odd, layer=tuple(np.arange(1, 3))) == plain
    for name, config in (("plain", plain), ("odd", odd)):
        train(tiny_model(), TOKENIZER, config, data, tmp_path / name)
    journals = [(tmp_path / name / "journal.zo").read_bytes() for name in ("plain", "odd")]
    assert journals[0] == journals[1]


def test_the_draws_are_those_of_all_releases():
    """Compact journals and runs that are taken up rest on them: docs/journal.md."""
    assert [step_seed(7, step) for step in (0, 1, 2)] == [
        *(8460147692890830636, 3317731564112288844, 9139555415570476218)
    ]
    word = np.random.SeedSequence((7, 2)).generate_state(1, np.uint64)[0]
    assert step_seed(7, 2) == int(word) >> 1
    assert [batch_indices(3, step, size=10, batch_size=4) for step in (1, 2, 3)] == [
        *([6, 2, 4, 9], [5, 1, 3, 8], [2, 5, 9, 0])
    ]


def test_of_equal_validations_the_first_is_the_best(data, tmp_path):
    metrics = train(tiny_model(), TOKENIZER, replace(SHORT, lr=0.0), data, tmp_path / "out")
    assert metrics["best"]["loss"] == metrics["final"]["loss"]
    assert metrics["best"]["step"] == 0 and metrics["final"]["step"] == SHORT.steps


@pytest.mark.parametrize(("untuned", "most"), [(0.5, 10.0), (3.0, 30.0)])
def test_a_loss_has_exploded_at_ten_times_the_untuned_one(
    data, tmp_path, monkeypatch, untuned, most
):
    seen = []

    def take_step(*arguments):
        seen.append(arguments[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "take_step", take_step)
    monkeypatch.setattr(trainer._Run, "evaluate_untuned", lambda self: {"loss": untuned})
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    assert seen == [most]


def test_ranks_may_have_the_model_in_other_folders(data, tmp_path, monkeypatch):
    digests = []
    monkeypatch.setattr(
        trainer.distributed,
        "check_equal",
        lambda digest, what: digests.append(digest()) if "settings" in what else None,
    )
    for name, seed in (("here", 0), ("there", 0), ("there", 1)):
        model = tiny_model()
        model.name_or_path = name
        config = replace(SHORT, steps=1, seed=seed)
        train(model, TOKENIZER, config, data, tmp_path / f"{name}-{seed}")
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("layer", [1, None])
def test_a_model_that_changes_its_own_weights_is_refused(layer, data, tmp_path):
    """In evaluation RWKV halves the weights of its upper layers, once: a fresh copy has others."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 4}
    model = random_model(RwkvConfig(vocab_size=VOCABULARY, **sizes, rescale_every=1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="RwkvForCausalLM changes its own weights as it runs"):
        train(model, TOKENIZER, replace(CONFIG, layer=layer), data, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "out").exists()
