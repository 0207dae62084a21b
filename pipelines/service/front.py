"""The HTTP side of `restoray serve`: reads requests, refuses bad ones early, and answers with a picture or with JSON.

This module does not use Ray: `build_app` takes a backend with `health` and `restore`. HTTP statuses of errors:

    404, 405               unknown route, wrong method
    408 read_timeout       the body did not arrive in time
    413 too_large          the body exceeds max_bytes; its bytes are counted as they arrive
    415 unsupported_type   the content is not a picture, or its format is not supported
    422                    a bad parameter, a broken picture, or too many pixels
    500 failed, internal   the restoration or the service failed; its log has the error
    500 not_finite         the model made NaN or infinite values; its weights or its precision are wrong
    503 + Retry-After      the service is starting, restarting, busy or out of memory, or its setup failed, or the
                           request was cancelled
    504 deadline           the picture was not restored in time
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from components.images import Limits, limits_for_any_shape
from components.naming import did_you_mean, is_text, printable
from components.options import TEXTS, OptionCheck, UnknownOption
from components.overrides import read_word
from components.picture_files import MEDIA_TYPES, probe_file
from components.restoring import (
    CHOICES,
    KEEP,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    SIDES,
    Ask,
    Identity,
    parse_ask,
    picture_key,
    picture_seed,
)
from components.types import SampleError
from pipelines.restoration.routes import Choice, UnknownModel, choose

FORM_OVERHEAD = 64 << 10  # our choice; room for boundaries, part headers and a few short fields
MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARS  # UTF-8
MAX_FIELDS = 64  # our choice; no system has so many options
FILE_FIELDS = ("image", "reference")
MAX_ACCEPTED = 32  # ours: media types of a header that are read

PARAMETERS: Mapping[str, type] = {
    "key": str,  # the picture's name; default: the form's file name without suffix, or "picture"
    "model": str,  # name or digest of one of the models; default: the first
    "seed": int,  # the picture's seed; default: picture_seed(0, key), as in a batch job with seed 0
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(SIDES, int),
    "scale": float,
    **dict.fromkeys(CHOICES, str),
    "png_level": int,
    "format": str,  # of the answer; default: the first one of the header Accept that is written, else PNG
    "quality": int,
    "bits": int,
    "metadata": str,
    "icc": str,
}
"""Types of the parameters that every system takes. All other parameters are options of one system, which checks them
as in a batch job."""

STATUS: Mapping[str, int] = {
    "not_image": 415,
    "unsupported_format": 415,
    "failed": 500,
    "not_finite": 500,
    "out_of_memory": 503,
    "busy": 503,
    "starting": 503,
    "restarting": 503,
    "setup_failed": 503,
    "cancelled": 503,
}
"""HTTP status by reason code. Every other code gives 422: an error of the picture or the parameters."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """Limits of one request. The defaults are our choice.

    Attributes:
        max_bytes: largest body.
        max_input_pixels, max_output_pixels: largest width times height.
        max_queued: requests that may wait while the restorer works on one; further requests get 503.
        deadline_s: time from the end of the body to the answer.
        read_timeout_s: time for the body to arrive.
        retry_after_s: the Retry-After of a 503.
    """

    max_bytes: int = 32 << 20
    max_input_pixels: int = 25_000_000
    max_output_pixels: int = 25_000_000
    max_queued: int = 16
    deadline_s: float = 600.0
    read_timeout_s: float = 60.0
    retry_after_s: int = 5

    def of_picture(self) -> Limits:
        """The limits of an input picture."""
        return limits_for_any_shape(self.max_input_pixels, self.max_bytes)


class Answer(Protocol):
    """A picture and its format, or a reason code with a sentence; `code` is "" for a picture."""

    @property
    def picture(self) -> bytes: ...

    @property
    def format(self) -> str: ...

    @property
    def code(self) -> str: ...

    @property
    def detail(self) -> str: ...


class Backend(Protocol):
    """The restorer behind the app."""

    async def health(self) -> tuple[str, str]:
        """Return (state, detail); the service takes requests in state "READY"."""

    async def restore(self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes, model: str) -> Answer:
        """Restore one picture from its file's bytes, with the model of that digest; `reference` is b"" for none."""


class Refusal(Exception):
    """Ends a request with an HTTP status, a reason code and a sentence."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


def build_app(
    backend: Backend,
    identity: Identity,
    limits: ServeLimits,
    check: OptionCheck,
    choices: Sequence[Choice] = (),
) -> FastAPI:
    """The HTTP app.

    Args:
        backend: restores the pictures.
        identity: information about the model.
        limits: of one request.
        check: checks the options of the model's system.
        choices: the models that requests may name, the one above first; empty for that one alone.

    The app has no OpenAPI pages. They would be a second description of the parameters to keep up to date.
    """
    models = tuple(choices) or (Choice(identity=identity, check=check, names=(identity.name,)),)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def error_response(status: int, code: str, detail: str) -> JSONResponse:
        headers = {"Retry-After": str(limits.retry_after_s)} if status == 503 else {}
        return JSONResponse({"code": code, "detail": detail}, status_code=status, headers=headers)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "unknown_route", 405: "method_not_allowed"}
        return error_response(error.status_code, codes.get(error.status_code, "http"), str(error.detail))

    @app.exception_handler(Refusal)
    async def refusal(_: Request, error: Refusal) -> JSONResponse:
        return error_response(error.status, error.code, error.detail)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        state, detail = await backend.health()
        return JSONResponse({"state": state, "detail": detail}, status_code=200 if state == "READY" else 503)

    @app.api_route("/v1/model", methods=["GET", "HEAD"])
    async def model() -> dict[str, Any]:
        return {**asdict(identity), "limits": asdict(limits)}

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def list_models() -> dict[str, Any]:
        return {"models": [{**asdict(each.identity), "names": sorted(set(each.names))} for each in models]}

    @app.post("/v1/restore")
    async def restore(request: Request) -> Response:
        try:
            async with asyncio.timeout(limits.read_timeout_s):
                data, reference, parameters = await read_request(request, limits.max_bytes)
        except TimeoutError:
            raise Refusal(408, "read_timeout", f"the body did not arrive in {limits.read_timeout_s:g} s") from None
        except ClientDisconnect:
            return Response(status_code=499)  # the client has left, so only the access log shows this status
        chosen = read_model(parameters, models)
        if "format" not in parameters and (format := accepted_format(request.headers.get("accept", ""))):  # noqa: A001
            parameters["format"] = format
        key, seed, ask = read_parameters(parameters, limits, chosen.check, chosen.identity.own_scale)
        check_picture(data, ask, limits)
        if reference:
            check_picture(reference, None, limits)
        try:
            async with asyncio.timeout(limits.deadline_s):
                answer = await backend.restore(data, key, seed, ask, reference, chosen.identity.digest)
        except TimeoutError:
            raise Refusal(504, "deadline", f"not restored within {limits.deadline_s:g} s") from None
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("restoring failed")
            raise Refusal(500, "internal", "the service failed; see its log") from error
        if answer.code:
            status = STATUS.get(answer.code, 422)
            detail = answer.detail if status != 500 else "the picture could not be restored; see the service's log"
            if status == 500:
                log.error("restoring failed: %s", answer.detail.replace("\n", " "))
            raise Refusal(status, answer.code, detail)
        headers = {
            "X-Restoray-Seed": str(seed),
            "X-Restoray-Model": chosen.identity.digest,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return Response(answer.picture, media_type=MEDIA_TYPES[answer.format], headers=headers)

    return app


async def read_request(request: Request, max_bytes: int) -> tuple[bytes, bytes, dict[str, str]]:
    """Read a request with a raw or a form body: (picture bytes, reference bytes or b"", parameters as text).

    Raises:
        Refusal: the body is too large or of an unsupported type, the form is broken, or a parameter has two values.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes + FORM_OVERHEAD:
        raise _too_large(max_bytes)
    named_values = _query_values(request)
    reference = b""
    if content_type == "multipart/form-data":
        data, reference, fields = await _read_form(request, max_bytes)
        named_values += fields
    elif content_type in ("", "application/octet-stream") or content_type.startswith("image/"):
        data = b"".join([chunk async for chunk in _limited(request, max_bytes)])
    else:
        raise Refusal(415, "unsupported_type", f"send image/* or multipart/form-data, not {content_type[:80]!r}")
    parameters: dict[str, str] = {}
    for name, value in named_values:
        if parameters.setdefault(name, value) != value:
            raise Refusal(422, "bad_parameter", f"{name[:80]} has two values; send one")
    return data, reference, parameters


def _query_values(request: Request) -> list[tuple[str, str]]:
    """The parameters of a query; a Refusal for one that is not UTF-8, which Starlette would damage in silence."""
    query = request.scope["query_string"].decode("latin-1")
    pairs = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    for name, value in pairs:
        if not is_text(name + value):
            raise Refusal(422, "bad_parameter", f"{printable(name)[:80]} is not UTF-8 text: {printable(value)[:80]}")
    return pairs


class _FormParser(MultiPartParser):
    """A parser that also knows the encoded file names of some clients: filename*=UTF-8''caf%C3%A9.png (RFC 8187)."""

    def on_headers_finished(self) -> None:
        part = self._current_part
        encoded = re.search(rb";\s*filename\*\s*=\s*\"?utf-8'[^']*'([^;\s\"]+)", part.content_disposition or b"", re.I)
        if encoded is not None:
            kept = re.sub(rb";\s*filename\*?\s*=\s*(\"[^\"]*\"|[^;\s]*)", b"", part.content_disposition or b"")
            name = unquote_to_bytes(encoded[1]).replace(b"\\", b"\\\\").replace(b'"', b'\\"')
            part.content_disposition = kept + b'; filename="' + name + b'"'
        super().on_headers_finished()


async def _read_form(request: Request, max_bytes: int) -> tuple[bytes, bytes, list[tuple[str, str]]]:
    """Read a form with a file "image" and an optional file "reference".

    Returns:
        (picture bytes, reference bytes or b"", text fields). If no key was sent, the name of the file "image" is added
        as the key.
    """
    parser = _FormParser(
        request.headers,
        _limited(request, max_bytes + FORM_OVERHEAD),
        max_files=2,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(422, "bad_form", error.message) from error
    try:
        upload = form.get("image")
        if not isinstance(upload, UploadFile):
            raise Refusal(422, "no_image", 'the form has no file field "image"')
        data, reference_file = await upload.read(), form.get("reference")
        reference = await reference_file.read() if isinstance(reference_file, UploadFile) else b""
        files = [name for name, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(set(files)) < len(files) or not set(files) <= set(FILE_FIELDS):
            raise Refusal(422, "bad_form", f"a form may hold one file image and one file reference, not {files}"[:200])
        if "reference" in files and not reference:
            raise Refusal(422, "empty", "the reference is empty")
        if len(data) + len(reference) > max_bytes:
            raise _too_large(max_bytes)
        fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        name = (upload.filename or "").replace("\\", "/").rsplit("/", 1)[-1]
        for letter in '"\r\n':  # browsers escape these three and no others
            name = name.replace(f"%{ord(letter):02X}", letter)
        stem = PurePosixPath(name).stem
        if stem and "key" not in dict(fields) and "key" not in request.query_params:
            fields.append(("key", stem))
        return data, reference, fields
    finally:
        await form.close()


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's chunks; a Refusal once they exceed max_bytes. The Content-Length header may be wrong or absent."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> Refusal:
    return Refusal(413, "too_large", f"the body exceeds max_bytes, which is {max_bytes} (--max-megabytes)")


def accepted_format(header: str) -> str:
    """The format that a header Accept prefers among those that are written; "" for PNG and without a preference."""
    wishes = []
    for number, part in enumerate(header.split(",")[:MAX_ACCEPTED]):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        try:
            wishes.append((-float(weight), number, kind))
        except ValueError:
            continue
    names = {kind: name for name, kind in MEDIA_TYPES.items()} | dict.fromkeys(("image/*", "*/*"), "png")
    name = next((names[kind] for weight, _, kind in sorted(wishes) if kind in names and weight < 0), "png")
    return "" if name == "png" else name


def read_model(parameters: Mapping[str, str], choices: Sequence[Choice]) -> Choice:
    """The model that a request names. Raises Refusal: 422; the sentence suggests the nearest name."""
    try:
        return choose(parameters.get("model", ""), choices)
    except UnknownModel as error:
        raise Refusal(422, "unknown_model", str(error)) from error


def read_parameters(
    parameters: Mapping[str, str], limits: ServeLimits, check: OptionCheck, own_scale: float = 1.0
) -> tuple[str, int, Ask]:
    """Parse parameters given as text into (key, seed, ask); `ask` holds the validated prompts, size and options.

    The parameter "model" is read_model's.

    Raises:
        Refusal: 422; the sentence names the parameter.
    """
    values: dict[str, Any] = {}
    for name, text in parameters.items():
        if name == "model":
            continue
        values[name] = text if PARAMETERS.get(name) is str else read_word(text)
        is_keep = name == "scale" and values[name] == KEEP
        if PARAMETERS.get(name) in (int, float) and isinstance(values[name], str) and not is_keep:
            kind = f"a number, or {KEEP}" if name == "scale" else "a whole number"
            raise Refusal(422, "bad_parameter", f"{name} must be {kind}, got {text[:40]!r}")
    key = values.pop("key", "picture")
    key = picture_key(key)  # as a batch job makes it, with its folders
    seed = values.pop("seed", None)
    if seed is None:
        seed = picture_seed(0, key)
    if isinstance(seed, bool | float) or not 0 <= seed <= MAX_SEED:
        raise Refusal(422, "bad_parameter", f"seed must be a whole number from 0 to {MAX_SEED}, got {seed}")
    try:
        return key, seed, parse_ask(values, check, limits.max_output_pixels, own_scale)
    except UnknownOption as error:
        suggestion = did_you_mean(error.name, {*error.choices, *PARAMETERS})
        raise Refusal(422, "unknown_parameter", f"unknown parameter {error.name!r}. {suggestion}") from error
    except ValueError as error:
        raise Refusal(422, "bad_parameter", str(error)) from error


def check_picture(data: bytes, ask: Ask | None, limits: ServeLimits) -> None:
    """Check a picture's format and size from its header, before the picture takes a place in the queue.

    Args:
        ask: gives the size of the result, which is checked too; None for a reference picture.

    Raises:
        Refusal: 415, not a picture of a supported format; 422, broken or above a pixel limit, which the sentence names.
    """
    try:
        info = probe_file(data, limits.of_picture())
    except SampleError as error:
        detail = error.detail
        if error.code == "too_large" and "pixels" in detail:
            detail = f"{detail} (max_input_pixels)"
        code = "unsupported_type" if STATUS.get(error.code) == 415 else error.code
        raise Refusal(STATUS.get(error.code, 422), code, detail) from error
    try:
        if ask is not None:
            ask.output_size(info.height, info.width)
    except SampleError as error:
        hint = "; ask for a smaller width and height, or scale" if error.code == "too_large" else ""
        raise Refusal(422, error.code, f"{error.detail}{hint}") from error
