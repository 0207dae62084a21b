"""A Ray of several nodes on this machine, each with a working folder and a home of its own. Runs until its input ends.

    python _nodes.py FOLDER CPUS [CPUS ...]        one node for each number of CPUs; the first one is the head

It prints a line of JSON: the address, the address of the job server, and a process id of each node. A line "kill N" on
the standard input kills node N like a power cut.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(folder: str, *cpus: str) -> None:
    """Start the nodes, and kill some on request."""
    from ray.cluster_utils import Cluster

    cluster, dashboard, nodes = Cluster(initialize_head=False), free_port(), []
    for number, count in enumerate(cpus):
        place = Path(folder) / f"node{number}"
        for name in ("home", "work"):
            (place / name).mkdir(parents=True)
        os.environ |= {"HOME": str(place / "home"), "RESTORAY_HOME": str(place / "home" / "restoray")}
        os.chdir(place / "work")
        options: dict[str, Any] = {"num_cpus": int(count), "object_store_memory": 200 << 20}
        options["labels"] = {"group": "head" if number == 0 else "worker", "number": str(number)}
        options["dashboard_agent_listen_port"] = free_port()  # the usual one may be another Ray's
        if number == 0:
            options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard}
        nodes.append(cluster.add_node(**options))
    pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
    line = {"address": cluster.address, "jobs": f"http://127.0.0.1:{dashboard}", "raylets": pids}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    for order in sys.stdin:
        cluster.remove_node(nodes[int(order.split()[1])], allow_graceful=False)
        sys.stdout.write("killed\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
