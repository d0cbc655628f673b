"""Tasks: a row of a data set becomes a prompt with options (MeZO's prompts, arXiv 2305.17333)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dlzo.errors import UserError

Split = Literal["train", "validation", "test"]
TrainingLoss = Literal["options", "gold"]
Metric = Literal["accuracy", "f1"]


@dataclass(frozen=True)
class Example:
    """A prompt and the options that may follow it; `prompt + option` is the text that is scored.

    Attributes:
        prompt: What the model reads.
        options: The texts to choose from; of a generation task the first answer alone.
        gold: Index of the right option.
        answers: Gold answers of a generation task; empty for the others.
    """

    prompt: str
    options: tuple[str, ...]
    gold: int
    answers: tuple[str, ...] = ()

    def gold_only(self) -> Example:
        """The same prompt with its gold option alone."""
        return replace(self, options=(self.options[self.gold],), gold=0)


@dataclass(frozen=True)
class Field:
    """A value that each row of a data set must hold.

    Attributes:
        names: Its names, of which a row holds one; "a.b" is field b of the object a.
        expected: What the value must be, to follow "must be" in a message.
        accepts: Whether a value is that.
    """

    names: tuple[str, ...]
    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Task:
    """How the rows of one data set are read: JSON fields in, an `Example` out.

    Attributes:
        name: The name on the command line.
        fields: What each row must hold; other fields are ignored.
        render: Makes the example from a row that has these fields.
        loss: What training minimises: "options" is the cross-entropy over the options' mean
            log-probabilities, "gold" the mean token cross-entropy of the gold option.
        metric: What is reported: "accuracy" of the best option, or "f1" of a generated answer.
    """

    name: str
    fields: tuple[Field, ...]
    render: Callable[[Mapping[str, Any]], Example]
    loss: TrainingLoss = "options"
    metric: Metric = "accuracy"

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        """What steps are taken on: where the gold option alone counts, the others are left out."""
        if self.loss == "gold":
            return [example.gold_only() for example in examples]
        return examples


def _texts(*names: str) -> tuple[Field, ...]:
    return tuple(Field((name,), "a string", lambda value: isinstance(value, str)) for name in names)


def _label(classes: int) -> Field:
    # A JSON true would pass isinstance(value, int).
    return Field(
        ("label",),
        f"an integer from 0 to {classes - 1}",
        lambda value: type(value) is int and 0 <= value < classes,
    )


def _answers(name: str) -> Field:
    return Field(
        (name,),
        "a list of one string or more",
        lambda value: (
            isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
        ),
    )


# SuperGLUE has an integer label, the Hub's own `boolq` a boolean answer.
_TRUTH = Field(
    ("label", "answer"),
    "0, 1, true or false",
    lambda value: type(value) in (int, bool) and value in (0, 1),
)
_CONJUNCTIONS = {"cause": " because ", "effect": " so "}
_RELATION = Field(
    ("question",),
    " or ".join(f'"{name}"' for name in _CONJUNCTIONS),
    lambda value: isinstance(value, str) and value in _CONJUNCTIONS,
)


def _sst2(row: Mapping[str, Any]) -> Example:
    return Example(f"{row['sentence'].strip()} It was", (" terrible", " great"), row["label"])


def _rte(row: Mapping[str, Any]) -> Example:
    prompt = f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
    return Example(prompt, ("Yes", "No"), row["label"])


def _cb(row: Mapping[str, Any]) -> Example:
    question = f'Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?'
    return Example(f"Suppose {row['premise']} {question}\n", ("Yes", "No", "Maybe"), row["label"])


def _boolq(row: Mapping[str, Any]) -> Example:
    question = row["question"]
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    truth = row["label"] if "label" in row else row["answer"]
    return Example(f"{row['passage']} {question}\n", ("Yes", "No"), 1 - truth)


def _wsc(row: Mapping[str, Any]) -> Example:
    prompt = (
        f"{row['text']}\nIn the previous sentence, does the pronoun "
        f'"{row["span2_text"].lower()}" refer to {row["span1_text"]}? Yes or No?\n'
    )
    return Example(prompt, ("No", "Yes"), row["label"])


def _copa(row: Mapping[str, Any]) -> Example:
    premise = row["premise"].rstrip().removesuffix(".")
    options = (_lower_first_word(row["choice1"]), _lower_first_word(row["choice2"]))
    return Example(premise + _CONJUNCTIONS[row["question"]], options, row["label"])


def _lower_first_word(choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _multirc(row: Mapping[str, Any]) -> Example:
    prompt = (
        f"{row['paragraph']}\nQuestion: {row['question']}\n"
        f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
    )
    return Example(prompt, ("No", "Yes"), row["label"])


def _squad(row: Mapping[str, Any]) -> Example:
    passage = f"Title: {row['title']}\nContext: {row['context']}"
    return _generation(passage, row["question"], row["answers"]["text"])


def _drop(row: Mapping[str, Any]) -> Example:
    return _generation(f"Passage: {row['passage']}", row["question"], row["answers_spans"]["spans"])


def _generation(passage: str, question: str, answers: Sequence[str]) -> Example:
    prompt = f"{passage}\nQuestion: {question.strip()}\nAnswer:"
    return Example(prompt, (f" {answers[0]}\n",), 0, tuple(answers))


_TASKS = {
    task.name: task
    for task in (
        Task("sst2", (*_texts("sentence"), _label(2)), _sst2),
        Task("rte", (*_texts("premise", "hypothesis"), _label(2)), _rte),
        Task("cb", (*_texts("premise", "hypothesis"), _label(3)), _cb),
        Task("boolq", (*_texts("passage", "question"), _TRUTH), _boolq),
        Task("wsc", (*_texts("text", "span1_text", "span2_text"), _label(2)), _wsc),
        Task(
            "copa",
            (*_texts("premise", "choice1", "choice2"), _RELATION, _label(2)),
            _copa,
            loss="gold",
        ),
        Task("multirc", (*_texts("paragraph", "question", "answer"), _label(2)), _multirc),
        Task(
            "squad",
            (*_texts("title", "context", "question"), _answers("answers.text")),
            _squad,
            loss="gold",
            metric="f1",
        ),
        Task(
            "drop",
            (*_texts("passage", "question"), _answers("answers_spans.spans")),
            _drop,
            loss="gold",
            metric="f1",
        ),
    )
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


def _parse_row(task: Task, line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    # Deep nesting ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {_short(row)}")
    for field in task.fields:
        _check_field(task, row, field, where)
    return row


def _check_field(task: Task, row: Mapping[str, Any], field: Field, where: str) -> None:
    for name in field.names:
        parent, _, leaf = name.rpartition(".")
        holder = row.get(parent) if parent else row
        if isinstance(holder, dict) and leaf in holder:
            if not field.accepts(holder[leaf]):
                raise UserError(
                    f"{where}: field {name!r} must be {field.expected}, not {_short(holder[leaf])}"
                )
            return
    names = " or ".join(map(repr, field.names))
    raise UserError(f"{where} has no field {names}, which task {task.name!r} needs")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
