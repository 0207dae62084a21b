"""The contract of every place: one suite over a local folder, memory and two S3 servers that share no code."""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from pathlib import Path

import pytest

from pipelines.core.errors import RetryLater
from pipelines.core.places import leases
from pipelines.core.places.backends import CHUNK_BYTES
from pipelines.core.places.files import create, list_files, put, read, remove, sha256_of, stat, upload
from pipelines.core.places.leases import Fence, LeaseLost, lease
from pipelines.core.places.place import Place, Where


def test_what_was_written_is_read(folder: Where) -> None:
    put(folder / "a.bin", bytes(range(256)))
    assert read(folder / "a.bin") == bytes(range(256))
    assert stat(folder / "a.bin").size == 256
    put(folder / "a.bin", b"new")
    assert read(folder / "a.bin") == b"new"
    assert sha256_of(folder / "a.bin") == hashlib.sha256(b"new").hexdigest()


@pytest.mark.parametrize(
    ("start", "size", "expected"),
    [(0, 3, b"012"), (4, 3, b"456"), (8, 100, b"89"), (5, -1, b"56789"), (10, 5, b""), (50, 5, b""), (3, 0, b"")],
)
def test_a_part_is_read(folder: Where, start: int, size: int, expected: bytes) -> None:
    put(folder / "digits", b"0123456789")
    assert read(folder / "digits", start, size) == expected


def test_an_empty_file(folder: Where) -> None:
    put(folder / "empty", b"")
    assert read(folder / "empty") == b"" and stat(folder / "empty").size == 0


@pytest.mark.parametrize("name", ["with space.png", "größe+%25?#.png", "[1]*.png", "a=b&c.png"])
def test_any_name_is_only_a_name(folder: Where, name: str) -> None:
    put(folder / name, name.encode())
    assert read(folder / name) == name.encode()
    assert [entry for entry, _ in list_files(folder)] == [name]


def test_a_missing_file_is_an_error_that_names_it(folder: Where) -> None:
    for act in (read, stat, sha256_of):
        with pytest.raises(FileNotFoundError) as caught:
            act(folder / "none")
        assert str(caught.value.filename) == str(folder / "none")
    remove(folder / "none")
    assert list(list_files(folder / "nothing")) == []
    assert not (folder / "none").exists() and not (folder / "none").is_file()


def test_create_succeeds_once(folder: Where) -> None:
    assert create(folder / "token", b"first")
    assert not create(folder / "token", b"second")
    assert create(folder / "token", b"first")  # the same bytes: a repeated request after a lost answer
    assert read(folder / "token") == b"first"


def test_of_many_creates_at_once_one_succeeds(folder: Where) -> None:
    wins: list[int] = []

    def race(number: int) -> None:
        if create(folder / "token", f"writer {number}".encode()):
            wins.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert read(folder / "token") == f"writer {wins[0]}".encode()


def test_a_listing_has_all_files_below_and_none_beside(folder: Where) -> None:
    names = [f"sub/{number:02d}/x.bin" for number in range(30)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        put(folder / name, b"12")
    (folder / "subordinate").mkdir(parents=True, exist_ok=True)
    put(folder / "subordinate" / "y", b"")
    listing = dict(list_files(folder / "sub"))
    assert sorted(listing) == [name.removeprefix("sub/") for name in names]
    assert {entry.size for entry in listing.values()} == {2}
    assert (folder / "sub").is_dir() and not (folder / "su").is_dir()


def test_versions_tell_a_change(folder: Where) -> None:
    put(folder / "a", b"1")
    before = stat(folder / "a").version
    assert stat(folder / "a").version == before
    time.sleep(0.01)
    put(folder / "a", b"2")
    assert stat(folder / "a").version != before


def test_a_reader_sees_whole_files_only(folder: Where) -> None:
    """A writer alternates two contents of one file; a reader sees one of them each time."""
    contents = [bytes([number]) * 300_000 for number in (1, 2)]
    put(folder / "a", contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                put(folder / "a", content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            assert read(folder / "a") in contents
    finally:
        stop.set()
        writer.join()


def test_a_large_file_goes_up_and_down(folder: Where, tmp_path: Path) -> None:
    source = tmp_path / "large"
    with source.open("wb") as target:
        for number in range(3):
            target.write(bytes([number]) * CHUNK_BYTES)
        target.write(b"the end")
    upload(folder / "sent", source)
    assert stat(folder / "sent").size == source.stat().st_size
    assert sha256_of(folder / "sent") == sha256_of(source)
    if isinstance(folder, Place):
        (folder / "sent").download(tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_place_can_be_pickled(folder: Where) -> None:
    put(folder / "a", b"1")
    assert read(pickle.loads(pickle.dumps(folder / "a"))) == b"1"


# --- leases -----------------------------------------------------------------------------------------------------------


def test_the_second_driver_is_refused_until_the_first_has_ended(folder: Where) -> None:
    with lease(folder, ttl_s=30) as first:
        first.check()
        with pytest.raises(RetryLater, match="is in use by process"), lease(folder, ttl_s=30):
            pass
        token = first.fence.token
    with lease(folder, ttl_s=30) as second:
        assert second.fence.token == token + 1


def test_a_silent_lease_is_taken_over_and_its_holder_notices(folder: Where) -> None:
    with lease(folder, ttl_s=2) as first:
        first.stop.set()  # the heartbeat ends, as that of a stopped process
        fence = Fence(first.fence.folder, first.fence.token, first.fence.ttl_s)
        fence.check()
        deadline = time.monotonic() + 20
        while True:
            try:
                with lease(folder, ttl_s=2) as second:
                    assert second.fence.token > first.fence.token
                    second.check()
                    with pytest.raises(LeaseLost):
                        first.check()
                    with pytest.raises(LeaseLost, match="taken over"):
                        fence.check()
                break
            except LeaseLost:
                raise
            except RetryLater:
                assert time.monotonic() < deadline
                time.sleep(0.3)


def test_the_lease_of_a_dead_process_of_this_machine_is_free_at_once(
    folder: Where, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_start_of", lambda process: "0")  # a process that had this number before
        held = leases._take(folder, 1000)
        held.stop.set()
        held.thread.join()
    with lease(folder, ttl_s=1000) as second:
        assert second.fence.token == held.fence.token + 1


def test_a_heartbeat_keeps_the_lease(folder: Where) -> None:
    with lease(folder, ttl_s=2) as first:
        time.sleep(2.8)
        first.check()
        with pytest.raises(RetryLater), lease(folder, ttl_s=2):
            pass


def test_a_store_without_conditional_writes_is_refused(folder: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(where: Where, data: bytes) -> bool:
        put(where, data)
        return True

    monkeypatch.setattr(leases, "create", overwrite)
    with pytest.raises(Exception, match="conditional writes"), lease(folder, ttl_s=30):
        pass
