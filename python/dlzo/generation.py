"""Greedy answers to prompts, and the SQuAD metric that judges them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, takewhile
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.products import fast_products
from dlzo.scoring import check_ids, check_tokenizer, max_length, truncate

BATCH_TOKENS = 4096
# What padding may change of logits by rounding, as a share of their spread, by bytes of a number.
_ROUNDING = {8: 1e-6, 4: 1e-3, 2: 0.1}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

# By tokenizer, the number of its tokens and those with a newline: decoding all takes long.
_newlines: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, set[int]]] = WeakKeyDictionary()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 50,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """The model's greedy answer to each prompt, in order, up to a line's or the text's end.

    Prompts are stripped of spaces only, and lose their beginning where prompt and answer would not
    fit into the context. Those of similar length run together, padded on the left; in 16-bit
    models the padding may turn a near tie between two tokens. Where padding changes more than
    roundings, those of one length run together.

    Args:
        model: A decoder-only model; it is set to evaluation mode.
        tokenizer: its tokenizer.
        prompts: the texts to continue.
        max_new_tokens: the most tokens of an answer.
        batch_tokens: the most tokens in one batch, padding and answers included, unless a single
            prompt has more.

    Raises:
        UserError: a prompt is empty, the context has no room for a prompt and an answer, or the
            tokenizer puts a token behind each text, or is of another model.
    """
    encoded = _encode(model, tokenizer, prompts, max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends | _newline_tokens(tokenizer)),
        # Any id will do: padding is masked in front, and cut off behind.
        pad_token_id=0,
    )
    answers = [""] * len(prompts)
    sizes = [len(tokens) + max_new_tokens for tokens in encoded]
    with _plain_generation(model), fast_products(model):
        padded = _lets_padding_alone(model, encoded)
        for group in _group(sizes, batch_tokens, padded=padded):
            width = len(encoded[group[0]])  # the longest
            found = _generate(model, [encoded[i] for i in group], config)
            outputs = found[:, width:].tolist()
            for i, output in zip(group, outputs, strict=True):
                tokens = list(takewhile(lambda token: token not in ends, output))
                text = str(tokenizer.decode(tokens, skip_special_tokens=True))
                answers[i] = text.partition("\n")[0].strip()
    return answers


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The SQuAD F1 of the words that prediction and answer share, with the best of the answers.

    In [0, 1]; arXiv 1606.05250, section 6.1.
    """
    return max(_f1(_words(prediction), _words(answer)) for answer in answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if prediction and one of the answers are the same words, else 0.0."""
    return float(any(_words(prediction) == _words(answer) for answer in answers))


def _f1(prediction: list[str], answer: list[str]) -> float:
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer)) if shared else 0.0


def _words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[list[int]]:
    """The prompts as tokens, with room for an answer behind them."""
    check_tokenizer(tokenizer)
    length = max_length(model) - max_new_tokens
    if max_new_tokens < 1 or length < 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} and the model's context has {max_length(model)} "
            "tokens for prompt and answer: choose a model with a longer one, or give 1 to "
            f"{max_length(model) - 1}"
        )
    encoded = [
        truncate(tokenizer(prompt.strip(" ")).input_ids, length, tokenizer) for prompt in prompts
    ]
    if [] in encoded:
        raise UserError(f"prompt {encoded.index([])} is empty: give at least one token")
    check_ids(model, tokenizer, chain(*encoded))
    return encoded


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _newline_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens with a newline in them; most vocabularies have some with other characters too."""
    length, found = _newlines.get(tokenizer, (0, set()))
    if length != len(tokenizer):  # tokens have been added
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        found = {token for token, text in enumerate(texts) if "\n" in text}
        _newlines[tokenizer] = len(tokenizer), found
    return found


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's own generation settings, whose penalties would shift the argmax."""
    own = model.generation_config
    model.eval().generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _lets_padding_alone(model: PreTrainedModel, prompts: Sequence[list[int]]) -> bool:
    """Whether the token behind the shortest prompt has the same logits beside the longest one."""
    if len({*map(len, prompts)}) < 2:
        return True
    short, long = min(prompts, key=len), max(prompts, key=len)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )

    def logits(prompts: list[list[int]]) -> Tensor:
        return cast(Tensor, _generate(model, prompts, config).logits[0][0].float())

    alone, beside = logits([short]), logits([short, long])
    return bool(
        (beside - alone).norm() <= _ROUNDING[model.dtype.itemsize] * (alone - alone.mean()).norm()
    )


def _generate(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> Any:
    """What the model generates behind prompts that are padded on the left."""
    inputs = {name: tensor.to(model.device) for name, tensor in _pad(prompts).items()}
    generate: Any = model.generate
    return generate(**inputs, generation_config=config)


def _group(sizes: Sequence[int], batch_tokens: int, *, padded: bool) -> Iterator[list[int]]:
    """Indices in groups, longest first; a group's largest size times its length is bounded.

    Unless they may be `padded`, those of a group have one size.
    """
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        is_full = group and sizes[group[0]] * (len(group) + 1) > batch_tokens
        if is_full or (group and sizes[i] != sizes[group[0]] and not padded):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _pad(sequences: list[list[int]]) -> dict[str, Tensor]:
    """Token ids and attention mask, int64 of shape (sequences, longest), padded on the left."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    masks = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
    }
