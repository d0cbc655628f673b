"""Texts to run through a model that is probed."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from dlzo.errors import UserError
from dlzo.files import read_text


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


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
