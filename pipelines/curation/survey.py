"""Surveying: one pass over the decided rows of a corpus of any size, which leaves counts, bins and a few examples.

Examples are the rows whose keys have the smallest hashes: the same in every run, and chosen by nobody's taste.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.corpora import Bounds
from pipelines.histograms import Histogram, choose_axis

ACCEPTED_EXAMPLES, REJECTED_EXAMPLES = 16, 8
"""Rows kept of what was accepted, and of each reason."""
KINDS_COUNTED = 20_000  # sources and licences that are told apart
BATCH_ROWS = 8192
SAMPLED_FILES, SAMPLED_ROWS = 256, 1024  # what the axes are chosen from: files, and rows of each

SCORE = "score/"
COLUMNS = frozenset(
    {
        *("number", "key", "source", "at", "licence", "caption"),
        *("bytes", "width", "height", "ext"),
        *("split", "code", "stage", "detail"),
    }
)
"""What is read besides the scores."""


def held(values: np.ndarray, bounds: Bounds) -> np.ndarray:
    """`bounds.hold` of many: bool [k]; what is no number is not held."""
    low = -np.inf if bounds.min is None else bounds.min
    high = np.inf if bounds.max is None else bounds.max
    return np.asarray((values >= low) & (values <= high))


def key_hash(key: str) -> int:
    """64 bits that order keys by nobody's choice."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def origin(source: str) -> str:
    """What a candidate's source is counted under: the host, the archive or table, or the kind and the first folder."""
    kind, colon, rest = source.partition(":")
    if rest.startswith("//"):
        return f"{kind}://{rest[2:].partition('/')[0]}"
    if kind == "parquet":
        return source.partition("#")[0]
    if kind == "tar":
        for end in (".tar.gz", ".tgz", ".tar"):
            head, found, _ = source.partition(end)
            if found:
                return head + found
    head, slash, _ = rest.partition("/")
    return f"{kind}:{head}" if slash and colon else kind


def measures(table: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Everything with a histogram: float64 [k] by name, nan where it is not known."""
    values: dict[str, np.ndarray] = {}
    for name in ("width", "height", "bytes"):
        numbers = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
        values[name] = np.where(numbers > 0, numbers, np.nan)
    width, height = values["width"], values["height"]
    values["megapixels"] = width * height / 1e6
    values["aspect"] = np.maximum(width, height) / np.minimum(width, height)
    for column in table.schema.names:
        if column.startswith(SCORE):
            values[column.removeprefix(SCORE)] = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
    return values


def sampled(decided: Sequence[Path]) -> dict[str, np.ndarray]:
    """Measures of some rows of some files, both spread evenly: all rows where there are few."""
    places = np.unique(np.linspace(0, len(decided) - 1, min(len(decided), SAMPLED_FILES)).round().astype(int))
    kept: dict[str, list[np.ndarray]] = {}
    for place in places:
        with pq.ParquetFile(decided[place]) as file:
            names = [n for n in file.schema_arrow.names if n.startswith(SCORE) or n in ("width", "height", "bytes")]
            stride, first = -(-file.metadata.num_rows // SAMPLED_ROWS) or 1, 0
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                for name, numbers in measures(batch).items():
                    kept.setdefault(name, []).append(numbers[-first % stride :: stride])
                first += batch.num_rows
    return {name: np.concatenate(numbers) for name, numbers in kept.items()}


def survey(decided: Sequence[Path], bounds: Mapping[str, Bounds], limits: Mapping[str, Bounds]) -> Survey:
    """Read everything once, after a look at a sample; `limits` are the bounds of what is no score."""
    found = Survey(bounds, limits)
    found.choose_axes(sampled(decided))
    for batch in batches(decided):
        found.add(batch)
    return found


def batches(decided: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """All rows, COLUMNS and scores, in batches of about BATCH_ROWS: a part may hold eight rows or a million."""
    waiting: list[pa.RecordBatch] = []
    for path in decided:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS or name.startswith(SCORE)]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                held_back = sum(other.num_rows for other in waiting)
                if waiting and (held_back + batch.num_rows > BATCH_ROWS or batch.schema != waiting[0].schema):
                    yield pa.concat_batches(waiting)
                    waiting = []
                waiting.append(batch)
    if waiting:
        yield pa.concat_batches(waiting)


@dataclass(kw_only=True)
class Reservoir:
    """The rows with the smallest hashes of their keys: a fair choice that no order of arrival changes."""

    size: int
    rows: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    def offer(self, table: pa.RecordBatch, hashes: np.ndarray, places: np.ndarray) -> None:
        """Consider rows `places` of a batch whose keys have these uint64 hashes."""
        if len(self.rows) == self.size:
            places = places[hashes[places] <= self.rows[-1][0]]
        places = places[np.argsort(hashes[places], kind="stable")[: self.size]]  # of equal keys the first stays
        if not len(places):
            return
        picked = table.take(pa.array(places)).to_pylist()
        new = [(int(hashes[place]), row["number"], row) for place, row in zip(places, picked, strict=True)]
        self.rows = sorted(self.rows + new, key=lambda entry: entry[:2])[: self.size]


@dataclass(kw_only=True)
class Tally:
    """Candidates and accepted pictures by kind; after KINDS_COUNTED kinds the further ones are counted as one."""

    counts: dict[str, list[int]] = field(default_factory=dict)
    further: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, kinds: Iterable[str], accepted: np.ndarray) -> None:
        """Count [k] kinds, of which those with `accepted` bool [k] were taken."""
        for (kind, taken), count in Counter(zip(kinds, accepted.tolist(), strict=True)).items():
            known = kind in self.counts or len(self.counts) < KINDS_COUNTED
            entry = self.counts.setdefault(kind, [0, 0]) if known else self.further
            entry[0] += count
            entry[1] += count * taken

    def largest(self) -> list[tuple[str, int, int]]:
        """(kind, candidates, accepted) of all kinds told apart, most candidates first."""
        return sorted(((kind, n, a) for kind, (n, a) in self.counts.items()), key=lambda row: (-row[1], row[0]))


class Survey:
    """What one pass over the decided rows leaves.

    Attributes:
        bounds: of scores, in the order of judging.
        limits: of what is no score.
        histograms: by the names of `measures`.
        candidates, captioned, accepted_bytes, accepted_pixels: counts and sums; all but the first of what was accepted.
        splits: accepted pictures by split.
        stages: rejected candidates by stage.
        codes: rejected candidates by (code, stage).
        deciding: those that a score refused, by (code, score).
        licences, sources, formats: how many of which kind.
        examples: rows by code, "" for what was accepted.
    """

    def __init__(self, bounds: Mapping[str, Bounds], limits: Mapping[str, Bounds]) -> None:
        self.bounds, self.limits = bounds, limits
        self.histograms: dict[str, Histogram] = {}
        self.candidates = self.captioned = self.accepted_bytes = self.accepted_pixels = 0
        self.splits, self.stages = Counter[str](), Counter[str]()
        self.codes: Counter[tuple[str, str]] = Counter()
        self.deciding: Counter[tuple[str, str]] = Counter()
        self.licences, self.sources, self.formats = Tally(), Tally(), Tally()
        self.examples: dict[str, Reservoir] = {}

    @property
    def accepted(self) -> int:
        """Pictures in the corpus."""
        return self.splits.total()

    def by_code(self) -> Counter[str]:
        """Rejected candidates by reason."""
        found: Counter[str] = Counter()
        for (code, _), count in self.codes.items():
            found[code] += count
        return found

    def choose_axes(self, values: Mapping[str, np.ndarray]) -> None:
        """Start histograms of what has none yet, for values like these."""
        for name in [name for name in values if name not in self.histograms]:
            axis = choose_axis(values[name], {**self.limits, **self.bounds}.get(name))
            if axis is not None:
                self.histograms[name] = Histogram(axis)

    def add(self, table: pa.RecordBatch) -> None:
        """Count a batch of decided rows."""
        codes, stages, splits = (np.array(table.column(c).to_pylist(), object) for c in ("code", "stage", "split"))
        rejected = codes != ""
        taken = ~rejected
        self.candidates += table.num_rows
        self.splits.update(splits[taken].tolist())
        self.stages.update(stages[rejected].tolist())
        self.codes.update(zip(codes[rejected].tolist(), stages[rejected].tolist(), strict=True))
        values = measures(table)
        self.choose_axes(values)  # of a score that the sample has missed
        for name, histogram in self.histograms.items():
            if name in values:
                histogram.add(values[name], rejected)
        self._decide(values, codes, stages)
        self.accepted_bytes += int(np.nansum(values["bytes"][taken]))
        self.accepted_pixels += int(np.nansum(values["width"][taken] * values["height"][taken]))
        self.captioned += int((pc.not_equal(table.column("caption"), "").to_numpy(zero_copy_only=False) & taken).sum())
        self.licences.add((text or "not stated" for text in table.column("licence").to_pylist()), taken)
        self.sources.add(map(origin, table.column("source").to_pylist()), taken)
        self.formats.add((text or "not decoded" for text in table.column("ext").to_pylist()), taken)
        hashes = np.array([key_hash(key) for key in table.column("key").to_pylist()], np.uint64)
        for code in np.unique(codes.astype(str)).tolist():
            size = REJECTED_EXAMPLES if code else ACCEPTED_EXAMPLES
            self.examples.setdefault(code, Reservoir(size=size)).offer(table, hashes, np.flatnonzero(codes == code))

    def _decide(self, values: Mapping[str, np.ndarray], codes: np.ndarray, stages: np.ndarray) -> None:
        """Which score refused what thresholds refused: the one that the code names, else the first not to hold."""
        open_ = (codes != "") & np.isin(stages.astype(str), ("filter", "score"))
        for name in self.bounds:
            named = open_ & (codes == name)
            if named.any():
                self.deciding[name, name] += int(named.sum())
            open_ &= ~named
        for name, bounds in self.bounds.items():
            if not open_.any():
                break
            numbers = values.get(name, np.full(len(codes), np.nan))
            mine = open_ & ~held(numbers, bounds)
            for code in codes[mine].tolist():
                self.deciding[code, name] += 1
            open_ &= ~mine
