"""`restoray serve`: one model behind Ray Serve, or several that share their prior.

    POST /v1/restore    takes a picture as the body (image/*) or as the file field "image" of a form; the form may hold
                        a second picture "reference" for options that need one; answers with a picture
    GET  /v1/model      name, system, digest, licence, permitted use of the first model, limits
    GET  /v1/models     the same of all models, and the names by which the parameter `model` picks one
    GET  /health        {"state": "STARTING" | "READY" | "SETUP_FAILED", "detail"}; the status is 200 only when READY

The query or the form holds the parameters of /v1/restore: `front.PARAMETERS` and the system's options.
Errors are JSON: {"code", "detail"}.

The service has two deployments. The front reads and checks requests and refuses bad ones early. The restorer decodes,
restores and encodes, so only file bytes pass between processes. Service and batch job both use `components.restoring`:
the same model, key, seed and options give the same bytes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from components.images import encode_png
from components.options import OptionCheck
from components.restoring import Ask, Identity, Picture, as_sample_error, restore_pictures
from components.types import Cancellation, Restorer, SampleError
from pipelines.core.cluster import running_ray
from pipelines.core.devices import check_gpus
from pipelines.core.errors import Failure, UsageError
from pipelines.core.placement import Needs, check_placement
from pipelines.core.pool import THREADS, set_threads
from pipelines.restoration.models import Factory, OpenedModel
from pipelines.restoration.routes import Choice
from pipelines.service.client import POLL_S, wait_ready
from pipelines.service.front import STATUS, ServeLimits, build_app

APP = "restoray"
FAILED_STATUS = 500
MAX_ERRORS = 3  # more failed than restored pictures; then the replica tests itself
REPLACEMENTS = 2  # processes without one restored picture, one after the other; then the service reports its failure
END_AFTER_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The restorer's answer: a picture, or a reason code and a sentence (exceptions do not cross processes well).

    `broken` is true if the replica cannot restore any picture, and ends.
    """

    picture: bytes = b""
    format: str = "png"
    code: str = ""
    detail: str = ""
    broken: bool = False


class RestorerReplica:
    """Holds the model and restores one picture at a time. A cancelled picture ends at the sampler's next step.

    Another thread encodes a result, so that the device works on the next picture meanwhile.

    If the model cannot be loaded, the replica stays and reports the reason: after an exception Serve would restart it
    again and again.

    After MAX_ERRORS more failed than restored pictures the replica restores a picture of its own. If this fails too,
    its device or its model is broken: the process ends, and Serve starts another one. Pictures without enough memory
    count too: memory that another program or a leak holds does not come back. The process also ends if a cancelled
    picture still works one deadline later, since all others would wait behind it for ever.

    Args:
        factory: builds the restorer.
        identity: information about the model.
        limits: of one request.
        threads: torch threads.
        siblings: further models that the factory builds, by digest.
    """

    def __init__(
        self,
        factory: Factory,
        identity: Identity,
        limits: ServeLimits,
        threads: int,
        siblings: Mapping[str, Identity] = MappingProxyType({}),
    ) -> None:
        self.siblings = dict(siblings)
        self.identity, self.limits, self.deadline_s = identity, limits.of_picture(), limits.deadline_s
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="restore")
        self.encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self.restorer: Restorer | None = None
        self.failure, self.errors, self.broken = "", 0, False
        try:
            self.restorer = factory()
            set_threads(threads)
        except Exception as error:  # noqa: BLE001 - every error of loading is reported once, in one sentence
            self.failure = f"the model {identity.name} cannot be loaded: {type(error).__name__}: {error}"

    async def setup_error(self) -> str:
        """Why the model could not be loaded; "" if it was loaded. A broken replica does not answer until it ends."""
        while self.broken:
            await asyncio.sleep(POLL_S)
        return self.failure

    async def restore(
        self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes = b"", model: str = ""
    ) -> Outcome:
        """Decode, restore and encode one picture, with the model of that digest; cancelling this call stops the work.

        Any other digest is the first model's.
        """
        if self.restorer is None:
            return Outcome(code="setup_failed", detail=self.failure)
        outcome = await self._restore(Picture(key=key, data=data, seed=seed, reference=reference), ask, model)
        if outcome.picture:
            self.errors = max(0, self.errors - 1)
        elif _is_own_fault(outcome):
            self.errors += 1
            if self.errors >= MAX_ERRORS:
                self.errors, self.broken = 0, await self._fails_on_its_own_picture()
        if self.broken:
            log.error("%s fails on every picture, also on its own: the process ends", self.identity.name)
            asyncio.get_running_loop().call_later(END_AFTER_S, self.end)  # the answer leaves first
        return replace(outcome, broken=self.broken)

    def end(self) -> None:
        """End this process; Serve starts another one."""
        os._exit(1)

    async def _restore(self, picture: Picture, ask: Ask, model: str = "") -> Outcome:
        assert self.restorer is not None
        stop = threading.Event()
        restorer = self.restorer.of_model(model) if model in self.siblings else self.restorer
        identity = self.siblings.get(model, self.identity)
        work = functools.partial(restore_pictures, restorer, identity, [picture], ask, self.limits, stop.is_set)
        try:
            loop = asyncio.get_running_loop()
            future = self.pool.submit(work)
            (result,) = await asyncio.wrap_future(future)
            if isinstance(result, SampleError):
                raise result
            encoded = await loop.run_in_executor(self.encoder, result.encode)
            return Outcome(picture=encoded.data, format=encoded.format)
        except Cancellation:
            return Outcome(code="cancelled", detail="the request was cancelled")
        except asyncio.CancelledError:
            loop.call_later(self.deadline_s, self._end_if_stuck, future)
            raise
        except Exception as error:  # noqa: BLE001 - out of memory in the encoder, for example
            reason = as_sample_error(error, picture.key)
            return Outcome(code=reason.code, detail=reason.detail)
        finally:
            stop.set()  # also runs when this coroutine is cancelled and the thread still works

    def _end_if_stuck(self, future: Future[Any]) -> None:
        """End the process if a cancelled picture still works: a device that hangs looks like this."""
        if not future.done():
            log.error("a cancelled picture still works %g s later: the process ends", self.deadline_s)
            self.end()

    async def _fails_on_its_own_picture(self) -> bool:
        """Whether a small gradient fails too, with a reference if the model needs one."""
        ramp = np.linspace(0, 255, 64, dtype=np.uint8)
        png = encode_png(np.repeat(np.tile(ramp, (64, 1))[..., None], 3, axis=2))
        outcome = Outcome()
        for reference in (b"", png):
            outcome = await self._restore(Picture(key="self-test", data=png, seed=0, reference=reference), Ask())
            if outcome.code != "refused":
                break
        return _is_own_fault(outcome)


def _is_own_fault(outcome: Outcome) -> bool:
    """Whether the replica may be the cause of a failure: no fault of the picture, the options or the load."""
    return STATUS.get(outcome.code) == FAILED_STATUS or outcome.code == "out_of_memory"


class FrontDoor:
    """The HTTP side: the backend that `build_app` takes, on top of the restorer's handle."""

    def __init__(
        self,
        restorer: DeploymentHandle,
        identity: Identity,
        limits: ServeLimits,
        check: OptionCheck,
        choices: Sequence[Choice] = (),
    ) -> None:
        self.restorer, self.identity, self.limits, self.check = restorer, identity, limits, check
        self.choices = choices
        self.state, self.detail, self.replacements = "STARTING", "the model is being loaded", 0
        self.setup: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self, self.identity, self.limits, self.check, self.choices)

    async def health(self) -> tuple[str, str]:
        """(state, detail) of the restorer."""
        if self.state == "STARTING" and (self.setup is None or self.setup.done()):
            self.setup = asyncio.create_task(self._wait_for_setup())
        if self.setup is not None and not self.setup.done():
            await asyncio.wait({self.setup}, timeout=POLL_S)
        return self.state, self.detail

    async def _wait_for_setup(self) -> None:
        """Wait until the restorer has loaded its model or failed."""
        try:
            failure = await self.restorer.setup_error.remote()
            self.state, self.detail = ("SETUP_FAILED", failure) if failure else ("READY", "")
        except DeploymentUnavailableError:
            self.state = "SETUP_FAILED"
            self.detail = f"the process that loads the model {self.identity.name} keeps dying; is memory short?"
        except (RayError, ReplicaUnavailableError, BackPressureError) as error:
            self.detail = f"waiting for the model ({type(error).__name__})"  # the next request for /health tries again

    async def restore(
        self, data: bytes, key: str, seed: int, ask: Ask, reference: bytes = b"", model: str = ""
    ) -> Outcome:
        """Restore one picture. Cancelling this call (the client left, or the deadline passed) cancels the work.

        If the restorer's process dies, this method does not retry: the picture may be the cause. The client may retry.
        """
        state, detail = await self.health()
        if state != "READY":
            return Outcome(code="setup_failed" if state == "SETUP_FAILED" else "starting", detail=detail)
        response = self.restorer.restore.remote(data, key, seed, ask, reference, model)
        try:
            outcome: Outcome = await response
        except BackPressureError:
            return Outcome(code="busy", detail="the queue is full; try again")
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError):
            self.state, self.detail = "STARTING", "the restoring process died and is started again"
            return Outcome(code="restarting", detail=self.detail)
        except asyncio.CancelledError:
            response.cancel()
            raise
        if outcome.picture:
            self.replacements = 0
        elif outcome.broken and self.state == "READY":
            self.replacements += 1
            self.state, self.detail = "STARTING", "the restoring process failed on every picture and is replaced"
            if self.replacements > REPLACEMENTS:
                self.state = "SETUP_FAILED"
                self.detail = f"{self.identity.name} fails on every picture, also in {REPLACEMENTS} new processes"
        return outcome


@dataclass(kw_only=True)
class RunningService:
    """A running service. `url` does not end in a slash; `stop` frees the port and ends the processes."""

    url: str
    stack: ExitStack

    def stop(self) -> None:
        """Stop the service; a second call does nothing."""
        self.stack.close()

    def __enter__(self) -> RunningService:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    model: OpenedModel,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    limits: ServeLimits | None = None,
    num_gpus: float = 0.0,
    needs: Needs = Needs(),
    threads: int = THREADS,
    wait: bool = True,
    timeout_s: float = 300.0,
) -> RunningService:
    """Start the service on the running Ray, or on a local Ray of its own.

    Args:
        model: see restoration.models.open_model; with siblings requests may name a model.
        host: address to listen on.
        port: 0 takes a free port.
        limits: of one request; None takes the defaults.
        num_gpus: GPUs of the replica.
        needs: where the replica may run, and further needs.
        threads: torch threads of the replica; with another number than the batch job's the last bit may differ.
        wait: return only when the model is loaded.
        timeout_s: limit for that.

    Raises:
        UsageError: the port is in use, or no node can hold the replica.
        Failure: the model cannot be loaded, or not in time; or this Ray already runs a service.
    """
    limits = limits or ServeLimits()
    needs = needs.or_else(1, 1.0, num_gpus)
    if needs.workers != 1:
        raise UsageError("a service has one restorer: placement workers must be 1.")
    check_gpus({"num_gpus": needs.gpus})
    with ExitStack() as stack:
        stack.enter_context(running_ray())
        check_placement("the restorer", needs)
        address, port = _place_of_proxy(host, port)
        if ray_serve.status().applications:  # its port cannot change, and stopping our service would stop it too
            raise Failure("this Ray already runs a service; stop that service first")
        stack.callback(ray_serve.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the commands print the address themselves
        start_proxy(
            HTTPOptions(host=host, port=port, request_timeout_s=limits.deadline_s + limits.read_timeout_s + 5),
            timeout_s,
        )
        restorer = ray_serve.deployment(
            name="restorer",
            # one is restored while the last one is encoded; Serve's queue cannot be empty
            max_ongoing_requests=2 if limits.max_queued > 1 else 1,
            max_queued_requests=max(1, limits.max_queued - 1),
            max_constructor_retry_count=2,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": needs.cpus, "num_gpus": needs.gpus, **needs.options()},
        )(RestorerReplica)
        front = ray_serve.deployment(
            name="front",
            max_ongoing_requests=limits.max_queued + 64,
            graceful_shutdown_timeout_s=5,
            ray_actor_options={"num_cpus": 0},
        )(ray_serve.ingress()(FrontDoor))
        siblings = {each.identity.digest: each.identity for each in model.siblings}
        replica = restorer.bind(model.factory, model.identity, limits, threads, siblings)
        target = front.bind(replica, model.identity, limits, model.check, model.choices)
        ray_serve.run_many(
            [ray_serve.RunTarget(target=target, name=APP, route_prefix="/")], wait_for_applications_running=False
        )
        service = RunningService(url=url_of(address, port), stack=ExitStack())
        if wait:
            wait_ready(service.url, timeout_s)
        service.stack = stack.pop_all()
        return service


def serve(
    model: OpenedModel,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    blocking: bool = True,
    on_ready: Callable[[str], None] | None = None,
    **settings: Any,
) -> RunningService:
    """Serve until an interrupt, or without `blocking` until `.stop()`.

    Args:
        model, host, port: as `start`.
        blocking: return only after an interrupt.
        on_ready: gets the address once the model is loaded.
        settings: the keyword arguments of `start`.

    Raises:
        UsageError, Failure: as `start`.
    """
    service = start(model, host, port, **settings)
    if on_ready:
        on_ready(service.url)
    if blocking:
        with service:
            threading.Event().wait()
    return service


def url_of(host: str, port: int) -> str:
    """The address of a service; IPv6 addresses stand in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def start_proxy(options: HTTPOptions, timeout_s: float) -> None:
    """Start Serve with one proxy.

    On a busy machine a proxy starts slowly, and Serve's controller replaces it. This function waits until one runs.

    Raises:
        Failure: no proxy ran in time.
    """
    end = time.monotonic() + timeout_s
    while True:
        try:
            # a second call finds the running controller, which continues by itself; wait_ready notices when it is ready
            ray_serve.start(proxy_location="HeadOnly", http_options=options)
            return
        except (RayActorError, TimeoutError) as error:
            if time.monotonic() >= end:
                raise Failure(f"the service's proxy did not start within {timeout_s:g} s: {error}") from error
        time.sleep(POLL_S)


def _place_of_proxy(host: str, port: int) -> tuple[str, int]:
    """Address and port at which this process reaches the proxy, which listens on the head node.

    Raises:
        UsageError: the port is in use, or the head is another machine and `host` is only that machine itself.
    """
    import ray

    head = next(node for node in ray.nodes() if node["Alive"] and node["Resources"].get("node:__internal_head__"))
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return host, _free_port(host, port)
    address = str(head["NodeManagerAddress"])
    if host == "localhost" or host.startswith("127.") or host == "::1":
        raise UsageError(
            f"the service listens on the head node ({address}), and {host} there is reachable from that node only: "
            "choose --host 0.0.0.0, or start it there (restoray submit)."
        )
    if not port:
        raise UsageError(f"the service listens on the head node ({address}): name a port that is free there.")
    return address if host in ("0.0.0.0", "::") else host, port


def _free_port(host: str, port: int) -> int:
    """`port` if no process listens there; a free port for 0. Raises UsageError for a wrong host or a port in use."""
    if not host.strip():  # sockets take it for every address
        raise UsageError("the host to listen on is empty: 127.0.0.1 is this machine, 0.0.0.0 is every address.")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: a port in TIME_WAIT may be used again, a live one may not (Serve's own sockets share ports).
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (socket.gaierror, UnicodeError) as error:
            raise UsageError(f"{host} is no address to listen on ({error}); choose another --host") from error
        except OSError as error:
            raise UsageError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
        return int(probe.getsockname()[1])
