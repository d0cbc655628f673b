"""Where results lie, and their files: JSON, and rows that are added as they are measured."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dlzo.files import replace_file, replace_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_json(path: Path, value: object) -> None:
    """Makes a file anew, whole or not at all."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def matching(path: Path, key: dict[str, str]) -> Iterator[dict[str, str]]:
    """The rows that have these values."""
    return (row for row in read_rows(path) if key.items() <= row.items())


def find(path: Path, key: dict[str, str]) -> dict[str, str] | None:
    """The first row that has these values."""
    return next(matching(path, key), None)


def append(path: Path, fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file, and prints them."""
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, list(fields)):
            raise SystemExit(f"{path} has the columns {header}, not {fields}: move it away")
        writer = csv.DictWriter(file, fields)
        if header is None:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            print(*row.values(), flush=True)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As `write_json`; the keys of the first row are the columns."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown; the keys of the first row are its head."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
