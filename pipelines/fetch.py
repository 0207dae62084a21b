"""Fetching pictures by address, from servers that nobody vouches for.

An address from a list of millions is hostile until shown otherwise: it may point into our own network, change its mind
between check and connection, redirect, never end, or lie about its length. So:

    - names are resolved here; every address that a name has must be public, and the connection goes to the address
      that was checked, never to a second answer of the resolver. TLS is verified against the name
    - redirects are followed here, and every hop is checked as the first
    - one try has a limit of time and one of bytes, both counted at the socket, so that a drip or a flood in headers,
      chunk sizes or trailers ends as well
    - no proxy, cookie or password is ever used, whatever the environment says

`Fetcher.fetch` raises SampleError with one of these codes, and nothing else:

    bad_url             cannot be parsed, has no host, or carries a user name
    bad_scheme          neither http nor https
    private_address     loopback, private, link-local, metadata, multicast, reserved, an IPv6 form of these, or a number
                        in another form than four decimals
    unresolved *        the name has no address
    broken_connection * refused, reset, or closed before an answer
    timeout *           no connection, or no byte, for DownloadSpec.timeout_s
    too_slow *          one try took longer than DownloadSpec.total_s
    tls                 the certificate or the handshake is bad
    bad_answer          no HTTP, or more headers than a client can bear
    too_many_redirects  more hops than DownloadSpec.max_redirects
    http_error          a final status: 404, 410, any other 4xx
    http_busy *         429 or 5xx until the tries were used up
    truncated *         less than Content-Length or the chunks promised
    too_large           more bytes than allowed, announced, streamed or unpacked
    bad_encoding        a Content-Encoding that we did not ask for and cannot undo
    robots              the answer's X-Robots-Tag forbids the use
    empty, not_image, unsupported_format    as components.images.sniff

Those with a star are in TRANSIENT. What an address may be is settled in pipelines.addresses. Numbers without a source
are ours.
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

from components.corpora import DownloadSpec
from components.images import sniff
from components.randomness import generator
from components.types import SampleError
from pipelines.addresses import Address, Target, canonical, is_public, joined, parse_target, shown

TRANSIENT: frozenset[str] = frozenset(
    {"unresolved", "broken_connection", "timeout", "too_slow", "http_busy", "truncated"}
)
"""Codes that another try, later, may cure: a replay of the quarantine takes these by default."""

ROBOTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives that forbid: img2dataset's four, and "none", which Google's specification defines as noindex, nofollow."""

BACKOFF_S = 0.5  # before the second try; doubles with every further one
LONGEST_WAIT_S = 60.0  # whatever Retry-After asks for
ADDRESSES_TRIED = 4  # of one name; all of them are checked
BLOCK_BYTES = 1 << 16
WIRE_FACTOR, WIRE_SLACK_BYTES = 2, 1 << 20  # of the limit of the body: room for headers, chunk sizes and redirects
REDIRECTS = (301, 302, 303, 307, 308)
VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")

Resolve = Callable[..., Iterable[tuple[Any, ...]]]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A picture file that arrived whole.

    Attributes:
        data: the file; its signature is of a format that we decode.
        url: the final address, after redirects.
        status: of the final answer.
        tries: how many it took, 1 where the first went well.
    """

    data: bytes
    url: str
    status: int
    tries: int


def fetch_many(fetcher: Fetcher, items: Sequence[tuple[str, str]]) -> Iterator[Fetched | SampleError]:
    """Fetch (key, address) pairs, `rules.threads` at a time; results and errors come in the given order.

    At most 2 * threads results are under way or waiting for their turn, so memory is bounded by that number times the
    limit of bytes. An address that stands several times within this window is fetched once. Whoever stops iterating
    cancels what has not begun.
    """
    threads = fetcher.rules.threads
    window: deque[tuple[str, str]] = deque()
    wanted: Counter[str] = Counter()
    futures: dict[str, Future[Fetched | SampleError]] = {}
    rest = iter(items)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
    try:
        while True:
            while len(window) < 2 * threads and (item := next(rest, None)) is not None:
                window.append(item)
                wanted[item[1]] += 1
                if item[1] not in futures:
                    futures[item[1]] = executor.submit(_fetched_or_error, fetcher, item[1])
            if not window:
                return
            key, url = window.popleft()
            result = futures[url].result()
            wanted[url] -= 1
            if not wanted[url]:
                del futures[url], wanted[url]
            yield SampleError(result.code, result.detail, key) if isinstance(result, SampleError) else result
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Fetches addresses under one set of rules; a context manager, and safe to use from many threads.

    Connections are kept and used again, by name and checked address.

    Args:
        rules: timeouts, tries, who may be private.
        max_bytes: of one file.
        resolve: as socket.getaddrinfo; for tests.
        sleep: as time.sleep; for tests.

    Raises:
        ValueError: a user agent that no header can hold.
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
        """Close what connections are kept."""
        self._pools.clear()

    @cached_property
    def _trust(self) -> ssl.SSLContext:
        """The system's authorities, or those of SSL_CERT_FILE; reading them takes a while."""
        return ssl.create_default_context()

    def fetch(self, url: str, key: str = "") -> Fetched:
        """Fetch one picture, trying again where that may help.

        Waits between tries are exponential, with a jitter that depends on the address alone; a server that names a
        delay in Retry-After gets it, up to a minute.

        Args:
            url: http or https.
            key: the sample's name, for the error.

        Raises:
            SampleError: with a code from the top of this file; never anything else.
        """
        for tries in range(1, self.rules.attempts + 1):
            try:
                data, final, status = self._try(url.strip())
                return Fetched(data=data, url=final, status=status, tries=tries)
            except SampleError as error:
                if not isinstance(error, _MayPass) or tries == self.rules.attempts:
                    told = f"{error.detail} (try {tries} of {self.rules.attempts})" if tries > 1 else error.detail
                    raise SampleError(error.code, told, key) from error.__cause__
                jitter = generator(0, "fetch", ascii(url), tries).uniform(0.5, 1.5)
                wait = max(error.after_s, BACKOFF_S * 2 ** (tries - 1) * jitter)
            self._sleep(min(wait, LONGEST_WAIT_S))
        raise AssertionError("DownloadSpec.attempts is at least 1")

    def _try(self, url: str) -> tuple[bytes, str, int]:
        """One try with all its hops: (file, final address, status)."""
        allowance = _Allowance(self.rules, WIRE_FACTOR * self.max_bytes + WIRE_SLACK_BYTES)
        token = _ALLOWANCE.set(allowance)
        try:
            for _ in range(self.rules.max_redirects + 1):
                target = parse_target(url)
                answer = self._ask(target, self._checked_addresses(target), allowance)
                try:
                    location = answer.headers.get("location")
                    if answer.status in REDIRECTS and location:
                        url = joined(target.url, location)
                        continue
                    self._refuse_by_headers(target, answer)
                    return self._picture(answer), target.url, answer.status
                finally:
                    answer.close()  # ends the connection, unless the body was read to its end
                    answer.release_conn()
            raise SampleError("too_many_redirects", f"more than {self.rules.max_redirects} hops, next {shown(url)}")
        except SampleError:
            raise
        except Exception as error:  # hostile bytes make HTTP and TLS libraries raise nearly any kind
            raise _as_sample_error(error, allowance, url) from error
        finally:
            _ALLOWANCE.reset(token)

    def _checked_addresses(self, target: Target) -> list[Address]:
        """What the name stands for; SampleError where one address of it is not public and not allowed."""
        try:
            addresses = [ip_address(target.host)]
        except ValueError:
            addresses = self._resolved(target)
        if canonical(target.host) not in self._allowed:
            for address in addresses:
                if not is_public(address) and str(address) not in self._allowed:
                    where = f"{target.host} is at {address}" if str(address) != target.host else target.host
                    raise SampleError("private_address", f"{where}, which is no public address")
        return addresses

    def _resolved(self, target: Target) -> list[Address]:
        """Ask the resolver, once; in its order, without repeats."""
        try:
            found = self._resolve(target.host, target.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # an empty label, or one above 63 characters
            raise SampleError("bad_url", f"{shown(target.host)} is no host name") from error
        except OSError as error:
            kind = _MayPass if error.errno == socket.EAI_AGAIN else SampleError
            raise kind("unresolved", f"{shown(target.host)}: {shown(str(error))}") from error
        addresses = list(dict.fromkeys(ip_address(entry[4][0]) for entry in found))
        if not addresses:
            raise SampleError("unresolved", f"{shown(target.host)} has no address")
        return addresses

    def _ask(self, target: Target, addresses: list[Address], allowance: _Allowance) -> BaseHTTPResponse:
        """Connect to the first address that listens, and read the headers of its answer."""
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
                except ConnectTimeoutError:  # refused connections too: urllib3 derives them from this
                    if address == addresses[:ADDRESSES_TRIED][-1]:
                        raise
                except ProtocolError:  # a kept connection may have been closed meanwhile, which is nobody's failure
                    if allowance.fresh:
                        raise
        raise AssertionError("a checked target has an address")

    def _refuse_by_headers(self, target: Target, answer: BaseHTTPResponse) -> None:
        """Status, robots directives and announced length; SampleError where one of them rules the body out."""
        told = f"{shown(target.url)} answered {answer.status}"
        if answer.status == 429 or 500 <= answer.status < 600:
            raise _MayPass("http_busy", told, after_s=_retry_after_s(answer.headers.get("retry-after", "")))
        if not 200 <= answer.status < 300 or answer.status == 206:  # we never ask for a part
            raise SampleError("http_error", told)
        if self.rules.obey_robots:
            for value in answer.headers.getlist("x-robots-tag"):
                if directive := _forbidding_directive(value, self._agent):
                    raise SampleError("robots", f"{shown(target.url)} asks for {directive} in X-Robots-Tag")
        announced = getattr(answer, "length_remaining", None)
        if announced is not None and announced > self.max_bytes:
            raise SampleError("too_large", f"{announced} bytes announced, {self.max_bytes} are allowed")

    def _picture(self, answer: BaseHTTPResponse) -> bytes:
        """The whole body, which must be a picture."""
        data = bytearray()
        while block := answer.read1(BLOCK_BYTES):  # one receive at a time, so that limits are looked at in between
            data += block
            if len(data) > self.max_bytes:
                raise SampleError("too_large", f"the body exceeds {self.max_bytes} bytes")
        body = bytes(data)
        try:
            sniff(body)
            return body  # a picture already, whatever Content-Encoding says: object stores hand out stray ones
        except SampleError as error:
            encoding = answer.headers.get("content-encoding", "").strip().lower()
            if error.code != "not_image" or encoding in ("", "identity"):
                raise
        body = _unpacked(body, encoding, self.max_bytes)
        sniff(body)
        return body


class _MayPass(SampleError):
    """A failure that the next try may not meet; `after_s` is the delay that the server asks for."""

    def __init__(self, code: str, detail: str, key: str = "", after_s: float = 0.0) -> None:
        super().__init__(code, detail, key)
        self.after_s = after_s


class _Allowance:
    """What one try may still take, in seconds and in bytes off the socket.

    `spent` is the code once something is gone; `fresh` says whether the last request went over a new connection.
    """

    def __init__(self, rules: DownloadSpec, n_bytes: int) -> None:
        self.timeout_s, self.total_s, self.n_bytes = rules.timeout_s, rules.total_s, n_bytes
        self.spent, self.fresh = "", True
        self._end = time.monotonic() + rules.total_s

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self._end

    def next_wait_s(self) -> float:
        """How long the next wait may last."""
        left = self._end - time.monotonic()
        if left <= 0:
            self.spent = "too_slow"
            raise TimeoutError("the time of this try is over")
        return min(self.timeout_s, left)

    def take(self, n_bytes: int) -> None:
        """Account for bytes that arrived."""
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            self.spent = "too_large"
            raise OSError("the bytes of this try are used up")


_ALLOWANCE: ContextVar[_Allowance] = ContextVar("allowance of the try that runs in this thread")


class _MeteredReader(io.RawIOBase):
    """A socket's bytes; every receive waits only for what the allowance leaves, and is accounted for."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, allowance: _Allowance) -> None:
        self._raw, self._sock, self._allowance = raw, sock, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._allowance.next_wait_s())
        received = self._raw.readinto(buffer)
        self._allowance.take(received or 0)
        return received

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _MeteredResponse(HTTPResponse):
    """The standard library's response, reading through `_MeteredReader`."""

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
    """Log filter: what happens within a try is told by its SampleError, not by a traceback for each odd header."""
    return _ALLOWANCE.get(None) is None


def _fetched_or_error(fetcher: Fetcher, url: str) -> Fetched | SampleError:
    try:
        return fetcher.fetch(url)
    except SampleError as error:
        return error


def _forbidding_directive(value: str, agent: str) -> str:
    """The first directive of an X-Robots-Tag header that forbids, "" where none does.

    "agent: directive, directive" binds the agent named, until the next such prefix; without one it binds everybody.
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
    """Seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); 0 where it says nothing."""
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _unpacked(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo gzip or deflate, which some servers apply unasked, up to a size."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise SampleError("bad_encoding", f"Content-Encoding {shown(encoding)}, though none was asked for")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: gzip or zlib, by the header
    try:
        unpacked = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise SampleError("bad_encoding", f"Content-Encoding {encoding}: {error}") from error
    if len(unpacked) > max_bytes:
        raise SampleError("too_large", f"the {encoding} body unpacks to more than {max_bytes} bytes")
    if not inflater.eof:
        raise _MayPass("truncated", f"the {encoding} body ends early")
    return unpacked


def _as_sample_error(error: Exception, allowance: _Allowance, url: str) -> SampleError:
    """What an exception of the network means."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    where, last = shown(url), shown(f"{type(chain[-1]).__name__}: {chain[-1]}")

    def holds(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if allowance.spent == "too_large":
        return SampleError("too_large", f"{where} sent more bytes than allowed around or instead of a body")
    silent = holds(TimeoutError, ReadTimeoutError) or (holds(ConnectTimeoutError) and not holds(NewConnectionError))
    if silent and (allowance.spent or allowance.over()):
        return SampleError("too_slow", f"{where} took longer than {allowance.total_s:g} s")  # four drips bind a thread
    if silent:
        return _MayPass("timeout", f"{where} was silent for {allowance.timeout_s:g} s")
    if holds(ssl.SSLError) and not holds(ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError):
        return SampleError("tls", f"{where}: {last}")
    if holds(IncompleteRead):
        return _MayPass("truncated", f"{where} sent less than it promised")
    if holds(OSError):
        return _MayPass("broken_connection", f"{where}: {last}")
    return SampleError("bad_answer", f"{where}: {last}")
