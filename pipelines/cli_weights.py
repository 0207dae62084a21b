"""`restoray weights`: its three commands. Thin, as cli.py: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_support import Command, local_model, parse_options, plain
from pipelines.console import Console


def complete_system(incomplete: str) -> list[str]:
    """Systems with published weights that start so."""
    from components.systems import SYSTEMS

    return [name for name, system in SYSTEMS.items() if system.weights is not None and name.startswith(incomplete)]


System = Annotated[str, typer.Argument(autocompletion=complete_system, help="Whose weights, e.g. instantir.")]
Sizes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Sizes that are not the published ones.")
]
Prior = Annotated[str, typer.Option(help="What the weights sit on: a shipped name, a folder or a hub id.")]
ImageEncoder = Annotated[str, typer.Option(help="The picture encoder beside a diffusers prior: a folder or hub id.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and print everything, and write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and no progress.")]

weights = typer.Typer(
    name="weights",
    help="Published weights into model folders, and models back into the authors' layout.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@weights.command(name="import", cls=Command)
def import_command(
    system: System,
    sizes: Sizes = None,
    source: Annotated[
        list[Path] | None, typer.Option("--from", metavar="PATH", help="A file, or the folder of them; repeat.")
    ] = None,
    prior: Prior = "",
    image_encoder: ImageEncoder = "",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The model folder; RESTORAY_HOME/weights/SYSTEM by default.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Of the weights, where they are not the published ones.")] = "",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Check a system's published weights, every key and shape, and make a model folder of them."""
    from pipelines.weights import import_weights, imported_lines

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
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    console.result(plain(result), imported_lines(result))


@weights.command(name="export", cls=Command)
def export_command(
    system: System,
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder, models:/name@alias or a name.")],
    to: Annotated[Path, typer.Option("--to", help="The folder that receives the files.")],
    spelling: Annotated[
        str, typer.Option(help="Of a LoRA's keys: released (both, as published), peft, diffusers.")
    ] = "",
    form: Annotated[str, typer.Option("--format", help="pt (as published) or safetensors.")] = "pt",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a model's weights as its system's authors released theirs, for the tools that read those."""
    from pipelines.weights import export_weights, exported_lines

    result = export_weights(
        system, local_model(model), to, spelling=spelling, form=form, overwrite=overwrite, dry_run=dry_run
    )
    Console(silent=as_json).result(plain(result), exported_lines(result))


@weights.command(name="layout", cls=Command)
def layout_command(
    system: System, sizes: Sizes = None, prior: Prior = "", image_encoder: ImageEncoder = "", as_json: Json = False
) -> None:
    """Print every key and shape that the released files have on a prior."""
    from pipelines.weights import layout, layout_lines

    shapes = layout(system, prior=prior, image_encoder=image_encoder, sizes=parse_options(sizes or []))
    Console(silent=as_json).result(shapes, layout_lines(shapes))
