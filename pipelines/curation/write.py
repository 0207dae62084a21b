"""Writing: a range of decided rows -> one shard, its rows of the split's table, and its lines of the manifest.

A task writes the shard, then the two pieces, then tells the driver, who notes it in shards.jsonl. Whatever dies in
between, the same plan gives the same bytes under the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.corpora import CorpusSpec
from components.types import SampleError
from pipelines import shards
from pipelines.curation.measure import SCORE
from pipelines.curation.select import SPLITS, ShardPlan
from pipelines.rows import replace_file
from pipelines.sources import Bytes

MEMBER = ("key", "source", "sha256", "width", "height", "split", "licence", "credit", "caption")
"""Fields of a sample's JSON member."""


class Changed(Exception):
    """A source is not what it was when it was measured."""


def planned_rows(plan: ShardPlan, out: Path) -> Iterator[dict[str, Any]]:
    """Decided rows of a plan, in order, a part at a time."""
    for name in plan.parts:
        table = pq.read_table(out / "work" / "decided" / f"{name}.parquet")
        number, split = table.column("number"), table.column("split")
        mine = pc.and_(
            pc.and_(pc.greater_equal(number, plan.first), pc.less_equal(number, plan.last)), pc.equal(split, plan.split)
        )
        yield from table.filter(mine).to_pylist()


def write_planned(plan: ShardPlan, spec: CorpusSpec, out: Path) -> dict[str, Any]:
    """Write one shard and its pieces; returns {"name", "bytes", "sha256", "samples"}.

    Raises:
        Changed: a picture's bytes are not those that were measured.
        OSError: nothing can be written here.
    """
    rows = list(planned_rows(plan, out))
    if len(rows) != plan.samples:
        raise Changed(f"{plan.split} shard {plan.number} should hold {plan.samples} samples and would hold {len(rows)}")
    places = {row["key"]: row for row in rows}
    reader = Bytes(spec, out)

    def read(sample: shards.Sample) -> bytes:
        row = places[sample.key]
        try:
            data = reader.read(row["at"], row["key"])
        except SampleError as error:
            raise Changed(f"{row['source']}: {error.detail}") from error
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise Changed(f"{row['source']}: the file changed while it was curated")
        return data

    samples = [shards.Sample(key=r["key"], ext=r["ext"], info={name: r[name] for name in MEMBER}) for r in rows]
    entry = shards.write_shard(out / plan.split, f"{plan.split}-{plan.number:05d}", samples, read)
    lines = [shards.json_line(manifest_row(row, entry["name"])) for row in rows]
    batch = shards.table_batch([{**row, **place} for row, place in zip(rows, entry["samples"], strict=True)])
    folder = out / "work" / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {"jsonl": "".join(lines).encode()}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, shards.TABLE) as writer:
        writer.write_batch(batch)
    pieces["arrow"] = sink.getvalue().to_pybytes()
    for kind, data in pieces.items():
        replace_file(folder / f"{entry['name']}.{kind}", data, sync=True)
    told = {name: entry[name] for name in ("name", "bytes", "sha256")}
    return {**told, "samples": len(rows), "pieces": {kind: len(data) for kind, data in pieces.items()}}


def manifest_row(row: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """A decided row as the manifest tells it; no path of the machine is in it."""
    names = ("key", "source", "sha256", "bytes", "width", "height", "split", "licence", "credit", "caption")
    scores = {c.removeprefix(SCORE): _rounded(v) for c, v in row.items() if c.startswith(SCORE) and v is not None}
    return {**{name: row[name] for name in names}, "verdicts": scores, "shard": shard}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def write_many(batch: Any, spec: CorpusSpec, out: str) -> dict[str, Any]:
    """Ray Data batch {"plan"} -> {"result"}: {"plan", "split", "entry"} or {"error"}, as JSON."""
    import numpy as np

    results = []
    for text in batch["plan"]:
        plan = ShardPlan(**json.loads(text))
        try:
            entry = write_planned(plan, spec, Path(out))
            result: dict[str, Any] = {"plan": plan.digest, "split": plan.split, "entry": entry}
        except Changed as error:  # the next run measures these parts anew
            for part in plan.parts:
                (Path(out) / "work" / "measured" / f"{part}.parquet").unlink(missing_ok=True)
            result = {"error": f"{error}; run the same command again."}
        except OSError as error:
            result = {"error": f"{out} cannot be written: {error.strerror or error}."}
        results.append(json.dumps(result))
    return {"result": np.array(results, dtype=object)}


def finish(out: Path, spec: CorpusSpec, plans: Sequence[ShardPlan], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Put the pieces together: manifest, tables, quarantine, and index.json last; returns the manifest's sha256.

    Args:
        entries: what `write_planned` returned, by the plan's digest.
    """
    pieces = out / "work" / "pieces"
    (out / "index.json").unlink(missing_ok=True)  # an index of the files before must not stand beside those of today
    manifest, temporary = hashlib.sha256(), out / f".manifest.jsonl.tmp-{os.getpid()}"
    try:
        with open(temporary, "wb") as target:
            for plan in plans:
                data = (pieces / f"{entries[plan.digest]['name']}.jsonl").read_bytes()
                assert data.count(b"\n") == plan.samples, f"{entries[plan.digest]['name']}: a piece is not whole"
                manifest.update(data)
                target.write(data)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, out / "manifest.jsonl")
    finally:
        temporary.unlink(missing_ok=True)
    splits = {}
    for split in SPLITS:
        mine = [entries[plan.digest] for plan in plans if plan.split == split]
        table = shards.write_table(out / f"{split}.arrow", _batches(pieces, mine))
        splits[split] = {"table": table, "shards": mine}
    quarantine = out / f".quarantine.jsonl.tmp-{os.getpid()}"
    quarantine.write_bytes((out / "work" / "quarantine.jsonl").read_bytes())
    os.replace(quarantine, out / "quarantine.jsonl")
    shards.write_index(out, spec.name, manifest.hexdigest(), splits)
    return manifest.hexdigest()


def _batches(pieces: Path, entries: Iterable[Mapping[str, Any]]) -> Iterator[pa.RecordBatch]:
    for entry in entries:
        with pa.ipc.open_stream((pieces / f"{entry['name']}.arrow").read_bytes()) as reader:
            yield reader.read_next_batch()


def remove_leftovers(out: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Remove shards and pieces of earlier specs and unfinished files; only names that these modules give."""
    names = {entry["name"] for entry in entries}
    for split in SPLITS:
        for path in (out / split).glob(f"{split}-*.tar"):
            if path.name not in names:
                path.unlink()
        for path in (out / split).glob(f".{split}-*.tmp-*"):
            path.unlink()
    for path in (out / "work" / "pieces").glob("*.tar.*"):
        if path.name.rpartition(".")[0] not in names:
            path.unlink()
    for path in (out / "work").rglob(".*.tmp-*"):
        path.unlink()
