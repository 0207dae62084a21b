"""`restoray evaluate` and `degrade`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.support import complete_preset, parse_options, plain
from pipelines.commands.words import Json, MaxMegabytes, MaxMegapixels, Overrides, RequiredPlace
from pipelines.core.console import Console
from pipelines.core.errors import EXIT_QUARANTINED, Failure, UsageError


def degrade(
    source: Annotated[Path | None, typer.Argument(metavar="IN", help="A folder of pictures, or one picture.")] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder of the results.")] = None,
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", "-p", autocompletion=complete_preset, help="Degradation preset, realesrgan by default."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed, 0 by default; with a picture's key it determines every random number.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--replay", metavar="RECORDS", help="Apply the plans of these records again.")
    ] = None,
    max_megapixels: MaxMegapixels = 50,
    max_megabytes: MaxMegabytes = None,
    as_json: Json = False,
) -> None:
    """Degrade pictures and record their plans, or replay recorded plans.

    KEY=VALUE sets the options of the preset, and png_level.
    """
    from pipelines.api.measuring import degrade_pictures
    from pipelines.api.options import picture_limits

    console, limits = Console(silent=as_json), picture_limits(max_megapixels, max_megabytes)
    if record is None and source is not None and out is not None and _is_option(out):
        # OUT is missing and an option took its place
        hint = f" A new folder of the name {out} needs its whole path."
        raise UsageError(f"degrade needs IN and OUT (or --replay RECORDS).{hint}")
    options = parse_options(overrides or [])
    result = degrade_pictures(source, out, preset, seed, record, options, limits, console)
    counts = f"{result.degraded} degraded, {result.skipped} done before, {result.quarantined} quarantined"
    sheet = [f"look at {result.sheet}"] if result.sheet else []
    console.result(plain(result), [f"{counts}; {result.folder}", *sheet])
    if result.differing:
        raise Failure(f"{len(result.differing)} pictures differ from their records, first {result.differing[0]}.")
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


def _is_option(out: Path) -> bool:
    """Whether an argument is a key=value text, not a folder."""
    key, equals, _ = str(out).partition("=")
    return bool(equals) and re.fullmatch(r"[a-z_][\w.]*", key) is not None and not out.is_dir()


def evaluate(
    restored: Annotated[str, typer.Argument(help="The folder of the restored pictures, here or in a store.")],
    lq: Annotated[str, typer.Option("--lq", help="The degraded inputs under the same names.")],
    out: RequiredPlace,
    hq: Annotated[
        str | None,
        typer.Option("--hq", help="The originals under the same names. Without them only metrics that need none work."),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="Name of a metric, ours or pyiqa's; may be repeated.")
    ] = None,
    max_megapixels: MaxMegapixels = 50,
    max_megabytes: MaxMegabytes = None,
    as_json: Json = False,
) -> None:
    """Score restored pictures, their inputs and a classical baseline, against the originals if there are any."""
    from components.evaluation.metrics import left_out
    from pipelines.api.measuring import evaluate as evaluate_pictures
    from pipelines.core.places.place import place_of

    console = Console(silent=as_json)
    if not metrics and (names := left_out()):
        console.say(f"The package pyiqa is not installed, so these metrics are left out: {', '.join(names)}.")
    summary = evaluate_pictures(
        restored,
        lq=lq,
        hq=hq,
        out=out,
        metrics=metrics,
        max_megapixels=max_megapixels,
        max_megabytes=max_megabytes,
        quiet=as_json,
    )
    console.result(
        plain(summary),
        [*(f"{name}: {text}" for name, text in summary.verdicts.items()), summary.verdict, str(place_of(out))],
    )
    raise typer.Exit(EXIT_QUARANTINED if summary.quarantined else 0)
