"""`restoray.degrade` and `restoray.evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.images import Limits
from pipelines.api.options import picture_limits
from pipelines.core.console import Console
from pipelines.core.errors import UsageError
from pipelines.core.places.place import place_of
from pipelines.core.places.working_copy import local_copy, working_copy
from pipelines.evaluation.degrade import DegradeResult, degrade_folder
from pipelines.evaluation.degrade import replay as replay_records
from pipelines.evaluation.evaluate import Summary
from pipelines.evaluation.evaluate import evaluate as evaluate_pictures


def degrade(
    source: str | Path | None = None,
    out: str | Path | None = None,
    *,
    preset: str | None = None,
    seed: int | None = None,
    replay: str | Path | None = None,
    max_megapixels: float = 50,
    max_megabytes: float | None = None,
    quiet: bool = False,
    **options: Any,
) -> DegradeResult:
    """Degrade pictures and record their plans, or replay recorded plans.

    Args:
        source: a folder of pictures, or one picture.
        out: folder of the results; a replay without it takes the folder `replayed` beside the records.
        preset: a degradation (`restoray.recipes()["degradations"]`), realesrgan by default.
        seed: 0 by default; with a picture's key it determines every random number.
        replay: records.jsonl of an earlier job, whose plans are applied again.
        max_megapixels, max_megabytes: larger inputs are quarantined.
        quiet: print no progress on standard error.
        options: of the preset, and png_level (0 to 9).

    Returns:
        DegradeResult: counts, `folder`, `records` (one line of JSON for each picture, with its plan), `sheet`, and in a
        replay `differing`, the keys of pictures that differ from their records.

    Raises:
        UsageError: an unknown preset or option, no pictures, or options together with `replay`.
        Failure: `out` cannot be written.
    """
    limits, console = picture_limits(max_megapixels, max_megabytes), Console(silent=quiet)
    src, target = (None if place is None else Path(place) for place in (source, out))
    return degrade_pictures(
        src, target, preset, seed, None if replay is None else Path(replay), options, limits, console
    )


def degrade_pictures(
    source: Path | None,
    out: Path | None,
    preset: str | None,
    seed: int | None,
    record: Path | None,
    options: Mapping[str, Any],
    limits: Limits,
    console: Console,
) -> DegradeResult:
    """Degrade a folder, or replay its records; see `degrade`."""
    if record is not None:
        if options or preset is not None or seed is not None:
            raise UsageError("--replay takes no preset, seed or options: the records hold them.")
        if source is not None and out is None:
            raise UsageError(
                "--replay takes IN and OUT, or neither: then OUT is the folder `replayed` next to the records."
            )
        with console.bar("replay") as progress:
            return replay_records(record, source, out or record.parent / "replayed", progress=progress, limits=limits)
    if source is None or out is None:
        raise UsageError("degrade needs IN and OUT (or --replay RECORDS).")
    rest = dict(options)
    level = {name: rest.pop(name) for name in ("png_level",) if name in rest}
    with console.bar("degrade") as progress:
        return degrade_folder(source, out, preset or "realesrgan", rest, seed or 0, progress, limits, **level)


def evaluate(
    restored: str | Path,
    *,
    lq: str | Path,
    out: str | Path,
    hq: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    max_megapixels: float = 50,
    max_megabytes: float | None = None,
    quiet: bool = False,
) -> Summary:
    """Score restored pictures, their inputs and a classical baseline, against the originals if there are any.

    Args:
        restored: folder of the restored pictures. lq: of the degraded inputs. hq: of the originals; without it only
            metrics that need none work. Pictures are paired by name; the folders may be in a store.
        out: folder of scores.jsonl and summary.json; here or in a store.
        metrics: names, ours or pyiqa's; None takes the default set.
        max_megapixels, max_megabytes: larger pictures are not scored.
        quiet: print no progress on standard error.

    Returns:
        Summary: `verdict`, `means` (arm -> metric -> mean), `comparisons`, `missing`.

    Raises:
        UsageError: a folder does not exist, or a metric is unknown or cannot be used here.
        Failure: a metric's weights are missing, `out` cannot be written, or no picture could be scored.
    """
    limits, place = picture_limits(max_megapixels, max_megabytes), place_of(out)
    originals = local_copy(place_of(hq)) if hq is not None else None
    pictures, inputs = local_copy(place_of(restored)), local_copy(place_of(lq))
    with working_copy(place) as folder, Console(silent=quiet).bar("evaluate") as progress:
        return evaluate_pictures(pictures, inputs, originals, folder, metrics or None, progress=progress, limits=limits)
