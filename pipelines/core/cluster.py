"""The Ray of a command: the cluster of --address or RAY_ADDRESS, one that already runs here, else a local Ray.

A local Ray starts with the command, listens on loopback only, and ends with the command. Ray's daemons watch the driver
through a pipe and end when the driver dies. So even kill -9 leaves no process behind.
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

import psutil
from omegaconf import OmegaConf

from pipelines.core.environment import cluster_address, cores, quiet_environment
from pipelines.core.errors import Failure, RestorayError, RetryLater, UsageError
from pipelines.core.home import data_folder
from pipelines.core.joining import check_same_ray, joined_ray
from pipelines.core.memory import usable_memory
from pipelines.core.ray_output import keep_logs, ray_output_in
from pipelines.core.ray_watch import RayWatch

START_ATTEMPTS = 3


@dataclass(kw_only=True)
class LocalCluster:
    """Contents of clusters/local.yaml: the size of the cluster on one machine.

    Attributes:
        minimum_logical_cpus: CPUs to announce on a machine with fewer cores.
        object_store_share: of the memory that this process may still use.
        object_store_least_mib, object_store_most_mib: bounds of that share. A recipe may need more.
    """

    name: str = "local"
    minimum_logical_cpus: int = 4
    object_store_share: float = 0.1
    object_store_least_mib: int = 400
    object_store_most_mib: int = 4096


def load_local() -> LocalCluster:
    """Read clusters/local.yaml; OmegaConf refuses an unknown key."""
    document = OmegaConf.load(data_folder("clusters") / "local.yaml")
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LocalCluster), document))
    assert isinstance(settings, LocalCluster)
    return settings


def logical_cpus(minimum: int) -> int:
    """CPUs to announce to Ray: the cores of this process, and at least `minimum`, so that small actors have room."""
    return max(minimum, cores())


def local_sizes(settings: LocalCluster, usable: int, need_mib: float = 0.0) -> tuple[int, int]:
    """Object store and heap of a local Ray, MiB.

    Args:
        settings: see LocalCluster.
        usable: bytes of memory that this process may still use.
        need_mib: MiB that the work keeps in the object store at once.

    Raises:
        UsageError: the work needs more than half of the memory for its object store.
    """
    usable_mib = usable / 2**20
    share = settings.object_store_share * usable_mib
    bounded = min(max(share, settings.object_store_least_mib), settings.object_store_most_mib, usable_mib / 2)
    if need_mib > usable_mib / 2:
        raise UsageError(
            f"the batches on their way to the trainers take {need_mib:.0f} MiB, and this machine has {usable_mib:.0f} "
            "MiB of free memory for them and everything else: lower placement.workers, batch_size or resolution, or "
            "use a cluster (--address)."
        )
    store = max(1, int(max(bounded, need_mib)))
    return store, max(1, int(usable_mib) - store)


@contextmanager
def running_ray(need_mib: float = 0.0) -> Iterator[None]:
    """Use a Ray inside a `with` block: in order that of RAY_ADDRESS, the one of this process, a new local one.

    --address sets RAY_ADDRESS, and so does Ray in a job that was submitted to a cluster.

    Args:
        need_mib: MiB of the object store that the work needs; only a local Ray has its size from us.

    Raises:
        UsageError, Failure, RetryLater: see joining.joined_ray and local_ray.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        if not _depth:
            check_same_ray()
        yield
        return
    _depth.append(None)
    try:
        if cluster_address():
            with joined_ray():
                quiet_data()
                yield
        else:
            with local_ray(need_mib=need_mib):
                yield
    finally:
        _depth.pop()


_depth: list[None] = []
"""Not empty while `running_ray` of this process has a Ray: inner calls use that one."""


@contextmanager
def local_ray(
    num_cpus: int | None = None, object_store_mib: int | None = None, need_mib: float = 0.0
) -> Iterator[None]:
    """Start an isolated local Ray and stop it at the end. If the process already has a Ray, use that one.

    Ray's own lines go to files. After a failure its logs are kept, and a note on the error names their folder.

    Args:
        num_cpus: logical CPUs; None: from clusters/local.yaml.
        object_store_mib: shared memory for objects, MiB; None: see local_sizes.
        need_mib: MiB that the work keeps there at once.

    Raises:
        UsageError: see local_sizes.
        RetryLater: see start_ray.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    settings = load_local()
    store_mib, heap_mib = local_sizes(settings, usable_memory(), need_mib)
    # A Unix socket path holds at most 107 bytes, and Ray appends about 70 to this folder's name.
    temporary = short_temporary_folder()
    remove_ray_folders(Path(temporary))
    folder = Path(tempfile.mkdtemp(prefix=f"rr-{os.getpid()}-", dir=temporary))
    in_main_thread = threading.current_thread() is threading.main_thread()
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        with ray_output_in(folder):
            try:
                start_ray(
                    folder,
                    num_cpus or logical_cpus(settings.minimum_logical_cpus),
                    object_store_mib or store_mib,
                    heap_mib,
                )
                if in_main_thread and sigterm_handler is not None:
                    signal.signal(signal.SIGTERM, sigterm_handler)  # Ray installs its own handler, which exits with 15
                quiet_data()
                with RayWatch(folder):
                    yield
            finally:
                ray.shutdown()
    except Exception as error:
        if not isinstance(error, RestorayError) or isinstance(error, Failure | RetryLater):
            logs = keep_logs(folder)
            if logs is not None:
                error.add_note(f"Ray's logs: {logs}")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_ray(folder: Path, num_cpus: int, object_store_mib: int, heap_mib: int) -> None:
    """Start Ray's processes with their sockets and logs below `folder`.

    Raises:
        RetryLater: the processes did not start within Ray's limit of 30 s in START_ATTEMPTS attempts.
    """
    import ray

    # With this variable set, Ray takes its value as it is; without it, Ray asks every caller for a token.
    os.environ.pop("RAY_AUTH_MODE", None)
    for attempt in range(START_ATTEMPTS):
        try:
            with _no_arguments():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    object_store_memory=object_store_mib * 2**20,
                    _memory=heap_mib * 2**20,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder / str(attempt)),
                )
            return
        except SystemExit as error:  # from Ray's own SIGTERM handler, while Ray starts
            raise KeyboardInterrupt if error.code == signal.SIGTERM else error from error
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if "timed out" not in str(error):
                raise
    raise RetryLater("Ray could not start in time: this machine is too busy. Run the same command again later.")


@contextmanager
def _no_arguments() -> Iterator[None]:
    """Hide the command line from Ray inside a `with` block.

    Ray records the command line with its secrets as the job's entry point, and cannot encode names that are not UTF-8.
    """
    from ray._private import utils

    name = getattr(utils, "get_entrypoint_name", None)
    if name is not None:
        utils.get_entrypoint_name = lambda: "restoray"
    try:
        yield
    finally:
        if name is not None:
            utils.get_entrypoint_name = name


def quiet_data() -> None:
    """Turn off progress bars and operator logs of Ray Data: the commands report progress themselves."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def short_temporary_folder() -> str:
    """The system's temporary folder, or /tmp where its name is too long for Unix sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 16 else "/tmp"


def remove_ray_folders(temporary: Path) -> None:
    """Remove the folders of our dead drivers; a folder's name holds the process id of its driver."""
    for folder in temporary.glob("rr-*-*"):
        owner = folder.name.split("-")[1]
        try:
            if owner.isdigit() and folder.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner)):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process removed it first
            continue
