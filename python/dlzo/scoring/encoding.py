"""Examples as tokens, by MeZO's rules (arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.tasks import Example

# MeZO's limit: longer texts lose their beginning.
MAX_LENGTH = 2048


class Option(NamedTuple):
    """One option: `targets` follow the last `len(targets)` tokens of sequence number `sequence`."""

    sequence: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class EncodedExample:
    """The distinct token sequences that score an example's options, and which are the options'.

    A sequence is a text without its last token, which predicts nothing; so options of one token
    share one sequence, the prompt.
    """

    sequences: tuple[tuple[int, ...], ...]
    options: tuple[Option, ...]
    gold: int

    @classmethod
    def of_texts(cls, texts: Iterable[tuple[Sequence[int], int]], gold: int) -> EncodedExample:
        """Of whole texts as tokens, each with how many of its last ones are the option."""
        sequences: dict[tuple[int, ...], int] = {}
        options = []
        for tokens, length in texts:
            sequence = sequences.setdefault(tuple(tokens[:-1]), len(sequences))
            options.append(Option(sequence, tuple(tokens[-length:])))
        return cls(tuple(sequences), tuple(options), gold)


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, limit: int = MAX_LENGTH
) -> EncodedExample:
    """The example as tokens: prompt and texts are stripped of spaces only, cut to `limit`.

    Raises:
        UserError: an option has no token of its own, or leaves none of the prompt.
    """
    prompt_length = len(tokenizer(example.prompt.strip(" ")).input_ids)
    texts = []
    for option in example.options:
        tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
        length = len(tokens) - prompt_length
        if not 0 < length < min(len(tokens), limit):
            raise UserError(
                f"option {option[:60]!r} of the prompt {example.prompt[:60]!r} takes {length} of "
                f"{len(tokens)} tokens: option and prompt need at least one each, and the "
                f"option fewer than {limit}"
            )
        texts.append((truncate(tokens, limit, tokenizer), length))
    return EncodedExample.of_texts(texts, example.gold)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if the tokenizer appends a token, such as EOS, to every text."""
    tokens = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    # Where "a" has no token nothing can be told.
    if bare and tokens[-len(bare) :] != bare:
        raise UserError(
            f"the tokenizer puts {tokenizer.convert_ids_to_tokens(tokens[-1])!r} behind each text, "
            "which would be scored and continued in its place: load it with add_eos_token=False"
        )


def check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]
) -> None:
    """Raises UserError if the tokenizer gave an id that the model has no embedding for."""
    size = model.config.get_text_config(decoder=True).vocab_size
    largest = max(ids, default=0)
    if largest >= size:
        raise UserError(
            f"the tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id {largest} "
            f"and the model has {size} tokens: load the tokenizer that belongs to the model"
        )


def max_length(model: PreTrainedModel) -> int:
    """The most tokens of a text: MeZO's limit, or the model's own where that is lower."""
    config = model.config.get_text_config(decoder=True)
    # The second is MPT's, the third that of Whisper's decoder.
    names = "max_position_embeddings", "max_seq_len", "max_target_positions"
    lengths = [getattr(config, name, None) for name in names]
    # LongRoPE turns all texts of a forward otherwise where one is longer. Some models have several
    # rotations, by kinds of layers.
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):
        if isinstance(each, Mapping) and each.get("rope_type") == "longrope":
            lengths.append(each["original_max_position_embeddings"])
    # Where a table of positions has padding, as RoBERTa's, they begin behind it.
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            continue
        if module.padding_idx is not None and module.num_embeddings == lengths[0]:
            lengths.append(module.num_embeddings - module.padding_idx - 1)
    return min(length for length in (MAX_LENGTH, *lengths) if length is not None)


def truncate(tokens: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `length` tokens; as in MeZO, a beginning-of-sequence token stays in front."""
    if len(tokens) <= length:
        return tokens
    kept = int(tokens[0] == tokenizer.bos_token_id)
    return tokens[:kept] + tokens[len(tokens) - length + kept :]
