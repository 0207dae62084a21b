"""Inputs of a corpus of pairs: columns/lq holds the LQ file of every sample (decision 0004).

A corpus of pairs is curated by its targets, like any other. The inputs under `pairs` of its spec then become a column
of kind picture. So filters, splits and shuffling need no code for pairs. A stream of pairs (stream/rows.py) reads both
sides of a sample and crops them alike. Files are stored as they are, never encoded again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from components.corpora import CorpusSpec, PairSpec, SourceSpec
from components.images import Limits, decode
from components.types import Image, SampleError
from pipelines.core.console import Progress
from pipelines.core.errors import UsageError
from pipelines.core.pairing import NoPairs, pair_names
from pipelines.core.pool import Pool
from pipelines.core.rows import iter_lines
from pipelines.corpus.columns.computing import ColumnResult, compute_column
from pipelines.corpus.columns.spec import ColumnSpec, Value
from pipelines.curation.sources import Entry, iter_entries
from pipelines.curation.sources.files import SkippedFiles

COLUMN = "lq"
FEW = 1000  # pictures, ours: for fewer, starting processes takes longer than the work


@dataclass(frozen=True, kw_only=True)
class Input:
    """The LQ file of a target.

    Attributes:
        path: path of the file; "" where the target has none.
        scale: ratio of the target's sides to the input's.
    """

    path: str
    scale: int = 1


def has_pairs(spec: CorpusSpec) -> bool:
    """Whether a spec names inputs for its pictures, which can become a column."""
    return any(pair.hq and pair.lq and not pair.lq.startswith("<") for pair in spec.pairs)


def add_pairs(
    corpus_dir: Path, spec: CorpusSpec, *, workers: int = 4, progress: Progress | None = None
) -> ColumnResult:
    """Write the column of inputs of a curated corpus, or what is missing of it.

    Args:
        corpus_dir: curated by `spec`.
        spec: its pairs name the folders; the hq of a pair is the path of one of the sources.
        workers: processes; few pictures are read in this one.

    Raises:
        UsageError: the folders do not belong together, or several targets have one name and the same bytes.
        Failure, RetryLater: see compute_column.
    """
    by_source: dict[str, list[tuple[Entry, Input]]] = {}
    unused: list[str] = []
    digest = hashlib.sha256()
    for pair in spec.pairs:
        if not pair.hq or pair.lq.startswith("<"):
            continue
        targets, inputs = _entries_of(_source_of(spec, pair)), _entries_of(SourceSpec(kind="folder", path=pair.lq))
        matches = match_inputs(targets, inputs, pair)
        used = {entry.path for entry in matches if entry}
        unused += [entry.source.partition(":")[2] for entry in inputs if entry.path not in used]
        for target, entry in zip(targets, matches, strict=True):
            input_ = Input(path=entry.path if entry else "", scale=pair.scale)
            by_source.setdefault(target.source, []).append((target, input_))
            digest.update(json.dumps([target.source, pair.scale, *_stamp(entry)]).encode())
    inputs_by_key = {
        row["key"]: _input_of(row, by_source.get(row["source"], []))
        for row in iter_lines(corpus_dir / "manifest.jsonl")
    }
    column = ColumnSpec(
        name=COLUMN,
        kind="picture",
        producer={"name": "pairs", "digest": digest.hexdigest()},
        factory=functools.partial(
            PairReader,
            {key: input_ for key, input_ in inputs_by_key.items() if input_},
            replace(spec.filters.limits(), min_side_px=1, max_aspect=math.inf),  # an input may be small
            f"; {len(unused)} inputs belong to none, the first is {unused[0]}" if unused else "",
        ),
    )
    pool = Pool(workers=workers if len(inputs_by_key) > FEW else 0)
    # other files are another column, and the corpus has just been curated for them: overwrite
    return compute_column(corpus_dir, column, pool, overwrite=True, progress=progress)


def match_inputs(targets: Sequence[Entry], inputs: Sequence[Entry], pair: PairSpec) -> list[Entry | None]:
    """The input of each target, by their names: see pipelines.core.pairing. A target without an input gets None.

    Raises:
        UsageError: both sides are one folder, or a side is empty, or the names do not belong together.
    """
    if Path(pair.hq).resolve() == Path(pair.lq).resolve():
        raise UsageError(
            f"{pair.hq} holds both the targets and the inputs of a pair: the inputs need a folder of their own."
        )
    for inner, outer in itertools.permutations((pair.hq, pair.lq)):
        if Path(inner).resolve().is_relative_to(Path(outer).resolve()):
            raise UsageError(
                f"{inner} lies in {outer}, so its pictures belong to both sides of the pairs: move one of them."
            )
    for folder, entries in ((pair.hq, targets), (pair.lq, inputs)):
        if not entries:
            raise UsageError(f"{folder} holds no picture for a pair.")
    names = [[entry.source.partition(":")[2] for entry in entries] for entries in (targets, inputs)]
    try:
        numbers = pair_names(names[0], names[1], pair.hq_name, pair.lq_name)
    except NoPairs as error:
        raise UsageError(
            f"{pair.hq} and {pair.lq}: {error}. Name each input like its target, or say how they are named: "
            "pairs.0.lq_name='{}x2'."
        ) from error
    return [None if number is None else inputs[number] for number in numbers]


class PairReader:
    """A worker of the column: the bytes of the input file of each picture.

    Args:
        inputs: input by key of the corpus.
        limits: larger inputs are refused.
        unused: words on the inputs without a target; "" for none.
    """

    def __init__(self, inputs: Mapping[str, Input], limits: Limits, unused: str = "") -> None:
        self.inputs, self.limits, self.unused = inputs, limits, unused

    def __call__(self, images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
        return [self._read(image, key) for image, key in zip(images, keys, strict=True)]

    def _read(self, target: Image, key: str) -> bytes | SampleError:
        input_ = self.inputs.get(key)
        if input_ is None or not input_.path:
            return SampleError("no_pair", f"no input belongs to this picture{self.unused}", key)
        try:
            data = Path(input_.path).read_bytes()
            # decode refuses a picture without a declared range: its floats could lie in 0..1 or in -1..1
            height, width = decode(data, self.limits, key).shape[:2]
        except OSError as error:
            return SampleError("unreadable", f"its input cannot be read: {error.strerror}", key)
        except SampleError as error:
            return SampleError(error.code, f"its input: {error.detail}", key)
        expected = (height * input_.scale, width * input_.scale)
        if max(abs(a - b) for a, b in zip(expected, target.shape[:2], strict=True)) >= input_.scale:
            detail = f"its input has {width} x {height} pixels, it has {target.shape[1]} x {target.shape[0]}"
            return SampleError("pair_size", f"{detail}, and the pair's scale is {input_.scale}", key)
        return data


def _source_of(spec: CorpusSpec, pair: PairSpec) -> SourceSpec:
    for source in spec.sources:
        if source.kind == "folder" and source.path == pair.hq:
            return source
    raise UsageError(f"{spec.name}: the targets of a pair ({pair.hq}) are not the path of a folder source.")


def _entries_of(source: SourceSpec) -> list[Entry]:
    return [entry for entry in iter_entries(source, None, SkippedFiles()) if entry.refused is None]


def _stamp(entry: Entry | None) -> tuple[str, int, int]:
    return (entry.key, entry.size, entry.mtime_ns) if entry else ("", 0, 0)


def _input_of(row: Mapping[str, str], pairs: Sequence[tuple[Entry, Input]]) -> Input | None:
    """The input of a manifest row. Several sources may have a file of this name; then the bytes decide.

    Raises:
        UsageError: several of these files hold the same picture.
    """
    if len(pairs) > 1:
        pairs = [(e, i) for e, i in pairs if hashlib.sha256(Path(e.path).read_bytes()).hexdigest() == row["sha256"]]
    if len({input_.path for _, input_ in pairs}) > 1:
        sources = Counter(entry.path for entry, _ in pairs)
        raise UsageError(
            f"{row['source']} is one picture in {len(sources)} sources with an input in each: rename one of them."
        )
    return pairs[0][1] if pairs else None
