"""Held-out pictures of a corpus, degraded with a fixed seed: the pairs that a trained model is measured on.

<out>/hq/KEY.png, <out>/lq/KEY.png    target and input of the same size; both sides are multiples of 16
<out>/heldout.jsonl                   one line per pair: key, position, settings (digest), hq_sha256, lq_sha256, plan
<out>/quarantine.jsonl                one line per held-out picture that could not be prepared
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from components.degradations import build_degradation
from components.images import center_crop, decode, encode_png, resize_short_side, to_float, to_uint8
from components.types import Degradation, Image, SampleError
from components.writing import replace_file
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import Failure, UsageError
from pipelines.core.pictures import make_keys
from pipelines.core.rows import read_lines, write_lines
from pipelines.corpus.columns.reading import Column, open_column
from pipelines.corpus.shards import SPLIT, STORED_LIMITS, open_corpus, read_sample

SIDE_MULTIPLE = 16  # latents are an eighth of the picture and some networks halve them twice; smaller priors need less


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """A prepared set.

    Attributes:
        hq, lq: folders of targets and inputs.
        new, reused: number of pairs written now, and of pairs from an earlier run.
        quarantined: number of pictures that could not be prepared.
    """

    hq: Path
    lq: Path
    new: int
    reused: int
    quarantined: int


def prepare_heldout(
    corpus_dir: Path,
    out: Path,
    preset: str,
    preset_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    short_side: int = 256,
    limit: int | None = None,
    pairs: str = "",
    progress: Progress | None = None,
) -> Heldout:
    """Write degraded pairs of a corpus's held-out pictures. Correct pairs of an earlier run stay.

    Args:
        preset, preset_options: for `build_degradation`.
        seed: of the degradation, which also depends on the key and on the picture's position in the split.
        short_side: pixels; each picture is resized to it and cropped in the middle to multiples of 16.
        limit: number of pictures, from the split's start; None takes all.
        pairs: column of the corpus with each picture's own input; `preset` is then "none".

    Raises:
        UsageError: there is no corpus or no held-out picture, a preset or option is unknown, or short_side is below 16.
        Failure: `out` cannot be written, or not one picture could be prepared.
    """
    if short_side < SIDE_MULTIPLE:
        raise UsageError(f"short_side must be at least {SIDE_MULTIPLE} pixels, got {short_side}")
    corpus = open_corpus(corpus_dir)
    count = len(corpus.split(SPLIT))
    if not count:
        raise UsageError(f"{corpus_dir} holds no held-out pictures")
    count = count if limit is None else min(count, limit)
    try:
        degradation = build_degradation(preset, **(preset_options or {}))
    except ValueError as error:
        raise UsageError(str(error)) from error
    document = {
        "corpus": corpus.digest,
        "preset": preset,
        "options": dict(preset_options or {}),
        "seed": seed,
        "short_side": short_side,
        **({"pairs": pairs} if pairs else {}),
    }
    settings = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    hq, lq, records = out / "hq", out / "lq", out / "heldout.jsonl"
    inputs = open_column(corpus, pairs) if pairs else None
    report = progress or no_progress
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    reused = 0
    try:
        hq.mkdir(parents=True, exist_ok=True)
        lq.mkdir(exist_ok=True)
        earlier_rows = {row["key"]: row for row in read_lines(records) if row["settings"] == settings}
        # Keys that differ in case only get other names, as in every list of pictures that reads these folders.
        keys = make_keys([f"{corpus.split(SPLIT).locate(position)[1]['key']}.png" for position in range(count)])
        for position, key in enumerate(keys):
            shard = corpus.split(SPLIT).locate(position)[0]
            row = earlier_rows.get(key)
            if row is not None and row["position"] == position and _intact(out, row):
                rows.append(row)
                reused += 1
            else:
                try:
                    data = read_sample(corpus, SPLIT, position)
                    own = _own_input(inputs, position, key) if inputs else None
                    pair = _make_pair(data, key, degradation, seed, position, short_side, out, own)
                    rows.append({**pair, "settings": settings})
                except SampleError as error:
                    reason = {"stage": "heldout", "code": error.code, "detail": error.detail, "bytes_sha256": ""}
                    rejects.append({"key": key, "source": f"{SPLIT}/{shard.name}", **reason})
            report(position + 1, count, key)
        # Remaining pairs of another limit, seed or corpus would be restored and scored as part of this set.
        names = {f"{row['key']}.png" for row in rows}
        for stale in (path for folder in (hq, lq) for path in folder.iterdir() if path.name not in names):
            stale.unlink()
        write_lines(records, rows)
        write_lines(out / "quarantine.jsonl", rejects)
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
    if not rows:
        raise Failure(f"none of the {count} held-out pictures could be prepared: {rejects[0]['detail']}")
    return Heldout(hq=hq, lq=lq, new=len(rows) - reused, reused=reused, quarantined=len(rejects))


def _make_pair(
    data: bytes,
    key: str,
    degradation: Degradation,
    seed: int,
    position: int,
    short_side: int,
    out: Path,
    own: Image | None = None,
) -> dict[str, Any]:
    """Write one pair and return its record. The input is `own`, or the degraded picture where that is None."""
    target = resize_short_side(decode(data, STORED_LIMITS, key), short_side)
    if own is not None:
        how = cv2.INTER_AREA if own.shape[0] > target.shape[0] else cv2.INTER_CUBIC
        own = np.asarray(cv2.resize(own, target.shape[1::-1], interpolation=how), np.uint8)
    height, width = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in target.shape[:2])
    target = center_crop(target, height, width)
    plan = degradation.draw(seed, key, position)
    if own is None:
        degraded = to_uint8(degradation.apply(to_float(target), plan))
    else:
        degraded = center_crop(own, height, width)
    digests = {}
    for name, image in (("hq", target), ("lq", degraded)):
        png = encode_png(image, {"software": "restoray", "key": key})
        replace_file(out / name / f"{key}.png", png)
        digests[f"{name}_sha256"] = hashlib.sha256(png).hexdigest()
    return {"key": key, "position": position, **digests, "plan": dict(plan)}


def _own_input(inputs: Column, position: int, key: str) -> Image:
    data = inputs.value(SPLIT, position)
    if not isinstance(data, bytes):
        raise SampleError("no_pair", f"there is no input for it in column {inputs.name}", key)
    return decode(data, STORED_LIMITS, key)


def _intact(out: Path, row: Mapping[str, Any]) -> bool:
    """Whether both files have the sha256 of the record."""
    try:
        return all(
            hashlib.sha256((out / name / f"{row['key']}.png").read_bytes()).hexdigest() == row[f"{name}_sha256"]
            for name in ("hq", "lq")
        )
    except OSError:
        return False
