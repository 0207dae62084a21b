"""Captions of the stream's rows, and captioners that write missing ones during training.

A caption that a captioner writes is a function of (picture, captioner). So it is the same on any number of workers and
after a resume; CaptionerPool also caches it on disk. The data task that makes a block requests all its missing captions
in one call. The captioners are Ray actors on any node with free resources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.captions.presets import HUB_ID, PRESETS
from components.captions.text import split_texts
from components.captions.views import View, view_for
from components.corpora import CaptionSpec
from components.naming import did_you_mean
from components.randomness import generator
from components.systems import SYSTEMS
from components.types import Image, SampleError
from pipelines.core.errors import UsageError
from pipelines.core.home import cache_folder
from pipelines.corpus.columns.captioners import picture_sha256, start_captioner_pool

if TYPE_CHECKING:
    from components.recipes import Recipe

CAPTIONERS = ("manifest", "tags", "negative", "column:NAME")
COLUMN = "column:"
NEGATIVE = "negative"


class Answers(Protocol):
    """A pool of captioners, such as pipelines.corpus.columns.captioners.CaptionerPool; pickled into the data tasks."""

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        """Return a caption, or the error, for each picture; sha256s are those of the pixels, for the cache."""


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """The captioners of missing captions, and their view.

    Attributes:
        pool: the captioners.
        view: makes the picture to caption from hq and lq, in the data task; preview is None in a stream.
    """

    pool: Answers
    view: View

    @property
    def needs_lq(self) -> bool:
        return self.view.needs_lq

    def write(self, keys: Sequence[str], hqs: Sequence[Image], lqs: Sequence[Image | None]) -> list[tuple[str, str]]:
        """Return (caption, "") or ("", "[code] key: reason") for each row."""
        results: dict[int, str | SampleError] = {}
        pictures: dict[int, Image] = {}
        for n, (hq, lq) in enumerate(zip(hqs, lqs, strict=True)):
            try:
                pictures[n] = self.view(hq=hq, lq=lq, preview=None)
            except SampleError as error:
                results[n] = error
            except Exception as error:  # noqa: BLE001 - a system's view may raise any error; the run goes on
                results[n] = SampleError("failed", f"the view fails: {type(error).__name__}: {error}")
        if pictures:
            images = list(pictures.values())
            answers = self.pool.answers(images, [picture_sha256(image) for image in images])
            results |= zip(pictures, answers, strict=True)
        return [
            (answer, "") if isinstance(answer, str) else ("", f"[{answer.code}] {key}: {answer.detail}")
            for key, answer in zip(keys, (results[n] for n in range(len(keys))), strict=True)
        ]


def draw_text(caption: str, seed: int, key: str, position: int) -> str:
    """Return one of a sample's texts, drawn by (seed, key, position); see components.captions.text."""
    texts = split_texts(caption)
    if len(texts) < 2:
        return caption
    return texts[int(generator(seed, "caption", key, position).integers(0, len(texts)))]


def is_captioner(name: str) -> bool:
    """Whether StreamConfig.captioner may have this value."""
    return name in ("", *CAPTIONERS[:3]) or name.startswith(COLUMN)


def caption_missing(
    captioning: Captioning,
    columns: Mapping[str, MutableSequence[Any]] | MutableMapping[str, Any],
    may_caption: Sequence[bool],
) -> None:
    """Caption the rows without a prompt, in one call for all of a block.

    Args:
        captioning: the captioners.
        columns: fields of the rows: key, hq, lq (absent if it equals hq), prompt, uncaptioned, and embeddings_known if
            the rows have embeddings. The function writes prompt and uncaptioned, and sets embeddings_known to false
            for new prompts.
        may_caption: whether a row may get a caption.
    """
    rows = [n for n, may in enumerate(may_caption) if may and not columns["prompt"][n].strip()]
    if not rows:
        return
    lqs = columns["lq"] if "lq" in columns else columns["hq"]
    captions = captioning.write(*([column[n] for n in rows] for column in (columns["key"], columns["hq"], lqs)))
    for n, (caption, reason) in zip(rows, captions, strict=True):
        columns["prompt"][n], columns["uncaptioned"][n] = caption, reason
        if caption and "embeddings_known" in columns:
            columns["embeddings_known"][n] = False


# --- on the driver ----------------------------------------------------------------------------------------------------


def check_missing_captions(recipe: Recipe) -> None:
    """Check missing_captions of a recipe while it is loaded; fetches nothing.

    Raises:
        UsageError: the view does not exist or has no picture, or the captioner's name is invalid.
    """
    settings = recipe.missing_captions
    try:
        view = view_for(recipe, settings.view, SYSTEMS[recipe.system].views)
    except ValueError as error:
        raise UsageError(f"missing_captions.view: {error}") from error
    model = settings.model
    if model and view.needs_lq and recipe.degradation.degrade_on == "device":
        raise UsageError("missing_captions.view: lq is made on the device, and captioners need it earlier: choose hq.")
    if model and model not in PRESETS and not Path(model).expanduser().is_dir() and not HUB_ID.fullmatch(model):
        raise UsageError(
            f"missing_captions.model: {model!r} is not a preset, folder or hub id. {did_you_mean(model, PRESETS)}"
        )


@contextmanager
def running_captioners(recipe: Recipe) -> Iterator[Captioning | None]:
    """Start the captioners of a recipe in the running Ray, and stop them at the end; None if the recipe has none.

    Raises:
        UsageError: the captioner or view does not exist.
        Failure: the captioner cannot be loaded.
    """
    settings, placement = recipe.missing_captions, recipe.placement
    if not settings.model:
        yield None
        return
    check_missing_captions(recipe)
    spec = CaptionSpec(
        model=settings.model,
        revision=settings.revision,
        prompt=settings.prompt,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        workers=placement.captioners,
        num_gpus=placement.gpus_per_captioner,
    )
    cache = Path(placement.caption_cache).expanduser().absolute() if placement.caption_cache else None
    pool = start_captioner_pool(spec, cache or cache_folder() / "captions", placement.cpus_per_captioner)
    try:
        yield Captioning(pool=pool, view=view_for(recipe, settings.view, SYSTEMS[recipe.system].views))
    finally:
        pool.close()
