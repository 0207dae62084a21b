"""Time and size of PNG encoding by level, on the pictures that a restoration writes: the basis of PNG_LEVEL.

    python tests/benchmarks/bench_png.py --images FOLDER [--side 1024] [--pictures 8] [--repeats 3]

Prints one JSON row for each level: the time and the size of the files relative to level 6, and in absolute numbers the
time of a picture on this machine. Without --images it takes pictures of dead leaves with noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from timing import is_void, median_and_spread, ratio

from components.images import Image, decode, encode_png
from components.synthetic import dead_leaves

REFERENCE_LEVEL = 6


def pictures_of(folder: Path | None, side: int, count: int) -> list[Image]:
    """Return pictures of at most side x side pixels: the middles of a folder's first ones, or dead leaves."""
    if folder is None:
        noise = np.random.default_rng(0).normal(0, 2, (count, side, side, 3))
        leaves = np.stack([dead_leaves(side, 0, number) for number in range(count)])
        return list((leaves + noise).clip(0, 255).astype(np.uint8))
    chosen = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".png"))[:count]:
        image = decode(path.read_bytes())
        top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
        chosen.append(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return chosen


def measure(pictures: Sequence[Image], levels: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """Encode every picture at every level; the median CPU time of the repeats counts.

    Returns:
        For each level: level, time and size relative to level 6, ms of a picture, bits of a pixel, and whether the
        times are void.
    """
    if not pictures or repeats < 1:
        raise SystemExit(f"at least one picture and one repeat are needed, got {len(pictures)} and {repeats}")
    seconds, spreads, sizes = {}, {}, {}
    for level in dict.fromkeys([REFERENCE_LEVEL, *levels]):
        runs = []
        for _ in range(repeats):
            start = time.process_time()
            sizes[level] = sum(len(encode_png(picture, level=level)) for picture in pictures)
            runs.append(time.process_time() - start)
        seconds[level], spreads[level] = median_and_spread(runs)
    pixels = sum(picture.shape[0] * picture.shape[1] for picture in pictures)
    return [
        {
            "level": level,
            "time": ratio(seconds[level], seconds[REFERENCE_LEVEL], 3),
            "size": round(sizes[level] / sizes[REFERENCE_LEVEL], 4),
            "ms": round(1e3 * seconds[level] / len(pictures), 1),
            "bits_per_pixel": round(8 * sizes[level] / pixels, 2),
            "void": is_void(repeats, max(spreads[level], spreads[REFERENCE_LEVEL])),
        }
        for level in levels
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--levels", type=int, nargs="+", default=list(range(10)))
    options = parser.parse_args(arguments)
    pictures = pictures_of(options.images, options.side, options.pictures)
    for row in measure(pictures, options.levels, options.repeats):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
