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
    source: Annotated[str, typer.Argument(help="A folder of pictures, here or in a store: s3://bucket/folder.")],
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
    """Restore a folder of pictures; KEY=VALUE sets the options of the restorer."""
    from pipelines.api.options import build_options, picture_limits
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
    )
    options, build = parse_options(overrides or []), build_options(device, precision, compile_mode, offload)
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
