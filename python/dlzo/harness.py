"""A second opinion: a model judged by lm-evaluation-harness, with its own tasks and scoring."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dlzo.errors import UserError
from dlzo.models import sole_use


def check_lm_eval(*, include: str | Path | None, limit: int | None, batch_size: int) -> None:
    """Raises UserError for what can be told of `lm_eval` without a model."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the second opinion takes lm-evaluation-harness: `pip install 'dlzo-kernels[lm-eval]'`"
        ) from error
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give at least 1")
    if include is not None and not Path(include).is_dir():
        raise UserError(f"include {str(include)!r} is no folder of tasks")


def lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds, with its own settings for a model in transformers.

    Like the harness, it seeds the random numbers of Python, numpy and torch.

    Args:
        model: a decoder-only model, as it is.
        tokenizer: its tokenizer.
        tasks: names of the harness's tasks, groups or tags.
        include: folder of further tasks in the harness's own YAML.
        limit: the most examples of a task; None for all.
        batch_size: texts in a forward.

    Returns:
        The harness's results: "results" by task and metric, and more about them.

    Raises:
        UserError: the harness is not installed, does not know a task, cannot load its data or does
            not take the tokenizer.
    """
    check_lm_eval(include=include, limit=limit, batch_size=batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("lm-eval takes a tokenizer with a token that begins or ends a text")
    manager = TaskManager(include_path=include)
    for task in tasks:
        if task not in manager.task_index:
            raise UserError(
                f"lm-eval has no task {task!r}: `lm-eval ls tasks` lists them, and --include "
                "takes a folder of others"
            )
    with sole_use(model):
        # The harness gives a tokenizer without padding a token for it.
        judged = HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            return simple_evaluate(
                judged,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                batch_size=batch_size,
                log_samples=False,
            )
        # What datasets raises for data that it cannot fetch, and a task for rows that do not fit.
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                f"lm-eval cannot do {', '.join(tasks)} ({reason}): check the network and the tasks"
            ) from error


def lm_eval_report(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the harness's results that depends on tasks and model alone, as JSON values."""
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "lm_eval_version")
    return {name: found[name] for name in kept if name in found}
