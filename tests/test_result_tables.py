"""The tables in the documents are those of the results beside them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from scripts import load_benchmark

ROOT = Path(__file__).parents[1]
results, method_tables, speed = map(load_benchmark, ("results", "method_tables", "speed"))


SPEED = {title: list(rows) for title, rows in groupby(speed.tabulate(), speed.group)}


@pytest.mark.parametrize(
    ("document", "rows"),
    [
        ("README.md", method_tables.nine_tasks()),
        ("docs/evidence.md", method_tables.nine_tasks()),
        ("docs/evidence.md", method_tables.equal_time()),
        *(("docs/speed.md", [*map(speed.readable, rows)]) for rows in SPEED.values()),
    ],
)
def test_a_table_in_a_document_is_that_of_the_results(document, rows):
    assert results.markdown(rows) in (ROOT / document).read_text(encoding="utf-8")


def test_the_table_of_speed_is_that_of_its_times():
    table = [row for rows in SPEED.values() for row in rows]
    assert [{name: str(value) for name, value in row.items()} for row in table] == (
        results.read_rows(speed.TABLE)
    )
