"""The probe: its rule on measured models, its statistics against a plain reference."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import disk_offload
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import dlzo.decision
from dlzo.activations import outlier_channels
from dlzo.calibration import calibration_texts, read_texts
from dlzo.errors import UserError
from dlzo.models import decoder_layers, load_model
from dlzo.plots import plot_probe
from dlzo.probe import Channel, Decision, LayerStats, ProbeReport, SiteStats, decide, probe
from tiny import CONFIGS, STREAMS, byte_tokenizer, random_model, tiny_model


def profile_of(depth: int, changes: dict[int, float]) -> list[float]:
    """max|h| that changes at these layers and stays as it is between them."""
    levels, level = [], changes[0]
    for layer in range(depth):
        level = changes.get(layer, level)
        levels.append(level)
    return levels


# Where and how high massive activations emerge, as published: arXiv 2402.17762, 2411.07191,
# 2605.08504 and 2605.15572. The layers between are drawn flat.
PROFILES = {
    "LLaMA2-7B": profile_of(32, {0: 2.5, 1: 2450.0, 31: 900.0}),
    "Mistral-7B": profile_of(32, {0: 1.5, 1: 300.0, 31: 100.0}),
    "Qwen3-8B": profile_of(36, {0: 40.0, 2: 120.0, 5: 181.0, 6: 17280.0, 35: 4000.0}),
    "Qwen3-1.7B": profile_of(28, {0: 40.0, 1: 100.0, 2: 14016.0, 27: 2000.0}),
    "Qwen2.5-7B": profile_of(28, {0: 30.0, 1: 90.0, 3: 10176.0, 27: 500.0}),
    "GPT-2": profile_of(12, {0: 50.0, 1: 90.0, 2: 2480.0, 11: 400.0}),
    "Gemma": [20.0 * 1.25**layer for layer in range(26)],
    "OLMo-2": [3.0 + 0.4 * layer for layer in range(32)],
    # arXiv 2605.15572: the two extremes of its models with an outlier layer, and one without.
    "Ling-mini": profile_of(20, {0: 11.0, 1: 10112.0, 18: 8768.0, 19: 11776.0}),
    "gpt-oss-20b": profile_of(
        24, {0: 284.0, 6: 42752.0, 17: 3216.0, 20: 11392.0, 22: 18304.0, 23: 145408.0}
    ),
    "Qwen3.5": profile_of(32, {0: 20.0, 2: 40.0, 10: 72.0, 18: 100.0, 22: 150.0, 31: 900.0}),
    # Block outputs over the built-in texts, in bfloat16.
    "SmolLM2-135M-Instruct": [
        *[38.25, 330.0, 908.0, 908.0, 908.0, 904.0, 900.0, 892.0, 816.0, 432.0, 118.0],
        *[25600.0] * 16,
        *[25344.0, 11136.0, 5248.0],
    ],
}
# Layer, verdict, runner-up.
EXPECTED = {
    "LLaMA2-7B": (1, "dominant", None),
    "Mistral-7B": (1, "dominant", None),
    "Qwen3-8B": (6, "dominant", 2),
    "Qwen3-1.7B": (2, "dominant", None),
    "Qwen2.5-7B": (3, "dominant", 1),
    "GPT-2": (2, "dominant", None),
    "Gemma": (None, "gradual", None),
    "OLMo-2": (None, "none", None),
    "Ling-mini": (1, "dominant", None),
    "gpt-oss-20b": (6, "dominant", 20),
    "Qwen3.5": (None, "none", None),
    "SmolLM2-135M-Instruct": (11, "dominant", 1),
}
# Constant, value, and the range over which no decision on these profiles changes: as docs/probe.md
# has it in a table.
RANGES = [
    (name, *map(float, numbers))
    for name, *numbers in re.findall(
        r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|",
        (Path(__file__).parents[1] / "docs" / "probe.md").read_text("utf-8"),
        re.MULTILINE,
    )
]


def test_the_docs_list_all_constants() -> None:
    names = {"EMERGENCE_RISE", "MIN_JUMP", "CLEAR_CONFIDENCE", "GRADUAL_GROWTH"}
    assert {constant for constant, *_ in RANGES} == names


@pytest.mark.parametrize("model", PROFILES)
def test_published_models(model: str) -> None:
    decision = decide(PROFILES[model])
    assert (decision.layer, decision.verdict, decision.runner_up) == EXPECTED[model]


@pytest.mark.parametrize(
    "steps",
    [{0: 50.0, 1: 756.0, 3: 6400.0}, {0: 12.0, 1: 179.0, 2: 1080.0, 3: 1512.0}],
    ids=["Qwen2.5-VL-7B", "Qwen3-30B-A3B"],
)
def test_an_emergence_in_two_steps_is_ambiguous_and_names_both(steps: dict[int, float]) -> None:
    decision = decide(profile_of(28, {**steps, 27: 700.0}))
    assert decision.verdict == "ambiguous"
    assert {decision.layer, decision.runner_up} <= set(steps) - {0}


def room(monkeypatch: pytest.MonkeyPatch, constant: str, step: float) -> float:
    """How far a constant goes, in factors of `step`, until a decision on the profiles changes."""
    value = getattr(dlzo.decision, constant)
    # Below 1 a jump is a fall, and a confidence is a share.
    least, most = (0.01, 1.0) if constant == "CLEAR_CONFIDENCE" else (1.01, 1000.0)
    while least < value * step < most:
        monkeypatch.setattr(dlzo.decision, constant, value * step)
        decisions = {model: decide(profile) for model, profile in PROFILES.items()}
        if any((d.layer, d.verdict) != EXPECTED[model][:2] for model, d in decisions.items()):
            break
        value *= step
    return value


@pytest.mark.parametrize("row", RANGES)
def test_constants_have_the_room_that_the_docs_say(
    monkeypatch: pytest.MonkeyPatch, row: tuple[str, float, float, float]
) -> None:
    constant, value, low, high = row
    assert getattr(dlzo.decision, constant) == value
    with monkeypatch.context() as patch:
        assert room(patch, constant, 1 / 1.005) == pytest.approx(low, rel=0.02)
    with monkeypatch.context() as patch:
        assert room(patch, constant, 1.005) == pytest.approx(high, rel=0.02)


@pytest.mark.parametrize(
    ("profile", "layer"),
    [
        pytest.param([2.5, *[2450.0] * 30, 900.0], 1, id="first possible layer"),
        pytest.param([0.3, 20.0, 25.0, 30.0, *[900.0] * 25], 4, id="large ratio of small numbers"),
        pytest.param([20.0, 120.0, 728.0, *[1000.0] * 28], 2, id="two steps, neither tenfold"),
        pytest.param([10.0, *[264.0] * 30, 100.0], 1, id="Phi-2 without a start token"),
        pytest.param([10.0, 40.0, *[728.0] * 29, 300.0], 2, id="Phi-2 with a start token"),
        pytest.param([10.0] * 20 + [5000.0], None, id="last layer only"),
        pytest.param([10.0] * 12, None, id="flat"),
        pytest.param([5.0], None, id="one layer"),
        pytest.param([5.0, 5000.0], None, id="two layers"),
        pytest.param([1000.0, *[10.0] * 20], None, id="a fall"),
        pytest.param([*[10.0] * 10, 3000.0, *[12.0] * 10], None, id="not carried on"),
    ],
)
def test_traps(profile: list[float], layer: int | None) -> None:
    assert decide(profile).layer == layer


def test_a_rescaled_stream_has_no_outlier_layer() -> None:
    absmax = [10.0] * 5 + [1000.0] * 10
    assert decide(absmax, [5.0] * 5 + [800.0] * 10).layer == 5
    rescaled = decide(absmax, [5.0] * 15)
    assert rescaled.layer is None
    assert "no layer makes a step of 3x that lasts and raises the kurtosis too" in rescaled.reason


@pytest.mark.parametrize("profile", [[5.0], [5.0, 5000.0]])
def test_too_few_layers_are_no_evidence(profile: list[float]) -> None:
    decision = decide(profile)
    assert decision.verdict == "none"
    assert decision.confidence == 0
    assert "too few" in decision.reason


positive = st.floats(1e-30, 1e30)
profiles = st.lists(positive, min_size=1, max_size=40)


@given(st.lists(st.floats(5e-324, allow_infinity=False), min_size=1, max_size=40))
def test_never_fails_on_positive_numbers(profile: list[float]) -> None:
    decision = decide(profile)
    assert (decision.layer is None) == (decision.verdict in ("gradual", "none"))
    assert 0.0 <= decision.confidence <= 1.0
    if decision.layer is None:
        assert decision.runner_up is None
    else:
        assert 0 < decision.layer < len(profile) - 1
        assert decision.runner_up != decision.layer


# Two equal steps: the layers tie, and rounding of the logarithms must not decide.
@example([1.4834832711701211, 28.698142889369485, 555.1686502329438, 1.0], 42)
@given(profiles, st.integers(-60, 60))
def test_the_unit_of_h_does_not_matter(profile: list[float], exponent: int) -> None:
    decision, scaled = decide(profile), decide([math.ldexp(h, exponent) for h in profile])
    assert (scaled.layer, scaled.verdict, scaled.runner_up, scaled.confidence) == (
        decision.layer,
        decision.verdict,
        decision.runner_up,
        decision.confidence,
    )


@given(st.integers(1, 20), st.integers(2, 20), st.floats(200.0, 1e6), positive)
def test_one_step_is_found(before: int, after: int, factor: float, level: float) -> None:
    decision = decide([level] * before + [level * factor] * after)
    assert decision.layer == before
    assert decision.verdict == "dominant"


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_values_are_named(value: float) -> None:
    with pytest.raises(UserError, match=r"max\|h\| of layer 1 is .* positive finite number"):
        decide([1.0, value, 2.0])


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_a_bad_kurtosis_is_named(value: float) -> None:
    with pytest.raises(UserError, match=r"the kurtosis of layer 2 is .* a finite number"):
        decide([1.0, 2.0, 3.0], [3.0, 3.0, value])


@pytest.mark.parametrize("kind", [np.array, torch.tensor, iter, tuple])
def test_figures_come_in_any_form(kind: Callable[[list[float]], Any]) -> None:
    absmax, excess = [2.5, *[2450.0] * 6, 900.0], [-0.4, *[5000.0] * 6, 300.0]
    assert decide(kind(absmax), kind(excess)) == decide(absmax, excess)
    assert decide(absmax, excess).layer == 1


def test_bad_lengths() -> None:
    with pytest.raises(UserError, match="for no layer"):
        decide([])
    with pytest.raises(UserError, match="2 maxima and 3 kurtoses"):
        decide([1.0, 2.0], [3.0, 3.0, 3.0])


SITES = ("block", "attention", "mlp", "down_input")
TEXTS = ["A short one.", "A text that is somewhat longer, with a comma.", "x"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2", "opt"])
def test_statistics_against_float64(family: str) -> None:
    model, tokenizer = tiny_model(family), byte_tokenizer()
    report = probe(model, tokenizer, TEXTS)
    outputs = [
        model(torch.tensor([tokenizer(text).input_ids]), output_hidden_states=True).hidden_states
        for text in TEXTS
    ]
    # The last of the hidden states has passed the final norm, so it is no block's output.
    for layer in range(3):
        states = [hidden[layer + 1].detach().double() for hidden in outputs]
        kurtosis = [((h - h.mean()) ** 4).mean() / h.var(correction=0) ** 2 for h in states]
        found = report.layers[layer]
        assert found.absmax == max(float(h.abs().max()) for h in states)
        assert found.kurtosis == pytest.approx(float(sum(kurtosis) / 3), rel=1e-5)
    assert [stats.layer for stats in report.layers] == [0, 1, 2, 3]
    assert report.layers[0].jump is None
    assert report.layers[2].jump == report.layers[2].absmax / report.layers[1].absmax


def test_probe_leaves_no_hook_and_no_gradient() -> None:
    model = tiny_model()
    probe(model, byte_tokenizer(), TEXTS)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_sites_against_plain_hooks(family: str) -> None:
    """Maxima, kurtosis and channels of every site, texts run one by one without the kernel."""
    model, tokenizer = tiny_model(family), byte_tokenizer()
    report = probe(model, tokenizer, TEXTS)
    assert [(stats.layer, stats.site) for stats in report.sites] == [
        (layer, site) for layer in range(4) for site in ("block", "attention", "mlp", "down_input")
    ]
    encoded = [tokenizer(text).input_ids for text in TEXTS]
    for stats in report.sites:
        layer = decoder_layers(model)[stats.layer]
        seen: list[torch.Tensor] = []

        def hook(_module, args, output, site=stats.site, seen=seen) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen.append((args[0] if site == "down_input" else output).flatten(0, -2).double())

        handle = layer.get_submodule(stats.module).register_forward_hook(hook)
        with torch.no_grad():
            for ids in encoded:
                model(torch.tensor([ids]))
        handle.remove()
        kurtosis = [((x - x.mean()) ** 4).mean() / x.var(correction=0) ** 2 for x in seen]
        assert stats.absmax == max(float(x.abs().max()) for x in seen)
        assert stats.kurtosis == pytest.approx(float(sum(kurtosis) / len(seen)), rel=1e-4)
        largest = torch.stack([x.abs().amax(0) for x in seen]).amax(0).sort(descending=True)
        assert [c.channel for c in stats.channels] == largest.indices[:3].tolist()
        assert [c.absmax for c in stats.channels] == largest.values[:3].tolist()
        leaders = [int(x.abs().argmax()) % x.shape[-1] for x in seen]
        for channel in stats.channels:
            assert channel.texts == leaders.count(channel.channel)
            at = [
                tokenizer.decode([ids[channel.position]])
                for ids, x in zip(encoded, seen, strict=True)
                if channel.position < len(ids)
                and abs(x[channel.position, channel.channel]) == channel.absmax
            ]
            assert channel.token in at


def test_texts_of_one_length_share_a_forward() -> None:
    texts = [f"text number {i}, as long as any other" for i in range(6)]
    model, tokenizer = tiny_model(), byte_tokenizer()
    calls = []
    handle = model.model.register_forward_hook(
        lambda _module, _args, kwargs, _output: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    together = probe(model, tokenizer, texts)
    handle.remove()
    assert calls == [(1, 2), (4, 35), (2, 35)]
    for layer in range(4):
        alone = [probe(model, tokenizer, [text]).layers[layer] for text in texts]
        found = together.layers[layer]
        assert found.absmax == pytest.approx(max(stats.absmax for stats in alone), rel=1e-5)
        mean = sum(stats.kurtosis for stats in alone) / len(alone)
        assert found.kurtosis == pytest.approx(mean, rel=1e-4)


def test_probe_finds_the_layer_that_was_made_dominant() -> None:
    model = tiny_model()
    with torch.no_grad():
        # One massive weight: row and channel 5, column 7.
        model.model.layers[2].mlp.down_proj.weight[5, 7] = 1e4
    report = probe(model, byte_tokenizer(), TEXTS)
    assert (report.decision.layer, report.decision.verdict) == (2, "dominant")
    assert report.depends_on == []
    channels = {(s.site, s.layer): s.channels[0] for s in report.sites}
    assert channels["block", 2].channel == channels["mlp", 2].channel == 5
    assert channels["block", 2].texts == len(TEXTS)


def test_a_super_weight_is_located() -> None:
    model = tiny_model()
    with torch.no_grad():
        layer = model.model.layers[1].mlp
        # A channel of the down projection's input that is large, and the one weight that reads it.
        layer.up_proj.weight[7] *= 1e3
        layer.down_proj.weight[:, 7] = 0
        layer.down_proj.weight[5, 7] = 1e2
    report = probe(model, byte_tokenizer(), TEXTS)
    assert report.decision.layer == 1
    assert report.super_weight == (5, 7)


def test_variations() -> None:
    report = probe(tiny_model(), byte_tokenizer(), TEXTS)
    # The tokenizer has no start token.
    assert list(report.variations) == [
        "first half of the texts",
        "second half of the texts",
        "first 8 tokens",
        "first 32 tokens",
    ]
    assert "first half of the texts" not in probe(tiny_model(), byte_tokenizer(), ["x"]).variations


def spoilt_by(token: int) -> PreTrainedModel:
    """A model whose layer 2 is dominant where this token is read, and else none is."""
    model = tiny_model()
    with torch.no_grad():
        # Channel 9 of the stream is the token's alone: no matrix writes it.
        model.model.embed_tokens.weight[:, 9] = 0
        model.model.embed_tokens.weight[token, 9] = 5
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
                matrix.weight[9] = 0
        mlp = model.model.layers[2].mlp
        for matrix in (mlp.gate_proj, mlp.up_proj):
            matrix.weight[3] = 0
            matrix.weight[3, 9] = 100
        mlp.down_proj.weight[:, 3] = 0
        mlp.down_proj.weight[4, 3] = 1
    return model


def test_a_dependence_on_the_texts_is_said() -> None:
    tokenizer = byte_tokenizer()
    model = spoilt_by(tokenizer("z").input_ids[0])
    plain = probe(model, tokenizer, ["abcdefghijklmn"] * 2)
    late = probe(model, tokenizer, ["abcdefghijklmnz", "abcdefghijklmno"])
    assert (plain.decision.layer, plain.depends_on) == (None, [])
    assert late.decision.layer == 2
    assert late.depends_on == ["second half of the texts", "first 8 tokens"]
    assert "depends on the texts" in late.variation_table().caption
    assert late.to_json()["depends_on"] == late.depends_on


@pytest.mark.parametrize("adds", [True, False])
def test_the_start_token_is_a_variation(adds: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "z"
    model = spoilt_by(tokenizer.bos_token_id)
    start = "z" if adds else ""
    report = probe(model, tokenizer, [f"{start}abcdefgh", f"{start}ijklmnop"])
    name = f"first {8 + adds} tokens, {'without' if adds else 'with'} start token"
    assert report.decision.layer == (2 if adds else None)
    assert report.variations[name].layer == (None if adds else 2)
    assert report.depends_on == [name]


def test_a_start_token_that_the_model_has_not_is_no_variation() -> None:
    tokenizer = byte_tokenizer(*(f"<{i}>" for i in range(10)))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model = tiny_model()
    assert tokenizer.bos_token_id >= model.config.vocab_size
    report = probe(model, tokenizer, ["abcdefgh", "ijklmnop"])
    assert not [name for name in report.variations if "start token" in name]


def test_what_is_missing_is_said() -> None:
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    report = probe(AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer(), TEXTS)
    assert report.missing == ["no single down projection found in any layer"]
    assert {stats.site for stats in report.sites} == {"block", "attention", "mlp"}
    assert report.super_weight is None


def test_a_sharded_checkpoint_is_probed_alike(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, tokenizer = load_model(str(tmp_path), dtype=torch.float32)
    found, expected = (probe(m, tokenizer, TEXTS).layers for m in (loaded, model))
    # Where the weights lie in memory decides how products are rounded.
    for stats, other in zip(found, expected, strict=True):
        assert stats.absmax == pytest.approx(other.absmax, rel=1e-5)
        assert stats.kurtosis == pytest.approx(other.kurtosis, rel=1e-5)


def test_offloaded_weights(tmp_path: Path) -> None:
    """device_map puts layers elsewhere: here on disk, their parameters on the meta device."""
    model, tokenizer = tiny_model(), byte_tokenizer()
    expected = probe(model, tokenizer, TEXTS)
    offloaded = disk_offload(tiny_model(), str(tmp_path), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    found = probe(offloaded, tokenizer, TEXTS)
    assert (found.layers, found.sites) == (expected.layers, expected.sites)


def test_long_texts_are_cut_to_what_the_model_reads() -> None:
    model = tiny_model("gpt2")
    model.config.max_position_embeddings = 16
    report = probe(model, byte_tokenizer(), ["abcdefgh" * 100])
    assert report.layers == probe(model, byte_tokenizer(), ["abcdefgh" * 2]).layers


@pytest.mark.parametrize("texts", [[], [""]])
def test_texts_without_tokens(texts: list[str]) -> None:
    with pytest.raises(UserError, match="hold no token"):
        probe(tiny_model(), byte_tokenizer(), texts)


def test_overflow_is_named() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"of layer 1 is (inf|nan), .* bfloat16 or float32"):
        probe(model, byte_tokenizer(), TEXTS)


@pytest.mark.parametrize("family", STREAMS)
def test_several_hidden_states_per_token_are_refused(family: str) -> None:
    model = random_model(STREAMS[family]())
    with pytest.raises(UserError, match="not one hidden state per token"):
        probe(model, byte_tokenizer(), TEXTS)
    with pytest.raises(UserError, match="not one hidden state per token"):
        outlier_channels(model, byte_tokenizer(), [decoder_layers(model)[1]], 0.1)


@pytest.fixture
def report() -> ProbeReport:
    absmax = [10.0, 50.0, 5000.0, 5000.0, 4000.0]
    layers = [
        LayerStats(i, h, 3.0 * h, None if i == 0 else h / absmax[i - 1])
        for i, h in enumerate(absmax)
    ]
    return ProbeReport("some/model", decide(absmax), layers)


def test_json(report: ProbeReport) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data == {
        "model": "some/model",
        "dominant": 2,
        "verdict": "dominant",
        "runner_up": 1,
        "confidence": report.decision.confidence,
        "layers": [
            {"layer": 0, "absmax": 10.0, "kurtosis": 30.0, "jump": None},
            {"layer": 1, "absmax": 50.0, "kurtosis": 150.0, "jump": 5.0},
            {"layer": 2, "absmax": 5000.0, "kurtosis": 15000.0, "jump": 100.0},
            {"layer": 3, "absmax": 5000.0, "kurtosis": 15000.0, "jump": 1.0},
            {"layer": 4, "absmax": 4000.0, "kurtosis": 12000.0, "jump": 0.8},
        ],
        "super_weight": None,
        "variations": [],
        "depends_on": [],
        "missing": [],
        "sites": [],
    }


def test_table_highlights_the_dominant_row(report: ProbeReport) -> None:
    console = Console(width=80, force_terminal=True, color_system="standard", record=True)
    with console.capture() as capture:
        console.print(report.table())
    lines = capture.get().splitlines()
    dominant = next(line for line in lines if "100.00x" in line)
    assert "\x1b[1;7;32m" in dominant
    assert sum("\x1b[1;7;32m" in line for line in lines) == 1


@pytest.mark.parametrize(("dominant", "shown"), [(True, {"2", "1"}), (False, {"3"})])
def test_channels_of_the_decided_layers_or_else_of_the_largest(
    dominant: bool, shown: set[str]
) -> None:
    absmax = [10.0, 50.0, 5000.0, 5000.0, 4000.0] if dominant else [10.0, 12.0, 13.0, 14.0, 9.0]
    layers = [LayerStats(i, h, 3.0 + h, None) for i, h in enumerate(absmax)]
    # As wide as the names get; a token may look like markup.
    peak = Channel(123456, 123456.7, 32, "[/b]\n", 95)
    sites = [SiteStats(site, i, "m", 1.0, 3.0, (peak,)) for i in range(5) for site in SITES]
    report = ProbeReport("some/model", decide(absmax), layers, sites)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report.channel_table())
    rows = [line.split("│")[1:-1] for line in capture.get().splitlines() if "│" in line]
    assert {row[0].strip() for row in rows} == shown
    assert {row[1].strip() for row in rows} == {
        "block output",
        "attention output",
        "MLP output",
        "down proj. input",
    }
    assert {row[-1].strip() for row in rows} == {"'[/b]\\n' at 95"}


def test_plot(report: ProbeReport, tmp_path: Path) -> None:
    plot_probe(report, tmp_path / "probe.png")
    plot_probe(report, tmp_path / "probe.SVG")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "probe.SVG").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_plot_without_a_dominant_layer(tmp_path: Path) -> None:
    layers = [LayerStats(i, 5.0, 3.0, None if i == 0 else 1.0) for i in range(4)]
    plot_probe(
        ProbeReport("flat", Decision(None, "none", 1.0, None, ""), layers), tmp_path / "flat.png"
    )
    assert (tmp_path / "flat.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["probe", "probe.pdf"])
def test_plot_needs_a_known_suffix(report: ProbeReport, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"suffix .*use \.png or \.svg"):
        plot_probe(report, tmp_path / name)


def test_plot_that_cannot_be_written(report: ProbeReport, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"probe.png cannot be written .No such file"):
        plot_probe(report, tmp_path / "missing" / "probe.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder.png cannot be written"):
        plot_probe(report, tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_calibration_texts() -> None:
    texts = calibration_texts()
    assert len(texts) >= 20
    assert all(text and "\n" not in text for text in texts)


def test_read_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n first, line one\nline two \n\n  \n\nsecond é\n", "utf-8")
    assert read_texts(path) == ["first, line one\nline two", "second é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n ", "is empty"), (b"abc\nd\xff", "line 2 is not UTF-8")],
)
def test_bad_texts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / "texts.txt")


def test_missing_texts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"texts\.txt' cannot be read \(No such file"):
        read_texts(tmp_path / "texts.txt")
