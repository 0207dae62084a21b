"""A study's report: one self-contained HTML page of facts, sentences, plots, tables and sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.naming import printable
from components.writing import replace_file
from pipelines.pages.page import file_uri, load_template


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with text, a plot, a table and a sheet; each of them is optional.

    Attributes:
        findings: sentences about the numbers.
        figure: (file name, PNG); also written next to the page.
        head, rows: a table of text.
        sheet: (file name, JPEG); also written next to the page.
    """

    title: str
    words: str = ""
    findings: Sequence[str] = ()
    figure: tuple[str, bytes] | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    sheet: tuple[str, bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """The content of a report."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    quarantine: Sequence[Mapping[str, Any]] = ()
    files: Sequence[str] = field(default=("values.jsonl", "values.csv", "summary.json"))


def write_page(out: Path, page: Page) -> Path:
    """Write report.html, and its plots and sheets as separate files; raises OSError."""
    sections = []
    for section in page.sections:
        uris = {"figure": "", "sheet": ""}
        for kind, asset, media in (("figure", section.figure, "png"), ("sheet", section.sheet, "jpeg")):
            if asset is not None:
                replace_file(out / asset[0], asset[1])
                uris[kind] = file_uri(asset[1], f"image/{media}")
        sections.append({"section": section, **uris})
    text = load_template("analyze_report.html.j2")({"page": page, "sections": sections})
    replace_file(out / "report.html", printable(text).encode())
    return out / "report.html"
