"""How good a model is at a task: its losses, its choices and its answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo import distributed
from dlzo.generation import exact_match, f1, generate
from dlzo.models import sole_use
from dlzo.scoring import EncodedExample, Scorer
from dlzo.tasks import Example, Split, Task, get_task, load_split


class Evaluation(TypedDict, total=False):
    """What was measured on a split.

    `loss` is the task's own, None if it is not finite; `accuracy` the share of right argmaxes over
    the options; of a generation task, `f1` and `exact_match` are means in [0, 1] over the answers.
    """

    loss: float | None
    accuracy: float
    f1: float
    exact_match: float


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Path,
    data_dir: str | Path,
    split: Split = "test",
) -> Evaluation:
    """Judges a model as it is on one split of a task's data: of "test", the same bits as in a run.

    Args:
        model: a decoder-only model.
        tokenizer: its tokenizer.
        task: name of the task, or path of a .yaml file that describes it.
        data_dir: folder of the split's .jsonl file.
        split: "train", "validation" or "test".

    Raises:
        UserError: the task is not known, the data cannot be read, or the model is in training.
    """
    definition = get_task(task)
    examples = load_split(definition, data_dir, split)
    with sole_use(model):
        return judge(Scorer(model, tokenizer, loss=definition.loss), definition, examples)


def judge(scorer: Scorer, task: Task, examples: Sequence[Example]) -> Evaluation:
    """All that is measured of a task; the ranks of a data-parallel run share the examples."""
    found = score(scorer, task, scorer.encode(examples))
    if task.metric == "f1":
        found.update(_answer(scorer, examples))
    return found


def score(scorer: Scorer, task: Task, examples: Sequence[EncodedExample]) -> Evaluation:
    """What forwards alone tell, without an answer being generated."""
    share = distributed.share_of(examples)
    hits, total, weight = scorer.evaluate(scorer.plan(share)) if share else (0, 0.0, 0)
    loss, accuracy = distributed.quotients([total, hits], [weight, len(share)])
    found = Evaluation(loss=loss if math.isfinite(loss) else None)
    if task.metric == "accuracy":
        found["accuracy"] = accuracy
    return found


def _answer(scorer: Scorer, examples: Sequence[Example]) -> Evaluation:
    share = distributed.share_of(examples)
    prompts = [example.prompt for example in share]
    answers = generate(scorer.model, scorer.tokenizer, prompts) if share else []
    pairs = list(zip(answers, (example.answers for example in share), strict=True))
    sums = [sum(metric(*pair) for pair in pairs) for metric in (f1, exact_match)]
    f1_mean, exact_mean = distributed.quotients(sums, [len(share)] * 2)
    return Evaluation(f1=f1_mean, exact_match=exact_mean)
