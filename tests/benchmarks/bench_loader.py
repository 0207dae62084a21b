"""What feeding a trainer costs: CPU time a sample of the stream, beside webdataset and beside decoding alone.

    python tests/benchmarks/bench_loader.py --photos FOLDER     # cuts of photographs
    python tests/benchmarks/bench_loader.py                     # dead leaves

2,000 samples in 8 shards: 512 px JPEGs of quality 90. Every arm decodes them with libjpeg-turbo, cuts a random 448 px
square and packs uint8 batches [32, 448, 448, 3]; nothing is degraded or captioned:

    decode      from memory, in one thread, without any transport: the limit
    webdataset  torch's DataLoader with 2 workers, decoded and batched in the workers, shards shuffled
    ours        the stream under Ray Data as a trainer reads it: 2 tasks, shuffled samples, `rank_batches`

Each arm runs in a process of its own, arms in turn, round after round. The process says when an epoch ends; this one
then sums the CPU time of its whole tree (Ray's daemons and workers too) and its memory (proportional set size). The
first epoch starts the workers and is not counted. The stream's cache of small splits is off, since 2,000 pictures do
not fit it. Printed: medians over rounds, ratios, spread; void where an arm spreads over 25 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MAX_SPREAD = 0.25
BATCH, WORKERS = 32, 2


def jpegs(count: int, side: int, photos: Path | None) -> Iterator[bytes]:
    """Pictures [side, side] of quality 90: random parts of the photographs in a folder, or dead leaves."""
    import cv2
    import simplejpeg

    from components.synthetic import dead_leaves

    draw = np.random.default_rng(7)
    paths = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if photos else []
    found = [picture for path in paths if (picture := cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)) is not None]
    found = [picture for picture in found if min(picture.shape[:2]) >= side]
    leaves = [] if found else [dead_leaves(2 * side, 7, index) for index in range(min(count, 32))]
    for number in range(count):
        picture = (found or leaves)[number % len(found or leaves)]
        top, left = (int(draw.integers(0, length - side + 1)) for length in picture.shape[:2])
        part = np.ascontiguousarray(picture[top : top + side, left : left + side])
        yield simplejpeg.encode_jpeg(part, quality=90, colorsubsampling="420")


def write(folder: Path, count: int, shards: int, side: int, photos: Path | None = None) -> None:
    """The corpus that all arms read."""
    from pipelines.shards import write_corpus

    samples = [
        (f"{number:06d}", "jpg", data, {"width": side, "height": side})
        for number, data in enumerate(jpegs(count, side, photos))
    ]
    write_corpus(folder, "bench", {"train": samples}, samples_per_shard=-(-count // shards))


# -- arms: endless batches uint8 [32, cut, cut, 3] ---------------------------------------------------------------------


def decode_only(folder: Path, cut: int) -> Iterator[np.ndarray]:
    """The limit."""
    import simplejpeg

    from pipelines.shards import open_corpus, read_sample

    corpus, draw = open_corpus(folder), np.random.default_rng(0)
    data = [read_sample(corpus, "train", n) for n in range(len(corpus.split("train")))]
    number = 0
    while True:
        batch = np.empty((BATCH, cut, cut, 3), np.uint8)
        for row in batch:
            row[:] = random_cut(simplejpeg.decode_jpeg(data[number % len(data)], "RGB"), cut, draw)
            number += 1
        yield batch


def webdataset(folder: Path, cut: int) -> Iterator[np.ndarray]:
    """Batched in the worker, as its documentation advises; tensors come through shared memory."""
    import simplejpeg
    import torch
    import webdataset as wds

    draw = np.random.default_rng(0)

    def load(sample: dict[str, Any]) -> np.ndarray:
        return random_cut(simplejpeg.decode_jpeg(sample["jpg"], "RGB"), cut, draw)

    urls = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=1, select_files=lambda name: name.endswith(".jpg"))
    batches = dataset.map(load).batched(BATCH, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)), partial=True)
    for batch in torch.utils.data.DataLoader(batches.repeat(), batch_size=None, num_workers=WORKERS):
        yield batch.numpy()


def ours(folder: Path, cut: int) -> Iterator[np.ndarray]:
    """As `restoray train` reads."""
    from pipelines.cluster import local_ray
    from pipelines.feed import rank_batches
    from pipelines.shards import open_corpus
    from pipelines.stream import StreamConfig

    side = int(open_corpus(folder).split("train").locate(0)[1]["width"]) or cut
    config = StreamConfig(sources=((str(folder), 1.0),), seed=1, resolution=cut, short_side=side, flip=False)
    with local_ray(object_store_mib=1024):
        for columns in rank_batches(config, 0, BATCH << 20, BATCH, tasks=WORKERS):
            yield columns["hq"]


ARMS: dict[str, Callable[[Path, int], Iterator[np.ndarray]]] = {
    "decode": decode_only,
    "webdataset": webdataset,
    "ours": ours,
}


def random_cut(picture: np.ndarray, cut: int, draw: np.random.Generator) -> np.ndarray:
    """A view of a random square."""
    top, left = (int(draw.integers(0, length - cut + 1)) for length in picture.shape[:2])
    return picture[top : top + cut, left : left + cut]


def consume(arm: str, folder: Path, cut: int, samples: int, epochs: int) -> None:
    """In the arm's process: a line for each half epoch."""
    seen, marks = 0, [samples * half // 2 for half in range(1, 2 * epochs + 1)]
    for batch in ARMS[arm](folder, cut):
        if batch.dtype != np.uint8 or batch.shape[1:] != (cut, cut, 3):
            raise SystemExit(f"{arm} gave {batch.dtype} {batch.shape}")
        seen += len(batch)
        while marks and seen >= marks[0]:
            print(f"seen {marks.pop(0)}", flush=True)
        if not marks:
            return


# -- measuring -------------------------------------------------------------------------------------------------------


def run(arm: str, folder: Path, cut: int, samples: int, epochs: int) -> dict[str, Any]:
    """CPU and wall milliseconds a sample after the first epoch, and the peak memory of each epoch in MB.

    Raises:
        SystemExit: the arm failed.
    """
    given = ["--arm", arm, "--corpus", str(folder), "--cut", str(cut), "--samples", str(samples)]
    command = [sys.executable, __file__, *given, "--epochs", str(epochs)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        tree, clock, memory = psutil.Process(process.pid), [], []
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("seen "):
                clock.append((cpu_seconds(tree), time.perf_counter()))
                memory.append(megabytes(tree))
    if process.returncode or len(clock) != 2 * epochs:
        raise SystemExit(f"arm {arm} ended with {process.returncode} after {len(clock)} half epochs")
    (cpu, wall), count = (np.subtract(clock[-1], clock[1])), samples * (epochs - 1)
    peaks = [max(memory[2 * n : 2 * n + 2], key=lambda found: found["all"]) for n in range(epochs)]
    return {"cpu_ms": 1e3 * cpu / count, "wall_ms": 1e3 * wall / count, "peaks": peaks}


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and its descendants, also of those that have ended."""
    total = 0.0
    for member in family(process):
        try:
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
        except psutil.Error:  # it ended meanwhile, and its parent has its time
            continue
    return total


def megabytes(process: psutil.Process) -> dict[str, float]:
    """Proportional set size: of all, of the processes that hold rows, and of the largest of these by itself.

    Rows are held by the consumer and what its loader started to make them; the rest is Ray's daemons and idle workers.
    """
    found: dict[str, float] = {"all": 0.0, "rows": 0.0, "largest_private": 0.0}
    for member in family(process):
        try:
            memory, name = member.memory_full_info(), " ".join(member.cmdline())
        except psutil.Error:
            continue
        found["all"] += memory.pss / 1e6
        if not any(part in name for part in ("ray/", "ray::IDLE", "ray::_", "Agent")):
            found["rows"] += memory.pss / 1e6
            found["largest_private"] = max(found["largest_private"], memory.uss / 1e6)
    return found


def measure(
    samples: int = 2000,
    shards: int = 8,
    side: int = 512,
    cut: int = 448,
    rounds: int = 5,
    epochs: int = 3,
    photos: Path | None = None,
    arms: Sequence[str] = tuple(ARMS),
) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "corpus"
        write(folder, samples, shards, side, photos)
        for _ in range(rounds):
            for arm in arms:
                found[arm].append(run(arm, folder, cut, samples, epochs))
    row: dict[str, Any] = {"samples": samples, "side": side, "cut": cut, "rounds": rounds, "epochs": epochs}
    for arm, results in found.items():
        cpu = [result["cpu_ms"] for result in results]
        middle = statistics.median(cpu)
        row[arm] = {
            "cpu_ms": round(middle, 3),
            "spread": round((max(cpu) - min(cpu)) / middle, 3),
            "wall_ms": round(statistics.median(result["wall_ms"] for result in results), 3),
            "peak_mb": [
                {name: round(statistics.median(result["peaks"][epoch][name] for result in results)) for name in peak}
                for epoch, peak in enumerate(results[0]["peaks"])
            ],
        }
    row["void"] = max(row[arm]["spread"] for arm in arms) > MAX_SPREAD
    if "ours" in arms:
        row |= {f"ours_over_{arm}": round(row["ours"]["cpu_ms"] / row[arm]["cpu_ms"], 3) for arm in arms[:-1]}
    return row


def main() -> None:
    """Measure and print; or, started by `run`, be one arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="a folder of photographs; default dead leaves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="the first is not counted")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--cut", type=int, default=448)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        consume(given.arm, given.corpus, given.cut, given.samples, given.epochs)
        return
    row = measure(given.samples, cut=given.cut, rounds=given.rounds, epochs=given.epochs, photos=given.photos)
    print(json.dumps(row))
    with given.out.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
