"""Rows of JSONL files as examples of a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from dlzo.errors import UserError
from dlzo.files import read_text, user_path
from dlzo.tasks.task import Example, Field, Task, value_of

Split = Literal["train", "validation", "test"]


def load_split(task: Task, data_dir: str | Path, split: Split) -> list[Example]:
    """The examples of DATA_DIR/SPLIT.jsonl: one JSON object a line, blank lines ignored.

    Raises:
        UserError: the folder or the file is missing, empty or not UTF-8, or a row is not what the
            task asks for; the message names the file and the line.
    """
    if split not in get_args(Split):
        raise UserError(f"split {split!r} is not known: choose one of {', '.join(get_args(Split))}")
    data_dir = user_path(data_dir)
    check_folder(data_dir)
    path = data_dir / f"{split}.jsonl"
    examples = [
        _example(task, line, f"{str(path)!r} line {number}")
        for number, line in enumerate(read_text(path).split("\n"), start=1)
        if line.strip()
    ]
    if not examples:
        raise UserError(f"{str(path)!r} holds no examples: give one JSON object a line")
    return examples


def check_folder(data_dir: str | Path) -> None:
    """Raises UserError unless there is such a folder."""
    if not Path(data_dir).is_dir():
        raise UserError(
            f"data folder {str(data_dir)!r} does not exist or is no folder: give that of "
            "train.jsonl, validation.jsonl and test.jsonl"
        )


def load_splits(task: Task, data_dir: str | Path) -> dict[Split, list[Example]]:
    """The examples of all splits.

    Raises:
        UserError: as `load_split`.
    """
    return {split: load_split(task, data_dir, split) for split in get_args(Split)}


def fingerprint(examples: Mapping[Split, Sequence[Example]]) -> str:
    """SHA-256 of all splits."""
    digest = hashlib.sha256()
    for split, rows in examples.items():
        digest.update(f"{split} {len(rows)}\n".encode())
        for row in rows:
            digest.update(json.dumps(asdict(row), sort_keys=True).encode())
    return digest.hexdigest()


def _example(task: Task, line: str, where: str) -> Example:
    row = _parse_row(line, where)
    for field in task.fields:
        _check_field(task, row, field, where)
    try:
        example = task.render(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if task.metric == "f1" and not example.answers:
        raise UserError(f"{where} has no answers, which task {task.name!r} is judged by")
    if task.loss == "options" and len(example.options) < 2:
        raise UserError(
            f"{where} has one option, from which there is nothing to choose: give two, or the task "
            "the loss 'gold'"
        )
    return example


def _parse_row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    # Deep nesting ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {_short(row)}")
    return row


def _check_field(task: Task, row: Mapping[str, Any], field: Field, where: str) -> None:
    for name in field.names:
        try:
            value = value_of(row, name)
        except KeyError:
            continue
        if not field.accepts(value):
            raise UserError(
                f"{where}: field {name!r} must be {field.expected}, not {_short(value)}"
            )
        return
    names = " or ".join(map(repr, field.names))
    raise UserError(f"{where} has no field {names}, which task {task.name!r} needs")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
