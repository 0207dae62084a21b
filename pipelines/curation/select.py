"""Select: decide which measured candidates become samples, and their key, split and shard.

Selecting is a pure function of the measured rows and the spec, in the order of the sources: retries, the number of
workers and the order of arrival change nothing. Of equal pictures the first stays. One task selects for the whole
corpus. It holds about 60 bytes a candidate (150 with near duplicates) in arrays, and one part's rows in Arrow. The
driver gets counts and the plans of the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import Bounds, CorpusSpec, SplitSpec
from components.fingerprints import WORDS, first_alike
from components.quality import bounds_of, judge
from components.writing import replace_file, whole_file
from pipelines.core.errors import UsageError
from pipelines.corpus import shards
from pipelines.curation.measure import SCHEMA, SCORE
from pipelines.curation.sources.files import held_out_is_missing

VERSION = 1
DECIDED_ROWS = 4096  # rows that are objects at a time
OVERHEAD_BYTES = 2048  # bytes of a sample in a shard besides its picture: two headers, padding, JSON

FAILED = "failed/"  # prefix of the columns with the reason of a missing learned score
BROKEN, REFUSED, EXACT, NEAR = 1, 2, 3, 4  # status of a candidate that is out: broken, score, copy, similar; 0 is in
SPLITS = ("train", "held_out")

SCHEMA_SCORES = [f.name for f in SCHEMA if f.name.startswith(SCORE)]
INFO = ("key", "source", "sha256", "bytes", "width", "height", "ext", "licence", "credit", "caption")
"""Fields of a candidate that decide its bytes in a shard."""

DECIDED = pa.schema(
    [
        ("number", pa.int64()),
        *(f for f in SCHEMA if f.name != "id" and not f.name.startswith(SCORE)),
        ("split", pa.string()),
    ]
)
"""Columns of decided rows; the score columns follow."""


@dataclass(kw_only=True)
class ShardPlan:
    """The plan of one shard.

    Attributes:
        split, number: split of the shard, and its number there.
        first, last: numbers of its first and its last candidate, in the order of the sources.
        parts: names of the decided files that hold its candidates.
        samples, size: number of samples, and approximate size in bytes.
        digest: digest of everything that decides its bytes.
    """

    split: str
    number: int
    first: int
    last: int
    parts: list[str] = field(default_factory=list)
    samples: int = 0
    size: int = 0
    digest: str = ""


@dataclass(kw_only=True)
class Selection:
    """The result of selecting: counts by code and split, and the plans of the shards."""

    candidates: int
    accepted: dict[str, int]
    codes: dict[str, int]
    plans: list[ShardPlan]

    def to_json(self) -> str:
        """JSON text for work/selected.json."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Selection:
        """The inverse of `to_json`."""
        document = json.loads(text)
        return Selection(**{**document, "plans": [ShardPlan(**plan) for plan in document["plans"]]})


def thresholds(spec: CorpusSpec) -> dict[str, Bounds]:
    """Bounds by score name, learned scores last; UsageError for an unknown score."""
    try:
        bounds = bounds_of(spec.filters.preset, spec.filters.scores, spec.filters.flat_below)
    except ValueError as error:
        raise UsageError(f"{spec.name}: {error}") from error
    return {**bounds, **{model.name: model.bounds for model in spec.filters.models}}


def select(names: Sequence[str], spec: CorpusSpec, out: Path, digest: str = "") -> Selection:
    """Decide about every candidate; writes work/decided/*.parquet and work/quarantine.jsonl.

    Args:
        names: names of all parts, in the order of the sources.
        digest: see `selection_digest`; every decided file holds it.

    Raises:
        UsageError: no candidate has a held-out name of the spec.
    """
    bounds = thresholds(spec)
    own = {name: b for name, b in bounds.items() if name not in {m.name for m in spec.filters.models}}
    rows = _Rows(names, out, spec)
    status, sha, keys, prints = rows.gather(bounds)
    reasons: dict[int, str] = {}  # number: detail, of copies only
    originals = _mark_copies(status, sha, spec, reasons, rows)
    if spec.dedup.near:
        originals |= _mark_similar(status, prints, spec, reasons, rows)
    accepted = np.flatnonzero(status == 0)
    if spec.split.held_out:
        held_out = held_out_by_name(spec.split, keys, status, originals, rows)
    else:
        held_out = held_out_by_fraction(keys, accepted, spec.split)  # by the keys before equal ones get longer
    new_keys = _distinct_keys(keys, accepted, rows)
    return _write(rows, status, reasons, new_keys, held_out, own, digest)


class _Rows:
    """Measured rows by their number; one column at a time is read from the files of the parts."""

    def __init__(self, names: Sequence[str], out: Path, spec: CorpusSpec) -> None:
        self.names, self.out, self.spec = names, out, spec
        self.counts = [pq.read_metadata(self.path(name)).num_rows for name in names]
        self.starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def path(self, name: str) -> Path:
        return self.out / "work" / "measured" / f"{name}.parquet"

    def table(self, place: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of a part, with the columns of learned scores."""
        measured = None if columns is None else [c for c in columns if c in SCHEMA.names]
        table = pq.read_table(self.path(self.names[place]), columns=measured)
        for model in self.spec.filters.models:
            column = SCORE + model.name
            if columns is None or column in columns:
                path = self.out / "work" / "scored" / model.name / f"{self.names[place]}.parquet"
                scores = pq.read_table(path)
                table = table.append_column(column, scores.column("value"))
                table = table.append_column(FAILED + model.name, scores.column("failed"))
        return table

    def gather(self, bounds: Mapping[str, Bounds]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arrays of all rows.

        Returns:
            status uint8 [N], first 16 bytes of sha256 as uint64 [N, 2], hashes of the keys uint64 [N], and fingerprints
            uint64 [N, WORDS]; without near duplicates [0, WORDS].
        """
        n, near = int(self.starts[-1]), self.spec.dedup.near
        status, sha, keys = np.zeros(n, np.uint8), np.zeros((n, 2), np.uint64), np.zeros(n, np.uint64)
        prints = np.zeros((n if near else 0, WORDS), np.uint64)
        columns = ["code", "sha256", "key", *(SCORE + name for name in bounds), *(["print"] if near else [])]
        for place in range(len(self.names)):
            table, here = self.table(place, columns), slice(int(self.starts[place]), int(self.starts[place + 1]))
            broken = np.array([bool(code) for code in table.column("code").to_pylist()], bool)
            status[here] = np.where(broken, BROKEN, 0)
            digests = [bytes.fromhex(text[:32]) or bytes(16) for text in table.column("sha256").to_pylist()]
            sha[here] = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
            keys[here] = [split_hash(key) for key in table.column("key").to_pylist()]
            for name, bound in bounds.items():
                values = table.column(SCORE + name).to_numpy(zero_copy_only=False).astype(np.float64)
                low = -np.inf if bound.min is None else bound.min
                high = np.inf if bound.max is None else bound.max
                outside = ~((values >= np.float64(low)) & (values <= np.float64(high)))  # NaN is outside
                status[here][(status[here] == 0) & outside] = REFUSED
            if near:
                blank = bytes(8 * WORDS)
                data = b"".join(value or blank for value in table.column("print").to_pylist())
                prints[here] = np.frombuffer(data, np.uint64).reshape(-1, WORDS)
        return status, sha, keys, prints

    def values(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[int, tuple[Any, ...]]:
        """Some columns of some rows, by number."""
        values: dict[int, tuple[Any, ...]] = {}
        numbers = np.unique(np.asarray(numbers, np.int64))
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        for place in np.unique(places):
            own = numbers[places == place]
            table = self.table(int(place), columns).take(pa.array(own - self.starts[place]))
            for number, *row in zip(own.tolist(), *(table.column(c).to_pylist() for c in columns), strict=True):
                values[number] = tuple(row)
        return values


def split_hash(key: str) -> int:
    """First 64 bits of the sha256 of a key. Its upper 48 bits decide the split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _mark_copies(
    status: np.ndarray, sha: np.ndarray, spec: CorpusSpec, reasons: dict[int, str], rows: _Rows
) -> dict[int, int]:
    """Mark exact copies of pictures of earlier corpora and of earlier candidates.

    Returns:
        Number of the original by number of the copy, for copies of candidates.
    """
    if not spec.dedup.exact:
        return {}
    for folder in spec.dedup.against:
        texts, names = _column_of_corpus(folder, "sha256")
        digests = np.frombuffer(b"".join(bytes.fromhex(text[:32]) for text in texts), ">u8").reshape(-1, 2)
        index = {(int(high), int(low)): n for n, (high, low) in enumerate(digests.tolist())}
        for number in np.flatnonzero(status == 0).tolist() if index else ():
            match = index.get((int(sha[number, 0]), int(sha[number, 1])))
            if match is not None:
                status[number], reasons[number] = EXACT, f"same bytes as {names[match]} of an earlier corpus"
    rest = np.flatnonzero(status == 0)
    order = rest[np.lexsort((rest, sha[rest, 1], sha[rest, 0]))]
    same = np.zeros(len(order), bool)
    same[1:] = (sha[order[1:]] == sha[order[:-1]]).all(axis=1)
    leaders = order[np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))] if len(order) else order
    copies, originals = order[same], leaders[same]
    status[copies] = EXACT
    keys = rows.values(originals, ["key"])
    for copy, original in zip(copies.tolist(), originals.tolist(), strict=True):
        reasons[copy] = f"same bytes as {keys[original][0]}"
    return dict(zip(copies.tolist(), originals.tolist(), strict=True))


def _mark_similar(
    status: np.ndarray, prints: np.ndarray, spec: CorpusSpec, reasons: dict[int, str], rows: _Rows
) -> dict[int, int]:
    """Mark near duplicates of pictures of earlier corpora and of earlier candidates; returns as `_mark_copies`."""
    originals: dict[int, int] = {}
    before, names = [np.zeros((0, WORDS), np.uint64)], []
    for folder in spec.dedup.against:
        values, keys = _column_of_corpus(folder, "print")
        before.append(np.frombuffer(b"".join(values), np.uint64).reshape(-1, WORDS))
        names += keys
    earlier = sum(map(len, before))
    rest = np.flatnonzero(status == 0)
    of = first_alike(np.concatenate([*before, prints[rest]]), earlier=earlier)[earlier:]
    copies = rest[of >= 0]
    status[copies] = NEAR
    of = of[of >= 0]
    own = rows.values(rest[of[of >= earlier] - earlier], ["key"])
    for copy, original in zip(copies.tolist(), of.tolist(), strict=True):
        if original < earlier:
            reasons[copy] = f"looks like {names[original]} of an earlier corpus"
        else:
            originals[copy] = int(rest[original - earlier])
            reasons[copy] = f"looks like {own[originals[copy]][0]}"
    return originals


def _column_of_corpus(folder: str, column: str) -> tuple[list[Any], list[str]]:
    """A column of an earlier corpus' tables, and its keys."""
    corpus = shards.open_corpus(folder)
    values, keys = [], []
    for split in corpus.splits.values():
        for number in range(len(split.shards)):
            batch = split.batch(number)
            values += batch.column(column).to_pylist()
            keys += batch.column("key").to_pylist()
    if column == "print" and not all(len(value) == 8 * WORDS for value in values):
        raise UsageError(f"dedup.against: {folder} was made without fingerprints of this kind; curate it again.")
    return values, keys


def held_out_by_name(
    split: SplitSpec, keys: np.ndarray, status: np.ndarray, originals: Mapping[int, int], rows: _Rows
) -> set[int]:
    """Numbers of the candidates that the spec holds out by name, before a key may get longer.

    For a copy the original is held out: the picture must not be trained on under another name.

    Args:
        keys: hashes of the keys, uint64 [N].
        status: status of the candidates, uint8 [N].
        originals: number of the original by number of the copy.

    Raises:
        UsageError: no candidate has one of the names.
    """
    names = {split_hash(shards.safe_key(name)): name for name in split.held_out}
    everywhere = np.flatnonzero(np.isin(keys, np.array(list(names), np.uint64)))
    present = set(keys[everywhere].tolist())
    for key, name in names.items():
        if key not in present:
            some = [row[0] for row in rows.values(np.flatnonzero(status == 0)[:100_000], ["key"]).values()]
            raise held_out_is_missing(rows.spec, name, some)
    numbers = set()
    for number in everywhere.tolist():
        while number in originals:
            number = originals[number]
        if status[number] == 0:
            numbers.add(number)
    return numbers


def _distinct_keys(keys: np.ndarray, accepted: np.ndarray, rows: _Rows) -> dict[int, str]:
    """Longer keys, by number, for different pictures with one key ("IMG 1.png", "IMG_1.png").

    Each key gets an end from the hash of its picture's bytes, so that no key depends on the order. `keys` changes.
    """
    new_keys: dict[int, str] = {}
    digits = 8
    while True:
        order = accepted[np.argsort(keys[accepted], kind="stable")]
        same = keys[order[1:]] == keys[order[:-1]]
        equal = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
        if not len(equal):
            return new_keys
        values = rows.values(equal, ["key", "sha256"])
        for place, number in enumerate(equal.tolist()):
            key, digest = values[number]
            end = digest[:digits] if digits <= 64 else str(place)  # equal bytes, if the spec keeps them
            new_keys[number] = shards.safe_key(f"{new_keys.get(number, key)}-{end}")
            keys[number] = split_hash(new_keys[number])
        digits *= 2  # another file may have the longer key as its name


def held_out_by_fraction(keys: np.ndarray, accepted: np.ndarray, split: SplitSpec) -> set[int]:
    """Numbers held out by fraction: at least 2 of 6 or more, 1 of 2 to 5, none of one; all at fraction 1.

    Args:
        keys: hashes of the keys, uint64 [N].
        accepted: numbers of the accepted candidates.
    """
    if not split.held_out_fraction or split.held_out_fraction == 1:
        return set(accepted.tolist()) if split.held_out_fraction else set()
    places = (keys[accepted] >> np.uint64(16)).astype(np.float64) / 2**48
    below = int((places < split.held_out_fraction).sum())
    count = min(max(below, 2 if len(accepted) >= 6 else 1), len(accepted) - 1)
    return set(accepted[np.argsort(places, kind="stable")[: max(0, count)]].tolist())


def _write(
    rows: _Rows,
    status: np.ndarray,
    reasons: Mapping[int, str],
    new_keys: Mapping[int, str],
    held_out: set[int],
    own: Mapping[str, Bounds],
    digest: str,
) -> Selection:
    """Write the decided rows and the quarantine, and plan the shards, in one pass.

    Args:
        own: bounds of the scores that are not learned.
    """
    names, spec = rows.names, rows.spec
    plans = {split: _Planner(split, spec.shard_mib) for split in SPLITS}
    codes: Counter[str] = Counter()
    folder = rows.out / "work" / "decided"
    quarantine = rows.out / "work" / "quarantine.jsonl.new"
    scores = [*SCHEMA_SCORES, *(SCORE + model.name for model in spec.filters.models)]
    folder.mkdir(parents=True, exist_ok=True)
    with open(quarantine, "w", encoding="utf-8") as target:
        for place, name in enumerate(names):
            first = int(rows.starts[place])
            with _decided_writer(folder / f"{name}.parquet", scores, digest) as writer:
                for batch in rows.table(place).to_batches(max_chunksize=DECIDED_ROWS):
                    columns = {column: batch.column(column).to_pylist() for column in batch.schema.names}
                    columns["number"] = list(range(first, first + batch.num_rows))
                    columns["split"] = [""] * batch.num_rows
                    first += batch.num_rows
                    for row, number in enumerate(columns["number"]):
                        columns["key"][row] = new_keys.get(number, columns["key"][row])
                        if status[number] == 0:
                            split = SPLITS[number in held_out]
                            columns["split"][row] = split
                            plans[split].add(number, name, {c: columns[c][row] for c in (*INFO, *scores)})
                            continue
                        if status[number] != BROKEN:
                            reason = _reason(int(status[number]), number, row, columns, own, spec, reasons)
                            columns["code"][row], columns["stage"][row], columns["detail"][row] = reason
                        codes[columns["code"][row]] += 1
                        target.write(_quarantine_line(columns, row))
                    arrays = [pa.array(columns[f.name], f.type) for f in writer.schema]
                    writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=writer.schema))
    quarantine.replace(quarantine.with_suffix(""))
    for stale in folder.glob("*.parquet"):
        if stale.stem not in set(names):
            stale.unlink()
    accepted = {split: sum(plan.samples for plan in planner.plans) for split, planner in plans.items()}
    every = [plan for split in SPLITS for plan in plans[split].finished()]
    return Selection(candidates=int(rows.starts[-1]), accepted=accepted, codes=dict(sorted(codes.items())), plans=every)


@contextmanager
def _decided_writer(path: Path, scores: Sequence[str], digest: str) -> Iterator[pq.ParquetWriter]:
    """Write a decided file as `whole_file` does."""
    schema = pa.schema([*DECIDED, *((name, pa.float32()) for name in scores)], metadata={"selection": digest})
    with whole_file(path) as draft, pq.ParquetWriter(draft.temporary, schema, compression="zstd") as writer:
        yield writer


def _reason(
    status: int,
    number: int,
    row: int,
    columns: Mapping[str, Sequence[Any]],
    own: Mapping[str, Bounds],
    spec: CorpusSpec,
    reasons: Mapping[int, str],
) -> tuple[str, str, str]:
    """(code, stage, detail) of an intact candidate that is out."""
    if status == EXACT:
        return "duplicate", "select", reasons[number]
    if status == NEAR:
        return "near_duplicate", "select", reasons[number]
    refusal = judge({name: columns[SCORE + name][row] for name in own}, own)
    if refusal is not None:
        return refusal[0], "filter", refusal[1]
    for model in spec.filters.models:
        value = columns[SCORE + model.name][row]
        if value is None or not model.bounds.hold(value):
            if value is None:
                return model.name, "score", f"{model.name} failed: {columns[FAILED + model.name][row]}"
            low, high = model.bounds.min, model.bounds.max
            return model.name, "filter", f"{model.name} is {value:.4g}, accepted is {low} to {high}"
    raise AssertionError(f"candidate {number} was refused for no reason")


def _quarantine_line(columns: Mapping[str, Sequence[Any]], row: int) -> str:
    names = ("key", "source", "stage", "code", "detail")
    return shards.json_line({**{n: columns[n][row] for n in names}, "bytes_sha256": columns["sha256"][row]})


class _Planner:
    """Plans the shards of one split in the order of the sources, up to a size; a larger picture fills one alone."""

    def __init__(self, split: str, shard_mib: float) -> None:
        self.split, self.limit = split, shard_mib * 2**20
        self.plans: list[ShardPlan] = []
        self._content: Any = hashlib.sha256()

    def add(self, number: int, part: str, info: Mapping[str, Any]) -> None:
        """Add the next sample."""
        size = info["bytes"] + OVERHEAD_BYTES
        last = self.plans[-1] if self.plans else None
        if last is None or last.size + size > self.limit:
            self._end()
            last = ShardPlan(split=self.split, number=len(self.plans), first=number, last=number)
            self.plans.append(last)
        last.last, last.samples, last.size = number, last.samples + 1, last.size + size
        if not last.parts or last.parts[-1] != part:
            last.parts.append(part)
        self._content.update("\x1f".join(map(str, info.values())).encode() + b"\n")

    def _end(self) -> None:
        if self.plans:
            last = self.plans[-1]
            last.digest = hashlib.sha256(f"{last.split}|{last.number}|{self._content.hexdigest()}".encode()).hexdigest()
        self._content = hashlib.sha256()

    def finished(self) -> Iterator[ShardPlan]:
        """All plans; no sample may follow."""
        self._end()
        yield from self.plans


def selection_digest(contents: Sequence[tuple[str, str]], spec: CorpusSpec) -> str:
    """Digest of everything that decides a selection: the parts' (name, content), and the rules of the spec."""
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}|{content}\n".encode())
    against = [shards.open_corpus(folder).digest for folder in spec.dedup.against]
    bounds = {name: asdict(bound) for name, bound in thresholds(spec).items()}
    models = [asdict(model) for model in spec.filters.models]
    rules = [VERSION, asdict(spec.split), asdict(spec.dedup), against, bounds, models, spec.shard_mib]
    digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


def save(selection: Selection, out: Path, digest: str) -> None:
    """Store a selection under its digest."""
    replace_file(out / "work" / "selected.json", json.dumps([digest, selection.to_json()]).encode())


def load(out: Path, digest: str, names: Sequence[str]) -> Selection | None:
    """An earlier selection with this digest, if all of its files are still there."""
    try:
        own_digest, text = json.loads((out / "work" / "selected.json").read_bytes())
        selection = Selection.from_json(text) if own_digest == digest else None
    except (OSError, ValueError, TypeError):
        return None
    if selection is None or not (out / "work" / "quarantine.jsonl").is_file():
        return None
    for name in names:
        try:
            metadata = pq.read_metadata(out / "work" / "decided" / f"{name}.parquet").metadata or {}
        except (OSError, pa.ArrowException):
            return None
        if metadata.get(b"selection") != digest.encode():
            return None
    return selection
