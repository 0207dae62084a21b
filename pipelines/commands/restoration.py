"""`restoray restore` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.support import (
    Compile,
    Device,
    Offload,
    Precision,
    complete_captioner,
    parse_options,
    plain,
)
from pipelines.commands.words import (
    SHIPPED_MODEL,
    Address,
    Json,
    MaxMegabytes,
    MaxMegapixels,
    ModelsOption,
    Overrides,
    Placement,
    RequiredPlace,
)
from pipelines.core.console import Console
from pipelines.core.devices import check_device
from pipelines.core.errors import EXIT_QUARANTINED
from pipelines.core.placement import read_needs


def restore(
    source: Annotated[
        str,
        typer.Argument(
            help="A picture, a folder, a pattern ('pics/**/*.jpg'), tar, parquet file or corpus; here or in a store."
        ),
    ],
    out: RequiredPlace,
    models: ModelsOption = None,
    routes: Annotated[
        Path | None,
        typer.Option(
            "--routes", help="With several models: which restores which picture, .jsonl of {key, model}, or .csv."
        ),
    ] = None,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Seed; with a picture's key it determines every random number.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="A folder with a second picture of each name, for options such as reference=hq.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with a prompt for each picture: .jsonl of {key, prompt or caption}, or .csv."),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_captioner,
            help="Captioner that writes missing prompts: a name, a hub id or a folder.",
        ),
    ] = None,
    caption_view: Annotated[
        str, typer.Option(help="View for the captioner: lq, coarse, or auto (coarse if the model has it).")
    ] = "auto",
    column: Annotated[str, typer.Option(help="The column with the pictures' bytes of a parquet file.")] = "",
    out_form: Annotated[
        str, typer.Option("--out-form", help="files; tar, for tars; parquet, for parquet files: one for each input.")
    ] = "files",
    file_format: Annotated[
        str, typer.Option("--format", help="Format of the results: png, jpeg, webp, avif, tiff, or like the input.")
    ] = "png",
    quality: Annotated[int | None, typer.Option(help="1 to 100, for JPEG (92), WebP (90) and AVIF (80).")] = None,
    bits: Annotated[int, typer.Option(help="Bits of a channel: 8, or 16 in PNG and TIFF.")] = 8,
    metadata: Annotated[
        str,
        typer.Option(help="EXIF and XMP of the input: private (no places, owners and serial numbers), keep, none."),
    ] = "private",
    icc: Annotated[
        str, typer.Option(help="Colour profile of the input: convert to sRGB, or keep the pixels in its space.")
    ] = "convert",
    max_megapixels: MaxMegapixels = 50,
    max_megabytes: MaxMegabytes = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    compile_mode: Compile = "off",
    offload: Offload = False,
    placement: Placement = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Restore pictures; KEY=VALUE sets the options of the restorer."""
    from pipelines.api.options import build_options, file_options, picture_limits
    from pipelines.api.restoration import FolderJob, restore_pictures_of

    console = Console(silent=as_json)
    check_device(device)
    job = FolderJob(
        seed=seed,
        routes=routes,
        references=reference,
        prompts=prompts,
        captioner=captioner,
        caption_view=caption_view,
        limits=picture_limits(max_megapixels, max_megabytes),
        needs=read_needs(placement or []),
        column=column,
        out_form=out_form,
    )
    files = file_options(format=file_format, quality=quality, bits=bits, metadata=metadata, icc=icc)
    options = {**files, **parse_options(overrides or [])}
    build = build_options(device, precision, compile_mode, offload)
    result = restore_pictures_of(source, out, models or [SHIPPED_MODEL], options, build, job, console)
    pictures = result.restored + result.skipped + result.quarantined
    line = f"{result.restored} restored, {result.skipped} done before, {result.quarantined} quarantined; {out}"
    lines = [f"{result.unprompted} of {pictures} pictures have no line in {prompts}"] if result.unprompted else []
    console.result(plain(result), [line, *lines])
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


def serve(
    models: ModelsOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine only.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    max_megapixels: MaxMegapixels = 25,
    max_megabytes: MaxMegabytes = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    compile_mode: Compile = "off",
    offload: Offload = False,
    placement: Placement = None,
    address: Address = None,
) -> None:
    """Serve a model over HTTP: POST /v1/restore and GET /health. Of several models a request names one: model=NAME."""
    from pipelines.api.options import build_options, picture_limits
    from pipelines.api.restoration import serve_models

    check_device(device)
    serve_models(
        models or [SHIPPED_MODEL],
        build_options(device, precision, compile_mode, offload),
        picture_limits(max_megapixels, max_megabytes),
        usual_bytes=max_megabytes is None,
        host=host,
        port=port,
        needs=read_needs(placement or []),
        on_ready=lambda url: typer.echo(f"ready: {url}"),
        blocking=True,
    )
