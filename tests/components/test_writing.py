"""Files that readers see old or new, and never half written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from components.writing import LEFTOVERS, replace_file, whole_file


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path, sync) as draft:
        draft.temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert [file.name for file in tmp_path.glob(LEFTOVERS)] == [draft.temporary.name]
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with whole_file(path) as draft:
            draft.temporary.write_bytes(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_name_may_follow_from_the_content(tmp_path: Path) -> None:
    with whole_file(tmp_path / "shard") as draft:
        draft.temporary.write_bytes(b"x")
        draft.path = tmp_path / "shard-2d711642.tar"
    assert [file.name for file in tmp_path.iterdir()] == ["shard-2d711642.tar"]


def test_sync_flushes_the_file_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    replace_file(tmp_path / "a", b"1")
    assert calls == ["replace"]
    replace_file(tmp_path / "a", b"2", sync=True)
    assert calls == ["replace", "fsync", "replace", "fsync"]
