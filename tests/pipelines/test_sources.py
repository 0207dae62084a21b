"""What is a candidate picture and under which key, told without a Ray."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from pipelines.curate import _decide
from pipelines.errors import UsageError
from pipelines.plans import run_plan
from pipelines.sources import Entry, for_folder, list_entries


def spec(folder: Path, split: SplitSpec | None = None) -> CorpusSpec:
    sources = [SourceSpec(kind="folder", path=str(folder))]
    return CorpusSpec(name="test", sources=sources, split=split or SplitSpec())


def verdict(content: str) -> dict:
    return {"bytes": 1, "sha256": content * 64, "ext": "png", "width": 9, "height": 9, "luma_std": 9.0}


def decided(contents: dict[str, str], split: SplitSpec | None = None) -> tuple[dict[str, dict], list[dict]]:
    """Accepted rows by source, and quarantine rows, of pictures with the key "IMG_1": content's digit by file name."""
    entries = [Entry(key="IMG_1", source=name) for name in contents]
    accepted, quarantine = _decide(entries, [verdict(c) for c in contents.values()], spec(Path(), split))
    return {row["source"]: row for row in accepted}, quarantine


def names(folder: Path, out: Path | None = None) -> list[str]:
    return [entry.source.removeprefix("folder:") for entry in list_entries(spec(folder), out)[0]]


@pytest.mark.parametrize(
    ("mark", "document"),
    [
        ("plan.json", {"plan": "demo", "stages": []}),
        ("done.json", {"digest": "ab", "outputs": {}}),
        ("index.json", {"digest": "ab", "splits": {}}),
        ("records.jsonl", {"key": "x", "output_sha256": "ab", "source_sha256": "cd"}),
    ],
)
def test_outputs_of_runs_below_a_source_are_no_candidates(tmp_path: Path, mark: str, document: dict) -> None:
    for name in ("a.png", "runs/demo/restore-1/restored/x.png", "runs/demo/mlflow.db", "trip/b.png", "new/part.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "runs" / "demo" / mark).write_text(json.dumps(document) + "\n")
    (tmp_path / "trip" / mark).write_text('{"stages": 3}')  # a stranger's file of that name hides no photograph
    (tmp_path / "report.html").write_text("")
    assert names(tmp_path, tmp_path / "new") == ["a.png", "trip/b.png"]
    assert names(tmp_path) == ["a.png", "new/part.tar", "trip/b.png"]


def test_source_and_output_differ(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="both input and output"):
        names(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="both input and output"):
        run_plan("demo", out=tmp_path, images=tmp_path / "." / "", dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_seen_from_below_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "photos" / "run").mkdir(parents=True)
    assert for_folder(spec(tmp_path), tmp_path / "photos" / "run" / "..").name == "photos"


def test_different_pictures_of_one_key_are_both_kept(tmp_path: Path) -> None:
    pictures = {"IMG 1.png": "a", "IMG_1.png": "b", "copy/IMG_1.png": "a"}
    accepted, quarantine = decided(pictures)
    keys = {name: row["key"] for name, row in accepted.items()}
    assert keys == {"IMG 1.png": "IMG_1-aaaaaaaa", "IMG_1.png": "IMG_1-bbbbbbbb"}
    assert [row["entry"].key for row in accepted.values()] == list(keys.values())
    assert [(row["source"], row["code"]) for row in quarantine] == [("copy/IMG_1.png", "duplicate")]
    turned, _ = decided(dict(reversed(pictures.items())))
    assert turned["IMG_1.png"]["key"] == keys["IMG_1.png"]  # whoever comes first
    alone, _ = decided({"IMG 1.png": "a", "copy/IMG_1.png": "a"})
    assert [row["key"] for row in alone.values()] == ["IMG_1"]


def test_a_key_that_is_taken_gets_longer(tmp_path: Path) -> None:
    entries = [Entry(key=key, source=str(n)) for n, key in enumerate(("x", "x", "x-aaaaaaaa"))]
    accepted, _ = _decide(entries, [verdict(c) for c in "abc"], spec(tmp_path))
    assert len({row["key"] for row in accepted}) == 3


def test_pictures_held_out_by_name_stay_out_of_training_under_a_longer_key() -> None:
    accepted, _ = decided({"IMG 1.png": "a", "IMG_1.png": "b"}, SplitSpec(held_out=["IMG 1"]))
    assert {row["split"] for row in accepted.values()} == {"held_out"}
    by_fraction, _ = decided({"IMG 1.png": "a", "IMG_1.png": "b"}, replace(SplitSpec(), held_out_fraction=0.2))
    assert sorted(row["split"] for row in by_fraction.values()) == ["held_out", "train"]
