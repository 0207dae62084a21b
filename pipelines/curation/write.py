"""Write shards: a range of decided rows becomes a shard, its rows of the split's table, and its lines of the manifest.

A task writes the shard, then the two pieces; then the driver notes its answer in shards.jsonl. After a death at any
point the same plan gives the same bytes under the same name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.captions.text import split_texts
from components.corpora import CorpusSpec
from components.types import SampleError
from components.writing import LEFTOVERS, replace_file, whole_file
from pipelines.core.deaths import remove_leftovers
from pipelines.core.pool import object_column
from pipelines.corpus import shards
from pipelines.curation.measure import SCORE
from pipelines.curation.select import SPLITS, ShardPlan
from pipelines.curation.sources import Bytes

MEMBER = ("key", "source", "sha256", "width", "height", "split", "licence", "credit", "caption")
"""Fields of a sample's JSON member."""


@dataclass(frozen=True, kw_only=True)
class WriteAnswer:
    """How writing a shard ended.

    Attributes:
        plan: plan of the shard.
        entry: result of `write_planned`.
        error: why the run must end; "" where the shard is written.
    """

    plan: ShardPlan
    entry: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class SourceChanged(Exception):
    """A source has changed since it was measured."""


def planned_rows(plan: ShardPlan, out: Path) -> Iterator[dict[str, Any]]:
    """Decided rows of a plan, in order, one part at a time."""
    for name in plan.parts:
        table = pq.read_table(out / "work" / "decided" / f"{name}.parquet")
        number, split = table.column("number"), table.column("split")
        is_planned = pc.and_(
            pc.and_(pc.greater_equal(number, plan.first), pc.less_equal(number, plan.last)), pc.equal(split, plan.split)
        )
        yield from table.filter(is_planned).to_pylist()


def write_planned(plan: ShardPlan, spec: CorpusSpec, out: Path) -> dict[str, Any]:
    """Write one shard and its pieces; returns {"name", "bytes", "sha256", "samples", "pieces": sizes by kind}.

    Raises:
        SourceChanged: a picture's bytes differ from the measured ones.
        OSError: the files cannot be written.
    """
    rows = list(planned_rows(plan, out))
    if len(rows) != plan.samples:
        raise SourceChanged(
            f"{plan.split} shard {plan.number} should hold {plan.samples} samples and would hold {len(rows)}"
        )
    places = {row["key"]: row for row in rows}
    reader = Bytes(spec, out)

    def read(sample: shards.Sample) -> bytes:
        row = places[sample.key]
        try:
            data = reader.read(row["at"], row["key"])
        except SampleError as error:
            raise SourceChanged(f"{row['source']}: {error.detail}") from error
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise SourceChanged(f"{row['source']}: the file changed while it was curated")
        return data

    samples = [
        shards.Sample(key=r["key"], ext=r["ext"], info={**{name: r[name] for name in MEMBER}, **_texts(r)})
        for r in rows
    ]
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
    facts = {name: entry[name] for name in ("name", "bytes", "sha256")}
    return {**facts, "samples": len(rows), "pieces": {kind: len(data) for kind, data in pieces.items()}}


def manifest_row(row: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """A decided row as a row of the manifest, without paths of the machine."""
    names = ("key", "source", "sha256", "bytes", "width", "height", "split", "licence", "credit", "caption")
    scores = {c.removeprefix(SCORE): _round(v) for c, v in row.items() if c.startswith(SCORE) and v is not None}
    return {**{name: row[name] for name in names}, **_texts(row), "verdicts": scores, "shard": shard}


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """For a picture of several texts: the first as its caption, and all of them; {} for others."""
    texts = split_texts(row["caption"])
    return {"caption": texts[0], "captions": texts} if len(texts) > 1 else {}


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def write_many(batch: Mapping[str, np.ndarray], spec: CorpusSpec, out: Path) -> dict[str, np.ndarray]:
    """Ray Data batch {"job": ShardPlan objects} -> {"answer": WriteAnswer objects}."""
    return {"answer": object_column([_answer(plan, spec, out) for plan in batch["job"]])}


def _answer(plan: ShardPlan, spec: CorpusSpec, out: Path) -> WriteAnswer:
    try:
        return WriteAnswer(plan=plan, entry=write_planned(plan, spec, out))
    except SourceChanged as error:  # the next run measures these parts again
        for part in plan.parts:
            (out / "work" / "measured" / f"{part}.parquet").unlink(missing_ok=True)
        return WriteAnswer(plan=plan, error=f"{error}; run the same command again.")
    except OSError as error:
        return WriteAnswer(plan=plan, error=f"{out} cannot be written: {error.strerror or error}.")


def finish(out: Path, spec: CorpusSpec, plans: Sequence[ShardPlan], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Join the pieces to manifest, tables and quarantine, and write index.json last; returns the manifest's sha256.

    Args:
        entries: results of `write_planned` by the digest of the plan.
    """
    pieces = out / "work" / "pieces"
    (out / "index.json").unlink(missing_ok=True)  # an old index must not stand next to new files
    manifest = hashlib.sha256()
    with whole_file(out / "manifest.jsonl", sync=True) as draft, open(draft.temporary, "wb") as target:
        for plan in plans:
            data = (pieces / f"{entries[plan.digest]['name']}.jsonl").read_bytes()
            assert data.count(b"\n") == plan.samples, f"{entries[plan.digest]['name']}: a piece is incomplete"
            manifest.update(data)
            target.write(data)
    splits = {}
    for split in SPLITS:
        own = [entries[plan.digest] for plan in plans if plan.split == split]
        table = shards.write_table(out / f"{split}.arrow", _batches(pieces, own))
        splits[split] = {"table": table, "shards": own}
    replace_file(out / "quarantine.jsonl", (out / "work" / "quarantine.jsonl").read_bytes())
    shards.write_index(out, spec.name, manifest.hexdigest(), splits)
    return manifest.hexdigest()


def _batches(pieces: Path, entries: Iterable[Mapping[str, Any]]) -> Iterator[pa.RecordBatch]:
    for entry in entries:
        with pa.ipc.open_stream((pieces / f"{entry['name']}.arrow").read_bytes()) as reader:
            yield reader.read_next_batch()


def remove_old_shards(out: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Remove shards and pieces of earlier specs, and unfinished files.

    In the folders of the splits, only files with names that this module gives are removed. The folder `work` is ours.
    """
    names = {entry["name"] for entry in entries}
    for split in SPLITS:
        for path in (out / split).glob(f"{split}-*.tar"):
            if path.name not in names:
                path.unlink()
    for path in (out / "work" / "pieces").glob("*.tar.*"):
        if path.name.rpartition(".")[0] not in names:
            path.unlink()
    remove_leftovers(out, *(f"{split}/.{split}-*.tmp-*" for split in SPLITS), f"work/**/{LEFTOVERS}")
