"""`restoray analyze STUDY`: the sub-commands. Thin, as cli.py: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli_support import Command, Device, complete_preset, local_model, parse_options, plain
from pipelines.console import Console
from pipelines.errors import EXIT_QUARANTINED

if TYPE_CHECKING:
    from pipelines.analysis.previews import StudyResult

app = typer.Typer(
    help="Look into a model: previews, tokens, prompts, the time input, crowded scenes, seeds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The restorer's options.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="An InstantIR model folder or models:/name@alias.")]
Images = Annotated[Path, typer.Option("--images", help="A folder of good pictures; they are made poor here.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the results go; one study a folder.")]
Limit = Annotated[int, typer.Option(help="First so many pictures by name; 0 for all (of galleries: 64).")]
Side = Annotated[int, typer.Option(help="Pixels; each picture's middle square is resized to this side.")]
Seed = Annotated[int, typer.Option(help="With a picture's name it fixes every random bit.")]
Mixed = Annotated[
    str, typer.Option(autocompletion=complete_preset, help="Preset of the mixed degradation; realesrgan-nano at nano.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and no progress.")]


def run_study(
    study: str,
    model: str,
    images: Path,
    out: Path,
    overrides: list[str] | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """What the studies of a model share."""
    from pipelines.analyze import analyze

    console = Console(silent=as_json)
    options = parse_options(overrides or [])
    with console.bar(study) as progress:
        result = analyze(study, local_model(model), images, out, options, progress=progress, **settings)
    end_study(result, console)


def end_study(result: StudyResult, console: Console) -> None:
    """What was seen, and where to look."""
    counts = f"{result.measured} measured, {result.kept} done before, {result.quarantined} quarantined"
    console.result(plain(result), [*result.seen, f"{counts}; {result.folder}", f"look at {result.report}"])
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


@app.command(cls=Command)
def previews(
    model: ModelOption,
    images: Images,
    out: Out,
    overrides: Overrides = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    faults: Annotated[bool, typer.Option(help="Also blur, noise, JPEG and downsampling, each alone.")] = True,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Previews over the steps by input quality and type of degradation (the paper's figures 3b and 4)."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("previews", model, images, out, overrides, as_json, faults=faults, **settings)


@app.command(cls=Command)
def tokens(
    model: ModelOption,
    images: Images,
    out: Out,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How often a degraded picture's tokens find their original among 64, by type and strength."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("tokens", model, images, out, None, as_json, **settings)


@app.command(cls=Command)
def creative(
    model: ModelOption,
    images: Images,
    out: Out,
    overrides: Overrides = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    stop: Annotated[float, typer.Option(help="Share of the steps after which Previewer and Aggregator stop.")] = 0.7,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How far close and far prompts move restorations, by how well the tokens know the picture (Appendix A)."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("creative", model, images, out, overrides, as_json, stop=stop, **settings)


@app.command(cls=Command, name="time")
def time_input(
    model: ModelOption,
    images: Images,
    out: Out,
    overrides: Overrides = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """What the perceptor's time input does: the same runs with one fixed time step."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("time", model, images, out, overrides, as_json, **settings)


@app.command(cls=Command)
def crowded(
    model: ModelOption,
    images: Images,
    out: Out,
    overrides: Overrides = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How errors, previews and delta depend on how much goes on in a picture."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("crowded", model, images, out, overrides, as_json, **settings)


@app.command(cls=Command)
def seeds(
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder of any system or models:/name@alias.")],
    images: Images,
    out: Out,
    overrides: Overrides = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="Results of each input.")] = 5,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How far results of several seeds lie apart, and whether each agrees with the input (InstaRevive's A.6)."""
    settings = {"limit": limit, "side_px": side, "seed": seed, "mixed": mixed, "device": device}
    run_study("seeds", model, images, out, overrides, as_json, seeds=seeds, **settings)


@app.command(cls=Command)
def accuracy(
    images: Annotated[Path, typer.Option("--images", help="Pictures in one folder a class, as ImageNet's.")],
    out: Out,
    encoder: Annotated[
        str, typer.Option(help="DINOv2 with a linear head (folder or hub id), or any DINOv2 for nearest.")
    ] = "facebook/dinov2-large-imagenet1k-1-layer",
    method: Annotated[str, typer.Option(help="linear, or nearest class means.")] = "linear",
    reference: Annotated[Path | None, typer.Option(help="Clean pictures of the same classes, for nearest.")] = None,
    classes: Annotated[Path | None, typer.Option(help="The head's folder names in its order, one a line.")] = None,
    limit: Limit = 0,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How well DINOv2 classifies degraded pictures (figure 3a); brings no weights and no pictures of its own."""
    from pipelines.analysis.accuracy import analyze_accuracy

    console = Console(silent=as_json)
    with console.bar("accuracy") as progress:
        result = analyze_accuracy(
            images, out, encoder, method, reference, classes, mixed, limit, seed, device, progress=progress
        )
    end_study(result, console)
