"""Sensitivity of layers: against a plain loop, and nothing of it left in the model."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, RwkvConfig

import dlzo_kernels
from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.plots import plot_sensitivity
from dlzo.sampler import batch_indices, step_seed
from dlzo.sensitivity import LayerSensitivity, SensitivityReport, sensitivity
from dlzo.tasks import get_task, load_split
from tiny import CONFIGS, STREAMS, VOCABULARY, byte_tokenizer, random_model, tiny_model

SETTINGS = {"seeds": 3, "batches": 3, "batch_size": 4, "eps": 1e-2, "seed": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"sentence": "abc"[i % 3] * (3 + i % 5) + " .", "label": i % 2} for i in range(20)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(" terrible", " great")


def plain_loss(model: PreTrainedModel, texts: list[tuple[list[int], list[int], int]]) -> float:
    """Cross-entropy over the two option tokens, one text at a time."""
    losses = []
    for prompt, options, gold in texts:
        logits = model(torch.tensor([prompt])).logits[0, -1, options].double()
        losses.append(float(logits.logsumexp(0) - logits[gold]))
    return fmean(losses)


def hidden_states(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Of each layer's output, all tokens of all prompts in a row."""
    seen: list[list[torch.Tensor]] = [[] for _ in decoder_layers(model)]
    handles = [
        layer.register_forward_hook(
            lambda _module, _args, output, i=i: seen[i].append(
                (output[0] if isinstance(output, tuple) else output)[0].double()
            )
        )
        for i, layer in enumerate(decoder_layers(model))
    ]
    for prompt in prompts:
        model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_against_a_plain_loop(family: str, data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(family)
    report = sensitivity(model, tokenizer, "sst2", data, layers=[1, 3], **SETTINGS)
    examples = load_split(get_task("sst2"), data, "train")
    batches = [
        [examples[i] for i in batch_indices(5, step, len(examples), 4)] for step in (1, 2, 3)
    ]
    encoded = []
    for batch in batches:
        prompts = [tokenizer(example.prompt.strip(" ")).input_ids for example in batch]
        options = [[tokenizer(o).input_ids[-1] for o in example.options] for example in batch]
        golds = [example.gold for example in batch]
        encoded.append(list(zip(prompts, options, golds, strict=True)))
    seeds = [step_seed(5, step) for step in (1, 2, 3)]
    prompts = [list(p) for p in {tuple(prompt) for prompt, _, _ in encoded[0]}]
    before = hidden_states(model, prompts)
    for found in report.layers:
        layer = decoder_layers(model)[found.layer]
        by_batch = []
        for texts in encoded:
            differences = []
            for seed in seeds:
                step = dlzo_kernels.zo_step(layer, seed, 1e-2, 0.0)
                with step.plus():
                    plus = plain_loss(model, texts)
                with step.minus():
                    differences.append(plus - plain_loss(model, texts))
            by_batch.append(differences)
        signal = fmean(stdev(differences) for differences in by_batch) / 2e-2
        assert found.signal == pytest.approx(signal, rel=1e-2)
        agree = [
            (a > 0) == (b > 0)
            for of_seed in zip(*by_batch, strict=True)
            for a, b in combinations(of_seed, 2)
        ]
        assert found.sign_stability == pytest.approx(sum(agree) / len(agree))
        with dlzo_kernels.zo_step(layer, seeds[0], 1e-2, 0.0).plus():
            after = hidden_states(model, prompts)
        growth = [
            float(((b - a).norm(dim=-1) / a.norm(dim=-1)).mean())
            for a, b in zip(before, after, strict=True)
        ]
        assert found.growth == pytest.approx(growth[found.layer :], rel=1e-3)
        assert not any(growth[: found.layer])


def test_the_signal_is_the_norm_of_the_gradient(
    data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """To first order L(+) - L(-) = 2 eps z.g, whose spread over z is 2 eps |g|."""
    model = tiny_model()
    settings = {**SETTINGS, "seeds": 64, "batches": 2, "batch_size": 10, "eps": 1e-3}
    found = sensitivity(model, tokenizer, "sst2", data, layers=[2], **settings).layers[0]
    examples = load_split(get_task("sst2"), data, "train")
    norms = []
    for step in (1, 2):
        loss = torch.zeros(())
        for example in (examples[i] for i in batch_indices(5, step, 20, 10)):
            ids = tokenizer(example.prompt.strip(" ")).input_ids
            options = [tokenizer(option).input_ids[-1] for option in example.options]
            logits = model(torch.tensor([ids])).logits[0, -1, options]
            loss = loss + (logits.logsumexp(0) - logits[example.gold]) / 10
        gradients = torch.autograd.grad(loss, list(decoder_layers(model)[2].parameters()))
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
    # The standard deviation of 64 draws is within 30% in all but one of 1,000 cases.
    assert found.signal == pytest.approx(fmean(norms), rel=0.3)


def test_weights_are_left_as_they_were(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    layers = list(decoder_layers(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sensitivity(model, tokenizer, "sst2", data, **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(decoder_layers(model), layers, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_does_not_depend_on_the_others(
    data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, seen = tiny_model(), []
    report = sensitivity(model, tokenizer, "sst2", data, **SETTINGS, on_layer=seen.append)
    alone = sensitivity(model, tokenizer, "sst2", data, layers=[2], **SETTINGS)
    assert [found.layer for found in report.layers] == [0, 1, 2, 3]
    assert alone.layers == [report.layers[2]]
    assert seen == report.layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1}, "seeds is 1"),
        ({"batches": 1}, "batches is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 7}, "3 batches of 7 share examples, of which the task has 20"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"layers": [4]}, "layer is 4: the model has layers 0 to 3"),
        ({"layers": []}, "layers is empty: give at least one"),
        ({"eps": 1e30}, "a loss is not finite"),
    ],
)
def test_bad_settings_are_named(
    data: Path, tokenizer: PreTrainedTokenizerBase, settings: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sensitivity(tiny_model(), tokenizer, "sst2", data, **{**SETTINGS, **settings})


def test_weights_shared_with_another_layer_move_there_too(
    data: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    signals = []
    for shared in (False, True):
        model = tiny_model()
        layers = decoder_layers(model)
        if shared:
            layers[3].mlp = layers[1].mlp
        else:
            layers[3].mlp.load_state_dict(layers[1].mlp.state_dict())
        before = {name: p.clone() for name, p in model.state_dict().items()}
        (found,) = sensitivity(model, tokenizer, "sst2", data, layers=[1], **SETTINGS).layers
        signals.append(found.signal)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert abs(signals[1] / signals[0] - 1) > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (STREAMS["gemma3n"](), "not one hidden state per token"),
        (
            RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, rescale_every=1),
            "RwkvForCausalLM changes its own weights as it runs",
        ),
    ],
    ids=["gemma3n", "rwkv"],
)
def test_a_model_that_is_refused_is_left_as_it_was(
    data: Path, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, message: str
) -> None:
    model = random_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            sensitivity(model, tokenizer, "sst2", data, layers=[1], **SETTINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_layer_is_named(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    decoder_layers(model)[1].requires_grad_(False)
    with pytest.raises(UserError, match="all of it is frozen"):
        sensitivity(model, tokenizer, "sst2", data, layers=[1], **SETTINGS)


def test_plot(tmp_path: Path) -> None:
    layers = [
        LayerSensitivity(i, 1.0 + i, 0.5, [1e-3 * (j + 1) for j in range(4 - i)]) for i in (1, 3)
    ]
    report = SensitivityReport("some/model", "sst2", "float32", 2, 2, 4, 1e-3, 0, layers)
    plot_sensitivity(report, tmp_path / "s.svg")
    assert "<svg" in (tmp_path / "s.svg").read_text()
