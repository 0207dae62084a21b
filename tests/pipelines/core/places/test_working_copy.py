"""The copy of a folder in a store: what goes up, in which order, and what another machine or a kill leaves."""

from __future__ import annotations

import json
import sys
import time
import types
import uuid
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines.core.errors import RetryLater, UsageError
from pipelines.core.places import working_copy as module
from pipelines.core.places.place import Place, place_of
from pipelines.core.places.working_copy import check_one_machine, local_copy, working_copy


@pytest.fixture
def place() -> Place:
    place = place_of(f"memory://{uuid.uuid4().hex[:8]}/run")
    assert isinstance(place, Place)
    return place


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine("a", tmp_path, monkeypatch)


def on_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / name))


def contents(place: Place) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name, _ in place.files() if not name.startswith(".")}


def test_a_path_is_used_as_it_is(tmp_path: Path) -> None:
    with working_copy(tmp_path / "out") as folder:
        assert folder == tmp_path / "out"
    assert not folder.exists() and local_copy(tmp_path) == tmp_path


def test_files_go_up_and_gone_files_are_deleted(place: Place) -> None:
    with working_copy(place) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(b"1" * 1000)
        (folder / "old").write_bytes(b"old")
        (folder / ".lock").write_bytes(b"hidden")
        (folder / "index.json").write_bytes(b"{}")
    assert contents(place) == {"sub/a.bin": b"1" * 1000, "old": b"old", "index.json": b"{}"}
    with working_copy(place) as folder:
        assert (folder / "sub" / "a.bin").read_bytes() == b"1" * 1000
        (folder / "old").unlink()
        (folder / "sub" / "a.bin").write_bytes(b"2")
    assert contents(place) == {"sub/a.bin": b"2", "index.json": b"{}"}


def test_markers_go_up_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    upload = Place.upload
    monkeypatch.setattr(Place, "upload", lambda self, file: (order.append(self.name), upload(self, file))[1])
    with working_copy(place) as folder:
        for name in ("index.json", "zz.tar", "done.json", "aa.tar"):
            (folder / name).write_bytes(b"1")
    assert order == ["aa.tar", "zz.tar", "done.json", "index.json"]


def test_changes_go_up_while_the_job_runs_but_no_open_database(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.05)
    with working_copy(place) as folder:
        (folder / "runs.db").write_bytes(b"half")
        (folder / "metrics.jsonl").write_bytes(b"{}\n")
        deadline = time.monotonic() + 30
        while "metrics.jsonl" not in contents(place):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "runs.db" not in contents(place)
    assert set(contents(place)) == {"runs.db", "metrics.jsonl"}


def test_another_machine_continues_where_the_store_stands(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with working_copy(place) as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"1")
    (folder / "not sent").write_bytes(b"a killed job's")
    on_machine("b", tmp_path, monkeypatch)
    with working_copy(place) as other:
        assert other != folder and {path.name for path in other.iterdir()} == {"a", "b", module.STATE}
        (other / "a").write_bytes(b"2")
        (other / "b").unlink()
    on_machine("a", tmp_path, monkeypatch)
    with working_copy(place) as again:
        assert again == folder
        assert {path.name for path in again.iterdir()} == {"a", module.STATE}
        assert (again / "a").read_bytes() == b"2"


def test_what_a_killed_job_did_not_send_stays_on_its_machine(place: Place) -> None:
    with working_copy(place) as folder:
        (folder / "a").write_bytes(b"1")
    (folder / "a").write_bytes(b"12")
    (folder / "b").write_bytes(b"new")
    with working_copy(place) as again:
        assert (again / "a").read_bytes() == b"12" and (again / "b").read_bytes() == b"new"
    assert contents(place) == {"a": b"12", "b": b"new"}


def test_two_jobs_are_refused_and_nothing_is_no_input(place: Place) -> None:
    with working_copy(place):
        with pytest.raises(RetryLater, match="is in use by process"), working_copy(place):
            pass
    with pytest.raises(UsageError, match="does not exist"):
        local_copy(place / "nothing")


def test_a_copy_to_read_follows_the_store(place: Place) -> None:
    (place / "a").write_bytes(b"1")
    assert (local_copy(place) / "a").read_bytes() == b"1"
    (place / "a").write_bytes(b"22")
    (place / "b").write_bytes(b"3")
    assert {path.name: path.read_bytes() for path in local_copy(place).iterdir() if path.name[0] != "."} == {
        "a": b"22",
        "b": b"3",
    }
    (place / "a").unlink()
    folder = local_copy(place)
    assert [path.name for path in folder.iterdir() if path.name[0] != "."] == ["b"]
    assert json.loads((folder / module.STATE).read_bytes())["place"] == str(place)


@pytest.mark.parametrize(("machines", "refused"), [(("10.0.0.1", "10.0.0.2"), True), (("10.0.0.1",) * 2, False)])
def test_a_copy_of_one_machine_is_refused_on_a_ray_of_several(
    machines: tuple[str, ...], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes on one machine share the copy; a folder on a disk is shared by whoever named it."""
    nodes = [{"NodeManagerAddress": machine, "Alive": True} for machine in machines]
    ray = types.SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    check_one_machine(tmp_path, None)
    with pytest.raises(UsageError, match=r"s3://b/run: .* Ray has 2 machines") if refused else nullcontext():
        check_one_machine(tmp_path, place_of("s3://b/run"))
