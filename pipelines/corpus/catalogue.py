"""The catalogue of corpora: the output of `restoray datasets`, and the table in docs/datasets.md.

Most corpora may not be redistributed, so their specs lack a path. A text in angle brackets is not a path, but describes
what the path must lead to ("<DIV2K_train_HR.zip, unpacked>"); `check_paths` makes an error of it before any work
begins.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from components.corpora import CorpusSpec, load_corpus_spec, shown_spec
from components.overrides import yaml_text
from pipelines.core.errors import UsageError, unknown
from pipelines.core.home import shipped_files
from pipelines.core.placement import needs_of

ROLES: tuple[str, ...] = get_args(get_type_hints(CorpusSpec)["role"])

EXAMPLES = {
    "folder": "DIR",
    "tar": "'DIR/*.tar'",
    "parquet": "'DIR/*.parquet'",
    "urls": "TABLE.parquet",
    "negatives": "CORPUS",
}
"""Placeholder for the path of a source on the command line, by its kind; other kinds need no path."""

ROLE_TITLES = {
    "train": "For training",
    "regularisation": "For training, together with other corpora",
    "benchmark": "For measuring",
}


@dataclass(frozen=True, kw_only=True)
class Need:
    """A path that the user must set.

    Attributes:
        key: key of the override.
        what: what the path must lead to; "" for any.
        example: placeholder on the command line.
    """

    key: str
    what: str
    example: str

    def override(self) -> str:
        """The override on the command line."""
        return f"{self.key}={self.example}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A corpus in short.

    Attributes:
        name, role, description, licence, homepage, papers, metrics: fields of the spec.
        needs: paths that the user must set: first those for curation, then those of pairs.
        command: the command that curates it.
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
        """The output of --json."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Description:
    """A corpus in full.

    Attributes:
        entry: the corpus in short.
        notes: comment at the head of its YAML file.
        spec: the resolved spec.
    """

    entry: Entry
    notes: tuple[str, ...]
    spec: CorpusSpec

    def to_json(self) -> dict[str, Any]:
        """The output of --json."""
        return {**self.entry.to_json(), "notes": " ".join(self.notes), "spec": shown_spec(self.spec)}

    def lines(self) -> list[str]:
        """The output for people."""
        entry = self.entry
        facts = [
            ("licence", [entry.licence]),
            ("homepage", [entry.homepage]),
            ("used by", entry.papers),
            ("metrics", [", ".join(entry.metrics)]),
            ("curate", [entry.command]),
            ("needs", [f"{need.key}: {need.what or 'a path'}" for need in entry.needs]),
        ]
        lines = [f"{entry.name} ({entry.role}): {entry.description}", ""]
        for title, texts in facts:
            not_empty = [text for text in texts if text]
            lines += [f"{title if not place else '':<10}{text}" for place, text in enumerate(not_empty)]
        lines += ["", *self.notes, ""] if self.notes else [""]
        return lines + yaml_text(shown_spec(self.spec)).splitlines()


# --- looking up -------------------------------------------------------------------------------------------------------


def load_spec(name: str | Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """A corpus spec by the name of a shipped one ("demo") or by the path of a YAML file; a UsageError for others."""
    try:
        spec = load_corpus_spec(_path(name), overrides)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    parts = [spec, spec.caption, spec.precompute, *(source.negatives for source in spec.sources)]
    for part in parts:
        needs_of(part.placement if part is not None else {})
    return spec


def list_corpora(role: str | None = None) -> list[Entry]:
    """All shipped corpora, ordered by role and name.

    Raises:
        UsageError: there is no such role.
    """
    if role is not None and role not in ROLES:
        raise unknown("role", role, ROLES)
    entries = [entry_of(load_spec(name)) for name in shipped_files("datasets")]
    order = list(ROLE_TITLES)
    entries.sort(key=lambda entry: (order.index(entry.role), entry.name))
    return [entry for entry in entries if role in (None, entry.role)]


def describe(name: str | Path, overrides: Sequence[str] = ()) -> Description:
    """A corpus in full, by the name of a shipped one or by the path of a YAML file.

    Raises:
        UsageError: there is no such name (the error suggests a similar one), or the spec is wrong.
    """
    spec = load_spec(name, overrides)
    notes = []
    for line in _path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        notes.append(line.removeprefix("#").removeprefix(" "))
    return Description(entry=entry_of(spec, str(name)), notes=tuple(notes), spec=spec)


def entry_of(spec: CorpusSpec, argument: str = "") -> Entry:
    """A spec in short; `argument` is the spec's argument on the command line, if it is not its name."""
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
        command=_command(argument or spec.name, sources),
    )


def _path(name: str | Path) -> Path:
    """The YAML file of a corpus."""
    paths = shipped_files("datasets")
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else paths.get(str(name))
    if path is None:
        raise unknown("dataset", str(name), paths)
    return path


# --- what is missing --------------------------------------------------------------------------------------------------


def check_paths(spec: CorpusSpec, argument: str = "") -> None:
    """Refuse a spec whose sources lack a path, before any work begins.

    Args:
        argument: the spec's argument on the command line, if it is not its name.

    Raises:
        UsageError: names the source, what its path must lead to, where to get it, and the command.
    """
    needs = needed_for_sources(spec)
    if not needs:
        return
    number = int(needs[0].key.split(".")[1])
    place = f"{spec.name}: source {number} ({spec.sources[number].kind}) has no path"
    raise UsageError(f"{place}{_advice(needs[0], spec)}; type: {_command(argument or spec.name, needs)}")


def needed_for_sources(spec: CorpusSpec) -> list[Need]:
    """Missing paths of sources, in order."""
    return [
        Need(key=f"sources.{number}.path", what=_what(source.path), example=EXAMPLES[source.kind])
        for number, source in enumerate(spec.sources)
        if source.kind in EXAMPLES and _is_missing(source.path)
    ]


def needed_for_pairs(spec: CorpusSpec) -> list[Need]:
    """Missing folders of pairs, in order. A folder that is also a source's path is set there."""
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
    """The description in angle brackets of a missing path."""
    return path[1:-1]


def _advice(need: Need, spec: CorpusSpec) -> str:
    """The text ": it takes ... (see https://...)", as far as the spec gives these facts."""
    see = f" (see {spec.homepage})" if spec.homepage and "://" not in need.what else ""
    return f": it takes {need.what}{see}" if need.what else see


def _command(argument: str, needs: Sequence[Need]) -> str:
    is_one_folder = len(needs) == 1 and not needs[0].what and needs[0].example == EXAMPLES["folder"]
    paths = ["--images DIR"] if is_one_folder else [need.override() for need in needs]
    return " ".join(["restoray curate", argument, *paths, "--out CORPUS"])


# --- output -----------------------------------------------------------------------------------------------------------


def list_json(entries: Iterable[Entry]) -> dict[str, Any]:
    """The output of `restoray datasets --json`."""
    return {"datasets": [entry.to_json() for entry in entries]}


def list_lines(entries: Sequence[Entry]) -> list[str]:
    """The output of `restoray datasets`: a line for each corpus, by role."""
    width = max((len(entry.name) for entry in entries), default=0)
    lines: list[str] = []
    for role, title in ROLE_TITLES.items():
        of_role = [entry for entry in entries if entry.role == role]
        if of_role:
            lines += [f"{title}:", *(f"  {entry.name:<{width}}  {entry.description}" for entry in of_role), ""]
    return [*lines, "restoray datasets NAME shows its licence, where the papers use it, and how to get it."]


def markdown() -> str:
    """The text of docs/datasets.md: every shipped corpus, and where the papers use it."""
    lines = [
        "# Corpora",
        "",
        "Made from `datasets/*.yaml` by `python -m pipelines.corpus.catalogue > docs/datasets.md`; a test compares.",
        "`restoray datasets NAME` also prints the filters, the splits, and how to make a corpus that was never",
        "published.",
        "",
        "Only corpora with an `hf://` address are downloaded automatically, and only if you have accepted their terms.",
        "Replace DIR, TABLE and CORPUS by your own paths. The licences are those that the makers state, as far as we",
        "know; read them before you use a corpus.",
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
                uses = [*entry.papers, *([f"metrics: {', '.join(entry.metrics)}"] if entry.metrics else [])]
                cells = [name, entry.description, entry.licence, "<br>".join(uses) or "by none of them", how]
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
