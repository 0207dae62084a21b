"""Judge whether precomputed columns fit a training stream: it must use the same prior, crop, size and captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.core.errors import UsageError

WHAT = ("latents", "embeddings")
CROP = "short side resized, middle square"


def split_embeddings(producer: Mapping[str, Any], value: np.ndarray) -> dict[str, np.ndarray]:
    """A row of the embeddings column as {"text": [L, D], "pooled": [P]}; both are views.

    Args:
        producer: producer of the column.
        value: [L * D + P].
    """
    length, width = producer["layout"]["text"]
    return {"text": value[: length * width].reshape(length, width), "pooled": value[length * width :]}


def check_precomputed(producer: Mapping[str, Any], stream: Any, model_digest: str = "") -> None:
    """Refuse a column whose values differ from those that a training stream would compute.

    Args:
        producer: producer of a column of `precompute`.
        stream: settings of the stream: a dataclass (stream.config.StreamConfig) or a mapping with the same names.
            This function reads sources, resolution, short_side, scale, buckets, flip, turn, relight, crop ("random" by
            default), degradation, degradation_options and captioner.
        model_digest: digest of the prior in training; "" skips this check.

    Raises:
        UsageError: one sentence with everything that does not fit.
    """
    settings = dict(stream) if isinstance(stream, Mapping) else _fields(stream)
    if producer.get("name") not in WHAT:
        raise UsageError(
            f"a column of {producer.get('name')!r} is not precomputed for training: {', '.join(WHAT)} are."
        )
    reasons = []
    if model_digest and producer["model_digest"] != model_digest:
        reasons.append(f"they were computed with prior {producer['model']} ({producer['model_digest'][:12]})")
    synthetic = [source for source in _sources(settings) if source == "dead_leaves"]
    if synthetic:
        reasons.append("dead leaves are made while they stream and have none")
    reasons += (
        _latent_reasons(producer, settings) if producer["name"] == "latents" else _text_reasons(producer, settings)
    )
    if reasons:
        raise UsageError(f"the precomputed {producer['name']} do not fit this stream: {'; '.join(reasons)}.")


def _latent_reasons(producer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    side, reasons = producer["resolution"], []
    if settings["resolution"] != side:
        reasons.append(f"they hold {side} px squares and the rows have {settings['resolution']} px")
    if settings.get("short_side") not in (None, 0, side):
        reasons.append(
            f"pictures were resized to a short side of {side} px, and short_side is {settings['short_side']}"
        )
    if tuple(settings.get("scale") or (1.0, 1.0)) != (1.0, 1.0):
        reasons.append("scale draws another size for each row")
    if settings.get("buckets"):
        reasons.append("buckets cut other shapes")
    if settings.get("flip", True):
        reasons.append("flip mirrors half of the rows")
    if settings.get("turn"):
        reasons.append("turn rotates rows")
    if settings.get("relight"):
        reasons.append("relight changes their light")
    if settings.get("crop", "random") != "center":
        reasons.append("rows are cropped at random and they hold the middle square")
    preset = settings.get("degradation", "")
    if preset and not _keeps_target(preset, settings.get("degradation_options") or {}):
        reasons.append(f"degradation {preset} sharpens its targets")
    return reasons


def _text_reasons(producer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    captioner, column = settings.get("captioner", ""), producer["captions"].get("column", "")
    if not column and captioner not in ("manifest", "negative"):
        return [f'they are of the corpus\' own captions (captioner "manifest"), and captioner is "{captioner}"']
    if column and captioner != f"column:{column}":
        return [f'they are of the text column "{column}" (captioner "column:{column}"), and captioner is "{captioner}"']
    return []


def _keeps_target(preset: str, options: Mapping[str, Any]) -> bool:
    """Whether a degradation trains towards the picture itself; tried on a picture with edges."""
    from components.degradations import build_degradation

    probe = np.zeros((32, 32, 3), np.float32)
    probe[8:24, 8:24] = (1.0, 0.5, 0.25)
    return bool(np.array_equal(build_degradation(preset, **options).target(probe.copy()), probe))


def _sources(settings: Mapping[str, Any]) -> list[str]:
    sources = settings.get("sources") or ()
    return [str(source if isinstance(source, str) else source[0]) for source in sources]


def _fields(stream: Any) -> dict[str, Any]:
    return {field.name: getattr(stream, field.name) for field in dataclasses.fields(stream)}
