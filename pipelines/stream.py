"""The endless training stream: the rows at its positions, one by one or as columns.

Everything here is a function of (corpus, seed, position): a checkpoint needs to hold one position, and any worker can
make any row. Nothing imports torch, so the Ray workers that decode and degrade stay small. Which sample stands at a
position is in ordering.py, how the rows reach a trainer in feed.py.

    row: key str, position int64, hq uint8 [h, w, 3], lq uint8 [h, w, 3], prompt str, sizes int64 [6], plan (JSON str),
         replaced str ("" or what was wrong with the samples first in line), uncaptioned str ("" or why a captioner that
         was asked gave no prompt), and what stream_columns.py adds of precomputed latents and embeddings

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
from dataclasses import fields, replace
from functools import lru_cache
from io import FileIO
from itertools import chain
from mmap import mmap
from typing import Any

import cv2
import numpy as np

from components.captions.tags import Tags
from components.captions.text import framed
from components.degradations import build_degradation
from components.degradations.plans import make_plan
from components.images import Limits, decode, resize_short_side, to_float, to_uint8
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import Degradation, Image, Plan, SampleError
from pipelines.errors import Failure, UsageError
from pipelines.ordering import Mixture, Order
from pipelines.shards import Corpus, Split, open_corpus
from pipelines.stream_columns import Precomputed, check_columns
from pipelines.stream_config import DEAD_LEAVES, StreamConfig, captioner_of
from pipelines.stream_texts import COLUMN, NEGATIVE, caption_missing

RESERVE = 1 << 40
"""Positions from here on are reserves: attempt k at position p reads position p + k * RESERVE. No run gets that far."""

ATTEMPTS = 16  # samples tried for one position; a corpus as broken as this takes to fail should be curated again
STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, max_aspect=1e9, max_expansion=1e9)
"""Curation has already applied the corpus's own limits, which may be wider than the decoder's defaults."""

CACHE_BYTES = 64 << 20
"""Of resized pictures that each worker keeps, if the whole split fits. Ours: photographs of a demo, not a corpus."""

Row = dict[str, Any]
Place = tuple[str, int, int]
"""Source, the source's own position, and the sample number there (-1 for what is drawn instead of read)."""

NOTHING_PRECOMPUTED = Precomputed()
SPARE_BLOCKS = 4  # hq and lq of the block at work and of the one that is handed on

_spare: list[mmap] = []
_pictures: OrderedDict[tuple[Any, ...], tuple[Image, tuple[int, int]]] = OrderedDict()


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
    (place,) = _places(config, [position])
    row = _load(config, position, place)
    _caption_rows(config, [row], [place])
    row["prompt"] = framed(config.prompt, row["prompt"])
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
    texts = {name: np.empty(len(positions), object) for name in ("key", "prompt", "plan", "replaced", "uncaptioned")}
    extra = precomputed(config).empty(len(positions))
    sizes = np.empty((len(positions), 6), np.int64)
    places = _places(config, positions)
    for n in sorted(range(len(places)), key=lambda n: places[n][::2]):
        row = _load(config, int(positions[n]), places[n])
        for columns in (pixels, texts, extra):
            for name, column in columns.items():
                column[n] = row[name]
        sizes[n] = row["sizes"]
    if config.captioning:
        caption_missing(config.captioning, {**texts, **pixels, **extra}, _askable(config, places))
    texts["prompt"][:] = [framed(config.prompt, text) for text in texts["prompt"]]
    return {**texts, **pixels, **extra, "sizes": sizes, "position": np.array(positions, np.int64)}


def heldout_rows(config: StreamConfig, count: int) -> list[Row]:
    """Fixed rows of the held-out split, the same every time: its pictures in turn, at positions 0..count-1.

    Of several sources the first corpus that holds pictures out counts; negative samples do not. Crops and degradation
    follow (seed, position).

    Raises:
        Failure: no source holds any picture out.
    """
    for source, _ in config.sources:
        words = captioner_of(config, source)
        splits = _corpus(source).splits if source != DEAD_LEAVES and words != NEGATIVE else {}
        n = len(splits["held_out"]) if "held_out" in splits else 0
        if n:
            one = {"sources": ((source, 1.0),), "captioner": words, "captioners": ()}
            fixed = replace(config, split="held_out", flip=False, **one)  # type: ignore[arg-type]
            rows = [
                _first_usable(fixed, p, source, ((p + k) % n for k in range(min(n, ATTEMPTS)))) for p in range(count)
            ]
            _caption_rows(fixed, rows, [(source, p, -1) for p in range(count)])
            return [row | {"prompt": framed(fixed.prompt, row["prompt"])} for row in rows]
    raise Failure(f"none of {', '.join(name for name, _ in config.sources)} holds any picture out.")


def target_plan(config: StreamConfig) -> Plan | None:
    """What a device has to do to hq for the training target; None where hq is the target already."""
    if not config.degradation or config.degrade_on == "stream":
        return None
    degradation: Any = _degradation(config.degradation, _options(config))
    if not getattr(degradation, "sharpen_target", False):
        return None
    return make_plan([{"op": "sharpen", "quick": degradation.quick_sharpen}])


def check_stream(config: StreamConfig, model_digest: str = "") -> None:
    """Find on the driver what would else end the first task.

    Args:
        model_digest: of the prior that precomputed columns must come from; "" where it is not known.

    Raises:
        UsageError: a source is no corpus, lacks the column of captions or precomputed values, or has others than the
            stream would compute; or a captioner could not see what it is to look at.
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
    words = {source: captioner_of(config, source) for source, _ in config.sources}
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    check_columns(precomputed(config), settings, words, _column, model_digest)


def precomputed(config: StreamConfig) -> Precomputed:
    """The columns behind config.latents and config.embeddings, opened; empty where there are none."""
    if not (config.latents or config.embeddings):
        return NOTHING_PRECOMPUTED
    corpora = [source for source, _ in config.sources if source != DEAD_LEAVES]
    return Precomputed(
        latents={source: _column(source, config.latents) for source in corpora if config.latents},
        embeddings={source: _column(source, config.embeddings) for source in corpora if config.embeddings},
    )


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
        cut, captioner = picture[:height, :width], captioner_of(config, source)
        lq = _unpaired(config, position) if config.unpaired else None
        row = _row(config, position, name, cut, picture.shape[:2], (0, 0), captioner, "", "", lq)
        return row | precomputed(config).values(source, config.split, -1)
    reserves = (int(_order(source, config).samples([own + RESERVE * k])[0]) for k in range(1, ATTEMPTS))
    return _first_usable(config, position, source, chain([sample], reserves))


def _first_usable(config: StreamConfig, position: int, source: str, candidates: Iterable[int]) -> Row:
    """The row of the first candidate sample number that can be used; what came before it is recorded."""
    failures: list[str] = []
    captioner = captioner_of(config, source)
    for sample in candidates:
        shard = _shard_of(source, config.split, sample)
        number = sample - shard.start
        key = shard.keys[number].as_py()
        caption = str(shard.captions[number].as_py() or "") if captioner in ("manifest", NEGATIVE) else ""
        try:
            if captioner == NEGATIVE and not caption.strip():
                raise SampleError("no_prompt", "a negative sample without its negative prompt teaches its faults", key)
            resized, original = _picture(config, shard, number, key, position)
            corner, cut = _cut(config, position, resized)
            lq = _own_input(config, source, sample, key, position, resized) if config.pairs else None
        except SampleError as error:
            failures.append(f"[{error.code}] {key}: {error.detail}")
            continue
        if captioner.startswith(COLUMN):
            caption = str(_column(source, captioner.removeprefix(COLUMN)).value(config.split, sample) or "")
        if config.unpaired:
            lq = _unpaired(config, position)
        row = _row(config, position, key, cut, original, corner, captioner, caption, "; ".join(failures), lq)
        return row | precomputed(config).values(source, config.split, sample)
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
    """Random or middle part of the row's size and its (top, left), possibly mirrored."""
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


def _row(
    config: StreamConfig,
    position: int,
    key: str,
    hq: Image,
    original: tuple[int, ...],
    corner: tuple[int, int],
    captioner: str,
    caption: str,
    replaced: str,
    lq: Image | None = None,
) -> Row:
    """Degrade (unless lq is given), caption, and put the fields together."""
    lq = hq if lq is None else lq
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
    if captioner == "tags":
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
        "uncaptioned": "",
    }


def _own_input(config: StreamConfig, source: str, sample: int, key: str, position: int, hq: Image) -> Image:
    """The input that belongs to a sample, cut as its target is.

    Args:
        hq: the target, resized and not yet cut.

    Raises:
        SampleError: there is none ("no_pair"), or it cannot be decoded.
    """
    data = _column(source, config.pairs).value(config.split, sample)
    if data is None:
        raise SampleError("no_pair", f"no input belongs to it in column {config.pairs}", key)
    picture = decode(data, STORED_LIMITS, key)
    height, width = hq.shape[:2]
    if picture.shape[:2] != (height, width):  # as its target was resized, to the very same pixels
        how = cv2.INTER_AREA if picture.shape[0] > height else cv2.INTER_CUBIC
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=how), np.uint8)
    return _cut(config, position, picture)[1]


def _unpaired(config: StreamConfig, position: int) -> Image:
    """The picture of the other corpus that stands at a position, cut to the row's size.

    Raises:
        Failure: ATTEMPTS samples in turn could not be used.
    """
    folder, error = config.unpaired, None
    # of an order of its own: equal ones of two corpora would marry the n-th of one to the n-th of the other for ever
    order = _order(folder, replace(config, seed=config.seed + 1)) if config.split != "held_out" else None
    count = len(_corpus(folder).split(config.split))
    for attempt in range(ATTEMPTS):
        where = position + attempt * RESERVE
        sample = int(order.samples([where])[0]) if order else (position + attempt) % count
        shard = _shard_of(folder, config.split, sample)
        number = sample - shard.start
        try:
            picture = _picture(config, shard, number, shard.keys[number].as_py(), position)[0]
        except SampleError as problem:
            error = problem
            continue
        return _cut(config, position, picture)[1]
    raise Failure(f"position {position}: {ATTEMPTS} inputs in turn are broken, the last one {error}.")


def _caption_rows(config: StreamConfig, rows: Sequence[Row], places: Sequence[Place]) -> None:
    """caption_missing for single rows."""
    if config.captioning:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        caption_missing(config.captioning, columns, _askable(config, places))
        for n, row in enumerate(rows):
            row.update({name: column[n] for name, column in columns.items()})


def _askable(config: StreamConfig, places: Sequence[Place]) -> list[bool]:
    """Which rows may get a captioner's words: synthetic pictures have nothing to tell, negatives have their prompt."""
    return [source != DEAD_LEAVES and captioner_of(config, source) != NEGATIVE for source, _, _ in places]


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


def _column(folder: str, name: str) -> Any:
    """A column of a corpus."""
    return _opened_column(folder, _mtime_ns(folder), name)


@lru_cache(maxsize=16)
def _opened_column(folder: str, mtime_ns: int, name: str) -> Any:
    from pipelines.columns import open_column

    return open_column(_opened(folder, mtime_ns), name)
