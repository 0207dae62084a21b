"""Texts of the stream's rows: whose words they are, and who is asked where there are none.

A caption that a captioner writes while training runs is a function of (picture, captioner): it is the same on any
number of workers and after a resume, and a cache on disk keeps it (pipelines.caption.CaptionerPool). A block's missing
captions are asked for at once, in the data task that makes the block; the captioners are actors, wherever Ray has room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from components.captions.views import View, needs_lq, view_for
from components.types import Image, SampleError
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from components.recipes import Recipe

CAPTIONERS = ("manifest", "tags", "negative", "column:NAME")
COLUMN = "column:"
NEGATIVE = "negative"


class Answers(Protocol):
    """Who writes captions; pipelines.caption.CaptionerPool is one. It travels to the data tasks."""

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        """A text, or why there is none, for each picture by its sha256."""


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Who is asked for missing captions, and what the captioner sees.

    Attributes:
        pool: see Answers.
        view: makes the picture of hq and lq; preview is None in a stream. Called in the data task.
    """

    pool: Answers
    view: View

    @property
    def needs_lq(self) -> bool:
        return needs_lq(self.view)

    def write(self, keys: Sequence[str], hqs: Sequence[Image], lqs: Sequence[Image | None]) -> list[tuple[str, str]]:
        """(caption, "") of each row, or ("", "[code] key: why there is none")."""
        from pipelines.caption import picture_sha256

        found: dict[int, str | SampleError] = {}
        pictures: dict[int, Image] = {}
        for n, (hq, lq) in enumerate(zip(hqs, lqs, strict=True)):
            try:
                pictures[n] = self.view(hq=hq, lq=lq, preview=None)
            except SampleError as error:
                found[n] = error
            except Exception as error:  # noqa: BLE001 - a system's view may do anything; one picture never ends a run
                found[n] = SampleError("failed", f"the view fails: {type(error).__name__}: {error}")
        if pictures:
            images = list(pictures.values())
            answers = self.pool.answers(images, [picture_sha256(image) for image in images])
            found |= zip(pictures, answers, strict=True)
        return [
            (answer, "") if isinstance(answer, str) else ("", f"[{answer.code}] {key}: {answer.detail}")
            for key, answer in zip(keys, (found[n] for n in range(len(keys))), strict=True)
        ]


def known_captioner(name: str) -> bool:
    """Whether a stream takes its words from there."""
    return name in ("", *CAPTIONERS[:3]) or name.startswith(COLUMN)


def caption_missing(
    captioning: Captioning,
    columns: Mapping[str, MutableSequence[Any]] | MutableMapping[str, Any],
    askable: Sequence[bool],
) -> None:
    """Write a captioner's words into rows without a prompt: all of a block in one question.

    Args:
        columns: of rows: key, hq, lq (absent where it equals hq), prompt, uncaptioned, and embeddings_known where the
            rows bring embeddings along, which are of other words then. Prompts and what follows are written.
        askable: rows that may be asked for.
    """
    rows = [n for n, may in enumerate(askable) if may and not columns["prompt"][n].strip()]
    if not rows:
        return
    lqs = columns["lq"] if "lq" in columns else columns["hq"]
    written = captioning.write(*([column[n] for n in rows] for column in (columns["key"], columns["hq"], lqs)))
    for n, (caption, reason) in zip(rows, written, strict=True):
        columns["prompt"][n], columns["uncaptioned"][n] = caption, reason
        if caption and "embeddings_known" in columns:
            columns["embeddings_known"][n] = False


# --- on the driver ----------------------------------------------------------------------------------------------------


def check_missing_captions(recipe: Recipe) -> None:
    """Find while a recipe is loaded what would else end a training; fetches nothing.

    Raises:
        UsageError: no such view, or one that sees nothing, or no captioner can have that name.
    """
    from components.captions.presets import HUB_ID, PRESETS
    from components.naming import did_you_mean
    from components.systems import SYSTEMS

    asked = recipe.missing_captions
    try:
        view = view_for(recipe, asked.view, SYSTEMS[recipe.system].views)
    except ValueError as error:
        raise UsageError(f"missing_captions.view: {error}") from error
    model = asked.model
    if model and needs_lq(view) and recipe.degradation.degrade_on == "device":
        raise UsageError("missing_captions.view: lq is made on the device, where no captioner sees it: choose hq.")
    if model and model not in PRESETS and not Path(model).expanduser().is_dir() and not HUB_ID.fullmatch(model):
        raise UsageError(
            f"missing_captions.model: {model!r} is no preset, folder or hub id. {did_you_mean(model, PRESETS)}"
        )


@contextmanager
def running_captioners(recipe: Recipe) -> Iterator[Captioning | None]:
    """The captioners that a recipe asks for missing captions, started in the Ray that runs, and stopped at the end.

    Raises:
        UsageError: no such captioner or view, or this Ray has no room for them beside the trainers.
        Failure: the captioner cannot be loaded.
    """
    asked, placement = recipe.missing_captions, recipe.placement
    if not asked.model:
        yield None
        return
    import ray

    from components.corpora import CaptionSpec
    from components.systems import SYSTEMS
    from pipelines.caption import start_captioner_pool
    from pipelines.home import cache_folder

    check_missing_captions(recipe)
    trainers = placement.workers * placement.cpus_per_worker
    wanted, there = trainers + placement.captioners * placement.cpus_per_captioner + 1, ray.cluster_resources()
    if there.get("CPU", 0.0) < wanted:
        raise UsageError(
            f"{recipe.name}: trainers, captioners and one data task need {wanted:g} CPUs, and Ray has "
            f"{there.get('CPU', 0.0):g}: lower placement.captioners or placement.cpus_per_captioner."
        )
    spec = CaptionSpec(
        model=asked.model,
        revision=asked.revision,
        prompt=asked.prompt,
        max_tokens=asked.max_tokens,
        batch_size=asked.batch_size,
        workers=placement.captioners,
        num_gpus=placement.gpus_per_captioner,
    )
    cache = Path(placement.caption_cache).expanduser().absolute() if placement.caption_cache else None
    pool = start_captioner_pool(spec, cache or cache_folder() / "captions", placement.cpus_per_captioner)
    try:
        yield Captioning(pool=pool, view=view_for(recipe, asked.view, SYSTEMS[recipe.system].views))
    finally:
        pool.close()
