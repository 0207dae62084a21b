"""Cost of feeding a trainer: CPU time per sample of the stream, of webdataset and of decoding alone.

    python tests/benchmarks/bench_loader.py --photos FOLDER     # crops of photographs
    python tests/benchmarks/bench_loader.py                     # dead leaves

2,000 samples in 8 shards: 512 px JPEGs of quality 90. Every arm decodes them with libjpeg-turbo, crops a random
448 px square and packs uint8 batches [32, 448, 448, 3], without degradations and captions:

    decode      from memory, in one thread, without transport: the lower limit
    webdataset  torch's DataLoader with 2 workers, decoded and batched in the workers, shards shuffled
    ours        the stream under Ray Data, as a trainer reads it: 2 tasks, shuffled samples, `rank_batches`

The benchmark counts the CPU time of the arm's process and all its descendants, including Ray's daemons and bookkeeping
actors, from the end of the first epoch, which starts the workers, to the end of the last. It reads the memory at each
half epoch (proportional set size). The arm's process prints a line at each half epoch, and ends only after the last
measurement, since its workers end with it. Arms take turns in each round, so that other load hits all of them.
It prints medians over rounds, ratios and spread; a line is void if an arm spreads over 25 %.

Notes:
- The consumer takes batches as fast as they come and does not read the pixels.
- webdataset shuffles only shards and returns only pixels; the stream shuffles all samples and returns names, texts
  and sizes too.
- The object store may use 2 GiB (`--store`); the goal for all processes together is that cap and 300 MB per worker.
- The stream's cache of small splits is off, since 2,000 pictures do not fit it.
- A new stretch of the stream (`feed.STRETCH_TASKS`: every 262,144 rows here) costs additional CPU time. It is outside
  the measured epochs; `--stretch` makes stretches shorter to measure it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from timing import is_void, median_and_spread, ratio

BATCH, WORKERS = 32, 2
MB_A_WORKER = 300  # the memory goal of all processes: the object store's cap and this for each worker
STORE_MIB = 2048
# Environment variables for the arm's process.
STRETCH, STORE = "BENCH_LOADER_STRETCH", "BENCH_LOADER_STORE"


def jpegs(count: int, side: int, photos: Path | None) -> Iterator[bytes]:
    """JPEGs [side, side] of quality 90: random crops of the photographs in a folder, or dead leaves."""
    import cv2
    import simplejpeg

    from components.synthetic import dead_leaves

    draw = np.random.default_rng(7)
    paths = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if photos else []
    photographs = [picture for path in paths if (picture := cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)) is not None]
    photographs = [picture for picture in photographs if min(picture.shape[:2]) >= side]
    leaves = [] if photographs else [dead_leaves(2 * side, 7, index) for index in range(min(count, 32))]
    for number in range(count):
        picture = (photographs or leaves)[number % len(photographs or leaves)]
        top, left = (int(draw.integers(0, length - side + 1)) for length in picture.shape[:2])
        part = np.ascontiguousarray(picture[top : top + side, left : left + side])
        yield simplejpeg.encode_jpeg(part, quality=90, colorsubsampling="420")


def write(folder: Path, count: int, shards: int, side: int, photos: Path | None = None) -> None:
    """The corpus that all arms read."""
    from pipelines.corpus.shards import write_corpus

    samples = [
        (f"{number:06d}", "jpg", data, {"width": side, "height": side})
        for number, data in enumerate(jpegs(count, side, photos))
    ]
    write_corpus(folder, "bench", {"train": samples}, samples_per_shard=-(-count // shards))


# -- arms: endless batches uint8 [32, crop, crop, 3] -------------------------------------------------------------------


def decode_only(folder: Path, crop: int) -> Iterator[np.ndarray]:
    """Decode from memory, in one thread: the lower limit."""
    import simplejpeg

    from pipelines.corpus.shards import open_corpus, read_sample

    corpus, draw = open_corpus(folder), np.random.default_rng(0)
    data = [read_sample(corpus, "train", n) for n in range(len(corpus.split("train")))]
    number = 0
    while True:
        batch = np.empty((BATCH, crop, crop, 3), np.uint8)
        for row in batch:
            row[:] = random_crop(simplejpeg.decode_jpeg(data[number % len(data)], "RGB"), crop, draw)
            number += 1
        yield batch


def webdataset(folder: Path, crop: int) -> Iterator[np.ndarray]:
    """webdataset, batched in the workers as its documentation advises; tensors pass through shared memory."""
    import simplejpeg
    import torch
    import webdataset as wds

    draw = np.random.default_rng(0)

    def load(sample: dict[str, Any]) -> np.ndarray:
        return random_crop(simplejpeg.decode_jpeg(sample["jpg"], "RGB"), crop, draw)

    urls = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=1, select_files=lambda name: name.endswith(".jpg"))
    batches = dataset.map(load).batched(BATCH, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)), partial=True)
    for batch in torch.utils.data.DataLoader(batches.repeat(), batch_size=None, num_workers=WORKERS):
        yield batch.numpy()


def ours(folder: Path, crop: int) -> Iterator[np.ndarray]:
    """The stream as `restoray train` reads it."""
    from pipelines.core.cluster import local_ray
    from pipelines.corpus.shards import open_corpus
    from pipelines.stream import feed
    from pipelines.stream.rows import StreamConfig

    side = int(open_corpus(folder).split("train").locate(0)[1]["width"]) or crop
    feed.STRETCH_TASKS = int(os.environ.get(STRETCH, feed.STRETCH_TASKS))
    config = StreamConfig(sources=((str(folder), 1.0),), seed=1, resolution=crop, short_side=side, flip=False)
    with local_ray(object_store_mib=store_mib()):
        batches = feed.rank_batches(config, 0, BATCH << 20, BATCH, tasks=WORKERS)
        with contextlib.closing(batches):  # closed before Ray ends: the reader must not call Ray afterwards
            for columns in batches:
                yield columns["hq"]


def store_mib() -> int:
    """The cap of Ray's object store, MiB."""
    return int(os.environ.get(STORE, STORE_MIB))


ARMS: dict[str, Callable[[Path, int], Iterator[np.ndarray]]] = {
    "decode": decode_only,
    "webdataset": webdataset,
    "ours": ours,
}


def random_crop(picture: np.ndarray, crop: int, draw: np.random.Generator) -> np.ndarray:
    """A random square crop, as a view."""
    top, left = (int(draw.integers(0, length - crop + 1)) for length in picture.shape[:2])
    return picture[top : top + crop, left : left + crop]


def consume(arm: str, folder: Path, crop: int, samples: int, epochs: int) -> None:
    """Run an arm in its own process; prints a line at each half epoch."""
    sample_count, marks = 0, [samples * half // 2 for half in range(1, 2 * epochs + 1)]
    for batch in ARMS[arm](folder, crop):
        if batch.dtype != np.uint8 or batch.shape[1:] != (crop, crop, 3):
            raise SystemExit(f"{arm} returned {batch.dtype} {batch.shape}")
        sample_count += len(batch)
        while marks and sample_count >= marks[0]:
            print(f"seen {marks.pop(0)}", flush=True)
        if not marks:
            sys.stdin.readline()  # wait for the last measurement: the workers end with this process
            return


# -- measuring -------------------------------------------------------------------------------------------------------


def run(arm: str, folder: Path, crop: int, samples: int, epochs: int) -> dict[str, Any]:
    """CPU and wall milliseconds per sample after the first epoch, and the peak memory of each epoch in MB.

    Raises:
        SystemExit: the arm failed.
    """
    arguments = ["--arm", arm, "--corpus", str(folder), "--cut", str(crop), "--samples", str(samples)]
    command = [sys.executable, __file__, *arguments, "--epochs", str(epochs)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        tree, clock, memory = psutil.Process(process.pid), [], []
        assert process.stdin is not None and process.stdout is not None
        with Meter(tree) as meter:
            for line in process.stdout:
                if line.startswith("seen "):
                    clock.append((meter.cpu_seconds(), time.perf_counter()))
                    memory.append(megabytes(tree))
                if len(clock) == 2 * epochs:
                    break
        process.stdin.close()
    if len(clock) != 2 * epochs:
        raise SystemExit(f"arm {arm} ended with {process.returncode} after {len(clock)} half epochs")
    if process.returncode:  # all is measured: a thread of Ray may fail at the end
        print(f"arm {arm} ended with {process.returncode} after the measurement", file=sys.stderr)
    (cpu, wall), count = (np.subtract(clock[-1], clock[1])), samples * (epochs - 1)
    peaks = [max(memory[2 * n : 2 * n + 2], key=lambda sizes: sizes["all"]) for n in range(epochs)]
    return {"cpu_ms": 1e3 * cpu / count, "wall_ms": 1e3 * wall / count, "peaks": peaks}


def process_tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


class Meter:
    """CPU time of a process and all its descendants, including ended ones.

    Ray's raylet does not collect the times of its workers, so the system drops a worker's time when it ends. The meter
    therefore reads all times every PERIOD seconds, and uses the last reading of each process.
    """

    PERIOD = 0.5  # seconds; at most this much of a worker's time is missed

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.stop, self.lock = process, threading.Event(), threading.Lock()
        self.seconds: dict[tuple[int, float], float] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Meter:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.stop.wait(self.PERIOD):
            self.cpu_seconds()

    def cpu_seconds(self) -> float:
        """CPU seconds until now of all processes in all readings."""
        with self.lock:
            try:
                for member in process_tree(self.process):
                    with contextlib.suppress(psutil.Error):  # the process may have ended
                        times = member.cpu_times()
                        self.seconds[member.pid, member.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                pass
            return sum(self.seconds.values())


def megabytes(process: psutil.Process) -> dict[str, float]:
    """Proportional set size in MB: all; shared (object store or torch's batches); ray; worker.

    `ray` is that of Ray's daemons and Ray Data's bookkeeping actors without shared memory, which does not depend on the
    stream. `worker` is the largest of the other processes, without shared memory.
    """
    sizes: dict[str, float] = {"all": 0.0, "shared": 0.0, "ray": 0.0, "worker": 0.0}
    for member in process_tree(process):
        try:
            text, name = Path(f"/proc/{member.pid}/smaps_rollup").read_text(), " ".join(member.cmdline())
        except (OSError, psutil.Error):
            continue
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
        whole, shared = (1.024e-3 * kilobytes.get(part, 0) for part in ("Pss", "Pss_Shmem"))
        sizes["all"] += whole
        sizes["shared"] += shared
        if any(part in name for part in ("/site-packages/ray/", "ray::_", "Agent")):
            sizes["ray"] += whole - shared
        else:
            sizes["worker"] = max(sizes["worker"], whole - shared)
    return sizes


def measure(
    samples: int = 2000,
    shards: int = 8,
    side: int = 512,
    crop: int = 448,
    rounds: int = 5,
    epochs: int = 3,
    photos: Path | None = None,
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    results_by_arm: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "corpus"
        write(folder, samples, shards, side, photos)
        for _ in range(rounds):
            for arm in arms:
                results_by_arm[arm].append(run(arm, folder, crop, samples, epochs))
    row: dict[str, Any] = {"samples": samples, "side": side, "cut": crop, "rounds": rounds, "epochs": epochs}
    for arm, results in results_by_arm.items():
        cpu = [float(result["cpu_ms"]) for result in results]
        median, spread = median_and_spread(cpu)
        row[arm] = {
            "cpu_ms": round(median, 3),
            "spread": round(spread, 3),
            "cpu_ms_by_round": [round(value, 3) for value in cpu],
            "wall_ms": round(statistics.median(result["wall_ms"] for result in results), 3),
            "peak_mb": [
                {name: round(statistics.median(result["peaks"][epoch][name] for result in results)) for name in peak}
                for epoch, peak in enumerate(results[0]["peaks"])
            ],
        }
    row["store_mb"] = round(store_mib() * 1.048576)
    row["memory_goal_mb"] = row["store_mb"] + MB_A_WORKER * WORKERS
    row["void"] = is_void(rounds, max(row[arm]["spread"] for arm in arms))
    if "ours" in arms:
        row |= {f"ours_over_{arm}": ratio(row["ours"]["cpu_ms"], row[arm]["cpu_ms"], 3) for arm in arms[:-1]}
    return row


def main() -> None:
    """Measure and print; or run one arm, in a process that `run` started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of photographs; default dead leaves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="the first is not counted")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--cut", type=int, default=448)
    parser.add_argument("--stretch", type=int, help="tasks of a stretch of the stream")
    parser.add_argument("--store", type=int, help=f"cap of the object store, MiB; default {STORE_MIB}")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        consume(options.arm, options.corpus, options.cut, options.samples, options.epochs)
        return
    if options.stretch:
        os.environ[STRETCH] = str(options.stretch)
    if options.store:
        os.environ[STORE] = str(options.store)
    row = measure(
        options.samples, crop=options.cut, rounds=options.rounds, epochs=options.epochs, photos=options.photos
    )
    print(json.dumps(row))
    with options.out.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
