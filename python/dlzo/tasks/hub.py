"""The tasks' public data sets, from the Hugging Face hub, as folders of JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from dlzo.errors import UserError
from dlzo.files import cache_dir, new_folder
from dlzo.tasks.data import Split
from dlzo.tasks.known import get_task

TRAIN, TEST = 1000, 1000  # rows, as in MeZO


@dataclass(frozen=True)
class Source:
    """A data set on the hub.

    Attributes:
        path: OWNER/NAME, or a folder in the form of the hub's repositories.
        config: its configuration; None for the only one.
        validation: rows for validation.
    """

    path: str
    config: str | None = None
    validation: int = 500


SOURCES = {
    "sst2": Source("nyu-mll/glue", "sst2"),
    "rte": Source("aps/super_glue", "rte"),
    "cb": Source("aps/super_glue", "cb", validation=100),
    "boolq": Source("google/boolq"),
    "wsc": Source("aps/super_glue", "wsc.fixed"),
    "copa": Source("aps/super_glue", "copa", validation=100),
    "multirc": Source("aps/super_glue", "multirc"),
    "squad": Source("rajpurkar/squad"),
    "drop": Source("ucinlp/drop"),
}


def public_data(task: str) -> Path:
    """The folder of a task's public data set, in the cache; fetched and drawn at its first use.

    As in MeZO (arXiv 2305.17333), with its seed 0: up to 1,000 training and 500 validation rows (of
    CB and COPA 100) of the public training split, where rows are few the validation's first, and up
    to 1,000 test rows of the public validation split.

    Raises:
        UserError: the task is not known or has no public data set, or that cannot be fetched or
            written.
    """
    get_task(task)
    if task not in SOURCES:
        raise UserError(f"task {task!r} has no public data set: give a folder by --data")
    folder = cache_dir() / "data" / task
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                splits = _draw(SOURCES[task])
                with new_folder(folder) as partial:
                    for split, rows in splits.items():
                        _write(partial / f"{split}.jsonl", rows)
    except OSError as error:
        raise UserError(
            f"the cache folder {str(folder.parent)!r} cannot be written ({error}): make room "
            "there, or set DLZO_CACHE to another folder"
        ) from error
    return folder


def _draw(source: Source) -> dict[Split, Iterable[Mapping[str, Any]]]:
    train, test = _load(source)
    drawn = _permutation(len(train))[: TRAIN + source.validation]
    if len(drawn) <= source.validation:
        raise UserError(
            f"data set {source.path!r} has {len(drawn)} training rows, and {source.validation} are "
            "for validation: it is not the one that is known"
        )
    return {
        "train": [train[i] for i in drawn[: -source.validation]],
        "validation": [train[i] for i in drawn[-source.validation :]],
        "test": [test[i] for i in _permutation(len(test))[:TEST]],
    }


def _permutation(size: int) -> list[int]:
    # MeZO's draw; numpy keeps the numbers of this generator for good.
    return np.random.RandomState(0).permutation(size).tolist()


def _load(source: Source) -> Sequence[Sequence[Mapping[str, Any]]]:
    """The public training and validation split."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            "public data sets take the package datasets: `pip install 'dlzo-kernels[datasets]'`, "
            "or give a folder by --data"
        ) from error
    try:
        return load_dataset(source.path, source.config, split=["train", "validation"])
    # Its own errors, and those of the libraries that fetch and read for it.
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"data set {source.path!r} cannot be fetched from the Hugging Face hub ({reason}): "
            "check the network, or give a folder by --data"
        ) from error


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
