"""Checks on the text data shipped inside the package."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest
import torch

DATA = files("dlzo") / "data"
MIN_EXAMPLES = {"train": 400, "validation": 120, "test": 240}
MAX_JACCARD = 0.6


def read_split(split: str) -> list[dict[str, Any]]:
    text = (DATA / "demo" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", sentence.lower())


def jaccard_matrix(sentences: list[str]) -> torch.Tensor:
    """Jaccard similarity of the word sets of every pair, shape (n, n)."""
    word_sets = [set(words(sentence)) for sentence in sentences]
    column = {word: i for i, word in enumerate(sorted(set().union(*word_sets)))}
    incidence = torch.zeros(len(word_sets), len(column))
    for row, word_set in enumerate(word_sets):
        incidence[row, [column[word] for word in word_set]] = 1
    intersection = incidence @ incidence.T
    sizes = incidence.sum(dim=1)
    return intersection / (sizes[:, None] + sizes[None, :] - intersection)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return [example["sentence"] for split in MIN_EXAMPLES for example in read_split(split)]


@pytest.fixture(scope="module")
def passages() -> list[str]:
    text = (DATA / "calibration.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split("\n\n")


@pytest.mark.parametrize("split", MIN_EXAMPLES)
def test_split_has_the_documented_fields_size_and_balance(split: str) -> None:
    examples = read_split(split)
    assert len(examples) >= MIN_EXAMPLES[split]
    for example in examples:
        assert example.keys() == {"sentence", "label"}
        assert type(example["sentence"]) is str
        assert type(example["label"]) is int
        assert example["label"] in (0, 1)
    assert sum(example["label"] for example in examples) / len(examples) == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.parametrize("split", MIN_EXAMPLES)
def test_labels_are_mixed_along_the_file(split: str) -> None:
    labels = [example["label"] for example in read_split(split)]
    quarter = len(labels) // 4
    for start in range(0, 4 * quarter, quarter):
        assert 0.3 < sum(labels[start : start + quarter]) / quarter < 0.7


def test_sentences_are_plain_ascii_with_a_capital_and_a_full_stop(sentences: list[str]) -> None:
    malformed = [s for s in sentences if not re.fullmatch(r"[A-Z][ -~]*[.?!]", s)]
    assert malformed == []


def test_sentence_lengths(sentences: list[str]) -> None:
    lengths = [len(sentence.split()) for sentence in sentences]
    assert min(lengths) >= 5
    assert max(lengths) <= 25
    assert sum(lengths) / len(lengths) == pytest.approx(12, abs=2)


def test_no_two_sentences_of_any_splits_are_near_duplicates(sentences: list[str]) -> None:
    similarity = jaccard_matrix(sentences).triu(diagonal=1)
    pairs = (similarity > MAX_JACCARD).nonzero().tolist()
    assert [(sentences[i], sentences[j]) for i, j in pairs] == []


def test_no_opening_is_overused(sentences: list[str]) -> None:
    openings = Counter(tuple(words(sentence)[:3]) for sentence in sentences)
    assert {opening for opening, count in openings.items() if count > 4} == set()


def test_no_give_away_word_is_common(sentences: list[str]) -> None:
    give_away = {"great", "terrible", "good", "bad", "positive", "negative"}
    assert sum(not give_away.isdisjoint(words(s)) for s in sentences) < 0.05 * len(sentences)


def test_calibration_passages_are_single_lines_of_moderate_length(passages: list[str]) -> None:
    assert 28 <= len(passages) <= 34
    for passage in passages:
        assert passage == passage.strip()
        assert "\n" not in passage
        assert 40 <= len(passage.split()) <= 120


def test_calibration_passages_differ(passages: list[str]) -> None:
    assert jaccard_matrix(passages).triu(diagonal=1).max() < 0.3
