"""Web servers on loopback that send exact bytes, and helpers for requests to them.

Host names end in .invalid, which no resolver knows: code that uses the system's resolver instead of the injected one
fails.
"""

from __future__ import annotations

import datetime
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.corpora import DownloadSpec
from components.images import encode_png
from components.types import SampleError
from pipelines.curation.sources.fetch import FetchedFile, Fetcher

PNG = encode_png(np.random.default_rng(7).integers(0, 256, (24, 24, 3), dtype=np.uint8))
LIMIT = 200_000
LOCAL = ["127.0.0.1"]
Route = Callable[[int], Iterable[bytes]]
"""Yields the answer to request n (from 0) of a path, block by block."""


def head(status: int = 200, *fields: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"HTTP/1.1 {status} Word", *fields, "")).encode("latin-1")


def whole(body: bytes = PNG, status: int = 200, *fields: str) -> bytes:
    return head(status, f"Content-Length: {len(body)}", *fields) + body


def redirect(location: str, status: int = 302) -> bytes:
    return whole(b"<p>moved</p>", status, f"Location: {location}")


class Server:
    """A loopback server that sends the exact bytes of its routes; paths that begin with /keep keep the connection."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.routes: dict[str, bytes | Route] = {}
        self.requests: list[tuple[str, str]] = []  # (path, head as text)
        self.connections = 0
        self.stopping = threading.Event()
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                outer.connections += 1
                try:
                    if context is not None:
                        self.connection = context.wrap_socket(self.request, server_side=True)
                        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
                    while outer.answer(self.rfile, self.wfile):
                        pass
                except OSError:
                    pass  # the client closed the connection, or refused the certificate
                finally:
                    if context is not None:
                        self.connection.close()

        class Loopback(socketserver.ThreadingTCPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

        self.server = Loopback((host, port), Handler)
        self.host, self.port = self.server.server_address[:2]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, reading: Any, writing: Any) -> bool:
        lines = list(iter(reading.readline, b"\r\n")) if (first := reading.readline()) else []
        if not first:
            return False
        path = first.split()[1].decode()
        count = sum(path == earlier for earlier, _ in self.requests)
        self.requests.append((path, b"".join([first, *lines]).decode("latin-1")))
        route = self.routes.get(path, whole(b"", 404))
        for block in [route] if isinstance(route, bytes) else route(count):
            writing.write(block)
        return path.startswith("/keep")

    def url(self, path: str, name: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{name}:{self.port}{path}"

    def close(self) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()


def rules(**changes: Any) -> DownloadSpec:
    return DownloadSpec(**{"attempts": 1, "timeout_s": 5.0, "total_s": 20.0, "allow_hosts": LOCAL, **changes})


def resolver(*addresses: str) -> Callable[..., list[tuple[Any, ...]]]:
    """Return a resolver that gives every name these addresses."""

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    return resolve


def no_resolver(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
    raise AssertionError("nothing had to be resolved")


def fetch(url: str, resolve: Any = resolver("127.0.0.1"), sleep: Any = None, **changes: Any) -> FetchedFile:
    with Fetcher(rules(**changes), LIMIT, resolve, sleep or (lambda _: None)) as fetcher:
        return fetcher.fetch(url, "picture-1")


def refusal(url: str, resolve: Any = resolver("127.0.0.1"), sleep: Any = None, **changes: Any) -> SampleError:
    with pytest.raises(SampleError) as info:
        fetch(url, resolve, sleep, **changes)
    assert info.value.key == "picture-1"
    assert type(info.value) is SampleError
    return info.value


def endless(block: bytes, pause_s: float = 0.0, start: bytes = b"") -> Route:
    def route(_: int) -> Iterator[bytes]:
        yield start
        end = time.monotonic() + 8
        while time.monotonic() < end:  # until the client closes the connection
            yield block
            time.sleep(pause_s)

    return route


def certificate(folder: Path, name: str) -> Path:
    """Write a self-signed certificate for one name, with its key, to one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    own_certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        own_certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path
