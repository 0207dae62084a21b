"""The front alone: how names and texts of clients arrive."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from components.images import encode_png
from components.restoring import Ask, Identity
from components.synthetic import dead_leaves
from pipelines.core.pictures import make_keys
from pipelines.service.front import ServeLimits, build_app

PNG = encode_png(dead_leaves(32, 7, 0))
FORM = "multipart/form-data; boundary=M"


class Recorder:
    """A backend that keeps the key and the prompt of its last request."""

    key = prompt = model = ""

    async def health(self) -> tuple[str, str]:
        return "READY", ""

    async def restore(self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes, model: str) -> Any:
        self.model = model
        self.key, self.prompt = key, ask.prompt
        return SimpleNamespace(picture=PNG, format=ask.file.format, code="", detail="")


def post(
    query: str = "", body: bytes = PNG, kind: str = "image/png", accept: str = "*/*"
) -> tuple[httpx.Response, Recorder]:
    backend = Recorder()
    app = build_app(backend, Identity(name="a", system="a", recipe="a", digest="0" * 64), ServeLimits(), dict)

    async def exchange() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            return await client.post(
                f"/v1/restore{query}", content=body, headers={"Content-Type": kind, "Accept": accept}
            )

    return asyncio.run(exchange()), backend


def form(file_name: bytes, *fields: tuple[bytes, bytes]) -> bytes:
    parts = [(b'name="image"; ' + file_name, PNG), *((b'name="' + name + b'"', value) for name, value in fields)]
    heads = [b"--M\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + value for head, value in parts]
    return b"\r\n".join([*heads, b"--M--\r\n"])


@pytest.mark.parametrize(
    ("file_name", "picture"),
    [
        (b"filename*=UTF-8''caf%C3%A9%20%22.png", 'café ".png'),
        (b"filename=\"caf%C3%A9.png\"; filename*=utf-8''caf%C3%A9.png", "café.png"),
        ('filename="cafe\u0301.png"'.encode(), "café.png"),
        (b'filename="a%22b%0D%0Ac.png"', 'a"b\r\nc.png'),
        (b'filename="a\\"b.png"', 'a"b.png'),
        (b'filename="photo."', "photo."),
        (b'filename="image.jpg?w=200"', "image.jpg?w=200"),
        (b'filename="C:\\fakepath\\x y.png"', "x y.png"),
    ],
)
def test_the_name_of_an_upload_gives_the_key_of_a_batch_job(file_name: bytes, picture: str) -> None:
    answer, backend = post(body=form(file_name), kind=FORM)
    assert (answer.status_code, backend.key) == (200, make_keys([picture])[0])


@pytest.mark.parametrize("key", ["sub/cafe\u0301", "sub/x:y", "../sub/b", "sub/.b", "a\\b"])
def test_a_key_with_folders_is_made_as_in_a_batch_job(key: str) -> None:
    answer, backend = post(f"?{httpx.QueryParams({'key': key})}")
    assert (answer.status_code, backend.key) == (200, make_keys([f"{key}.png"])[0])


@pytest.mark.parametrize("query", ["?prompt=caf%E9", "?key=caf%E9", "?prompt=a&negative_prompt=%FF"])
def test_a_query_that_is_not_utf8_is_refused_by_name(query: str) -> None:
    answer, _ = post(query)
    name = query.rpartition("=")[0].rpartition("&")[2].lstrip("?")
    assert answer.status_code == 422 and answer.json()["code"] == "bad_parameter"
    assert answer.json()["detail"].startswith(f"{name} is not UTF-8 text: ")


def test_a_forms_line_breaks_are_those_of_the_command_line() -> None:
    answer, backend = post(body=form(b'filename="a.png"', (b"prompt", b"a cat\r\non a mat #1: [x]")), kind=FORM)
    assert (answer.status_code, backend.prompt) == (200, "a cat\non a mat #1: [x]")


def test_the_format_comes_from_the_parameter_or_else_from_the_header() -> None:
    for query, accept, expected in (
        ("", "*/*", "image/png"),
        ("", "image/webp", "image/webp"),
        ("?format=avif", "image/webp", "image/avif"),
        ("?format=tiff&bits=16&metadata=none&icc=keep", "*/*", "image/tiff"),
    ):
        assert post(query, accept=accept)[0].headers["content-type"] == expected
    answer, _ = post("?format=jpeg&bits=16")
    assert answer.status_code == 422 and "bits=16 needs format=png or format=tiff" in answer.json()["detail"]
