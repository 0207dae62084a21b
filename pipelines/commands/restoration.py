"""`restoray restore` and `serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.support import (
    Compile,
    Device,
    Offload,
    Precision,
    build_options,
    caption_spec,
    complete_captioner,
    parse_options,
    picture_limits,
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
from pipelines.core.errors import EXIT_QUARANTINED, UsageError
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
    from pipelines.core.cluster import running_ray
    from pipelines.core.places.place import Place, place_of
    from pipelines.core.pool import Pool
    from pipelines.restoration.batch import RestoreJob, restore_folder
    from pipelines.restoration.models import open_models
    from pipelines.restoration.prompts import AUTO, job_captioner, read_prompts
    from pipelines.restoration.routes import read_routes
    from pipelines.restoration.sources import list_sources
    from pipelines.runs.registry import local_model

    console = Console(silent=as_json)
    check_device(device)
    needs = read_needs(placement or [])
    options, build = parse_options(overrides or []), build_options(device, precision, compile_mode, offload)
    settings = {"format": file_format, "quality": quality, "bits": bits, "metadata": metadata, "icc": icc}
    options = {**{name: value for name, value in settings.items() if value is not None}, **options}
    results = place_of(out)
    if isinstance(results, Place):
        results.check()
    listing = list_sources(source, results, column)
    src, sources = listing.root, listing.pictures
    if captioner is None and caption_view != AUTO:
        raise UsageError("--caption-view needs --captioner.")
    opened = open_models([local_model(model) for model in models or [SHIPPED_MODEL]], build)
    if bool(opened.siblings) != (routes is not None):
        raise UsageError("several models need --routes FILE, and --routes needs several: --model A --model B.")
    frames = {each.identity.frame for each in opened.choices}
    if len(frames) > 1 and (captioner is not None or prompts is not None):
        raise UsageError(
            "these models were trained with different prompts around captions: restore their pictures apart."
        )
    limits = picture_limits(max_megapixels, max_megabytes)
    ask, identity = opened.request_options(options), opened.identity
    ask = replace(ask, max_output_pixels=max(ask.max_output_pixels, limits.max_pixels))
    own = read_prompts(prompts, sources, src, identity.frame) if prompts is not None else None
    writer = job_captioner(caption_spec(captioner), caption_view, identity, device) if captioner is not None else None
    job = RestoreJob(
        ask=ask,
        seed=seed,
        references=place_of(reference) if reference is not None else None,
        prompts=own,
        captioner=writer,
        limits=limits,
        routes=read_routes(routes, sources, src, opened.choices) if routes is not None else None,
        out_form=out_form,
    )
    pool = Pool(num_gpus=float(device == "cuda")).placed(needs)
    with running_ray(), console.bar("restore") as progress:
        result = restore_folder(opened, listing, results, job, pool, progress)
    line = f"{result.restored} restored, {result.skipped} done before, {result.quarantined} quarantined; {results}"
    lines = [f"{result.unprompted} of {len(sources)} pictures have no line in {prompts}"] if result.unprompted else []
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
    from pipelines.core.cluster import running_ray
    from pipelines.restoration.models import open_models
    from pipelines.runs.registry import local_model
    from pipelines.service.front import ServeLimits
    from pipelines.service.serve import serve as serve_model

    check_device(device)
    needs = read_needs(placement or [])
    build = build_options(device, precision, compile_mode, offload)
    limits, defaults = picture_limits(max_megapixels, max_megabytes), ServeLimits()
    usual = max_megabytes is None and limits.max_pixels <= defaults.max_input_pixels
    serve_limits = ServeLimits(
        max_bytes=defaults.max_bytes if usual else limits.max_bytes,
        max_input_pixels=limits.max_pixels,
        max_output_pixels=max(defaults.max_output_pixels, limits.max_pixels),
    )
    opened = open_models([local_model(model) for model in models or [SHIPPED_MODEL]], build)
    with running_ray():
        serve_model(
            opened,
            host=host,
            port=port,
            on_ready=lambda url: typer.echo(f"ready: {url}"),
            limits=serve_limits,
            num_gpus=float(device == "cuda"),
            needs=needs,
        )
