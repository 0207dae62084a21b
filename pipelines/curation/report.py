"""Write report.html about a curation: counts of accepted and refused pictures, the reasons, and examples of both.

The page needs no other file. Its content comes from the decided rows (decision 0004), as survey.py counts them; only a
few examples are decoded. Keys, sources and details come from strangers: the template escapes everything, and a content
policy in the page forbids it to load or send anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from components.corpora import Bounds, CorpusSpec
from components.images import Limits, crop, decode
from components.quality import SCORES
from components.types import Image, SampleError
from components.writing import replace_file
from pipelines.core.errors import Failure, first_line
from pipelines.curation.measure import SCORE
from pipelines.curation.survey import Survey, Tally, survey
from pipelines.pages.histograms import histogram_svg
from pipelines.pages.numbers import bytes_text, number_text
from pipelines.pages.page import data_uri, load_template, shrink
from pipelines.pages.sheets import middle_tile

MAX_BYTES = 3_000_000
SIZES: tuple[tuple[int, int, int], ...] = ((144, 82, 8), (144, 70, 8), (128, 65, 6), (96, 60, 4))
"""(side of an example in px, its JPEG quality, examples of a reason), tried in turn until the page fits MAX_BYTES."""
PARTS = 5  # candidate places across and down for the detail at native size
ACCEPTED_FACTOR = 2  # ratio of examples of accepted pictures to those of one reason
TABLE_ROWS = 15  # rows of the tables of sources and licences
KEY_CHARS, DETAIL_CHARS, KIND_CHARS = 160, 300, 60

STEPS: tuple[tuple[str, frozenset[str]], ...] = (
    ("Candidates listed", frozenset()),
    ("Could be read and decoded", frozenset({"list", "measure"})),
    ("Within all thresholds", frozenset({"filter", "score"})),
    ("No copies", frozenset({"select"})),
)
"""Steps of the funnel, and the stages whose rejections each step subtracts."""

MEANINGS: Mapping[str, str] = {
    "empty": "The file holds no bytes.",
    "not_image": "The bytes are not of a known picture format.",
    "unsupported_format": "A picture in a format that Restoray does not read, such as HEIC or PSD.",
    "unsupported_mode": "Pixel values without a definite meaning or range, such as 32-bit floats or spot colours.",
    "unsupported_color": "A declared colour space that is not converted to sRGB, such as HDR (PQ, HLG).",
    "too_large": "More bytes, pixels or metadata than allowed; refused before decoding.",
    "too_small": "The short side has fewer pixels than allowed.",
    "small_file": "The file has fewer bytes than allowed.",
    "aspect": "Too long a strip: the longer side is too many times the shorter.",
    "animated": "Several frames or pages.",
    "truncated": "The file or the download ends early.",
    "corrupt": "Broken in another way.",
    "no_picture": "A sample of an archive without a picture in it.",
    "unsafe_member": "A member of an archive whose name points outside of it, or that is not a plain file.",
    "unreadable": "The bytes could not be read from where they lie.",
    "crashed": "The process that decoded it died; its neighbours were measured again.",
    "timeout": "It took too long, to decode or to fetch.",
    "out_of_memory": "Decoding it needs more memory than there is.",
    "bad_url": "The address cannot be parsed.",
    "bad_scheme": "The address is neither http nor https.",
    "private_address": "The address points into a private network.",
    "unresolved": "The host's name has no address.",
    "broken_connection": "The connection was refused or broke.",
    "too_slow": "The body took too long to arrive.",
    "tls": "The host's certificate or handshake is bad.",
    "bad_answer": "The answer was not HTTP.",
    "too_many_redirects": "The address led on more often than allowed.",
    "http_error": "The server refused for good, as with 404.",
    "http_busy": "The server was busy until all tries were used up.",
    "bad_encoding": "The answer was packed in a way that we cannot undo.",
    "robots": "The server's answer forbids this use.",
    "duplicate": "The same bytes as an earlier picture.",
    "near_duplicate": "Looks like an earlier picture: recompressed, resized or slightly cropped.",
}
"""Reason codes in one line; codes of scores are explained by their thresholds."""


def size_limits(spec: CorpusSpec) -> dict[str, Bounds]:
    """Bounds of the spec for the sizes of files and pictures, in the units of the histograms."""
    rules = spec.filters
    least = rules.min_file_kib * 1024 or None
    return {
        "width": Bounds(min=rules.min_side_px),
        "height": Bounds(min=rules.min_side_px),
        "megapixels": Bounds(max=rules.max_megapixels),
        "aspect": Bounds(max=rules.max_aspect),
        "bytes": Bounds(min=least, max=rules.max_file_mib * 2**20),
    }


# --- examples ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Example:
    """An example candidate: its row, the whole picture, and a detail at native size; None without a picture."""

    row: Mapping[str, Any]
    whole: Image | None = None
    part: Image | None = None


def safe_limits(spec: CorpusSpec) -> Limits:
    """The spec's limits, but not above the decoder's defaults, which bound the memory of this task."""
    own, default = spec.filters.limits(), Limits()
    return replace(
        own, max_pixels=min(own.max_pixels, default.max_pixels), max_bytes=min(own.max_bytes, default.max_bytes)
    )


def is_safe(row: Mapping[str, Any]) -> bool:
    """Whether decoding a candidate is safe: it has been decoded before, so it neither kills nor hangs a decoder.

    A picture on which a learned score failed may have killed that score's process, so it is not decoded either.
    """
    return bool(row["at"]) and row["width"] > 0 and row["stage"] != "score"


def look(rows: Iterable[Mapping[str, Any]], read: Callable[[str], bytes], limits: Limits) -> list[Example]:
    """Examples of rows. Those that are safe are decoded, one after the other; the others have no picture."""
    side, examples = SIZES[0][0], []
    for row in rows:
        example = Example(row=row)
        if is_safe(row):
            try:
                picture = decode(read(row["at"]), limits, row["key"])
                example.whole = shrink(picture, side)
                if min(picture.shape[:2]) > side:
                    example.part = busiest_part(picture, side)
            except (SampleError, OSError):  # removed since it was measured; the page counts it as left out
                pass
        examples.append(example)
    return examples


def busiest_part(image: Image, side_px: int) -> Image:
    """The square [side_px, side_px, 3] with the most fine detail among PARTS x PARTS, at native size.

    Faults of a picture are visible at native size only, and not in a plain sky.
    """
    tops, lefts = (np.linspace(0, length - side_px, PARTS).astype(int).tolist() for length in image.shape[:2])
    places = [(top, left) for top in tops for left in lefts]
    parts = (image[top : top + side_px, left : left + side_px] for top, left in places)
    detail = [float(cv2.meanStdDev(cv2.Laplacian(part, cv2.CV_16S))[1].sum()) for part in parts]
    top, left = places[int(np.argmax(detail))]
    return crop(image, top, left, side_px, side_px)


def tiles(
    examples: Sequence[Example], size: tuple[int, int, int], factor: int, caption: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any]:
    """Content of the template for examples: pictures as data URIs, and the number of unreadable ones.

    Args:
        size: an entry of SIZES.
        factor: ratio of examples to those in `size`.
        caption: returns the text below an example.
    """
    side, quality, count = size
    safe = [example for example in examples if is_safe(example.row)][: count * factor]
    pictures = []
    for example in safe:
        if example.whole is None:
            continue
        part = "" if example.part is None else data_uri(middle_tile(example.part, side), quality)
        whole = shrink(example.whole, side)
        pictures.append(
            {
                "key": without_middle(example.row["key"], KEY_CHARS),
                "caption": caption(example.row),
                "whole": data_uri(whole, quality),
                "width": whole.shape[1],
                "height": whole.shape[0],
                "part": part,
            }
        )
    return {"pictures": pictures, "unreadable": len(safe) - len(pictures), "side": side}


def without_middle(text: str, most: int) -> str:
    """At most `most` characters, without the middle: names differ at the beginning or the end."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2 - 3) :]}"


# --- words ------------------------------------------------------------------------------------------------------------


def score_descriptions(spec: CorpusSpec) -> dict[str, str]:
    """Descriptions of scores by name."""
    descriptions = {name: score.description for name, score in SCORES.items()}
    for model in spec.filters.models:
        label = f", “{model.label}”" if model.label else ""
        descriptions[model.name] = f"Learned score: {model.kind} {model.model}{label}."
    return descriptions


def bounds_text(bounds: Bounds, unit: str = "") -> str:
    """The accepted range as text."""
    least, most = (None if end is None else number_text(end, unit) for end in (bounds.min, bounds.max))
    if least is not None and most is not None:
        return f"{least} to {most}"
    return f"≥ {least}" if least is not None else f"≤ {most}" if most is not None else ""


def fault_text(bounds: Bounds) -> str:
    """The refused range as text."""
    least, most = (None if end is None else number_text(end) for end in (bounds.min, bounds.max))
    if least is not None and most is not None:
        return f"outside {least} to {most}"
    return f"below {least}" if least is not None else f"above {most}" if most is not None else "missing"


def caption_of(row: Mapping[str, Any], bounds: Mapping[str, Bounds]) -> str:
    """Text below an example: size and split if accepted, else the score that decided and its value, else the detail."""
    if not row["code"]:
        return f"{row['width']} × {row['height']} · {row['split'].replace('_', '-')}"
    if row["stage"] in ("filter", "score"):
        own = [row["code"]] if row["code"] in bounds else list(bounds)
        for name in own:
            value = row.get(SCORE + name)
            if value is None or not bounds[name].hold(value):
                return f"{name} {'missing' if value is None else number_text(value)}"
    return without_middle(row["detail"], 90)


def percent(part: float, whole: float) -> str:
    """A share as text."""
    share = 100 * part / whole if whole else 0.0
    return "0 %" if not share else "< 0.1 %" if share < 0.1 else "100 %" if share == 100 else f"{share:.1f} %"


def fact_text(name: str, value: Any) -> str:
    """A fact's value as text: bytes in binary multiples, seconds as a duration, mappings in one line."""
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {fact_text(str(key), entry)}" for key, entry in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name.lower():
        return bytes_text(value)
    if "second" in name.lower() and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    if "second" in name.lower():
        return f"{value:.1f} s"
    return f"{value:,}" if isinstance(value, int) else number_text(value)


# --- the page ---------------------------------------------------------------------------------------------------------


def funnel(result: Survey) -> list[dict[str, Any]]:
    """Candidates that remain after each step, with their share of all candidates."""
    rest = result.candidates
    steps: list[dict[str, Any]] = []
    own_stages = frozenset[str]().union(*(stages for _, stages in STEPS))
    others = sum(count for stage, count in result.stages.items() if stage not in own_stages)
    for name, stages in STEPS:
        rejections = sum(result.stages[stage] for stage in stages)
        rest -= rejections
        steps.append({"name": name, "remaining": rest, "rejected": rejections})
    if others:
        rest -= others
        steps.append({"name": "Without other reasons", "remaining": rest, "rejected": others})
    for step in steps:
        step["share"] = 100 * step["remaining"] / (result.candidates or 1)
    return steps


def reasons(result: Survey, descriptions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every reason, most frequent first, with its meaning."""
    counts = result.by_code()
    most = max(counts.values(), default=1)
    rows: list[dict[str, Any]] = []
    for number, (code, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
        scores = sorted(((n, name) for (c, name), n in result.deciding.items() if c == code), reverse=True)
        meaning = MEANINGS.get(code, "")
        if scores:
            rules = [
                f"{name} {fault_text(result.bounds[name])}" + (f" ({n:,})" if len(scores) > 1 else "")
                for n, name in scores
            ]
            meaning = f"{'; '.join(rules)}. {descriptions.get(scores[0][1], '') if len(scores) == 1 else ''}".strip()
        stages = sorted({stage for c, stage in result.codes if c == code})
        rows.append(
            {
                "code": code,
                "number": number,
                "count": count,
                "bar": 100 * count / most,
                "share": percent(count, result.candidates),
                "stage": ", ".join(stages),
                "meaning": meaning,
            }
        )
    return rows


def score_charts(result: Survey, descriptions: Mapping[str, str], names: Iterable[str]) -> list[dict[str, Any]]:
    """A card for each score that has values."""
    cards = []
    for name in names:
        refusals = sum(count for (_, score), count in result.deciding.items() if score == name)
        bounds = result.bounds.get(name, Bounds())
        cards.append(chart_card(result, name, descriptions.get(name, ""), bounds, "", refusals))
    return [card for card in cards if card]


def chart_card(
    result: Survey, name: str, description: str, bounds: Bounds, unit: str, refusals: int | None = None
) -> dict[str, Any]:
    """One histogram with its texts; {} without a measure."""
    histogram = result.histograms.get(name)
    if histogram is None or not histogram.total:
        return {}
    low, high = number_text(histogram.low, unit), number_text(histogram.high, unit)
    notes = [f"measured {low}" if low == high else f"measured {low} to {high}"]
    if refusals is not None and (bounds.min is not None or bounds.max is not None):
        text = f"refuses {refusals:,} ({percent(refusals, result.candidates)})" if refusals else "refuses none"
        notes.insert(0, text)
    beyond = histogram.below + histogram.above
    if beyond:
        notes.append(f"{beyond:,} beyond the axis, in the last bar")
    return {
        "name": name,
        "description": description,
        "accepted": bounds_text(bounds, unit),
        "svg": histogram_svg(name, histogram, unit),
        "notes": notes,
    }


def size_charts(result: Survey, limits: Mapping[str, Bounds]) -> list[dict[str, Any]]:
    """Cards of the sizes of pictures and files."""
    measures = (
        ("width", "Pixels, upright.", "px"),
        ("height", "Pixels, upright.", "px"),
        ("megapixels", "Width times height, in millions.", ""),
        ("aspect", "Longer side over shorter side.", ""),
        ("bytes", "Size of the file.", "bytes"),
    )
    cards = [chart_card(result, name, description, limits[name], unit) for name, description, unit in measures]
    return [card for card in cards if card]


def kinds_table(tally: Tally) -> dict[str, Any]:
    """The largest kinds, with shares of the largest one for bars, and the counts of the others."""
    kinds = tally.largest()
    first, rest = kinds[:TABLE_ROWS], kinds[TABLE_ROWS:]
    most = max((candidates for _, candidates, _ in first), default=1)
    rows = [
        {
            "name": without_middle(name, KIND_CHARS),
            "candidates": n,
            "accepted": a,
            "bar": 100 * n / most,
            "accepted_share": 100 * a / n,
        }
        for name, n, a in first
    ]
    others = [sum(n for _, n, _ in rest) + tally.further[0], sum(a for *_, a in rest) + tally.further[1]]
    more = "more than " if tally.further[0] else ""
    return {"rows": rows, "rest": others, "kinds": f"{more}{len(rest):,}" if others[0] else ""}


def content_of(result: Survey, spec: CorpusSpec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Content of the template besides examples."""
    descriptions, limits = score_descriptions(spec), size_limits(spec)
    scores = [name for name in result.histograms if name not in limits]
    with_bounds = [n for n, b in result.bounds.items() if n in scores and (b.min is not None or b.max is not None)]
    rejections = result.candidates - result.accepted
    held_out = result.splits.get("held_out", 0)
    unmeasured = result.candidates - (result.histograms["width"].total if "width" in result.histograms else 0)
    return {
        "name": spec.name,
        "description": spec.description,
        "about": [text for text in (spec.licence, spec.homepage) if text],
        "candidates": result.candidates,
        "accepted": result.accepted,
        "accepted_share": percent(result.accepted, result.candidates),
        "rejected": rejections,
        "rejected_share": percent(rejections, result.candidates),
        "splits": sorted(result.splits.items(), key=lambda item: (item[0] != "train", item[0])),
        "held_share": 100 * held_out / (result.candidates or 1),
        "bytes": bytes_text(result.accepted_bytes),
        "megapixels": number_text(result.accepted_pixels / 1e6),
        "captioned": percent(result.captioned, result.accepted),
        "facts": [(str(n), fact_text(str(n), v)) for n, v in facts.items() if n not in ("candidates", "accepted")],
        "funnel": funnel(result),
        "reasons": reasons(result, descriptions),
        "scores_with_threshold": score_charts(result, descriptions, with_bounds),
        "scores_without_threshold": score_charts(
            result, descriptions, [name for name in scores if name not in with_bounds]
        ),
        "sizes": size_charts(result, limits),
        "unmeasured": unmeasured,
        "licences": kinds_table(result.licences),
        "sources": kinds_table(result.sources),
        "formats": kinds_table(result.formats),
    }


def write_curate_report(
    out: Path,
    spec: CorpusSpec,
    bounds: Mapping[str, Bounds],
    decided: Sequence[Path],
    read: Callable[[str], bytes],
    facts: Mapping[str, Any],
    target: Path | None = None,
) -> Path:
    """Write the page.

    Args:
        out: the corpus folder.
        spec: spec of the corpus.
        bounds: accepted range of each score, in the order in which scores are checked.
        decided: parquet files of decided rows (decision 0004); streamed twice, the first time a part of them.
        read: returns a candidate's bytes by its `at`; a SampleError or OSError leaves the example out, and counts it.
        facts: further facts for the top of the page, by name; a name with "bytes" or "seconds" gives the unit.
        target: <out>/report.html by default; replaced in one step.

    Returns:
        Path of the page. It has less than MAX_BYTES if smaller and fewer examples can achieve that.

    Raises:
        Failure: a decided file cannot be read, or the page cannot be written.
    """
    target = target or out / "report.html"
    try:
        result = survey(decided, bounds, size_limits(spec))
    except (OSError, pa.ArrowException) as error:
        raise Failure(f"the decided rows of {spec.name} cannot be read: {first_line(error)}.") from error
    limits = safe_limits(spec)
    examples = {code: look((row for *_, row in r.rows), read, limits) for code, r in result.examples.items()}
    content, template, page = content_of(result, spec, facts), load_template("curate_report.html.j2"), ""
    for size in SIZES:
        page = template({**content, **examples_content(examples, content["reasons"], size, bounds)})
        if len(page.encode()) <= MAX_BYTES:
            break
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, page.encode())
    except OSError as error:
        raise Failure(f"cannot write {target.name} to {target.parent}: {error.strerror or error}.") from error
    return target


def examples_content(
    examples: Mapping[str, Sequence[Example]],
    rows: Sequence[Mapping[str, Any]],
    size: tuple[int, int, int],
    bounds: Mapping[str, Bounds],
) -> dict[str, Any]:
    """Examples of accepted pictures, and of each reason with a table."""

    def caption(row: Mapping[str, Any]) -> str:
        return caption_of(row, bounds)

    sections = []
    for reason in rows:
        own = examples[reason["code"]]
        table = [
            {
                "key": without_middle(example.row["key"], KEY_CHARS),
                "source": without_middle(example.row["source"], KEY_CHARS),
                "detail": without_middle(example.row["detail"], DETAIL_CHARS),
            }
            for example in own
        ]
        sections.append({**reason, "tiles": tiles(own, size, 1, caption), "table": table})
    return {
        "accepted_examples": tiles(examples.get("", ()), size, ACCEPTED_FACTOR, caption),
        "rejected_examples": sections,
    }
