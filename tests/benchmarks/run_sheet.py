"""A sheet of a run's held-out pictures for README and docs: input, result and original side by side, with their scores.

python tests/benchmarks/run_sheet.py runs/demo --keys chelsea coffee --out docs/images/demo.jpg [--side 192]
python tests/benchmarks/run_sheet.py --folders lq restored --out sheet.jpg     # folders without targets or scores
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.images import ANY_SHAPE, Image, decode
from pipelines.core.pictures import list_pictures
from pipelines.pages.sheets import contact_sheet

METRICS = ("psnr", "ssim", "st_lpips")


def run_folders(run: Path) -> tuple[list[Path], dict[str, Mapping[str, Any]]]:
    """The folders lq, restored and hq of a run's last restore stage, and the scores by key."""
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    places = {stage["verb"]: run / stage["folder"] for stage in plan["stages"]}
    lines = (places["evaluate"] / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [places["restore"] / name for name in ("lq", "restored", "hq")], {row["key"]: row["scores"] for row in rows}


def caption(key: str, scores: Mapping[str, Any] | None) -> str:
    """The key, and a line for each metric: input -> result."""
    if scores is None:
        return key[:40]
    pairs = ((name, scores["lq"].get(name), scores["restored"].get(name)) for name in METRICS)
    return "\n".join([key[:40], *(f"{name} {a:.4g} to {b:.4g}" for name, a, b in pairs if a is not None)])


def sheet(
    folders: Sequence[Path], scores: Mapping[str, Mapping[str, Any]], keys: Sequence[str], side_px: int, columns: int
) -> bytes:
    """A JPEG; each picture's middle square, in the order of the folders. All pictures without keys."""
    listed = [list_pictures(folder)[0] for folder in folders]
    cells: list[tuple[list[Image], str]] = []
    for key in keys or sorted(listed[-1]):
        pictures = [decode(paths[key].read_bytes(), ANY_SHAPE, key) for paths in listed]
        cells.append((pictures, caption(key, scores.get(key))))
    return contact_sheet(cells, side_px, columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the sheet."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--folders", type=Path, nargs="*", default=[])
    parser.add_argument("--keys", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--columns", type=int, default=0)
    settings = parser.parse_args(argv)
    folders, scores = run_folders(settings.run) if settings.run else (settings.folders, {})
    settings.out.write_bytes(sheet(folders, scores, settings.keys, settings.side, settings.columns))


if __name__ == "__main__":
    main()
