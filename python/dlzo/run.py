"""The folder of a run: its settings, its files, and the lock that keeps a second process out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dlzo.adapter import PEFT_FILE, WEIGHTS_FILE
from dlzo.errors import UserError
from dlzo.files import (
    PARTIAL,
    PLOT_FORMATS,
    delete,
    parse_json_object,
    parse_versioned,
    remove_partial_files,
    replace_text,
    sync,
    user_path,
)
from dlzo.metrics import Metrics

SETTINGS_FILE = "run.json"
JOURNAL_FILE = "journal.zo"
METRICS_FILE = "metrics.json"
LOCK_FILE = ".lock"
_FILES = {SETTINGS_FILE, JOURNAL_FILE, METRICS_FILE, LOCK_FILE, WEIGHTS_FILE, PEFT_FILE}
VERSION = 1
MAX_SETTINGS = 1 << 20  # bytes
_FIELDS = {"model": str, "dtype": str, "data": str, "config": dict}
# What reads metrics goes into these.
_CONTAINERS = {
    **dict.fromkeys(("layers", "history"), list),
    **dict.fromkeys(("zero_shot", "best", "final", "test"), dict),
}


@contextmanager
def new_run(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Makes the folder of a run and holds its lock.

    A result that is to be overwritten is moved aside, to OUT.replaced, until `finish`.

    Raises:
        UserError: `out` is in use, holds something else, or cannot be written.
    """
    check_free(out, overwrite)
    replaces = ""
    try:
        if _is_result(out):
            with _locked(out):
                replaces = _move_aside(out)
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync(folder.parent)  # a power cut would take the folder's name, and all in it
    except OSError as error:
        raise UserError(f"output {str(out)!r} cannot be written: {error}") from error
    with _locked(out):
        check_free(out, overwrite=False)
        remove_partial_files(out)
        text = json.dumps({"version": VERSION, **settings, "replaces": replaces}, indent=2) + "\n"
        try:
            replace_text(out / SETTINGS_FILE, text)
        except OSError as error:
            raise UserError(f"output {str(out)!r} cannot be written: {error}") from error
        yield


@contextmanager
def existing_run(out: Path) -> Iterator[dict[str, Any]]:
    """The settings of the run in a folder, whose lock is held.

    Raises:
        UserError: it is in use, or holds no run.
    """
    if not (out / SETTINGS_FILE).is_file():
        raise UserError(f"{str(out)!r} holds no run to go on with: it has no {SETTINGS_FILE}")
    with _locked(out):
        remove_partial_files(out)
        yield read_settings(out)


def read_settings(out: Path) -> dict[str, Any]:
    """What the run in a folder was started with: `model`, `dtype`, `data` and `config`.

    Raises:
        UserError: the folder holds no run, or its settings are not valid.
    """
    path = out / SETTINGS_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SETTINGS)
    except OSError as error:
        raise UserError(
            f"{str(out)!r} holds no run ({error.strerror}): give the folder of one"
        ) from error
    return parse_versioned(text, path, VERSION, _FIELDS, "start the run again")


def model_name(settings: Mapping[str, Any], out: Path, instead: str) -> str:
    """By what name the model of the run in a folder is loaded.

    Raises:
        UserError: it has none; `instead` says what can be done with it.
    """
    if not settings["model"]:
        raise UserError(
            f"the model of the run in {str(out)!r} has no name to load it by: make it in Python as "
            f"for the run and {instead}"
        )
    return str(settings["model"])


def read_metrics(out: Path) -> dict[str, Any] | None:
    """The metrics of the run in a folder; None if it is not finished.

    Raises:
        UserError: they are damaged.
    """
    path = out / METRICS_FILE
    if not path.exists():
        return None
    try:
        metrics = parse_json_object(path.read_bytes())
        for name in sorted(Metrics.__required_keys__):
            if name not in metrics or not isinstance(metrics[name], _CONTAINERS.get(name, object)):
                raise ValueError(f"it has no valid {name!r}")
        return metrics
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): delete it, and resume") from error


def finish(out: Path, metrics: str) -> None:
    """Writes the metrics, which make a run a finished one, and lets go of what it replaces."""
    replace_text(out / METRICS_FILE, metrics)
    delete_replaced(out)


def delete_replaced(out: Path) -> None:
    """Lets go of the result that a finished run replaces."""
    replaced = _replaced(out)
    # Since then another run may lie there, or files of others.
    is_the_one = _is_result(replaced) and _identity(replaced) == read_settings(out).get("replaces")
    if is_the_one and _foreign_file(replaced) is None:
        with suppress(OSError):  # the run is finished all the same
            _delete_result(replaced)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises UserError unless a run may be started in `out`."""
    if not out.exists():
        place = next(folder for folder in out.absolute().parents if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise UserError(
                f"output {str(out)!r} cannot be written: nothing can be made in {str(place)!r}"
            )
        return
    if _is_empty(out):
        return
    if not overwrite:
        go_on = " --resume it," if (out / SETTINGS_FILE).is_file() else ""
        raise UserError(
            f"output {str(out)!r} exists:{go_on} choose another folder or pass --overwrite"
        )
    if not _is_result(out):
        raise UserError(f"output {str(out)!r} is not a result of dlzo: choose another folder")
    replaced = _replaced(out)
    if replaced.exists() and not (_is_result(replaced) or _is_empty(replaced)):
        raise UserError(
            f"{str(replaced)!r}, where the earlier result would be kept, is not a result of dlzo: "
            "choose another output folder"
        )
    for folder in (out, replaced):
        if foreign := _foreign_file(folder):
            raise UserError(
                f"{str(foreign)!r} is not of a run, and would be deleted with it: move it away, or "
                "choose another output folder"
            )


def check_cache(folder: str | Path | None, out: Path) -> None:
    """Raises UserError where the folder of a prefix cache lies in `out`."""
    if folder is not None and user_path(folder).resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"prefix_cache_dir {str(folder)!r} lies in the output folder {str(out)!r}, which a run "
            "has for itself: choose another folder"
        )


def is_file_of_a_run(path: Path) -> bool:
    """Whether a path is, or would be, one of the files that the run in its folder makes."""
    return path.name in _FILES and _is_result(path.parent)


def _is_result(out: Path) -> bool:
    return (out / SETTINGS_FILE).is_file()


def _is_empty(out: Path) -> bool:
    """Whether a folder holds nothing, but for what a run that was killed at its start may leave."""
    return out.is_dir() and all(
        path.name == LOCK_FILE or PARTIAL.fullmatch(path.name) for path in out.iterdir()
    )


def _identity(out: Path) -> str:
    """Which result lies in a folder."""
    return hashlib.sha256((out / SETTINGS_FILE).read_bytes()).hexdigest()


def _foreign_file(out: Path) -> Path | None:
    """A file or folder in `out` that no run makes."""
    paths = sorted(out.iterdir()) if out.is_dir() else []
    return next((path for path in paths if not _is_of_a_run(path)), None)


def _is_of_a_run(path: Path) -> bool:
    # `--plot` may have drawn it there.
    is_plot = path.is_file() and path.suffix.lower() in PLOT_FORMATS
    return path.name in _FILES or is_plot or PARTIAL.fullmatch(path.name) is not None


def _replaced(out: Path) -> Path:
    out = Path(os.path.abspath(out))  # of "." and ".." too there is a name
    return out.with_name(f"{out.name}.replaced")


def _move_aside(out: Path) -> str:
    """Keeps the last finished result, or else the last unfinished run, as OUT.replaced.

    Returns:
        Its identity.
    """
    replaced = _replaced(out)
    if replaced.exists() and ((out / METRICS_FILE).exists() or not _is_result(replaced)):
        _delete_result(replaced)
    if replaced.exists():
        _delete_result(out)
    else:
        os.rename(out, replaced)
    return _identity(replaced)


def _delete_result(out: Path) -> None:
    """Deletes a result, its settings last: what a kill leaves of it is still a result."""
    for path in out.iterdir():
        if path.name != SETTINGS_FILE:
            delete(path)
    shutil.rmtree(out)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"output {str(out)!r} is in use by another run: wait for it or choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
