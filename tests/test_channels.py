"""Outlier channels: which they are, and that a run moves what writes into them and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from dlzo.activations import outlier_channels
from dlzo.adapter import load_adapter, read_config
from dlzo.calibration import calibration_tokens
from dlzo.errors import UserError
from dlzo.export import export
from dlzo.journal import Reader
from dlzo.models import decoder_layers
from dlzo.replay import replay
from dlzo.target import Target
from dlzo.trainer import resume, train
from runs import (
    CONFIG,
    TOKENIZER,
    assert_rebuilt,
    result,
    rewrite_config,
    same,
    state,
    stopping_at,
    with_header,
)
from tiny import SHARED_MLP, random_model, tiny_model

# Of 32 channels.
TUNED = replace(CONFIG, channels=(23, 7))
SHORT = replace(TUNED, steps=6, eval_every=2)
# The parameters with which layer 1 writes.
WRITERS = {
    "llama": ("model.layers.1.", ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
    "gpt2": (
        "transformer.h.1.",
        ("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    ),
    "opt": (
        "model.decoder.layers.1.",
        ("self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"),
    ),
}
FAMILIES = pytest.mark.parametrize("family", WRITERS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("layers", [(2,), (0, 3)], ids=str)
def test_outliers_are_the_channels_of_the_largest_activations(layers):
    model, outputs = tiny_model(), []
    tuned = [decoder_layers(model)[layer] for layer in layers]
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in tuned]
    with torch.no_grad():
        for tokens in calibration_tokens(model, TOKENIZER):
            model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    maxima = torch.cat([output.abs()[0] for output in outputs]).amax(0)
    for top, count in ((1e-9, 1), (0.01, 1), (0.0625, 2), (0.07, 3), (1.0, 32)):
        found = outlier_channels(model, TOKENIZER, tuned, top)
        assert found == sorted(maxima.topk(count).indices.tolist())


def test_seven_percent_of_100_are_7(monkeypatch):
    monkeypatch.setattr("dlzo.activations.channel_maxima", lambda *_: torch.arange(100.0))
    assert outlier_channels(tiny_model(), TOKENIZER, [], 0.07) == list(range(93, 100))


@FAMILIES
@DTYPES
def test_what_writes_into_the_channels_is_tuned_and_nothing_else(data, tmp_path, family, dtype):
    model, out = tiny_model(family, dtype), tmp_path / "out"
    base = state(model)
    metrics = train(model, TOKENIZER, TUNED, data, out)
    assert metrics["best"]["step"] > 0 and metrics["channels"] == [7, 23]
    layer, writers = WRITERS[family]
    for name, tensor in state(model).items():
        moved = base[name] != tensor
        if name.removeprefix(layer) not in writers:
            assert not moved.any()
            continue
        # GPT-2 keeps its matrices as (inputs, outputs).
        moved = moved.T if family == "gpt2" and moved.ndim == 2 else moved
        moved = moved.reshape(32, -1)
        assert moved.any(1).nonzero().flatten().tolist() == [7, 23]
        assert moved[[7, 23]].float().mean() > 0.8
    header = Reader(out / "journal.zo").header
    names = [f"{layer}{name}[{channel}]" for name in writers for channel in (7, 23)]
    assert [p.name for p in header.parameters] == names
    assert [p.stream for p in header.parameters] == list(range(len(names)))
    assert header.settings["channels"] == [7, 23]
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}" for name in names}


@FAMILIES
@pytest.mark.parametrize("changes", [{}, {"part": "mlp", "layer": (1, 3)}], ids=str)
def test_replay_adapter_and_export_give_its_bits(data, tmp_path, family, changes):
    config = replace(SHORT, weight_decay=0.1, directions=2, **changes)
    model, out, states = tiny_model(family, torch.bfloat16), tmp_path / "out", []
    metrics = train(
        model, TOKENIZER, config, data, out, on_progress=lambda _: states.append(state(model))
    )
    assert not same(states[5], states[6])
    base_model = partial(tiny_model, family, torch.bfloat16)
    assert_rebuilt(out, base_model, state(model), states[-1], data, metrics)
    export(out, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    what = "the MLP of layers 1 and 3" if changes else "layer 1"
    assert f"2 channels of {what}" in card


def test_a_run_that_was_stopped_ends_in_the_same_bits_without_a_probe(data, tmp_path, monkeypatch):
    config = replace(SHORT, channels="outlier", top=0.1)
    model, whole, out = tiny_model(), tmp_path / "whole", tmp_path / "out"
    metrics = train(model, TOKENIZER, config, data, whole)
    layer = decoder_layers(base := tiny_model())[1]
    assert metrics["channels"] == outlier_channels(base, TOKENIZER, [layer], 0.1)
    assert len(metrics["channels"]) == 4

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, config, data, out, on_progress=stopping_at(3))
    monkeypatch.setattr("dlzo.trainer.outlier_channels", None)
    resumed = tiny_model()
    resume(resumed, TOKENIZER, out)
    assert result(out) == result(whole)
    assert same(state(resumed), state(model))


def test_a_second_run_on_the_same_model_starts_from_its_weights(data, tmp_path):
    # So small a move shows in the masters alone; those must not outlive the run's.
    first, second = (
        replace(SHORT, steps=10, eval_every=10, lr=lr, channels=(7, 9)) for lr in (1e-5, 1e-3)
    )
    model, fresh = tiny_model(dtype=torch.bfloat16), tiny_model(dtype=torch.bfloat16)
    train(model, TOKENIZER, first, data, tmp_path / "first")
    fresh.load_state_dict(state(model))
    for name, tuned in (("used", model), ("fresh", fresh)):
        train(tuned, TOKENIZER, second, data, tmp_path / name)
    assert same(state(model), state(fresh))
    assert (tmp_path / "used" / "journal.zo").read_bytes() == (
        tmp_path / "fresh" / "journal.zo"
    ).read_bytes()


def test_lr_zero_changes_no_bit(data, tmp_path):
    model = tiny_model("gpt2", torch.bfloat16)
    before = state(model)
    train(model, TOKENIZER, replace(SHORT, lr=0.0), data, tmp_path / "out")
    assert same(state(model), before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"channels": "some"}, "channels are 'some': choose all or outlier"),
        ({"channels": ()}, "give their numbers"),
        ({"channels": (1, -2)}, "give their numbers"),
        ({"channels": (1, 2.0)}, "give their numbers"),
        ({"method": "mezo", "layer": None}, "'mezo' tunes all channels"),
        ({"method": "lozo"}, "'lozo' tunes all channels"),
        ({"method": "lora"}, "'lora' tunes all channels"),
        ({"top": 0.0}, r"top is 0\.0"),
        ({"top": 1.5}, r"top is 1\.5"),
        ({"top": float("nan")}, "top is nan"),
    ],
)
def test_bad_values_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        replace(TUNED, **changes)


@pytest.mark.parametrize(
    ("layers", "channels", "says"),
    [
        ((1,), (7, 32), "the model has 0 to 31"),
        ((1,), (-1, 7), "the model has 0 to 31"),
        ((1,), (7, 7), "the lowest first"),
        ((1,), (23, 7), "the lowest first"),
        ((), (7,), "only decoder layers"),
    ],
)
def test_what_the_model_does_not_have_is_refused(layers, channels, says):
    with pytest.raises(UserError, match=says):
        Target(tiny_model(), layers, channels=channels)


def test_a_layer_without_one_writing_matrix_is_refused():
    model = tiny_model()
    block = model.model.layers[1].mlp
    # As where several experts share the work.
    block.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 4, 4)))
    with pytest.raises(UserError, match="the mlp of layer 1 has no single matrix"):
        Target(model, (1,), channels=(7,))
    assert len(Target(model, (1,), "attention", channels=(7,)).parameters) == 1


def test_an_mlp_of_several_parts_is_refused():
    with pytest.raises(UserError, match="the mlp of layer 1 has no single matrix"):
        Target(random_model(SHARED_MLP), (1,), channels=(7,))


def test_outliers_of_a_layer_that_the_model_lacks_are_refused(data, tmp_path):
    config = replace(SHORT, channels="outlier", layer=4)
    with pytest.raises(UserError, match="layer is 4: the model has layers 0 to 3"):
        train(tiny_model(), TOKENIZER, config, data, tmp_path / "out")


def test_outputs_that_are_not_finite_are_refused(data, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    config = replace(SHORT, channels="outlier")
    with pytest.raises(UserError, match="tuned layer is not finite"):
        train(model, TOKENIZER, config, data, tmp_path / "out")


def test_another_base_journal_or_adapter_is_refused(data, tmp_path):
    out = tmp_path / "out"
    train(tiny_model(), TOKENIZER, SHORT, data, out)
    journal, rebuilt = out / "journal.zo", tmp_path / "rebuilt"
    settings = Reader(journal).header.settings
    for channels, says in (
        ([7, 22], "parameters differ"),
        ("all", "parameters differ"),
        ("outlier", r"changed.zo' has the invalid setting channels = 'outlier': take"),
        ([7, "23"], r"invalid setting channels = \[7, '23'\]: "),
        ([7, 99], "the model has 0 to 31"),
    ):
        path = tmp_path / "changed.zo"
        changed = with_header(journal, path, settings=settings | {"channels": channels})
        with pytest.raises(UserError, match=says):
            replay(tiny_model(), changed, rebuilt)
        path.unlink()
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 3] += 0.5
    for call in (lambda: load_adapter(model, out), lambda: replay(model, journal, rebuilt)):
        with pytest.raises(UserError, match=r"other weights|base fingerprint"):
            call()
    for channels in ("7", [7.0], None):
        config = read_config(out) | {"channels": channels}
        rewrite_config(out, json.dumps(config))
        with pytest.raises(UserError, match="no valid 'channels'"):
            load_adapter(tiny_model(), out)
        rewrite_config(out, json.dumps(config | {"channels": [7, 23]}))
    assert not rebuilt.exists()
