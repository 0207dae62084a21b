"""A worker, a node or the driver dies during a curation: the result has the same bytes, and no row is lost."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipelines.corpus import shards
from pipelines.curation.curate import curate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

JOB = Path(__file__).parent / "_curation_job.py"
TARS, PER_TAR, LOOSE = 6, 60, 200
JOB_TIMEOUT_S = 800  # a busy machine takes minutes to start three nodes


def load_job() -> Any:
    spec = importlib.util.spec_from_file_location("curation_job", JOB)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jpeg(number: int) -> bytes:
    """A small picture, different for each number; some are broken, some are copies."""
    if number % 50 == 49:
        return jpeg(0)[:400]
    if number % 40 == 39:
        number -= 1
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 70])[1].tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for number in range(TARS):
        with tarfile.open(folder / f"{number}.tar", "w") as target:
            for place in range(PER_TAR):
                info = tarfile.TarInfo(f"t{number}-{place:04d}.jpg")
                data = jpeg(number * PER_TAR + place)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
    (folder / "loose").mkdir()
    for place in range(LOOSE):
        (folder / "loose" / f"l{place:04d}.jpg").write_bytes(jpeg(10_000 + place))
    return folder


def content(out: Path) -> dict[str, str]:
    """Digest of every file of a corpus that readers use."""
    files = [*out.glob("*.jsonl"), *out.glob("*.arrow"), out / "index.json", *out.glob("*/*.tar")]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "shards.jsonl"  # a log: its lines are in the order of arrival
    }


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    result = curate(load_job().corpus_spec(str(source)), out)
    assert result.accepted + result.rejected == TARS * PER_TAR + LOOSE
    assert {"truncated", "duplicate"} <= set(result.reasons)
    assert shards.verify(shards.open_corpus(out)) == []
    return content(out)


def run_job(source: Path, out: Path, victim: str, phase: str) -> subprocess.CompletedProcess[bytes]:
    top = Path(__file__).resolve().parents[2]
    # Ray gives a node 30 s to start; a busy machine needs more for three nodes.
    environment = {**os.environ, "PYTHONPATH": str(top), "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "240"}
    command = [sys.executable, str(JOB), str(source), str(out), victim, phase]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as job:
        try:
            output, errors = job.communicate(timeout=JOB_TIMEOUT_S)
        except BaseException:
            os.killpg(job.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, job.returncode, output, errors)


@pytest.mark.full
@pytest.mark.parametrize("phase", ["measure", "shards"])
@pytest.mark.parametrize("victim", ["worker", "node"])
def test_a_death_in_the_cluster_changes_nothing(
    source: Path, reference: dict[str, str], tmp_path: Path, victim: str, phase: str
) -> None:
    job = run_job(source, tmp_path / "out", victim, phase)
    assert job.returncode == 0, job.stderr.decode()[-3000:]
    assert b"killed ['" in job.stdout
    assert content(tmp_path / "out") == reference


@pytest.mark.full
@pytest.mark.parametrize("phase", ["measure", "shards"])
def test_the_driver_dies_and_the_rerun_ends_the_same(
    source: Path, reference: dict[str, str], tmp_path: Path, phase: str
) -> None:
    job = run_job(source, tmp_path / "out", "driver", phase)
    assert job.returncode == -signal.SIGKILL, job.stderr.decode()[-3000:]
    assert not (tmp_path / "out" / "index.json").exists()
    measured_parts = len(list((tmp_path / "out" / "work" / "measured").glob("*.parquet")))
    assert measured_parts >= 2
    again = curate(load_job().corpus_spec(str(source)), tmp_path / "out")
    assert again.reused > 0
    assert content(tmp_path / "out") == reference
    plans = [json.loads(line)["plan"] for line in (tmp_path / "out" / "shards.jsonl").read_text().splitlines()]
    assert len(plans) == len(set(plans))  # no shard was written twice
