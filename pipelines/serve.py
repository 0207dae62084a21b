"""`restoray serve`: one model behind Ray Serve.

    POST /v1/restore    a picture as the body (image/*) or as the file field "image" of a form, which may hold a second
                        picture as "reference" for options that ask for one; answers image/png
    GET  /v1/model      name, system, digest, licence, permitted use, limits
    GET  /health        {"state": "STARTING" | "READY" | "SETUP_FAILED", "detail"}; 200 only when READY

Parameters of /v1/restore stand in the query or in the form: `pipelines.front.PARAMETERS` and the system's options.
Errors are JSON: {"code", "detail"}.

Two deployments: the front door reads, checks and refuses early; the restorer owns decoding, restoring and encoding, so
that only file bytes cross between processes. Both share `components.restoring` with the batch job: the same model, key,
seed and options give the same bytes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from components.images import Limits, read_png_text
from components.options import OptionCheck
from components.restoring import Ask, Identity, Picture, restore_bytes
from components.types import Cancellation, Restorer, SampleError
from pipelines.cluster import local_ray
from pipelines.errors import Failure, UsageError
from pipelines.front import ServeLimits, build_app
from pipelines.restore import load_restorer, model_identity, option_check
from pipelines.restore_worker import THREADS, Factory, set_threads

APP = "restoray"
POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the restorer hands back: a PNG, or a reason code and a sentence (exceptions do not cross processes well)."""

    png: bytes = b""
    code: str = ""
    detail: str = ""


class RestorerReplica:
    """Holds the model. One picture at a time; a cancelled one ends at its sampler's next step.

    A model that cannot be loaded leaves a replica that says so: raising would make Serve try again and again.
    """

    def __init__(self, factory: Factory, identity: Identity, limits: ServeLimits, threads: int) -> None:
        self.identity, self.limits = identity, Limits(max_pixels=limits.max_input_pixels, max_bytes=limits.max_bytes)
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="restore")
        self.restorer: Restorer | None = None
        self.broken = ""
        try:
            self.restorer = factory()
            set_threads(threads)
        except Exception as error:  # noqa: BLE001 - whatever loading may raise is reported, once, in one sentence
            self.broken = f"the model {identity.name} cannot be loaded: {type(error).__name__}: {error}"

    async def broken_why(self) -> str:
        """ "" once the model is loaded, else why it could not be."""
        return self.broken

    async def restore(self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes = b"") -> Outcome:
        """Decode, restore and encode one picture; cancelling this call stops the work."""
        if self.restorer is None:
            return Outcome(code="setup_failed", detail=self.broken)
        stop = threading.Event()
        work = functools.partial(
            restore_bytes,
            self.restorer,
            self.identity,
            Picture(key=key, data=data, seed=seed, reference=reference),
            ask,
            self.limits,
            stop.is_set,
        )
        try:
            return Outcome(png=await asyncio.get_running_loop().run_in_executor(self.pool, work))
        except SampleError as error:
            return Outcome(code=error.code, detail=error.detail)
        except Cancellation:
            return Outcome(code="cancelled", detail="the request was cancelled")
        finally:
            stop.set()  # reached by the cancellation of this coroutine too, while the thread still works


class FrontDoor:
    """The HTTP side: turns the restorer's handle into the backend that `build_app` wants."""

    def __init__(self, restorer: DeploymentHandle, identity: Identity, limits: ServeLimits, check: OptionCheck) -> None:
        self.restorer, self.identity, self.limits, self.check = restorer, identity, limits, check
        self.state, self.detail = "STARTING", "the model is being loaded"
        self.watching: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self, self.identity, self.limits, self.check)

    async def health(self) -> tuple[str, str]:
        """(state, detail) of the restorer."""
        if self.state == "STARTING" and (self.watching is None or self.watching.done()):
            self.watching = asyncio.create_task(self._watch())
        if self.watching is not None and not self.watching.done():
            await asyncio.wait({self.watching}, timeout=POLL_S)
        return self.state, self.detail

    async def _watch(self) -> None:
        """Wait for the restorer to say how its loading ended."""
        try:
            broken = await self.restorer.broken_why.remote()
            self.state, self.detail = ("SETUP_FAILED", broken) if broken else ("READY", "")
        except DeploymentUnavailableError:
            self.state = "SETUP_FAILED"
            self.detail = f"the process that loads the model {self.identity.name} keeps dying; is memory short?"
        except (RayError, ReplicaUnavailableError, BackPressureError) as error:
            self.detail = f"waiting for the model ({type(error).__name__})"  # the next look at /health tries again

    async def restore(self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes = b"") -> Outcome:
        """One picture through the restorer. Cancelling this (a client that left, a deadline) cancels the work.

        A picture over which the restorer dies is not tried again here: it may be the reason. Its sender may.
        """
        state, detail = await self.health()
        if state != "READY":
            return Outcome(code="setup_failed" if state == "SETUP_FAILED" else "starting", detail=detail)
        response = self.restorer.restore.remote(data, key, seed, ask, reference)
        try:
            outcome: Outcome = await response
        except BackPressureError:
            return Outcome(code="busy", detail="all places are taken; try again")
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
            self.state, self.detail = "STARTING", "the restoring process died and is started again"
            return Outcome(code="restarting", detail=self.detail)
        except asyncio.CancelledError:
            response.cancel()
            raise
        return outcome


@dataclass(kw_only=True)
class Served:
    """A running service. `url` has no slash at its end; `stop` frees the port and the processes."""

    url: str
    stack: ExitStack

    def stop(self) -> None:
        """Take the service down; a second call does nothing."""
        self.stack.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    model: str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    factory: Factory | None = None,
    build_options: Mapping[str, Any] | None = None,
    limits: ServeLimits | None = None,
    num_gpus: float = 0.0,
    threads: int = THREADS,
    wait: bool = True,
    timeout_s: float = 300.0,
) -> Served:
    """Start the service, on the running Ray or on a local one of its own.

    Args:
        model: model folder or shipped name.
        port: 0 takes a free one.
        factory: makes the restorer in the replica; the default builds the model's own system.
        build_options: given to the system when the restorer is built (device, precision).
        num_gpus: GPUs of the replica.
        threads: torch threads of the replica; as in the batch job, or the last bit may differ.
        wait: return only when the model is loaded.
        timeout_s: for that.

    Raises:
        UsageError: no such model, or the port is taken.
        Failure: the model cannot be loaded, or not in time; or this Ray already carries a service.
    """
    folder, identity = model_identity(model)
    limits = limits or ServeLimits()
    port = _free_port(host, port)
    factory = factory or functools.partial(load_restorer, folder, dict(build_options or {}))
    with ExitStack() as stack:
        stack.enter_context(local_ray())
        if ray_serve.status().applications:  # its port cannot change, and stopping ours would stop it too
            raise Failure("this Ray already carries a service; stop that one first")
        stack.callback(ray_serve.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the commands say themselves what is ready, and where
        _start_proxy(
            HTTPOptions(host=host, port=port, request_timeout_s=limits.deadline_s + limits.read_timeout_s + 5),
            timeout_s,
        )
        restorer = ray_serve.deployment(
            name="restorer",
            max_ongoing_requests=1,
            max_queued_requests=limits.max_queued,
            max_constructor_retry_count=2,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        )(RestorerReplica)
        front = ray_serve.deployment(
            name="front",
            max_ongoing_requests=limits.max_queued + 64,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": 0},
        )(ray_serve.ingress()(FrontDoor))
        replica = restorer.bind(factory, identity, limits, threads)
        target = front.bind(replica, identity, limits, option_check(identity.system, identity.defaults))
        ray_serve.run_many(
            [ray_serve.RunTarget(target=target, name=APP, route_prefix="/")], wait_for_applications_running=False
        )
        served = Served(url=f"http://{host}:{port}", stack=ExitStack())
        if wait:
            wait_ready(served.url, timeout_s)
        served.stack = stack.pop_all()
        return served


def serve(
    model: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    blocking: bool = True,
    on_ready: Callable[[str], None] | None = None,
    **settings: Any,
) -> Served:
    """Serve until interrupted (or, not blocking, until `.stop()`).

    Args:
        on_ready: told the address once the model is loaded.
        settings: as `start`.

    Raises:
        as `start`.
    """
    served = start(model, host, port, **settings)
    if on_ready:
        on_ready(served.url)
    if blocking:
        with served:
            threading.Event().wait()
    return served


def check_served(
    url: str,
    picture_path: Path,
    expected_png: Path | bytes,
    timeout_s: float = 300.0,
    reference_path: Path | None = None,
) -> dict[str, float]:
    """Send a picture with the key, seed and options that a batch result names; its bytes must come back.

    Args:
        url: of the service.
        picture_path: the batch job's input.
        expected_png: the batch job's result.
        reference_path: the batch job's reference of that picture, if it had one.

    Returns:
        bytes and seconds of the answer.

    Raises:
        Failure: no answer, an error, or other bytes; the sentence says which.
    """
    expected = expected_png if isinstance(expected_png, bytes) else expected_png.read_bytes()
    text = read_png_text(expected)
    query = {"key": text["key"], "seed": text["seed"], **json.loads(text["options"])}
    start_s = time.perf_counter()
    sent, kind = picture_path.read_bytes(), "application/octet-stream"
    if reference_path is not None:
        sent, kind = _form({"image": sent, "reference": reference_path.read_bytes()})
    status, headers, body = post(f"{url}/v1/restore?{urllib.parse.urlencode(query)}", sent, timeout_s, kind)
    seconds = time.perf_counter() - start_s
    if status != 200:
        raise Failure(f"the service refused {picture_path.name}: {status} {body[:300].decode('utf-8', 'replace')}")
    if headers.get("X-Restoray-Model") != text["model_digest"]:
        raise Failure(f"the service runs model {headers.get('X-Restoray-Model')}, the batch ran {text['model_digest']}")
    if body != expected:
        raise Failure(f"the service's picture of {picture_path.name} differs from the batch job's")
    return {"bytes": float(len(body)), "seconds": seconds}


def _form(files: Mapping[str, bytes]) -> tuple[bytes, str]:
    """(body, content type) of a form of file fields."""
    mark = hashlib.sha256(b"".join(files.values())).hexdigest()
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in files.items()
    ]
    return b"".join(parts) + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def post(url: str, body: bytes, timeout_s: float, kind: str = "application/octet-stream") -> tuple[int, Message, bytes]:
    """POST a picture; (status, headers, body), also of error answers. Proxies of the environment are not asked.

    Raises:
        Failure: no answer at all.
    """
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    return _exchange(request, timeout_s)


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


def wait_ready(url: str, timeout_s: float) -> None:
    """Poll /health until READY; Failure on SETUP_FAILED or when the time is up."""
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
        except (Failure, ValueError, KeyError, TypeError):  # the proxy answers in its own words before the front stands
            pass
        time.sleep(POLL_S)
    raise Failure(f"the service was not ready after {timeout_s:g} s: {last}")


class SetupFailed(Failure):
    """The model cannot be loaded, so waiting longer is no use."""


def _start_proxy(options: HTTPOptions, timeout_s: float) -> None:
    """Start Serve with one proxy, however often its controller replaces a proxy that a busy machine starts slowly.

    Raises:
        Failure: none stood in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            # called again it finds the controller there, which goes on by itself; wait_ready sees when it is done
            ray_serve.start(proxy_location="HeadOnly", http_options=options)
            return
        except (RayActorError, TimeoutError) as error:
            if time.monotonic() >= end:
                raise Failure(f"the service's proxy did not start within {timeout_s:g} s: {error}") from error
        time.sleep(POLL_S)


def _free_port(host: str, port: int) -> int:
    """`port` if nobody listens there, or a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As a server would: an address in TIME_WAIT may be taken, a live one not (Serve's own sockets share ports).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
        return int(probe.getsockname()[1])
