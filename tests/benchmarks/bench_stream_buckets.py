"""The stream of a corpus in a bucket: beside other loaders, with a delay of each request; and at 20 million samples.

    python tests/benchmarks/bench_stream_buckets.py loaders --peers PYTHON [--photos FOLDER] [--samples 2000]
    python tests/benchmarks/bench_stream_buckets.py index [--samples 20000000] [--folder SCRATCH]

PYTHON is the interpreter of an environment of its own with mosaicml-streaming, webdataset, torch and simplejpeg;
without it webdataset runs in ours and mosaicml-streaming is left out.

`loaders`: JPEGs of 512 px in 8 shards on an S3 server on loopback, behind a proxy that adds 20 ms to each request.
Every arm decodes with libjpeg-turbo, crops and packs batches of 32, with 2 workers, from an empty disk. Printed for
each arm: seconds to the first batch; wall and CPU milliseconds a sample from there to the end of each epoch (of all its
processes, Ray's daemons too, not of server and proxy); bytes that went through the proxy for shards over the shards'
bytes, so 1 means that each byte was fetched once. Arms take turns; medians over rounds; void if an arm's CPU times
spread over 25 %.

`index`: a server that makes up the shards (synthetic_bucket.py), 128 samples each, so 156,250 shards at 20 million. Two
processes with one cache open the corpus and read ROWS rows each. Printed: seconds from the address to the first batch
of 32 rows, private bytes of a process above those after its imports, and shards opened a row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_loader
import numpy as np
import psutil
import pyarrow as pa
import synthetic_bucket
from timing import is_void, median_and_spread

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

BATCH, WORKERS, DELAY_S = bench_loader.BATCH, bench_loader.WORKERS, 0.02
ROWS = 16_384  # of each process of `index`; a window of 65,536 rows opens 512 shards in each


# --- loaders ----------------------------------------------------------------------------------------------------------


def consume(address: str, samples: int, epochs: int, crop: int, shard_reads: str) -> None:
    """Our arm, in its own process: as `restoray train` reads a corpus in a store."""
    from pipelines.core.cluster import local_ray
    from pipelines.core.places.place import place_of
    from pipelines.corpus.shards import open_corpus
    from pipelines.corpus.stored import corpus_folder
    from pipelines.stream.ahead import choose_reads
    from pipelines.stream.config import StreamConfig
    from pipelines.stream.feed import rank_batches

    with local_ray(num_cpus=WORKERS + 1, object_store_mib=512):
        folder = str(corpus_folder(place_of(address)))
        side = int(open_corpus(folder).split("train").locate(0)[1]["width"])
        config = StreamConfig(sources=((folder, 1.0),), seed=1, resolution=crop, short_side=side, flip=False)
        rows = -(-samples * epochs // BATCH) * BATCH
        reads = choose_reads(config, rows, 1.0, shard_reads, 4, 0)
        count, marks = 0, [samples * epoch for epoch in range(1, epochs + 1)]
        for columns in rank_batches(config, 0, rows, BATCH, tasks=WORKERS, reads=reads):
            if not count:
                print("first", flush=True)
            count += len(columns["hq"])
            while marks and count >= marks[0]:
                print(f"seen {marks.pop(0)}", flush=True)
        sys.stdin.readline()


def run_arm(
    command: list[str], environment: Mapping[str, str], epochs: int, proxy: Any, is_shard: Callable[[str], bool]
) -> dict[str, Any]:
    """Times and bytes of an arm; the arm's process ends when its input does."""
    proxy.wait_until_idle()  # the last arm's killed processes may have requests in work
    proxy.lines.clear()
    proxy.sent.clear()
    begin, marks, children = time.perf_counter(), [], []
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        with bench_loader.Meter(psutil.Process(process.pid)) as meter:
            for line in process.stdout:
                if line.startswith(("first", "seen ")):
                    sent = sum(count for name, count in proxy.sent.items() if is_shard(name))
                    marks.append((time.perf_counter(), meter.cpu_seconds(), sent))
                if len(marks) == epochs + 1:
                    break
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(process.pid).children(recursive=True)
        process.stdin.close()
    for child in children:  # a loader's workers outlive it for a while, and would be counted in the next arm
        with contextlib.suppress(psutil.Error):
            child.kill()
    if len(marks) != epochs + 1:
        raise SystemExit(f"{' '.join(command[:4])} ended with {process.returncode}")
    steps = [[after - before for after, before in zip(b, a, strict=True)] for a, b in itertools.pairwise(marks)]
    return {
        "first_s": marks[0][0] - begin,
        "wall_s": [step[0] for step in steps],
        "cpu_s": [step[1] for step in steps],
        "sent": [mark[2] for mark in marks[1:]],
        "requests": sum(is_shard(line) for line in proxy.lines),
    }


def loaders(
    samples: int = 2000,
    shards: int = 8,
    side: int = 512,
    crop: int = 448,
    rounds: int = 3,
    epochs: int = 2,
    photos: Path | None = None,
    peers: str = "",
    server: str = "seaweed",
    arms: tuple[str, ...] = ("webdataset", "mosaicml", "ours"),
) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    import faulty_proxy
    import store_servers

    from pipelines.core.places.backends import open_store
    from pipelines.core.places.place import Place, place_of

    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms if arm != "mosaicml" or peers}
    peer, script = peers or sys.executable, str(Path(__file__).with_name("stream_peers.py"))
    with tempfile.TemporaryDirectory() as scratch:
        corpus, mds = Path(scratch) / "corpus", Path(scratch) / "mds"
        bench_loader.write(corpus, samples, shards, side, photos)
        if "mosaicml" in results:
            subprocess.run([peer, script, "write", str(corpus / "train"), str(mds)], check=True)
        (Path(scratch) / "server").mkdir()
        seaweed = store_servers.seaweed_server
        running = seaweed(Path(scratch) / "server") if server == "seaweed" else store_servers.moto_server()
        with running as upstream, faulty_proxy.faulty_proxy(upstream, every=0) as proxy:
            environment = {**store_servers.environment(proxy.endpoint), "S3_ENDPOINT_URL": proxy.endpoint}
            os.environ |= environment
            for name, folder in (("corpus", corpus), ("mds", mds)):
                for path in folder.rglob("*") if folder.is_dir() else ():
                    if path.is_file():
                        place = place_of(f"s3://{store_servers.BUCKET}/{name}/{path.relative_to(folder).as_posix()}")
                        assert isinstance(place, Place)
                        place.upload(path)
            proxy.delay_s = DELAY_S
            names = sorted(path.name for path in (corpus / "train").glob("*.tar"))
            store = open_store(f"s3://{store_servers.BUCKET}", {})
            objects = [f"{store_servers.BUCKET}/corpus/train/{name}" for name in names]
            environment["BENCH_SHARDS"] = "\n".join(store.fs.sign(name) for name in objects)  # type: ignore[attr-defined]
            sizes = {"mosaicml": sum(path.stat().st_size for path in mds.glob("*.mds"))}
            for round_ in range(rounds):
                for arm in results:
                    own = Path(scratch) / f"{arm}-{round_}"
                    folder_of = {
                        "webdataset": f"{proxy.endpoint}/{store_servers.BUCKET}/corpus/train",
                        "mosaicml": f"s3://{store_servers.BUCKET}/mds",
                    }
                    if arm.startswith("ours"):
                        words = ["--place", f"s3://{store_servers.BUCKET}/corpus", "--cut", str(crop)]
                        words += ["--samples", str(samples), "--epochs", str(epochs)]
                        command = [sys.executable, __file__, "arm", *words, "--reads", arm.partition("-")[2] or "auto"]
                    else:
                        numbers = [str(samples), str(epochs), str(crop), str(own)]
                        command = [peer, script, arm, folder_of[arm], *numbers]
                    home = {"RESTORAY_HOME": str(own)}
                    result = run_arm(command, {**environment, **home}, epochs, proxy, _is_shard)
                    results[arm].append(result)
        tars = sum((corpus / "train" / name).stat().st_size for name in names)
    row: dict[str, Any] = {"samples": samples, "shards": len(names), "rounds": rounds, "delay_ms": 1e3 * DELAY_S}
    for arm, rows in results.items():
        cpu = [float(result["cpu_s"][0]) for result in rows]
        spread = median_and_spread(cpu)[1] if min(cpu) > 0 else 0.0  # at nano size a clock tick may be longer
        row[arm] = {
            "first_s": round(statistics.median(result["first_s"] for result in rows), 2),
            "wall_ms": [round(1e3 * value / samples, 3) for value in _medians(rows, "wall_s")],
            "cpu_ms": [round(1e3 * value / samples, 3) for value in _medians(rows, "cpu_s")],
            "spread": round(spread, 3),
            "bytes_over_shards": [round(value / sizes.get(arm, tars), 3) for value in _medians(rows, "sent")],
            "requests": statistics.median(result["requests"] for result in rows),
        }
    row["void"] = is_void(rounds, max(row[arm]["spread"] for arm in results))
    return row


def _is_shard(line: str) -> bool:
    """Whether a request is for a shard."""
    return line.partition("?")[0].endswith((".mds", ".tar"))


def _medians(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Medians over rounds by epoch."""
    return [statistics.median(result[name][epoch] for result in rows) for epoch in range(len(rows[0][name]))]


# --- index ------------------------------------------------------------------------------------------------------------


def private_mb() -> float:
    """Memory that this process has written and no other shares, in MB; pages of mapped files are clean."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1.024e-3 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def open_and_read(address: str, rank: int, rows: int) -> dict[str, float]:
    """One of two processes of `index`; the arguments are those of a rank of two."""
    import pipelines.stream.feed as feed
    from pipelines.core.places.place import place_of
    from pipelines.corpus.stored import corpus_folder
    from pipelines.stream import opened
    from pipelines.stream.ahead import choose_reads
    from pipelines.stream.config import StreamConfig
    from pipelines.stream.ordering import rank_position
    from pipelines.stream.rows import load_columns

    place_of(address).is_file()  # the store's package is imported, and its connections are open
    pa.array([0]).to_numpy()  # imports pandas, with 24 MB, as Ray Data does in every task
    warm = np.arange(8)
    load_columns(StreamConfig(sources=(("dead_leaves", 1.0),), seed=1, resolution=16), warm)
    before, begin = private_mb(), time.perf_counter()
    config = StreamConfig(sources=((str(corpus_folder(place_of(address))), 1.0),), seed=1, resolution=16)
    reads = choose_reads(config, 2 * rows, 0.5, "auto", 4, 0)
    opened.use(reads)
    opens, open_shard = Counter[str](), opened._open_shard

    def counted(split: Any, number: int) -> Any:
        opens["shards"] += 1
        return open_shard(split, number)

    opened._open_shard = counted
    place = {"start": 0, "batch_size": 2 * BATCH, "rank": rank, "world": 2}
    first_s, after_first = 0.0, 0.0
    blocks = [rank_position(np.arange(first, first + BATCH), **place) for first in range(0, rows, BATCH)]
    for positions in feed.with_samples(config, reads, blocks):
        load_columns(config, positions)
        if not first_s:
            first_s, after_first = time.perf_counter() - begin, private_mb()
    return {
        "first_s": round(first_s, 2),
        "private_mb_first": round(after_first - before, 1),
        "private_mb": round(private_mb() - before, 1),
        "opens_a_row": opens["shards"] / rows,
    }


def index(samples: int = 20_000_000, rows: int = ROWS, folder: Path | None = None) -> dict[str, Any]:
    """Two processes that open a synthetic corpus of many samples in a bucket."""
    import store_servers

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        shard = synthetic_bucket.write(content, samples)
        with synthetic_bucket.serve(content, shard) as endpoint:
            environment = {**os.environ, **store_servers.environment(endpoint), "RESTORAY_HOME": f"{scratch}/home"}
            words = ["--place", "s3://bucket/corpus", "--rows", str(rows)]
            command = [sys.executable, __file__, "open", *words]
            options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment}
            both = [subprocess.Popen([*command, "--rank", str(rank)], **options) for rank in range(2)]
            lines = [process.communicate()[0] for process in both]
            if any(process.returncode for process in both):
                raise SystemExit("a process of `index` failed")
        sizes = {name: (content / name).stat().st_size for name in ("index.json", "train.arrow")}
    reports = [json.loads(line.splitlines()[-1]) for line in lines]
    return {"samples": samples, "rows": rows, **sizes, "workers": reports}


def main() -> None:
    """Measure and print; or run a part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loaders", "index", "arm", "open"])
    parser.add_argument("--peers", default="", help="Python of the environment with the other loaders")
    parser.add_argument("--photos", type=Path, help="a folder of photographs; default dead leaves")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--cut", type=int, default=448)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--folder", type=Path, help="scratch folder of `index`; 4 GB at 20 million samples")
    parser.add_argument("--arms", nargs="+", default=["webdataset", "mosaicml", "ours"])
    parser.add_argument("--server", choices=["seaweed", "moto"], default="seaweed")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reads", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "arm":
        consume(options.place, options.samples, options.epochs, options.cut, options.reads)
    elif options.what == "open":
        print(json.dumps(open_and_read(options.place, options.rank, options.rows)))
    elif options.what == "index":
        print(json.dumps(index(options.samples or 20_000_000, options.rows, options.folder)))
    else:
        settings = {name: getattr(options, name) for name in ("rounds", "epochs", "photos", "peers", "server")}
        arms = tuple(options.arms)
        print(json.dumps(loaders(options.samples or 2000, crop=options.cut, arms=arms, **settings)))


if __name__ == "__main__":
    main()
