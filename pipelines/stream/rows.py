"""The rows of the endless training stream, one by one or as columns.

A row is a function of (corpus, seed, position). So a checkpoint needs only one position, and any worker can make any
row. ordering.py chooses the sample at a position; feed.py brings rows to a trainer. This module imports no torch, which
keeps the Ray workers that decode and degrade small.

    row: key str, position int64, hq uint8 [h, w, 3], lq uint8 [h, w, 3], prompt str, sizes int64 [6], plan (JSON str),
         replaced str (errors of the samples that this row replaces, or ""), uncaptioned str (why the captioner wrote no
         prompt, or ""), and the precomputed latents and embeddings of columns.py

h x w is the resolution squared, or the bucket of the row's global batch. If the device degrades, there is no lq: hq is
the clean picture, and `components.tensors.collate` makes lq and target. The columns of a block also have no lq if
nothing degrades: it would equal hq.

Every readable sample comes exactly once per epoch. For an unreadable sample the stream uses another one and records the
error in that row. The replacement comes from a later epoch's order (RESERVE), so it comes once more than the others.
"""

from __future__ import annotations

import json
import os
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import chain
from mmap import mmap
from typing import Any, NamedTuple

import cv2
import numpy as np

from components.captions.tags import Tags
from components.captions.text import fill_frame
from components.degradations import build_degradation
from components.images import decode, resize_short_side, to_float, to_uint8
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import Degradation, Image, Plan, SampleError
from pipelines.core.errors import Failure, UsageError
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.shards import STORED_LIMITS, Corpus, ShardFile, Split, open_corpus
from pipelines.stream.columns import Precomputed, check_columns
from pipelines.stream.config import DEAD_LEAVES, StreamConfig, captioner_of
from pipelines.stream.ordering import Mixture, Order
from pipelines.stream.texts import COLUMN, NEGATIVE, caption_missing

RESERVE = 1 << 40
"""First reserve position. Attempt k at position p reads position p + k * RESERVE; no run gets that far."""

ATTEMPTS = 16  # samples tried for one position; a corpus in which 16 fail should be curated again
CACHE_BYTES = 64 << 20
"""Most bytes of resized pictures in a worker's cache, for splits that fit as a whole. Ours: enough for the demo."""

Row = dict[str, Any]
Place = tuple[str, int, int]
"""(source, the source's own position, sample number at that position); -1 for a source without samples."""

NOTHING_PRECOMPUTED = Precomputed()
SPARE_BLOCKS = 4  # hq and lq of the current block and of the one before it

_spare: list[mmap] = []
_pictures: OrderedDict[tuple[Any, ...], tuple[Image, tuple[int, int]]] = OrderedDict()


def size_at(config: StreamConfig, position: int) -> tuple[int, int]:
    """Return (height, width) of the row at a position; all rows of a global batch have the same size."""
    if not config.buckets:
        return config.resolution, config.resolution
    draw = generator(config.seed, "bucket", position // config.batch_size)
    height, width = config.buckets[int(draw.integers(0, len(config.buckets)))]
    return height, width


def source_of(config: StreamConfig, position: int) -> tuple[str, int]:
    """Return the source at a position, a corpus folder or "dead_leaves", and the source's own position."""
    number, own = _mixture(tuple(weight for _, weight in config.sources), config.seed).at(position)
    return config.sources[number][0], own


def load_row(config: StreamConfig, position: int) -> Row:
    """Return the row at a position: a pure function of the arguments and the corpus.

    Raises:
        Failure: ATTEMPTS samples in a row were unusable.
    """
    (place,) = _places(config, [position])
    row = _load(config, position, place)
    _caption_rows(config, [row], [place])
    row["prompt"] = fill_frame(config.prompt, row["prompt"])
    return row | {name: np.ascontiguousarray(row[name]) for name in ("hq", "lq") if name in row}


def load_columns(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return rows of one size as columns: stacked pixels, texts as objects. Samples are read in the order on disk.

    Raises:
        Failure: see load_row.
    """
    height, width = size_at(config, int(positions[0]))
    pixels = {
        name: _reusable_array((len(positions), height, width, 3))
        for name in (("hq", "lq") if config.degrades else ("hq",))
    }
    texts = {name: np.empty(len(positions), object) for name in ("key", "prompt", "plan", "replaced", "uncaptioned")}
    extra = precomputed_columns(config).empty(len(positions))
    sizes = np.empty((len(positions), 6), np.int64)
    places = _places(config, positions)
    for n in sorted(range(len(places)), key=lambda n: places[n][::2]):
        row = _load(config, int(positions[n]), places[n])
        for columns in (pixels, texts, extra):
            for name, column in columns.items():
                column[n] = row[name]
        sizes[n] = row["sizes"]
    if config.captioning:
        caption_missing(config.captioning, {**texts, **pixels, **extra}, _may_caption(config, places))
    texts["prompt"][:] = [fill_frame(config.prompt, text) for text in texts["prompt"]]
    return {**texts, **pixels, **extra, "sizes": sizes, "position": np.array(positions, np.int64)}


def heldout_rows(config: StreamConfig, count: int) -> list[Row]:
    """Return fixed rows of the held-out split: its pictures in turn, at positions 0..count-1.

    They come from the first corpus with held-out pictures; a corpus of negatives does not count. Crops and degradation
    are functions of (seed, position).

    Raises:
        Failure: no source has a held-out picture.
    """
    for source, _ in config.sources:
        captioner = captioner_of(config, source)
        splits = _corpus(source).splits if source != DEAD_LEAVES and captioner != NEGATIVE else {}
        n = len(splits["held_out"]) if "held_out" in splits else 0
        if n:
            one = {"sources": ((source, 1.0),), "captioner": captioner, "captioners": ()}
            heldout = replace(config, split="held_out", flip=False, **one)  # type: ignore[arg-type]
            rows = [
                _first_usable(heldout, p, source, ((p + k) % n for k in range(min(n, ATTEMPTS)))) for p in range(count)
            ]
            _caption_rows(heldout, rows, [(source, p, -1) for p in range(count)])
            return [row | {"prompt": fill_frame(heldout.prompt, row["prompt"])} for row in rows]
    raise Failure(f"no source has a held-out picture: {', '.join(name for name, _ in config.sources)}.")


def target_plan(config: StreamConfig) -> Plan | None:
    """Return the plan by which a device makes the training target from hq; None if hq is the target."""
    if not config.degradation or config.degrade_on == "stream":
        return None
    return _degradation(config.degradation, _options(config)).target_plan()


def check_stream(config: StreamConfig, model_digest: str = "") -> None:
    """Check on the driver for errors that would otherwise end the first task.

    Args:
        config: configuration of the stream.
        model_digest: digest of the prior that precomputed columns must have; "" skips this check.

    Raises:
        UsageError: a source is not a corpus or lacks a column, a column has the wrong kind or other values than the
            stream would compute, or missing captions need an lq that only the device makes.
        Failure: a source's split is empty.
    """
    if config.captioning and config.captioning.needs_lq and config.degradation and not config.degrades:
        raise UsageError("missing captions cannot be made from lq where the device degrades: choose another view.")
    for source, _ in config.sources:
        if source == DEAD_LEAVES:
            continue
        if not len(_corpus(source).split(config.split)):
            raise Failure(f"split {config.split} of {source} is empty.")
        captioner = captioner_of(config, source)
        if captioner.startswith(COLUMN) and _column(source, captioner.removeprefix(COLUMN)).kind != "text":
            raise UsageError(f"captioner {captioner}: that column of {source} holds no text.")
        if config.pairs and _column(source, config.pairs).kind != "picture":
            raise UsageError(f"pairs={config.pairs}: that column of {source} holds no pictures.")
    if config.unpaired and not len(_corpus(config.unpaired).split(config.split)):
        raise Failure(f"split {config.split} of {config.unpaired} is empty.")
    captioners = {source: captioner_of(config, source) for source, _ in config.sources}
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    check_columns(precomputed_columns(config), settings, captioners, _column, model_digest)


def precomputed_columns(config: StreamConfig) -> Precomputed:
    """Open the columns of config.latents and config.embeddings; empty if the stream has none."""
    if not (config.latents or config.embeddings):
        return NOTHING_PRECOMPUTED
    corpora = [source for source, _ in config.sources if source != DEAD_LEAVES]
    return Precomputed(
        latents={source: _column(source, config.latents) for source in corpora if config.latents},
        embeddings={source: _column(source, config.embeddings) for source in corpora if config.embeddings},
    )


# --- one row ----------------------------------------------------------------------------------------------------------


class _RowInput(NamedTuple):
    """The parts of a row before degradation.

    Attributes:
        key: of the sample.
        hq: crop of the picture, uint8 [h, w, 3].
        original: (height, width) of the picture before it was resized.
        corner: (top, left) of the crop in the resized picture.
        captioner: captioner of the source.
        caption: caption from the corpus; "" for none.
        lq: the row's own input; None if the row has none.
        replaced: errors of the samples that this row replaces; "" for none.
    """

    key: str
    hq: Image
    original: tuple[int, ...]
    corner: tuple[int, int]
    captioner: str
    caption: str = ""
    lq: Image | None = None
    replaced: str = ""


def _places(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> list[Place]:
    """Return the first-choice sample at each position."""
    sources = [source_of(config, int(position)) for position in positions]
    samples = np.full(len(sources), -1)
    for source in {source for source, _ in sources} - {DEAD_LEAVES}:
        rows = [n for n, (name, _) in enumerate(sources) if name == source]
        samples[rows] = _order(source, config).samples([sources[n][1] for n in rows])
    return [(source, own, sample) for (source, own), sample in zip(sources, samples.tolist(), strict=True)]


def _load(config: StreamConfig, position: int, place: Place) -> Row:
    """Return the row at a position without captioners' prompts; pixels may be read-only views of larger arrays."""
    source, own, sample = place
    if source == DEAD_LEAVES:
        height, width = size_at(config, position)
        picture = dead_leaves(max(height, width), config.seed, position)
        parts = _RowInput(
            key=f"dead-leaves-{config.seed}-{position}",
            hq=picture[:height, :width],
            original=picture.shape[:2],
            corner=(0, 0),
            captioner=captioner_of(config, source),
            lq=_unpaired_input(config, position) if config.unpaired else None,
        )
        return _row(config, position, parts) | precomputed_columns(config).values(source, config.split, -1)
    reserves = (int(_order(source, config).samples([own + RESERVE * k])[0]) for k in range(1, ATTEMPTS))
    return _first_usable(config, position, source, chain([sample], reserves))


def _first_usable(config: StreamConfig, position: int, source: str, candidates: Iterable[int]) -> Row:
    """Return the row of the first usable sample number; the row records the errors of the samples before it."""
    failures: list[str] = []
    captioner = captioner_of(config, source)
    for sample in candidates:
        shard = _shard_of(source, config.split, sample)
        number = sample - shard.start
        key = shard.keys[number].as_py()
        caption = str(shard.captions[number].as_py() or "") if captioner in ("manifest", NEGATIVE) else ""
        try:
            if captioner == NEGATIVE and not caption.strip():
                raise SampleError("no_prompt", "a negative sample needs its negative prompt, and has none", key)
            resized, original = _picture(config, position, shard, number, key)
            corner, crop = _crop(config, position, resized)
            lq = _paired_input(config, position, source, sample, key, resized) if config.pairs else None
        except SampleError as error:
            failures.append(f"[{error.code}] {key}: {error.detail}")
            continue
        if captioner.startswith(COLUMN):
            caption = str(_column(source, captioner.removeprefix(COLUMN)).value(config.split, sample) or "")
        if config.unpaired:
            lq = _unpaired_input(config, position)
        parts = _RowInput(
            key=key,
            hq=crop,
            original=original,
            corner=corner,
            captioner=captioner,
            caption=caption,
            lq=lq,
            replaced="; ".join(failures),
        )
        return _row(config, position, parts) | precomputed_columns(config).values(source, config.split, sample)
    raise Failure(f"position {position}: {len(failures)} samples in turn are broken, the last one {failures[-1]}.")


def _row(config: StreamConfig, position: int, parts: _RowInput) -> Row:
    """Degrade (unless the row has its own lq), compute tags, and return the row's fields."""
    hq, caption = parts.hq, parts.caption
    lq: Image | None = hq if parts.lq is None else parts.lq
    plan: Mapping[str, Any] = {}
    if config.degradation:
        degradation = _degradation(config.degradation, _options(config))
        plan, lq = degradation.draw(config.seed, parts.key, position), None
        if config.degrades:
            clean = to_float(hq)
            try:
                lq, hq = to_uint8(degradation.apply(clean, plan)), to_uint8(degradation.target(clean))
            except SampleError as error:  # a degradation does not have the sample's key
                raise SampleError(error.code, error.detail, parts.key) from error
    if parts.captioner == "tags":
        caption = Tags().caption([hq])[0]
    return {
        "key": parts.key,
        "position": np.int64(position),
        "hq": hq,
        **({} if lq is None else {"lq": lq}),
        "prompt": caption,
        # SDXL's size ids: original height and width, crop top and left, target height and width
        "sizes": np.array([*parts.original, *parts.corner, *hq.shape[:2]], dtype=np.int64),
        "plan": json.dumps(plan, sort_keys=True) if plan else "{}",
        "replaced": parts.replaced,
        "uncaptioned": "",
    }


# --- pictures of a row ------------------------------------------------------------------------------------------------


def _picture(
    config: StreamConfig, position: int, shard: _Shard, number: int, key: str
) -> tuple[Image, tuple[int, int]]:
    """Return a sample resized for its row, uint8 and maybe read-only, and its original (height, width).

    Pictures of a small split are cached: to decode and resize a photograph costs four times the rest of a small row.
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
    resized = resize_short_side(picture, _short_side_px(config, original, position))
    if fits:
        resized.setflags(write=False)
        _pictures[name] = resized, original
        while sum(picture.nbytes for picture, _ in _pictures.values()) > CACHE_BYTES:
            _pictures.popitem(last=False)
    return resized, original


def _short_side_px(config: StreamConfig, original: tuple[int, int], position: int) -> int:
    """Return the short side to which a picture of (height, width) is resized for a position.

    Raises:
        SampleError: too_small: the picture would be enlarged, and the stream refuses that.
    """
    short, margin = min(original), config.short_side or config.resolution
    # In whole numbers: a square row gets exactly short_side.
    sides = list(zip(size_at(config, position), original, strict=True))
    covers = max(-(-row_side * short // side) for row_side, side in sides)
    full = max(-(-row_side * short * margin // (side * config.resolution)) for row_side, side in sides)
    low, high = config.scale
    least = max(covers, round(full * low))
    if config.small == "refuse" and short < least:
        raise SampleError("too_small", f"{original[1]} x {original[0]}: the short side is below {least} pixels")
    if low < high:
        full = round(full * (low + (high - low) * generator(config.seed, position, "scale").random()))
    px = max(least, round(full * low) if low == high else full)
    return min(px, short) if config.small == "refuse" else px


def _crop(config: StreamConfig, position: int, picture: Image) -> tuple[tuple[int, int], Image]:
    """Return (top, left) and the random or central crop of the row's size, which may be mirrored."""
    height, width = size_at(config, position)
    if config.crop == "center":
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    else:
        draw = generator(config.seed, position, "crop")
        top = int(draw.integers(0, picture.shape[0] - height + 1))
        left = int(draw.integers(0, picture.shape[1] - width + 1))
    part = picture[top : top + height, left : left + width]
    if config.flip and generator(config.seed, position, "flip").random() < 0.5:
        part = cv2.flip(part, 1)
    return (top, left), part


def _paired_input(config: StreamConfig, position: int, source: str, sample: int, key: str, hq: Image) -> Image:
    """Return the input that belongs to a sample, with the crop of its target.

    Args:
        hq: the resized target, before the crop.

    Raises:
        SampleError: no_pair: the column has no input for the sample; or the input cannot be decoded.
    """
    data = _column(source, config.pairs).value(config.split, sample)
    if data is None:
        raise SampleError("no_pair", f"column {config.pairs} has no input for it", key)
    picture = decode(data, STORED_LIMITS, key)
    height, width = hq.shape[:2]
    if picture.shape[:2] != (height, width):  # resize it to exactly the size of its target
        interpolation = cv2.INTER_AREA if picture.shape[0] > height else cv2.INTER_CUBIC
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), np.uint8)
    return _crop(config, position, picture)[1]


def _unpaired_input(config: StreamConfig, position: int) -> Image:
    """Return the picture of the other corpus at a position, cropped to the row's size.

    Raises:
        Failure: ATTEMPTS samples in a row were unusable.
    """
    folder, error = config.unpaired, None
    # The order has another seed: with equal orders, sample n of one corpus would always meet sample n of the other.
    order = _order(folder, replace(config, seed=config.seed + 1)) if config.split != "held_out" else None
    count = len(_corpus(folder).split(config.split))
    for attempt in range(ATTEMPTS):
        own = position + attempt * RESERVE
        sample = int(order.samples([own])[0]) if order else (position + attempt) % count
        shard = _shard_of(folder, config.split, sample)
        number = sample - shard.start
        try:
            picture = _picture(config, position, shard, number, shard.keys[number].as_py())[0]
        except SampleError as problem:
            error = problem
            continue
        return _crop(config, position, picture)[1]
    raise Failure(f"position {position}: {ATTEMPTS} inputs in turn are broken, the last one {error}.")


# --- captions of rows -------------------------------------------------------------------------------------------------


def _caption_rows(config: StreamConfig, rows: Sequence[Row], places: Sequence[Place]) -> None:
    """Call caption_missing for single rows."""
    if config.captioning:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        caption_missing(config.captioning, columns, _may_caption(config, places))
        for n, row in enumerate(rows):
            row.update({name: column[n] for name, column in columns.items()})


def _may_caption(config: StreamConfig, places: Sequence[Place]) -> list[bool]:
    """Whether each row may get a captioner's text: dead leaves show nothing, and negatives have their own prompt."""
    return [source != DEAD_LEAVES and captioner_of(config, source) != NEGATIVE for source, _, _ in places]


# --- memory of blocks -------------------------------------------------------------------------------------------------


def _reusable_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array; its memory is reused after the last reference to it is gone.

    Without reuse, the system maps megabytes anew for each block, and page faults took a tenth of the time.
    """
    size = int(np.prod(shape))
    fits = [place for place, memory in enumerate(_spare) if size <= len(memory) <= 2 * size]
    memory = _spare.pop(fits[0]) if fits else mmap(-1, size)
    array = np.frombuffer(memory, np.uint8, size)  # views of it refer to this array and not to the memory
    weakref.finalize(array, _keep, memory)
    return array.reshape(shape)


def _keep(memory: mmap) -> None:
    _spare.append(memory)
    del _spare[:-SPARE_BLOCKS]


# --- caches of what positions share -----------------------------------------------------------------------------------


class _Shard:
    """A shard of a corpus, open for reads of byte ranges: read_sample at a fifth of its cost."""

    def __init__(self, split: Split, number: int) -> None:
        batch = split.batch(number)
        self.path, self.start = split.folder / split.shards[number]["name"], split.starts[number]
        self.file = ShardFile(self.path)
        self.split_samples = len(split)
        self.keys, self.captions = batch.column("key"), batch.column("caption")
        self.offsets, self.sizes = batch.column("offset").to_numpy(), batch.column("size").to_numpy()

    def read(self, row: int, key: str) -> bytes:
        """Return the picture's bytes in a row; raises the SampleErrors of read_sample."""
        return self.file.read(int(self.offsets[row]), int(self.sizes[row]), key)


def _shard_of(folder: str, split: str, sample: int) -> _Shard:
    """Return the shard with a sample number."""
    mtime_ns = _mtime_ns(folder)
    number = bisect_right(_corpus_at(folder, mtime_ns).split(split).starts, sample) - 1
    return _shard(folder, mtime_ns, split, number)


@lru_cache(maxsize=256)
def _shard(folder: str, mtime_ns: int, split: str, number: int) -> _Shard:
    return _Shard(_corpus_at(folder, mtime_ns).split(split), number)


def _corpus(folder: str) -> Corpus:
    """Open a corpus; cached as long as the modification time of its index file stays the same."""
    return _corpus_at(folder, _mtime_ns(folder))


@lru_cache(maxsize=16)
def _corpus_at(folder: str, mtime_ns: int) -> Corpus:
    return open_corpus(folder)


def _mtime_ns(folder: str) -> int:
    try:
        return os.stat(f"{folder}/index.json").st_mtime_ns
    except OSError:
        return 0


def _column(folder: str, name: str) -> Any:
    """Open a column of a corpus; cached like the corpus."""
    return _column_at(folder, _mtime_ns(folder), name)


@lru_cache(maxsize=16)
def _column_at(folder: str, mtime_ns: int, name: str) -> Any:
    return open_column(_corpus_at(folder, mtime_ns), name)


def _order(folder: str, config: StreamConfig) -> Order:
    return _order_at(folder, _mtime_ns(folder), config.split, config.seed, config.window_samples)


@lru_cache(maxsize=16)
def _order_at(folder: str, mtime_ns: int, split: str, seed: int, window: int) -> Order:
    return Order(_corpus_at(folder, mtime_ns).split(split).starts, seed, window)


@lru_cache(maxsize=16)
def _mixture(weights: tuple[float, ...], seed: int) -> Mixture:
    return Mixture(weights, seed)


@lru_cache(maxsize=16)
def _degradation(preset: str, options: str) -> Degradation:
    return build_degradation(preset, **json.loads(options))


def _options(config: StreamConfig) -> str:
    return json.dumps(dict(config.degradation_options), sort_keys=True)
