"""`restoray.restore` and `restoray.serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.images import Limits
from pipelines.api.options import build_options, caption_spec, file_options, picture_limits
from pipelines.core.cluster import running_ray
from pipelines.core.console import Console
from pipelines.core.devices import check_device
from pipelines.core.errors import UsageError
from pipelines.core.placement import Needs
from pipelines.core.places.place import Place, place_of
from pipelines.core.pool import Pool
from pipelines.restoration.batch import RestoreJob, RestoreResult, restore_folder
from pipelines.restoration.models import OpenedModel, open_models
from pipelines.restoration.prompts import AUTO, job_captioner, read_prompts
from pipelines.restoration.routes import read_routes
from pipelines.restoration.sources import Sources, list_sources
from pipelines.runs.registry import local_model
from pipelines.service.front import ServeLimits

if TYPE_CHECKING:
    from pipelines.service.serve import RunningService

Models = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class FolderJob:
    """What a job on a folder takes besides the model, its options and the folders.

    Attributes:
        seed: with a picture's key it determines every random number.
        routes: file that says which of several models restores which picture.
        references: folder of second pictures of the same names.
        prompts: file with a prompt for each picture.
        captioner, caption_view: who writes the missing prompts, and of which view of the picture.
        limits: larger inputs are refused.
        needs: where the workers may run, and how many.
        column: the column with the pictures' bytes of a parquet file.
        out_form: "files"; "tar" or "parquet" for one tar or table for each input.
    """

    seed: int = 0
    routes: Path | None = None
    references: str | Path | None = None
    prompts: Path | None = None
    captioner: str | None = None
    caption_view: str = AUTO
    limits: Limits
    needs: Needs = field(default_factory=Needs)
    column: str = ""
    out_form: str = "files"


def restore(
    source: str | Path,
    *,
    out: str | Path,
    model: Models = "nano",
    seed: int = 0,
    routes: str | Path | None = None,
    references: str | Path | None = None,
    prompts: str | Path | None = None,
    captioner: str | None = None,
    caption_view: str = AUTO,
    device: str = "cpu",
    precision: str = "fp32",
    compile: str = "off",  # noqa: A002 the option's name
    offload: bool = False,
    workers: int = 0,
    max_megapixels: float = 50,
    max_megabytes: float | None = None,
    column: str = "",
    out_form: str = "files",
    format: str | None = None,  # noqa: A002 the option's name
    quality: int | None = None,
    bits: int | None = None,
    metadata: str | None = None,
    icc: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> RestoreResult:
    """Restore pictures with a pool of workers. The same call continues a job that was stopped.

    `restoray.load` restores pictures in this process.

    Args:
        source: a picture, a folder, a pattern ("pics/**/*.jpg"), a tar, a parquet file or a corpus; here or in a store.
        out: folder of the results and their records; here or in a store.
        model: a model, as in `load`; several that share a prior need `routes`.
        seed: with a picture's key it determines every random number.
        routes: file of {"key", "model"} lines (.jsonl or .csv), for several models.
        references: folder with a second picture of each name, for options such as reference="hq".
        prompts: file with a prompt for each picture, .jsonl or .csv.
        captioner: writes missing prompts: a captioner's name, a hub id or a folder.
        caption_view: what the captioner sees: "lq", "coarse", or "auto".
        device: "cpu" or "cuda". precision: fp32, bf16, fp16, fp8. compile: off, autoencoder, blocks, whole.
        offload: networks are on the GPU in turns, where the model's system can do it.
        workers: most processes; 0 takes the default.
        max_megapixels, max_megabytes: larger inputs are refused.
        column: the column with the pictures' bytes of a parquet file.
        out_form: "files"; "tar" or "parquet" for one tar or table for each input.
        format, quality, bits, metadata, icc: of the results, see docs/restore.md; None takes the defaults.
        quiet: print no progress on standard error.
        options: of the restorer: prompt="", scale=2, steps=20.

    Returns:
        RestoreResult: counts `restored`, `skipped`, `quarantined`, and the paths `folder`, `records`, `quarantine`. A
        picture that cannot be restored is no error.

    Raises:
        UsageError: an unknown option, model or name, no pictures, or a result would overwrite another program's file.
        RetryLater: another job works in `out`, or a store does not answer.
        Failure: `out` cannot be written, the model cannot be loaded, or all pictures fail for the same reason.
    """
    check_device(device)
    job = FolderJob(
        seed=seed,
        routes=_path(routes),
        references=references,
        prompts=_path(prompts),
        captioner=captioner,
        caption_view=caption_view,
        limits=picture_limits(max_megapixels, max_megabytes),
        needs=Needs(workers=workers or None),
        column=column,
        out_form=out_form,
    )
    files = file_options(format=format, quality=quality, bits=bits, metadata=metadata, icc=icc)
    build = build_options(device, precision, compile, offload)
    return restore_pictures_of(source, out, _list(model), {**files, **options}, build, job, Console(silent=quiet))


def restore_pictures_of(
    source: str | Path,
    out: str | Path,
    models: Sequence[str | Path],
    options: Mapping[str, Any],
    build: Mapping[str, Any],
    job: FolderJob,
    console: Console,
) -> RestoreResult:
    """Open the models, read the job's files and restore a folder; see `restore`.

    Args:
        build: see build_options.
    """
    results = place_of(out)
    if isinstance(results, Place):
        results.check()
    listing = list_sources(str(source), results, job.column)
    if job.captioner is None and job.caption_view != AUTO:
        raise UsageError("--caption-view needs --captioner.")
    opened = open_models([local_model(str(model)) for model in models], build)
    if bool(opened.siblings) != (job.routes is not None):
        raise UsageError("several models need --routes FILE, and --routes needs several: --model A --model B.")
    frames = {each.identity.frame for each in opened.choices}
    if len(frames) > 1 and (job.captioner is not None or job.prompts is not None):
        raise UsageError(
            "these models were trained with different prompts around captions: restore their pictures apart."
        )
    pool = Pool(num_gpus=float(build.get("device") == "cuda")).placed(job.needs)
    restore_job = _restore_job(opened, listing, options, job, str(build.get("device", "cpu")))
    with running_ray(), console.bar("restore") as progress:
        return restore_folder(opened, listing, results, restore_job, pool, progress)


def _restore_job(
    opened: OpenedModel,
    listing: Sources,
    options: Mapping[str, Any],
    job: FolderJob,
    device: str,
) -> RestoreJob:
    """Check the options, and read the files of prompts and routes."""
    ask, identity = opened.request_options(options), opened.identity
    src, sources, writer = listing.root, listing.pictures, None
    own = read_prompts(job.prompts, sources, src, identity.frame) if job.prompts is not None else None
    if job.captioner is not None:
        writer = job_captioner(caption_spec(job.captioner), job.caption_view, identity, device)
    return RestoreJob(
        ask=replace(ask, max_output_pixels=max(ask.max_output_pixels, job.limits.max_pixels)),
        seed=job.seed,
        references=place_of(job.references) if job.references is not None else None,
        prompts=own,
        captioner=writer,
        limits=job.limits,
        routes=read_routes(job.routes, sources, src, opened.choices) if job.routes is not None else None,
        out_form=job.out_form,
    )


def serve(
    model: Models = "nano",
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    device: str = "cpu",
    precision: str = "fp32",
    compile: str = "off",  # noqa: A002 the option's name
    offload: bool = False,
    max_megapixels: float = 25,
    max_megabytes: float | None = None,
) -> RunningService:
    """Serve a model over HTTP and return once it is loaded: POST /v1/restore, GET /health.

    Use it in a `with` block, or call `stop()`. A Ray of this process serves; otherwise one starts, and ends with the
    service.

    Args:
        model: a model, as in `load`, or several that share a prior; a request names one with the parameter model.
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.
        device, precision, compile, offload: as in `restore`.
        max_megapixels, max_megabytes: of one request.

    Returns:
        RunningService with `url` and `stop()`.

    Raises:
        UsageError: there is no such model, or the port is in use.
        Failure: the model cannot be loaded, or this Ray already runs a service.
    """
    check_device(device)
    build = build_options(device, precision, compile, offload)
    return serve_models(
        _list(model), build, picture_limits(max_megapixels, max_megabytes), max_megabytes is None, host=host, port=port
    )


def serve_models(
    models: Sequence[str | Path],
    build: Mapping[str, Any],
    limits: Limits,
    usual_bytes: bool,
    *,
    host: str,
    port: int,
    needs: Needs = Needs(),
    on_ready: Callable[[str], None] | None = None,
    blocking: bool = False,
) -> RunningService:
    """Open models and serve them; see `serve`.

    Args:
        limits: of input pictures.
        usual_bytes: the caller has not set the largest file, so a request of usual size keeps the service's own limit.
        on_ready: gets the address once the model is loaded.
        blocking: return only after an interrupt.
    """
    from pipelines.service.serve import serve as serve_opened

    defaults = ServeLimits()
    usual = usual_bytes and limits.max_pixels <= defaults.max_input_pixels
    serve_limits = ServeLimits(
        max_bytes=defaults.max_bytes if usual else limits.max_bytes,
        max_input_pixels=limits.max_pixels,
        max_output_pixels=max(defaults.max_output_pixels, limits.max_pixels),
    )
    opened = open_models([local_model(str(model)) for model in models], build)
    return serve_opened(
        opened,
        host=host,
        port=port,
        blocking=blocking,
        on_ready=on_ready,
        limits=serve_limits,
        num_gpus=float(build.get("device") == "cuda"),
        needs=needs,
    )


def _list(models: Models) -> list[str | Path]:
    return [models] if isinstance(models, str | Path) else list(models)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place)
