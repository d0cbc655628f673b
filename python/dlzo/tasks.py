"""Tasks: a row of a data set becomes a prompt with options (MeZO's prompts, arXiv 2305.17333)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dlzo.errors import UserError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """A prompt and the options that may follow it; `prompt + option` is the text that is scored."""

    prompt: str
    options: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """How the rows of one data set are read: JSON fields in, an `Example` out.

    Attributes:
        name: The name on the command line.
        text_fields: Fields that each row must hold as strings.
        labels: Number of classes; `row["label"]` is an integer in [0, labels).
        render: Makes the example from a row that has passed these checks.
    """

    name: str
    text_fields: tuple[str, ...]
    labels: int
    render: Callable[[Mapping[str, Any]], Example]


def _sst2(row: Mapping[str, Any]) -> Example:
    return Example(f"{row['sentence'].strip()} It was", (" terrible", " great"), row["label"])


_TASKS = {
    task.name: task for task in (Task("sst2", text_fields=("sentence",), labels=2, render=_sst2),)
}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        UserError: there is no such task.
    """
    if name not in _TASKS:
        raise UserError(f"task {name!r} is not known: choose one of {', '.join(sorted(_TASKS))}")
    return _TASKS[name]


def load_split(task: Task, data_dir: str | Path, split: Split) -> list[Example]:
    """The examples of DATA_DIR/SPLIT.jsonl: one JSON object a line, blank lines ignored.

    Raises:
        UserError: the folder or the file is missing, empty or not UTF-8, or a row is not what the
            task asks for; the message names the file and the line.
    """
    if split not in get_args(Split):
        raise UserError(f"split {split!r} is not known: choose one of {', '.join(get_args(Split))}")
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data folder {str(folder)!r} does not exist or is no folder")
    path = folder / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    examples = [
        task.render(_parse_row(task, line, f"{str(path)!r} line {number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise UserError(f"{str(path)!r} holds no examples: give one JSON object a line")
    return examples


def _parse_row(task: Task, line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {_short(row)}")
    for field in (*task.text_fields, "label"):
        if field not in row:
            raise UserError(f"{where} has no field {field!r}, which task {task.name!r} needs")
    for field in task.text_fields:
        if not isinstance(row[field], str):
            raise UserError(f"{where}: field {field!r} must be a string, not {_short(row[field])}")
    label = row["label"]
    # A JSON true would pass isinstance(label, int).
    if type(label) is not int or not 0 <= label < task.labels:
        raise UserError(
            f"{where}: label must be an integer from 0 to {task.labels - 1}, not {_short(label)}"
        )
    return row


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
