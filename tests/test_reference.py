"""The numpy definition against published vectors, the known-answer file and exact arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bits import bits, reference_perturb
from dlzo_kernels import NOISE_VERSION, reference
from noise_edges import PLACES, SCALE, WORDS, cancelled

VECTORS = json.loads((Path(__file__).parent / "vectors" / "noise_v1.json").read_text())


def _uint32s(text: str) -> list[np.uint32]:
    return [np.uint32(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"])
def test_philox_gives_the_published_words(case):
    key = _uint32s(case["key"])
    counter = tuple(np.array([word]) for word in _uint32s(case["counter"]))
    got = reference.philox4x32(counter, int(key[0]) | int(key[1]) << 32)
    assert [int(word[0]) for word in got] == [int(word) for word in _uint32s(case["words"])]


@pytest.mark.parametrize("run", VECTORS["runs"])
def test_the_reference_gives_the_known_answers(run):
    index = np.arange(run["first"], run["first"] + len(run["z"]), dtype=np.uint64)
    arguments = (index, run["seed"], run["stream"], run["query"])
    words = [[f"{w:08x}" for w in pair] for pair in reference.words(*arguments).tolist()]
    assert words == run["words"]
    z = reference.gaussian(*arguments).view(np.uint32)
    assert [f"{bits:08x}" for bits in z] == run["z"]


def test_the_file_is_that_of_this_version_and_covers_high_counters():
    assert VECTORS["noise_version"] == NOISE_VERSION
    assert sum(run["first"] >> 2 >= 1 << 32 for run in VECTORS["runs"]) >= 2
    assert len(VECTORS["philox4x32_10"]) == 3


def test_radius_is_within_its_bound():
    rng = np.random.default_rng(0)
    word = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    word[:4] = [0, 1, 0x7FFFFFFF, 0xFFFFFF7F]
    u = (word.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    exact = np.sqrt(-2 * np.log(u))
    error = np.abs(reference.radius(word) - exact) / np.spacing(exact.astype(np.float32))
    assert error[exact > 0].max() <= 1.12
    assert reference.radius(word).max() <= 6.764


def test_sine_and_cosine_are_within_their_bound():
    word = np.random.default_rng(1).integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    angle = 2 * np.pi * word.astype(np.float64) / 2**32
    sin, cos = reference.sincos(word)
    assert np.abs(sin - np.sin(angle)).max() <= 1.1e-7
    assert np.abs(cos - np.cos(angle)).max() <= 1.1e-7


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    one = 0x3F800000
    floats = np.array(
        [one + 0x7FFF, one + 0x8000, one + 0x18000, 0x7F800001, 0xFFFFFFFF], np.uint32
    )
    got = reference.to_bfloat16_bits(floats.view(np.float32))
    assert got.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x7FC0, 0xFFFF]


def test_the_telling_words_stand_where_they_are_said_to():
    for i, numbers in enumerate(PLACES):
        index = reference.element_index((8,), numbers["offset"])
        words = reference.words(index, *(numbers[name] for name in ("seed", "stream", "query")))
        assert (words[4 * (i % 2) :][:4] == np.uint32(WORDS[i // 2])).all()


CONSTANTS = [("LN2", 0), *(("LOG", i) for i in range(9))]
CONSTANTS += [*(("SIN", i) for i in range(4)), *(("COS", i) for i in range(5))]


@pytest.mark.parametrize(("name", "place"), CONSTANTS)
@pytest.mark.parametrize("units", [1, -1])
def test_the_telling_words_show_an_error_of_every_constant(monkeypatch, dtype, name, place, units):
    def perturbed() -> Tensor:
        moved = (reference_perturb(w, scale=SCALE, dtype=dtype, **names) for w, names in weights)
        return bits(torch.stack([*moved]))

    weights = [*cancelled(8, dtype)]
    right = perturbed()
    wrong = np.array(getattr(reference, name))
    wrong.view(np.int32)[place if wrong.ndim else ...] += units
    monkeypatch.setattr(reference, name, wrong if wrong.ndim else wrong[()])
    assert not torch.equal(perturbed(), right)
