"""Answers that are endless, slow, silent, wrong or forbidden, and many urls at once.

The battery's cases 41 to 44 and 47. All servers are on loopback, inside the test.
"""

from __future__ import annotations

import gzip
import threading
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from helper_modules import load_helper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.corpora import DownloadSpec
from components.types import SampleError
from pipelines.curation.sources.fetch import TRANSIENT, FetchedFile, Fetcher, fetch_many

web = load_helper("pipelines/_loopback.py")
LIMIT, PNG, Route, Server = web.LIMIT, web.PNG, web.Route, web.Server
endless, fetch, head, redirect = web.endless, web.fetch, web.head, web.redirect
refusal, resolver, rules, whole = web.refusal, web.resolver, web.rules, web.whole


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_a_picture_arrives_with_its_address(server: Server) -> None:
    server.routes["/a%20b.png?x=%C3%B6"] = whole()
    file = fetch(f" {server.url('/a b.png?x=ö#part')}\n")
    assert file == FetchedFile(data=PNG, url=server.url("/a%20b.png?x=%C3%B6"), status=200, tries=1)
    request = server.requests[0][1].lower()
    assert f"host: 127.0.0.1:{server.port}\r\n" in request
    assert "user-agent: restoray (image curation)\r\n" in request
    assert "accept-encoding: identity\r\n" in request
    assert "cookie" not in request and "authorization" not in request


@pytest.mark.parametrize(  # case 41: more bytes than allowed
    ("route", "code"),
    [
        (endless(PNG * 9, start=head()), "too_large"),
        (endless(b"%x\r\n%b\r\n" % (len(PNG), PNG), start=head(200, "Transfer-Encoding: chunked")), "too_large"),
        (whole(PNG + bytes(LIMIT + 1 - len(PNG))), "too_large"),
        (head(200, "Content-Length: 999999999999") + PNG, "too_large"),
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 999), "too_large"),
        (endless(b"1" * 9999, start=head(200, "Transfer-Encoding: chunked")), "bad_answer"),
        (endless(b"X" * 9999, start=b"HTTP/1.1 200 OK\r\nX: "), "bad_answer"),
        (endless(b"X: y\r\n" * 999, start=b"HTTP/1.1 200 OK\r\n"), "bad_answer"),
    ],
    ids=["body", "chunks", "one-byte-more", "announced", "continue", "chunk-size", "header", "headers"],
)
def test_endless_bodies_end(server: Server, route: bytes | Route, code: str) -> None:
    server.routes["/a.png"] = route
    assert refusal(server.url("/a.png"), attempts=3).code == code
    assert len(server.requests) == 1


@pytest.mark.parametrize(  # case 41: slow answers without a long silence
    "route",
    [
        endless(b"x", 0.02, head() + PNG),
        endless(b"x", 0.02, head(200, "Content-Length: 100000") + PNG),
        endless(b"1\r\nx\r\n", 0.02, head(200, "Transfer-Encoding: chunked")),
        endless(b"0", 0.02, head(200, "Transfer-Encoding: chunked")),
        endless(b"x", 0.02, b"HTTP/1.1 200 OK\r\nX: "),
        endless(b"x", 0.02),
    ],
    ids=["body", "length", "chunks", "chunk-size", "header", "status"],
)
def test_slow_bodies_end(server: Server, route: Route) -> None:
    server.routes["/a.png"] = route
    assert refusal(server.url("/a.png"), timeout_s=5.0, total_s=0.2, attempts=3).code == "too_slow"
    assert len(server.requests) <= 1


@pytest.mark.parametrize("start", [b"", head(200, "Content-Length: 5000") + PNG], ids=["headers", "body"])
def test_a_server_without_answer_is_tried_again(server: Server, start: bytes) -> None:
    def route(count: int) -> Iterator[bytes]:
        yield start if count == 0 else whole()
        if count == 0:
            server.stopping.wait(8)

    server.routes["/a.png"] = route
    assert refusal(server.url("/a.png"), timeout_s=0.15).code == "timeout"
    assert fetch(server.url("/a.png"), timeout_s=5.0).tries == 1
    server.requests.clear()
    assert (
        fetch(server.url("/a.png"), timeout_s=0.15, attempts=9).tries > 1
    )  # on a busy machine another try may time out


def test_a_body_without_length_is_taken_to_its_end(server: Server) -> None:  # case 41
    server.routes["/close.png"] = head() + PNG
    server.routes["/chunked.png"] = (
        head(200, "Transfer-Encoding: chunked", "Content-Length: 3")
        + b"".join(b"%x;note\r\n%b\r\n" % (len(part), part) for part in (PNG[:100], PNG[100:]))
        + b"0\r\n\r\n"
    )
    server.routes["/odd.png"] = head(200, "Content-Length: many") + PNG
    for path in server.routes:
        assert fetch(server.url(path)).data == PNG


def test_the_limit_itself_is_allowed(server: Server) -> None:
    full = PNG + bytes(LIMIT - len(PNG))
    server.routes |= {"/told.png": whole(full), "/untold.png": head() + full, "/more.png": head() + full + b"x"}
    assert fetch(server.url("/told.png")).data == fetch(server.url("/untold.png")).data == full
    assert refusal(server.url("/more.png")).code == "too_large"


def test_a_compression_bomb_is_not_unpacked(server: Server) -> None:
    server.routes["/a.png"] = whole(gzip.compress(bytes(30_000_000), 1), 200, "Content-Encoding: gzip")
    tracemalloc.start()
    try:
        assert refusal(server.url("/a.png")).code == "too_large"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_body_longer_than_its_length_is_cut_and_does_not_affect_others(server: Server) -> None:  # case 41
    server.routes["/keep/long.png"] = whole() + whole(b"\xff\xd8\xffsmuggled")
    server.routes["/keep/next.png"] = whole()
    with Fetcher(rules(), LIMIT) as fetcher:
        assert fetcher.fetch(server.url("/keep/long.png")).data == PNG
        assert fetcher.fetch(server.url("/keep/next.png")).data == PNG


@pytest.mark.parametrize(  # case 41: less than announced
    "short",
    [
        head(200, "Content-Length: 5000") + PNG,
        head(200, "Content-Length: 5000"),
        head(200, "Transfer-Encoding: chunked") + b"%x\r\n%b" % (len(PNG) + 9, PNG),
        head(200, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n" % (len(PNG), PNG),
        whole(gzip.compress(PNG, mtime=0)[:-20], 200, "Content-Encoding: gzip"),
    ],
    ids=["length", "nothing", "inside-chunk", "between-chunks", "gzip"],
)
def test_a_short_body_is_tried_again_and_reported(server: Server, short: bytes) -> None:
    server.routes["/a.png"] = lambda count: [whole() if count == 2 else short]
    assert refusal(server.url("/a.png"), attempts=2).code == "truncated"
    assert fetch(server.url("/a.png"), attempts=2).tries == 1
    server.requests.clear()
    assert fetch(server.url("/a.png"), attempts=3).tries == 3


@pytest.mark.parametrize(
    ("body", "encoding", "code"),
    [
        (gzip.compress(PNG, mtime=0), "gzip", ""),
        (gzip.compress(PNG, mtime=0), "X-GZIP", ""),
        (zlib.compress(PNG), "deflate", ""),
        (PNG, "aws-chunked", ""),  # some object stores send it
        (PNG, "gzip", ""),
        (gzip.compress(bytes(50 * LIMIT)), "gzip", "too_large"),
        (zlib.compress(PNG + bytes(LIMIT)), "deflate", "too_large"),
        (gzip.compress(b"<html>", mtime=0), "gzip", "not_image"),
        (b"no gzip", "gzip", "bad_encoding"),
        (gzip.compress(gzip.compress(PNG, mtime=0), mtime=0), "gzip, gzip", "bad_encoding"),
        (b"\x8b\x02\x80brotli", "br", "bad_encoding"),
    ],
)
def test_packed_bodies_are_unpacked_up_to_the_limit(server: Server, body: bytes, encoding: str, code: str) -> None:
    server.routes["/a.png"] = whole(body, 200, f"Content-Encoding: {encoding}")
    if code:
        assert refusal(server.url("/a.png"), attempts=2).code == code
        assert len(server.requests) == 1
    else:
        assert fetch(server.url("/a.png")).data == PNG


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 300, 304, 206, 999])  # case 42
def test_final_statuses_are_not_tried_again(server: Server, status: int) -> None:
    server.routes["/a.png"] = whole(PNG, status)
    error = refusal(server.url("/a.png"), attempts=4)
    assert error.code == "http_error" and str(status) in error.detail
    assert error.code not in TRANSIENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])  # case 42
def test_busy_servers_are_tried_again(server: Server, status: int) -> None:
    server.routes["/a.png"] = lambda count: [whole() if count == 2 else whole(b"busy", status)]
    waits: list[float] = []
    assert fetch(server.url("/a.png"), sleep=waits.append, attempts=3).tries == 3
    assert len(waits) == 2 and 0.25 <= waits[0] <= 0.75 and 0.5 <= waits[1] <= 1.5
    again: list[float] = []
    server.requests.clear()
    error = refusal(server.url("/a.png"), sleep=again.append, attempts=2)
    assert error.code == "http_busy" and str(status) in error.detail and error.code in TRANSIENT
    assert again == waits[:1]  # equal waits for one url, and no wait after the last try


@pytest.mark.parametrize(  # case 42: the server's own delay
    ("delay", "seconds"),
    [
        ("7", 7.0),
        ("86400", 60.0),
        ("9" * 5000, 60.0),
        ("Fri, 31 Dec 2199 23:59:59 GMT", 60.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", None),
        ("soon", None),
        ("-5", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_delay_of_the_server_is_respected(server: Server, status: int, delay: str, seconds: float | None) -> None:
    server.routes["/a.png"] = lambda count: [whole() if count else whole(b"", status, f"Retry-After: {delay}")]
    waits: list[float] = []
    assert fetch(server.url("/a.png"), sleep=waits.append, attempts=2).tries == 2
    assert waits == [seconds] if seconds is not None else 0.25 <= waits[0] <= 0.75


def test_waits_differ_between_addresses(server: Server) -> None:
    server.routes |= {f"/{name}.png": whole(b"", 500) for name in "abc"}
    waits: list[float] = []
    for name in "abc":
        refusal(server.url(f"/{name}.png"), sleep=waits.append, attempts=2)
    assert len(set(waits)) == 3


def test_broken_connections_are_tried_again(server: Server) -> None:
    server.routes["/a.png"] = lambda count: [whole()] if count == 2 else []
    assert fetch(server.url("/a.png"), attempts=3).tries == 3
    server.requests.clear()
    assert refusal(server.url("/a.png"), attempts=2).code == "broken_connection"
    server.close()
    assert refusal(server.url("/a.png"), attempts=2).code == "broken_connection"


@pytest.mark.parametrize(  # case 43
    ("body", "code"),
    [
        (b"<!DOCTYPE html><title>Please log in</title>", "not_image"),
        (b'{"error": "quota"}', "not_image"),
        (b"%PDF-1.7", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"", "empty"),
    ],
)
def test_the_bytes_decide_whether_a_body_is_a_picture(server: Server, body: bytes, code: str) -> None:
    server.routes["/a.png"] = whole(body, 200, "Content-Type: image/png")
    assert refusal(server.url("/a.png")).code == code
    server.routes["/a.png"] = whole(PNG, 200, "Content-Type: text/html")
    assert fetch(server.url("/a.png")).data == PNG


def test_an_answer_without_content_is_empty(server: Server) -> None:
    server.routes["/a.png"] = head(204)
    assert refusal(server.url("/a.png")).code == "empty"


@pytest.mark.parametrize(  # case 44
    ("values", "forbids"),
    [
        (["noai"], True),
        (["NoImageAI"], True),
        (["noindex"], True),
        (["all, noimageindex"], True),
        (["none"], True),
        (["nofollow", "noai"], True),
        (["restoray: noai"], True),
        (["RestoRay : nofollow, noai"], True),
        (["*: noai"], True),
        (["noindex, max-image-preview: large"], True),
        (["max-image-preview: large, noindex"], True),
        (["unavailable_after: Wed, 25 Jun 2199 15:00:00 GMT, noai"], True),
        (["otherbot: noindex, restoray: noai"], True),
        (["otherbot: noindex"], False),
        (["otherbot: nofollow, noai"], False),
        (["restoray: nofollow, otherbot: noai"], False),
        (["nofollow, noarchive"], False),
        (["noaim"], False),
        ([""], False),
    ],
)
def test_robots_directives(server: Server, values: list[str], forbids: bool) -> None:
    server.routes["/a.png"] = whole(PNG, 200, *(f"X-Robots-Tag: {value}" for value in values))
    if forbids:
        assert refusal(server.url("/a.png")).code == "robots"
        assert fetch(server.url("/a.png"), obey_robots=False).data == PNG
    else:
        assert fetch(server.url("/a.png")).data == PNG


def test_the_same_address_twice_is_fetched_once(server: Server) -> None:  # case 47
    server.routes["/a.png"] = whole()
    server.routes["/b.png"] = whole(b"", 404)
    items = [("1", server.url("/a.png")), ("2", server.url("/b.png")), ("3", server.url("/a.png")), ("4", "x")]
    items += [("5", server.url("/b.png"))]
    with Fetcher(rules(threads=4), LIMIT) as fetcher:
        results = list(fetch_many(fetcher, items))
    assert [path for path, _ in sorted(server.requests)] == ["/a.png", "/b.png"]
    answers = [(result.code, result.key) if isinstance(result, SampleError) else result.data for result in results]
    assert answers == [PNG, ("http_error", "2"), PNG, ("bad_url", "4"), ("http_error", "5")]


class CountingItems(Sequence[tuple[str, str]]):
    """Items that count how far they were read."""

    def __init__(self, items: list[tuple[str, str]]) -> None:
        self.items, self.read = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: Any) -> Any:
        item = self.items[at]
        self.read = max(self.read, at + 1)
        return item


def test_many_come_in_order_through_a_window(server: Server) -> None:
    last_request = threading.Event()

    def late(_: int) -> Iterator[bytes]:
        last_request.wait(8)
        yield whole()

    def last_of_window(_: int) -> Iterator[bytes]:
        last_request.set()  # the first picture comes only after this request
        yield whole()

    server.routes |= {f"/{n}.png": whole(PNG + bytes([n])) for n in range(20)}
    server.routes["/0.png"], server.routes["/3.png"] = late, last_of_window
    items = CountingItems([(str(n), server.url(f"/{n}.png")) for n in range(20)])
    with Fetcher(rules(threads=2), LIMIT) as fetcher:
        results = fetch_many(fetcher, items)
        assert next(results) and last_request.is_set()
        assert items.read == 4
        rest = [result.url for result in results if isinstance(result, FetchedFile)]
    assert rest == [url for _, url in items.items[1:]]
    assert not list(fetch_many(fetcher, []))


def test_a_closed_iterator_sends_no_more_requests(server: Server) -> None:
    server.routes |= {f"/{n}.png": whole() for n in range(20)}
    with Fetcher(rules(threads=1), LIMIT) as fetcher:
        results = fetch_many(fetcher, [(str(n), server.url(f"/{n}.png")) for n in range(20)])
        next(results)
        results.close()  # type: ignore[attr-defined]
    assert len(server.requests) <= 2


def test_a_connection_serves_several_pictures(server: Server) -> None:
    server.routes |= {"/keep/a.png": whole(), "/keep/b.png": whole()}
    with Fetcher(rules(), LIMIT) as fetcher:
        assert fetcher.fetch(server.url("/keep/a.png")).data == fetcher.fetch(server.url("/keep/b.png")).data
        assert server.connections == 1
        server.routes["/keep/a.png"] = whole(bytes(LIMIT + 1))  # not read to its end, so the connection is not reused
        with pytest.raises(SampleError, match="too_large"):
            fetcher.fetch(server.url("/keep/a.png"))
        assert fetcher.fetch(server.url("/keep/b.png")).data == PNG
    assert server.connections == 2


def test_a_pooled_connection_that_was_closed_costs_no_try(server: Server) -> None:
    server.routes["/keep/a.png"] = whole()
    server.routes["/b.png"] = lambda count: [whole()] if count else []
    with Fetcher(rules(), LIMIT) as fetcher:
        fetcher.fetch(server.url("/keep/a.png"))
        assert fetcher.fetch(server.url("/b.png")).tries == 1
    assert server.connections == 2


def test_errors_are_one_short_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.routes["/b.png"] = b"HTTP/1.1 200 OK\r\nno header\r\n\r\n"
    assert refusal(server.url("/b.png")).code == "empty"
    server.routes["/a.png"] = b"HTTP/9 \x1b[31m what\r\n\r\n"
    error = refusal(server.url("/a.png"))
    assert error.code == "bad_answer" and error.detail.isascii() and error.detail.isprintable()
    error = refusal("gopher:" + "\n\ud800ö" * 9999)
    assert error.code == "bad_scheme" and error.detail.isascii() and error.detail.isprintable()
    error = refusal("http://" + "ö\ud800\n" * 9999)
    assert error.code == "bad_url" and error.detail.isascii() and len(error.detail) < 300
    assert not [record for record in caplog.records if record.levelname != "DEBUG"]


def test_a_user_agent_must_fit_a_header() -> None:
    for agent in ("", "a\r\nX: y", "restörer"):
        with pytest.raises(ValueError, match="user_agent"):
            Fetcher(DownloadSpec(user_agent=agent), LIMIT)


ANSWERS = (
    "HTTP/1.1 200 OK\r\n|HTTP/1.0 302 X\r\n|Location: |http://[|Content-Length: 10\r\n|\r\n|-1|a\r\n|0\r\n|:|\0| "
    "|Transfer-Encoding: chunked\r\n|Content-Encoding: gzip\r\n|Content-Length: 1, 2\r\n|Retry-After: x\r\n"
    "|HTTP/1.1 100 C\r\n\r\n|X-Robots-Tag: :,:\r\n"
)


PIECES = st.sampled_from([PNG[:30], *ANSWERS.encode().split(b"|")])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES | st.binary(max_size=20), max_size=9), proper=st.booleans())
def test_any_answer_ends_in_a_picture_or_a_sample_error(server: Server, pieces: list[bytes], proper: bool) -> None:
    server.routes["/a.png"] = (b"HTTP/1.1 200 OK\r\n" if proper else b"") + b"".join(pieces)
    with Fetcher(rules(max_redirects=1), LIMIT, resolver("127.0.0.9")) as fetcher:
        (result,) = fetch_many(fetcher, [("a", server.url("/a.png"))])
    assert isinstance(result, FetchedFile) or result.key == "a"
