"""The service over HTTP on loopback: the batch job's bytes, limits, capacity, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helper_modules import load_helper_for_workers
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from components.images import decode, encode_png, read_png_text
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from pipelines.core.errors import Failure, UsageError
from pipelines.restoration.models import open_model
from pipelines.service.client import check_service, wait_ready
from pipelines.service.front import ServeLimits, build_app
from pipelines.service.serve import FrontDoor, RestorerReplica, RunningService, start, start_proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LIMITS = ServeLimits(
    max_bytes=200_000,
    max_input_pixels=10_000,
    max_output_pixels=20_000,
    max_queued=1,
    deadline_s=4.0,
    read_timeout_s=2.0,
    retry_after_s=3,
)
STEP_S = 0.02
LONG = {"steps": "100000"}  # half an hour at STEP_S


tiny = load_helper_for_workers("pipelines/_tiny.py")
PICTURE = encode_png(dead_leaves(64, 7, 0))


@pytest.fixture(scope="module", autouse=True)
def tiny_system() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "tiny", tiny.SYSTEM)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def service(model: Path, tiny_system: None, ray_session: object) -> Iterator[RunningService]:
    factory = functools.partial(tiny.build_tiny, model, step_s=STEP_S, lethal="lethal")
    with start(replace(open_model(model), factory=factory), limits=LIMITS, timeout_s=280) as running:
        yield running


class Answer:
    """Status, headers and body of one exchange."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def problem(self) -> tuple[int, str]:
        document = json.loads(self.body)
        assert set(document) == {"code", "detail"} and document["detail"]
        return self.status, document["code"]


def ask(
    service: RunningService,
    body: object = PICTURE,
    kind: str | None = "image/png",
    method: str = "POST",
    path: str = "/v1/restore",
    headers: dict[str, str] | None = None,
    **parameters: str,
) -> Answer:
    """One request on a connection of its own."""
    host = urllib.parse.urlsplit(service.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    try:
        all_headers = {**({"Content-Type": kind} if kind else {}), **(headers or {})}
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        connection.request(method, path + query, body=body, headers=all_headers)  # type: ignore[arg-type]
        return Answer(connection.getresponse())
    finally:
        connection.close()


def form(fields: dict[str, str], files: list[tuple[str, str, bytes]]) -> tuple[bytes, str]:
    """(body, content type) of a multipart form."""
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()
    ]
    for field, name, data in files:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_model_that_cannot_load_is_reported_once(model: Path, ray_session: object) -> None:
    """Runs first: one Ray runs one service, so the module's own service must not run yet."""
    never = functools.partial(tiny.build_never, model)
    with start(replace(open_model(model), factory=never), wait=False) as broken:
        end, state = time.monotonic() + 240, ""
        while state != "SETUP_FAILED" and time.monotonic() < end:
            time.sleep(0.3)
            try:
                health = ask(broken, None, None, "GET", "/health")
                state = json.loads(health.body)["state"]
            except (OSError, ValueError):
                continue
            assert state in ("STARTING", "SETUP_FAILED") and health.status == 503
        assert state == "SETUP_FAILED"
        assert ask(broken).problem == (503, "setup_failed")
        with pytest.raises(
            Failure, match=r"^the model tiny cannot be loaded: RuntimeError: weights of tiny do not fit$"
        ):
            wait_ready(broken.url, timeout_s=5)


class Direct:
    """A restorer replica in this process, with the two calls of a Serve handle that the front makes."""

    def __init__(self, replica: RestorerReplica) -> None:
        self.setup_error, self.restore = Method(replica.setup_error), Method(replica.restore)


class Method:
    def __init__(self, call: Callable[..., Awaitable[object]]) -> None:
        self.remote = call


def test_a_model_that_cannot_load_gives_one_sentence(model: Path) -> None:
    """The full test above, without Serve and its half minute of start-up."""
    identity = open_model(model).identity

    async def exchange() -> None:
        replica = RestorerReplica(functools.partial(tiny.build_never, model), identity, LIMITS, threads=1)
        front = FrontDoor(Direct(replica), identity, LIMITS, tiny.check_options)  # type: ignore[arg-type]
        app = build_app(front, identity, LIMITS, tiny.check_options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            health = await client.get("/health")
            sentence = "the model tiny cannot be loaded: RuntimeError: weights of tiny do not fit"
            assert health.status_code == 503 and health.json() == {"state": "SETUP_FAILED", "detail": sentence}
            answer = await client.post("/v1/restore", content=PICTURE)
            assert answer.status_code == 503 and answer.json() == {"code": "setup_failed", "detail": sentence}

    asyncio.run(exchange())


def test_health_and_model(service: RunningService, model: Path) -> None:
    health = ask(service, None, None, "GET", "/health")
    assert health.status == 200 and json.loads(health.body)["state"] == "READY"
    card = json.loads(ask(service, None, None, "GET", "/v1/model").body)
    assert (card["name"], card["system"], card["licence"]) == ("tiny", "tiny", "Apache-2.0")
    assert card["limits"]["max_bytes"] == LIMITS.max_bytes
    assert card["defaults"] == {}  # this system's recipes set none
    assert str(model.parent) not in json.dumps(card)
    assert service.url.startswith("http://127.0.0.1:")
    for path in ("/health", "/v1/model"):  # load balancers ask by HEAD
        head = ask(service, None, None, "HEAD", path)
        assert (head.status, head.body) == (200, b"")


def test_bytes_equal_the_batch_job(service: RunningService, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "some picture.png"
    source.write_bytes(PICTURE)
    options = {"steps": 2, "cfg_scale": 3.5, "prompt": "a red bird, 写真", "width": 40, "height": 48}
    factory = functools.partial(tiny.build_tiny, model)
    for number, settings in enumerate(({}, options, {"steps": 2.0, "cfg_scale": 3})):
        result = tiny.run_job(model, source.parent, tmp_path / str(number), settings, seed=11, factory=factory)
        png = result.folder / "some picture.png"
        answer = check_service(service.url, source, png)
        assert answer["bytes"] == png.stat().st_size
        other = encode_png(decode(png.read_bytes()), {**read_png_text(png.read_bytes()), "recipe": "another"})
        with pytest.raises(Failure, match="differs"):
            check_service(service.url, source, other)


def test_a_reference_and_a_scale_give_the_batch_jobs_bytes(
    service: RunningService, model: Path, tmp_path: Path
) -> None:
    rgba = np.dstack([dead_leaves(64, 7, 0), np.full((64, 64), 90, np.uint8)])
    for name, image in (("in", rgba), ("hq", dead_leaves(80, 3, 0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encode_png(image))
    source, hq = tmp_path / "in" / "a.png", tmp_path / "hq" / "a.png"
    factory = functools.partial(tiny.build_tiny, model)
    options = {"scale": 1.25, "alpha": "restore"}
    result = tiny.run_job(model, source.parent, tmp_path / "out", options, factory=factory, references=hq.parent)
    assert check_service(service.url, source, result.folder / "a.png", reference_path=hq)["bytes"] > 0
    with pytest.raises(Failure, match="differs"):
        check_service(service.url, source, result.folder / "a.png")
    for reference, problem in ((b"<html>", (415, "unsupported_type")), (b"", (422, "empty"))):
        body, kind = form({}, [("image", "a.png", PICTURE), ("reference", "b.png", reference)])
        assert ask(service, body, kind).problem == problem
    body, kind = form({}, [("image", "a.png", PICTURE), ("other", "b.png", PICTURE)])
    assert ask(service, body, kind).problem == (422, "bad_form")


def test_the_form_and_the_raw_body_agree(service: RunningService) -> None:
    body, kind = form({"seed": "9", "steps": "2"}, [("image", "bird.final.png", PICTURE)])
    by_form = ask(service, body, kind)
    raw = ask(service, seed="9", steps="2", key="bird.final")
    assert by_form.status == raw.status == 200
    assert by_form.body == raw.body
    assert raw.headers["Content-Type"] == "image/png" and raw.headers["X-Restoray-Seed"] == "9"
    text = read_png_text(raw.body)
    assert (
        text["seed"] == "9" and text["key"] == "bird.final" and text["model_digest"] == raw.headers["X-Restoray-Model"]
    )


def test_without_a_seed_the_key_decides(service: RunningService) -> None:
    answer = ask(service, kind=None, key="k")
    assert answer.status == 200 and answer.headers["X-Restoray-Seed"] == str(picture_seed(0, "k"))
    assert answer.body == ask(service, kind="application/octet-stream", key="k").body
    assert answer.body != ask(service, key="other").body


@pytest.mark.parametrize(
    ("parameters", "code", "word"),
    [
        ({"seed": "x"}, "bad_parameter", "seed"),
        ({"seed": "-1"}, "bad_parameter", "seed"),
        ({"seed": "9" * 5000}, "bad_parameter", "seed"),
        ({"steps": "2.5"}, "bad_parameter", "steps"),
        ({"cfg_scale": "nan"}, "bad_parameter", "cfg_scale"),
        ({"width": "40"}, "bad_parameter", "height"),
        ({"width": "0", "height": "40"}, "bad_parameter", "width"),
        ({"width": "300", "height": "300"}, "bad_parameter", "max_output_pixels"),
        ({"scale": "2.5"}, "too_large", "max_output_pixels"),
        ({"scale": "0"}, "bad_parameter", "scale"),
        ({"scale": "2", "width": "40", "height": "40"}, "bad_parameter", "exclude"),
        ({"alpha": "of"}, "bad_parameter", "flatten"),
        ({"prompt": "x" * 2001}, "bad_parameter", "2000"),
        ({"prompt": "a\x1b[31m"}, "bad_parameter", "control"),
        ({"sed": "1"}, "unknown_parameter", "seed"),
    ],
)
def test_bad_parameters(service: RunningService, parameters: dict[str, str], code: str, word: str) -> None:
    answer = ask(service, **parameters)
    assert answer.problem == (422, code)
    assert word in json.loads(answer.body)["detail"]


def test_bad_pictures(service: RunningService) -> None:
    assert ask(service, b"").problem == (422, "empty")
    assert ask(service, b"<html>no picture</html>").problem == (415, "unsupported_type")
    assert ask(service, b"8BPS" + bytes(100)).problem == (415, "unsupported_type")
    assert ask(service, PICTURE[:-40]).problem == (422, "truncated")
    large = ask(service, encode_png(dead_leaves(128, 0, 0)))
    assert large.problem == (422, "too_large") and b"max_input_pixels" in large.body
    jpeg_named_png = ask(service, PICTURE, kind="image/jpeg")  # the content counts, not the header
    assert jpeg_named_png.status == 200


def test_a_picture_that_breaks_only_when_decoded(service: RunningService) -> None:
    import cv2

    jpeg = cv2.imencode(".jpg", dead_leaves(96, 0, 1), [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    assert ask(service, jpeg[: len(jpeg) // 2], "image/jpeg").problem == (422, "truncated")


def test_bad_requests(service: RunningService) -> None:
    assert ask(service, b"{}", "application/json").problem == (415, "unsupported_type")
    body, kind = form({}, [("picture", "a.png", PICTURE)])
    assert ask(service, body, kind).problem == (422, "no_image")
    assert ask(service, body[:-60], kind).problem[0] == 422
    assert ask(service, b"nonsense", "multipart/form-data").problem == (422, "bad_form")
    body, kind = form({"seed": "1"}, [("image", "a.png", PICTURE), ("image", "b.png", PICTURE)])
    assert ask(service, body, kind).problem == (422, "bad_form")
    body, kind = form({"seed": "1"}, [("image", "a.png", PICTURE)])
    assert ask(service, body, kind, seed="2").problem == (422, "bad_parameter")


def test_unknown_routes_answer_in_json(service: RunningService) -> None:
    for path in ("/", "/docs", "/openapi.json", "/v1/models/../../etc/passwd", "/v1/restore/x"):
        assert ask(service, None, None, "GET", path).problem == (404, "unknown_route")
    assert ask(service, None, None, "GET", "/v1/restore").problem == (405, "method_not_allowed")


def test_a_body_over_the_limit_is_refused_however_it_is_sent(service: RunningService) -> None:
    too_much = bytes(LIMITS.max_bytes + 1)
    assert ask(service, too_much).problem == (413, "too_large")
    chunks = (bytes(10_000) for _ in range(40))  # an iterator is sent in chunks, without a length
    assert ask(service, chunks).problem == (413, "too_large")
    body, kind = form({}, [("image", "a.png", bytes(LIMITS.max_bytes + 70_000))])
    assert ask(service, iter([body]), kind).problem == (413, "too_large")
    body, kind = form({}, [("image", "a.png", too_much)])
    assert ask(service, body, kind).problem == (413, "too_large")


def test_a_wrong_content_length_ends_in_a_timeout(service: RunningService) -> None:
    answer = ask(service, PICTURE, headers={"Content-Length": str(len(PICTURE) + 1000)})
    assert answer.problem == (408, "read_timeout")


def test_a_deadline_ends_the_work(service: RunningService) -> None:
    assert ask(service, **LONG).problem == (504, "deadline")
    begin = time.monotonic()
    assert ask(service).status == 200  # the restorer stopped; the request would have taken half an hour
    assert time.monotonic() - begin < 3


def test_a_client_that_leaves_frees_the_restorer(service: RunningService) -> None:
    host = urllib.parse.urlsplit(service.url)
    with socket.create_connection((host.hostname, host.port)) as client:
        lines = (
            f"POST /v1/restore?{urllib.parse.urlencode(LONG)} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(PICTURE)}",
        )
        head = "\r\n".join([*lines, "", ""])
        client.sendall(head.encode() + PICTURE)
        time.sleep(0.7)
    begin = time.monotonic()
    assert ask(service).status == 200
    assert time.monotonic() - begin < 3  # less than the deadline, which would also end it


def test_requests_above_the_queue_limit_get_503(service: RunningService) -> None:
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(service, steps="50"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status for answer in answers)
    assert statuses.count(200) >= 2 and statuses.count(503) >= 2 and len(statuses) == 6
    refusal = next(answer for answer in answers if answer.status == 503)
    assert refusal.problem == (503, "busy") and refusal.headers["Retry-After"] == "3"
    assert len({answer.body for answer in answers if answer.status == 200}) == 1


def test_a_restorer_that_dies_comes_back(service: RunningService) -> None:
    """On a busy machine Ray may notice the death only after the deadline of 4 s."""
    answer = ask(service, key="lethal")
    assert answer.problem in ((503, "restarting"), (504, "deadline"))
    end = time.monotonic() + 60
    while (again := ask(service)).status != 200 and time.monotonic() < end:
        assert again.problem[0] == 503
        time.sleep(0.5)
    assert again.status == 200


@pytest.mark.parametrize("error", [RayActorError(), ReplicaUnavailableError("gone"), DeploymentUnavailableError(None)])
def test_a_death_is_told_and_the_service_waits_for_the_next_process(model: Path, error: Exception) -> None:
    """The test above with the time of the death in our hands."""
    identity = open_model(model).identity

    async def died(*_: object) -> object:
        raise error

    async def exchange() -> None:
        replica = RestorerReplica(functools.partial(tiny.build_tiny, model), identity, LIMITS, threads=1)
        handle = Direct(replica)
        front = FrontDoor(handle, identity, LIMITS, tiny.check_options)  # type: ignore[arg-type]
        app = build_app(front, identity, LIMITS, tiny.check_options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            alive, handle.restore = handle.restore, Method(died)  # type: ignore[arg-type]
            answer = await client.post("/v1/restore", content=PICTURE)
            assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (
                503,
                "restarting",
                "3",
            )
            assert front.state == "STARTING"
            handle.restore = alive
            assert (await client.post("/v1/restore", content=PICTURE)).status_code == 200

    asyncio.run(exchange())


class BrokenDevice(tiny.TinyRestorer):  # type: ignore[misc, name-defined]
    """Fails on each picture, or only on pictures with the key "bad"."""

    def __init__(self, always: bool) -> None:
        super().__init__(strength=20.0)
        self.always = always

    def restore(self, requests: Any, *rest: Any, **named: Any) -> Any:
        if self.always or requests[0].key == "bad":
            raise RuntimeError("CUDA error: device-side assert triggered")
        return super().restore(requests, *rest, **named)


class Mortal(RestorerReplica):
    """A replica whose end is recorded: a real one ends its process."""

    ended = 0

    def end(self) -> None:
        self.ended += 1


def test_a_replica_with_a_broken_device_is_replaced_and_a_bad_picture_does_not_end_it(model: Path) -> None:
    """The front waits for another process, and after two of them reports the failure."""
    identity = open_model(model).identity

    async def states(always: bool, keys: list[str]) -> tuple[list[tuple[int, str]], list[Mortal]]:
        replicas = [Mortal(lambda: BrokenDevice(always), identity, LIMITS, threads=1)]
        front = FrontDoor(Direct(replicas[0]), identity, LIMITS, tiny.check_options)  # type: ignore[arg-type]
        app = build_app(front, identity, LIMITS, tiny.check_options)
        seen = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            for key in keys:
                answer = await client.post("/v1/restore", content=PICTURE, params={"key": key})
                state = (await client.head("/health")).status_code
                if replicas[-1].broken:
                    await asyncio.sleep(0.3)
                if replicas[-1].broken and front.state == "STARTING":  # as Serve does
                    replicas.append(Mortal(lambda: BrokenDevice(always), identity, LIMITS, threads=1))
                    front.restorer = Direct(replicas[-1])  # type: ignore[assignment]
                    front.setup = None
                seen.append((answer.status_code, str(state)))
        return seen, replicas

    seen, replicas = asyncio.run(states(True, [f"p{n}" for n in range(10)]))
    assert seen[:3] == [(500, "200"), (500, "200"), (500, "503")]
    assert [replica.ended for replica in replicas] == [1, 1, 1] and seen[-2:] == [(500, "503"), (503, "503")]
    seen, replicas = asyncio.run(states(False, ["bad"] * 7 + ["good"]))
    assert [status for status, _ in seen] == [500] * 7 + [200] and all(state == "200" for _, state in seen)
    assert [replica.ended for replica in replicas] == [0]


def test_a_port_in_use_and_a_second_service_are_refused(service: RunningService, model: Path) -> None:
    port = urllib.parse.urlsplit(service.url).port
    with pytest.raises(UsageError, match="choose another --port"):
        start(open_model(model), port=port or 0)
    with pytest.raises(Failure, match="already"):
        start(replace(open_model(model), factory=functools.partial(tiny.build_tiny, model)))
    assert ask(service).status == 200


def test_the_service_waits_for_a_proxy_that_starts_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def once_too_slow(**_: object) -> None:
        calls.append(None)
        if len(calls) == 1:
            raise RayActorError(error_msg="the controller replaced it")

    monkeypatch.setattr(ray_serve, "start", once_too_slow)
    start_proxy(HTTPOptions(), timeout_s=30)
    assert len(calls) == 2

    def never(**_: object) -> None:
        raise TimeoutError("not available")

    monkeypatch.setattr(ray_serve, "start", never)
    with pytest.raises(Failure, match=r"within 0 s: not available"):
        start_proxy(HTTPOptions(), timeout_s=0)
