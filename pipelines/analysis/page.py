"""A study's report: one self-contained HTML page of facts, sentences, plots, tables and sheets."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.evaluation.statistics import Band, Correlation
from pipelines.rows import replace_file


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with words, a plot, a table and a sheet, each where there is one.

    Attributes:
        seen: what the numbers say, sentence by sentence.
        figure: (file name, PNG); written beside the page too.
        head, rows: a table of text.
        sheet: (file name, JPEG); written beside the page too.
    """

    title: str
    words: str = ""
    seen: Sequence[str] = ()
    figure: tuple[str, bytes] | None = None
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    sheet: tuple[str, bytes] | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report holds."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    quarantined: Sequence[Mapping[str, Any]] = ()
    files: Sequence[str] = field(default=("values.jsonl", "values.csv", "summary.json"))


def write_page(out: Path, page: Page) -> Path:
    """Write report.html, and its plots and sheets as files of their own; raises OSError."""
    import jinja2

    sections = []
    for section in page.sections:
        shown = {"figure": "", "sheet": ""}
        for kind, asset, media in (("figure", section.figure, "png"), ("sheet", section.sheet, "jpeg")):
            if asset is not None:
                replace_file(out / asset[0], asset[1])
                shown[kind] = f"data:image/{media};base64,{base64.b64encode(asset[1]).decode()}"
        sections.append({"section": section, **shown})
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    text = environment.get_template("analyze_report.html.j2").render(page=page, sections=sections)
    replace_file(out / "report.html", text.encode())
    return out / "report.html"


def shown(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for a table; a dash where there is none."""
    if value is None or value != value:
        return "–"
    text = f"{value:+.{digits}g}" if sign else f"{value:.{digits}g}"
    return text.replace("-", "−")


def interval(mean: float, low: float, high: float, sign: bool = True) -> str:
    """A mean with its interval."""
    return f"{shown(mean, sign=sign)} [{shown(low, sign=sign)}, {shown(high, sign=sign)}]"


def told(band: Band, sign: bool = True) -> str:
    """A single mean with its interval."""
    return interval(float(band.mean), float(band.low), float(band.high), sign)


def told_tie(tie: Correlation) -> str:
    """A rank correlation in words."""
    return f"rank correlation {interval(tie.rho, tie.low, tie.high)}, {tie.n} pictures"


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says."""
    if low != low or high != high:
        return "too few pictures to tell"
    return "higher" if low > 0 else "lower" if high < 0 else "no effect seen"
