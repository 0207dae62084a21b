"""Survey a corpus of any size: one pass over its decided rows gives counts, histograms and a few examples.

Examples are the rows whose keys have the smallest hashes: the same rows in every run.
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
from pipelines.curation.measure import SCORE
from pipelines.pages.histograms import Histogram, choose_axis

ACCEPTED_EXAMPLES, REJECTED_EXAMPLES = 16, 8
"""Number of example rows of accepted pictures, and of each reason."""
KINDS_COUNTED = 20_000  # largest number of sources or licences with a count of their own
BATCH_ROWS = 8192
SAMPLED_FILES, SAMPLED_ROWS = 256, 1024  # files, and rows of each, for the choice of the axes

COLUMNS = frozenset(
    {
        *("number", "key", "source", "at", "licence", "caption"),
        *("bytes", "width", "height", "ext"),
        *("split", "code", "stage", "detail"),
    }
)
"""Columns that are read besides the scores."""


def within(values: np.ndarray, bounds: Bounds) -> np.ndarray:
    """`bounds.hold` of many values: bool [k]; NaN is outside."""
    low = -np.inf if bounds.min is None else bounds.min
    high = np.inf if bounds.max is None else bounds.max
    return np.asarray((values >= low) & (values <= high))


def example_hash(key: str) -> int:
    """First 64 bits of the blake2b hash of a key. They decide which rows are examples."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def origin(source: str) -> str:
    """Name under which a source is counted: the host, the archive or table, or the kind and the first folder."""
    kind, colon, rest = source.partition(":")
    if rest.startswith("//"):
        return f"{kind}://{rest[2:].partition('/')[0]}"
    if kind == "parquet":
        return source.partition("#")[0]
    if kind == "tar":
        for end in (".tar.gz", ".tgz", ".tar"):
            head, suffix, _ = source.partition(end)
            if suffix:
                return head + suffix
    head, slash, _ = rest.partition("/")
    return f"{kind}:{head}" if slash and colon else kind


def measures(table: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Everything with a histogram: float64 [k] by name, nan for a missing value."""
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


def measures_of_some(decided: Sequence[Path]) -> dict[str, np.ndarray]:
    """Measures of evenly spread rows of evenly spread files; of all rows if there are few."""
    places = np.unique(np.linspace(0, len(decided) - 1, min(len(decided), SAMPLED_FILES)).round().astype(int))
    values: dict[str, list[np.ndarray]] = {}
    for place in places:
        with pq.ParquetFile(decided[place]) as file:
            names = [n for n in file.schema_arrow.names if n.startswith(SCORE) or n in ("width", "height", "bytes")]
            stride, first = -(-file.metadata.num_rows // SAMPLED_ROWS) or 1, 0
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                for name, numbers in measures(batch).items():
                    values.setdefault(name, []).append(numbers[-first % stride :: stride])
                first += batch.num_rows
    return {name: np.concatenate(numbers) for name, numbers in values.items()}


def survey(decided: Sequence[Path], bounds: Mapping[str, Bounds], limits: Mapping[str, Bounds]) -> Survey:
    """Read some rows for the axes, then all rows once; `limits` are the bounds of measures that are not scores."""
    result = Survey(bounds, limits)
    result.choose_axes(measures_of_some(decided))
    for batch in batches(decided):
        result.add(batch)
    return result


def batches(decided: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """COLUMNS and scores of all rows in batches of about BATCH_ROWS: a part may hold eight rows or a million."""
    waiting: list[pa.RecordBatch] = []
    for path in decided:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS or name.startswith(SCORE)]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                rows = sum(other.num_rows for other in waiting)
                if waiting and (rows + batch.num_rows > BATCH_ROWS or batch.schema != waiting[0].schema):
                    yield pa.concat_batches(waiting)
                    waiting = []
                waiting.append(batch)
    if waiting:
        yield pa.concat_batches(waiting)


@dataclass(kw_only=True)
class Reservoir:
    """The rows whose keys have the smallest hashes. The choice does not depend on the order of the rows."""

    size: int
    rows: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)

    def offer(self, table: pa.RecordBatch, hashes: np.ndarray, places: np.ndarray) -> None:
        """Consider the rows `places` of a batch; `hashes` are those of all its keys, uint64."""
        if len(self.rows) == self.size:
            places = places[hashes[places] <= self.rows[-1][0]]
        places = places[np.argsort(hashes[places], kind="stable")[: self.size]]  # of equal keys the first stays
        if not len(places):
            return
        candidates = table.take(pa.array(places)).to_pylist()
        new = [(int(hashes[place]), row["number"], row) for place, row in zip(places, candidates, strict=True)]
        self.rows = sorted(self.rows + new, key=lambda entry: entry[:2])[: self.size]


@dataclass(kw_only=True)
class Tally:
    """Candidates and accepted pictures by kind. Kinds after the first KINDS_COUNTED are counted as one."""

    counts: dict[str, list[int]] = field(default_factory=dict)
    further: list[int] = field(default_factory=lambda: [0, 0])

    def add(self, kinds: Iterable[str], accepted: np.ndarray) -> None:
        """Count the kinds [k] of rows, and whether they are accepted, bool [k]."""
        for (kind, is_accepted), count in Counter(zip(kinds, accepted.tolist(), strict=True)).items():
            has_entry = kind in self.counts or len(self.counts) < KINDS_COUNTED
            entry = self.counts.setdefault(kind, [0, 0]) if has_entry else self.further
            entry[0] += count
            entry[1] += count * is_accepted

    def largest(self) -> list[tuple[str, int, int]]:
        """(kind, candidates, accepted) of all kinds with a count of their own, most candidates first."""
        return sorted(((kind, n, a) for kind, (n, a) in self.counts.items()), key=lambda row: (-row[1], row[0]))


class Survey:
    """The result of one pass over the decided rows.

    Attributes:
        bounds: bounds of scores, in the order in which they are checked.
        limits: bounds of measures that are not scores.
        histograms: by the names of `measures`.
        candidates: number of all candidates.
        captioned, accepted_bytes, accepted_pixels: counts and sums of accepted pictures.
        splits: accepted pictures by split.
        stages: rejected candidates by stage.
        codes: rejected candidates by (code, stage).
        deciding: candidates that a score refused, by (code, score).
        licences, sources, formats: candidates and accepted pictures by kind.
        examples: rows by code, "" for accepted pictures.
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
        """Number of pictures in the corpus."""
        return self.splits.total()

    def by_code(self) -> Counter[str]:
        """Rejected candidates by code."""
        counts: Counter[str] = Counter()
        for (code, _), count in self.codes.items():
            counts[code] += count
        return counts

    def choose_axes(self, values: Mapping[str, np.ndarray]) -> None:
        """Begin the missing histograms, with axes for values like these."""
        for name in [name for name in values if name not in self.histograms]:
            axis = choose_axis(values[name], {**self.limits, **self.bounds}.get(name))
            if axis is not None:
                self.histograms[name] = Histogram(axis)

    def add(self, table: pa.RecordBatch) -> None:
        """Count a batch of decided rows."""
        codes, stages, splits = (np.array(table.column(c).to_pylist(), object) for c in ("code", "stage", "split"))
        rejected = codes != ""
        accepted = ~rejected
        self.candidates += table.num_rows
        self.splits.update(splits[accepted].tolist())
        self.stages.update(stages[rejected].tolist())
        self.codes.update(zip(codes[rejected].tolist(), stages[rejected].tolist(), strict=True))
        values = measures(table)
        self.choose_axes(values)  # for a score without a value so far
        for name, histogram in self.histograms.items():
            if name in values:
                histogram.add(values[name], rejected)
        self._decide(values, codes, stages)
        self.accepted_bytes += int(np.nansum(values["bytes"][accepted]))
        self.accepted_pixels += int(np.nansum(values["width"][accepted] * values["height"][accepted]))
        self.captioned += int(
            (pc.not_equal(table.column("caption"), "").to_numpy(zero_copy_only=False) & accepted).sum()
        )
        self.licences.add((text or "not stated" for text in table.column("licence").to_pylist()), accepted)
        self.sources.add(map(origin, table.column("source").to_pylist()), accepted)
        self.formats.add((text or "not decoded" for text in table.column("ext").to_pylist()), accepted)
        hashes = np.array([example_hash(key) for key in table.column("key").to_pylist()], np.uint64)
        for code in np.unique(codes.astype(str)).tolist():
            size = REJECTED_EXAMPLES if code else ACCEPTED_EXAMPLES
            self.examples.setdefault(code, Reservoir(size=size)).offer(table, hashes, np.flatnonzero(codes == code))

    def _decide(self, values: Mapping[str, np.ndarray], codes: np.ndarray, stages: np.ndarray) -> None:
        """Count by score the candidates that a threshold refused.

        The score is the one that the code names, else the first whose bounds do not hold.
        """
        open_ = (codes != "") & np.isin(stages.astype(str), ("filter", "score"))
        for name in self.bounds:
            by_code = open_ & (codes == name)
            if by_code.any():
                self.deciding[name, name] += int(by_code.sum())
            open_ &= ~by_code
        for name, bounds in self.bounds.items():
            if not open_.any():
                break
            numbers = values.get(name, np.full(len(codes), np.nan))
            by_score = open_ & ~within(numbers, bounds)
            for code in codes[by_score].tolist():
                self.deciding[code, name] += 1
            open_ &= ~by_score
