"""One self-contained report.html about a curation: what was taken, what was refused and why, and what both look like.

Everything comes from the decided rows (decision 0004), as pipelines.curation.survey counts them; pictures are decoded
for a few examples only. Keys, sources and details come from strangers: the template escapes everything, and a content
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
from components.types import Image, SampleError
from pipelines.curation.survey import SCORE, Survey, Tally, survey
from pipelines.errors import Failure
from pipelines.histograms import histogram_svg, shown_bytes, shown_number
from pipelines.report import data_uri, shrink
from pipelines.rows import replace_file
from pipelines.sheets import square

MAX_BYTES = 3_000_000
SIZES: tuple[tuple[int, int, int], ...] = ((144, 82, 8), (144, 70, 8), (128, 65, 6), (96, 60, 4))
"""(side of an example in px, its JPEG quality, examples a reason), tried in turn until the page is below MAX_BYTES."""
PARTS = 5  # places across and down, of which the busiest is shown at native size
ACCEPTED_SHOWN = 2  # times as many examples of what was accepted as of one reason
TABLE_ROWS = 15  # of sources and licences
KEY_CHARS, DETAIL_CHARS, KIND_CHARS = 160, 300, 60

STEPS: tuple[tuple[str, frozenset[str]], ...] = (
    ("Candidates listed", frozenset()),
    ("Could be read and decoded", frozenset({"list", "measure"})),
    ("Within all thresholds", frozenset({"filter", "score"})),
    ("No copies", frozenset({"select"})),
)
"""What is left after which stages."""

MEANINGS: Mapping[str, str] = {
    "empty": "The file holds no bytes.",
    "not_image": "The bytes are of no picture format that is known.",
    "unsupported_format": "A picture in a format that is not read, such as HEIC or PSD.",
    "unsupported_mode": "Pixel values without a declared range, such as 32-bit floats.",
    "too_large": "More bytes, pixels or metadata than allowed; refused before decoding.",
    "too_small": "The short side has fewer pixels than allowed.",
    "small_file": "The file has fewer bytes than allowed.",
    "aspect": "Too long a strip: the longer side is too many times the shorter.",
    "animated": "Several frames or pages.",
    "truncated": "The file or the download ends early.",
    "corrupt": "Broken in another way.",
    "no_picture": "A sample of an archive without a picture in it.",
    "unsafe_member": "A name in an archive that points outside of it, or no plain file.",
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
    "bad_answer": "The answer was no HTTP.",
    "too_many_redirects": "The address led on more often than allowed.",
    "http_error": "The server refused for good, as with 404.",
    "http_busy": "The server was busy until all tries were used up.",
    "bad_encoding": "The answer was packed in a way that we cannot undo.",
    "robots": "The server's answer forbids this use.",
    "duplicate": "The same bytes as an earlier picture.",
    "near_duplicate": "Looks like an earlier picture: recompressed, resized or slightly cropped.",
}
"""Reason codes in one line; those of scores are told by their thresholds."""


def size_limits(spec: CorpusSpec) -> dict[str, Bounds]:
    """What the spec asks of a file's and a picture's size, in the units of the histograms."""
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
    """One candidate to look at: its row, the whole picture and a part at native size, None where it has none."""

    row: Mapping[str, Any]
    whole: Image | None = None
    part: Image | None = None


def safe_limits(spec: CorpusSpec) -> Limits:
    """The spec's, yet never above the usual ones: the page is made beside much else."""
    own, usual = spec.filters.limits(), Limits()
    return replace(own, max_pixels=min(own.max_pixels, usual.max_pixels), max_bytes=min(own.max_bytes, usual.max_bytes))


def showable(row: Mapping[str, Any]) -> bool:
    """Whether decoding a candidate is safe: it went well before, so what kills or hangs a decoder never comes here.

    What a learned score failed on may have killed that score's process, so it stays text too.
    """
    return bool(row["at"]) and row["width"] > 0 and row["stage"] != "score"


def look(rows: Iterable[Mapping[str, Any]], read: Callable[[str], bytes], limits: Limits) -> list[Example]:
    """Decode what may be decoded, one after the other; the others come without a picture."""
    side, examples = SIZES[0][0], []
    for row in rows:
        example = Example(row=row)
        if showable(row):
            try:
                picture = decode(read(row["at"]), limits, row["key"])
                example.whole = shrink(picture, side)
                if min(picture.shape[:2]) > side:
                    example.part = busiest_part(picture, side)
            except (SampleError, OSError):  # it was there when it was measured; the page counts it as left out
                pass
        examples.append(example)
    return examples


def busiest_part(image: Image, side_px: int) -> Image:
    """The square [side_px, side_px, 3] with most fine detail among PARTS x PARTS, at native size.

    Faults of a picture show at native size only, and not in a plain sky.
    """
    tops, lefts = (np.linspace(0, length - side_px, PARTS).astype(int).tolist() for length in image.shape[:2])
    places = [(top, left) for top in tops for left in lefts]
    parts = (image[top : top + side_px, left : left + side_px] for top, left in places)
    detail = [float(cv2.meanStdDev(cv2.Laplacian(part, cv2.CV_16S))[1].sum()) for part in parts]
    top, left = places[int(np.argmax(detail))]
    return crop(image, top, left, side_px, side_px)


def tiles(
    examples: Sequence[Example], size: tuple[int, int, int], times: int, told: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any]:
    """What the template shows of examples: pictures as data addresses, and how many could not be shown."""
    side, quality, count = size
    chosen = [example for example in examples if showable(example.row)][: count * times]
    shown = []
    for example in chosen:
        if example.whole is None:
            continue
        part = "" if example.part is None else data_uri(square(example.part, side), quality)
        whole = shrink(example.whole, side)
        shown.append(
            {
                "key": shortened(example.row["key"], KEY_CHARS),
                "told": told(example.row),
                "whole": data_uri(whole, quality),
                "width": whole.shape[1],
                "height": whole.shape[0],
                "part": part,
            }
        )
    return {"shown": shown, "lost": len(chosen) - len(shown), "side": side}


def shortened(text: str, most: int) -> str:
    """At most so many letters, the middle left out: beginnings and ends tell names apart."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2 - 3) :]}"


# --- words ------------------------------------------------------------------------------------------------------------


def score_descriptions(spec: CorpusSpec) -> dict[str, str]:
    """What scores say, by name."""
    try:
        from components.quality import SCORES
    except ImportError:
        known: Mapping[str, Any] = {}
    else:
        known = SCORES
    found = {name: str(getattr(score, "description", score or "")) for name, score in known.items()}
    for model in spec.filters.models:
        label = f", “{model.label}”" if model.label else ""
        found[model.name] = f"Learned score: {model.kind} {model.model}{label}."
    return found


def told_bounds(bounds: Bounds, unit: str = "") -> str:
    """What is accepted, in short."""
    least, most = (None if end is None else shown_number(end, unit) for end in (bounds.min, bounds.max))
    if least is not None and most is not None:
        return f"{least} to {most}"
    return f"≥ {least}" if least is not None else f"≤ {most}" if most is not None else ""


def told_fault(bounds: Bounds) -> str:
    """What is refused, in short."""
    least, most = (None if end is None else shown_number(end) for end in (bounds.min, bounds.max))
    if least is not None and most is not None:
        return f"outside {least} to {most}"
    return f"below {least}" if least is not None else f"above {most}" if most is not None else "missing"


def told_reason(row: Mapping[str, Any], bounds: Mapping[str, Bounds]) -> str:
    """Below an example: the score that decided with its value, else the detail; of accepted ones size and split."""
    if not row["code"]:
        return f"{row['width']} × {row['height']} · {row['split'].replace('_', '-')}"
    if row["stage"] in ("filter", "score"):
        own = [row["code"]] if row["code"] in bounds else list(bounds)
        for name in own:
            value = row.get(SCORE + name)
            if value is None or not bounds[name].hold(value):
                return f"{name} {'missing' if value is None else shown_number(value)}"
    return shortened(row["detail"], 90)


def percent(part: float, whole: float) -> str:
    """A share for people."""
    share = 100 * part / whole if whole else 0.0
    return "0 %" if not share else "< 0.1 %" if share < 0.1 else "100 %" if share == 100 else f"{share:.1f} %"


def told_fact(name: str, value: Any) -> str:
    """A fact's value for people: bytes in binary multiples, seconds as a duration, mappings in one line."""
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {told_fact(str(key), entry)}" for key, entry in value.items())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if "bytes" in name.lower():
        return shown_bytes(value)
    if "second" in name.lower() and value >= 60:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
    if "second" in name.lower():
        return f"{value:.1f} s"
    return f"{value:,}" if isinstance(value, int) else shown_number(value)


# --- the page ---------------------------------------------------------------------------------------------------------


def funnel(found: Survey) -> list[dict[str, Any]]:
    """How many are left after each step, with the share of all candidates."""
    left = found.candidates
    steps: list[dict[str, Any]] = []
    known = frozenset[str]().union(*(stages for _, stages in STEPS))
    others = sum(count for stage, count in found.stages.items() if stage not in known)
    for name, stages in STEPS:
        lost = sum(found.stages[stage] for stage in stages)
        left -= lost
        steps.append({"name": name, "left": left, "lost": lost})
    if others:
        left -= others
        steps.append({"name": "Without other reasons", "left": left, "lost": others})
    for step in steps:
        step["share"] = 100 * step["left"] / (found.candidates or 1)
    return steps


def reasons(found: Survey, descriptions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every reason, most frequent first, with its meaning."""
    counts = found.by_code()
    most = max(counts.values(), default=1)
    rows: list[dict[str, Any]] = []
    for number, (code, count) in enumerate(sorted(counts.items(), key=lambda item: (-item[1], item[0]))):
        scores = sorted(((n, name) for (c, name), n in found.deciding.items() if c == code), reverse=True)
        meaning = MEANINGS.get(code, "")
        if scores:
            rules = [
                f"{name} {told_fault(found.bounds[name])}" + (f" ({n:,})" if len(scores) > 1 else "")
                for n, name in scores
            ]
            meaning = f"{'; '.join(rules)}. {descriptions.get(scores[0][1], '') if len(scores) == 1 else ''}".strip()
        stages = sorted({stage for c, stage in found.codes if c == code})
        rows.append(
            {
                "code": code,
                "number": number,
                "count": count,
                "bar": 100 * count / most,
                "share": percent(count, found.candidates),
                "stage": ", ".join(stages),
                "meaning": meaning,
            }
        )
    return rows


def score_charts(found: Survey, descriptions: Mapping[str, str], names: Iterable[str]) -> list[dict[str, Any]]:
    """A card for each score that has values."""
    cards = []
    for name in names:
        refused = sum(count for (_, score), count in found.deciding.items() if score == name)
        cards.append(chart_card(found, name, descriptions.get(name, ""), found.bounds.get(name, Bounds()), "", refused))
    return [card for card in cards if card]


def chart_card(
    found: Survey, name: str, description: str, bounds: Bounds, unit: str, refused: int | None = None
) -> dict[str, Any]:
    """One histogram with its words; {} where nothing was measured."""
    histogram = found.histograms.get(name)
    if histogram is None or not histogram.total:
        return {}
    low, high = shown_number(histogram.low, unit), shown_number(histogram.high, unit)
    notes = [f"measured {low}" if low == high else f"measured {low} to {high}"]
    if refused is not None and (bounds.min is not None or bounds.max is not None):
        notes.insert(0, f"refuses {refused:,} ({percent(refused, found.candidates)})" if refused else "refuses none")
    beyond = histogram.below + histogram.above
    if beyond:
        notes.append(f"{beyond:,} beyond the axis, in the last bar")
    return {
        "name": name,
        "description": description,
        "accepted": told_bounds(bounds, unit),
        "svg": histogram_svg(name, histogram, unit),
        "notes": notes,
    }


def size_charts(found: Survey, limits: Mapping[str, Bounds]) -> list[dict[str, Any]]:
    """Cards of what headers and files say."""
    told = (
        ("width", "Pixels, upright.", "px"),
        ("height", "Pixels, upright.", "px"),
        ("megapixels", "Width times height, in millions.", ""),
        ("aspect", "Longer side over shorter side.", ""),
        ("bytes", "Size of the file.", "bytes"),
    )
    cards = [chart_card(found, name, description, limits[name], unit) for name, description, unit in told]
    return [card for card in cards if card]


def kinds_table(tally: Tally) -> dict[str, Any]:
    """The largest kinds with shares of the largest for bars, and what is not shown."""
    ordered = tally.largest()
    shown, rest = ordered[:TABLE_ROWS], ordered[TABLE_ROWS:]
    most = max((candidates for _, candidates, _ in shown), default=1)
    rows = [
        {
            "name": shortened(name, KIND_CHARS),
            "candidates": n,
            "accepted": a,
            "bar": 100 * n / most,
            "taken": 100 * a / n,
        }
        for name, n, a in shown
    ]
    left = [sum(n for _, n, _ in rest) + tally.further[0], sum(a for *_, a in rest) + tally.further[1]]
    more = "more than " if tally.further[0] else ""
    return {"rows": rows, "rest": left, "kinds": f"{more}{len(rest):,}" if left[0] else ""}


def content_of(found: Survey, spec: CorpusSpec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that the template shows besides examples."""
    descriptions, limits = score_descriptions(spec), size_limits(spec)
    scores = [name for name in found.histograms if name not in limits]
    ruled = [n for n, b in found.bounds.items() if n in scores and (b.min is not None or b.max is not None)]
    rejected = found.candidates - found.accepted
    held_out = found.splits.get("held_out", 0)
    unmeasured = found.candidates - (found.histograms["width"].total if "width" in found.histograms else 0)
    return {
        "name": spec.name,
        "description": spec.description,
        "about": [text for text in (spec.licence, spec.homepage) if text],
        "candidates": found.candidates,
        "accepted": found.accepted,
        "accepted_share": percent(found.accepted, found.candidates),
        "rejected": rejected,
        "rejected_share": percent(rejected, found.candidates),
        "splits": sorted(found.splits.items(), key=lambda item: (item[0] != "train", item[0])),
        "held_share": 100 * held_out / (found.candidates or 1),
        "bytes": shown_bytes(found.accepted_bytes),
        "megapixels": shown_number(found.accepted_pixels / 1e6),
        "captioned": percent(found.captioned, found.accepted),
        "facts": [(str(n), told_fact(str(n), v)) for n, v in facts.items() if n not in ("candidates", "accepted")],
        "funnel": funnel(found),
        "reasons": reasons(found, descriptions),
        "ruled": score_charts(found, descriptions, ruled),
        "free": score_charts(found, descriptions, [name for name in scores if name not in ruled]),
        "sizes": size_charts(found, limits),
        "unmeasured": unmeasured,
        "licences": kinds_table(found.licences),
        "sources": kinds_table(found.sources),
        "formats": kinds_table(found.formats),
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
        spec: what was curated.
        bounds: what is accepted of each score, in the order of judging.
        decided: parquet files of decided rows (decision 0004); streamed twice, the first time a sample of them.
        read: a candidate's bytes by its `at`; SampleError or OSError where they cannot be had: that example is left out
            and counted.
        facts: more to tell at the top, by name: a name with "bytes" or "seconds" says its unit.
        target: <out>/report.html by default; replaced in one step.

    Returns:
        The file: HTML that needs nothing beside itself, below MAX_BYTES wherever smaller and fewer examples achieve it.

    Raises:
        Failure: a decided file cannot be read, or the page cannot be written.
    """
    target = target or out / "report.html"
    try:
        found = survey(decided, bounds, size_limits(spec))
    except (OSError, pa.ArrowException) as error:
        raise Failure(f"the decided rows of {spec.name} cannot be read: {str(error).splitlines()[0]}.") from error
    limits = safe_limits(spec)
    examples = {code: look((row for *_, row in r.rows), read, limits) for code, r in found.examples.items()}
    content, template, page = content_of(found, spec, facts), load_template(), ""
    for size in SIZES:
        page = template({**content, **shown_examples(examples, content["reasons"], size, bounds)})
        if len(page.encode()) <= MAX_BYTES:
            break
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, page.encode())
    except OSError as error:
        raise Failure(f"cannot write {target.name} to {target.parent}: {error.strerror or error}.") from error
    return target


def shown_examples(
    examples: Mapping[str, Sequence[Example]],
    rows: Sequence[Mapping[str, Any]],
    size: tuple[int, int, int],
    bounds: Mapping[str, Bounds],
) -> dict[str, Any]:
    """Examples of what was accepted, and of each reason with a table."""

    def told(row: Mapping[str, Any]) -> str:
        return told_reason(row, bounds)

    rejected = []
    for reason in rows:
        mine = examples[reason["code"]]
        table = [
            {
                "key": shortened(example.row["key"], KEY_CHARS),
                "source": shortened(example.row["source"], KEY_CHARS),
                "detail": shortened(example.row["detail"], DETAIL_CHARS),
            }
            for example in mine
        ]
        rejected.append({**reason, "tiles": tiles(mine, size, 1, told), "table": table})
    return {"taken": tiles(examples.get("", ()), size, ACCEPTED_SHOWN, told), "rejected_examples": rejected}


def load_template() -> Callable[[Mapping[str, Any]], str]:
    """The page as a function; everything in it is escaped, and an unknown name is an error instead of a gap."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.get_template("curate_report.html.j2")
    return lambda content: template.render(content)
