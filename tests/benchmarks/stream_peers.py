"""Loaders of others for bench_stream_buckets.py, run by the Python of their own environment; imports nothing of ours.

    python stream_peers.py write TARS OUT             the samples of tars as mosaicml-streaming's shards
    python stream_peers.py mosaicml|webdataset FOLDER SAMPLES EPOCHS CROP SCRATCH

An arm prints "first" at its first batch and "seen N" at the end of each epoch, and ends when its input does.
"""

from __future__ import annotations

import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, WORKERS = 32, 2


def write(tars: str, out: str) -> None:
    """Write the JPEGs of tars in MDS format, as many shards as there are tars."""
    from streaming import MDSWriter

    paths = sorted(Path(tars).glob("*.tar"))
    limit = max(path.stat().st_size for path in paths)
    with MDSWriter(out=out, columns={"jpg": "bytes"}, size_limit=limit) as writer:
        for path in paths:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.name.endswith(".jpg"):
                        file = archive.extractfile(member)
                        assert file is not None
                        writer.write({"jpg": file.read()})


def crop_of(data: bytes, crop: int, draw: np.random.Generator) -> np.ndarray:
    """A random crop of a JPEG."""
    import simplejpeg

    picture = simplejpeg.decode_jpeg(data, "RGB")
    top, left = (int(draw.integers(0, length - crop + 1)) for length in picture.shape[:2])
    return np.ascontiguousarray(picture[top : top + crop, left : left + crop])


def mosaicml(folder: str, crop: int, scratch: str) -> Iterator[Any]:
    """mosaicml-streaming: shards to the local disk, samples shuffled, two workers."""
    import torch
    from streaming import StreamingDataset

    draw = np.random.default_rng(0)

    class Pictures(StreamingDataset):
        def __getitem__(self, place: int) -> Any:
            return crop_of(super().__getitem__(place)["jpg"], crop, draw)

    options: dict[str, Any] = {"shuffle": True, "batch_size": BATCH, "num_canonical_nodes": 1}
    dataset = Pictures(remote=folder, local=scratch, **options)

    def stack(rows: list[np.ndarray]) -> Any:
        return torch.from_numpy(np.stack(rows))

    workers: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, collate_fn=stack, **workers)
    while True:
        yield from loader


def webdataset(_: str, crop: int, __: str) -> Iterator[Any]:
    """webdataset: shards through curl, two workers, batched in them; the signed addresses are in BENCH_SHARDS."""
    import torch
    import webdataset as wds

    draw = np.random.default_rng(0)
    urls = [f"pipe:curl -s -f '{address}'" for address in os.environ["BENCH_SHARDS"].splitlines()]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=1, select_files=lambda name: name.endswith(".jpg"))
    rows = dataset.map(lambda sample: crop_of(sample["jpg"], crop, draw))
    batches = rows.batched(BATCH, collation_fn=lambda rows: torch.from_numpy(np.stack(rows)), partial=True)
    yield from torch.utils.data.DataLoader(batches.repeat(), batch_size=None, num_workers=WORKERS)


ARMS = {"mosaicml": mosaicml, "webdataset": webdataset}


def main() -> None:
    """Write, or run an arm."""
    if sys.argv[1] == "write":
        write(*sys.argv[2:])
        return
    arm, folder, samples, epochs, crop, scratch = sys.argv[1:]
    count, marks = 0, [int(samples) * epoch for epoch in range(1, int(epochs) + 1)]
    for batch in ARMS[arm](folder, int(crop), scratch):
        if not count:
            print("first", flush=True)
        count += len(batch)
        while marks and count >= marks[0]:
            print(f"seen {marks.pop(0)}", flush=True)
        if not marks:
            sys.stdin.readline()  # the workers end with this process
            os._exit(0)


if __name__ == "__main__":
    main()
