"""The tables in the documents are those of the results beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import load_benchmark

ROOT = Path(__file__).parents[1]
for name in ("results", "timing", "mezo", "quality"):  # which the next two import
    load_benchmark(name)
method_tables, speed = load_benchmark("method_tables"), load_benchmark("speed")


def speed_tables() -> list[dict[str, str]]:
    return [speed.readable(row) for row in speed.tabulate()]


@pytest.mark.parametrize(
    ("document", "table"),
    [
        ("README.md", method_tables.nine_tasks),
        ("docs/evidence.md", method_tables.nine_tasks),
        ("docs/evidence.md", method_tables.equal_time),
        ("docs/speed.md", speed_tables),
    ],
)
def test_a_table_in_a_document_is_that_of_the_results(document, table):
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    rows = table()
    assert rows
    assert [row for row in rows if f"| {' | '.join(map(str, row.values()))} |" not in lines] == []
