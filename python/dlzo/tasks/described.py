"""Tasks that a YAML file describes: a prompt with {fields} of a row, and what may follow it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from dlzo.errors import UserError
from dlzo.files import user_path
from dlzo.tasks.task import Example, Field, Task, is_texts, value_of

SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1 << 20
_KEYS = ("name", "prompt", "options", "label", "answers", "loss")
# A word, or what ends a clause, and a word right behind it.
_GLUED = re.compile(r"[A-Za-z0-9.,:;?!][A-Za-z0-9]")

Render = Callable[[Mapping[str, Any]], Example]


def read_task(path: str | Path) -> Task:
    """The task that a YAML file describes (docs/tasks.md); nothing in it is ever executed.

    Raises:
        UserError: the file cannot be read, or is not valid; the message names the key.
    """
    try:
        return _parse(_read(user_path(path)))
    except (UserError, ValueError) as error:
        raise UserError(f"task file {str(path)!r}: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES} bytes: give a description of the task")
    try:
        # The base loader makes texts, lists and mappings only: "Yes" stays a text.
        values = yaml.load(content.decode(), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8: save it as such") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is not valid YAML ({_first_line(error)})") from error
    if not isinstance(values, dict):
        raise ValueError(f"it has no keys: give {', '.join(_KEYS[:4])}")
    return values


class _Loader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice")
        return values


def _first_line(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0]
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return f"{line}{error.problem}"


def _parse(values: Mapping[str, Any]) -> Task:
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"key {key[:60]!r} is not known: choose from {', '.join(_KEYS)}")
    name = _text(values, "name")
    prompt = _Template.parse("prompt", _text(values, "prompt"))
    if not prompt.fields:
        raise ValueError("key 'prompt' has no {field}: each row would be the same")
    if "answers" in values:
        for key in ("options", "label", "loss"):
            if key in values:
                raise ValueError(f"key {key!r} does not go with 'answers': leave out one of them")
        answers = _text(values, "answers")
        field = Field((answers,), "a line of text, or a list of one or more", _is_answers)
        fields = (*prompt.fields, field)
        return Task(name, fields, _generation(prompt, answers), loss="gold", metric="f1")
    options, option_fields = _parse_options(values)
    label = _text(values, "label")
    field = Field((label,), "an integer or a string", _is_short)
    loss: Any = _text(values, "loss") if "loss" in values else "options"  # Task checks it
    fields = (*prompt.fields, *option_fields, field)
    return Task(name, fields, _choice(prompt, options, label), loss=loss)


def _text(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        raise ValueError(f"key {key!r} is missing: give a text")
    if not isinstance(values[key], str) or not values[key]:
        raise ValueError(f"key {key!r} holds no text: give one, in quotes if need be")
    try:
        values[key].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"key {key!r} holds half of a surrogate pair: write all of it") from error
    return values[key]


def _parse_options(
    values: Mapping[str, Any],
) -> tuple[Callable[[Mapping[str, Any]], tuple[str, ...]], tuple[Field, ...]]:
    """How a row's options are made, and what fields that takes."""
    given = values.get("options")
    if isinstance(given, str):
        template = _Template.parse("options", given)
        if len(template.fields) != 1:
            raise ValueError(
                "key 'options' is one text: give a list of texts, or one {field} that holds a list"
            )
        name = template.fields[0].names[0]
        field = Field((name,), "a list of one string or more", is_texts)
        return lambda row: tuple(template.fill({name: t}) for t in value_of(row, name)), (field,)
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(
            "key 'options' must be a list of two texts or more, or one {field} that holds a list; "
            "a generated answer has 'answers' in its place"
        )
    texts = {f"options[{i}]": option for i, option in enumerate(given)}
    _check_distinct([_text(texts, key) for key in texts])
    templates = [_Template.parse(key, _text(texts, key)) for key in texts]
    fields = tuple(field for template in templates for field in template.fields)
    return lambda row: tuple(template.render(row) for template in templates), fields


def _choice(
    prompt: _Template, options: Callable[[Mapping[str, Any]], tuple[str, ...]], label: str
) -> Render:
    def render(row: Mapping[str, Any]) -> Example:
        text, choices = prompt.render(row), options(row)
        _check_distinct(choices)
        for option in choices:
            if _GLUED.fullmatch(text[-1:] + option[:1]):
                raise ValueError(
                    f"option {option[:60]!r} follows {text[-20:]!r} without a space: begin the "
                    f"options with one, in quotes, as in {' ' + option[:60]!r}"
                )
        return Example(text, choices, _gold(label, value_of(row, label), choices))

    return render


def _check_distinct(options: Sequence[str]) -> None:
    """Refuses options that are the same text: spaces at its end are not scored."""
    texts = [option.rstrip(" ") for option in options]
    for text in texts:
        if texts.count(text) > 1:
            raise ValueError(f"option {text[:60]!r} is there twice: give texts that differ")


def _gold(label: str, value: int | str, options: tuple[str, ...]) -> int:
    if isinstance(value, int):
        texts = [option.strip() for option in options]
        if str(value) in texts and texts.index(str(value)) != value:
            raise ValueError(
                f"field {label!r} is {value}, the text of one option and the index of another: "
                "write the text, in quotes"
            )
        found = [value] if 0 <= value < len(options) else []
    else:
        found = [i for i, option in enumerate(options) if option.strip() == value.strip()]
    if len(found) != 1:
        shown = ", ".join(repr(option.strip()[:20]) for option in options[:5])
        raise ValueError(
            f"field {label!r} must be an integer from 0 to {len(options) - 1} or the text of one "
            f"option ({shown}{', ...' if len(options) > 5 else ''}), not {str(value)[:60]!r}"
        )
    return found[0]


def _generation(prompt: _Template, answers: str) -> Render:
    def render(row: Mapping[str, Any]) -> Example:
        text, gold = prompt.render(row), value_of(row, answers)
        gold = (gold,) if isinstance(gold, str) else tuple(gold)
        return Example(text, (f"{'' if text[-1:].isspace() else ' '}{gold[0]}\n",), 0, gold)

    return render


def _is_short(value: object) -> bool:
    return isinstance(value, str) or type(value) is int


def _is_answers(value: object) -> bool:
    # An answer ends with its line, as generation does.
    texts = [value] if isinstance(value, str) else value
    return is_texts(texts) and not any("\n" in text for text in texts)


@dataclass(frozen=True)
class _Template:
    """A text with {fields}: literal texts, each with the name of the field that follows it."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, key: str, text: str) -> _Template:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"key {key!r}: {error}; for a brace as such write it twice") from error
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion or set(name) & set("[]{}")):
                raise ValueError(
                    f"key {key!r}: {{{name}}} is no field: write the name alone in braces, and "
                    "a brace as such twice"
                )
        return cls(tuple((literal, name) for literal, name, _, _ in parts))

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(
            Field((name,), "a string or an integer", _is_short) for _, name in self.parts if name
        )

    def render(self, row: Mapping[str, Any]) -> str:
        return self.fill({name: str(value_of(row, name)) for _, name in self.parts if name})

    def fill(self, values: Mapping[str, str]) -> str:
        return "".join(literal + (values[name] if name else "") for literal, name in self.parts)
