"""Files of rows: one JSON object a line, appended to while a job runs and replaced as a whole when it is tidied up.

Nothing here waits for the disk: each row names its files' sha256, and a resumed job checks them, so what a power cut
tears is made again. Waiting costs up to a second a file on a busy disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that readers and killed writers see old or whole."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
