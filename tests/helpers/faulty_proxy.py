"""A proxy before an HTTP server on loopback that spoils one request in ten: 503, or a cut or lost answer."""

from __future__ import annotations

import itertools
import re
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

FAULTS = ("busy", "cut", "lost", "torn")
"""503 and no forwarding; half of the answer; forwarded without an answer; half of the request is forwarded."""

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class FaultyProxy:
    """Settings and counts of a running proxy.

    Attributes:
        every: one request in so many is spoilt; 0 spoils none, 1 spoils all.
        faults: kinds of faults, in turn.
        requests, spoilt: counts so far; lines: method and path of each request.
        sent: bytes of the answers by method and path.
        delay_s: added to each request.
        open: requests in work.
    """

    def __init__(self, upstream: str, every: int, faults: tuple[str, ...] = FAULTS, delay_s: float = 0.0) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream, self.every, self.faults = (host, int(port)), every, faults
        self.lock, self.requests, self.spoilt = threading.Lock(), 0, 0
        self.lines: list[str] = []
        self.sent: Counter[str] = Counter()
        self.delay_s, self.open = delay_s, 0
        self.turns = itertools.cycle(faults)
        self.endpoint = ""

    def fault(self, line: str) -> str:
        """The fault of the next request; "" for none."""
        with self.lock:
            self.requests += 1
            self.lines.append(line)
            if not self.every or self.requests % self.every:
                return ""
            self.spoilt += 1
            return next(self.turns)

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """Wait until no request is in work, of a client that was killed for example; raises TimeoutError."""
        end = time.monotonic() + seconds
        while self.open:
            if time.monotonic() > end:
                raise TimeoutError(f"{self.open} requests are still in work")
            time.sleep(0.02)

    def handle(self, client: socket.socket) -> None:
        """Answer one request of a connection and close it."""
        with self.lock:
            self.open += 1
        try:
            self._handle(client)
        finally:
            with self.lock:
                self.open -= 1

    def _handle(self, client: socket.socket) -> None:
        client.settimeout(30)
        data = b""
        while b"\r\n\r\n" not in data:
            piece = client.recv(1 << 16)
            if not piece:
                return
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = int((re.search(rb"(?i)\r\ncontent-length: *(\d+)", head) or [b"", b"0"])[1])
        if re.search(rb"(?i)\r\nexpect:", head):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        while len(body) < length:
            piece = client.recv(1 << 16)
            if not piece:
                return
            body += piece
        line = head.partition(b" HTTP/")[0].decode()
        fault = self.fault(line)
        time.sleep(self.delay_s)
        if fault == "busy":
            client.sendall(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                + f"Content-Length: {len(BUSY)}\r\n\r\n".encode()
                + BUSY
            )
            return
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close\r\n\r\n"
        answer = self._forward(head + (body[: len(body) // 2] if fault == "torn" else body))
        if fault == "cut":
            answer = answer[: max(1, len(answer) // 2)]
        with self.lock:
            self.sent[line] += len(answer)
        if fault not in ("lost", "torn"):
            client.sendall(answer)

    def _forward(self, request: bytes) -> bytes:
        answer = b""
        with socket.create_connection(self.upstream, timeout=30) as server:
            server.sendall(request)
            server.shutdown(socket.SHUT_WR)
            while piece := server.recv(1 << 16):
                answer += piece
        return answer


@contextmanager
def faulty_proxy(
    upstream: str, every: int = 10, faults: tuple[str, ...] = FAULTS, delay_s: float = 0.0
) -> Iterator[FaultyProxy]:
    """Run a proxy before a server; its `endpoint` is the address for clients."""
    proxy = FaultyProxy(upstream, every, faults, delay_s)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                proxy.handle(self.request)
            except OSError:  # the client or the server went away
                return

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
