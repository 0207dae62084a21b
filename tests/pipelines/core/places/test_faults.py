"""Stores that fail, and what cannot be a place: waiting, one sentence each, no secret in any of them."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import store_servers
from faulty_proxy import FAULTS, faulty_proxy

from pipelines.core.errors import EXIT_RETRY, RestorayError, UsageError
from pipelines.core.places import patience
from pipelines.core.places.files import create, list_files, put, read, remove
from pipelines.core.places.patience import StoreUnavailable
from pipelines.core.places.place import Place, place_of

SECRET = "wJalrXUtnFEMI/K7MDENG"


def through(endpoint: str, name: str) -> Place:
    place = place_of(f"s3://{store_servers.BUCKET}/{name}", {**store_servers.storage(endpoint), "secret": SECRET})
    assert isinstance(place, Place)
    return place


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_spoils_every_third_request_gives_the_same_bytes(moto_endpoint: str, fault: str) -> None:
    contents = {f"{number}.bin": random.Random(number).randbytes(20_000) for number in range(6)}
    with faulty_proxy(moto_endpoint, every=3, faults=(fault,)) as proxy:
        folder = through(proxy.endpoint, f"faults-{fault}")
        for name, data in contents.items():
            put(folder / name, data)
        assert create(folder / "token", b"mine")
        assert not create(folder / "token", b"theirs")
        assert {name: read(folder / name) for name in contents} == contents
        assert {name: read(folder / name, 5, 100) for name in contents} == {n: d[5:105] for n, d in contents.items()}
        assert sorted(name for name, _ in list_files(folder)) == [*contents, "token"]
        for name in contents:
            remove(folder / name)
        assert proxy.spoilt >= 6
    assert [name for name, _ in list_files(through(moto_endpoint, f"faults-{fault}"))] == ["token"]


def test_a_listing_of_many_pages_survives_faults(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.core.places import backends

    monkeypatch.setattr(backends, "PAGE", 2)
    names = [f"{number:02d}" for number in range(15)]
    for name in names:
        put(through(moto_endpoint, "paged") / name, b"")
    with faulty_proxy(moto_endpoint, every=2, faults=("busy", "cut")) as proxy:
        folder = through(proxy.endpoint, "paged")
        assert [len(page) for page in folder.pages()] == [2, 2, 2, 2, 2, 2, 2, 1]
        assert [name for name, _ in folder.files()] == names


def test_after_a_minute_of_failures_the_job_ends_and_can_be_resumed(
    moto_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    with faulty_proxy(moto_endpoint, every=1, faults=("busy",)) as proxy:
        with pytest.raises(StoreUnavailable, match=r"SlowDown.*the same command continues") as caught:
            put(through(proxy.endpoint, "never"), b"1")
    assert caught.value.exit_code == EXIT_RETRY


def test_an_endpoint_that_is_not_there_is_one_sentence() -> None:
    (port,) = store_servers.free_ports(1)
    with pytest.raises(StoreUnavailable, match="Could not connect") as caught:
        through(f"http://127.0.0.1:{port}", "x").check(patience_s=0.5)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


def test_a_missing_bucket_is_one_sentence(moto_endpoint: str) -> None:
    place = place_of("s3://no-such-bucket/x", store_servers.storage(moto_endpoint))
    assert isinstance(place, Place)
    with pytest.raises(UsageError, match="s3://no-such-bucket/x: the bucket does not exist"):
        place.check()


@pytest.mark.parametrize(
    ("code", "status"), [("InvalidAccessKeyId", 403), ("SignatureDoesNotMatch", 403), ("AccessDenied", 403)]
)
def test_a_wrong_key_is_one_sentence_without_the_key(
    code: str, status: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>key {SECRET} is wrong</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    caplog.set_level(logging.INFO)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = through(f"http://127.0.0.1:{server.server_address[1]}", "x")
        with pytest.raises(UsageError, match=f"the store refuses access \\({code}") as caught:
            place.check()
        with pytest.raises(PermissionError) as denied:
            read(place / "y")
    finally:
        server.shutdown()
        server.server_close()
    shown = capfd.readouterr()
    texts = [str(caught.value), str(denied.value), repr(place), str(place), caplog.text, shown.out, shown.err]
    assert [text for text in texts if SECRET in text] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("s4://bucket/x", 'Did you mean "s3"'),
        ("ftp://host/x", '"ftp" is no store'),
        ("https://host/x", '"https" is no store'),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://bucket/a/../b", "no part of a key"),
        ("s3://bucket/a//b", "no part of a key"),
        ("s3://bucket/a\nb", "no part of a key"),
        ("s3://KEY:hidden@bucket/x", "holds a password"),
        ("s3://bucket/x?X-Amz-Signature=hidden", "holds a password or a signature"),
    ],
)
def test_what_cannot_be_a_place_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        place_of(text)
    assert sentence in str(caught.value) and "hidden" not in str(caught.value)


def test_what_is_a_place(tmp_path: Path) -> None:
    place = place_of("s3://bucket/a/b.png/")
    assert isinstance(place, Place)
    assert (str(place), place.name, place.stem, place.suffix, str(place.parent)) == (
        *("s3://bucket/a/b.png", "b.png", "b", ".png", "s3://bucket/a"),
    )
    assert place / "x/y" == place_of("s3://bucket/a/b.png/x/y")
    assert (place / "x/y").relative_to(place).as_posix() == "x/y"
    assert place_of(tmp_path) == tmp_path and place_of("a/b") == Path("a/b")
    assert place_of(f"file://{tmp_path}") == tmp_path
    assert place_of(Path("s3://bucket/a")) == place_of("s3://bucket/a")  # what a parser of paths has left of it


def test_an_unknown_option_is_one_sentence() -> None:
    place = place_of("s3://bucket/x", {"no_such_option": 1})
    assert isinstance(place, Place)
    with pytest.raises(RestorayError, match="no_such_option") as caught:
        read(place)
    assert "\n" not in str(caught.value)


def test_another_server_in_the_environment_is_another_store(
    moto_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook may change its variables: neither our client nor fsspec's may be that of a server that is gone."""
    place = place_of("s3://pictures/environment/a.txt")
    assert isinstance(place, Place)
    with store_servers.moto_server() as other:
        for name, value in store_servers.environment(other).items():
            monkeypatch.setenv(name, value)
        place.write_bytes(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    assert place.read_bytes() == b"1"  # the servers of one process share their buckets
