"""The endless training stream: which sample stands at which position, and the rows themselves, through Ray Data.

Everything here is a function of (corpus, seed, position): a checkpoint needs to hold one position, and any worker can
make any row. Nothing imports torch, so the Ray workers that decode and degrade stay small.

    row: key str, position int64, hq uint8 [S, S, 3], lq uint8 [S, S, 3], prompt str, sizes int64 [6], plan (JSON str),
         replaced str ("" or what was wrong with the sample first in line)
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from components.captions.tags import Tags
from components.degradations import build_degradation
from components.images import Limits, crop, decode, resize_short_side, to_float, to_uint8
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import Degradation, Image, SampleError
from pipelines.errors import Failure, UsageError, unknown
from pipelines.shards import Corpus, Split, open_corpus, read_sample

if TYPE_CHECKING:
    from ray.data import Dataset

RESERVE = 1 << 40
"""Positions from here on are reserves: attempt k at position p reads position p + k * RESERVE. No run gets that far."""

ATTEMPTS = 16  # samples tried for one position; a corpus as broken as this takes to fail should be curated again
DEAD_LEAVES = "dead_leaves"
CAPTIONERS = ("", "tags", "manifest")
STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, max_aspect=1e9, max_expansion=1e9)
"""Curation has already applied the corpus's own limits, which may be wider than the decoder's defaults."""

CACHE_BYTES = 64 << 20
"""Of resized pictures that each worker keeps. Ours: a small corpus fits whole, for a large one it costs little."""

Row = dict[str, Any]

_pictures: OrderedDict[tuple[Any, ...], tuple[Image, tuple[int, int]]] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """All that decides a row besides its position.

    Attributes:
        sources: corpus folders, or "dead_leaves", with their relative weights.
        seed: of order, crops, flips, and degradation.
        resolution: side S of the square rows, pixels.
        short_side: pictures are resized to this short side before cropping; 0 takes S.
        flip: mirror half of the rows.
        degradation: preset of components.degradations; "" leaves lq equal to hq.
        degradation_options: changes to the preset.
        captioner: "tags" (measured on the crop), "manifest" (the corpus's captions), or "" for none.
        split: which split of the corpora.
    """

    sources: Sequence[tuple[str, float]]
    seed: int
    resolution: int
    short_side: int = 0
    flip: bool = True
    degradation: str = ""
    degradation_options: Mapping[str, Any] = field(default_factory=dict)
    captioner: str = ""
    split: str = "train"

    def __post_init__(self) -> None:
        if not self.sources or any(weight <= 0 for _, weight in self.sources):
            raise UsageError(f"a stream needs sources with positive weights, got {list(self.sources)}.")
        if self.resolution < 16 or (self.short_side and self.short_side < self.resolution):
            raise UsageError(
                f"resolution must be at least 16 and short_side 0 or at least resolution, "
                f"got {self.resolution} and {self.short_side}."
            )
        if self.captioner not in CAPTIONERS:
            raise unknown("captioner", self.captioner, [name for name in CAPTIONERS if name])


def order(index: int | Split, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the sample numbers 0 .. n-1 for one epoch: int64 [n], read-only.

    Args:
        index: the split, or its number of samples.
        seed: of the run.
        epoch: position // n.
    """
    return _order(index if isinstance(index, int) else len(index), seed, epoch)


@lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    if n < 1:
        raise Failure("there is no sample to put in order: the split is empty.")
    # Sorting raw Philox words: numpy promises those bits for all versions, and not those of Generator.permutation.
    words = generator(seed, "order", epoch).bit_generator.random_raw(n)
    permutation = np.argsort(words, kind="stable")
    permutation.setflags(write=False)
    return permutation


def position_to_sample(index: int | Split, seed: int, position: int) -> int:
    """Sample number at a position: order(index, seed, position // n)[position % n]."""
    n = index if isinstance(index, int) else len(index)
    if n < 1:
        raise Failure("there is no sample at any position: the split is empty.")
    return int(order(n, seed, position // n)[position % n])


def source_of(config: StreamConfig, position: int) -> str:
    """Corpus folder or "dead_leaves" at a position, drawn by weight; the same one for all reserves of the position."""
    if len(config.sources) == 1:
        return config.sources[0][0]
    weights = np.cumsum([weight for _, weight in config.sources])
    draw = generator(config.seed, position, "source").random() * weights[-1]
    return config.sources[min(int(np.searchsorted(weights, draw, side="right")), len(weights) - 1)][0]


def load_row(config: StreamConfig, position: int) -> Row:
    """The row at a position: a pure function of its arguments and the corpus.

    Raises:
        Failure: ATTEMPTS samples in turn could not be used.
    """
    source = source_of(config, position)
    if source == DEAD_LEAVES:
        picture = dead_leaves(config.resolution, config.seed, position)
        return _row(
            config, position, f"dead-leaves-{config.seed}-{position}", picture, picture.shape[:2], (0, 0), "", ""
        )
    split = _corpus(source).split(config.split)
    candidates = (position_to_sample(split, config.seed, position + RESERVE * k) for k in range(ATTEMPTS))
    return _first_usable(config, position, source, candidates)


def heldout_rows(config: StreamConfig, count: int) -> list[Row]:
    """Fixed rows of the held-out split, the same every time: its pictures in turn, at positions 0..count-1.

    Of several sources the first corpus that holds pictures out counts. Crops and degradation follow (seed, position).

    Raises:
        Failure: no source holds any picture out.
    """
    for source, _ in config.sources:
        splits = _corpus(source).splits if source != DEAD_LEAVES else {}
        n = len(splits["held_out"]) if "held_out" in splits else 0
        if n:
            fixed = replace(config, split="held_out", sources=((source, 1.0),), flip=False)
            return [
                _first_usable(fixed, p, source, ((p + k) % n for k in range(min(n, ATTEMPTS)))) for p in range(count)
            ]
    raise Failure(f"none of {', '.join(name for name, _ in config.sources)} holds any picture out.")


def rank_positions(start: int, stop: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Positions that one rank works on, int64, in order: its contiguous part of each global batch.

    Args:
        start, stop: the stretch of the stream; a whole number of global batches.
        batch_size: of the global batch; a multiple of `world`.
        rank, world: this worker and how many there are.

    Raises:
        ValueError: the numbers do not divide.
    """
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ValueError(f"a global batch of {batch_size} cannot be shared by {world} workers (rank {rank})")
    if stop <= start or (stop - start) % batch_size:
        raise ValueError(f"positions {start}..{stop} are no whole number of global batches of {batch_size}")
    return _rank_position(np.arange((stop - start) // world), start, batch_size, rank, world)


def _rank_position(local: np.ndarray, start: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Positions of a rank's local row numbers."""
    share = batch_size // world
    return start + local // share * batch_size + rank * share + local % share


class Pause:
    """Execution callback that lets Ray Data's scheduling loop rest between its steps.

    Finished blocks that wait for a slower consumer keep the loop's own wait from blocking, so that it took nine tenths
    of a core while nothing was to be done; a trainer's stream is nearly always in that state.
    """

    SECONDS = 0.005  # ours: 200 steps a second, each of which hands on all blocks that are ready

    def on_execution_step(self, executor: object) -> None:
        time.sleep(self.SECONDS)

    def before_execution_starts(self, executor: object) -> None:
        """Nothing to do; Ray Data calls all four."""

    def after_execution_succeeds(self, executor: object) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Nothing to do."""


def rank_dataset(
    config: StreamConfig,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    task_cpus: float = 1.0,
    tasks: int = 2,
) -> Dataset:
    """One rank's rows in order, made lazily by Ray Data tasks while they are consumed.

    Iterate with `iter_batches(batch_size=batch_size // world, prefetch_batches=...)`.

    Args:
        config: what the rows are.
        start, stop, batch_size, rank, world: see `rank_positions`.
        task_cpus: logical CPUs of each task; trainers must leave that much free.
        tasks: tasks at a time. Bounds the memory too, with the blocks that wait for their turn.
    """
    import ray
    from ray.data import ExecutionResources, TaskPoolStrategy

    count = len(rank_positions(start, stop, batch_size, rank, world))
    for source, _ in config.sources:  # die here, on the driver, rather than in the first task
        if source != DEAD_LEAVES and not len(_corpus(source).split(config.split)):
            raise Failure(f"split {config.split} of {source} is empty.")
    absolute = tuple((s if s == DEAD_LEAVES else str(Path(s).absolute()), weight) for s, weight in config.sources)
    config = replace(config, sources=absolute)  # a worker's current folder may be another one
    row_bytes = 2 * 3 * config.resolution**2 + 1024
    # Tasks of 8 rows spend most of their time being scheduled (measured: 32 rows give three times the rate), and a long
    # run must not plan a million tasks on the driver before it starts.
    rows_per_task = max(32, -(-count // 1024))
    blocks = -(-count // rows_per_task)
    dataset = ray.data.range(count, override_num_blocks=blocks)
    work: Any = _load_batch
    pause: Any = Pause
    arguments = {"config": config, "start": start, "global_batch": batch_size, "rank": rank, "world": world}
    dataset = dataset.map_batches(
        work, batch_size=8, fn_kwargs=arguments, num_cpus=task_cpus, compute=TaskPoolStrategy(size=min(tasks, blocks))
    )
    context = dataset.context
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, pause]
    context.target_max_block_size = 16 * row_bytes  # a task with many rows hands them out 16 at a time
    context.execution_options.resource_limits = ExecutionResources(
        object_store_memory=float(max(64 << 20, 512 * row_bytes))
    )
    return dataset


def _load_batch(
    batch: Mapping[str, np.ndarray], config: StreamConfig, start: int, global_batch: int, rank: int, world: int
) -> dict[str, np.ndarray]:
    """Ray Data batch {"id": local row numbers} -> columns of rows."""
    cv2.setNumThreads(1)  # a task has one core; OpenCV would take them all
    rows = [load_row(config, int(p)) for p in _rank_position(batch["id"], start, global_batch, rank, world)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    stacked = ("hq", "lq", "sizes", "position")
    return {k: np.stack(v) if k in stacked else np.array(v, dtype=object) for k, v in columns.items()}


def _first_usable(config: StreamConfig, position: int, source: str, candidates: Any) -> Row:
    """The row of the first candidate sample number that can be decoded; what came before it is recorded."""
    corpus, failures = _corpus(source), []
    for sample in candidates:
        _, entry = corpus.split(config.split).locate(sample)
        try:
            resized, original = _picture(corpus, config, sample, entry["key"])
        except SampleError as error:
            failures.append(f"[{error.code}] {entry['key']}: {error.detail}")
            continue
        caption = corpus.manifest[entry["key"]].get("caption", "") if config.captioner == "manifest" else ""
        corner, cut = _cut(config, position, resized)
        return _row(config, position, entry["key"], cut, original, corner, caption, "; ".join(failures))
    raise Failure(f"position {position}: {len(failures)} samples in turn are broken, the last one {failures[-1]}.")


def _picture(corpus: Corpus, config: StreamConfig, sample: int, key: str) -> tuple[Image, tuple[int, int]]:
    """A sample resized to the short side, uint8 and read-only, and its original (height, width).

    Decoding and resizing a photograph costs four times what all else about a small row does, so what fits stays.
    """
    short_side = config.short_side or config.resolution
    name = (str(corpus.folder), corpus.digest, config.split, sample, short_side)
    if name in _pictures:
        _pictures.move_to_end(name)
        return _pictures[name]
    picture = decode(read_sample(corpus, config.split, sample), STORED_LIMITS, key)
    resized = resize_short_side(picture, short_side)
    resized.setflags(write=False)
    _pictures[name] = resized, (picture.shape[0], picture.shape[1])
    while len(_pictures) > 1 and sum(kept.nbytes for kept, _ in _pictures.values()) > CACHE_BYTES:
        _pictures.popitem(last=False)
    return _pictures[name]


def _cut(config: StreamConfig, position: int, picture: Image) -> tuple[tuple[int, int], Image]:
    """Random square of the row's size and its (top, left), possibly mirrored."""
    side, draw = config.resolution, generator(config.seed, position, "crop")
    top = int(draw.integers(0, picture.shape[0] - side + 1))
    left = int(draw.integers(0, picture.shape[1] - side + 1))
    square = crop(picture, top, left, side, side)
    if config.flip and generator(config.seed, position, "flip").random() < 0.5:
        square = np.ascontiguousarray(square[:, ::-1])
    return (top, left), square


def _row(
    config: StreamConfig,
    position: int,
    key: str,
    hq: Image,
    original: tuple[int, ...],
    corner: tuple[int, int],
    caption: str,
    replaced: str,
) -> Row:
    """Degrade, caption, and put the fields together."""
    lq, plan = hq, {}
    if config.degradation:
        degradation = _degradation(config.degradation, json.dumps(dict(config.degradation_options), sort_keys=True))
        plan, clean = dict(degradation.draw(config.seed, key, position)), to_float(hq)
        try:
            lq, hq = to_uint8(degradation.apply(clean, plan)), to_uint8(degradation.target(clean))
        except SampleError as error:  # a degradation knows no names
            raise SampleError(error.code, error.detail, key) from error
    if config.captioner == "tags":
        caption = Tags().caption([hq])[0]
    return {
        "key": key,
        "position": np.int64(position),
        "hq": hq,
        "lq": lq,
        "prompt": caption,
        # SDXL's size ids: original height and width, crop top and left, target height and width
        "sizes": np.array([*original, *corner, config.resolution, config.resolution], dtype=np.int64),
        "plan": json.dumps(plan, sort_keys=True),
        "replaced": replaced,
    }


@lru_cache(maxsize=16)
def _degradation(preset: str, options: str) -> Degradation:
    return build_degradation(preset, **json.loads(options))


def _corpus(folder: str) -> Corpus:
    """An opened corpus, cached for as long as its index file stays the same."""
    path = Path(folder) / "index.json"
    return _opened(folder, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=8)
def _opened(folder: str, mtime_ns: int) -> Corpus:
    return open_corpus(folder)
