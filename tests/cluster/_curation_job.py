"""Curate on a cluster of three local nodes, and kill a process or a node in the middle; the tests run it as a program.

usage: _curation_job.py SOURCE OUT VICTIM PHASE, with VICTIM worker, node or driver and PHASE measure or shards
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from components.corpora import CorpusSpec, FilterSpec, SourceSpec, SplitSpec
from pipelines.core.environment import quiet_environment

DONE_BEFORE = 2  # complete parts or shards when the victim dies


def corpus_spec(source: str) -> CorpusSpec:
    """The spec of every run of these tests."""
    return CorpusSpec(
        name="faults",
        sources=[SourceSpec(kind="tar", path=f"{source}/*.tar"), SourceSpec(kind="folder", path=f"{source}/loose")],
        split=SplitSpec(held_out_fraction=0.1),
        filters=FilterSpec(min_side_px=16),
        shard_mib=0.1,
    )


def slow_look(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
    """The real look, slow enough that parts are in work when the victim dies."""
    from pipelines.curation.measure import look

    time.sleep(0.01)
    return look(data, filters, key)


def kill_a_worker() -> int:
    """SIGKILL one of this program's own Ray workers that works on a part or a shard; returns its pid, or 0."""
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and ("measure_batch" in title or "write_many" in title):
            process.kill()
            return process.pid
    return 0


def main(source: str, out: str, victim: str, phase: str) -> None:
    """Curate, and kill once."""
    quiet_environment()
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.core.cluster import quiet_data
    from pipelines.curation.curate import curate

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    cluster.connect()
    quiet_data()
    victims: list[str] = []

    def progress(done: int, of: int = 0, note: str = "") -> None:
        here = "shards" if note == "shards" else "measure" if "pictures" in note else ""
        if victims or here != phase or done < DONE_BEFORE or done >= of:
            return
        if victim == "driver":
            os.kill(os.getpid(), signal.SIGKILL)
        elif victim == "node":
            cluster.remove_node(nodes[0], allow_graceful=False)
            victims.append("node")
        elif pid := kill_a_worker():
            victims.append(f"worker {pid}")

    result = curate(corpus_spec(source), Path(out), progress=progress, look_at=slow_look)
    sys.stdout.write(f"killed {victims}; digest {result.digest}\n")
    assert victims, "nothing was killed: the test shows nothing"
    ray.shutdown()  # before the nodes are removed: a driver that loses them ends with 1
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
