from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from dlzo.errors import UserError
from dlzo.models import decoder_layers
from dlzo.scoring import Scorer
from dlzo.tasks import Example
from tiny import CONFIGS, byte_tokenizer, tiny_model

SENTIMENT = (" terrible", " great")
EXAMPLES = [
    Example("a fine film , and a long one It was", SENTIMENT, 1),
    Example("bad It was", SENTIMENT, 0),
    Example("so so ! It was", SENTIMENT, 0),
    Example("It was late , so", (" she left", " he", " nobody came at all"), 2),
]
# In float32 the order of sums differs with the shapes: a few units in the last place of scores
# around 8.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


class Shift:
    """A step whose two states add to and take from every weight, exactly undone."""

    def __init__(self, layer, by=1 / 16):
        self.parameters = list(layer.parameters())
        self.by = by

    @contextmanager
    def shifted(self, by):
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(by * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, kept, strict=True):
                    parameter.copy_(old)

    def plus(self):
        return self.shifted(self.by)

    def minus(self):
        return self.shifted(-self.by)


@torch.no_grad()
def plain_scores(model, tokenizer, example):
    """One whole forward for each option, all by itself."""
    prompt = tokenizer(example.prompt.strip(" ")).input_ids
    scores = []
    for option in example.options:
        tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
        log_probs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        places = range(len(prompt), len(tokens))
        scores.append(torch.stack([log_probs[i - 1, tokens[i]] for i in places]).mean())
    return torch.stack(scores)


def plain_loss(model, tokenizer, examples):
    losses = [
        F.cross_entropy(plain_scores(model, tokenizer, e), torch.tensor(e.gold)) for e in examples
    ]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("row_tokens", [60, 1000])
@pytest.mark.parametrize("words", [(), SENTIMENT], ids=["bytes", "words"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_one_by_one_forwards(family, dtype, words, row_tokens):
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer(*words)
    scorer = Scorer(model, tokenizer, row_tokens=row_tokens)
    scores = scorer.scores(scorer.encode(EXAMPLES))
    assert scores.dtype == dtype
    for found, example in zip(scores, EXAMPLES, strict=True):
        expected = plain_scores(model, tokenizer, example)
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=TOLERANCE[dtype])
        assert (found[len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("layer_index", [0, 3])
@pytest.mark.parametrize("row_tokens", [60, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", CONFIGS)
def test_two_point_losses_equal_two_plain_passes(family, dtype, row_tokens, layer_index):
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer()
    layer = decoder_layers(model)[layer_index]
    scorer = Scorer(model, tokenizer, layer, row_tokens=row_tokens)
    step = Shift(layer)
    plus, minus = scorer.two_point_losses(step, scorer.encode(EXAMPLES))
    with step.plus():
        expected_plus = plain_loss(model, tokenizer, EXAMPLES)
    with step.minus():
        expected_minus = plain_loss(model, tokenizer, EXAMPLES)
    assert plus == pytest.approx(expected_plus, abs=TOLERANCE[dtype])
    assert minus == pytest.approx(expected_minus, abs=TOLERANCE[dtype])
    assert abs(plus - minus) > 100 * TOLERANCE[dtype]


def test_layers_below_run_once_and_layers_above_on_both_states():
    model, tokenizer = tiny_model(), byte_tokenizer()
    layers = decoder_layers(model)
    scorer = Scorer(model, tokenizer, layers[1])
    batch = scorer.encode(EXAMPLES)
    seen = []
    for layer in (layers[0], layers[2]):
        layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    scorer.two_point_losses(Shift(layers[1]), batch)
    tokens = sum(len(sequence) for example in batch for sequence in example.sequences)
    assert seen == [(1, tokens), (2, tokens)]


def test_head_sees_the_scored_positions_only():
    model, tokenizer = tiny_model(), byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer)
    batch = scorer.encode(EXAMPLES[:3])
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    scorer.scores(batch)
    assert seen == [(1, 6, model.config.vocab_size)]


def test_options_of_one_token_share_the_prompt():
    scorer = Scorer(tiny_model(), byte_tokenizer(*SENTIMENT))
    (encoded,) = scorer.encode(EXAMPLES[:1])
    assert len(encoded.sequences) == 1
    assert [option.sequence for option in encoded.options] == [0, 0]
    (apart,) = Scorer(tiny_model(), byte_tokenizer()).encode(EXAMPLES[:1])
    assert len(apart.sequences) == 2


def test_packing_is_used_only_where_sequences_are_kept_apart():
    packed = {family: Scorer(tiny_model(family), byte_tokenizer()).packed for family in CONFIGS}
    # OPT's causal mask looks at no position ids.
    assert packed == {"llama": True, "qwen3": True, "mistral": True, "gpt2": True, "opt": False}


def test_sixteen_bit_models_have_float32_logits_for_the_options():
    model = tiny_model(dtype=torch.bfloat16)
    tokenizer = byte_tokenizer(*SENTIMENT)
    scorer = Scorer(model, tokenizer)
    batch = scorer.encode(EXAMPLES[:3])
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0][0].float()))
    scores = scorer.scores(batch)
    weights = model.lm_head.weight.detach().float()
    terrible, great = weights[tokenizer.convert_tokens_to_ids(list(SENTIMENT))]
    # Two rows for each example, one for each option, of the same hidden state.
    expected = seen[0][::2] @ (great - terrible)
    # The model's own bfloat16 logits are off by 100 times more.
    torch.testing.assert_close(scores[:, 1] - scores[:, 0], expected, rtol=0, atol=1e-5)


def test_evaluate_counts_hits_and_takes_the_mean_loss():
    model, tokenizer = tiny_model(), byte_tokenizer()
    scorer = Scorer(model, tokenizer)
    accuracy, loss = scorer.evaluate(scorer.encode(EXAMPLES))
    hits = [plain_scores(model, tokenizer, e).argmax().item() == e.gold for e in EXAMPLES]
    assert accuracy == sum(hits) / len(hits)
    assert loss == pytest.approx(plain_loss(model, tokenizer, EXAMPLES), abs=1e-5)


def test_spaces_only_are_stripped():
    scorer = Scorer(tiny_model(), byte_tokenizer())
    (encoded,) = scorer.encode([Example("  \tso  ", (" no \n",), 0)])
    assert encoded == scorer.encode([Example("\tso  ", (" no \n",), 0)])[0]
    tokens = scorer.tokenizer("\tso   no \n").input_ids
    assert encoded.sequences == (tuple(tokens[:-1]),)
    assert encoded.options[0].targets == tuple(tokens[3:])


@pytest.mark.parametrize("bos", [False, True])
def test_long_texts_lose_their_beginning_but_not_the_start_token(bos):
    tokenizer = byte_tokenizer("<s>")
    if bos:
        tokenizer.bos_token = "<s>"
    scorer = Scorer(tiny_model(), tokenizer)
    start = "<s>" if bos else ""
    (encoded,) = scorer.encode([Example(start + "ab" * 300, (" no",), 0)])
    expected = tokenizer(start).input_ids + tokenizer("ab" * 300 + " no").input_ids[bos - 256 :]
    assert list(encoded.sequences[0]) == expected[:-1]
    assert encoded.options[0].targets == tuple(tokenizer(" no").input_ids)


@pytest.mark.parametrize(
    "example",
    [
        Example("It was", ("",), 0),
        Example("It was", ("  ",), 0),
        Example("", (" great",), 0),
        Example("It was", (" x" * 200,), 0),
    ],
    ids=["empty option", "blank option", "empty prompt", "long option"],
)
def test_an_option_that_cannot_be_scored_is_refused(example):
    with pytest.raises(UserError, match="option "):
        Scorer(tiny_model(), byte_tokenizer()).encode([example])


def test_layer_is_put_back_after_an_error():
    model = tiny_model()
    layer = decoder_layers(model)[1]
    scorer = Scorer(model, byte_tokenizer(), layer)
    batch = scorer.encode(EXAMPLES)

    class Failing(Shift):
        def minus(self):
            raise KeyboardInterrupt

    before = scorer.scores(batch)
    with pytest.raises(KeyboardInterrupt):
        scorer.two_point_losses(Failing(layer), batch)
    assert "forward" not in vars(layer)
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    assert torch.equal(scorer.scores(batch), before)


def test_a_layer_outside_the_model_is_refused():
    scorer = Scorer(tiny_model(), byte_tokenizer(), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="one hidden state per token and state"):
        scorer.two_point_losses(Shift(scorer.layer), scorer.encode(EXAMPLES))


def test_dropout_is_off():
    model = tiny_model("gpt2").train()
    scorer = Scorer(model, byte_tokenizer())
    batch = scorer.encode(EXAMPLES)
    assert torch.equal(scorer.scores(batch), scorer.scores(batch))
