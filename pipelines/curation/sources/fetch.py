"""Fetch pictures by url from servers that cannot be trusted.

A url from a list of millions must count as hostile: it may lead into our own network, resolve to another address after
the check, redirect, never end, or announce a wrong length. So:

    - this module resolves names. Every address of a name must be public, and the connection goes to the checked
      address, never to a second answer of the resolver. TLS is verified against the name
    - this module follows redirects, and every hop is checked like the first one
    - one try has a limit of time and one of bytes, both counted at the socket, so that slow or endless headers, chunk
      sizes and trailers end too
    - no proxy, cookie or password is used, also if the environment sets one

`Fetcher.fetch` raises SampleError with one of these codes, and nothing else:

    bad_url             cannot be parsed, has no host, or carries a user name
    bad_scheme          neither http nor https
    private_address     loopback, private, link-local, metadata, multicast, reserved, an IPv6 form of these, or a number
                        in a form other than four decimals
    unresolved *        the name has no address
    broken_connection * refused, reset, or closed before an answer
    timeout *           no connection, or no byte, for DownloadSpec.timeout_s
    too_slow *          one try took longer than DownloadSpec.total_s
    tls                 the certificate or the handshake is bad
    bad_answer          not HTTP, or too many headers
    too_many_redirects  more hops than DownloadSpec.max_redirects
    http_error          a final status: 404, 410, any other 4xx
    http_busy *         429 or 5xx at every try
    truncated *         fewer bytes than Content-Length or the chunks announce
    too_large           more bytes than allowed, announced, streamed or unpacked
    bad_encoding        a Content-Encoding that was not requested and cannot be undone
    robots              the answer's X-Robots-Tag forbids the use
    empty, not_image, unsupported_format    as components.images.sniff

Codes with a star are in TRANSIENT. addresses.py decides which addresses are allowed. Numbers without a source are ours.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import ssl
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cached_property
from http.client import HTTPResponse, IncompleteRead
from ipaddress import ip_address
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProtocolError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse

from components.corpora import FILE_SIZE_OPTION, DownloadSpec
from components.images import sniff
from components.randomness import generator
from components.types import SampleError
from pipelines.curation.sources.addresses import (
    Address,
    Target,
    canonical,
    is_public,
    join_redirect,
    parse_target,
    printable,
)

TRANSIENT: frozenset[str] = frozenset(
    {"unresolved", "broken_connection", "timeout", "too_slow", "http_busy", "truncated"}
)
"""Codes that a later try may change: a replay of the quarantine tries them by default."""

ROBOTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives that forbid: img2dataset's four, and "none", which Google's specification defines as noindex, nofollow."""

BACKOFF_S = 0.5  # wait before the second try; it doubles with every further try
LONGEST_WAIT_S = 60.0  # limit for Retry-After too
ADDRESSES_TRIED = 4  # addresses of one name that are tried; all of them are checked
BLOCK_BYTES = 1 << 16
WIRE_FACTOR, WIRE_SLACK_BYTES = 2, 1 << 20  # on the body's limit: room for headers, chunk sizes and redirects
REDIRECTS = (301, 302, 303, 307, 308)
VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")

Resolve = Callable[..., Iterable[tuple[Any, ...]]]


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """A picture file that arrived complete.

    Attributes:
        data: the file; its signature is that of a format that we decode.
        url: the final url, after redirects.
        status: status of the final answer.
        tries: number of tries.
    """

    data: bytes
    url: str
    status: int
    tries: int


def fetch_many(fetcher: Fetcher, items: Sequence[tuple[str, str]]) -> Iterator[FetchedFile | SampleError]:
    """Fetch (key, url) pairs, `rules.threads` at a time; results and errors come in the order of `items`.

    At most 2 * threads results are in work or waiting for their turn; that number times the limit of bytes bounds the
    memory. A url that occurs several times within this window is fetched once. When the caller stops the iteration,
    fetches that have not begun are cancelled.
    """
    threads = fetcher.rules.threads
    window: deque[tuple[str, str]] = deque()
    uses: Counter[str] = Counter()
    futures: dict[str, Future[FetchedFile | SampleError]] = {}
    rest = iter(items)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
    try:
        while True:
            while len(window) < 2 * threads and (item := next(rest, None)) is not None:
                window.append(item)
                uses[item[1]] += 1
                if item[1] not in futures:
                    futures[item[1]] = executor.submit(_fetch_or_error, fetcher, item[1])
            if not window:
                return
            key, url = window.popleft()
            result = futures[url].result()
            uses[url] -= 1
            if not uses[url]:
                del futures[url], uses[url]
            yield SampleError(result.code, result.detail, key) if isinstance(result, SampleError) else result
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Fetches urls under one set of rules; a context manager, and safe to use from many threads.

    Connections are reused, by name and checked address.

    Args:
        rules: timeouts, tries, and hosts that may be private.
        max_bytes: largest size of one file.
        resolve: as socket.getaddrinfo; for tests.
        sleep: as time.sleep; for tests.

    Raises:
        ValueError: the user agent does not fit in a header.
    """

    def __init__(
        self,
        rules: DownloadSpec,
        max_bytes: int,
        resolve: Resolve = socket.getaddrinfo,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if not re.fullmatch(r"[\x20-\x7e]+", rules.user_agent):
            raise ValueError(f"user_agent must be printable ASCII and not empty, got {rules.user_agent!r}")
        self.rules, self.max_bytes = rules, max_bytes
        self._resolve, self._sleep = resolve, sleep
        self._agent = re.split(r"[\s/(]", rules.user_agent.strip().lower())[0]
        self._allowed = {canonical(host) for host in rules.allow_hosts}
        self._pools = urllib3.PoolManager(num_pools=4 * rules.threads, maxsize=rules.threads)
        for part in ("connection", "connectionpool", "response"):
            logging.getLogger(f"urllib3.{part}").addFilter(_is_not_ours)  # adding it again changes nothing
        self._pools.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all open connections."""
        self._pools.clear()

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        """The system's authorities, or those of SSL_CERT_FILE; cached, since reading them is slow."""
        return ssl.create_default_context()

    def fetch(self, url: str, key: str = "") -> FetchedFile:
        """Fetch one picture. Temporary errors are tried again.

        Waits between tries are exponential, with a jitter that depends only on the url. The delay of a Retry-After
        header is kept, up to LONGEST_WAIT_S.

        Args:
            url: http or https.
            key: name of the sample, for the error.

        Raises:
            SampleError: with a code from the top of this file; no other exception.
        """
        for tries in range(1, self.rules.attempts + 1):
            try:
                data, final, status = self._try(url.strip())
                return FetchedFile(data=data, url=final, status=status, tries=tries)
            except SampleError as error:
                if not isinstance(error, _MayPass) or tries == self.rules.attempts:
                    detail = f"{error.detail} (try {tries} of {self.rules.attempts})" if tries > 1 else error.detail
                    raise SampleError(error.code, detail, key) from error.__cause__
                jitter = generator(0, "fetch", ascii(url), tries).uniform(0.5, 1.5)
                wait = max(error.after_s, BACKOFF_S * 2 ** (tries - 1) * jitter)
            self._sleep(min(wait, LONGEST_WAIT_S))
        raise AssertionError("DownloadSpec.attempts is at least 1")

    def _try(self, url: str) -> tuple[bytes, str, int]:
        """One try with all its hops: (file, final url, status)."""
        allowance = _Allowance(self.rules, WIRE_FACTOR * self.max_bytes + WIRE_SLACK_BYTES)
        token = _ALLOWANCE.set(allowance)
        try:
            for _ in range(self.rules.max_redirects + 1):
                target = parse_target(url)
                answer = self._ask(target, self._checked_addresses(target), allowance)
                try:
                    location = answer.headers.get("location")
                    if answer.status in REDIRECTS and location:
                        url = join_redirect(target.url, location)
                        continue
                    self._refuse_by_headers(target, answer)
                    return self._picture(answer), target.url, answer.status
                finally:
                    answer.close()  # closes the connection, unless the body was read to its end
                    answer.release_conn()
            raise SampleError("too_many_redirects", f"more than {self.rules.max_redirects} hops, next {printable(url)}")
        except SampleError:
            raise
        except Exception as error:  # hostile bytes make HTTP and TLS libraries raise nearly any exception
            raise _as_sample_error(error, allowance, url) from error
        finally:
            _ALLOWANCE.reset(token)

    def _checked_addresses(self, target: Target) -> list[Address]:
        """The addresses of a name; SampleError if one of them is neither public nor allowed."""
        try:
            addresses = [ip_address(target.host)]
        except ValueError:
            addresses = self._resolve_name(target)
        if canonical(target.host) not in self._allowed:
            for address in addresses:
                if not is_public(address) and str(address) not in self._allowed:
                    where = f"{target.host} is at {address}" if str(address) != target.host else target.host
                    raise SampleError("private_address", f"{where}, which is not a public address")
        return addresses

    def _resolve_name(self, target: Target) -> list[Address]:
        """The answer of the resolver, in its order and without repeats; one query."""
        try:
            entries = self._resolve(target.host, target.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # an empty label, or one above 63 characters
            raise SampleError("bad_url", f"{printable(target.host)} is not a host name") from error
        except OSError as error:
            kind = _MayPass if error.errno == socket.EAI_AGAIN else SampleError
            raise kind("unresolved", f"{printable(target.host)}: {printable(str(error))}") from error
        addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in entries))
        if not addresses:
            raise SampleError("unresolved", f"{printable(target.host)} has no address")
        return addresses

    def _ask(self, target: Target, addresses: list[Address], allowance: _Allowance) -> BaseHTTPResponse:
        """Connect to the first address that accepts, and read the headers of its answer."""
        headers = {
            "Host": target.host_header,
            "User-Agent": self.rules.user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        }
        identity: dict[str, Any] = {"server_hostname": target.host}
        if target.scheme == "https":
            identity["ssl_context"] = self._trust
        for address in addresses[:ADDRESSES_TRIED]:
            pool = self._pools.connection_from_host(str(address), target.port, target.scheme, pool_kwargs=identity)
            allowance.fresh = False
            while not allowance.fresh:
                try:
                    return pool.urlopen(
                        "GET",
                        target.path,
                        headers=headers,
                        retries=False,
                        redirect=False,
                        assert_same_host=False,
                        timeout=urllib3.Timeout(connect=allowance.next_wait_s(), read=self.rules.timeout_s),
                        preload_content=False,
                        decode_content=False,
                    )
                except ConnectTimeoutError:  # also for refused connections, which urllib3 derives from this
                    if address == addresses[:ADDRESSES_TRIED][-1]:
                        raise
                except ProtocolError:  # a reused connection may have been closed meanwhile: try a new one
                    if allowance.fresh:
                        raise
        raise AssertionError("a checked target has an address")

    def _refuse_by_headers(self, target: Target, answer: BaseHTTPResponse) -> None:
        """Check status, robots directives and announced length; SampleError if one of them excludes the body."""
        detail = f"{printable(target.url)} answered {answer.status}"
        if answer.status == 429 or 500 <= answer.status < 600:
            raise _MayPass("http_busy", detail, after_s=_retry_after_s(answer.headers.get("retry-after", "")))
        if not 200 <= answer.status < 300 or answer.status == 206:  # 206: a part was not requested
            raise SampleError("http_error", detail)
        if self.rules.obey_robots:
            for value in answer.headers.getlist("x-robots-tag"):
                if directive := _forbidding_directive(value, self._agent):
                    raise SampleError("robots", f"{printable(target.url)} asks for {directive} in X-Robots-Tag")
        length = getattr(answer, "length_remaining", None)
        if length is not None and length > self.max_bytes:
            raise SampleError(
                "too_large", f"{length} bytes announced, {self.max_bytes} are allowed ({FILE_SIZE_OPTION})"
            )

    def _picture(self, answer: BaseHTTPResponse) -> bytes:
        """The whole body, which must be a picture."""
        data = bytearray()
        while block := answer.read1(BLOCK_BYTES):  # one receive at a time, so that limits are checked in between
            data += block
            if len(data) > self.max_bytes:
                raise SampleError("too_large", f"the body exceeds {self.max_bytes} bytes ({FILE_SIZE_OPTION})")
        body = bytes(data)
        try:
            sniff(body)
            return body  # a picture, so it is not encoded: object stores may send a wrong Content-Encoding
        except SampleError as error:
            encoding = answer.headers.get("content-encoding", "").strip().lower()
            if error.code != "not_image" or encoding in ("", "identity"):
                raise
        body = _unpack(body, encoding, self.max_bytes)
        sniff(body)
        return body


class _MayPass(SampleError):
    """A temporary error; `after_s` is the delay from Retry-After, in seconds."""

    def __init__(self, code: str, detail: str, key: str = "", after_s: float = 0.0) -> None:
        super().__init__(code, detail, key)
        self.after_s = after_s


class _Allowance:
    """The remaining seconds and socket bytes of one try.

    Attributes:
        spent: error code after a limit is exceeded, else "".
        fresh: whether the last request used a new connection.
    """

    def __init__(self, rules: DownloadSpec, n_bytes: int) -> None:
        self.timeout_s, self.total_s, self.n_bytes = rules.timeout_s, rules.total_s, n_bytes
        self.spent, self.fresh = "", True
        self._end = time.monotonic() + rules.total_s

    def over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self._end

    def next_wait_s(self) -> float:
        """Longest duration of the next wait."""
        rest_s = self._end - time.monotonic()
        if rest_s <= 0:
            self.spent = "too_slow"
            raise TimeoutError("the time of this try is over")
        return min(self.timeout_s, rest_s)

    def take(self, n_bytes: int) -> None:
        """Subtract bytes that arrived."""
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            self.spent = "too_large"
            raise OSError("the bytes of this try are used up")


_ALLOWANCE: ContextVar[_Allowance] = ContextVar("allowance of the try that runs in this thread")


class _MeteredReader(io.RawIOBase):
    """A socket's bytes; every receive waits no longer than the allowance permits, and is subtracted from it."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, allowance: _Allowance) -> None:
        self._raw, self._sock, self._allowance = raw, sock, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._allowance.next_wait_s())
        n_bytes = self._raw.readinto(buffer)
        self._allowance.take(n_bytes or 0)
        return n_bytes

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _MeteredResponse(HTTPResponse):
    """The standard library's response; it reads through `_MeteredReader`."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp: io.BufferedReader = io.BufferedReader(_MeteredReader(self.fp.detach(), sock, _ALLOWANCE.get()))


class _HttpConnection(HTTPConnection):
    response_class = _MeteredResponse

    def connect(self) -> None:
        _ALLOWANCE.get().fresh = True
        super().connect()


class _HttpsConnection(HTTPSConnection):
    response_class = _MeteredResponse

    def connect(self) -> None:
        _ALLOWANCE.get().fresh = True
        super().connect()


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


def _is_not_ours(_: logging.LogRecord) -> bool:
    """Log filter: the SampleError of a try replaces the library's traceback for each odd header."""
    return _ALLOWANCE.get(None) is None


def _fetch_or_error(fetcher: Fetcher, url: str) -> FetchedFile | SampleError:
    try:
        return fetcher.fetch(url)
    except SampleError as error:
        return error


def _forbidding_directive(value: str, agent: str) -> str:
    """The first directive of an X-Robots-Tag header that forbids the use; "" without one.

    "agent: directive, directive" holds for that agent, up to the next such prefix; without a prefix it holds for all.
    """
    binds = True
    for item in value.lower().split(","):
        directive = item.strip()
        prefix = re.match(r"([a-z0-9!#$%&'*+.^_`|~-]+)\s*:(.*)", directive, re.DOTALL)
        if prefix and prefix[1] not in VALUED_DIRECTIVES:
            binds = prefix[1] in (agent, "*")
            directive = prefix[2].strip()
        if binds and directive in ROBOTS:
            return directive
    return ""


def _retry_after_s(value: str) -> float:
    """Delay of a Retry-After header in seconds; it holds a number or a date (RFC 9110, 10.2.3). 0 for other values."""
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _unpack(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo gzip or deflate, which some servers apply without a request, up to a size."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise SampleError("bad_encoding", f"Content-Encoding {printable(encoding)}, though none was requested")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by the header
    try:
        body = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise SampleError("bad_encoding", f"Content-Encoding {encoding}: {error}") from error
    if len(body) > max_bytes:
        raise SampleError(
            "too_large", f"the {encoding} body unpacks to more than {max_bytes} bytes ({FILE_SIZE_OPTION})"
        )
    if not inflater.eof:
        raise _MayPass("truncated", f"the {encoding} body ends early")
    return body


def _as_sample_error(error: Exception, allowance: _Allowance, url: str) -> SampleError:
    """The SampleError for an exception of the network."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    where, last = printable(url), printable(f"{type(chain[-1]).__name__}: {chain[-1]}")

    def holds(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if allowance.spent == "too_large":
        return SampleError("too_large", f"{where} sent more bytes than allowed around or instead of a body")
    is_timeout = holds(TimeoutError, ReadTimeoutError) or (holds(ConnectTimeoutError) and not holds(NewConnectionError))
    if is_timeout and (allowance.spent or allowance.over()):  # not tried again: it would block a thread several times
        return SampleError("too_slow", f"{where} took longer than {allowance.total_s:g} s")
    if is_timeout:
        return _MayPass("timeout", f"{where} was silent for {allowance.timeout_s:g} s")
    if holds(ssl.SSLError) and not holds(ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError):
        return SampleError("tls", f"{where}: {last}")
    if holds(IncompleteRead):
        return _MayPass("truncated", f"{where} sent less than it announced")
    if holds(OSError):
        return _MayPass("broken_connection", f"{where}: {last}")
    return SampleError("bad_answer", f"{where}: {last}")
