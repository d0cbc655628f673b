"""What a task is: how a row of a data set becomes a prompt with options."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, get_args

from dlzo.errors import UserError

TrainingLoss = Literal["options", "gold"]
Metric = Literal["accuracy", "f1"]
# A name appears in tables, whose markup has brackets, and in names of files.
_NAME = re.compile(r"[\w.-]{1,60}")


@dataclass(frozen=True)
class Example:
    """A prompt and the options that may follow it; `prompt + option` is the text that is scored.

    Attributes:
        prompt: what the model reads.
        options: the texts to choose from; of a generation task the first answer alone.
        gold: index of the right option.
        answers: gold answers of a generation task; empty for the others.

    Raises:
        ValueError: `gold` is no index of an option, or texts are given as one.
        TypeError: `gold` is no integer.
    """

    prompt: str
    options: tuple[str, ...]
    gold: int
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("options", "answers"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} are the text {getattr(self, name)[:60]!r}: give a tuple")
        object.__setattr__(self, "gold", int(operator.index(self.gold)))
        if not 0 <= self.gold < len(self.options):
            raise ValueError(f"the right option is {self.gold} of {len(self.options)}")

    def gold_only(self) -> Example:
        """The same prompt with its gold option alone."""
        return replace(self, options=(self.options[self.gold],), gold=0)


@dataclass(frozen=True)
class Field:
    """A value that each row of a data set must hold.

    Attributes:
        names: its names, of which a row holds one; "a.b" is field b of the object a.
        expected: what the value must be, to follow "must be" in a message.
        accepts: whether a value is that.
    """

    names: tuple[str, ...]
    expected: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Task:
    """How the rows of one data set are read: JSON fields in, an `Example` out.

    Attributes:
        name: the name on the command line: letters, digits, "-", "_" and ".".
        fields: what each row must hold; other fields are ignored.
        render: makes the example from a row that has these fields; a ValueError refuses the row.
        loss: what training minimises: "options" is the cross-entropy over the options' mean
            log-probabilities, "gold" the mean token cross-entropy of the gold option.
        metric: what is reported: "accuracy" of the best option, or "f1" of a generated answer,
            for which examples need `answers`.

    Raises:
        UserError: name, loss or metric is none.
    """

    name: str
    fields: tuple[Field, ...]
    render: Callable[[Mapping[str, Any]], Example]
    loss: TrainingLoss = "options"
    metric: Metric = "accuracy"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"task name {self.name[:60]!r}: give up to 60 letters, digits, '-', '_' or '.'"
            )
        for name, values in (("loss", get_args(TrainingLoss)), ("metric", get_args(Metric))):
            if getattr(self, name) not in values:
                raise UserError(
                    f"{name} {getattr(self, name)!r} of task {self.name!r}: choose "
                    f"{' or '.join(values)}"
                )

        if (self.loss, self.metric) == ("options", "f1"):
            raise UserError(
                f"task {self.name!r} has metric 'f1', where there is one answer and no option "
                "beside it: give loss 'gold'"
            )

    def drawn(self, examples: Sequence[Example]) -> Sequence[Example]:
        """What steps are taken on: where the gold option alone counts, the others are left out."""
        if self.loss == "gold":
            return [example.gold_only() for example in examples]
        return examples


def texts(*names: str) -> tuple[Field, ...]:
    """Fields that hold a string."""
    return tuple(Field((name,), "a string", lambda value: isinstance(value, str)) for name in names)


def label(classes: int) -> Field:
    """The field "label", an integer from 0 to `classes` - 1."""
    # A JSON true would pass isinstance(value, int).
    return Field(
        ("label",),
        f"an integer from 0 to {classes - 1}",
        lambda value: type(value) is int and 0 <= value < classes,
    )


def answers(name: str) -> Field:
    """A field that holds a list of gold answers."""
    return Field((name,), "a list of one string or more", is_texts)


def is_texts(value: object) -> TypeGuard[list[str]]:
    """Whether a value is a list of one string or more."""
    return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field; "a.b" is field b of the object a.

    Raises:
        KeyError: the row has no such field.
    """
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = value[part]
    return value
