"""Parse urls, and decide which addresses are public and may be requested.

This module parses a url once, and all other code uses the parts: two parsers that disagree would be a way around the
checks. Errors are SampleErrors with the codes of fetch.py. Numbers without a source are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urljoin

from urllib3.util import parse_url

from components.types import SampleError

Address = IPv4Address | IPv6Address

SHOWN_CHARACTERS = 200  # largest length of a stranger's text in an error
REFUSED_IPV4 = (  # ranges that Python 3.11's ipaddress counts as global
    ip_network("192.0.0.0/24"),  # IETF protocol assignments; Oracle's metadata
    ip_network("192.88.99.0/24"),  # RFC 7526: retired 6to4 relays
    ip_network("168.63.129.16/32"),  # Azure's host agent, on a public number
)
GLOBAL_IPV6 = IPv6Network("2000::/3")  # IANA's registry: the only global unicast range so far
REFUSED_IPV6 = (IPv6Network("3fff::/20"),)  # RFC 9637: documentation
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are the IPv4 address


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parsed url: `host` without brackets and trailing dot, `path` as in the request line."""

    url: str
    scheme: str
    host: str
    port: int
    path: str
    host_header: str


def parse_target(url: str) -> Target:
    """Parse a url, once for every later use; SampleError bad_url, bad_scheme or private_address."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", url)
    if scheme is None:
        raise SampleError("bad_url", f"{printable(url)} names no scheme")
    if scheme[0].lower() not in ("http", "https"):
        raise SampleError("bad_scheme", f"{printable(scheme[0])}: is neither http nor https")
    try:
        parsed = parse_url(url)
    except ValueError as error:
        raise SampleError("bad_url", f"{printable(url)} cannot be parsed") from error
    if not parsed.host or not parsed.scheme:
        raise SampleError("bad_url", f"{printable(url)} names no host")
    if parsed.auth is not None:
        raise SampleError("bad_url", f"the address of {printable(parsed.host)} carries a user name or password")
    host = parsed.host.strip("[]").rstrip(".")
    if re.fullmatch(r"\d+|0x[0-9a-f]*", host.rpartition(".")[2]):  # "ends in a number": the URL standard, 3.5
        try:
            IPv4Address(host)
        except ValueError as error:
            raise SampleError(
                "private_address", f"{printable(host)} is a number, and not an IPv4 address in its usual form"
            ) from error
    default = 443 if parsed.scheme == "https" else 80
    shown_host = f"[{host.partition('%')[0]}]" if ":" in host else host
    return Target(
        url=parsed._replace(fragment=None).url,
        scheme=parsed.scheme,
        host=host,
        port=default if parsed.port is None else parsed.port,
        path=parsed.request_uri,
        host_header=shown_host if parsed.port in (None, default) else f"{shown_host}:{parsed.port}",
    )


def join_redirect(base: str, location: str) -> str:
    """The target of a redirect with a relative or an absolute location."""
    try:
        return urljoin(base, _as_utf8(location))
    except ValueError as error:
        raise SampleError("bad_url", f"redirect to {printable(location)}, which cannot be parsed") from error


def _as_utf8(header: str) -> str:
    """A header that the library decoded as Latin-1, decoded as UTF-8, which servers use."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def is_public(address: Address) -> bool:
    """Whether an address is global unicast; an IPv4 address inside an IPv6 one counts."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in GLOBAL_IPV6 or any(address in network for network in REFUSED_IPV6):
            return False
    elif any(address in network for network in REFUSED_IPV4):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def canonical(host: str) -> str:
    """The canonical spelling of a host or an address."""
    bare = host.strip().strip("[]").rstrip(".").lower()
    try:
        return str(ip_address(bare))
    except ValueError:
        return bare


def printable(text: str) -> str:
    """A stranger's text for an error: one line of ASCII of at most SHOWN_CHARACTERS."""
    plain = ascii(text)[1:-1]
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[:SHOWN_CHARACTERS] + "..."
