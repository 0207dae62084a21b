"""`restoray.dataset`: the training stream as a webdataset pipeline, for trainers outside this project."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipelines.api.settings import setting_texts
from pipelines.api.training import input_folder
from pipelines.core.errors import UsageError, unknown
from pipelines.stream.config import DEAD_LEAVES, StreamConfig
from pipelines.stream.rows import check_stream, load_columns, load_row
from pipelines.training.inputs import TrainInputs, stream_config
from pipelines.training.recipes import check_degradation, load_checked_recipe

if TYPE_CHECKING:
    from webdataset import DataPipeline

OWN = ("sources", "seed", "resolution", "degradation", "batch_size", "captioning", "degrade_on")
"""Fields of StreamConfig that `dataset` sets itself. Captioners of missing texts need a training's Ray."""

ARGUMENTS = ("degradation", "recipe", "resolution", "seed", "batch_size", "start", "stop")
SETTINGS = tuple(item.name for item in fields(StreamConfig) if item.name not in OWN)

Corpora = str | Path | Mapping[Any, Any]
PRESET, RESOLUTION = "realesrgan", 512


def dataset(
    corpus: Corpora,
    degradation: str | None = None,
    *,
    recipe: str | Path | None = None,
    resolution: int | None = None,
    seed: int | None = None,
    batch_size: int = 0,
    start: int = 0,
    stop: int | None = None,
    **settings: Any,
) -> DataPipeline:
    """Read curated corpora, degrade them and yield samples: a webdataset pipeline, for trainers outside this project.

    A sample is a function of the corpora, the settings, the seed and its position: the same as in `restoray train`, in
    the same order. Give the pipeline to a DataLoader with batch_size=None and any number of workers, or to
    webdataset.WebLoader; the order does not depend on it. In a distributed training (RANK and WORLD_SIZE, or
    torch.distributed) a rank gets its part of each global batch.

        data = restoray.dataset("corpus", "realesrgan", resolution=256, batch_size=16, seed=1)
        for batch in torch.utils.data.DataLoader(data, batch_size=None, num_workers=4):
            batch["lq"], batch["hq"]  # uint8 [16, 256, 256, 3]

    webdataset's methods work: `data.map(...)`, `data.to_tuple("lq", "hq")`, `data.slice(1000)`.

    Args:
        corpus: folder of a curated corpus, here or in a store; or a mapping of folders to weights, in which
            "dead_leaves" is a source too. With a recipe: the folder of its source `corpus`, or folders by source.
        degradation: a preset (`restoray.recipes()["degradations"]`), realesrgan by default; "" for none: lq equals hq.
        recipe: the stream of this recipe's training; `settings` then change the recipe. What a training degrades on its
            device is degraded here, by the same plan.
        resolution: side of the square samples in pixels; the recipe's, or 512.
        seed: of order, crops, flips and degradation; the recipe's, or 0.
        batch_size: samples of a batch; 0 yields single samples.
        start: position of the first sample. A training that goes on starts where it stopped, at a whole global batch.
        stop: position after the last sample; None for an endless stream.
        settings: of the stream, as in a recipe: short_side, scale, crop, flip, captioner, prompt, pairs, buckets,
            split, degradation_options and others (StreamConfig).

    Returns:
        A pipeline of mappings. A sample has `__key__`, `position`, `hq` and `lq` (uint8 [H, W, 3]), `prompt`, `plan` (a
        mapping: what the degradation did), `sizes` (int64 [6], SDXL's size ids) and `replaced` (errors of unreadable
        samples that this one replaces). A batch has arrays of B, and lists of `__key__`, `prompt`, `plan`, `replaced`.

    Raises:
        UsageError: an unknown preset, setting or corpus, or positions that are not whole batches.
        Failure: a split is empty, or (from the iteration) sixteen samples in a row are unusable.
    """
    import webdataset

    if batch_size < 0 or start < 0 or (stop is not None and stop <= start):
        raise UsageError(
            f"batch_size and start must be at least 0 and stop above start, got {batch_size}, {start}, {stop}."
        )
    unit = max(1, batch_size)
    if start % unit or (stop is not None and stop % unit):
        raise UsageError(f"start and stop must be multiples of batch_size ({batch_size}), got {start} and {stop}.")
    if recipe is not None:
        if degradation is not None:
            raise UsageError("a recipe has its own degradation: degradation__preset=... changes it.")
        numbers = {name: value for name, value in (("resolution", resolution), ("seed", seed)) if value is not None}
        config = _stream_of_recipe(str(recipe), corpus, {**settings, **numbers})
    else:
        config = _stream(corpus, PRESET if degradation is None else degradation, resolution, seed or 0, unit, settings)
    check_stream(config)
    units = Units(start // unit, None if stop is None else stop // unit)
    pipeline = webdataset.compat.FluidWrapper(units)
    return pipeline.compose(webdataset.split_by_node, webdataset.split_by_worker, Rows(config, batch_size))


def _stream(
    corpus: Corpora, degradation: str, resolution: int | None, seed: int, unit: int, settings: Mapping[str, Any]
) -> StreamConfig:
    """Return the stream of the arguments of `dataset`. Raises UsageError for an unknown setting or preset."""
    for name in settings:
        if name not in SETTINGS:
            raise unknown("setting", name, (*SETTINGS, *ARGUMENTS))
    check_degradation(degradation or "none", settings.get("degradation_options", {}))
    weights = {corpus: 1.0} if isinstance(corpus, str | Path) else dict(corpus)
    return StreamConfig(
        sources=tuple((_source(name), float(weight)) for name, weight in weights.items()),
        seed=seed,
        resolution=RESOLUTION if resolution is None else resolution,
        degradation=degradation,
        batch_size=unit,
        **settings,
    )


def _stream_of_recipe(recipe: str, corpus: Corpora, settings: Mapping[str, Any]) -> StreamConfig:
    """Return the stream of a recipe's training. Raises UsageError for an unknown recipe, setting or source."""
    resolved = load_checked_recipe(recipe, setting_texts(settings))
    folders = {"corpus": corpus} if isinstance(corpus, str | Path) else dict(corpus)
    inputs = TrainInputs(corpora={str(name): input_folder(str(name), folder) for name, folder in folders.items()})
    return replace(stream_config(resolved, inputs.absolute()), degrade_on="stream")


def _source(name: str | Path) -> str:
    """The absolute folder of a corpus on this machine, or the name of a source without one."""
    return DEAD_LEAVES if name == DEAD_LEAVES else str(input_folder("corpus", name).absolute())


@dataclass(frozen=True)
class Units:
    """First stage: the numbers of the batches, or of the samples; picklable."""

    start: int
    stop: int | None

    def __call__(self) -> Iterator[int]:
        return itertools.count(self.start) if self.stop is None else iter(range(self.start, self.stop))


@dataclass(frozen=True)
class Rows:
    """Last stage: the samples at their positions; picklable.

    Attributes:
        config: of the stream.
        batch_size: samples of a batch; 0 for single samples.
    """

    config: StreamConfig
    batch_size: int

    def __call__(self, units: Iterable[int]) -> Iterator[dict[str, Any]]:
        cv2.setNumThreads(1)  # a worker has one core, and OpenCV's threads do not survive a fork
        for number in units:
            if self.batch_size:
                first = number * self.batch_size
                yield _batch(load_columns(self.config, range(first, first + self.batch_size)))
            else:
                row = load_row(self.config, number)
                yield _named(row) | {"plan": json.loads(row["plan"]), "position": number}


def _batch(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    texts = {name: column.tolist() for name, column in columns.items() if column.dtype == object}
    return _named({**columns, **texts}) | {"plan": [json.loads(plan) for plan in texts["plan"]]}


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sample under webdataset's names; without degradation lq is hq."""
    sample = {
        "__key__": row["key"],
        **{name: value for name, value in row.items() if name not in ("key", "uncaptioned")},
    }
    sample.setdefault("lq", sample["hq"])
    return sample
