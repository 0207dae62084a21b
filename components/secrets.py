"""Secrets in a store's options: what may be written to files and messages, and what may not. Standard library only.

An option is written only if its name is one of PLAIN_NAMES, or if it is a number, true or false under a name that does
not sound secret. Of all others only the name is written. Stores have many options, and a new one is secret until we
know better.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "<secret, not stored>"
"""Stands in files for the value of a secret."""

PLAIN_NAMES = frozenset(
    (
        "endpoint",
        "endpoint_url",
        "endpoint_override",
        "region",
        "region_name",
        "project",
        "account_name",
        "host",
        "hostname",
        "protocol",
        "profile",
        "cache_type",
        "default_cache_type",
        "version",
        "signature_version",
        "addressing_style",
        "repo_type",
        "revision",
        "acl",
        "default_acl",
        "access",
        "consistency",
        "target_protocol",
        "encoding",
        "compression",
        "fs",
        "mode",
        "verify",
    )
)
"""Options whose texts may be written, if they hold no password and no signature."""

_SECRET_NAME = re.compile(
    r"key|secret|token|passw|pwd|passphrase|passcode|credential|auth|sas|signature$|sig$|cookie|header|connection"
    r"|conn_str|cert|private|user|login|session|bearer|identity|ticket|otp$|(?:^|_)pin$",
    re.IGNORECASE,
)
_PASSWORD = re.compile(
    r"(?<!github)://(?:[^/?#\s@]*:[^/?#\s]*@"  # "github://owner:repository@branch" holds none
    r"|(?!\[)[^/?#\s@:]*:(?!\d{1,5}(?:[/?#]|$))[^\s@]{0,200}@)"  # "/", "?" or "#" as typed; "host:9000/a@b" has a port
    r"|(?<=github)://[^/?#\s@]*@(?=[^/?#\s@]*:[^/?#\s@]*@)"
)
_USER = re.compile(  # a token alone is often typed as the user
    r"(?i)(?<![a-z])((?:https?|s3[an]?|gc?s|r2|b2|oss|cosn?|minio|webdavs?|davs?)://)[^/?#\s@]+@"
)
_SIGNATURE = re.compile(
    r"(?i)((?:^|[?&;#])(?:sig|x-amz-[\w-]+|x-goog-[\w-]+|se|skoid|pass|passwd|pwd|auth|authorization|session|sas|sid|hmac|"
    r"hdn\w*|policy|key-pair-id|googleaccessid|sharedaccesssignature|"
    r"[\w.\[-]*(?:token|secret|signature|password|passphrase|passcode|credentials?|key|key-?id|auth|jwt|cookie|bearer|"
    r"session_?id|sessid)[\]_]*)=)[^&;\s]*"
)
_HEADER = re.compile(
    r"(?i)(\b(?:proxy-)?authorization\b[\"']?\s*[:=]\s*[\"']?(?:(?:basic|bearer|digest|token)\s+)?)[^\s\"',;}]+"
)
_CREDENTIAL = re.compile(r"(?i)(\b(?:basic|bearer)\s+)(?=[\w+/.~-]*[\d=])[\w+/=.~-]{8,}")
_VARIABLE = re.compile(
    r"(?i)token|secret|passw|pwd$|passphrase|credential|(?:api|access|account|private|storage)_?key|sas$|connection_string"
)
MIN_VARIABLE_CHARS = 8
"""Shorter values of environment variables are not searched in messages."""

MIN_CHARS = 3
"""Shorter secrets are not searched in messages: they are part of many words."""


def is_text_option(name: str) -> bool:
    """Whether a store's option is a text, so that digits in it are no number."""
    return name in PLAIN_NAMES or _SECRET_NAME.search(name) is not None


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable sounds secret."""
    return _VARIABLE.search(name) is not None


def holds_secret(text: str) -> bool:
    """Whether an address holds a user name, a password or a signature."""
    return without_secrets(text) != text


def without_secrets(text: str) -> str:
    """An address, or a text with addresses, without user names, passwords and signatures."""
    return _SIGNATURE.sub(lambda match: f"{match[1]}...", without_user(text))


def without_user(text: str) -> str:
    """An address, or a text with addresses, without user names and passwords before the host."""
    return _USER.sub(r"\1...@", _PASSWORD.sub("://...@", text))


def redacted(storage: Mapping[str, Any]) -> dict[str, Any]:
    """A store's options with HIDDEN in the place of each secret."""
    return {name: _redacted(name, value, False) for name, value in storage.items()}


def public(storage: Mapping[str, Any]) -> dict[str, Any]:
    """A store's options without the secrets: what decides its content, whoever reads it."""
    return _without_hidden(redacted(storage))


def usable(storage: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a saved file without those that were not stored: the store then looks into the environment."""
    return _without_hidden(storage)


def hidden_names(storage: Mapping[str, Any]) -> list[str]:
    """Names of the options that were not stored."""
    return [name for name, value in storage.items() if _is_hidden(value)]


def scrubbed(text: str, storage: Mapping[str, Any]) -> str:
    """A message without the secrets of a store's options and of the environment, of addresses and headers in it."""
    for value in sorted({*_secrets(storage), *_variables()}, key=len, reverse=True):
        for form in sorted(_forms(value), key=len, reverse=True):
            text = text.replace(form, "...")
    return without_secrets(_CREDENTIAL.sub(r"\1...", _HEADER.sub(r"\1...", text)))


def _forms(value: str) -> set[str]:
    """How a text may appear in a message: as it is, in an address, as a literal, in JSON, XML or a header."""
    data = value.encode(errors="surrogatepass")
    addresses = {quote(data), quote(data, safe=""), quote_plus(data)}
    literals = {repr(value)[1:-1], ascii(value)[1:-1], repr(data)[2:-1]}
    documents = {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    documents |= {escape(value), escape(value, quote=False)}
    return {value, *addresses, *literals, *documents, b64encode(data).decode()}


def _variables() -> Iterator[str]:
    """Secrets in environment variables, which stores use without options. A path to a file is none."""
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value) >= MIN_VARIABLE_CHARS and not os.path.exists(value):
            yield value


def _redacted(name: str, value: Any, inside: bool) -> Any:
    secret = inside or (_SECRET_NAME.search(name) is not None and name not in PLAIN_NAMES)
    if isinstance(value, Mapping):
        return {inner: _redacted(str(inner), entry, secret) for inner, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(name, entry, secret) for entry in value]
    if value is None or (not secret and isinstance(value, bool | int | float)):
        return value
    has_secret = any(sign in str(value) for sign in "@?") or holds_secret(str(value))  # an endpoint has no query
    is_plain = not secret and name in PLAIN_NAMES and not has_secret
    return value if is_plain else HIDDEN


def _without_hidden(storage: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _keep(value) for name, value in storage.items() if not _is_hidden(value)}


def _keep(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_hidden(value)
    return [_keep(entry) for entry in value if not _is_hidden(entry)] if isinstance(value, list | tuple) else value


def _is_hidden(value: Any) -> bool:
    """Whether nothing of a value is left."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_hidden, value.values()))
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_hidden, value))
    return isinstance(value, str) and value == HIDDEN


def _secrets(storage: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a store's options that may not be shown."""
    for (name, value), shown in zip(storage.items(), redacted(storage).values(), strict=True):
        yield from _hidden_texts(str(name), value, shown)


def _hidden_texts(name: str, value: Any, shown: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner, entry in value.items():
            yield from _hidden_texts(str(inner), entry, shown[inner])
    elif isinstance(value, list | tuple):
        for entry, shown_entry in zip(value, shown, strict=True):
            yield from _hidden_texts(name, entry, shown_entry)
    elif shown == HIDDEN and value != HIDDEN and len(str(value)) >= MIN_CHARS:
        yield str(value)
        yield from re.findall(r"(?i)(?:password|pwd|key|sig|signature|token)=([^;]{3,})", str(value))
        yield from re.findall(r"(?i)^(?:bearer|basic|token|digest) +(.{3,})$", str(value))
        if "://" in str(value):
            yield from (part for part in re.split(r"[:@/]+", str(value).partition("://")[2].rpartition("@")[0]) if part)
