"""`restoray analyze STUDY`: the sub-commands. They parse, call and print, like main.py."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.support import Command, Device, complete_captioner, complete_preset, parse_options, plain
from pipelines.core.console import Console
from pipelines.core.devices import check_device
from pipelines.core.errors import EXIT_QUARANTINED, UsageError

if TYPE_CHECKING:
    from pipelines.analysis.model import StudyJob
    from pipelines.analysis.study import StudyResult

app = typer.Typer(
    help="Study a model: options side by side, previews, tokens, prompts, the time input, crowds, seeds, encoders.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The restorer's options.")]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A model folder of the study's system or models:/name@alias.")
]
Images = Annotated[Path, typer.Option("--images", help="A folder of good pictures; the study degrades them itself.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder; one study in each folder.")]
Limit = Annotated[
    int, typer.Option(help="Number of pictures, the first by name; 0 for all (64 for studies with a gallery).")
]
Side = Annotated[int, typer.Option(help="Pixels; each picture's middle square is resized to this side.")]
Seed = Annotated[int, typer.Option(help="With a picture's name it fixes every random bit.")]
Mixed = Annotated[
    str, typer.Option(autocompletion=complete_preset, help="Preset of the mixed degradation; realesrgan-nano at nano.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and no progress.")]


def study_job(model: str, images: Path, out: Path, overrides: list[str] | None, **settings: Any) -> StudyJob:
    """The job of a command line; `settings` are its other fields."""
    from pipelines.analysis.model import StudyJob
    from pipelines.runs.registry import local_model

    check_device(str(settings.get("device", "cpu")), one_of=False)
    options = parse_options(overrides or [])
    return StudyJob(model=local_model(model), images=images, out=out, options=options, **settings)


def run_study(study: str, job: StudyJob, as_json: bool, **settings: Any) -> None:
    """Run a study of a model; `settings` are the study's own settings."""
    from pipelines.analysis.studies import analyze

    console = Console(silent=as_json)
    with console.bar(study) as progress:
        result = analyze(study, job, progress=progress, **settings)
    end_study(result, console)


def parse_arms(vary: list[str], arms: list[str]) -> dict[str, dict[str, Any]]:
    """Arms by name from a command line; UsageError for one without a name or given twice."""
    entries: dict[str, dict[str, Any]] = {}

    def put(name: str, options: dict[str, Any]) -> None:
        if name in entries:
            raise UsageError(f"arm {name!r} is given twice")
        entries[name] = options

    for text in vary:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip(", "):
            raise UsageError(f"--vary needs KEY=V1,V2,..., got {text!r}")
        for value in values.split(","):
            put(f"{key.strip()}={value.strip()}", parse_options([f"{key.strip()}={value.strip()}"]))
    for text in arms:
        name, colon, options = text.partition(":")
        if not colon or not name.strip():
            raise UsageError(f"--arm needs 'NAME: KEY=VALUE KEY=VALUE', got {text!r}")
        put(name.strip(), parse_options(shlex.split(options)))
    return entries


def end_study(result: StudyResult, console: Console) -> None:
    """Print the sentences, the counts and the paths, and exit."""
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
    """Previews over the steps by input quality and type of degradation (InstantIR's figures 3b and 4)."""
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    run_study("previews", job, as_json, mixed=mixed, faults=faults)


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
    """How often a degraded picture's tokens retrieve their original among 64, by type and strength (InstantIR)."""
    job = study_job(model, images, out, None, limit=limit, side_px=side, seed=seed, device=device)
    run_study("tokens", job, as_json, mixed=mixed)


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
    """How far close and far prompts move restorations, by the tokens' retrieval score (InstantIR's Appendix A)."""
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    run_study("creative", job, as_json, mixed=mixed, stop=stop)


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
    """Effect of the perceptor's time input: the same runs with one fixed time step (InstantIR)."""
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    run_study("time", job, as_json, mixed=mixed)


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
    """How errors, previews and delta depend on the complexity of a picture (InstantIR)."""
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    run_study("crowded", job, as_json, mixed=mixed)


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
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    run_study("seeds", job, as_json, mixed=mixed, seeds=seeds)


@app.command(cls=Command)
def arms(
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder of any system or models:/name@alias.")],
    images: Images,
    out: Out,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2,...", help="An arm for each value of an option.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME: KEY=VALUE...",
            help="An arm of several options; also model, prompt, negative_prompt, and caption=own or other.",
        ),
    ] = None,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    metrics: Annotated[str, typer.Option(help="More metrics, comma-separated; they may need weights.")] = "",
    captioner: Annotated[
        str, typer.Option(autocompletion=complete_captioner, help="Captioner for arms with caption=own or other.")
    ] = "tags",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """The same pictures with several sets of options or models, scored side by side (SUPIR's figure 8a, table 2c)."""
    entries = parse_arms(vary or [], arm or [])
    job = study_job(model, images, out, overrides, limit=limit, side_px=side, seed=seed, device=device)
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    run_study("arms", job, as_json, mixed=mixed, arms=entries, metrics=names, captioner=captioner)


@app.command(cls=Command)
def encoder(
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="A folder of a model with a robust encoder; several for several seeds."),
    ],
    images: Images,
    out: Out,
    limit: Limit = 0,
    side: Side = 256,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    captioner: Annotated[str, typer.Option(autocompletion=complete_captioner, help="Captioner of LQ and HQ.")] = "tags",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """What the robust encoder is worth by degradation, in PSNR and captions (SUPIR's figures 14 and 18)."""
    job = study_job(model[0], images, out, None, limit=limit, side_px=side, seed=seed, device=device)
    models = {name: {"model": name} for name in model}
    run_study("encoder", job, as_json, mixed=mixed, arms=models, captioner=captioner)


@app.command(cls=Command)
def accuracy(
    images: Annotated[Path, typer.Option("--images", help="Pictures with a folder for each class, as in ImageNet.")],
    out: Out,
    encoder: Annotated[
        str, typer.Option(help="DINOv2 with a linear head (folder or hub id), or any DINOv2 for nearest.")
    ] = "facebook/dinov2-large-imagenet1k-1-layer",
    method: Annotated[str, typer.Option(help="linear, or nearest class means.")] = "linear",
    reference: Annotated[Path | None, typer.Option(help="Clean pictures of the same classes, for nearest.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Text file with the folder names in the order of the head, one on each line.")
    ] = None,
    limit: Limit = 0,
    seed: Seed = 0,
    mixed: Mixed = "realesrgan",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How well DINOv2 classifies degraded pictures (InstantIR's figure 3a); weights and pictures do not ship."""
    from pipelines.analysis.accuracy import analyze_accuracy

    check_device(device, one_of=False)

    console = Console(silent=as_json)
    with console.bar("accuracy") as progress:
        result = analyze_accuracy(
            images, out, encoder, method, reference, classes, mixed, limit, seed, device, progress=progress
        )
    end_study(result, console)
