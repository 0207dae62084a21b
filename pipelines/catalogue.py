"""The catalogue of corpora: what `restoray datasets` lists and tells, and the table in docs/datasets.md.

Most corpora may not be passed on, so their specs lack a path. What stands there between angle brackets is no path but
says what belongs there ("<DIV2K_train_HR.zip, unpacked>"); `check_sources` turns it into a sentence before any work
begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from components.corpora import CorpusSpec, load_corpus_spec
from pipelines.errors import UsageError, unknown
from pipelines.home import shipped

ROLES: tuple[str, ...] = get_args(get_type_hints(CorpusSpec)["role"])

EXAMPLES = {
    "folder": "DIR",
    "tar": "'DIR/*.tar'",
    "parquet": "'DIR/*.parquet'",
    "urls": "TABLE.parquet",
    "negatives": "CORPUS",
}
"""What to type for the path of a source, by its kind; other kinds need none."""

ROLE_TITLES = {
    "train": "For training",
    "regularisation": "For training, beside others",
    "benchmark": "For measuring",
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """A path that the user has to give: its override's key, what belongs there ("" unknown), what to type."""

    key: str
    what: str
    example: str

    def override(self) -> str:
        """As it is typed."""
        return f"{self.key}={self.example}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One corpus, in short.

    Attributes:
        name, role, description, licence, homepage, papers, metrics: of the spec.
        needs: paths to give, first those that curation needs, then those of pairs.
        command: that curates it.
    """

    name: str
    role: str
    description: str
    licence: str
    homepage: str
    papers: tuple[str, ...]
    metrics: tuple[str, ...]
    needs: tuple[Need, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Description:
    """One corpus, in full.

    Attributes:
        entry: in short.
        notes: the comment at the head of its YAML file.
        spec: resolved.
    """

    entry: Entry
    notes: tuple[str, ...]
    spec: CorpusSpec

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {**self.entry.to_json(), "notes": " ".join(self.notes), "spec": dataclasses.asdict(self.spec)}

    def lines(self) -> list[str]:
        """For people."""
        from omegaconf import OmegaConf

        entry = self.entry
        told = [
            ("licence", [entry.licence]),
            ("homepage", [entry.homepage]),
            ("used by", entry.papers),
            ("metrics", [", ".join(entry.metrics)]),
            ("curate", [entry.command]),
            ("needs", [f"{need.key}: {need.what or 'a path'}" for need in entry.needs]),
        ]
        lines = [f"{entry.name} ({entry.role}): {entry.description}", ""]
        for title, texts in told:
            filled = [text for text in texts if text]
            lines += [f"{title if not place else '':<10}{text}" for place, text in enumerate(filled)]
        lines += ["", *self.notes, ""] if self.notes else [""]
        return lines + OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self.spec))).splitlines()


# --- looking up -------------------------------------------------------------------------------------------------------


def load_spec(name: str | Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """A corpus spec by shipped name ("demo") or by the path of a YAML file; UsageError in one sentence otherwise."""
    try:
        return load_corpus_spec(_path(name), overrides)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def list_corpora(role: str | None = None) -> list[Entry]:
    """All shipped corpora by role, then name.

    Raises:
        UsageError: no such role.
    """
    if role is not None and role not in ROLES:
        raise unknown("role", role, ROLES)
    entries = [entry_of(load_spec(name)) for name in shipped("datasets")]
    order = list(ROLE_TITLES)
    entries.sort(key=lambda entry: (order.index(entry.role), entry.name))
    return [entry for entry in entries if role in (None, entry.role)]


def describe(name: str | Path, overrides: Sequence[str] = ()) -> Description:
    """A corpus in full, by shipped name or by the path of a YAML file.

    Raises:
        UsageError: no such name (with the near one), or a spec with a mistake.
    """
    spec = load_spec(name, overrides)
    notes = []
    for line in _path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        notes.append(line.removeprefix("#").removeprefix(" "))
    return Description(entry=entry_of(spec, str(name)), notes=tuple(notes), spec=spec)


def entry_of(spec: CorpusSpec, typed: str = "") -> Entry:
    """A spec in short; `typed` is how it was asked for, where that was not its name."""
    sources = needed_for_sources(spec)
    return Entry(
        name=spec.name,
        role=spec.role,
        description=spec.description,
        licence=spec.licence,
        homepage=spec.homepage,
        papers=tuple(spec.papers),
        metrics=tuple(spec.metrics),
        needs=tuple(dict.fromkeys([*sources, *needed_for_pairs(spec)])),
        command=_command(typed or spec.name, sources),
    )


def _path(name: str | Path) -> Path:
    """The YAML file of a corpus."""
    known = shipped("datasets")
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else known.get(str(name))
    if path is None:
        raise unknown("dataset", str(name), known)
    return path


# --- what is missing --------------------------------------------------------------------------------------------------


def check_sources(spec: CorpusSpec, typed: str = "") -> None:
    """Refuse a spec whose sources lack a path, before any work begins.

    Args:
        typed: how the spec was asked for, where that was not its name.

    Raises:
        UsageError: says which source, what belongs there and where to get it, and what to type.
    """
    needs = needed_for_sources(spec)
    if not needs:
        return
    number = int(needs[0].key.split(".")[1])
    place = f"{spec.name}: source {number} ({spec.sources[number].kind}) has no path"
    raise UsageError(f"{place}{_advice(needs[0], spec)}; type: {_command(typed or spec.name, needs)}")


def check_pairs(spec: CorpusSpec) -> None:
    """Refuse a spec whose pairs lack a folder; UsageError as in `check_sources`."""
    needs = needed_for_pairs(spec)
    if needs:
        given = " ".join(need.override() for need in needs)
        raise UsageError(f"{spec.name}: {needs[0].key} is not given{_advice(needs[0], spec)}; add: {given}")


def needed_for_sources(spec: CorpusSpec) -> list[Need]:
    """Paths of sources that are still to be given, in order."""
    return [
        Need(key=f"sources.{number}.path", what=_what(source.path), example=EXAMPLES[source.kind])
        for number, source in enumerate(spec.sources)
        if source.kind in EXAMPLES and _is_missing(source.path)
    ]


def needed_for_pairs(spec: CorpusSpec) -> list[Need]:
    """Folders of pairs that are still to be given, in order; one that is a source's path is given there."""
    by_path = {source.path: f"sources.{number}.path" for number, source in enumerate(spec.sources) if source.path}
    needs = []
    for number, pair in enumerate(spec.pairs):
        for side, path in (("hq", pair.hq), ("lq", pair.lq)):
            if side == "hq" and not path:
                continue  # real pictures without reference
            if _is_missing(path):
                key = by_path.get(path, f"pairs.{number}.{side}")
                needs.append(Need(key=key, what=_what(path), example="DIR"))
    return list(dict.fromkeys(needs))


def _is_missing(path: str) -> bool:
    return not path or (path.startswith("<") and path.endswith(">"))


def _what(path: str) -> str:
    """What belongs in the place of a missing path."""
    return path[1:-1]


def _advice(need: Need, spec: CorpusSpec) -> str:
    """': it takes ... (see https://...)', as far as known."""
    see = f" (see {spec.homepage})" if spec.homepage and "://" not in need.what else ""
    return f": it takes {need.what}{see}" if need.what else see


def _command(typed: str, needs: Sequence[Need]) -> str:
    alone = len(needs) == 1 and not needs[0].what and needs[0].example == EXAMPLES["folder"]
    given = ["--images DIR"] if alone else [need.override() for need in needs]
    return " ".join(["restoray curate", typed, *given, "--out CORPUS"])


# --- output -----------------------------------------------------------------------------------------------------------


def list_json(entries: Iterable[Entry]) -> dict[str, Any]:
    """For `restoray datasets --json`."""
    return {"datasets": [entry.to_json() for entry in entries]}


def list_lines(entries: Sequence[Entry]) -> list[str]:
    """For `restoray datasets`: a line for each corpus, by role."""
    width = max((len(entry.name) for entry in entries), default=0)
    lines: list[str] = []
    for role, title in ROLE_TITLES.items():
        of_role = [entry for entry in entries if entry.role == role]
        if of_role:
            lines += [f"{title}:", *(f"  {entry.name:<{width}}  {entry.description}" for entry in of_role), ""]
    return [*lines, "restoray datasets NAME tells its licence, where the papers use it, and how to get it."]


def markdown() -> str:
    """docs/datasets.md: every shipped corpus, with what the papers do with it."""
    lines = [
        "# Corpora",
        "",
        "Made from `datasets/*.yaml` by `python -m pipelines.catalogue > docs/datasets.md`; a test compares. What a",
        "spec says beside this (filters, splits, how a corpus that was never published is made) is told by",
        "`restoray datasets NAME`.",
        "",
        "Nothing here is downloaded by itself but what has an `hf://` address, and that only where its terms were",
        "accepted. DIR, TABLE and CORPUS are yours to fill in. Licences are what their makers state, as far as we",
        "know; read theirs before you use anything.",
    ]
    entries = list_corpora()
    for role, title in ROLE_TITLES.items():
        lines += ["", f"## {title} (`role: {role}`)", ""]
        lines.append("| name | what it is, and its size | licence | where the papers use it | how to curate |")
        lines.append("|---|---|---|---|---|")
        for entry in entries:
            if entry.role == role:
                name = f"[{entry.name}]({entry.homepage})" if entry.homepage else entry.name
                needs = [f"{need.key}: {need.what}" for need in entry.needs if need.what]
                how = "<br>".join([f"`{entry.command}`", *needs])
                used = [*entry.papers, *([f"metrics: {', '.join(entry.metrics)}"] if entry.metrics else [])]
                cells = [name, entry.description, entry.licence, "<br>".join(used) or "by none of them", how]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(markdown())
