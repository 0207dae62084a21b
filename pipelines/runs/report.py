"""One self-contained report.html for a run's folder: pictures, scores, curves, corpus, timings, recipes, commands.

The report reads only the files that the stages wrote (decision 0001). So it needs no server, works for a run that is
unfinished or was killed, and works on another machine. Keys, captions and settings are untrusted: the template escapes
everything, and the page's content policy forbids it to load or send anything.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from components.images import decode, read_png_text
from components.naming import printable
from components.places import SHIPPED_PRIORS
from components.types import Image, SampleError
from components.writing import replace_file
from pipelines.core.errors import Failure, RestorayError, UsageError
from pipelines.core.metrics import tail_metrics
from pipelines.core.pictures import pictures_by_key
from pipelines.core.rows import iter_lines, read_lines
from pipelines.corpus.shards import open_corpus
from pipelines.evaluation.evaluate import BASELINES, RESTORED, restate
from pipelines.pages.charts import curve_chart, loss_pairs
from pipelines.pages.page import data_uri, evenly, load_template, shrink

MAX_BYTES = 6_000_000
SIZES: tuple[tuple[int, int], ...] = ((512, 90), (384, 85), (256, 80), (192, 70))
"""(longest side in px, JPEG quality) of the report's pictures, tried in order until the page is below MAX_BYTES."""
MAX_GALLERY, MAX_CONTACT, MAX_QUARANTINE, MAX_TRIPLETS = 24, 60, 200, 4
THUMBNAIL_PX, TRIPLET_PX = 96, 640
HEADLINE = ("psnr", "ssim", "st_lpips")
"""Metrics of the first sentence."""
ARM_LABELS = {RESTORED: "restored", "lq": "input", "bicubic_median": "median + bicubic"}
STAGE_FOLDER = re.compile(r"(.+)-[0-9a-f]{8}")


class Reader:
    """Reads a run's files. A file that cannot be read adds a note and does not end the report."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.notes: list[str] = []

    def inside(self, path: Path) -> bool:
        """Whether `path` lies in the run's folder. The paths in plan.json and summary.json are not trusted."""
        return path.resolve().is_relative_to(self.run_dir.resolve())

    def name(self, path: Path) -> str:
        """The path below the run's folder, for people. The report must not show where on a machine it was made."""
        return path.relative_to(self.run_dir).as_posix() if path.is_relative_to(self.run_dir) else path.name

    def json(self, path: Path) -> dict[str, Any]:
        """A JSON object; {} if the file is missing, unreadable or not an object."""
        if not path.is_file() or not self.inside(path):
            return {}
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.notes.append(f"{self.name(path)} could not be read: {error}")
            return {}
        return document if isinstance(document, dict) else {}

    def rows(self, path: Path) -> list[dict[str, Any]]:
        """The complete lines of a JSON-lines file."""
        try:
            return read_lines(path) if path.is_file() and self.inside(path) else []
        except OSError as error:
            self.notes.append(f"{self.name(path)} could not be read: {error}")
            return []

    def picture(self, path: Path, data: bytes | None = None) -> Image | None:
        """A decoded picture; None, with a note, if it cannot be decoded."""
        try:
            return decode(path.read_bytes() if data is None else data, key=self.name(path))
        except (OSError, SampleError) as error:
            self.notes.append(f"{self.name(path)} could not be shown: {error}")
            return None


def read_stages(reader: Reader) -> list[dict[str, Any]]:
    """The run's stages in order: name, verb, digest, folder (Path) and its name, seconds, state, settings, results."""
    plan = reader.json(reader.run_dir / "plan.json")
    entries = [entry for entry in plan.get("stages") or [] if isinstance(entry, dict) and entry.get("name")]
    if not entries:  # a run without a plan.json: its stages are found by the names of their folders
        folders = sorted(path for path in reader.run_dir.iterdir() if path.is_dir())
        matches = [(path, STAGE_FOLDER.fullmatch(path.name)) for path in folders]
        entries = [{"name": match[1], "folder": path.name} for path, match in matches if match]
    stages = []
    for entry in entries:
        folder = reader.run_dir / str(entry.get("folder") or "")
        if folder == reader.run_dir or not reader.inside(folder):
            reader.notes.append(f"stage {entry['name']} names a folder outside the run")
            continue
        done_json = reader.json(folder / "done.json")
        seconds = entry.get("seconds") or done_json.get("seconds") or 0.0
        state = str(entry.get("state") or ("finished" if done_json else "unfinished" if folder.is_dir() else "planned"))
        stages.append(
            {
                "name": str(entry["name"]),
                "verb": str(entry.get("verb") or done_json.get("verb") or ""),
                "digest": str(entry.get("digest") or done_json.get("digest") or ""),
                "folder": folder,
                "place": folder.name,
                "seconds": float(seconds) if isinstance(seconds, (int, float)) else 0.0,
                "state": "done before" if state == "done" else state,
                "skipped": bool(entry.get("skipped")),
                "resolved": entry.get("resolved") or entry.get("recipe") or done_json.get("recipe"),
                "results": done_json.get("results") or {},
            }
        )
    return stages


def picture_folders(reader: Reader, stages: Sequence[Mapping[str, Any]], evaluation: Path | None) -> dict[str, Path]:
    """Folders of restored, lq and hq pictures: those of summary.json, else those of the last stage with a restored/."""
    folders: dict[str, Path] = {}
    if evaluation is not None:
        places = reader.json(evaluation / "summary.json").get("folders") or {}
        folders = {role: (evaluation / str(place)).resolve() for role, place in places.items()}
    for stage in stages:
        if (stage["folder"] / RESTORED).is_dir() and RESTORED not in folders:
            folders = {role: stage["folder"] / role for role in (RESTORED, "lq", "hq")}
    return {role: path for role, path in folders.items() if path.is_dir() and reader.inside(path)}


def gallery(
    reader: Reader, folders: Mapping[str, Path], rows: Mapping[str, Mapping[str, Any]], size: tuple[int, int]
) -> tuple[list[dict[str, Any]], int]:
    """Figures for the slider, and the number of all pictures.

    With more than MAX_GALLERY pictures the report shows an even selection of the keys, not of the scores.
    """
    side, quality = size
    missing: list[dict[str, str]] = []
    by_role = {role: pictures_by_key(folder, missing) for role, folder in folders.items()}
    keys = sorted(by_role.get(RESTORED, {}))
    figures = []
    for key in evenly(keys, MAX_GALLERY):
        images: dict[str, str] = {}
        shape = (1, 1)
        for role in (RESTORED, "lq", "hq"):
            path = by_role.get(role, {}).get(key)
            picture = reader.picture(path) if path is not None else None
            if picture is not None:
                shape = picture.shape[:2] if role == RESTORED else shape
                images[role] = data_uri(shrink(picture, side), quality)
        if RESTORED not in images:
            continue
        scores = (rows.get(key) or {}).get("scores") or {}
        names = [name for name in scores.get(RESTORED, {}) if name in scores.get("lq", {})]
        changes = [{"metric": n, "lq": number(scores["lq"][n]), "restored": number(scores[RESTORED][n])} for n in names]
        path = by_role[RESTORED][key]
        info = text_chunks(path)
        figures.append(
            {"key": key, "images": images, "height": shape[0], "width": shape[1], "changes": changes, "info": info}
        )
    return figures, len(keys)


def text_chunks(path: Path) -> dict[str, str]:
    """The text chunks of a restored PNG; {} for other files."""
    try:
        return {key: value[:200] for key, value in read_png_text(path.read_bytes()).items()}
    except (OSError, ValueError):
        return {}


def number(value: float) -> str:
    """A number with 2 decimals, below 10 with 4."""
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _beside_input(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Means of restored and lq by metric, for metrics that compare with the input and have a sentence of their own."""
    means, verdicts = summary.get("means") or {}, summary.get("verdicts") or {}
    names = [n for n, info in (summary.get("metrics") or {}).items() if info.get("compares") and n in verdicts]
    arms = (RESTORED, BASELINES[0])
    return {n: {a: means[a][n]["mean"] for a in arms} for n in names if all(n in means.get(a, {}) for a in arms)}


def headline(
    comparisons: Sequence[Mapping[str, Any]], beside: Collection[str], units: Mapping[str, str] = MappingProxyType({})
) -> str:
    """One sentence about restored against input: pictures that got better in the main scores, and what got worse.

    It is empty without comparisons with the input. Scores that compare with the input (`beside`) do not count.
    """
    counted = [c for c in comparisons if c.get("opponent") == BASELINES[0] and c.get("metric") not in beside]
    shown = [c for name in HEADLINE for c in counted if c.get("metric") == name] or counted[:1]
    if not shown:
        return ""
    parts = [
        f"{c['wins']} of {c['pictures']} in {c['metric']} "
        f"(mean {' '.join(filter(None, (format(c['mean_difference'], '+.3g'), units.get(c['metric'], ''))))})"
        for c in shown
    ]
    losses = [str(c["metric"]) for c in counted if c.get("outcome") == "loses"]
    worse = f"; on average it is worse in {', '.join(losses)}" if losses else ""
    few = " These are too few pictures to say more." if any(c.get("outcome") == "too few" for c in shown) else ""
    return f"The restored picture is better than its input on {', '.join(parts)}{worse}.{few}"


def score_table(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, Any]:
    """The table of scores: a line per picture and arm, a column per metric, the best arm marked; means come first."""
    metrics = summary.get("metrics") or {}
    means = summary.get("means") or {}
    arms = [arm for arm in (RESTORED, *BASELINES) if arm in means]

    def line(arm: str, by_arm: Mapping[str, Mapping[str, float]], lacking: Mapping[str, Any]) -> dict[str, Any]:
        cells = []
        for name, info in metrics.items():
            value = by_arm.get(arm, {}).get(name)
            values = [by_arm[other][name] for other in arms if name in by_arm.get(other, {})]
            best = bool(values) and value == (max(values) if info.get("higher_is_better") else min(values))
            why = (lacking.get(arm) or {}).get(name, "")
            cells.append(
                {"text": "–" if value is None else number(value), "best": best and len(values) > 1, "why": why}
            )
        return {"arm": ARM_LABELS.get(arm, arm), "cells": cells}

    mean_values = {arm: {name: entry["mean"] for name, entry in means[arm].items()} for arm in arms}
    blocks = [{"key": "Mean over all pictures", "mean": True, "lines": [line(arm, mean_values, {}) for arm in arms]}]
    for row in rows:
        lines = [line(arm, row.get("scores") or {}, row.get("missing") or {}) for arm in arms]
        blocks.append({"key": row.get("key", ""), "mean": False, "lines": lines})
    columns = [
        {"name": name, "direction": "higher is better" if info.get("higher_is_better") else "lower is better"}
        for name, info in metrics.items()
    ]
    return {"columns": columns, "blocks": blocks if rows else []}


def training(reader: Reader, stages: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Loss curves and sample sheets of every stage with a metrics.jsonl or samples/."""
    stage_entries = []
    for stage in stages:
        try:
            metrics, _ = tail_metrics(stage["folder"] / "metrics.jsonl")
        except OSError as error:
            reader.notes.append(f"{stage['place']}/metrics.jsonl could not be read: {error}")
            metrics = []
        charts = [curve_chart(*pair) for pair in loss_pairs(metrics)]
        sheets = (
            sorted((stage["folder"] / "samples").glob("step-*.png")) if (stage["folder"] / "samples").is_dir() else []
        )
        samples = []
        for path in evenly(sheets, MAX_TRIPLETS):
            picture = reader.picture(path) if reader.inside(path) else None
            if picture is not None:
                step = re.sub(r"\D", "", path.stem).lstrip("0") or "0"
                samples.append({"step": step, "uri": data_uri(shrink(picture, min(TRIPLET_PX, 2 * size[0])), size[1])})
        if charts or samples:
            stage_entries.append({"name": stage["name"], "charts": charts, "samples": samples})
    return stage_entries


def corpus(reader: Reader, stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Counts and a contact sheet of every curated corpus. Pictures are read from the shards by offset."""
    corpora = []
    for stage in stages:
        index = reader.json(stage["folder"] / "index.json")
        path = stage["folder"] / "manifest.jsonl"
        if not index or not index.get("splits") or not path.is_file() or not reader.inside(path):
            continue
        total = sum(int(content.get("samples", 0)) for content in index["splits"].values())
        sample_numbers = set(evenly(range(total), MAX_CONTACT))
        sample_rows, splits, licences = [], Counter[str](), Counter[str]()
        for number, row in enumerate(iter_lines(path)):
            splits[str(row.get("split"))] += 1
            licences[str(row.get("licence") or "unstated")] += 1
            if number in sample_numbers:
                sample_rows.append(row)
        places = sample_places(stage["folder"], {str(row.get("key")) for row in sample_rows})
        thumbnails = []
        for row in sample_rows:
            picture = shard_picture(reader, places.get(str(row.get("key"))))
            if picture is not None:
                uri = data_uri(shrink(picture, THUMBNAIL_PX), 75)
                thumbnails.append(
                    {"uri": uri, **{k: str(row.get(k) or "") for k in ("key", "split", "credit", "licence", "caption")}}
                )
        corpora.append(
            {
                "name": stage["name"],
                "splits": splits,
                "licences": licences,
                "thumbnails": thumbnails,
                "digest": index.get("digest"),
            }
        )
    return corpora


def studies(reader: Reader, stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Table and picture of every study, with the place of its own page."""
    entries = []
    for stage in stages:
        folder = stage["folder"] / "study"
        summary = reader.json(folder / "summary.json")
        table = summary.get("table")
        if not isinstance(table, dict):
            continue
        path = folder / Path(str(summary.get("picture") or "none")).name
        picture = reader.picture(path) if path.is_file() and reader.inside(path) else None
        entries.append(
            {
                "name": stage["name"],
                "words": str(table.get("words") or ""),
                "head": table.get("head") or [],
                "rows": table.get("rows") or [],
                "uri": data_uri(picture, 90) if picture is not None else "",
                "page": reader.name(folder / "report.html"),
            }
        )
    return entries


def sample_places(folder: Path, keys: Collection[str]) -> dict[str, tuple[Path, int, int]]:
    """(shard, offset, size) of samples by key; empty if the folder is not a readable corpus."""
    places: dict[str, tuple[Path, int, int]] = {}
    try:
        for split in open_corpus(folder).splits.values():
            for number, shard in enumerate(split.shards):
                for row in split.batch(number).select(["key", "offset", "size"]).to_pylist():
                    if row["key"] in keys:
                        places[row["key"]] = (split.folder / shard["name"], row["offset"], row["size"])
    except RestorayError:
        return {}
    return places


def shard_picture(reader: Reader, place: tuple[Path, int, int] | None) -> Image | None:
    """One sample's picture, read from its range of the tar."""
    if place is None or not place[0].is_file() or not reader.inside(place[0]):
        return None
    path, offset, size = place
    with path.open("rb") as stream:
        stream.seek(offset)
        return reader.picture(path, stream.read(size))


def quarantine(reader: Reader, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rejected samples of all stages: the count of each reason, the first rows and the total."""
    rows = []
    for stage in stages:
        for path in sorted(stage["folder"].glob("quarantine.jsonl")) + sorted(
            stage["folder"].glob("*/quarantine.jsonl")
        ):
            for row in reader.rows(path):
                rows.append(
                    {"in": stage["name"], **{k: str(row.get(k) or "") for k in ("key", "source", "code", "detail")}}
                )
    counts = Counter(row["code"] for row in rows).most_common()
    return {"counts": counts, "rows": rows[:MAX_QUARANTINE], "total": len(rows)}


def model_card(reader: Reader, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last model of the run, and its prior's own metrics, which bound every restoration."""
    model: dict[str, Any] = {}
    for stage in stages:
        info = reader.json(stage["folder"] / "model" / "model.json")
        if info:
            model = {"info": info, "place": f"{stage['place']}/model"}
    if not model:
        return {}
    prior = model["info"].get("prior") or {}
    identity = str(prior.get("id") or "")
    card: dict[str, Any] = {}
    if re.fullmatch(r"[\w.-]+", identity) and identity.strip("."):
        shipped = SHIPPED_PRIORS / identity / "model.json"
        if shipped.is_file():
            card = json.loads(shipped.read_text(encoding="utf-8"))
    ceiling = card.get("metrics") or {}
    own = model["info"].get("metrics") or {}
    if not prior and "autoencoder" in own:  # the run trained a prior, whose own metrics are the ceiling
        ceiling = own
    flat = {key: value for key, value in flat_numbers(ceiling).items() if "/start" not in key}
    reconstruction_numbers = {
        k: v for k, v in flat.items() if re.search(r"psnr|_db\b|reconstruction", k, re.IGNORECASE)
    }
    keys = ("name", "system", "licence", "permitted_use", "data_manifest_digest")
    facts = {key: model["info"].get(key) for key in keys if model["info"].get(key)}
    return {
        "place": model["place"],
        "facts": facts,
        "prior": identity,
        "ceiling": reconstruction_numbers or flat,
        "has_numbers": bool(flat),
    }


def flat_numbers(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The numbers of nested mappings under names joined by "/"."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_numbers(value, f"{name}/"))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[name] = number(float(value))
    return flat


def timings(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The stages with their share of the longest time in per cent, and the total of seconds."""
    longest = max((stage["seconds"] for stage in stages), default=0.0) or 1.0
    rows = [{**stage, "share": round(100 * stage["seconds"] / longest, 1)} for stage in stages]
    return {"rows": rows, "total": sum(stage["seconds"] for stage in stages)}


def run_again(run_dir: Path, plan: Mapping[str, Any]) -> str:
    """The command that made a run, from its plan.json, to be typed in the run's folder; its paths are relative to that.

    The command must be complete: without its overrides it is another plan, whose stages start again in this folder.
    """

    def relative(path: Any) -> str:
        return os.path.relpath(os.path.realpath(str(path)), run_dir.resolve())

    name = relative(plan["file"]) if plan.get("file") else str(plan.get("plan") or "")
    images = ["--images", relative(plan["images"])] if plan.get("images") else []
    return shlex.join(["restoray", "run", name, *map(str, plan.get("overrides") or []), "--out", ".", *images])


def commands(model: Mapping[str, Any], again: str) -> list[dict[str, str]]:
    """Commands to type next in the run's folder. `again` is the command of the run; "" if unknown."""
    steps = [
        ("Write this report again", "restoray report ."),
        ("Browse runs, curves and models", "mlflow ui --backend-store-uri sqlite:///mlflow.db"),
    ]
    if again:
        steps.append(("Continue the run, or see that all its stages are done", again))
    if model:
        place = shlex.quote(str(model["place"]))
        steps = [
            ("Restore your own pictures", f"restoray restore PICTURES --model {place} --out restored"),
            ("Serve the model on this machine", f"restoray serve --model {place}"),
            *steps,
        ]
    return [{"what": what, "command": command} for what, command in steps]


def collect(run_dir: Path, size: tuple[int, int]) -> dict[str, Any]:
    """The template's variables."""
    reader = Reader(run_dir)
    plan = reader.json(run_dir / "plan.json")
    stages = read_stages(reader)
    evaluation = next((s["folder"] for s in reversed(stages) if (s["folder"] / "summary.json").is_file()), None)
    summary = reader.json(evaluation / "summary.json") if evaluation is not None else {}
    rows = reader.rows(evaluation / "scores.jsonl") if evaluation is not None else []
    try:
        summary = restate(summary, rows) if summary else {}
    except (KeyError, TypeError, AttributeError):
        reader.notes.append("the summary of the scores lacks something: its verdict is shown as it was written")
    figures, pictures = gallery(
        reader, picture_folders(reader, stages, evaluation), {str(r.get("key")): r for r in rows}, size
    )
    model = model_card(reader, stages)
    verdict = summary.get("verdict")
    recipes = [
        {"name": s["name"], "text": json.dumps(s["resolved"], indent=2, ensure_ascii=False)}
        for s in stages
        if s["resolved"]
    ]
    table = score_table(rows, summary)
    comparisons = [c for c in summary.get("comparisons") or [] if isinstance(c, dict)]
    beside = _beside_input(summary)
    units = {name: str(info.get("unit") or "") for name, info in (summary.get("metrics") or {}).items()}
    choices = [str(s["results"].get("verdict") or "") for s in stages if s["verb"] == "choose"]
    return {
        "title": str(plan.get("title") or plan.get("plan") or run_dir.name),
        "run": run_dir.name,
        "stages": stages,
        "unfinished": [s["name"] for s in stages if s["state"] not in ("finished", "done before")],
        "verdict": verdict if isinstance(verdict, str) else "",
        "headline": headline(comparisons, beside, units),
        "choices": [choice for choice in choices if choice],
        "comparisons": comparisons,
        "beside": beside,
        "verdicts": summary.get("verdicts") or {},
        "missing": [m for m in summary.get("missing") or [] if isinstance(m, dict)],
        "figures": figures,
        "pictures": pictures,
        "table": table,
        "directions": {column["name"]: column["direction"] for column in table["columns"]},
        "units": units,
        "studies": studies(reader, stages),
        "training": training(reader, stages, size),
        "corpora": corpus(reader, stages),
        "quarantine": quarantine(reader, stages),
        "model": model,
        "timings": timings(stages),
        "recipes": recipes,
        "commands": commands(model, run_again(run_dir, plan) if plan.get("plan") else ""),
        "notes": reader.notes,
        "number": number,
        "labels": ARM_LABELS,
        "headline_metrics": HEADLINE,
    }


def write_report(run_dir: Path, out_html: Path | None = None) -> Path:
    """Write the report of a run, whole or partial.

    Args:
        run_dir: the run's folder.
        out_html: the file to write, <run_dir>/report.html by default. It is replaced atomically.

    Returns:
        The file: self-contained HTML, below MAX_BYTES if smaller pictures can achieve that.

    Raises:
        UsageError: the folder does not exist or holds no stage.
        Failure: the file cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UsageError(f"no run folder {str(run_dir)!r}")
    template = load_template("report.html.j2")
    page = ""
    for size in SIZES:
        content = collect(run_dir.absolute(), size)
        if not content["stages"]:
            raise UsageError(f"{str(run_dir)!r} is not a run: it has neither plan.json nor a stage's folder")
        page = template(content)
        if len(printable(page).encode()) <= MAX_BYTES:
            break
    out = Path(out_html) if out_html is not None else run_dir / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, printable(page).encode())
    except OSError as error:
        raise Failure(f"cannot write {out.name} to {out.parent}: {error.strerror or error}.") from error
    return out
