"""Texts to run through a model that is probed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.files import read_text
from dlzo.scoring.encoding import check_ids, max_length

# How many of a text's first tokens are read, for outliers sit there: the last of these. The rule is
# tried on fewer too, and on the second number with and without a start token.
LENGTHS = (8, 32, 96)


def calibration_texts() -> list[str]:
    """The built-in texts: short paragraphs of many kinds."""
    return _paragraphs(files("dlzo").joinpath("data/calibration.txt").read_text("utf-8"))


def read_texts(path: Path) -> list[str]:
    """The paragraphs of a UTF-8 text file, which are separated by blank lines.

    Raises:
        UserError: the file is missing, is not UTF-8, or holds no text.
    """
    texts = _paragraphs(read_text(path))
    if not texts:
        raise UserError(f"{str(path)!r} is empty: write paragraphs separated by blank lines")
    return texts


def calibration_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None = None
) -> list[list[int]]:
    """The first tokens of texts, of the built-in ones if None: what the probe reads.

    Raises:
        UserError: no text has a token, or the tokenizer is of another model.
    """
    texts = calibration_texts() if texts is None else texts
    length = min(max_length(model), LENGTHS[-1])
    encoded = [tokenizer(text).input_ids[:length] for text in texts]
    encoded = [ids for ids in encoded if ids]
    if not encoded:
        raise UserError("the calibration texts hold no token: give texts with words in them")
    check_ids(model, tokenizer, chain(*encoded))
    return encoded


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
