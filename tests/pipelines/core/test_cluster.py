"""The local Ray: it listens on loopback only, restores the SIGTERM handler, and leaves no process and no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core import ray_watch
from pipelines.core.cluster import load_local, local_sizes, logical_cpus, remove_ray_folders
from pipelines.core.errors import UsageError
from pipelines.core.ray_output import DRIVER_LOG, KEPT_BYTES, keep_logs
from pipelines.core.ray_watch import RayWatch

PROGRAM = """
import json, os, pickle, signal, sys
from pathlib import Path
from pipelines.core.cluster import local_ray

def mine(signum, frame): pass

class Stranger:
    def __reduce__(self):
        return open, (sys.argv[1], "w")

signal.signal(signal.SIGTERM, mine)
with local_ray(num_cpus=3, object_store_mib=80):
    import grpc, psutil, ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    @serve.deployment
    class App:
        def __call__(self, request): return ""

    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=0))
    serve.run(App.bind())
    outside, answers = [], []
    for process in psutil.Process().children(recursive=True):
        for c in process.net_connections(kind="inet"):
            if c.status == psutil.CONN_LISTEN and not c.laddr.ip.startswith(("127.", "::1", "::ffff:127.")):
                outside.append(process.name().split(":")[2])
                stub = ASGIServiceStub(grpc.insecure_channel(f"127.0.0.1:{c.laddr.port}"))
                message = ASGIRequest(pickled_request_metadata=pickle.dumps(Stranger()), request_args=b"")
                try:
                    stub.HandleRequest(message, timeout=20)
                except grpc.RpcError as error:
                    answers.append(error.code().name)
    serve.shutdown()
    with local_ray():  # uses the Ray that runs
        cpus = ray.cluster_resources()["CPU"]
    runs = ray.is_initialized()
    same_handler = signal.getsignal(signal.SIGTERM) is mine
left = len(psutil.Process().children())
print(json.dumps([cpus, outside, answers, runs, same_handler, ray.is_initialized(), left]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", pytest.param(None, marks=pytest.mark.full)])
def test_local_ray_is_isolated(mode: str | None, repository: Path, tmp_path: Path) -> None:
    """Only a replica of Serve listens outside loopback, and it does not unpickle what a stranger sends."""
    environment = {**os.environ, "HOME": str(tmp_path / "home"), **({"RAY_AUTH_MODE": mode} if mode else {})}
    environment.pop("RAY_AUTH_TOKEN", None)
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "unpickled")],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    isolated = [3.0, ["ServeReplica"], ["UNAUTHENTICATED"], True, True, False, 0]
    assert json.loads(process.stdout) == isolated  # and no line of Ray is on standard output
    assert not (tmp_path / "unpickled").exists()


FAILURE = """
import sys
from pipelines.core import ray_output
from pipelines.core.cluster import local_ray
from pipelines.core.errors import Failure

ray_output.separate_stderr()
try:
    with local_ray(num_cpus=2, object_store_mib=80):
        import os, ray

        @ray.remote
        def say(): print("a line of a worker", flush=True)

        ray.get(say.remote())
        os.write(2, b"a line of C++\\n")
        print("a line of ours", file=sys.stderr)
        raise Failure("no luck")
except Failure as error:
    print(getattr(error, "__notes__", []))
os.write(2, b"after Ray\\n")
"""


def run_code(code: str, argument: str | bytes, repository: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code with one argument in a process of its own, with RESTORAY_HOME at tmp_path."""
    return subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=repository,
        env={**os.environ, "RESTORAY_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
def test_the_logs_of_a_failed_run_are_kept_and_rays_lines_stay_out_of_the_terminal(
    repository: Path, tmp_path: Path
) -> None:
    process = run_code(FAILURE, b"caf\xe9", repository, tmp_path)  # Ray cannot encode such an argument
    assert process.stderr.splitlines() == ["a line of ours", "after Ray"]
    (logs,) = (tmp_path / "logs").iterdir()
    assert process.stdout.strip() == str([f"Ray's logs: {logs}"])
    assert (logs / DRIVER_LOG).read_text() == "a line of C++\n"
    assert "a line of a worker" in "".join(path.read_text() for path in logs.glob("worker-*.out"))


DEATH = """
import os, sys, time
from pipelines.core import ray_output, ray_watch
from pipelines.core.cluster import local_ray
from pipelines.core.errors import Failure

ray_output.separate_stderr()
ray_watch.end_with(lambda message: print(message, flush=True))
with local_ray(num_cpus=1, object_store_mib=80):
    watched = ray_watch.ray_processes()
    print(*watched, flush=True)
    watched["raylet"].kill()
    if sys.argv[1] == "waits":
        time.sleep(60)
    watched["raylet"].wait()
    raise Failure("a worker could not be reached")
"""


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["waits", "fails"])
def test_the_death_of_ray_ends_a_command_with_one_sentence(driver: str, repository: Path, tmp_path: Path) -> None:
    """Ray itself would end the process from C++ after 10 s, without a word."""
    process = run_code(DEATH, driver, repository, tmp_path)
    assert (process.returncode, process.stderr) == (1, "")
    (logs,) = (tmp_path / "logs").iterdir()
    sentence = "Ray's process raylet ended, perhaps for lack of memory; the same command continues."
    assert process.stdout.splitlines() == ["raylet gcs_server", sentence, f"Ray's logs: {logs}"]
    assert (logs / "raylet.out").is_file()


def test_without_a_command_the_death_of_ray_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_watch, "_reports", [])
    monkeypatch.setattr(ray_watch, "POLL_S", 0.01)
    monkeypatch.setattr(ray_watch, "GRACE_S", 0.01)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr(ray_watch, "ray_processes", lambda: {"gcs_server": dead})
    with RayWatch(tmp_path) as watch:
        watch.thread.join(20)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["Ray's process gcs_server ended"]


def test_logs_of_two_attempts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    for attempt in ("0", "1"):
        (tmp_path / "ray" / attempt / "logs").mkdir(parents=True)
        (tmp_path / "ray" / attempt / "logs" / "raylet.err").write_text(attempt)
    logs = keep_logs(tmp_path / "ray")
    assert logs is not None
    assert {p.name: p.read_text() for p in logs.iterdir()} == {"raylet.err": "0", "1-logs-raylet.err": "1"}


def test_only_the_newest_logs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    for number in range(8):
        (tmp_path / "home" / "logs" / f"20200101-00000{number}-1").mkdir(parents=True)
    session = tmp_path / "ray" / "session_x" / "logs"
    session.mkdir(parents=True)
    (session / "long.log").write_bytes(b"x" * (KEPT_BYTES + 5) + b"end")
    (session / "empty.log").touch()
    copy = keep_logs(tmp_path / "ray")
    assert copy is not None
    assert [path.name for path in copy.iterdir()] == ["long.log"]
    assert (copy / "long.log").stat().st_size == KEPT_BYTES and (copy / "long.log").read_bytes().endswith(b"xend")
    names = sorted(path.name for path in copy.parent.iterdir())
    assert names == [f"20200101-00000{number}-1" for number in (4, 5, 6, 7)] + [copy.name]


def test_sizes_follow_machine_and_recipe() -> None:
    """A tenth of the memory within bounds, more for a recipe; the rest is heap. All in MiB."""
    settings = load_local()
    gib = 2**30
    assert local_sizes(settings, 20 * gib) == (2048, 20480 - 2048)
    assert local_sizes(settings, 2 * gib) == (400, 2048 - 400)  # the least
    assert local_sizes(settings, 500 * 2**20) == (250, 250)  # no more than half
    assert local_sizes(settings, 640 * gib) == (4096, 640 * 1024 - 4096)  # the most
    assert local_sizes(settings, 20 * gib, need_mib=8 * 576) == (8 * 576, 20480 - 8 * 576)  # eight ranks of the paper
    with pytest.raises(UsageError, match="take 36864 MiB, and this machine has 20480 MiB"):
        local_sizes(settings, 20 * gib, need_mib=64 * 576)


def test_sizes() -> None:
    settings = load_local()
    assert settings.minimum_logical_cpus >= 4
    assert logical_cpus(64) == 64 and logical_cpus(1) >= 1


def test_only_folders_of_dead_drivers_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"rr-{dead.pid}-a", f"rr-{os.getpid()}-b", "rr-x-c", "other"):
        (tmp_path / name).mkdir()
    remove_ray_folders(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"rr-{os.getpid()}-b", "rr-x-c", "other"}
