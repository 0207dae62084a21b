"""A Ray of our own on this machine: started for one command, bound to loopback, gone with the command.

Ray's daemons watch the driver through a pipe and end themselves when it dies, so that kill -9 leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import RetryLater, UsageError
from pipelines.home import data_folder

START_ATTEMPTS = 3


@dataclass(kw_only=True)
class LocalCluster:
    """clusters/local.yaml: how the cluster of one machine is sized."""

    name: str = "local"
    minimum_logical_cpus: int = 4
    object_store_mib: int = 400


def load_local() -> LocalCluster:
    """Read clusters/local.yaml; an unknown key is refused by OmegaConf."""
    from omegaconf import OmegaConf

    document = OmegaConf.load(data_folder("clusters") / "local.yaml")
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LocalCluster), document))
    assert isinstance(settings, LocalCluster)
    return settings


def logical_cpus(minimum: int) -> int:
    """CPUs to announce to Ray: the cores we may use, at least `minimum` so that light actors fit beside a trainer."""
    return max(minimum, len(os.sched_getaffinity(0)))


@contextmanager
def local_ray(num_cpus: int | None = None, object_store_mib: int | None = None) -> Iterator[None]:
    """Start an isolated local Ray and stop it at the end; inside a program that already has one, use that.

    Args:
        num_cpus: logical CPUs; None takes clusters/local.yaml.
        object_store_mib: shared memory for objects, MiB; None takes clusters/local.yaml.

    Raises:
        UsageError: RAY_ADDRESS names a cluster: what runs here would not be what was asked for.
        RetryLater: see start_ray.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        raise UsageError(
            "RAY_ADDRESS is set, but commands run on a Ray of their own on this machine and cannot join a cluster yet: "
            "unset it."
        )
    settings = load_local()
    # Unix socket paths hold at most 107 bytes, and Ray appends about 70 to this folder's name.
    temporary = short_temporary_folder()
    remove_leftovers(Path(temporary))
    folder = Path(tempfile.mkdtemp(prefix=f"rr-{os.getpid()}-", dir=temporary))
    in_main_thread = threading.current_thread() is threading.main_thread()
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        start_ray(
            folder,
            num_cpus or logical_cpus(settings.minimum_logical_cpus),
            object_store_mib or settings.object_store_mib,
        )
        if in_main_thread and terminate is not None:
            signal.signal(signal.SIGTERM, terminate)  # Ray put its own there, which exits with 15
        quiet_data()
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def start_ray(folder: Path, num_cpus: int, object_store_mib: int) -> None:
    """Start Ray's processes with their sockets and logs below `folder`.

    Raises:
        RetryLater: Ray gives its processes 30 s to start, and they did not make it in several attempts.
    """
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_mib * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / str(attempt)),
            )
            return
        except SystemExit as error:  # Ray's own SIGTERM handler, while it starts
            raise KeyboardInterrupt if error.code == signal.SIGTERM else error from error
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if "timed out" not in str(error):
                raise
    raise RetryLater("Ray could not start in time: this machine is too busy. The same command goes on later.")


def quiet_environment() -> None:
    """Settings that Ray reads from the environment when it is imported, for this process and the workers it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
    # a proxy of Ray Serve has 5 s to start, which is less than its imports take on a busy machine
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    # Despite its name this is what makes a local Ray listen on loopback only, on any system (seen in 2.60: with it all
    # sockets are on 127.0.0.1; without it most are on every address, whatever _node_ip_address says).
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def quiet_data() -> None:
    """No progress bars and no operator logs of Ray Data: the verbs report progress themselves."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def short_temporary_folder() -> str:
    """The system's temporary folder, or /tmp where that one's name is too long for Unix sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 16 else "/tmp"


def remove_leftovers(temporary: Path) -> None:
    """Remove the folders of our drivers that were killed; a folder's name holds its driver's process id."""
    for folder in temporary.glob("rr-*-*"):
        owner = folder.name.split("-")[1]
        try:
            if owner.isdigit() and folder.stat().st_uid == os.getuid() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was faster
            continue
