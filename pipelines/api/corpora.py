"""`restoray.curate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec
from pipelines.api.settings import setting_texts
from pipelines.core.cluster import running_ray
from pipelines.core.console import Console
from pipelines.core.devices import check_gpus
from pipelines.core.places.place import Where, place_of
from pipelines.core.places.working_copy import check_one_machine, working_copy
from pipelines.corpus.catalogue import check_paths, load_spec
from pipelines.curation.curate import CurateResult
from pipelines.curation.curate import curate as curate_corpus
from pipelines.curation.sources import check_sources, for_folder


def curate(
    spec: str | Path,
    *,
    out: str | Path,
    images: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> CurateResult:
    """Curate pictures of any source into shards with an index, a manifest, a quarantine and a report.

    The same call continues work that was stopped, and reads only what is new in a source that has grown.

    Args:
        spec: name of a corpus spec (`restoray.recipes()["datasets"]`), or a YAML file.
        out: folder of the corpus, here or in a store ("s3://bucket/folder").
        images: your folder of photographs in place of the spec's sources, here or in a store.
        quiet: print no progress on standard error.
        settings: of the spec; `filters__min_side_px=256` changes filters.min_side_px.

    Returns:
        CurateResult: `accepted`, `rejected`, `reasons`, and the path `report`. Rejected pictures are no error.

    Raises:
        UsageError: an unknown spec or setting, a missing source, or a folder without pictures.
        RetryLater: another job works in `out`, or a store does not answer.
        Failure: `out` cannot be written, or too many pictures are bad.
    """
    resolved = resolve_spec(str(spec), setting_texts(settings), images)
    return curate_spec(resolved, place_of(out), Console(silent=quiet), argument="" if images else str(spec))


def resolve_spec(spec: str, overrides: Sequence[str], images: str | Path | None = None) -> CorpusSpec:
    """Read a spec with its overrides; `images` replaces its sources. Raises UsageError, see `curate`."""
    resolved = load_spec(spec, overrides)
    return resolved if images is None else for_folder(resolved, place_of(images))


def curate_spec(spec: CorpusSpec, out: Where, console: Console, argument: str = "") -> CurateResult:
    """Check the sources and curate them; see `curate`.

    Args:
        argument: the spec's name or file, for the errors about its paths; "": its sources are a folder of the user.
    """
    if argument:
        check_paths(spec, argument=argument)
    check_sources(spec, out if isinstance(out, Path) else None)  # fails for an empty folder, before Ray starts
    check_gpus(spec)
    with working_copy(out) as folder, running_ray(), console.bar("curate") as progress:
        check_one_machine(out)
        return curate_corpus(spec, folder, progress=progress)
