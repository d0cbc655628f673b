"""Examples as tokens, by MeZO's rules (arXiv 2305.17333)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

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


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int = MAX_LENGTH
) -> EncodedExample:
    """The example as tokens: prompt and texts are stripped of spaces only.

    Raises:
        UserError: an option has no token of its own, or leaves none of the prompt.
    """
    prompt_length = len(tokenizer(example.prompt.strip(" ")).input_ids)
    sequences: dict[tuple[int, ...], int] = {}
    options = []
    for option in example.options:
        tokens = tokenizer((example.prompt + option).strip(" ")).input_ids
        length = len(tokens) - prompt_length
        if not 0 < length < min(len(tokens), max_length):
            raise UserError(
                f"option {option!r} of the prompt {example.prompt[:60]!r} takes {length} of "
                f"{len(tokens)} tokens: option and prompt need at least one each, and the "
                f"option fewer than {max_length}"
            )
        tokens = _truncate(tokens, max_length, tokenizer.bos_token_id)
        sequence = sequences.setdefault(tuple(tokens[:-1]), len(sequences))
        options.append(Option(sequence, tuple(tokens[-length:])))
    return EncodedExample(tuple(sequences), tuple(options), example.gold)


def _truncate(tokens: list[int], max_length: int, bos_token_id: int | None) -> list[int]:
    if len(tokens) <= max_length:
        return tokens
    # As in MeZO, a beginning-of-sequence token stays in front of what is left.
    kept = int(tokens[0] == bos_token_id)
    return tokens[:kept] + tokens[kept - max_length :]
