"""The endless training stream: the rows at its positions, one by one or as columns.

Everything here is a function of (corpus, seed, position): a checkpoint needs to hold one position, and any worker can
make any row. Nothing imports torch, so the Ray workers that decode and degrade stay small. Which sample stands at a
position is in ordering.py, how the rows reach a trainer in feed.py.

    row: key str, position int64, hq uint8 [h, w, 3], lq uint8 [h, w, 3], prompt str, sizes int64 [6], plan (JSON str),
         replaced str ("" or what was wrong with the samples first in line)

h x w is the resolution squared, or the bucket of the row's global batch. Where the device degrades there is no lq: hq
is the clean picture, and `components.tensors.collate` makes lq and target. Columns of a block leave lq out as well
where nothing degrades, since it would be hq once more.

Exactly once holds for the samples that can be read. One that cannot is recorded in the row that stands in for it; what
stands in comes from the orders of later epochs (RESERVE), so that it is seen once more than its own turn.
"""

from __future__ import annotations

import json
import os
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import FileIO
from itertools import chain
from mmap import mmap
from typing import Any

import cv2
import numpy as np

from components.captions.tags import Tags
from components.degradations import build_degradation
from components.degradations.plans import make_plan
from components.images import Limits, decode, resize_short_side, to_float, to_uint8
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import Degradation, Image, Plan, SampleError
from pipelines.errors import Failure, UsageError, unknown
from pipelines.ordering import BLOCK, WINDOW_SAMPLES, Mixture, Order
from pipelines.shards import Corpus, Split, open_corpus

RESERVE = 1 << 40
"""Positions from here on are reserves: attempt k at position p reads position p + k * RESERVE. No run gets that far."""

ATTEMPTS = 16  # samples tried for one position; a corpus as broken as this takes to fail should be curated again
DEAD_LEAVES = "dead_leaves"
CAPTIONERS = ("manifest", "tags", "column:NAME")
COLUMN = "column:"
SMALL, DEVICES = ("enlarge", "refuse"), ("stream", "device")
STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, max_aspect=1e9, max_expansion=1e9)
"""Curation has already applied the corpus's own limits, which may be wider than the decoder's defaults."""

CACHE_BYTES = 64 << 20
"""Of resized pictures that each worker keeps, if the whole split fits. Ours: photographs of a demo, not a corpus."""

Row = dict[str, Any]
Place = tuple[str, int, int]
"""Source, the source's own position, and the sample number there (-1 for what is drawn instead of read)."""

SPARE_BLOCKS = 4  # hq and lq of the block at work and of the one that is handed on

_spare: list[mmap] = []
_pictures: OrderedDict[tuple[Any, ...], tuple[Image, tuple[int, int]]] = OrderedDict()


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """All that decides a row besides its position.

    Attributes:
        sources: corpus folders, or "dead_leaves", with their relative weights.
        seed: of order, crops, flips, and degradation.
        resolution: side S of the square rows, pixels.
        short_side: pictures are resized to this short side before cropping; 0 takes S.
        scale: smallest and largest factor on the short side, drawn for each row; (1, 1) draws none.
        small: what happens to a picture that would have to be enlarged: "enlarge" it, or "refuse" it, so that another
            stands in; with a scale it is the smallest factor that decides, and none enlarges.
        buckets: (height, width) of rows instead of S x S. A global batch has one of them, drawn evenly by its number;
            pictures are resized to cover it, with the margin that short_side has over S.
        batch_size: of the global batch; only buckets need it.
        flip: mirror half of the rows.
        degradation: preset of components.degradations; "" leaves lq equal to hq.
        degradation_options: changes to the preset.
        degrade_on: "stream" (in the data workers) or "device" (in collate, by the batched back end).
        captioner: "tags" (measured on the crop), "manifest" (the corpus's captions), "column:NAME" (a text column of
            the corpus; "" where it holds none), or "" for none.
        split: which split of the corpora.
        window_samples: samples that are shuffled together, see ordering.Order.
    """

    sources: Sequence[tuple[str, float]]
    seed: int
    resolution: int
    short_side: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    small: str = "enlarge"
    buckets: Sequence[tuple[int, int]] = ()
    batch_size: int = 0
    flip: bool = True
    degradation: str = ""
    degradation_options: Mapping[str, Any] = field(default_factory=dict)
    degrade_on: str = "stream"
    captioner: str = ""
    split: str = "train"
    window_samples: int = WINDOW_SAMPLES

    def __post_init__(self) -> None:
        if not 1 <= len(self.sources) <= BLOCK or any(weight <= 0 for _, weight in self.sources):
            raise UsageError(f"a stream needs 1 to {BLOCK} sources with positive weights, got {list(self.sources)}.")
        if self.resolution < 16 or (self.short_side and self.short_side < self.resolution):
            raise UsageError(
                f"resolution must be at least 16 and short_side 0 or at least resolution, "
                f"got {self.resolution} and {self.short_side}."
            )
        low, high = self.scale
        if not 0 < low <= high or round((self.short_side or self.resolution) * low) < self.resolution:
            raise UsageError(
                f"scale must be two rising factors that leave short_side ({self.short_side or self.resolution}) at "
                f"least resolution ({self.resolution}), got {list(self.scale)}."
            )
        if any(len(bucket) != 2 or min(bucket) < 16 for bucket in self.buckets):
            raise UsageError(f"buckets must be [height, width] of at least 16 pixels, got {list(self.buckets)}.")
        if self.buckets and self.batch_size < 1:
            raise UsageError("buckets need the batch_size whose batches share them.")
        if self.window_samples < 1:
            raise UsageError(f"window_samples must be at least 1, got {self.window_samples}.")
        for name, value, known in (("small", self.small, SMALL), ("degrade_on", self.degrade_on, DEVICES)):
            if value not in known:
                raise unknown(name, value, known)
        if self.captioner not in ("", *CAPTIONERS[:2]) and not self.captioner.startswith(COLUMN):
            raise unknown("captioner", self.captioner, CAPTIONERS)

    @property
    def degrades(self) -> bool:
        """Whether rows carry an lq that differs from hq."""
        return bool(self.degradation) and self.degrade_on == "stream"


def size_at(config: StreamConfig, position: int) -> tuple[int, int]:
    """(height, width) of the row at a position: the same for all of a global batch."""
    if not config.buckets:
        return config.resolution, config.resolution
    draw = generator(config.seed, "bucket", position // config.batch_size)
    height, width = config.buckets[int(draw.integers(0, len(config.buckets)))]
    return height, width


def source_of(config: StreamConfig, position: int) -> tuple[str, int]:
    """Corpus folder or "dead_leaves" at a position, and the source's own position there."""
    number, own = _mixture(tuple(weight for _, weight in config.sources), config.seed).at(position)
    return config.sources[number][0], own


def load_row(config: StreamConfig, position: int) -> Row:
    """The row at a position: a pure function of its arguments and the corpus.

    Raises:
        Failure: ATTEMPTS samples in turn could not be used.
    """
    row = _load(config, position, _places(config, [position])[0])
    return row | {name: np.ascontiguousarray(row[name]) for name in ("hq", "lq") if name in row}


def load_columns(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Rows of one size as columns: pixels stacked, texts as objects. Samples are read in the order in which they lie.

    Raises:
        Failure: see load_row.
    """
    height, width = size_at(config, int(positions[0]))
    pixels = {
        name: _lasting((len(positions), height, width, 3)) for name in (("hq", "lq") if config.degrades else ("hq",))
    }
    texts = {name: np.empty(len(positions), object) for name in ("key", "prompt", "plan", "replaced")}
    sizes = np.empty((len(positions), 6), np.int64)
    places = _places(config, positions)
    for n in sorted(range(len(places)), key=lambda n: places[n][::2]):
        row = _load(config, int(positions[n]), places[n])
        for columns in (pixels, texts):
            for name, column in columns.items():
                column[n] = row[name]
        sizes[n] = row["sizes"]
    return {**texts, **pixels, "sizes": sizes, "position": np.array(positions, np.int64)}


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


def target_plan(config: StreamConfig) -> Plan | None:
    """What a device has to do to hq for the training target; None where hq is the target already."""
    if not config.degradation or config.degrade_on == "stream":
        return None
    degradation: Any = _degradation(config.degradation, _options(config))
    if not getattr(degradation, "sharpen_target", False):
        return None
    return make_plan([{"op": "sharpen", "quick": degradation.quick_sharpen}])


def check_stream(config: StreamConfig) -> None:
    """Find on the driver what would else end the first task.

    Raises:
        UsageError: a source is no corpus, or lacks the column of captions.
        Failure: a source's split is empty.
    """
    for source, _ in config.sources:
        if source == DEAD_LEAVES:
            continue
        if not len(_corpus(source).split(config.split)):
            raise Failure(f"split {config.split} of {source} is empty.")
        if config.captioner.startswith(COLUMN):
            column = _column(source, config.captioner)
            if column.kind != "text":
                raise UsageError(f"captioner {config.captioner}: column {column.name} of {source} holds no text.")


# --- one row ----------------------------------------------------------------------------------------------------------


class _Shard:
    """A shard of a corpus, open for ranged reads: what Split.locate and read_located do, at a fifth of the cost."""

    def __init__(self, split: Split, number: int) -> None:
        batch = split.batch(number)
        self.path, self.start = split.folder / split.shards[number]["name"], split.starts[number]
        self.split_samples = len(split)
        self.keys, self.captions = batch.column("key"), batch.column("caption")
        self.offsets, self.sizes = batch.column("offset").to_numpy(), batch.column("size").to_numpy()
        self._file: FileIO | None = None

    def read(self, row: int, key: str) -> bytes:
        """Picture bytes of a row; SampleError as read_sample."""
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - open for as long as the shard is kept
            data = os.pread(self._file.fileno(), self.sizes[row], self.offsets[row])
        except OSError as error:
            raise SampleError("missing_shard", f"{self.path} cannot be read: {error.strerror}", key) from error
        if len(data) != self.sizes[row]:
            raise SampleError("truncated", f"{self.path} ends before the sample does", key)
        return data


def _lasting(shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array like np.empty's; its memory is kept for the next one once nothing refers to it any more.

    Blocks of megabytes else come from the system and go back to it each time: page faults took a tenth of the time.
    """
    size = int(np.prod(shape))
    fits = [place for place, memory in enumerate(_spare) if size <= len(memory) <= 2 * size]
    memory = _spare.pop(fits[0]) if fits else mmap(-1, size)
    array = np.frombuffer(memory, np.uint8, size)  # what is cut from it refers to this array, not to the memory
    weakref.finalize(array, _keep, memory)
    return array.reshape(shape)


def _keep(memory: mmap) -> None:
    _spare.append(memory)
    del _spare[:-SPARE_BLOCKS]


def _places(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> list[Place]:
    """What stands at positions, if it can be read."""
    drawn = [source_of(config, int(position)) for position in positions]
    samples = np.full(len(drawn), -1)
    for source in {source for source, _ in drawn} - {DEAD_LEAVES}:
        rows = [n for n, (name, _) in enumerate(drawn) if name == source]
        samples[rows] = _order(source, config).samples([drawn[n][1] for n in rows])
    return [(source, own, sample) for (source, own), sample in zip(drawn, samples.tolist(), strict=True)]


def _load(config: StreamConfig, position: int, place: Place) -> Row:
    """load_row; pixels may be read-only views into larger arrays."""
    source, own, sample = place
    if source == DEAD_LEAVES:
        height, width = size_at(config, position)
        picture = dead_leaves(max(height, width), config.seed, position)
        name = f"dead-leaves-{config.seed}-{position}"
        return _row(config, position, name, picture[:height, :width], picture.shape[:2], (0, 0), "", "")
    reserves = (int(_order(source, config).samples([own + RESERVE * k])[0]) for k in range(1, ATTEMPTS))
    return _first_usable(config, position, source, chain([sample], reserves))


def _first_usable(config: StreamConfig, position: int, source: str, candidates: Iterable[int]) -> Row:
    """The row of the first candidate sample number that can be used; what came before it is recorded."""
    failures: list[str] = []
    for sample in candidates:
        shard = _shard_of(source, config.split, sample)
        number = sample - shard.start
        key = shard.keys[number].as_py()
        try:
            resized, original = _picture(config, shard, number, key, position)
        except SampleError as error:
            failures.append(f"[{error.code}] {key}: {error.detail}")
            continue
        caption = shard.captions[number].as_py() if config.captioner == "manifest" else ""
        if config.captioner.startswith(COLUMN):
            caption = str(_column(source, config.captioner).value(config.split, sample) or "")
        corner, cut = _cut(config, position, resized)
        return _row(config, position, key, cut, original, corner, caption, "; ".join(failures))
    raise Failure(f"position {position}: {len(failures)} samples in turn are broken, the last one {failures[-1]}.")


def _picture(
    config: StreamConfig, shard: _Shard, number: int, key: str, position: int
) -> tuple[Image, tuple[int, int]]:
    """A sample resized as its row needs it, uint8 and perhaps read-only, and its original (height, width).

    Decoding and resizing a photograph costs four times what all else about a small row does, so a small split stays.
    """
    margin = config.short_side or config.resolution
    pixels = shard.split_samples * max(1, len(config.buckets)) * margin**2
    fits = 3 * pixels <= CACHE_BYTES and config.scale == (1.0, 1.0)
    name = (shard.path, number, size_at(config, position), margin, config.resolution, config.small) if fits else ()
    if name in _pictures:
        _pictures.move_to_end(name)
        return _pictures[name]
    picture = decode(shard.read(number, key), STORED_LIMITS, key)
    original = picture.shape[0], picture.shape[1]
    resized = resize_short_side(picture, short_side_px(config, original, position))
    if fits:
        resized.setflags(write=False)
        _pictures[name] = resized, original
        while sum(kept.nbytes for kept, _ in _pictures.values()) > CACHE_BYTES:
            _pictures.popitem(last=False)
    return resized, original


def short_side_px(config: StreamConfig, original: tuple[int, int], position: int) -> int:
    """Short side to which a picture of (height, width) is resized for a position.

    Raises:
        SampleError: "too_small": it would have to be enlarged, and the stream refuses that.
    """
    short, margin = min(original), config.short_side or config.resolution
    # In whole numbers: a square row gets exactly short_side.
    sides = list(zip(size_at(config, position), original, strict=True))
    covers = max(-(-need * short // have) for need, have in sides)
    wanted = max(-(-need * short * margin // (have * config.resolution)) for need, have in sides)
    low, high = config.scale
    least = max(covers, round(wanted * low))
    if config.small == "refuse" and short < least:
        raise SampleError("too_small", f"{original[1]} x {original[0]}: the short side is below {least} pixels")
    if low < high:
        wanted = round(wanted * (low + (high - low) * generator(config.seed, position, "scale").random()))
    px = max(least, round(wanted * low) if low == high else wanted)
    return min(px, short) if config.small == "refuse" else px


def _cut(config: StreamConfig, position: int, picture: Image) -> tuple[tuple[int, int], Image]:
    """Random part of the row's size and its (top, left), possibly mirrored."""
    (height, width), draw = size_at(config, position), generator(config.seed, position, "crop")
    top = int(draw.integers(0, picture.shape[0] - height + 1))
    left = int(draw.integers(0, picture.shape[1] - width + 1))
    part = picture[top : top + height, left : left + width]
    if config.flip and generator(config.seed, position, "flip").random() < 0.5:
        part = cv2.flip(part, 1)
    return (top, left), part


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
    lq: Image | None = hq
    plan: Mapping[str, Any] = {}
    if config.degradation:
        degradation = _degradation(config.degradation, _options(config))
        plan, lq = degradation.draw(config.seed, key, position), None
        if config.degrades:
            clean = to_float(hq)
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
        **({} if lq is None else {"lq": lq}),
        "prompt": caption,
        # SDXL's size ids: original height and width, crop top and left, target height and width
        "sizes": np.array([*original, *corner, *hq.shape[:2]], dtype=np.int64),
        "plan": json.dumps(plan, sort_keys=True) if plan else "{}",
        "replaced": replaced,
    }


def _options(config: StreamConfig) -> str:
    return json.dumps(dict(config.degradation_options), sort_keys=True)


@lru_cache(maxsize=16)
def _degradation(preset: str, options: str) -> Degradation:
    return build_degradation(preset, **json.loads(options))


@lru_cache(maxsize=16)
def _mixture(weights: tuple[float, ...], seed: int) -> Mixture:
    return Mixture(weights, seed)


def _order(folder: str, config: StreamConfig) -> Order:
    return _ordered(folder, _mtime_ns(folder), config.split, config.seed, config.window_samples)


@lru_cache(maxsize=16)
def _ordered(folder: str, mtime_ns: int, split: str, seed: int, window: int) -> Order:
    return Order(_opened(folder, mtime_ns).split(split).starts, seed, window)


def _corpus(folder: str) -> Corpus:
    """An opened corpus, cached for as long as its index file stays the same."""
    return _opened(folder, _mtime_ns(folder))


def _mtime_ns(folder: str) -> int:
    try:
        return os.stat(f"{folder}/index.json").st_mtime_ns
    except OSError:
        return 0


def _shard_of(folder: str, split: str, sample: int) -> _Shard:
    """The shard that holds a sample number."""
    mtime_ns = _mtime_ns(folder)
    number = bisect_right(_opened(folder, mtime_ns).split(split).starts, sample) - 1
    return _shard(folder, mtime_ns, split, number)


@lru_cache(maxsize=256)
def _shard(folder: str, mtime_ns: int, split: str, number: int) -> _Shard:
    return _Shard(_opened(folder, mtime_ns).split(split), number)


@lru_cache(maxsize=16)
def _opened(folder: str, mtime_ns: int) -> Corpus:
    return open_corpus(folder)


def _column(folder: str, captioner: str) -> Any:
    """The column of captions of a corpus."""
    return _opened_column(folder, _mtime_ns(folder), captioner.removeprefix(COLUMN))


@lru_cache(maxsize=16)
def _opened_column(folder: str, mtime_ns: int, name: str) -> Any:
    from pipelines.columns import open_column

    return open_column(_opened(folder, mtime_ns), name)
