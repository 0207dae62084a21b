"""Caption a finished corpus: a column with a caption for every sample.

Captions that the corpus brought along pass through, unless the spec overwrites them. The others come from an actor pool
around a captioner of components.captions, or from an engine (caption_engine.py).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.captions.identity import CaptionerPlan
from components.captions.presets import TAGS, open_captioner
from components.captions.text import join_texts, split_texts
from components.captions.views import View, find_view
from components.corpora import CaptionSpec
from components.types import Image, SampleError
from pipelines.core.console import Progress
from pipelines.core.devices import check_gpus
from pipelines.core.errors import UsageError, unknown
from pipelines.core.placement import needs_of
from pipelines.core.pool import Pool
from pipelines.corpus.columns.caption_engine import run_engine, vllm_processor
from pipelines.corpus.columns.captioners import captioner_plan, captions_or_errors
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.spec import ColumnSpec, Runner, Value, Worker

ENGINES = ("transformers", "vllm")
EXTRA = "captions-vllm"


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """How a corpus is captioned, besides its spec.

    Attributes:
        engine: transformers, or vllm (extra captions-vllm; chat models only; num_gpus is then its tensor parallelism).
        view: name of the view whose picture is captioned; a picture of the corpus is its hq and its lq.
        views: views of a system, by name.
        max_bad_fraction: largest share of pictures without a caption.
    """

    engine: str = "transformers"
    view: str = "hq"
    views: Mapping[str, View] = field(default_factory=dict)
    max_bad_fraction: float = 0.5


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """The result of a caption run.

    Attributes:
        column, folder: name and folder of the column.
        producer: identity of the captioner, and the engine.
        samples: number of rows.
        given: captions that came with the corpus.
        quarantined: pictures without a caption.
        reasons: quarantined pictures by code.
        reused: shards that an earlier run captioned.
        seconds: wall time.
    """

    column: str
    folder: Path
    producer: Mapping[str, Any]
    samples: int
    given: int
    quarantined: int
    reasons: Mapping[str, int]
    reused: int
    seconds: float


def caption_corpus(
    corpus_dir: str | Path,
    spec: CaptionSpec,
    name: str = "captions",
    options: CaptionOptions = CaptionOptions(),
    progress: Progress | None = None,
) -> CaptionResult:
    """Caption a finished corpus: column `name` of kind text. A second run repeats nothing.

    Args:
        corpus_dir: a curated corpus; it does not change.
        spec: captioner, prompt and pool. 0 workers work in this process. With `overwrite`, pictures that have a caption
            are captioned too, and a column of another captioner is replaced.
        name: name of the column.
        options: engine, view and tolerance.
        progress: called with counts of samples.

    Raises:
        UsageError: there is no such corpus, captioner, engine or view, or a column of another captioner.
        Failure, RetryLater: see `compute_column`.
    """
    engine = options.engine
    if engine not in ENGINES:
        raise unknown("caption engine", engine, ENGINES)
    if engine == "vllm" and spec.model == TAGS:
        raise UsageError('the captioner "tags" has no model, so no engine can run it.')
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UsageError(f'the engine vllm is not installed: pip install "restoray[{EXTRA}]".')
    plan = captioner_plan(spec)
    try:
        find_view(options.view, options.views)
    except ValueError as error:
        raise UsageError(f"{error}") from error
    producer = {**plan.identity, "view": options.view, "overwrite": spec.overwrite}
    run: Runner | None = None
    if plan.model != TAGS:
        producer["engine"] = engine
    if engine == "vllm":
        run = functools.partial(run_engine, processor=functools.partial(vllm_processor, plan, spec))
    column = ColumnSpec(
        name=name,
        kind="text",
        producer=producer,
        factory=functools.partial(_caption_worker, plan, options),
        existing=None if spec.overwrite else existing_caption,
        batch_size=spec.batch_size,
        short_side_px=int(plan.identity["short_side_px"]),
    )
    check_gpus(spec)
    pool = Pool(workers=spec.workers, num_gpus=spec.num_gpus).placed(needs_of(spec.placement))
    result = compute_column(corpus_dir, column, pool, spec.overwrite, options.max_bad_fraction, progress, run)
    return CaptionResult(
        column=result.name,
        folder=result.folder,
        producer=producer,
        samples=result.samples,
        given=result.given,
        quarantined=result.quarantined,
        reasons=result.reasons,
        reused=result.reused,
        seconds=result.seconds,
    )


def existing_caption(entry: Mapping[str, Any]) -> Value | None:
    """The caption that a sample brought along, tidied, with all its texts; None for a sample without one."""
    return join_texts(split_texts(str(entry.get("caption") or ""))) or None


def _caption_worker(plan: CaptionerPlan, options: CaptionOptions) -> Worker:
    captioner, view = open_captioner(plan), find_view(options.view, options.views)

    def caption(images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
        return captions_or_errors(captioner, [view(hq=image, lq=image, preview=None) for image in images])

    return caption
