"""LoRA adapters: where they lie, how they begin, and that a run on them keeps every promise."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers.utils.peft_utils
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dlzo import trainer
from dlzo.adapter import load_adapter, read_config
from dlzo.errors import UserError
from dlzo.export import export
from dlzo.journal import Reader
from dlzo.lora import Lora, take_out
from dlzo.models import decoder_layers
from dlzo.replay import replay
from dlzo.run import read_settings
from dlzo.sampler import step_seed
from dlzo.scoring import PrefixCache, Scorer
from dlzo.target import Target, describe
from dlzo.tasks import Example
from dlzo.trainer import resume, train
from dlzo_kernels import gaussian
from runs import (
    CONFIG,
    TOKENIZER,
    Killed,
    assert_rebuilt,
    result,
    rewrite_config,
    same,
    state,
    stopping_at,
    with_header,
)
from tiny import tiny_model

TUNED = replace(CONFIG, method="lora", rank=3)
SHORT = replace(TUNED, steps=6, eval_every=2)
TOKENS = torch.arange(24)[None]
# Of each family, where the adapters of layer 1 lie.
PROJECTIONS = {
    "llama": ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    "phi": ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"),
    "gpt2": ("transformer.h.1.attn.c_attn",),
    "bloom": ("transformer.h.1.self_attention.query_key_value",),
}
FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("layers", [(), (1,)], ids=str)
@pytest.mark.parametrize("family", PROJECTIONS)
@DTYPES
def test_untuned_adapters_change_nothing_and_come_out_again(family, dtype, layers):
    model = tiny_model(family, dtype)
    before, expected, drawn = state(model), logits(model), torch.get_rng_state()
    target = Target(model, layers, lora=Lora(3, 5))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(logits(model), expected)
    assert model._hf_peft_config_loaded
    own = [name for name in target.parameters if f".{1}." in name]
    places = [name.rpartition(".lora_")[0] for name in own]
    assert tuple(dict.fromkeys(places)) == PROJECTIONS[family]
    assert len(target.parameters) == len(own) * (1 if layers else 4)
    with pytest.raises(Killed), target.undone_by_error():
        raise Killed
    assert same(state(model), before) and not model._hf_peft_config_loaded
    assert all(parameter.requires_grad for parameter in model.parameters())
    Target(model, layers, lora=Lora(3, 5))


@FAMILIES
def test_a_is_noise_of_the_usual_variance_and_b_is_zero(family):
    model = tiny_model(family, torch.bfloat16)
    target = Target(model, (0, 2), lora=Lora(64, 5))
    variances = []
    for stream, (name, weight) in enumerate(target.parameters.items()):
        assert weight.dtype is torch.float32 and target.stream(name) == stream
        if ".lora_B." in name:
            assert not weight.any() and weight.shape[1] == 64
            continue
        rank, inputs = weight.shape
        assert (rank, inputs) == (64, 32)
        scale = torch.tensor(math.sqrt(1 / (3 * inputs)), dtype=torch.float32)
        z = gaussian(weight.shape, step_seed(5, 0), stream=stream)
        assert torch.equal(weight, 0 + scale * z)
        variances.append(3 * inputs * weight.var().item())
    assert variances == pytest.approx([1] * len(variances), abs=0.1)


@pytest.mark.parametrize("layer", [None, 1, (0, 3)], ids=str)
@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_tunes_the_adapters_alone(data, tmp_path, family, dtype, layer):
    model, out = tiny_model(family, dtype), tmp_path / "out"
    base, drawn = state(model), torch.get_rng_state()
    metrics = train(model, TOKENIZER, replace(TUNED, layer=layer), data, out)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert metrics["best"]["step"] > 0
    layers = [1] if layer == 1 else list(layer or ())
    assert (metrics["method"], metrics["layers"]) == ("lora", layers)
    parameters = Reader(out / "journal.zo").header.parameters
    assert {p.name.split(".lora_")[0].split(".")[2] for p in parameters} == set(
        map(str, layers or range(4))
    )
    assert [p.stream for p in parameters] == list(range(len(parameters)))
    untouched = Target(model_of := tiny_model(family, dtype), tuple(layers), lora=Lora(3, 0))
    tuned = state(model)
    for name, weight in state(model_of).items():
        assert torch.equal(weight, tuned[name]) != (name in untouched.parameters)
    take_out(model)
    assert same(state(model), base)
    names = load_file(out / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


@FAMILIES
@pytest.mark.parametrize("layer", [None, 1], ids=str)
def test_replay_adapter_and_peft_give_its_bits(data, tmp_path, family, layer):
    model, out, states = tiny_model(family, torch.bfloat16), tmp_path / "out", []
    config = replace(SHORT, layer=layer, seed=7, weight_decay=0.1)
    metrics = train(
        model, TOKENIZER, config, data, out, on_progress=lambda _: states.append(state(model))
    )
    assert not same(states[5], states[6])
    base_model = partial(tiny_model, family, torch.bfloat16)
    assert_rebuilt(out, base_model, state(model), states[-1], data, metrics)
    export(out, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert describe(metrics) in card and "PeftModel" in card
    for folder in (out, tmp_path / "exported"):
        wrapped = PeftModel.from_pretrained(tiny_model(family, torch.bfloat16), folder)
        assert torch.equal(logits(wrapped), logits(model))
    assert not torch.equal(logits(model), logits(tiny_model(family, torch.bfloat16)))
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] == (family == "gpt2")


@pytest.mark.parametrize("stops", [[0], [3], [1, 2, 4, 6]], ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bits(data, tmp_path, stops):
    model, whole, out = tiny_model(), tmp_path / "whole", tmp_path / "out"
    train(model, TOKENIZER, SHORT, data, whole)
    expected = result(whole) | {"peft": (whole / "adapter_config.json").read_bytes()}

    first, *others = stops
    stopped = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        train(stopped, TOKENIZER, SHORT, data, out, on_progress=stopping_at(first))
    best = tiny_model()
    load_adapter(best, out)
    assert same(state(stopped), state(best))
    for stop in others:
        with pytest.raises(KeyboardInterrupt):
            resume(tiny_model(), TOKENIZER, out, on_progress=stopping_at(stop))
    resumed = tiny_model()
    resume(resumed, TOKENIZER, out)
    assert result(out) | {"peft": (out / "adapter_config.json").read_bytes()} == expected
    assert same(state(resumed), state(model))


@FAMILIES
@DTYPES
def test_the_merged_model_has_them_in_its_weights(data, tmp_path, family, dtype):
    base = tmp_path / "base"
    tiny_model(family, dtype).save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    train(model, TOKENIZER, SHORT, data, tmp_path / "out")
    export(tmp_path / "out", tmp_path / "merged", "model")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"rounded to {str(dtype).removeprefix('torch.')}; the figures are those" in card
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert state(merged).keys() == state(tiny_model(family)).keys()
    for name in PROJECTIONS[family]:
        adapted = model.get_submodule(name)
        a, b = (part["default"].weight.double() for part in (adapted.lora_A, adapted.lora_B))
        delta = 2 * (b @ a).T if family == "gpt2" else 2 * b @ a
        expected = adapted.base_layer.weight.double() + delta
        error = (merged.get_submodule(name).weight - expected).abs()
        # One rounding of the sum to the dtype; those of the product and the sum to float32.
        assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-7).all()
        assert delta.abs().max() > 1e-4
    if dtype is torch.float32:
        expected, untuned = logits(model), logits(tiny_model(family))
        assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(untuned, expected, rtol=0, atol=1e-3)
    take_out(model, merge=True)
    assert same(state(merged), state(model))


@FAMILIES
def test_what_lies_below_the_tuned_layer_is_computed_once(family):
    model = tiny_model(family)
    target = Target(model, (2,), lora=Lora(3, 0))
    scorer = Scorer(model, TOKENIZER, target.decoder_layers, cache=PrefixCache(10**6))
    calls, below = [], decoder_layers(model)[0]
    next(below.children()).register_forward_hook(lambda *_: calls.append(0))
    batch = scorer.encode([Example("ab", (" terrible", " great"), 0)])
    scorer.losses(scorer.plan(batch), [nullcontext, nullcontext])
    assert len(calls) == 1
    scorer.cache_prefixes(batch)
    calls.clear()
    scorer.losses(scorer.plan(batch), [nullcontext, nullcontext])
    assert not calls


def test_they_are_float32_whatever_torch_makes():
    torch.set_default_dtype(torch.bfloat16)
    try:
        target = Target(tiny_model(), (2,), lora=Lora(3, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in target.parameters.values()} == {torch.float32}


def test_ranks_are_those_of_the_methods():
    assert replace(CONFIG, method="lora", rank=None).rank == 8
    assert replace(CONFIG, method="lozo", rank=None).rank == CONFIG.rank == 2


def assert_refused(model, says, call):
    before = state(model)
    with pytest.raises(UserError, match=says):
        call()
    assert same(state(model), before)


def test_without_peft_the_remedy_is_named(data, tmp_path, monkeypatch):
    train(tiny_model(), TOKENIZER, SHORT, data, tmp_path / "out")
    monkeypatch.setattr(transformers.utils.peft_utils, "is_peft_available", lambda: False)
    model, says = tiny_model(), r"LoRA needs PEFT.*pip install 'dlzo-kernels\[lora\]'"
    assert_refused(model, says, lambda: train(model, TOKENIZER, SHORT, data, tmp_path / "new"))
    assert_refused(model, says, lambda: load_adapter(model, tmp_path / "out"))
    journal = tmp_path / "out" / "journal.zo"
    assert_refused(model, says, lambda: replay(model, journal, tmp_path / "rebuilt"))
    assert not (tmp_path / "new").exists() and not (tmp_path / "rebuilt").exists()


def test_a_model_that_cannot_have_them_is_refused(data, tmp_path, monkeypatch):
    model = tiny_model("gpt2")
    Target(model, (1,), lora=Lora(3, 0))
    assert_refused(model, "adapters already", lambda: Target(model, (2,), lora=Lora(3, 0)))
    others = replace(CONFIG, method="dominant", layer=2)
    out = tmp_path / "out"
    assert_refused(model, "adapters already", lambda: train(model, TOKENIZER, others, data, out))
    mapping = "peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    monkeypatch.setattr(mapping, {})
    fresh = tiny_model("gpt2")
    out = tmp_path / "out"
    assert_refused(fresh, "no matrices", lambda: train(fresh, TOKENIZER, SHORT, data, out))
    assert not out.exists()


def test_a_part_of_the_layer_is_refused():
    with pytest.raises(UserError, match="part is 'mlp' and method 'lora' has its own"):
        replace(TUNED, part="mlp")


def test_what_stops_a_run_before_it_begins_leaves_the_model_as_it_was(data, tmp_path, monkeypatch):
    model = tiny_model()
    out = tmp_path / "file" / "out"
    out.parent.write_text("")
    assert_refused(model, "cannot be written", lambda: train(model, TOKENIZER, SHORT, data, out))
    monkeypatch.setattr(trainer._Run, "evaluate_untuned", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, TOKENIZER, SHORT, data, tmp_path / "out")
    assert same(state(model), state(tiny_model()))


def test_another_base_or_journal_is_refused(data, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), TOKENIZER, SHORT, data, out, on_progress=stopping_at(0))
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0, 0] += 0.5
    assert_refused(other, "base fingerprint", lambda: resume(other, TOKENIZER, out))
    assert_refused(other, "other weights", lambda: load_adapter(other, out))
    journal, rebuilt = out / "journal.zo", tmp_path / "rebuilt"
    assert_refused(other, "base fingerprint", lambda: replay(other, journal, rebuilt))
    model, settings = tiny_model(), Reader(journal).header.settings
    for changes, says in (
        ({"seed": 8}, "base fingerprint"),
        ({"settings": settings | {"rank": 2}}, "parameters differ"),
        ({"settings": settings | {"rank": "3"}}, "'.*' has the invalid setting rank = '3': "),
        ({"settings": settings | {"rank": 1 << 20}}, "invalid setting rank = 1048576"),
        ({"settings": settings | {"method": "dominant"}}, "parameters differ"),
    ):
        changed = with_header(journal, tmp_path / "changed.zo", **changes)
        assert_refused(model, says, lambda: replay(model, changed, rebuilt))  # noqa: B023
        changed.unlink()
    assert not rebuilt.exists()
    rebuilt.touch()
    assert_refused(model, "cannot be written", lambda: replay(model, journal, rebuilt))
    # Weights elsewhere in the model may differ, as for the other methods.
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 0.5
    load_adapter(model, out)


@pytest.mark.parametrize(
    "lora",
    [None, {}, {"rank": 3}, {"rank": 0, "seed": 0}, {"rank": 3.0, "seed": 0},
     {"rank": 1025, "seed": 0}, {"rank": 3, "seed": -1}, {"rank": 3, "seed": True}],
    ids=str,
)  # fmt: skip
def test_an_adapter_that_says_nonsense_is_refused(data, tmp_path, lora):
    train(tiny_model(), TOKENIZER, replace(SHORT, steps=1), data, tmp_path / "out")
    rewrite_config(tmp_path / "out", json.dumps(read_config(tmp_path / "out") | {"lora": lora}))
    model = tiny_model()
    assert_refused(model, "no valid 'lora'", lambda: load_adapter(model, tmp_path / "out"))


def test_settings_say_the_rank(data, tmp_path):
    train(tiny_model(), TOKENIZER, replace(SHORT, rank=None, steps=1), data, tmp_path / "out")
    assert read_settings(tmp_path / "out")["config"]["rank"] == 8
    assert Reader(tmp_path / "out" / "journal.zo").header.settings["rank"] == 8
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 16
