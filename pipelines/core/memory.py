"""Memory that this process may still use, on a machine or in a container."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_memory() -> int:
    """Bytes that this process may still use: those of the machine, or of its container if it has fewer."""
    available, left = int(psutil.virtual_memory().available), container_memory_left(CGROUP)
    return available if left is None else min(available, left)


def container_memory_left(cgroup: Path) -> int | None:
    """Free bytes below a container's memory limit; None without a limit. Reclaimable file caches count as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used = int((cgroup / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
