"""Locks of output folders: which file systems are shared between machines, and that those get a lease as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.core import folders
from pipelines.core.errors import RetryLater
from pipelines.core.folders import folder_lock, is_shared, job_lock
from pipelines.core.places.leases import LEASE_FOLDER, lease


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("nfs4", True), ("lustre", True), ("fuse.gcsfuse", True), ("cifs", True), ("ext4", False), ("overlay", False)],
)
def test_the_mount_of_a_folder_says_whether_it_is_shared(kind: str, shared: bool, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(f"none / ext4 rw 0 0\nserver:/x {tmp_path}/a\\040b {kind} rw 0 0\n")
    assert is_shared(tmp_path / "a b" / "run", tmp_path / "mounts") is shared
    assert not is_shared(tmp_path / "other", tmp_path / "mounts")
    assert not is_shared(tmp_path, tmp_path / "no such table")


def test_a_disk_of_this_machine_has_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "is_shared", lambda folder: False)
    with job_lock(tmp_path) as held:
        assert held is None and not (tmp_path / LEASE_FOLDER).exists()
        with pytest.raises(RetryLater, match="is in use by process"), folder_lock(tmp_path):
            pass


def test_a_shared_folder_is_refused_by_its_lease_where_the_kernels_lock_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "is_shared", lambda folder: True)
    with job_lock(tmp_path) as held:
        assert held is not None
        with pytest.raises(RetryLater, match="is in use by process"), lease(tmp_path):
            pass  # what another machine would ask for
    with job_lock(tmp_path) as again:
        assert again is not None and again.fence.token == held.fence.token + 1
