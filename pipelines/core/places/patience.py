"""What a store's error means, and waiting for a store that fails for a while: backoff with full jitter, for a minute.

The packages of stores have errors of many classes, often without a common base; so names and status codes decide.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from components.secrets import scrubbed
from pipelines.core.errors import Failure, RestorayError, RetryLater, first_line

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a failing store is waited for, counted from the first failure. Ours."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
MAX_REASON_CHARS = 300  # stores answer with whole pages

TEMPORARY_CODES = frozenset(
    {
        *("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException"),
        *("RequestLimitExceeded", "TooManyRequests", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"),
        *("OperationAborted", "ConditionalRequestConflict"),
    }
)
"""S3 codes after which the same request may succeed: the server is busy, or a cut request arrived."""

TEMPORARY_CLASSES = frozenset(
    {
        *("HTTPClientError", "ResponseParserError", "ClientConnectionError", "ClientPayloadError", "IncompleteRead"),
        *("ServerDisconnectedError", "FSTimeoutError", "TimeoutError", "ConnectionError", "ProtocolError", "HttpError"),
        *("IncompleteReadError", "ServiceRequestError", "ServiceResponseError", "ResponseStreamingError"),
    }
)
"""Classes of errors, anywhere among an error's bases, that stand for a broken or slow connection."""

FINAL_CLASSES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

TEMPORARY_NUMBERS = frozenset(
    {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE}
)


class StoreUnavailable(RetryLater):
    """A store failed for longer than PATIENCE_S; the same command continues the work later."""


class Refusal(OSError):
    """A store's last word on a request, with one sentence; `filename` is the address."""


def code_of(error: BaseException) -> tuple[str, int]:
    """(code, HTTP status) in the answer of an S3 server that an error came from; ("", 0) for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status or 0)
        seen = seen.__cause__
    return "", 0


def is_temporary(error: Exception) -> bool:
    """Whether the same request may succeed after a while."""
    code, status = code_of(error)
    if code or status:
        return code in TEMPORARY_CODES or status >= 500 or status in (408, 429)
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if {base.__name__ for base in type(error).__mro__} & TEMPORARY_CLASSES:
        return True
    return isinstance(error, OSError) and error.errno in TEMPORARY_NUMBERS


def is_conflict(error: Exception) -> bool:
    """Whether a conditional write was refused because its condition does not hold."""
    return isinstance(error, FileExistsError) or code_of(error)[0] in ("PreconditionFailed", "412")


def patiently(action: Callable[[], T], address: str, storage: Mapping[str, Any], patience_s: float | None = None) -> T:
    """Call `action` until it succeeds, its error is no temporary one, or the store has failed for too long.

    Args:
        action: may run several times.
        address: for the sentences.
        storage: options of the store; their secrets are in no sentence.
        patience_s: replaces PATIENCE_S.

    Raises:
        StoreUnavailable: the store failed for too long.
        FileNotFoundError, FileExistsError, PermissionError: what they say; `filename` is the address.
        Refusal: any other answer that another try would not change.
        Failure: the request cannot be sent: no credentials, a wrong option.
    """
    first_failure = None
    pause = FIRST_PAUSE_S
    while True:
        try:
            return action()
        except RestorayError:
            raise
        except Exception as error:  # noqa: BLE001 - the packages of stores have errors of many classes
            now = time.monotonic()
            first_failure = first_failure or now
            limit = PATIENCE_S if patience_s is None else patience_s
            if not is_temporary(error):
                raise _last_word(error, address, storage) from None  # a cause would repeat secrets
            if now - first_failure + pause > limit:
                reason = _reason(error, storage)
                raise StoreUnavailable(
                    f"{address}: the store has failed for {now - first_failure:.0f} s ({reason}); "
                    "the same command continues when it answers again."
                ) from None
        time.sleep(random.uniform(0, pause))  # jitter; no result depends on it
        pause = min(LONGEST_PAUSE_S, 2 * pause)


def _last_word(error: Exception, address: str, storage: Mapping[str, Any]) -> Exception:
    code, status = code_of(error)
    if code == "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, "the bucket does not exist", address)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(errno.ENOENT, "does not exist", address)
    if is_conflict(error):
        return FileExistsError(errno.EEXIST, "exists already, or was changed meanwhile", address)
    if isinstance(error, PermissionError) or status in (401, 403):
        reason = _reason(error, storage)
        return PermissionError(errno.EACCES, f"the store refuses access ({reason})", address)
    if isinstance(error, OSError):
        return Refusal(error.errno or errno.EIO, f"the store refuses the request ({_reason(error, storage)})", address)
    return Failure(f"{address} cannot be used: {type(error).__name__}: {_reason(error, storage)}.")


def _reason(error: Exception, storage: Mapping[str, Any]) -> str:
    text = getattr(error, "strerror", None) or first_line(error)
    code, _ = code_of(error)
    text = f"{code}: {text}" if code and code not in text else text
    return scrubbed(text, storage)[:MAX_REASON_CHARS].rstrip(".")
