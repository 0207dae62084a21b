"""Allowed and refused connections: schemes, private addresses, redirects, rebinding, TLS, proxies.

The battery's cases 37 to 40, 45 and 46. All servers are on loopback, inside the test.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from helper_modules import load_helper
from hypothesis import given, settings
from hypothesis import strategies as st

from components.types import SampleError
from pipelines.curation.sources.fetch import TRANSIENT, Fetcher, fetch_many

web = load_helper("pipelines/_loopback.py")
LIMIT, PNG, Server, certificate = web.LIMIT, web.PNG, web.Server, web.certificate
endless, fetch, head, no_resolver, redirect = web.endless, web.fetch, web.head, web.no_resolver, web.redirect
refusal, resolver, rules, whole = web.refusal, web.resolver, web.rules, web.whole


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize(  # case 37
    ("url", "code"),
    [
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://127.0.0.1/a.png", "bad_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "bad_scheme"),
        ("gopher://127.0.0.1/_x", "bad_scheme"),
        ("FILE://127.0.0.1/a.png", "bad_scheme"),
        ("http://user:word@127.0.0.1/a.png", "bad_url"),
        ("http://user@127.0.0.1/a.png", "bad_url"),
        ("http:///a.png", "bad_url"),
        ("/a.png", "bad_url"),
        ("", "bad_url"),
        ("http://127.0.0.1:99999/a.png", "bad_url"),
        ("http://a b/a.png", "bad_url"),
        ("http://[::1/a.png", "bad_url"),
    ],
)
def test_only_plain_web_addresses(url: str, code: str) -> None:
    assert refusal(url, no_resolver).code == code


@pytest.mark.parametrize("url", ["http://a..invalid/x.png", f"http://{'a' * 70}.invalid/x.png"])
def test_impossible_host_names_are_refused(url: str) -> None:
    assert refusal(url, socket.getaddrinfo).code == "bad_url"


PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1"),
    *("192.0.0.192", "192.0.2.1", "192.168.1.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "100.100.100.200", "168.63.129.16"),
    *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "fe80::1", "fec0::1"),
    *("fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "2001:0:1::", "3fff::1", "100::1", "4000::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
]


@pytest.mark.parametrize("address", PRIVATE)  # case 38
def test_private_addresses_are_refused_as_literals_and_behind_names(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    literal = f"[{address}]" if ":" in address else address
    assert refusal(f"http://{literal}/a.png", no_resolver, allow_hosts=[]).code == "private_address"
    assert refusal("http://pictures.invalid/", resolver(address), allow_hosts=[]).code == "private_address"
    mixed = refusal("https://pictures.invalid/", resolver("8.8.8.8", address), allow_hosts=["10.9.9.9"])
    assert mixed.code == "private_address" and str(ip_address(address)) in mixed.detail


DISGUISES = [
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "0177.0.0.1",
    "127.1",
    "127.0.1",
    "%31%32%37.1",
    "0x",
]


@pytest.mark.parametrize("host", [*DISGUISES, "134744072", "8.8.2056", "8.8.8.8.8", "8.8.8.010"])  # case 38
def test_numeric_hosts_are_refused_even_where_loopback_is_allowed(server: Server, host: str) -> None:
    server.routes["/a.png"] = whole()
    assert refusal(server.url("/a.png", host), socket.getaddrinfo).code == "private_address"
    assert not server.requests


@pytest.mark.parametrize("host", ["localhost", "localhost.", "127.0.0.1.", "[::1]", "[fe80::1%25lo]"])
def test_local_names_are_refused_with_the_true_resolver(server: Server, host: str) -> None:
    assert refusal(server.url("/a.png", host), socket.getaddrinfo, allow_hosts=[]).code == "private_address"
    assert not server.connections


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1", "192.0.1.1"]
)
def test_public_addresses_are_connected_to_as_they_were_checked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = []

    def connect(_: socket.socket, where: tuple[Any, ...]) -> None:
        connections.append(where[:2])
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert refusal("http://pictures.invalid:81/", resolver(address), allow_hosts=[]).code == "broken_connection"
    assert [(ip_address(host), port) for host, port in connections] == [(ip_address(address), 81)]


def test_hosts_may_be_allowed_by_name_and_by_address(server: Server) -> None:
    server.routes["/a.png"] = whole()
    for hosts in (["pictures.invalid"], ["PICTURES.invalid."], ["127.0.0.1"], ["x", "127.0.0.1"]):
        assert fetch(server.url("/a.png", "pictures.invalid"), allow_hosts=hosts).data == PNG
    url = server.url("/a.png", "other.invalid")
    assert refusal(url, allow_hosts=["pictures.invalid", "::ffff:127.0.0.1"]).code == "private_address"


@pytest.mark.parametrize(  # case 39
    ("location", "code"),
    [
        ("http://169.254.169.254/latest/meta-data/", "private_address"),
        ("//10.0.0.1/a.png", "private_address"),
        ("http://2130706433/a.png", "private_address"),
        ("http://[::ffff:127.0.0.1]/a.png", "private_address"),
        ("http://inside.invalid/a.png", "private_address"),
        ("file:///etc/passwd", "bad_scheme"),
        ("data:image/png;base64,iVBORw0KGgo=", "bad_scheme"),
        ("http://user:word@127.0.0.1/a.png", "bad_url"),
        ("http://[", "bad_url"),
    ],
)
def test_every_hop_is_checked_as_the_first(server: Server, location: str, code: str) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return resolver("127.0.0.1" if host == "pictures.invalid" else "192.168.0.7")(host, port)

    server.routes["/a.png"] = redirect(location)
    assert refusal(server.url("/a.png", "pictures.invalid"), resolve).code == code
    assert len(server.requests) == 1


def test_five_hops_are_followed_and_not_six(server: Server) -> None:  # case 39
    server.routes["/5/end.png"] = whole()
    for hop, status in enumerate((301, 302, 303, 307, 308)):
        server.routes[f"/{hop}/x.png"] = redirect("../5/end.png" if hop == 4 else f"/{hop + 1}/x.png#part", status)
    file = fetch(server.url("/0/x.png"))
    assert (file.data, file.url, file.tries) == (PNG, server.url("/5/end.png"), 1)
    assert refusal(server.url("/0/x.png"), max_redirects=4).code == "too_many_redirects"
    server.routes["/loop"] = redirect("/loop")
    before = len(server.requests)
    assert refusal(server.url("/loop"), attempts=3).code == "too_many_redirects"
    assert len(server.requests) - before == 6
    assert refusal(server.url("/loop"), max_redirects=0).code == "too_many_redirects"


def test_redirects_may_be_unicode_and_need_a_place(server: Server) -> None:
    server.routes["/a"] = redirect("/ö.png".encode().decode("latin-1"))
    server.routes["/%C3%B6.png"] = whole()
    server.routes["/nowhere"] = whole(b"", 302)
    assert fetch(server.url("/a")).url == server.url("/%C3%B6.png")
    assert refusal(server.url("/nowhere")).code == "http_error"


def test_a_name_is_resolved_once(server: Server) -> None:  # case 40
    evil = Server("127.0.0.2", server.port)
    try:
        server.routes["/a.png"] = evil.routes["/a.png"] = whole()
        answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
        queries = []

        def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
            queries.append(host)
            return resolver(next(answers))(host, port)

        url = server.url("/a.png", "pictures.invalid")
        with Fetcher(rules(), LIMIT, resolve) as fetcher:
            assert fetcher.fetch(url).data == PNG
            assert queries == ["pictures.invalid"] and len(server.requests) == 1
            assert f"Host: pictures.invalid:{server.port}\r\n" in server.requests[0][1]
            with pytest.raises(
                SampleError
            ) as error_info:  # the next lookup gives the other address, before any connection
                fetcher.fetch(url)
        assert error_info.value.code == "private_address"
        assert not evil.connections
    finally:
        evil.close()


def test_the_next_address_of_a_name_is_tried(server: Server) -> None:
    server.routes["/a.png"] = whole()
    url = server.url("/a.png", "pictures.invalid")  # no server listens on 127.0.0.3
    assert fetch(url, resolver("127.0.0.3", "127.0.0.1"), allow_hosts=["pictures.invalid"]).tries == 1


def test_names_without_address() -> None:
    def unknown(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def busy(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        calls.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    calls: list[str] = []
    waits: list[float] = []
    assert refusal("http://pictures.invalid/", unknown, waits.append, attempts=3).code == "unresolved"
    assert refusal("http://pictures.invalid/", resolver(), waits.append, attempts=3).code == "unresolved"
    assert not waits
    assert refusal("http://pictures.invalid/", busy, attempts=3).code == "unresolved"
    assert len(calls) == 3


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """An https server for "pictures.invalid", and the certificate that must be trusted for it."""
    path = certificate(tmp_path, "pictures.invalid")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server = Server(context=context)
    server.routes["/a.png"] = whole()
    yield server, path
    server.close()


def test_tls_is_verified_against_the_name(tls: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch) -> None:  # case 45
    server, path = tls
    url = server.url("/a.png", "pictures.invalid", "https")
    stranger = refusal(url, attempts=3)
    assert stranger.code == "tls" and stranger.code not in TRANSIENT
    assert not server.requests and server.connections == 1
    monkeypatch.setenv("SSL_CERT_FILE", str(path))  # OpenSSL's setting for an own authority
    assert fetch(url).data == PNG
    assert refusal(server.url("/a.png", "other.invalid", "https")).code == "tls"
    assert refusal(server.url("/a.png", "127.0.0.1", "https")).code == "tls"
    assert len(server.requests) == 1


def test_tls_bodies_have_limits_too(tls: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    server.routes["/drip.png"] = endless(b"x", 0.02, head() + PNG)
    server.routes["/flood.png"] = endless(PNG * 9, start=head())
    assert refusal(server.url("/drip.png", "pictures.invalid", "https"), total_s=0.3).code == "too_slow"
    assert refusal(server.url("/flood.png", "pictures.invalid", "https")).code == "too_large"


def test_a_server_without_tls_is_a_tls_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def plain() -> None:
            connection, _ = listening.accept()
            connection.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")
            connection.recv(4096)
            connection.close()

        threading.Thread(target=plain, daemon=True).start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/a.png"
        assert refusal(url).code == "tls"


def test_mixed_schemes_in_one_block(  # case 46
    server: Server, tls: tuple[Server, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    secure, path = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    server.routes["/a.png"] = whole()
    items = [
        ("a", "file:///etc/passwd"),
        ("b", server.url("/a.png")),
        ("c", secure.url("/a.png", "pictures.invalid", "https")),
        ("d", "data:image/png;base64,iVBORw0KGgo="),
        ("e", server.url("/a.png#part")),
        ("f", "ftp://127.0.0.1/a.png"),
    ]
    with Fetcher(rules(threads=3), LIMIT, resolver("127.0.0.1")) as fetcher:
        results = list(fetch_many(fetcher, items))
    answers = [(result.code, result.key) if isinstance(result, SampleError) else result.data for result in results]
    assert answers == [("bad_scheme", "a"), PNG, PNG, ("bad_scheme", "d"), PNG, ("bad_scheme", "f")]


def test_the_environments_proxies_are_ignored(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Server()
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.routes["/a.png"] = whole()
    assert fetch(server.url("/a.png", "pictures.invalid")).data == PNG
    assert not proxy.connections
    proxy.close()


def test_cookies_and_passwords_are_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.routes["/a.png"] = redirect("/b.png")
    server.routes["/b.png"] = whole(PNG, 200, "Set-Cookie: a=b")
    with Fetcher(rules(), LIMIT) as fetcher:
        for _ in range(2):
            assert fetcher.fetch(server.url("/a.png")).data == PNG
    assert len(server.requests) == 4
    assert not any("cookie:" in text.lower() or "authorization:" in text.lower() for _, text in server.requests)


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=30)
    | st.builds("http://{}:1/{}".format, st.text(max_size=20), st.text(max_size=9))
    | st.builds("https://{}".format, st.text("0123456789abcdefx.:[]%@/\\#?", max_size=20))
)
def test_any_address_ends_in_a_sample_error(url: str) -> None:
    error = refusal(url, resolver("10.0.0.1"), allow_hosts=[])
    assert error.code in ("bad_url", "bad_scheme", "private_address")
