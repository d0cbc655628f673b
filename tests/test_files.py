"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from dlzo import files
from dlzo.errors import UserError
from dlzo.files import new_folder, replace_file


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []

    class Watched:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, descriptor):
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            calls.append("sync folder" if is_folder else "sync file")
            os.fsync(descriptor)

        def replace(self, *paths):
            calls.append("replace")
            os.replace(*paths)

        def rename(self, *paths):
            calls.append("rename")
            os.rename(*paths)

    monkeypatch.setattr(files, "os", Watched())
    replace_file(tmp_path / "x", lambda partial: partial.write_text("new"))
    assert calls == ["sync file", "replace", "sync folder"]
    calls.clear()
    with new_folder(tmp_path / "y") as partial:
        (partial / "a").touch()
        (partial / "b").touch()
    assert calls == ["sync file", "sync file", "sync folder", "rename", "sync folder"]


def test_without_a_home_folder_the_cache_is_asked_for(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files.Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DLZO_CACHE", raising=False)
    with pytest.raises(UserError, match="set DLZO_CACHE"):
        files.cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "dlzo"
    monkeypatch.setenv("DLZO_CACHE", str(tmp_path / "x"))
    assert files.cache_dir() == tmp_path / "x"


def test_a_new_folder_may_have_folders(tmp_path):
    with new_folder(tmp_path / "x") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").touch(mode=0o600)
        (tmp_path / "usual").touch()
    assert (tmp_path / "x" / "inner").stat().st_mode & 0o700 == 0o700
    assert (tmp_path / "x" / "inner" / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
