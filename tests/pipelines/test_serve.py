"""The service over real HTTP on loopback: same bytes as the batch job, limits, capacity, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import functools
import http.client
import importlib.util
import json
import socket
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import numpy as np
import pytest
from ray import cloudpickle
from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions

from components.images import decode, encode_png, read_png_text
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from pipelines.errors import Failure, UsageError
from pipelines.front import ServeLimits, build_app
from pipelines.restore import model_identity, restore_folder
from pipelines.serve import FrontDoor, RestorerReplica, Served, _start_proxy, check_served, start, wait_ready

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


def load_tiny() -> ModuleType:
    """The helper beside this file, picklable by value so that Ray's workers need not import it."""
    name = "restoray_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("_tiny.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        cloudpickle.register_pickle_by_value(sys.modules[name])
    return sys.modules[name]


tiny = load_tiny()
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
def served(model: Path, tiny_system: None, ray_session: object) -> Iterator[Served]:
    factory = functools.partial(tiny.build_tiny, model, step_s=STEP_S, lethal="lethal")
    with start(model, factory=factory, limits=LIMITS, timeout_s=280) as running:
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
    served: Served,
    body: object = PICTURE,
    kind: str | None = "image/png",
    method: str = "POST",
    path: str = "/v1/restore",
    headers: dict[str, str] | None = None,
    **parameters: str,
) -> Answer:
    """One request on a connection of its own."""
    host = urllib.parse.urlsplit(served.url)
    connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=30)
    try:
        sent = {**({"Content-Type": kind} if kind else {}), **(headers or {})}
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        connection.request(method, path + query, body=body, headers=sent)  # type: ignore[arg-type]
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
    """Comes first: one Ray carries one service, so the module's own must not stand yet."""
    never = functools.partial(tiny.build_never, model)
    with start(model, factory=never, wait=False) as broken:
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
    """A restorer replica in this process behind the two calls of a Serve handle that the front door makes."""

    def __init__(self, replica: RestorerReplica) -> None:
        self.broken_why, self.restore = Method(replica.broken_why), Method(replica.restore)


class Method:
    def __init__(self, call: Callable[..., Awaitable[object]]) -> None:
        self.remote = call


def test_a_model_that_cannot_load_is_told_in_one_sentence(model: Path) -> None:
    """What the full test shows through Serve, without its half minute of start-up."""
    _, identity = model_identity(model)

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


def test_health_and_model(served: Served, model: Path) -> None:
    health = ask(served, None, None, "GET", "/health")
    assert health.status == 200 and json.loads(health.body)["state"] == "READY"
    card = json.loads(ask(served, None, None, "GET", "/v1/model").body)
    assert (card["name"], card["system"], card["licence"]) == ("tiny", "tiny", "Apache-2.0")
    assert card["limits"]["max_bytes"] == LIMITS.max_bytes
    assert card["defaults"] == {}  # this system's recipes settle none
    assert str(model.parent) not in json.dumps(card)
    assert served.url.startswith("http://127.0.0.1:")


def test_bytes_equal_the_batch_job(served: Served, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "some picture.png"
    source.write_bytes(PICTURE)
    options = {"steps": 2, "cfg_scale": 3.5, "prompt": "a red bird, 写真", "width": 40, "height": 48}
    factory = functools.partial(tiny.build_tiny, model)
    for number, settings in enumerate(({}, options, {"steps": 2.0, "cfg_scale": 3})):
        result = restore_folder(
            model, source.parent, tmp_path / str(number), settings, seed=11, factory=factory, on_ray=False
        )
        png = result.folder / "some picture.png"
        seen = check_served(served.url, source, png)
        assert seen["bytes"] == png.stat().st_size
        other = encode_png(decode(png.read_bytes()), {**read_png_text(png.read_bytes()), "recipe": "another"})
        with pytest.raises(Failure, match="differs"):
            check_served(served.url, source, other)


def test_a_reference_and_a_scale_give_the_batch_jobs_bytes(served: Served, model: Path, tmp_path: Path) -> None:
    rgba = np.dstack([dead_leaves(64, 7, 0), np.full((64, 64), 90, np.uint8)])
    for name, image in (("in", rgba), ("hq", dead_leaves(80, 3, 0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encode_png(image))
    source, hq = tmp_path / "in" / "a.png", tmp_path / "hq" / "a.png"
    factory = functools.partial(tiny.build_tiny, model)
    options = {"scale": 1.25, "alpha": "restore"}
    result = restore_folder(
        model, source.parent, tmp_path / "out", options, factory=factory, on_ray=False, references=hq.parent
    )
    assert check_served(served.url, source, result.folder / "a.png", reference_path=hq)["bytes"] > 0
    with pytest.raises(Failure, match="differs"):
        check_served(served.url, source, result.folder / "a.png")
    for reference, problem in ((b"<html>", (415, "unsupported_type")), (b"", (422, "empty"))):
        body, kind = form({}, [("image", "a.png", PICTURE), ("reference", "b.png", reference)])
        assert ask(served, body, kind).problem == problem
    body, kind = form({}, [("image", "a.png", PICTURE), ("other", "b.png", PICTURE)])
    assert ask(served, body, kind).problem == (422, "bad_form")


def test_the_form_and_the_raw_body_agree(served: Served) -> None:
    body, kind = form({"seed": "9", "steps": "2"}, [("image", "bird.final.png", PICTURE)])
    by_form = ask(served, body, kind)
    raw = ask(served, seed="9", steps="2", key="bird.final")
    assert by_form.status == raw.status == 200
    assert by_form.body == raw.body
    assert raw.headers["Content-Type"] == "image/png" and raw.headers["X-Restoray-Seed"] == "9"
    text = read_png_text(raw.body)
    assert (
        text["seed"] == "9" and text["key"] == "bird.final" and text["model_digest"] == raw.headers["X-Restoray-Model"]
    )


def test_without_a_seed_the_key_decides(served: Served) -> None:
    answer = ask(served, kind=None, key="k")
    assert answer.status == 200 and answer.headers["X-Restoray-Seed"] == str(picture_seed(0, "k"))
    assert answer.body == ask(served, kind="application/octet-stream", key="k").body
    assert answer.body != ask(served, key="other").body


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
def test_bad_parameters(served: Served, parameters: dict[str, str], code: str, word: str) -> None:
    answer = ask(served, **parameters)
    assert answer.problem == (422, code)
    assert word in json.loads(answer.body)["detail"]


def test_bad_pictures(served: Served) -> None:
    assert ask(served, b"").problem == (422, "empty")
    assert ask(served, b"<html>no picture</html>").problem == (415, "unsupported_type")
    assert ask(served, b"8BPS" + bytes(100)).problem == (415, "unsupported_type")
    assert ask(served, PICTURE[:-40]).problem == (422, "truncated")
    large = ask(served, encode_png(dead_leaves(128, 0, 0)))
    assert large.problem == (422, "too_large") and b"max_input_pixels" in large.body
    jpeg_named_png = ask(served, PICTURE, kind="image/jpeg")  # the content decides, not what the header says
    assert jpeg_named_png.status == 200


def test_a_picture_that_breaks_only_when_decoded(served: Served) -> None:
    import cv2

    jpeg = cv2.imencode(".jpg", dead_leaves(96, 0, 1), [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    assert ask(served, jpeg[: len(jpeg) // 2], "image/jpeg").problem == (422, "truncated")


def test_bad_requests(served: Served) -> None:
    assert ask(served, b"{}", "application/json").problem == (415, "unsupported_type")
    body, kind = form({}, [("picture", "a.png", PICTURE)])
    assert ask(served, body, kind).problem == (422, "no_image")
    assert ask(served, body[:-60], kind).problem[0] == 422
    assert ask(served, b"nonsense", "multipart/form-data").problem == (422, "bad_form")
    body, kind = form({"seed": "1"}, [("image", "a.png", PICTURE), ("image", "b.png", PICTURE)])
    assert ask(served, body, kind).problem == (422, "bad_form")
    body, kind = form({"seed": "1"}, [("image", "a.png", PICTURE)])
    assert ask(served, body, kind, seed="2").problem == (422, "bad_parameter")


def test_unknown_routes_answer_in_json(served: Served) -> None:
    for path in ("/", "/docs", "/openapi.json", "/v1/models/../../etc/passwd", "/v1/restore/x"):
        assert ask(served, None, None, "GET", path).problem == (404, "unknown_route")
    assert ask(served, None, None, "GET", "/v1/restore").problem == (405, "method_not_allowed")


def test_a_body_over_the_limit_is_refused_however_it_is_sent(served: Served) -> None:
    too_much = bytes(LIMITS.max_bytes + 1)
    assert ask(served, too_much).problem == (413, "too_large")
    chunks = (bytes(10_000) for _ in range(40))  # an iterator: chunked, without a length
    assert ask(served, chunks).problem == (413, "too_large")
    body, kind = form({}, [("image", "a.png", bytes(LIMITS.max_bytes + 70_000))])
    assert ask(served, iter([body]), kind).problem == (413, "too_large")
    body, kind = form({}, [("image", "a.png", too_much)])
    assert ask(served, body, kind).problem == (413, "too_large")


def test_a_length_that_lies_ends_in_a_timeout(served: Served) -> None:
    answer = ask(served, PICTURE, headers={"Content-Length": str(len(PICTURE) + 1000)})
    assert answer.problem == (408, "read_timeout")


def test_a_deadline_ends_the_work(served: Served) -> None:
    assert ask(served, **LONG).problem == (504, "deadline")
    begin = time.monotonic()
    assert ask(served).status == 200  # the restorer was freed, not left working for half an hour
    assert time.monotonic() - begin < 3


def test_a_client_that_leaves_frees_the_restorer(served: Served) -> None:
    host = urllib.parse.urlsplit(served.url)
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
    assert ask(served).status == 200
    assert time.monotonic() - begin < 3  # less than the deadline that would have ended it anyway


def test_more_than_fits_is_turned_away(served: Served) -> None:
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(served, steps="50"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status for answer in answers)
    assert statuses.count(200) >= 2 and statuses.count(503) >= 2 and len(statuses) == 6
    turned_away = next(answer for answer in answers if answer.status == 503)
    assert turned_away.problem == (503, "busy") and turned_away.headers["Retry-After"] == "3"
    assert len({answer.body for answer in answers if answer.status == 200}) == 1


def test_a_restorer_that_dies_comes_back(served: Served) -> None:
    answer = ask(served, key="lethal")
    assert answer.problem == (503, "restarting") and answer.headers["Retry-After"]
    end = time.monotonic() + 60
    while (again := ask(served)).status != 200 and time.monotonic() < end:
        assert again.problem[0] == 503
        time.sleep(0.5)
    assert again.status == 200


def test_a_taken_port_and_a_second_service_are_refused(served: Served, model: Path) -> None:
    port = urllib.parse.urlsplit(served.url).port
    with pytest.raises(UsageError, match="choose another --port"):
        start(model, port=port or 0)
    with pytest.raises(Failure, match="already"):
        start(model, factory=functools.partial(tiny.build_tiny, model))
    assert ask(served).status == 200


def test_a_proxy_that_a_busy_machine_starts_too_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def once_too_slow(**_: object) -> None:
        calls.append(None)
        if len(calls) == 1:
            raise RayActorError(error_msg="the controller replaced it")

    monkeypatch.setattr(ray_serve, "start", once_too_slow)
    _start_proxy(HTTPOptions(), timeout_s=30)
    assert len(calls) == 2

    def never(**_: object) -> None:
        raise TimeoutError("not available")

    monkeypatch.setattr(ray_serve, "start", never)
    with pytest.raises(Failure, match=r"within 0 s: not available"):
        _start_proxy(HTTPOptions(), timeout_s=0)
