"""Cost of curation beyond decoding, for each picture: CPU time of one pass, one thread, interleaved rounds.

    python tests/benchmarks/bench_curation.py --images FOLDER

Pictures are JPEGs of quality 92 whose short side is --side pixels, made from those of the folder (or dead leaves).
"Named" is the work that a performance goal names: decode, size, sharpness, hash. "Look" is all that `restoray curate`
measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
from timing import is_void, median_and_spread, ratio

from components.corpora import FilterSpec
from components.fingerprints import fingerprint
from components.images import decode, resize_short_side
from components.quality import measure_scores
from components.quality.detail import spectral_detail
from components.quality.views import view
from components.synthetic import dead_leaves
from components.types import Image, SampleError
from pipelines.curation.measure import look

QUALITY = 92
BASE = "decode"


def as_jpeg(picture: Image, side_px: int) -> bytes:
    """The picture resized to a short side, as a JPEG."""
    small = resize_short_side(picture, side_px)
    return cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def pictures(folder: Path | None, side_px: int, count: int) -> list[bytes]:
    """The first pictures of a folder with a short side of at least side_px; dead leaves without a folder."""
    if folder is None:
        return [as_jpeg(dead_leaves(side_px, 0, number), side_px) for number in range(count)]
    jpegs: list[bytes] = []
    for path in sorted(folder.iterdir()):
        try:
            picture = decode(path.read_bytes())
        except SampleError:
            continue
        if min(picture.shape[:2]) >= side_px:
            jpegs.append(as_jpeg(picture, side_px))
    if not jpegs:
        raise SystemExit(f"{folder} holds no picture of {side_px} pixels or more")
    return jpegs[:count]


def arms() -> dict[str, Callable[[bytes], object]]:
    """Timed functions by name."""
    filters = FilterSpec(min_side_px=16)

    def sharpness_of(data: bytes) -> tuple[Image, float]:
        picture = decode(data)
        return picture, spectral_detail(view(picture))["sharpness"]

    def goal(data: bytes) -> object:
        picture, sharpness = sharpness_of(data)
        return picture.shape, sharpness, hashlib.sha256(data).digest()

    def goal_and_fingerprint(data: bytes) -> object:
        picture, sharpness = sharpness_of(data)
        return picture.shape, sharpness, hashlib.sha256(data).digest(), fingerprint(picture)

    def scores(data: bytes) -> object:
        return measure_scores(decode(data), data, "JPEG")

    def whole(data: bytes) -> object:
        return hashlib.sha256(data).digest(), look(data, filters, "")

    return {
        BASE: decode,
        "named: decode, size, sharpness, sha256": goal,
        "named, and fingerprint": goal_and_fingerprint,
        "decode and all scores": scores,
        "look: all scores, sha256, fingerprint": whole,
    }


def measure(data: list[bytes], rounds: int) -> dict[str, dict[str, float]]:
    """By arm: median CPU milliseconds per picture, spread of the rounds, and rate as a share of the decode-only rate.

    The share is the median of the rounds' shares, since each round measures both rates one after another.
    """
    if not data or rounds < 1:
        raise SystemExit(f"at least one picture and one round are needed, got {len(data)} and {rounds}")
    cv2.setNumThreads(1)
    seconds: dict[str, list[float]] = {name: [] for name in arms()}
    for number in range(rounds + 1):
        for name, arm in arms().items():
            start = time.process_time()
            for item in data:
                arm(item)
            if number:  # the first round is a warm-up
                seconds[name].append((time.process_time() - start) / len(data))
    results = {}
    for name, times in seconds.items():
        median, spread = median_and_spread(times)
        shares = [ratio(base, value, 6) for base, value in zip(seconds[BASE], times, strict=True)]
        results[name] = {
            "ms": round(1e3 * median, 3),
            "spread": round(spread, 3),
            "void": is_void(rounds, spread),
            "rate_of_decode_only": round(statistics.median(shares), 3),
        }
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of pictures; dead leaves without it")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    data = pictures(arguments.images, arguments.side, arguments.count)
    facts = {"pictures": len(data), "kib": round(sum(map(len, data)) / len(data) / 1024)}
    sys.stdout.write(json.dumps({**facts, "arms": measure(data, arguments.rounds)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
