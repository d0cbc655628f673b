"""Readers of files from strangers: the documented error or nothing."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import CORPUS, READERS, mutants, outcome

SEEDS = sorted(path for path in CORPUS.glob("*/*") if path.parent.name.startswith("whole"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_whole_files_are_read(seed):
    assert outcome(seed) == "read"


def test_each_kind_of_refusal_is_still_one():
    """Inputs that benchmarks/reliability.py found, one for each outcome that was new to it."""
    found = [outcome(path) for path in CORPUS.glob("broken-*/*")]
    assert len(set(found)) == 43 and "read" not in found


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SEEDS), st.integers(0, 1 << 64))
def test_garbled_files_give_the_documented_error(seed, number):
    assert seed.name in READERS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / seed.name
        for data in islice(mutants(seed, Random(number)), 20):
            path.write_bytes(data)
            outcome(path)
