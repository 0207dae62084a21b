"""The 20M proof: the whole CPU path of `restoray curate` over synthetic shards, and its cost by number of samples.

Each size is one curation of tars of tiny pictures, with one broken picture in a thousand and two copies in a hundred.
The counts must be exact afterwards. The driver's memory is fitted over the sizes. The rate of the last tenth of the
samples is compared with that of the first, by wall time, which depends on other jobs too, and by the CPU seconds of
this process and all its descendants (with Ray's daemons).

    python tests/benchmarks/bench_scale.py --folder SCRATCH --sizes 100000 300000 1000000 --out scale.json

A killed leg resumes where it stopped (tars stay, and curation resumes), but then its times are void.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

SIDE_PX, GRID = 40, 8
PER_TAR = 5000
BROKEN_EVERY, COPY_EVERY = 1000, 50
TOP = Path(__file__).resolve().parents[2]


def jpeg(number: int) -> bytes:
    """A tiny picture of coloured squares, different for each number."""
    draw = np.random.default_rng(number)
    squares = draw.integers(0, 256, (GRID, GRID, 3), dtype=np.uint8)
    picture = cv2.resize(squares, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def member(number: int) -> bytes:
    """The file at a number: its own picture, a broken one, or a copy of an earlier one."""
    if number % BROKEN_EVERY == BROKEN_EVERY - 1:
        return jpeg(number)[:200]
    if number % COPY_EVERY == COPY_EVERY - 1:
        return jpeg(number // 2 // COPY_EVERY * COPY_EVERY + number % 7)  # neither broken nor a copy
    return jpeg(number)


def expected_counts(count: int) -> dict[str, int]:
    """Exact counts of a corpus of the first `count` numbers."""
    broken = count // BROKEN_EVERY
    copies = count // COPY_EVERY - broken  # every broken number would be a copy otherwise
    return {"accepted": count - broken - copies, "truncated": broken, "duplicate": copies}


def make_tars(folder: Path, count: int) -> None:
    """Write the tars of a size; existing ones stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, PER_TAR):
        path = folder / f"{first // PER_TAR:05d}.tar"
        if path.exists():
            continue
        temporary = path.with_suffix(".tmp")
        with tarfile.open(temporary, "w") as target:
            for number in range(first, min(first + PER_TAR, count)):
                data = member(number)
                info = tarfile.TarInfo(f"{number:09d}.jpg")
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))
        temporary.rename(path)


def share_tars(source: Path, target: Path, count: int) -> None:
    """Link the tars of the first `count` numbers; all sizes share them."""
    target.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, PER_TAR):
        name = f"{first // PER_TAR:05d}.tar"
        if not (target / name).exists():
            os.link(source / name, target / name)


class Watch:
    """Samples memory and CPU time of this process and its children inside a `with` block.

    Attributes:
        driver, worker: largest private memory, bytes, of this process and of its largest Ray worker.
        cpu_by_time: (clock, CPU seconds of all processes until then, including ended ones).
    """

    def __init__(self, every_s: float = 0.25) -> None:
        self.driver = self.worker = 0
        self.cpu_by_time: list[tuple[float, float]] = []
        self.by_process: dict[psutil.Process, float] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample, args=(every_s,), daemon=True)

    def _sample(self, every_s: float) -> None:
        """The driver's memory at each turn; CPU times at the first, every fourth and the last turn."""
        me, number, last = psutil.Process(), 0, False
        while not last:
            self.driver = max(self.driver, me.memory_full_info().uss)
            if number % 4 == 0:
                self._sample_all(me)
            last = self.stop.wait(every_s)
            number += 1
        self._sample_all(me)

    def _sample_all(self, me: psutil.Process) -> None:
        for process in [me, *me.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self.by_process[process] = times.user + times.system
                if " ".join(process.cmdline()).startswith("ray::"):
                    self.worker = max(self.worker, process.memory_full_info().uss)
            except psutil.Error:
                continue
        self.cpu_by_time.append((time.monotonic(), sum(self.by_process.values())))

    def cpu_at(self, clock: float) -> float:
        """CPU seconds until a time."""
        times, cpu_seconds = zip(*self.cpu_by_time, strict=True)
        return float(np.interp(clock, times, cpu_seconds))

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def run_leg(folder: Path, count: int, shard_mib: float) -> dict[str, Any]:
    """Run one curation in this process; returns its measurements."""
    from components.corpora import CorpusSpec, DedupSpec, FilterSpec, SourceSpec, SplitSpec
    from pipelines.core.cluster import local_ray
    from pipelines.curation.curate import curate

    spec = CorpusSpec(
        name=f"scale-{count}",
        sources=[SourceSpec(kind="tar", path=str(folder / "tars" / "*.tar"))],
        filters=FilterSpec(min_side_px=16),
        split=SplitSpec(held_out_fraction=0.001),
        dedup=DedupSpec(exact=True, near=True),
        shard_mib=shard_mib,
    )
    marks: dict[str, list[tuple[float, int]]] = {"measure": [], "shards": []}

    def progress(done: int, of: int = 0, note: str = "") -> None:
        phase = "shards" if note == "shards" else "measure" if "pictures" in note else ""
        if phase:
            marks[phase].append((time.monotonic(), done))

    with local_ray():
        import ray

        ray.get(ray.remote(lambda: 0).remote())
        with Watch() as watch:
            start = time.monotonic()
            result = curate(spec, folder / "corpus", progress=progress)
            seconds = time.monotonic() - start
    counts = {"accepted": result.accepted, **dict(result.reasons)}

    def in_cpu(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
        return [(watch.cpu_at(clock), done) for clock, done in points]

    return {
        "samples": count,
        "counts": counts,
        "exact": counts == expected_counts(count),
        "reused": result.reused,
        "seconds": round(seconds, 1),
        "driver_bytes": watch.driver,
        "worker_bytes": watch.worker,
        "cpu_seconds": round(watch.cpu_by_time[-1][1] - watch.cpu_by_time[0][1], 1),
        **{f"{name}_last_over_first": steadiness(points) for name, points in marks.items()},
        **{f"{name}_last_over_first_cpu": steadiness(in_cpu(points)) for name, points in marks.items()},
        **{
            f"{name}_cpu_us_a_sample": round(1e6 * (watch.cpu_at(points[-1][0]) - watch.cpu_at(points[0][0])) / count)
            for name, points in marks.items()
            if points
        },
        **{f"{name}_s": round(points[-1][0] - points[0][0], 1) for name, points in marks.items() if points},
    }


def steadiness(points: list[tuple[float, int]]) -> float | None:
    """Rate over the last tenth divided by the rate over the first.

    None with fewer than 22 points, or if their clock or count stands still over a tenth: there is no rate then.
    """
    if len(points) < 22:
        return None
    times = np.array([at for at, _ in points])
    counts = np.array([n for _, n in points], float)
    low, high, span = counts[0], counts[-1], (counts[-1] - counts[0]) / 10

    def rate(begin: float, end: float) -> float:
        seconds = float(np.interp(end, counts, times) - np.interp(begin, counts, times))
        return (end - begin) / seconds if seconds > 0 else 0.0

    # The first results wait for the start of workers and the last for the slowest worker, so both are left out.
    last, first = rate(high - 1.5 * span, high - 0.5 * span), rate(low + 0.5 * span, low + 1.5 * span)
    return round(last / first, 3) if last > 0 and first > 0 else None


def fit(legs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Driver bytes = a + b * samples by least squares, b's standard error (None for two sizes), b of the last two."""
    n = np.array([leg["samples"] for leg in legs], float)
    memory = np.array([leg["driver_bytes"] for leg in legs], float)
    slope, start = np.polyfit(n, memory, 1)
    last = (memory[-1] - memory[-2]) / (n[-1] - n[-2])
    residual = float(((memory - start - slope * n) ** 2).sum())
    error = (residual / (len(n) - 2) / ((n - n.mean()) ** 2).sum()) ** 0.5 if len(n) > 2 else None
    return {
        "start_mib": start / 2**20,
        "bytes_a_sample": slope,
        "bytes_a_sample_error": error,
        "bytes_a_sample_last_two": last,
    }


def main() -> None:
    """Run legs, each in its own process, and write the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space; about 4 kB per sample")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--shard-mib", type=float, default=8.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--leg", type=int, help="run one size in this process")
    arguments = parser.parse_args()
    if arguments.leg:
        place = arguments.folder / str(arguments.leg)
        make_tars(arguments.folder / "tars", arguments.leg)
        share_tars(arguments.folder / "tars", place / "tars", arguments.leg)
        sys.stdout.write(json.dumps(run_leg(place, arguments.leg, arguments.shard_mib)) + "\n")
        return
    legs = []
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--leg", str(size)]
        command += ["--shard-mib", str(arguments.shard_mib)]
        process = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, check=True, text=True)
        legs.append(json.loads(process.stdout.splitlines()[-1]))
        sys.stderr.write(json.dumps(legs[-1]) + "\n")
    facts = {"legs": legs, **({"fit": fit(legs)} if len(legs) > 1 else {})}
    text = json.dumps(facts, indent=1)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
