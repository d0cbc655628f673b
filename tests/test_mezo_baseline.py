"""The baseline of the benchmarks is MeZO, and right."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dlzo.models import decoder_layers
from dlzo.tasks import Example
from scripts import load_benchmark
from tiny import byte_tokenizer, tiny_model

mezo = load_benchmark("mezo")

EXAMPLES = [
    Example("a fine film , and a long one It was", (" terrible", " great"), 1),
    Example("bad It was ", (" no", " so very good\n"), 0),
    Example(" It was late , so", (" she left", " he", " nobody came at all"), 2),
]
WIDTH = 48  # the longest text has 44 tokens
FAMILIES = ["llama", "gpt2", "opt"]


def model_and_batch(loss="options", family="llama", dtype=torch.float32):
    model = tiny_model(family, dtype)
    return model, mezo.encode_batch(model, byte_tokenizer(), EXAMPLES, loss)


@torch.no_grad()
def option_log_probs(family, example, option):
    """The log-probabilities of an option's tokens, in float64, of a row padded to WIDTH."""
    model, tokenizer = tiny_model(family, torch.float64), byte_tokenizer()
    prompt = tokenizer(example.prompt.strip(" ")).input_ids
    tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
    # GPT-2 counts its absolute positions from the padding's beginning.
    first = WIDTH - len(tokens) if family == "gpt2" else 0
    positions = torch.arange(first, first + len(tokens))[None]
    log_probs = model(torch.tensor([tokens]), position_ids=positions).logits[0].log_softmax(-1)
    return torch.stack([log_probs[i - 1, tokens[i]] for i in range(len(prompt), len(tokens))])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_over_options_equals_one_by_one_forwards(family):
    model, batch = model_and_batch("options", family)
    assert batch.input_ids.shape == (7, WIDTH)
    losses = []
    for example in EXAMPLES:
        means = [option_log_probs(family, example, o).mean() for o in example.options]
        losses.append(F.cross_entropy(torch.stack(means), torch.tensor(example.gold)))
    expected = torch.stack(losses).mean().item()
    assert mezo.batch_loss(model, batch).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_gold_options_is_the_mean_over_their_tokens(family):
    model, batch = model_and_batch("gold", family)
    assert batch.input_ids.shape == (3, WIDTH)
    tokens = [option_log_probs(family, e, e.options[e.gold]) for e in EXAMPLES]
    expected = -torch.cat(tokens).mean().item()
    assert mezo.batch_loss(model, batch).item() == pytest.approx(expected, abs=1e-5)


def test_rows_are_padded_on_the_left_to_a_multiple_of_eight():
    tokenizer = byte_tokenizer()
    examples = [Example("It was", (" great", " not"), 1), Example("So", (" it",), 0)]
    batch = mezo.encode_batch(tiny_model(), tokenizer, examples, "options")
    texts = ["It was great", "It was not", "So it"]
    for ids, mask, text in zip(batch.input_ids, batch.attention_mask, texts, strict=True):
        assert mask.tolist() == [0] * (16 - len(text)) + [1] * len(text)
        assert ids[mask.bool()].tolist() == tokenizer(text).input_ids
    assert batch.option_lengths.tolist() == [6, 4, 3]
    assert batch.option_counts == (2, 1)
    assert batch.gold.tolist() == [1, 0]


def test_long_texts_lose_their_beginning():
    tokenizer = byte_tokenizer()
    batch = mezo.encode_batch(tiny_model(), tokenizer, [Example("ab" * 300, (" no",), 0)], "gold")
    assert batch.input_ids.tolist() == [tokenizer(("ab" * 300 + " no")[-256:]).input_ids]


def noise_of(seed, parameters):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_step_is_the_two_point_formula(lr):
    model, batch = model_and_batch(dtype=torch.float64)
    tuned = list(model.parameters())
    before = [parameter.detach().clone() for parameter in tuned]
    noise = noise_of(7, tuned)

    def loss_at(scale):
        for parameter, weight, z in zip(tuned, before, noise, strict=True):
            parameter.data = weight + scale * z
        return mezo.batch_loss(model, batch).item()

    plus, minus = loss_at(1e-3), loss_at(-1e-3)
    loss_at(0)
    result = mezo.mezo_step(model, lambda: mezo.batch_loss(model, batch), eps=1e-3, lr=lr, seed=7)
    projected_grad = (plus - minus) / 2e-3
    assert result.loss_plus == pytest.approx(plus, abs=1e-12)
    assert result.loss_minus == pytest.approx(minus, abs=1e-12)
    assert result.projected_grad == pytest.approx(projected_grad, abs=1e-9)
    assert abs(projected_grad) > 1
    for parameter, weight, z in zip(tuned, before, noise, strict=True):
        expected = weight - lr * projected_grad * z
        torch.testing.assert_close(parameter.data, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "drift"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_without_a_step_size_the_weights_drift_by_rounding(dtype, drift):
    model, batch = model_and_batch(dtype=dtype)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    mezo.mezo_step(model, lambda: mezo.batch_loss(model, batch), eps=1e-3, lr=0, seed=7)
    after = [parameter.detach() for parameter in model.parameters()]
    assert not all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    for new, old in zip(after, before, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=drift)


def test_noise_is_drawn_four_times_in_the_parameters_dtype(monkeypatch):
    model = tiny_model(dtype=torch.bfloat16)
    layer = decoder_layers(model)[1]
    drawn = []

    def normal(*, size, dtype, **options):
        drawn.append((tuple(size), dtype))
        return torch.zeros(size, dtype=dtype)

    monkeypatch.setattr(torch, "normal", normal)
    mezo.mezo_step(model, lambda: torch.tensor(1.0), layer.parameters(), eps=1e-3, lr=1e-3, seed=7)
    assert drawn == 4 * [(tuple(p.shape), torch.bfloat16) for p in layer.parameters()]


@pytest.mark.parametrize("given", [False, True])
def test_only_what_is_tuned_moves(given):
    model, batch = model_and_batch("gold", "gpt2")
    model.train()
    layer = decoder_layers(model)[1]
    if not given:
        model.requires_grad_(False)
        layer.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tuned = layer.parameters() if given else None
    mezo.mezo_step(model, lambda: mezo.batch_loss(model, batch), tuned, eps=1e-3, lr=1e-3, seed=7)
    own = {id(parameter) for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in own), name
    assert not model.training
