"""Inputs that belong to a corpus' pictures: columns/lq holds the LQ file of every sample (decision 0004).

A corpus of pairs is curated like any other, by its targets; what its spec says under `pairs` then becomes a column of
kind picture. So filters, splits and shuffling know nothing of pairs, and a stream that wants them (pipelines.stream)
reads both sides of one sample and cuts them alike. Files are kept as they are, never encoded again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.corpora import CorpusSpec, PairSpec, SourceSpec
from components.images import Limits, decode
from components.types import Image, SampleError
from pipelines.columns import ColumnResult, Value, compute_column
from pipelines.console import Progress
from pipelines.errors import UsageError
from pipelines.rows import iter_lines
from pipelines.sources import Entry, iter_entries
from pipelines.sources.files import Skipped

COLUMN = "lq"
FEW = 1000  # pictures, ours: below, starting processes takes longer than the work


@dataclass(frozen=True, kw_only=True)
class Input:
    """The LQ file of a target.

    Attributes:
        path: of the file; "" where the target has none.
        scale: how many times longer the target's sides are.
    """

    path: str
    scale: int = 1


def has_pairs(spec: CorpusSpec) -> bool:
    """Whether a spec names inputs for its pictures, so that they can become a column."""
    return any(pair.hq and pair.lq and not pair.lq.startswith("<") for pair in spec.pairs)


def add_pairs(
    corpus_dir: Path, spec: CorpusSpec, *, workers: int = 4, progress: Progress | None = None
) -> ColumnResult:
    """Write the column of inputs of a curated corpus, or what is missing of it.

    Args:
        corpus_dir: curated by `spec`.
        spec: its pairs name the folders; a pair's hq is the path of one of its sources.
        workers: processes; few pictures are read in this one.

    Raises:
        UsageError: folders that do not belong together, or targets that cannot be told apart.
        Failure, RetryLater: see pipelines.columns.compute_column.
    """
    by_source: dict[str, list[tuple[Entry, Input]]] = {}
    said = hashlib.sha256()
    for pair in spec.pairs:
        if not pair.hq or pair.lq.startswith("<"):
            continue
        targets, inputs = _listed(_source_of(spec, pair)), _listed(SourceSpec(kind="folder", path=pair.lq))
        for target, found in zip(targets, matched(targets, inputs, pair), strict=True):
            input_ = Input(path=found.path if found else "", scale=pair.scale)
            by_source.setdefault(target.source, []).append((target, input_))
            said.update(json.dumps([target.source, pair.scale, *_stamp(found)]).encode())
    inputs_by_key = {
        row["key"]: _input_of(row, by_source.get(row["source"], []))
        for row in iter_lines(corpus_dir / "manifest.jsonl")
    }
    return compute_column(
        corpus_dir,
        COLUMN,
        "picture",
        {"name": "pairs", "digest": said.hexdigest()},
        functools.partial(PairReader, {key: found for key, found in inputs_by_key.items() if found}),
        workers=workers if len(inputs_by_key) > FEW else 0,
        overwrite=True,  # other files are another column, and the corpus has just been curated for them
        progress=progress,
    )


def matched(targets: Sequence[Entry], inputs: Sequence[Entry], pair: PairSpec) -> list[Entry | None]:
    """The input of each target: that of its own name, or, where no names are equal, that of its own place.

    Targets without an input get None where names decide; they are quarantined later on.

    Raises:
        UsageError: one folder for both sides; or no names are equal and their numbers differ.
    """
    if Path(pair.hq).resolve() == Path(pair.lq).resolve():
        raise UsageError(f"{pair.hq} is named as targets and as inputs of a pair: an input must be the poorer picture.")
    named = {entry.key: entry for entry in inputs}
    if any(entry.key in named for entry in targets):
        return [named.get(entry.key) for entry in targets]
    if len(targets) != len(inputs):
        raise UsageError(
            f"{pair.hq} holds {len(targets)} pictures and {pair.lq} {len(inputs)}, and no name stands in both: "
            "name each input like its target, or give as many of both in one order."
        )
    return list(inputs)


class PairReader:
    """A columns.Worker: the bytes of the file that belongs to each picture.

    Args:
        inputs: by key of the corpus.
    """

    def __init__(self, inputs: Mapping[str, Input]) -> None:
        self.inputs = inputs

    def __call__(self, images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
        return [self._read(image, key) for image, key in zip(images, keys, strict=True)]

    def _read(self, target: Image, key: str) -> bytes | SampleError:
        found = self.inputs.get(key)
        if found is None or not found.path:
            return SampleError("no_pair", "no input belongs to this picture", key)
        try:
            data = Path(found.path).read_bytes()
            # its own range is declared, or decode refuses it: floats could be of 0..1 or of -1..1, and nobody knows
            height, width = decode(data, Limits(), key).shape[:2]
        except OSError as error:
            return SampleError("unreadable", f"its input cannot be read: {error.strerror}", key)
        except SampleError as error:
            return SampleError(error.code, f"its input: {error.detail}", key)
        wanted = (height * found.scale, width * found.scale)
        if max(abs(a - b) for a, b in zip(wanted, target.shape[:2], strict=True)) >= found.scale:
            detail = f"its input has {width} x {height} pixels, it has {target.shape[1]} x {target.shape[0]}"
            return SampleError("pair_size", f"{detail}, and the pair's scale is {found.scale}", key)
        return data


def _source_of(spec: CorpusSpec, pair: PairSpec) -> SourceSpec:
    for source in spec.sources:
        if source.kind == "folder" and source.path == pair.hq:
            return source
    raise UsageError(f"{spec.name}: the targets of a pair ({pair.hq}) are no folder among its sources.")


def _listed(source: SourceSpec) -> list[Entry]:
    return [entry for entry in iter_entries(source, None, Skipped()) if entry.refused is None]


def _stamp(entry: Entry | None) -> tuple[str, int, int]:
    return (entry.key, entry.size, entry.mtime_ns) if entry else ("", 0, 0)


def _input_of(row: Mapping[str, str], listed: Sequence[tuple[Entry, Input]]) -> Input | None:
    """The input of a manifest row; several sources may have a file of one name, and the bytes then decide.

    Raises:
        UsageError: they are the same picture.
    """
    if len(listed) > 1:
        listed = [(e, i) for e, i in listed if hashlib.sha256(Path(e.path).read_bytes()).hexdigest() == row["sha256"]]
    if len({found.path for _, found in listed}) > 1:
        counted = Counter(entry.path for entry, _ in listed)
        raise UsageError(
            f"{row['source']} is one picture in {len(counted)} sources with an input in each: rename one of them."
        )
    return listed[0][1] if listed else None
