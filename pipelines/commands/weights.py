"""`restoray weights` and its commands. They parse, call and print, like main.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.support import Command, parse_options, plain
from pipelines.commands.words import Json
from pipelines.core.console import Console


def complete_system(incomplete: str) -> list[str]:
    """Systems with published weights whose names start with `incomplete`."""
    from components.systems import SYSTEMS

    return [name for name, system in SYSTEMS.items() if system.weights is not None and name.startswith(incomplete)]


System = Annotated[str, typer.Argument(autocompletion=complete_system, help="The system of the weights.")]
Sizes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Sizes that differ from the published ones.")
]
Prior = Annotated[str, typer.Option(help="The prior of the weights: a shipped name, a folder or a hub id.")]
ImageEncoder = Annotated[str, typer.Option(help="The picture encoder for a diffusers prior: a folder or a hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and print everything, but write nothing.")]

app = typer.Typer(
    name="weights",
    help="Import published weights as model folders, and export models in the authors' layout.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(name="import", cls=Command)
def import_command(
    system: System,
    sizes: Sizes = None,
    source: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="PATH", help="A weights file or a folder of them; may be repeated."),
    ] = None,
    prior: Prior = "",
    image_encoder: ImageEncoder = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The model folder, RESTORAY_HOME/weights/SYSTEM by default.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights, if they are not the published ones.")] = "",
    origin: Annotated[str, typer.Option(help="Author or address of a file whose system has many authors.")] = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Check every key and shape of a system's published weights and make a model folder of them."""
    from pipelines.restoration.weights import import_lines, import_weights

    console = Console(silent=as_json)
    with console.bar("import") as progress:
        result = import_weights(
            system,
            source or [],
            out,
            prior=prior,
            image_encoder=image_encoder,
            sizes=parse_options(sizes or []),
            licence=licence,
            origin=origin,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    console.result(plain(result), import_lines(result))


@app.command(name="export", cls=Command)
def export_command(
    system: System,
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder, models:/name@alias or a shipped name.")],
    to: Annotated[Path, typer.Option("--to", help="The folder of the exported files.")],
    spelling: Annotated[
        str, typer.Option(help="Spelling of a LoRA's keys: released (both, as published), peft or diffusers.")
    ] = "",
    form: Annotated[str, typer.Option("--format", help="File format: pt (as published) or safetensors.")] = "pt",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the weights of a model in the layout of the authors' release, for tools that read that layout."""
    from pipelines.restoration.weights import export_lines, export_weights
    from pipelines.runs.registry import local_model

    result = export_weights(
        system, local_model(model), to, spelling=spelling, form=form, overwrite=overwrite, dry_run=dry_run
    )
    Console(silent=as_json).result(plain(result), export_lines(result))


@app.command(name="layout", cls=Command)
def layout_command(
    system: System, sizes: Sizes = None, prior: Prior = "", image_encoder: ImageEncoder = "", as_json: Json = False
) -> None:
    """Print every key and shape of the released files for a prior."""
    from pipelines.restoration.weights import layout, layout_lines

    shapes = layout(system, prior=prior, image_encoder=image_encoder, sizes=parse_options(sizes or []))
    Console(silent=as_json).result(shapes, layout_lines(shapes))


@app.command(name="pack", cls=Command)
def pack_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    to: Annotated[Path, typer.Option("--to", help="The model folder; replaced.")],
    stage: Annotated[str, typer.Option(help="The training stage; the last one with a checkpoint by default.")] = "",
    card: Annotated[Path | None, typer.Option(help="A text for files/CARD.md.")] = None,
    credits_file: Annotated[
        Path | None, typer.Option("--credits", help="A CSV of file, licence and credit, for pictures without them.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "unstated",
    permitted_use: Annotated[str, typer.Option(help="What the weights may be used for.")] = "unstated",
    state_of: Annotated[
        str, typer.Option(help="An earlier stage whose state is packed, so that its training can go on.")
    ] = "",
    eight_bit: Annotated[int, typer.Option(min=0, help="Number of the largest matrices to store in 8 bits.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a stage's averaged weights in half precision, with a small state from which its training can go on."""
    from pipelines.runs.pack import pack_run

    packed = pack_run(run, stage, to, card, credits_file, licence, permitted_use, state_of, eight_bit)
    document = {"model": str(packed.model.path), "digest": packed.model.digest, "step": packed.step}
    Console(silent=as_json).result(document, [f"step {packed.step}; {packed.model.path}"])
