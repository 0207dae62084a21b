"""Files of rows: one JSON object a line, appended to while a job runs and replaced as a whole when it is tidied up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.shards import write_atomic


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of the file; a last line that was cut off by a kill is dropped, a missing file has none."""
    if not path.exists():
        return []
    *lines, _cut = path.read_bytes().split(b"\n")  # not splitlines: JSON text may hold other line separators
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that a crash of the machine left damaged is as good as absent
            continue
    return rows


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file at once."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
