"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat

from dlzo import files
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
    assert calls == ["sync file", "sync file", "rename", "sync folder"]
