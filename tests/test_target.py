"""Runs on layers, parts and whole models: what moves, and that the journal has all of it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch

from dlzo.adapter import load_adapter
from dlzo.errors import UserError
from dlzo.evaluation import evaluate
from dlzo.export import export
from dlzo.journal import Reader
from dlzo.models import layer_parts
from dlzo.records import encode_header
from dlzo.replay import replay
from dlzo.target import Target, describe
from dlzo.trainer import resume, train
from fuzz import parts_of, sealed
from runs import CONFIG, TOKENIZER, assert_rebuilt, result, same, state, stopping_at
from tiny import CONFIGS, HYBRIDS, random_model, tiny_model

SHORT = replace(CONFIG, steps=6, eval_every=2)
LAYERS = "model.layers."
# What is tuned, and how the names of its parameters begin.
TARGETS = {
    "two layers": ({"layer": (3, 1)}, (f"{LAYERS}1.", f"{LAYERS}3.")),
    "mlp": ({"part": "mlp"}, (f"{LAYERS}1.mlp.",)),
    "attention of two": (
        {"layer": (0, 2), "part": "attention"},
        (f"{LAYERS}0.self_attn.", f"{LAYERS}2.self_attn."),
    ),
    "low rank": (
        {"method": "lozo", "layer": (0, 3), "interval": 4, "weight_decay": 0.1},
        (f"{LAYERS}0.", f"{LAYERS}3."),
    ),
    "low rank of all": (
        {"method": "lozo", "layer": None, "rank": 1, "interval": 4, "lr": 1e-3},
        ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"{LAYERS}{i}." for i in range(4))),
    ),
    "all parameters": (
        {"method": "mezo", "layer": None, "lr": 1e-3},
        ("model.embed_tokens.", "model.norm.", "lm_head.", *(f"{LAYERS}{i}." for i in range(4))),
    ),
}


def changed(model, base):
    return {name for name in base if not torch.equal(base[name], model.state_dict()[name])}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_named_is_tuned_and_nothing_else(data, tmp_path, name, dtype):
    changes, prefixes = TARGETS[name]
    model, out = tiny_model(dtype=dtype), tmp_path / "out"
    base = state(model)
    metrics = train(model, TOKENIZER, replace(CONFIG, **changes), data, out)
    assert metrics["best"]["loss"] < 0.9 * metrics["history"][0]["validation_loss"]
    moved = changed(model, base)
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in moved)
    assert all(name.startswith(prefixes) for name in moved)
    parameters = Reader(out / "journal.zo").header.parameters
    assert [p.name for p in parameters] == [name for name in base if name.startswith(prefixes)]
    assert [p.stream for p in parameters] == list(range(len(parameters)))


@pytest.mark.parametrize("name", TARGETS)
def test_replay_adapter_and_export_give_its_bits(data, tmp_path, name):
    model, out = tiny_model(), tmp_path / "out"
    states = []
    metrics = train(
        model,
        TOKENIZER,
        replace(SHORT, **TARGETS[name][0]),
        data,
        out,
        on_progress=lambda entry: states.append(state(model)),
    )
    assert_rebuilt(out, tiny_model, state(model), states[-1], data, metrics)
    export(out, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert describe(metrics) in card


def test_tied_embeddings_move_as_one_parameter(data, tmp_path):
    model, out = tiny_model("gpt2"), tmp_path / "out"
    metrics = train(model, TOKENIZER, replace(SHORT, method="mezo", layer=None), data, out)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert not torch.equal(head, tiny_model("gpt2").get_output_embeddings().weight)
    loaded = tiny_model("gpt2")
    load_adapter(loaded, out)
    assert same(state(loaded), state(model))
    assert evaluate(loaded, TOKENIZER, "sst2", data) == metrics["test"]


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_that_was_stopped_ends_in_the_same_bits(data, tmp_path, name):
    config = replace(SHORT, directions=2, **TARGETS[name][0])

    train(tiny_model(), TOKENIZER, config, data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, tmp_path / "out", on_progress=stopping_at(3))
    resume(tiny_model(), TOKENIZER, tmp_path / "out")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def as_version_1(journal):
    """A journal of one layer as releases wrote it that knew no other."""
    first, *records = parts_of(journal)
    header = json.loads(first[16:])
    (header["layer"],) = header.pop("layers")
    del header["settings"]["part"]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    journal.write_bytes(sealed(struct.pack("<8sII", b"DLZOJRNL", 1, len(text)) + text, *records))


def test_a_journal_of_version_1_is_replayed_and_its_run_goes_on(data, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    model = tiny_model()
    train(model, TOKENIZER, SHORT, data, whole)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(3))
    as_version_1(out / "journal.zo")
    settings = json.loads((out / "run.json").read_text())
    settings["config"]["layer"] = 1
    del settings["config"]["part"]
    (out / "run.json").write_text(json.dumps(settings))
    resume(tiny_model(), TOKENIZER, out)
    files = ("metrics", "adapter_model.safetensors")
    assert [result(out)[name] for name in files] == [result(whole)[name] for name in files]

    best = json.loads((whole / "metrics.json").read_text())["best"]["step"]
    as_version_1(whole / "journal.zo")
    assert encode_header(Reader(whole / "journal.zo").header).count(b'"layers":[1]') == 1
    replayed = tiny_model()
    replay(replayed, whole / "journal.zo", tmp_path / "rebuilt", until=best)
    assert same(state(replayed), state(model))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_has_an_attention_and_an_mlp(family):
    model = tiny_model(family)
    names = {
        part: {name for name in Target(model, (1,), part).parameters if "norm" not in name}
        for part in ("all", "attention", "mlp")
    }
    assert all("attn" in name or "attention" in name for name in names["attention"])
    assert all("mlp" in name or "fc" in name for name in names["mlp"])
    assert names["attention"] and names["mlp"]
    matrices = {name for name, p in Target(model, (1,)).parameters.items() if p.ndim > 1}
    assert matrices <= names["attention"] | names["mlp"]


def test_a_layer_without_parts_is_refused():
    for layer in (torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))):
        with pytest.raises(UserError, match="no attention and MLP that can be told apart"):
            layer_parts(layer)


@pytest.mark.parametrize(
    ("layers", "part", "says"),
    [
        ((1, 4), "all", "layer is 4: the model has layers 0 to 3"),
        ((2, 1), "all", "the lowest first"),
        ((1, 1), "all", "give each once"),
        ((1,), "head", "part is 'head'"),
        ((), "mlp", "part is 'mlp'"),
    ],
)
def test_what_the_model_does_not_have_is_refused(layers, part, says):
    with pytest.raises(UserError, match=says):
        Target(tiny_model(), layers, part)


def test_it_is_described():
    assert describe({"layers": [11], "part": "all"}) == "layer 11"
    assert describe({"layers": [5, 11], "part": "mlp"}) == "the MLP of layers 5 and 11"
    assert (
        describe({"layers": (1, 2, 3), "part": "attention"}) == "the attention of layers 1, 2 and 3"
    )
    assert describe({"layers": (), "part": "all"}) == "all parameters"
    assert describe({"layers": [11], "method": "lora"}) == "LoRA on layer 11"
    assert describe({"layers": [], "method": "lora"}) == "LoRA on all layers"
    assert describe({"layers": [11], "channels": [7, 9]}) == "2 channels of layer 11"


def test_parts_that_cannot_be_told_apart_are_refused() -> None:
    model = random_model(HYBRIDS["zamba2"]())
    for part in ("attention", "mlp"):
        for channels in ((), (3,)):
            with pytest.raises(UserError, match=r"told apart|no single matrix"):
                Target(model, (1,), part, channels=channels)
    with pytest.raises(UserError, match=r"no single matrix|told apart"):
        Target(model, (1,), channels=(3,))
