"""The nine tasks of dominant-layer fine-tuning, with MeZO's prompts (arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dlzo.tasks.task import Example, Field, Task, answers, label, texts

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


def _generation(passage: str, question: str, gold: Sequence[str]) -> Example:
    prompt = f"{passage}\nQuestion: {question.strip()}\nAnswer:"
    return Example(prompt, (f" {gold[0]}\n",), 0, tuple(gold))


TASKS = (
    Task("sst2", (*texts("sentence"), label(2)), _sst2),
    Task("rte", (*texts("premise", "hypothesis"), label(2)), _rte),
    Task("cb", (*texts("premise", "hypothesis"), label(3)), _cb),
    Task("boolq", (*texts("passage", "question"), _TRUTH), _boolq),
    Task("wsc", (*texts("text", "span1_text", "span2_text"), label(2)), _wsc),
    Task(
        "copa",
        (*texts("premise", "choice1", "choice2"), _RELATION, label(2)),
        _copa,
        loss="gold",
    ),
    Task("multirc", (*texts("paragraph", "question", "answer"), label(2)), _multirc),
    Task(
        "squad",
        (*texts("title", "context", "question"), answers("answers.text")),
        _squad,
        loss="gold",
        metric="f1",
    ),
    Task(
        "drop",
        (*texts("passage", "question"), answers("answers_spans.spans")),
        _drop,
        loss="gold",
        metric="f1",
    ),
)
