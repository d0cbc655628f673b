"""Files that appear whole or not at all, files that only grow, and texts of users."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dlzo.errors import UserError

PLOT_FORMATS = (".png", ".svg")
PARTIAL = re.compile(r"\..+\.partial-\d+")  # names of what is not whole yet


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a sibling of `path`, and puts it, on the disk, in the place of `path`.

    The file gets the mode of any new file; safetensors makes private ones.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        mode = _mode_of_new(partial)
        write(partial)
        _give(partial, mode)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """As `replace_file`, by a text in UTF-8.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A sibling of `path` to fill, which becomes `path` when all went well, else disappears.

    Raises:
        OSError: `path` exists, or cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        mode = _mode_of_new(partial / "any")
        (partial / "any").unlink()
        yield partial
        for made in partial.rglob("*"):
            if made.is_file():
                _give(made, mode)
            sync(made)
        sync(partial)
        os.rename(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial_files(folder: Path) -> None:
    """Removes what a killed `replace_file` may have left; nobody else writes to the folder."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            delete(path)


def delete(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class GrowingFile:
    """A file open for appending. A failed append leaves no more than a torn tail.

    Args:
        path: an existing file.
        size: bytes to keep; what follows them is cut off.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._descriptor, size)

    def append(self, data: bytes) -> None:
        """Hands `data` to the system: from there it outlives this process, but no power cut.

        Raises:
            OSError: it cannot be written whole.
        """
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def sync(self) -> None:
        """Waits until all that was appended is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def check_plot(path: Path) -> None:
    """Raises UserError unless a figure can be written as its suffix says."""
    suffix = path.suffix.lower()
    if suffix not in PLOT_FORMATS:
        raise UserError(f"plot {path} has the suffix {suffix!r}: use {' or '.join(PLOT_FORMATS)}")


def user_path(text: str | Path) -> Path:
    """The path that a user writes, with `~` for a home folder.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(text)!r} has no home folder here: write the whole path") from error


def cache_dir() -> Path:
    """The cache folder: $DLZO_CACHE, else dlzo in $XDG_CACHE_HOME, else ~/.cache/dlzo.

    Raises:
        UserError: there is neither, nor a home folder.
    """
    if chosen := os.environ.get("DLZO_CACHE"):
        return user_path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dlzo"
    try:
        return Path.home() / ".cache" / "dlzo"
    except RuntimeError as error:
        raise UserError("there is no home folder for the cache: set DLZO_CACHE to one") from error


def read_text(path: Path) -> str:
    """The text of a file from a user: UTF-8, with or without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8; the message names the file, and the line.
    """
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error.strerror}): give another file"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{str(path)!r} line {line} is not UTF-8: save it as UTF-8") from error


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text from anywhere, in UTF-8.

    Raises:
        ValueError: it is not one.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def parse_versioned(
    text: str | bytes, path: Path, version: int, fields: Mapping[str, type], remedy: str
) -> dict[str, Any]:
    """The JSON object in a text from anywhere, of a known version and with fields of known types.

    Args:
        text: in UTF-8.
        path: where it was found.
        version: what its field `version` must be.
        fields: the types of other fields that it must have.
        remedy: what to do where it is no such object.

    Raises:
        UserError: it is none; the message names `path` and the remedy.
    """
    try:
        values = parse_json_object(text)
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): {remedy}") from error
    if values.get("version") != version:
        raise UserError(
            f"{str(path)!r} has format version {str(values.get('version'))[:60]} and this dlzo "
            f"reads version {version}: {remedy} or use the dlzo that wrote it"
        )
    for name, kind in fields.items():
        # True is no int here.
        if type(values.get(name)) is not kind:
            raise UserError(f"{str(path)!r} has no valid {name!r}: {remedy}")
    return values


def _mode_of_new(path: Path) -> int:
    """The mode of a new file, which is made: by the process's umask, or what the folder says."""
    path.touch()
    return path.stat().st_mode


def _give(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:  # some file systems have one mode for all
        path.chmod(mode)
