"""A client of the service: waits until the service is ready, posts pictures and checks the answers."""

from __future__ import annotations

import hashlib
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from components.images import PNG_LEVEL, encode_png
from components.picture_files import read_result_text
from components.pngs import PNG_SIGNATURE
from pipelines.core.errors import Failure

POLL_S = 0.2


class SetupFailed(Failure):
    """The service cannot load its model; waiting longer does not help."""


def wait_ready(url: str, timeout_s: float) -> None:
    """Poll /health until the state is READY.

    Raises:
        SetupFailed: the service cannot load its model.
        Failure: the service was not ready within `timeout_s`.
    """
    end, last = time.monotonic() + timeout_s, "no answer yet"
    while time.monotonic() < end:
        try:
            _, _, body = _exchange(f"{url}/health", timeout_s=10)
            answer = json.loads(body)
            if answer["state"] == "READY":
                return
            last = str(answer["detail"])
            if answer["state"] == "SETUP_FAILED":
                raise SetupFailed(last)
        except SetupFailed:
            raise
        except (Failure, ValueError, KeyError, TypeError):  # the proxy's own answers before the front runs
            pass
        time.sleep(POLL_S)
    raise Failure(f"the service was not ready after {timeout_s:g} s: {last}")


def check_service(
    url: str,
    picture_path: Path,
    expected_png: Path | bytes,
    timeout_s: float = 300.0,
    reference_path: Path | None = None,
) -> dict[str, float]:
    """Send a picture with the key, seed and options of a batch result; the service must return the same bytes.

    Args:
        url: the service's address.
        picture_path: the batch job's input.
        expected_png: the batch job's result.
        timeout_s: limit for the answer.
        reference_path: the batch job's reference of that picture; None without one.

    Returns:
        bytes and seconds of the answer.

    Raises:
        Failure: the service did not answer, answered with an error, or answered with other bytes.
    """
    expected = expected_png if isinstance(expected_png, bytes) else expected_png.read_bytes()
    text = read_result_text(expected)
    query = {"key": text["key"], "seed": text["seed"], **json.loads(text["options"])}
    query |= json.loads(text.get("file", "{}"))
    level = _png_level(expected, text) if expected.startswith(PNG_SIGNATURE) and "bits" not in query else PNG_LEVEL
    query |= {"png_level": level} if level != PNG_LEVEL else {}
    start_s = time.perf_counter()
    data, content_type = picture_path.read_bytes(), "application/octet-stream"
    if reference_path is not None:
        data, content_type = _form({"image": data, "reference": reference_path.read_bytes()})
    status, headers, body = post(f"{url}/v1/restore?{urllib.parse.urlencode(query)}", data, timeout_s, content_type)
    seconds = time.perf_counter() - start_s
    if status != 200:
        raise Failure(f"the service refused {picture_path.name}: {status} {body[:300].decode('utf-8', 'replace')}")
    if headers.get("X-Restoray-Model") != text["model_digest"]:
        raise Failure(f"the service runs model {headers.get('X-Restoray-Model')}, the batch ran {text['model_digest']}")
    if body != expected:
        raise Failure(f"the service's picture of {picture_path.name} differs from the batch job's")
    return {"bytes": float(len(body)), "seconds": seconds}


def _png_level(png: bytes, text: Mapping[str, str]) -> int:
    """The level that gives a restored picture's bytes again, which do not hold it; PNG_LEVEL if none does."""
    with Pillow.open(io.BytesIO(png)) as picture:
        image = np.asarray(picture)
    pixels = png[png.index(b"IDAT") :]  # chunks of metadata stand before them
    levels = (PNG_LEVEL, *range(10))
    return next((each for each in levels if encode_png(image, text, each).endswith(pixels)), PNG_LEVEL)


def post(
    url: str, body: bytes, timeout_s: float, content_type: str = "application/octet-stream"
) -> tuple[int, Message, bytes]:
    """POST a picture and return (status, headers, body), also for error statuses.

    The request does not go through proxies that the environment names.

    Raises:
        Failure: the service did not answer.
    """
    request = urllib.request.Request(url, data=body, headers={"Content-Type": content_type})
    return _exchange(request, timeout_s)


def _form(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """(body, content type) of a multipart form of files by field name."""
    boundary = hashlib.sha256(b"".join(files.values())).hexdigest()
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files.items()
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _exchange(request: urllib.request.Request | str, timeout_s: float) -> tuple[int, Message, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
    except OSError as error:  # URLError, timeouts and resets
        raise Failure(f"no answer from the service: {error}") from error
