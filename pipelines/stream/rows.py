"""The rows of the endless training stream, one by one or in blocks of columns.

A row is a function of (corpora, StreamConfig, position). So a checkpoint needs only one position, and any worker can
make any row. ordering.py chooses the sample at a position; feed.py brings rows to a trainer. This module imports no
torch, which keeps the Ray workers that decode and degrade small.

    row: key str, position int64, hq uint8 [h, w, 3], lq uint8 [h, w, 3], prompt str, sizes int64 [6] (SDXL's size
         ids), plan (JSON str: the drawn parameters of the degradation), replaced str (errors of the samples that this
         row replaces, or ""), uncaptioned str (why the captioner wrote no prompt, or ""), and the precomputed latents
         and embeddings of columns.py

h and w equal the resolution, or are the bucket (height, width) drawn for the row's global batch. With degrade_on
"device" a row has no lq: hq is the clean picture, and `components.tensors.collate` makes lq and the target on the
training device. If lq would equal hq, load_columns leaves lq out.

Each epoch of a corpus uses every readable sample once. An unreadable sample is replaced by one from a later epoch's
order (RESERVE), and the row records the error. So a run uses a replacement once more than the other samples.
"""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from itertools import chain
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
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
from pipelines.corpus.shards import STORED_LIMITS
from pipelines.stream.columns import Precomputed, check_columns
from pipelines.stream.config import DEAD_LEAVES, StreamConfig, captioner_of
from pipelines.stream.opened import Shard, column_of, corpus_of, order_of, shard_of, unpaired_order
from pipelines.stream.ordering import Mixture
from pipelines.stream.texts import COLUMN, NEGATIVE, caption_missing, draw_text

RESERVE = 1 << 40
"""Distance between attempts: attempt k at position p reads the sample at p + k * RESERVE. No run gets so far."""

ATTEMPTS = 16  # samples tried for one position; if all 16 are unusable, the corpus should be curated again
CACHE_BYTES = 64 << 20
"""Size limit of a worker's cache of resized pictures. Only a split that fits as a whole is cached. Our choice: enough
for the demo."""

DECODED_SAMPLES, DECODED_BYTES = 256, 512 << 20
"""Limits of a worker's cache of decoded pictures, for splits whose pictures are resized anew each time. Our choice: a
small corpus of photographs of 1.5 megapixels, which are decoded in five times the time of the rest of a small row."""

Row = dict[str, Any]
Place = tuple[str, int, int]
"""(source, position within the source, sample number); the sample number is -1 for "dead_leaves", which has none."""

NOTHING_PRECOMPUTED = Precomputed()
MAX_FREE_BUFFERS = 4  # enough for hq and lq of two blocks

_free_buffers: list[mmap] = []
_picture_cache: OrderedDict[tuple[Any, ...], tuple[Image, tuple[int, int]]] = OrderedDict()
_decoded_cache: OrderedDict[tuple[Any, ...], Image] = OrderedDict()


def size_at(config: StreamConfig, position: int) -> tuple[int, int]:
    """Return (height, width) of the row at a position; all rows of a global batch have the same size."""
    if not config.buckets:
        return config.resolution, config.resolution
    rng = generator(config.seed, "bucket", position // config.batch_size)
    height, width = config.buckets[int(rng.integers(0, len(config.buckets)))]
    return height, width


def source_of(config: StreamConfig, position: int) -> tuple[str, int]:
    """Return the source at a position of the stream, and the position within that source.

    A source is a corpus folder or "dead_leaves".
    """
    index, position_in_source = mixture_of(config).at(position)
    return config.sources[index][0], position_in_source


def mixture_of(config: StreamConfig) -> Mixture:
    """Return the mixture of a stream's sources."""
    return _mixture(tuple(weight for _, weight in config.sources), config.seed)


def load_row(config: StreamConfig, position: int) -> Row:
    """Return the row at a position: a pure function of the arguments and the corpus.

    Raises:
        Failure: all ATTEMPTS samples tried for the position were unusable.
    """
    (place,) = places_of(config, [position])
    row = _load(config, position, place)
    _caption_rows(config, [row], [place])
    row["prompt"] = fill_frame(config.prompt, row["prompt"])
    return row | {name: np.ascontiguousarray(row[name]) for name in ("hq", "lq") if name in row}


def load_columns(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Return a block of rows as columns: pixels stacked, texts in object arrays.

    All rows must have the same size. Samples are read in the order in which they lie on disk.

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
    places = places_of(config, positions)
    for n in sorted(range(len(places)), key=lambda n: places[n][::2]):  # by (source, sample number)
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
    """Return `count` fixed rows of the held-out split. Its pictures follow in order, and repeat if they are too few.

    All rows come from the first corpus with held-out pictures; a corpus with captioner "negative" is skipped. Crops and
    degradation are functions of (seed, position), with positions 0..count-1.

    Raises:
        Failure: no source has a held-out picture.
    """
    for source, _ in config.sources:
        captioner = captioner_of(config, source)
        splits = corpus_of(source).splits if source != DEAD_LEAVES and captioner != NEGATIVE else {}
        n = len(splits["held_out"]) if "held_out" in splits else 0
        if n:
            only_source = {"sources": ((source, 1.0),), "captioner": captioner, "captioners": ()}
            heldout = replace(config, split="held_out", flip=False, turn=False, relight=0.0, **only_source)  # type: ignore[arg-type]
            rows = [
                _first_usable(heldout, p, source, ((p + k) % n for k in range(min(n, ATTEMPTS)))) for p in range(count)
            ]
            _caption_rows(heldout, rows, [(source, p, -1) for p in range(count)])
            return [row | {"prompt": fill_frame(heldout.prompt, row["prompt"])} for row in rows]
    raise Failure(f"no source has a held-out picture: {', '.join(name for name, _ in config.sources)}.")


def target_plan(config: StreamConfig) -> Plan | None:
    """Return the plan of operations by which the device makes the target from hq; None if hq is the target."""
    if not config.degradation or config.degrade_on == "stream":
        return None
    return _degradation(config.degradation, _options(config)).target_plan()


def check_stream(config: StreamConfig, model_digest: str = "") -> None:
    """Check the stream on the driver, so that its errors do not first appear in a Ray task.

    Args:
        config: configuration of the stream.
        model_digest: digest of the prior with which the columns must have been computed; "" skips this check.

    Raises:
        UsageError: a source is not a corpus or lacks a column, a column has the wrong kind or other values than the
            stream would compute, or the captioner needs lq but the device degrades.
        Failure: a source's split is empty.
    """
    if config.captioning and config.captioning.needs_lq and config.degradation and not config.degrades:
        raise UsageError(
            "missing captions cannot be made from lq with degrade_on=device: choose another view for the captioner."
        )
    for source, _ in config.sources:
        if source == DEAD_LEAVES:
            continue
        if not len(corpus_of(source).split(config.split)):
            raise Failure(f"split {config.split} of {source} is empty.")
        captioner = captioner_of(config, source)
        if captioner.startswith(COLUMN) and column_of(source, captioner.removeprefix(COLUMN)).kind != "text":
            raise UsageError(f"captioner {captioner}: that column of {source} holds no text.")
        if config.pairs and column_of(source, config.pairs).kind != "picture":
            raise UsageError(f"pairs={config.pairs}: that column of {source} holds no pictures.")
    if config.unpaired and not len(corpus_of(config.unpaired).split(config.split)):
        raise Failure(f"split {config.split} of {config.unpaired} is empty.")
    captioners = {source: captioner_of(config, source) for source, _ in config.sources}
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    check_columns(precomputed_columns(config), settings, captioners, column_of, model_digest)


def precomputed_columns(config: StreamConfig) -> Precomputed:
    """Open the columns of config.latents and config.embeddings; empty if the stream has none."""
    if not (config.latents or config.embeddings):
        return NOTHING_PRECOMPUTED
    corpora = [source for source, _ in config.sources if source != DEAD_LEAVES]
    return Precomputed(
        latents={source: column_of(source, config.latents) for source in corpora if config.latents},
        embeddings={source: column_of(source, config.embeddings) for source in corpora if config.embeddings},
    )


# --- one row ----------------------------------------------------------------------------------------------------------


class _RowInput(NamedTuple):
    """What a row is made of, before degradation.

    Attributes:
        key: key of the sample.
        hq: crop of the picture, uint8 [h, w, 3].
        original: (height, width) of the picture before it was resized.
        corner: (top, left) of the crop in the resized picture.
        captioner: captioner of the source.
        caption: text from the corpus, one of several; "" for none.
        lq: paired or unpaired input; None if lq comes from a degradation or equals hq.
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


def samples_of(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
    """Return (corpus folder, sample number) of the pictures that rows read, if all are usable."""
    samples = [(source, sample) for source, _, sample in places_of(config, positions) if sample >= 0]
    if config.unpaired and config.split != "held_out":
        samples += [(config.unpaired, sample) for sample in unpaired_order(config).samples(positions).tolist()]
    return samples


def places_of(config: StreamConfig, positions: Sequence[int] | np.ndarray) -> list[Place]:
    """Return the place of each position, with the sample that is tried first."""
    sources = [source_of(config, int(position)) for position in positions]
    samples = np.full(len(sources), -1)
    for source in {source for source, _ in sources} - {DEAD_LEAVES}:
        rows = [n for n, (name, _) in enumerate(sources) if name == source]
        samples[rows] = order_of(source, config).samples([sources[n][1] for n in rows])
    return [(source, own, sample) for (source, own), sample in zip(sources, samples.tolist(), strict=True)]


def _load(config: StreamConfig, position: int, place: Place) -> Row:
    """Return the row at a position, before captioners write missing prompts.

    The pixels may be read-only views of larger arrays.
    """
    source, position_in_source, sample = place
    if source == DEAD_LEAVES:
        height, width = size_at(config, position)
        picture = dead_leaves(max(height, width), config.seed, position)
        row_input = _RowInput(
            key=f"dead-leaves-{config.seed}-{position}",
            hq=picture[:height, :width],
            original=picture.shape[:2],
            corner=(0, 0),
            captioner=captioner_of(config, source),
            lq=_unpaired_input(config, position) if config.unpaired else None,
        )
        return _row(config, position, row_input) | precomputed_columns(config).values(source, config.split, -1)
    replacements = (
        int(order_of(source, config).samples([position_in_source + RESERVE * k])[0]) for k in range(1, ATTEMPTS)
    )
    return _first_usable(config, position, source, chain([sample], replacements))


def _first_usable(config: StreamConfig, position: int, source: str, candidates: Iterable[int]) -> Row:
    """Return the row of the first usable sample among the candidates; the row records the errors of those before."""
    failures: list[str] = []
    captioner = captioner_of(config, source)
    for sample in candidates:
        shard = shard_of(source, config.split, sample)
        index = sample - shard.start
        key = shard.keys[index].as_py()
        caption = str(shard.captions[index].as_py() or "") if captioner in ("manifest", NEGATIVE) else ""
        try:
            if captioner == NEGATIVE and not caption.strip():
                raise SampleError("no_prompt", "a negative sample needs a negative prompt, but has none", key)
            resized, original = _picture(config, position, shard, index, key)
            corner, crop = _crop(config, position, resized)
            lq = _paired_input(config, position, source, sample, key, resized) if config.pairs else None
        except SampleError as error:
            failures.append(f"[{error.code}] {key}: {error.detail}")
            continue
        if captioner.startswith(COLUMN):
            caption = str(column_of(source, captioner.removeprefix(COLUMN)).value(config.split, sample) or "")
        if config.unpaired:
            lq = _unpaired_input(config, position)
        row_input = _RowInput(
            key=key,
            hq=crop,
            original=original,
            corner=corner,
            captioner=captioner,
            caption=draw_text(caption, config.seed, key, position),
            lq=lq,
            replaced="; ".join(failures),
        )
        return _row(config, position, row_input) | precomputed_columns(config).values(source, config.split, sample)
    raise Failure(f"position {position}: none of {len(failures)} samples is usable; the last error is {failures[-1]}.")


def _row(config: StreamConfig, position: int, row_input: _RowInput) -> Row:
    """Degrade hq if the config has a degradation, compute tags, and return the row's fields."""
    hq, caption = row_input.hq, row_input.caption
    lq: Image | None = hq if row_input.lq is None else row_input.lq
    plan: Mapping[str, Any] = {}
    if config.degradation:
        degradation = _degradation(config.degradation, _options(config))
        plan, lq = degradation.draw(config.seed, row_input.key, position), None
        if config.degrades:
            clean = to_float(hq)
            try:
                lq, hq = to_uint8(degradation.apply(clean, plan)), to_uint8(degradation.target(clean))
            except SampleError as error:  # the degradation does not know the sample's key
                raise SampleError(error.code, error.detail, row_input.key) from error
    if row_input.captioner == "tags":
        caption = Tags().caption([hq])[0]
    return {
        "key": row_input.key,
        "position": np.int64(position),
        "hq": hq,
        **({} if lq is None else {"lq": lq}),
        "prompt": caption,
        # SDXL's size ids: original height and width, crop top and left, target height and width
        "sizes": np.array([*row_input.original, *row_input.corner, *hq.shape[:2]], dtype=np.int64),
        "plan": json.dumps(plan, sort_keys=True) if plan else "{}",
        "replaced": row_input.replaced,
        "uncaptioned": "",
    }


# --- pictures of a row ------------------------------------------------------------------------------------------------


def _picture(config: StreamConfig, position: int, shard: Shard, index: int, key: str) -> tuple[Image, tuple[int, int]]:
    """Return a sample's picture, resized for its row, and its original (height, width).

    The resized picture is uint8 and may be read-only. Pictures of a small split are cached: decoding and resizing a
    photograph takes four times as long as the rest of a small row.

    Args:
        index: index of the sample in the shard.
    """
    short_side = config.short_side or config.resolution
    pixels = shard.split_samples * max(1, len(config.buckets)) * short_side**2
    cacheable = 3 * pixels <= CACHE_BYTES and config.scale == (1.0, 1.0)
    cache_key = (
        (shard.path, index, size_at(config, position), short_side, config.resolution, config.small) if cacheable else ()
    )
    if cache_key in _picture_cache:
        _picture_cache.move_to_end(cache_key)
        return _picture_cache[cache_key]
    picture = _decoded(shard, index, key, cacheable)
    original = picture.shape[0], picture.shape[1]
    resized = resize_short_side(picture, _short_side_px(config, original, position))
    if cacheable:
        resized.setflags(write=False)
        _picture_cache[cache_key] = resized, original
        while sum(picture.nbytes for picture, _ in _picture_cache.values()) > CACHE_BYTES:
            _picture_cache.popitem(last=False)
    return resized, original


def _decoded(shard: Shard, index: int, key: str, is_cached_resized: bool) -> Image:
    """Return a sample's whole picture, which may be read-only; cached in a small split if its resized form is not."""
    if is_cached_resized or shard.split_samples > DECODED_SAMPLES:
        return decode(shard.read(index, key), STORED_LIMITS, key)
    cache_key = (shard.path, index)
    if cache_key in _decoded_cache:
        _decoded_cache.move_to_end(cache_key)
        return _decoded_cache[cache_key]
    picture = decode(shard.read(index, key), STORED_LIMITS, key)
    picture.setflags(write=False)
    _decoded_cache[cache_key] = picture
    while sum(picture.nbytes for picture in _decoded_cache.values()) > DECODED_BYTES:
        _decoded_cache.popitem(last=False)
    return picture


def _short_side_px(config: StreamConfig, original: tuple[int, int], position: int) -> int:
    """Return the short side, in pixels, of the resized picture.

    Args:
        original: (height, width) of the picture before it is resized.

    Raises:
        SampleError: too_small: the picture would be enlarged, which config.small "refuse" forbids.
    """
    original_short, short_side = min(original), config.short_side or config.resolution
    # Integer arithmetic, so that the picture of a square row gets exactly short_side.
    sides = list(zip(size_at(config, position), original, strict=True))
    covering = max(-(-row_side * original_short // side) for row_side, side in sides)  # the least that covers the row
    unscaled = max(-(-row_side * original_short * short_side // (side * config.resolution)) for row_side, side in sides)
    low, high = config.scale
    least = max(covering, round(unscaled * low))
    if config.small == "refuse" and original_short < least:
        raise SampleError("too_small", f"{original[1]} x {original[0]}: the short side is below {least} pixels")
    factor = low + (high - low) * generator(config.seed, position, "scale").random() if low < high else low
    px = max(least, round(unscaled * factor))
    return min(px, original_short) if config.small == "refuse" else px


def _crop(config: StreamConfig, position: int, picture: Image) -> tuple[tuple[int, int], Image]:
    """Return (top, left) and the random or central crop of the row's size, mirrored, turned and relit as configured."""
    height, width = size_at(config, position)
    if config.crop == "center":
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    else:
        rng = generator(config.seed, position, "crop")
        top = int(rng.integers(0, picture.shape[0] - height + 1))
        left = int(rng.integers(0, picture.shape[1] - width + 1))
    part = picture[top : top + height, left : left + width]
    if config.flip and generator(config.seed, position, "flip").random() < 0.5:
        part = cv2.flip(part, 1)
    if config.turn:
        quarters = int(generator(config.seed, position, "turn").integers(0, 4))
        part = np.rot90(part, quarters if height == width else 2 * (quarters % 2))
    if config.relight:
        part = _relight(part, config, position)
    return (top, left), part


def _relight(part: Image, config: StreamConfig, position: int) -> Image:
    """A crop in another light: level -> gain level ** gamma in [0, 1], one gamma for all colours, a gain for each."""
    rng = generator(config.seed, position, "relight")
    gamma, gains = np.exp(config.relight * rng.uniform(-1, 1)), np.exp(config.relight / 4 * rng.uniform(-1, 1, size=3))
    levels = np.rint(255 * np.clip(gains * (np.arange(256) / 255)[:, None] ** gamma, 0, 1)).astype(np.uint8)
    return np.asarray(cv2.LUT(np.ascontiguousarray(part), levels[None]), dtype=np.uint8)


def _paired_input(config: StreamConfig, position: int, source: str, sample: int, key: str, hq: Image) -> Image:
    """Return the paired lq of a sample, resized and cropped like its hq.

    Args:
        hq: the resized hq, before the crop.

    Raises:
        SampleError: no_pair: the column has no input for the sample; or the input cannot be decoded.
    """
    data = column_of(source, config.pairs).value(config.split, sample)
    if data is None:
        raise SampleError("no_pair", f"column {config.pairs} has no input for this sample", key)
    picture = decode(data, STORED_LIMITS, key)
    height, width = hq.shape[:2]
    if picture.shape[:2] != (height, width):  # lq must have exactly the size of hq
        interpolation = cv2.INTER_AREA if picture.shape[0] > height else cv2.INTER_CUBIC
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=interpolation), np.uint8)
    return _crop(config, position, picture)[1]


def _unpaired_input(config: StreamConfig, position: int) -> Image:
    """Return the lq at a position: a picture of the corpus config.unpaired, cropped to the row's size.

    Raises:
        Failure: all ATTEMPTS samples tried for the position were unusable.
    """
    folder, error = config.unpaired, None
    order = unpaired_order(config) if config.split != "held_out" else None
    count = len(corpus_of(folder).split(config.split))
    for attempt in range(ATTEMPTS):
        sample = int(order.samples([position + attempt * RESERVE])[0]) if order else (position + attempt) % count
        shard = shard_of(folder, config.split, sample)
        index = sample - shard.start
        try:
            picture = _picture(config, position, shard, index, shard.keys[index].as_py())[0]
        except SampleError as problem:
            error = problem
            continue
        return _crop(config, position, picture)[1]
    raise Failure(f"position {position}: none of {ATTEMPTS} inputs is usable; the last error is {error}.")


# --- captions of rows -------------------------------------------------------------------------------------------------


def _caption_rows(config: StreamConfig, rows: Sequence[Row], places: Sequence[Place]) -> None:
    """Write the missing prompts of rows, as load_columns does for a block."""
    if config.captioning:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        caption_missing(config.captioning, columns, _may_caption(config, places))
        for n, row in enumerate(rows):
            row.update({name: column[n] for name, column in columns.items()})


def _may_caption(config: StreamConfig, places: Sequence[Place]) -> list[bool]:
    """For each row, whether a captioner may write its prompt.

    It may not for dead leaves, which show nothing to describe, and for negatives, which have their own prompts.
    """
    return [source != DEAD_LEAVES and captioner_of(config, source) != NEGATIVE for source, _, _ in places]


# --- memory of blocks -------------------------------------------------------------------------------------------------


def _reusable_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised uint8 array. Its memory is reused once no reference to the array is left.

    Without reuse, the system maps new memory for each block, and page faults take a tenth of the time.
    """
    size = int(np.prod(shape))
    reusable = [n for n, memory in enumerate(_free_buffers) if size <= len(memory) <= 2 * size]
    memory = _free_buffers.pop(reusable[0]) if reusable else mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8, size)  # views keep this array alive, so the finalizer waits for all of them
    weakref.finalize(array, _free, memory)
    return array.reshape(shape)


def _free(memory: mmap) -> None:
    _free_buffers.append(memory)
    del _free_buffers[:-MAX_FREE_BUFFERS]


# --- caches that all positions share ----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _mixture(weights: tuple[float, ...], seed: int) -> Mixture:
    return Mixture(weights, seed)


@lru_cache(maxsize=16)
def _degradation(preset: str, options: str) -> Degradation:
    return build_degradation(preset, **json.loads(options))


def _options(config: StreamConfig) -> str:
    return json.dumps(dict(config.degradation_options), sort_keys=True)
