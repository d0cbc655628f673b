from __future__ import annotations

import copy
from functools import wraps

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlzo.errors import UserError
from dlzo.generation import exact_match, f1, generate
from tiny import CONFIGS, byte_tokenizer, tiny_model

PROMPTS = ["Title: A\nAnswer:", "Q", " so so, and a long one at that. Who?", "It was", "It is", "!"]


@torch.no_grad()
def plain_answer(model, tokenizer, prompt, new_tokens):
    """One prompt alone, without cache or padding."""
    tokens = tokenizer(prompt.strip(" ")).input_ids
    answer = []
    while len(answer) < new_tokens:
        token = model(torch.tensor([tokens + answer])).logits[0, -1].argmax().item()
        if token == model.config.eos_token_id:
            break
        answer.append(token)
    return tokenizer.decode(answer).split("\n")[0].strip()


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("family", CONFIGS)
def test_answers_equal_one_by_one_greedy_loops(family, batch_tokens):
    # transformers' masks for these overflow in their softmax, which is float32 in any dtype.
    dtype = torch.float32 if family in ("gemma2", "bloom") else torch.float64
    model, tokenizer = tiny_model(family, dtype), byte_tokenizer()
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=20, batch_tokens=batch_tokens)
    assert answers == [plain_answer(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert len(set(answers)) > 1


def test_prompts_are_not_padded_for_a_model_that_sees_padding():
    model, tokenizer = tiny_model(), byte_tokenizer()
    own = model.forward

    @wraps(own)
    def blind(*args, attention_mask=None, position_ids=None, **kwargs):
        return own(*args, **kwargs)

    model.forward = blind
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    assert together == [generate(model, tokenizer, [p], max_new_tokens=20)[0] for p in PROMPTS]


def follow(model, script):
    """Makes the model say `script`, token by token, to any prompt; returns the log of its calls."""
    calls = []

    def say(_, args, logits):
        token = script[len(calls)]
        calls.append(token)
        return logits.index_fill(-1, torch.tensor([token]), 1e4)

    model.get_output_embeddings().register_forward_hook(say)
    return calls


@pytest.mark.parametrize("stop", ["\n", ".\n\n", "\n7", "<end>"])
def test_answer_ends_with_its_line_or_with_the_text(stop):
    tokenizer = byte_tokenizer(stop, "<stop>")
    tokenizer.eos_token = "<end>" if stop == "<end>" else "<stop>"
    script = tokenizer(f" 4 2{stop}").input_ids
    model = tiny_model()
    calls = follow(model, script + [5] * 20)
    answers = generate(model, tokenizer, ["Why?", "How?"])
    assert answers == ["4 2." if stop == ".\n\n" else "4 2"] * 2
    assert calls == script


def test_the_models_own_end_of_text_ends_an_answer():
    model, tokenizer = tiny_model(), byte_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    calls = follow(model, [40, 41, 9, 42])
    assert generate(model, tokenizer, ["Why?"]) == [tokenizer.decode([40, 41])]
    assert calls == [40, 41, 9]


def test_answer_has_at_most_the_new_tokens_asked_for():
    model, tokenizer = tiny_model(), byte_tokenizer()
    calls = follow(model, [40] * 50)
    assert generate(model, tokenizer, ["Why?"]) == [tokenizer.decode([40]) * 50]
    assert len(calls) == 50


def test_long_prompt_loses_its_beginning():
    model, tokenizer = tiny_model(), byte_tokenizer()
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    prompt = "".join(map(str, range(300)))
    generate(model, tokenizer, [prompt], max_new_tokens=20)
    # The context of 256 tokens, less the answer.
    assert seen[0].tolist() == [tokenizer(prompt[-236:]).input_ids]


def test_prompts_of_similar_length_run_together():
    model, tokenizer = tiny_model(), byte_tokenizer()
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    prompts = ["x" * length for length in (5, 90, 7, 95, 6)]
    generate(model, tokenizer, prompts, max_new_tokens=1, batch_tokens=192)
    # First it is tried whether padding leaves the shortest one alone.
    assert shapes == [(1, 5), (2, 95), (2, 95), (3, 7)]


def test_model_tokenizer_and_generator_are_left_as_they_were(capfd, recwarn):
    model, tokenizer = tiny_model("gpt2"), byte_tokenizer()
    plain = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    # Sampling and penalties of its own, as chat models have them.
    model.generation_config.update(
        do_sample=True, temperature=0.7, repetition_penalty=9.0, min_new_tokens=9, max_length=30
    )
    # GPT-2 has dropout.
    model.train()
    own = model.generation_config
    before = copy.deepcopy((own.to_dict(), tokenizer.__dict__["_special_tokens_map"]))
    generator = torch.get_rng_state()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=20) == plain
    assert model.generation_config is own
    assert (own.to_dict(), tokenizer.__dict__["_special_tokens_map"]) == before
    assert tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), generator)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_generation_settings_are_put_back_after_an_error():
    model = tiny_model()
    own = model.generation_config
    with pytest.raises(IndexError):
        follow(model, [])
        generate(model, byte_tokenizer(), ["Why?"])
    assert model.generation_config is own


def test_no_prompts_have_no_answers():
    assert generate(tiny_model(), byte_tokenizer(), []) == []


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(tiny_model(), byte_tokenizer(), ["Why?", prompt])


@pytest.mark.parametrize("new_tokens", [0, -1, 256, 300])
def test_answer_without_room_is_refused(new_tokens):
    says = f"max_new_tokens is {new_tokens} and .* 256 tokens.*a model with a longer.* 1 to 255"
    with pytest.raises(UserError, match=says):
        generate(tiny_model(), byte_tokenizer(), ["Why?"], max_new_tokens=new_tokens)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("nine years", ["nine years"], 1.0),
        ("The Nine-Years!", ["nineyears"], 1.0),
        ("$5.00", ["500"], 1.0),
        ("a theatre", ["theatre"], 1.0),
        # Two words of two and of three: precision 1, recall 2/3.
        ("the cat sat", ["A cat sat down."], 0.8),
        ("cat down", ["cat sat down there"], 2 / 3),
        # A word counts as often as both have it.
        ("no no no", ["no"], 0.5),
        ("no no no", ["no no"], 0.8),
        ("nine", ["9", "nine years", "about nine long years"], 2 / 3),
        ("ten", ["9", "nine years"], 0.0),
        ("", ["9"], 0.0),
        # As in SQuAD 1.1, no words share nothing.
        ("the", ["the"], 0.0),
    ],
)
def test_f1_is_that_of_squad(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("nine years", ["9", "Nine  years."], 1.0),
        ("the", ["a"], 1.0),
        ("years nine", ["nine years"], 0.0),
        ("nine", ["nine years"], 0.0),
    ],
)
def test_exact_match_is_that_of_squad(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


WORDS = st.text("ab the,.\u00e9", max_size=20)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_f1_and_exact_match_agree(prediction, answers):
    score = f1(prediction, answers)
    assert 0 <= score <= 1
    assert score == max(f1(answer, [prediction]) for answer in answers)
    if exact_match(prediction, answers):
        assert score == 1 or f1(prediction, [prediction]) == 0


def test_special_tokens_are_no_text_of_an_answer():
    tokenizer = byte_tokenizer("<stop>", "<odd>")
    tokenizer.eos_token = "<stop>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<odd>"]})
    odd, stop = tokenizer.convert_tokens_to_ids(["<odd>", "<stop>"])
    model = tiny_model()
    follow(model, [40, odd, 41, stop])
    assert generate(model, tokenizer, ["Why?"]) == [tokenizer.decode([40, 41])]


def test_a_vocabulary_is_decoded_once_and_again_where_tokens_were_added(monkeypatch):
    model, tokenizer, sizes = tiny_model(), byte_tokenizer(), []
    decode = tokenizer.batch_decode

    def counted(sequences, **given):
        sizes.append(len(sequences))
        return decode(sequences, **given)

    monkeypatch.setattr(tokenizer, "batch_decode", counted)
    for _ in range(2):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert sizes == [256]
    tokenizer.add_tokens(["x\n"])
    generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert sizes == [256, 257]
