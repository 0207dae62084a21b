"""Restoring from a bucket into a bucket: the bits of a local job, also after kills, faults and two drivers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import store_servers
from faulty_proxy import FAULTS, faulty_proxy
from helper_modules import load_helper_for_workers

from components.images import encode_png
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from pipelines.core.errors import RetryLater, UsageError
from pipelines.core.places import leases, patience
from pipelines.core.places.place import Place, place_of
from pipelines.core.rows import read_lines
from pipelines.restoration.models import open_model

tiny = load_helper_for_workers("pipelines/_tiny.py")
SECRET = store_servers.CREDENTIALS["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture(autouse=True)
def tiny_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with store_servers.moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A new prefix; credentials are in the environment, as a user has them."""
    return prefix(server, monkeypatch)


def prefix(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in store_servers.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    place = place_of(f"s3://{store_servers.BUCKET}/{uuid.uuid4().hex[:8]}", {"endpoint_url": endpoint})
    assert isinstance(place, Place)
    return place


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, six pictures in two folders, a torn one, a list, and what a local job makes of them."""
    folder = tmp_path_factory.mktemp("local")
    tiny.write_model(folder / "model")
    (folder / "in" / "sub").mkdir(parents=True)
    for index in range(6):
        name = f"sub/p{index}.png" if index % 2 else f"p{index}.png"
        (folder / "in" / name).write_bytes(encode_png(dead_leaves(48, 1, index)))
    (folder / "in" / "torn.png").write_bytes(encode_png(dead_leaves(48, 1, 9))[:300])
    (folder / "in" / "list.csv").write_text("name\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)
        tiny.run_job(folder / "model", folder / "in", folder / "out", factory=factory(folder))
    return folder


def factory(folder: Path) -> Any:
    import functools

    return functools.partial(tiny.build_tiny, folder / "model")


def send(folder: Path, place: Place) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (place / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())


def results(place: Place) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name, _ in place.files() if name.endswith(".png")}


def local_results(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def stable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "source")} for row in rows]


def check_equal(local: Path, out: Place) -> None:
    assert results(out) == local_results(local / "out")
    for name in ("records.jsonl", "quarantine.jsonl"):
        assert stable(read_lines(out / name)) == stable(read_lines(local / "out" / name))
    left = [n for n, _ in out.files() if not n.endswith((".png", ".jsonl")) and not n.startswith(".lease/")]
    assert left == []  # no marks, no pieces of journals


def test_a_bucket_holds_what_a_folder_would_hold(local: Path, bucket: Place) -> None:
    send(local / "in", bucket / "in")
    result = tiny.run_job(local / "model", bucket / "in", bucket / "out", factory=factory(local))
    assert (result.restored, result.quarantined, result.skipped, result.ignored) == (6, 1, 0, 1)
    check_equal(local, bucket / "out")
    again = tiny.run_job(local / "model", bucket / "in", bucket / "out", factory=factory(local))
    assert (again.restored, again.quarantined, again.skipped) == (0, 1, 6)
    check_equal(local, bucket / "out")
    everything = b"".join((bucket / name).read_bytes() for name, _ in bucket.files())
    assert SECRET.encode() not in everything and b"127.0.0.1" not in everything


def test_outputs_inside_the_input_are_no_pictures_of_it(local: Path, bucket: Place) -> None:
    send(local / "in", bucket)
    for out in (bucket / "first", bucket / "sub/second"):
        result = tiny.run_job(local / "model", bucket, out, factory=factory(local))
        assert result.restored == 6
    with pytest.raises(UsageError, match="both input and output"):
        tiny.run_job(local / "model", bucket, bucket, factory=factory(local))


def test_a_model_in_a_bucket_is_fetched_once_and_checked(
    local: Path, bucket: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    send(local / "model", bucket / "model")
    opened = open_model(str(bucket / "model"))
    assert opened.identity.digest == open_model(local / "model").identity.digest
    assert opened.folder.is_relative_to(tmp_path / "home")
    assert (opened.folder / "parts" / "filter.safetensors").is_file()
    send(local / "model", bucket / "damaged")
    (bucket / "damaged/parts/filter.safetensors").write_bytes(b"other bytes")
    text = (bucket / "damaged/model.json").read_bytes()
    (bucket / "damaged/model.json").write_bytes(text + b"\n")
    with pytest.raises(Exception, match="does not have the sha256"):
        open_model(str(bucket / "damaged"))
    with pytest.raises(UsageError, match="is no model folder"):
        open_model(str(bucket / "nothing"))


def test_a_server_that_spoils_one_request_in_ten_changes_nothing(
    local: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(server, every=10, faults=FAULTS) as proxy:
        place = prefix(proxy.endpoint, monkeypatch)
        send(local / "in", place / "in")
        result = tiny.run_job(local / "model", place / "in", place / "out", factory=factory(local))
        assert proxy.spoilt >= 8
    assert (result.restored, result.quarantined) == (6, 1)
    check_equal(local, prefix(server, monkeypatch).parent / place.name / "out")


def test_a_store_that_goes_away_ends_the_job_and_the_next_one_continues(
    local: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(server, every=0, faults=("busy",)) as proxy:
        place = prefix(proxy.endpoint, monkeypatch)
        send(local / "in", place / "in")

        def go_away(count: int, of: int = 0, note: str = "") -> None:
            if count == 3:
                proxy.every = 1

        monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
        with pytest.raises(RetryLater, match="the same command continues"):
            tiny.run_job(local / "model", place / "in", place / "out", factory=factory(local), progress=go_away)
        monkeypatch.undo()
        proxy.every = 0
        place = prefix(proxy.endpoint, monkeypatch).parent / place.name
        monkeypatch.setattr(leases, "_is_dead", lambda record: True)  # this process is alive, its job is not
        monkeypatch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)
        result = tiny.run_job(local / "model", place / "in", place / "out", factory=factory(local))
        assert result.restored + result.skipped == 6 and result.quarantined == 1
        check_equal(local, place / "out")


def test_a_second_driver_is_refused_and_takes_over_when_the_first_is_silent(
    local: Path, bucket: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(local / "in", bucket / "in")
    monkeypatch.setattr(leases, "TTL_S", 2.0)
    with leases.lease(bucket / "out") as first:
        with pytest.raises(RetryLater, match="is in use by process"):
            tiny.run_job(local / "model", bucket / "in", bucket / "out", factory=factory(local))
        assert results(bucket / "out") == {}
        first.stop.set()  # as if it were stopped: no heartbeat, and it does not know
        time.sleep(3.5)
        result = tiny.run_job(local / "model", bucket / "in", bucket / "out", factory=factory(local))
        assert result.restored == 6
        with pytest.raises(RetryLater):
            first.check()
    check_equal(local, bucket / "out")


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = [{helpers!r}]
from helper_modules import load_helper_for_workers
from components.systems import SYSTEMS
import functools
from pipelines.core.places.place import place_of
from pipelines.core.places import journals
journals.FLUSH_S = 0.0
tiny = load_helper_for_workers("pipelines/_tiny.py")
SYSTEMS["tiny"] = tiny.SYSTEM
source, out, model = sys.argv[1:]
factory = functools.partial(tiny.build_tiny, Path(model), step_s=1.0)
tiny.run_job(Path(model), place_of(source), place_of(out), factory=factory)
"""


def test_a_driver_that_is_killed_leaves_whole_objects_and_the_next_one_finishes(
    local: Path, bucket: Place, server: str, repository: Path
) -> None:
    send(local / "in", bucket / "in")
    code = DRIVER.format(helpers=str(repository / "tests" / "helpers"))
    words = [sys.executable, "-c", code, str(bucket / "in"), str(bucket / "out"), str(local / "model")]
    environment = {**os.environ, **store_servers.environment(server), "PYTHONPATH": str(repository)}
    process = subprocess.Popen(words, env=environment, cwd=repository, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 100
        while len(results(bucket / "out")) < 2:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    expected = local_results(local / "out")
    left = results(bucket / "out")
    assert 2 <= len(left) < 6 and left.items() <= expected.items()
    result = tiny.run_job(local / "model", bucket / "in", bucket / "out", factory=factory(local))
    assert result.restored + result.skipped == 6 and result.skipped >= 1
    check_equal(local, bucket / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_of_ray_write_into_the_bucket(local: Path, bucket: Place) -> None:
    """The place travels to the workers with its endpoint; they find the keys in their environment or its options."""
    source, out = (Place(bucket.scheme, f"{bucket.path}/{n}", options(bucket)) for n in ("in", "out"))
    send(local / "in", bucket / "in")
    result = tiny.run_job(local / "model", source, out, factory=factory(local), workers=1, batch_size=2)
    assert (result.restored, result.quarantined) == (6, 1)
    check_equal(local, bucket / "out")


def options(place: Place) -> dict[str, Any]:
    return {**place.storage, **store_servers.storage(str(place.storage["endpoint_url"]))}
