"""A replica in this process: memory that does not come back, a picture that hangs, an encoder that fails, addresses."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from helper_modules import load_helper

from components.images import encode_png
from components.restoring import Ask, Identity, Result, parse_ask
from components.synthetic import dead_leaves
from pipelines.core.errors import UsageError
from pipelines.service import client
from pipelines.service.front import ServeLimits
from pipelines.service.serve import MAX_ERRORS, Outcome, RestorerReplica, _free_port, url_of

tiny = load_helper("pipelines/_tiny.py")
PICTURE = encode_png(dead_leaves(64, 7, 0))
IDENTITY = Identity(name="tiny", system="tiny", recipe="none", digest="0" * 64)


class Short(tiny.TinyRestorer):  # type: ignore[misc, name-defined]
    """A restorer without memory for pictures above `most` pixels."""

    most = 0

    def restore(self, requests: Any, *rest: Any, **named: Any) -> Any:
        if requests[0].image.size > 3 * self.most:
            raise MemoryError
        return super().restore(requests, *rest, **named)


class Hanging(tiny.TinyRestorer):  # type: ignore[misc, name-defined]
    """A restorer whose device does not answer until `wake` is set, and so sees no cancellation."""

    wake = threading.Event()

    def restore(self, requests: Any, *rest: Any, **named: Any) -> Any:
        self.wake.wait(20)
        return super().restore(requests, *rest, **named)


class Mortal(RestorerReplica):
    """A replica whose end is recorded: a real one ends its process."""

    ended = 0

    def end(self) -> None:
        self.ended += 1


def replica_of(restorer: Any, deadline_s: float = 0.2) -> Mortal:
    return Mortal(lambda: restorer, IDENTITY, ServeLimits(deadline_s=deadline_s), threads=1)


@pytest.mark.parametrize(("most", "broken"), [(0, True), (64 * 64, False)])
def test_memory_that_is_gone_for_every_picture_ends_the_process(most: int, broken: bool) -> None:
    """A picture that is too large for the device ends nothing: the replica's own small picture tells them apart."""
    restorer = Short(strength=20.0)
    restorer.most = most
    large = encode_png(dead_leaves(96, 7, 0))

    async def ask() -> tuple[list[Outcome], Mortal]:
        replica = replica_of(restorer)
        outcomes = [await replica.restore(large, "a", 1, Ask()) for _ in range(MAX_ERRORS)]
        await asyncio.sleep(0.3)
        return outcomes, replica

    outcomes, replica = asyncio.run(ask())
    assert {outcome.code for outcome in outcomes} == {"out_of_memory"}
    assert (outcomes[-1].broken, replica.ended) == (broken, int(broken))


@pytest.mark.parametrize("wakes", [False, True])
def test_a_picture_that_hangs_ends_the_process_and_a_slow_one_does_not(wakes: bool) -> None:
    """A cancelled picture that does not stop keeps all others waiting."""
    Hanging.wake.clear()

    async def cancel() -> Mortal:
        replica = replica_of(Hanging(strength=20.0))
        task = asyncio.create_task(replica.restore(PICTURE, "a", 1, Ask()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if wakes:
            Hanging.wake.set()
        await asyncio.sleep(0.4)
        Hanging.wake.set()
        return replica

    assert asyncio.run(cancel()).ended == int(not wakes)


def test_an_encoder_without_memory_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Result) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Result, "encode", fail)
    outcome = asyncio.run(replica_of(tiny.TinyRestorer(strength=20.0)).restore(PICTURE, "a", 1, Ask()))
    assert outcome.code == "out_of_memory"


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"), ("localhost", "http://localhost:80")],
)
def test_an_ipv6_address_stands_in_brackets(host: str, url: str) -> None:
    assert url_of(host, 80) == url


@pytest.mark.parametrize(
    ("host", "words"), [("", "is empty"), (" ", "is empty"), ("no.such.invalid", "another --host")]
)
def test_a_wrong_host_is_refused_and_an_empty_one_is_not_every_address(host: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _free_port(host, 0)


@pytest.mark.parametrize("level", [1, 6])
def test_the_service_is_asked_for_the_batch_jobs_compression(
    level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of another png_level is compared with an answer of the same level; else equal pixels would differ."""
    source = tmp_path / "a.png"
    source.write_bytes(PICTURE)
    replica = replica_of(tiny.TinyRestorer(strength=20.0))

    def restored(options: dict[str, Any]) -> bytes:
        return asyncio.run(replica.restore(PICTURE, "a", 1, parse_ask(options))).picture

    def post(url: str, *_: Any) -> tuple[int, dict[str, str], bytes]:
        asked = int(url.partition("png_level=")[2] or 1)
        return 200, {"X-Restoray-Model": IDENTITY.digest}, restored({"png_level": asked})

    monkeypatch.setattr(client, "post", post)
    expected = restored({"png_level": level})
    assert client.check_service("http://x", source, expected)["bytes"] == len(expected)
