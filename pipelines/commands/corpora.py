"""`restoray curate`, `datasets`, `caption` and `replay`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.support import (
    complete_captioner,
    complete_role,
    complete_spec,
    end_curation,
    plain,
    yaml_text,
)
from pipelines.commands.words import Address, DryRun, Json, Out, Overrides
from pipelines.core.console import Console
from pipelines.core.devices import check_gpus
from pipelines.core.errors import EXIT_QUARANTINED, UsageError


def curate(
    spec: Annotated[
        str, typer.Argument(autocompletion=complete_spec, help="The name of a corpus spec or a YAML file.")
    ],
    overrides: Overrides = None,
    out: Out = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Your own folder of photographs, here or in a store.")
    ] = None,
    max_megapixels: Annotated[
        float | None, typer.Option(min=0.000001, help="Refuse pictures with more megapixels: filters.max_megapixels.")
    ] = None,
    max_megabytes: Annotated[
        float | None, typer.Option(min=0.000001, help="Refuse larger files: filters.max_file_mib in megabytes.")
    ] = None,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Curate pictures of any source into shards with an index, a manifest, a quarantine and a report."""
    from components.corpora import shown_spec
    from pipelines.api.corpora import curate_spec, resolve_spec
    from pipelines.core.places.place import place_of
    from pipelines.curation.select import thresholds

    console = Console(silent=as_json)
    megapixels = [] if max_megapixels is None else [f"filters.max_megapixels={max_megapixels!r}"]
    mebibytes = [] if max_megabytes is None else [f"filters.max_file_mib={max_megabytes * 1e6 / 2**20!r}"]
    resolved = resolve_spec(spec, [*(overrides or []), *megapixels, *mebibytes], images)
    bounds = thresholds(resolved)
    if dry_run:
        document = {**shown_spec(resolved), "thresholds": {name: plain(bound) for name, bound in bounds.items()}}
        console.result(document, [yaml_text(document)])
        return
    if out is None:
        raise UsageError("curate needs --out FOLDER (or --dry-run).")
    place = place_of(out)
    result = curate_spec(resolved, place, console, argument="" if images is not None else spec)
    end_curation(result, place, console)


def datasets(
    name: Annotated[
        str | None, typer.Argument(autocompletion=complete_spec, help="A corpus to describe in full.")
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(autocompletion=complete_role, help="List only this role: train, regularisation or benchmark."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the corpora and benchmarks of the papers with their licences and how to get and curate them."""
    from pipelines.corpus.catalogue import describe, list_corpora, list_json, list_lines

    console = Console(silent=as_json)
    if name is not None:
        description = describe(name)
        console.result(description.to_json(), description.lines())
        return
    entries = list_corpora(role)
    console.result(list_json(entries), list_lines(entries))


def caption(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="A curated corpus, here or in a store.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", autocompletion=complete_captioner, help="The name of a captioner, a hub id or a folder."
        ),
    ],
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the column that holds the captions.")] = "captions",
    engine: Annotated[
        str, typer.Option(help="Engine: transformers, or vllm if that extra is installed.")
    ] = "transformers",
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Caption a corpus; KEY=VALUE sets prompt, max_tokens, batch_size, workers, num_gpus, revision or overwrite."""
    from pipelines.api.options import caption_spec
    from pipelines.core.cluster import running_ray
    from pipelines.core.places.place import place_of
    from pipelines.core.places.working_copy import check_one_machine, working_copy
    from pipelines.corpus.columns.captions import CaptionOptions, caption_corpus
    from pipelines.corpus.shards import open_corpus

    console = Console(silent=as_json)
    spec = caption_spec(model, overrides or [])
    place = place_of(corpus)
    with working_copy(place) as folder:
        open_corpus(folder)
        check_gpus(spec)
        with running_ray(), console.bar("caption") as progress:
            check_one_machine(place)
            result = caption_corpus(folder, spec, name, CaptionOptions(engine=engine), progress)
    captioned = result.samples - result.given - result.quarantined
    counts = f"{captioned} captioned, {result.given} came with the corpus, {result.quarantined} quarantined"
    console.result(plain(result), [f"{counts}; {result.folder}"])
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


def replay(
    corpus: Annotated[
        str, typer.Argument(metavar="CORPUS", help="A corpus that `restoray curate` made, here or in a store.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Secrets of stores, which the corpus does not hold."),
    ] = None,
    codes: Annotated[
        list[str] | None, typer.Option("--code", help="Only pictures with this reason; may be repeated.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Only count the reasons.")] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Try the quarantined pictures of a corpus again, and only those."""
    from pipelines.core.places.place import place_of
    from pipelines.core.places.working_copy import check_one_machine, working_copy
    from pipelines.curation.curate import replay as replay_quarantine
    from pipelines.curation.curate import retryable_reasons, saved_spec

    console, place = Console(silent=as_json), place_of(corpus)
    with working_copy(place) as folder:
        if listing:
            reasons = retryable_reasons(folder)
            console.result(reasons, [f"{count:>8}  {code}" for code, count in reasons.items()] or ["nothing"])
            return
        check_gpus(saved_spec(folder, overrides or []))
        from pipelines.core.cluster import running_ray

        with running_ray(), console.bar("replay") as progress:
            check_one_machine(place)
            result = replay_quarantine(folder, codes or (), progress=progress, overrides=overrides or [])
    end_curation(result, place, console)
