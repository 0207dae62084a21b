"""CPU time a sample of `restoray.dataset` against plain webdataset plus the degradation.

    python tests/benchmarks/bench_dataset.py --photos FOLDER     # crops of photographs
    python tests/benchmarks/bench_dataset.py                     # dead leaves

All arms run in this process, with one thread, and read the same shards of 512 px JPEGs (bench_loader.py writes them):

    webdataset    tars in order, decoded with libjpeg-turbo, a random crop of 448 px, batches of 32
    degraded      the same with the preset in its map stage, by the same plans: what a user would write
    plain         restoray.dataset without a degradation, in batches of 32
    dataset       restoray.dataset with the preset, in batches of 32

Arms take turns in each round. The script prints medians of CPU milliseconds a sample, and ratios; a run is void if an
arm spreads over 25 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from bench_loader import BATCH, random_crop, write
from timing import is_void, median_and_spread

import restoray
from components.degradations import build_degradation
from components.images import to_float, to_uint8
from components.types import Plan

PRESET, SEED = "realesrgan", 1


def webdataset_batches(folder: Path, crop: int) -> Iterator[np.ndarray]:
    """Yield batches uint8 [32, crop, crop, 3] as webdataset's documentation advises."""
    import simplejpeg
    import webdataset

    draw = np.random.default_rng(0)

    def load(sample: dict[str, Any]) -> np.ndarray:
        return random_crop(simplejpeg.decode_jpeg(sample["jpg"], "RGB"), crop, draw)

    urls = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, select_files=lambda name: name.endswith(".jpg"))
    yield from dataset.map(load).batched(BATCH, collation_fn=np.stack).repeat()


def dataset_batches(folder: Path, side: int, crop: int, preset: str) -> Iterator[dict[str, Any]]:
    """Yield the batches of `restoray.dataset`."""
    yield from restoray.dataset(
        folder, preset, resolution=crop, short_side=side, batch_size=BATCH, seed=SEED, flip=False
    )


def degraded_batches(folder: Path, crop: int, positions: Mapping[str, int]) -> Iterator[Any]:
    """Yield batches (hq, lq, plans) of webdataset with the degradation in its map stage: what a user would write.

    Args:
        positions: position of each key in the dataset, so that both arms draw the same plans.
    """
    import simplejpeg
    import webdataset

    draw, degradation = np.random.default_rng(0), build_degradation(PRESET)

    def load(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, Plan]:
        clean = to_float(random_crop(simplejpeg.decode_jpeg(sample["jpg"], "RGB"), crop, draw))
        plan = degradation.draw(SEED, sample["__key__"], positions[sample["__key__"]])
        return to_uint8(degradation.target(clean)), to_uint8(degradation.apply(clean, plan)), plan

    def stack(rows: list[tuple[np.ndarray, np.ndarray, Plan]]) -> tuple[np.ndarray, np.ndarray, list[Plan]]:
        return np.stack([hq for hq, _, _ in rows]), np.stack([lq for _, lq, _ in rows]), [plan for *_, plan in rows]

    urls = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False, select_files=lambda name: name.endswith(".jpg"))
    yield from dataset.map(load).batched(BATCH, collation_fn=stack).repeat()


def measure(samples: int, shards: int, side: int, crop: int, rounds: int, photos: Path | None = None) -> dict[str, Any]:
    """CPU milliseconds a sample of every arm, and dataset over webdataset plus degradation."""
    cv2.setNumThreads(1)
    batches = samples // BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpus"
        write(folder, samples, shards, side, photos)
        positions = {
            key: int(position)
            for batch in islice(dataset_batches(folder, side, crop, ""), batches)
            for key, position in zip(batch["__key__"], batch["position"], strict=True)
        }

        def take(batches_of: Iterator[Any]) -> None:
            for _ in islice(batches_of, batches):
                pass

        arms: dict[str, Callable[[], None]] = {
            "webdataset": lambda: take(webdataset_batches(folder, crop)),
            "degraded": lambda: take(degraded_batches(folder, crop, positions)),
            "plain": lambda: take(dataset_batches(folder, side, crop, "")),
            "dataset": lambda: take(dataset_batches(folder, side, crop, PRESET)),
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds + 1):  # the first round warms up
            for arm, work in arms.items():
                start = time.process_time()
                work()
                if number:
                    times[arm].append(1e3 * (time.process_time() - start) / (batches * BATCH))
    row: dict[str, Any] = {
        arm: dict(zip(("cpu_ms", "spread"), median_and_spread(values), strict=True)) for arm, values in times.items()
    }
    row |= {
        "plain_over_webdataset": row["plain"]["cpu_ms"] / row["webdataset"]["cpu_ms"],
        "dataset_over_degraded": row["dataset"]["cpu_ms"] / row["degraded"]["cpu_ms"],
        "void": any(is_void(rounds, row[arm]["spread"]) for arm in times),
    }
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments.samples, 4, 512, 448, arguments.rounds, arguments.photos)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
