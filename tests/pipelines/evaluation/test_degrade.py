"""`restoray degrade`: pictures with their plans, resuming, replaying, bad records and the contact sheet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from components.images import decode, encode_png
from components.synthetic import dead_leaves
from pipelines.core.errors import RetryLater, UsageError
from pipelines.core.folders import folder_lock
from pipelines.core.rows import read_lines
from pipelines.evaluation.degrade import LIMITS, degrade_folder, read_records, replay
from pipelines.pages.sheets import contact_sheet

RECORD = '{"key": "%s", "source": "%s", "folder": "", "source_sha256": "", "pixels_sha256": "", "plan": {}}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, one of a single pixel, a broken one and a note."""
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    for index, name in enumerate(("a.png", "b.png", "sub/c.png", "gray.png", "tiny.png")):
        picture = dead_leaves(64, 0, index)
        picture = np.repeat(picture[..., :1], 3, 2) if name == "gray.png" else picture
        (root / name).write_bytes(encode_png(picture[:1, :1] if name == "tiny.png" else picture))
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (root / "notes.txt").write_text("")
    return root


def pixels(out: Path) -> dict[str, str]:
    return {p.stem: hashlib.sha256(decode(p.read_bytes(), LIMITS).tobytes()).hexdigest() for p in out.glob("*.png")}


def test_every_picture_has_its_plan_and_a_broken_one_its_reason(folder: Path, tmp_path: Path) -> None:
    result = degrade_folder(folder, tmp_path / "out", preset="realesrgan", seed=3)
    assert (result.degraded, result.quarantined, result.ignored) == (5, 1, 1)
    bad = {row["key"]: row["code"] for row in read_lines(result.quarantine)}
    assert bad == {"broken": "truncated"}
    rows = {row["key"]: row for row in read_lines(result.records)}
    assert set(rows) == {"a", "b", "sub/c", "gray", "tiny"}
    for key, row in rows.items():
        png = (tmp_path / "out" / row["output"]).read_bytes()
        assert hashlib.sha256(png).hexdigest() == row["output_sha256"]
        assert row["plan"]["ops"]
        assert row["source"] == key + ".png"
        assert set(row["strength"]) == {"blur_px", "smallest", "noise", "quality", "lost"}
    assert decode((tmp_path / "out" / "a.png").read_bytes()).shape == (64, 64, 3)
    sheet = cv2.imread(str(result.sheet))
    assert sheet is not None
    assert sheet.std() > 20


def test_a_picture_does_not_depend_on_its_folder_and_a_rerun_skips(folder: Path, tmp_path: Path) -> None:
    degrade_folder(folder, tmp_path / "all", seed=3)
    degrade_folder(folder / "a.png", tmp_path / "one", seed=3)
    assert pixels(tmp_path / "all")["a"] == pixels(tmp_path / "one")["a"]
    again = degrade_folder(folder, tmp_path / "all", seed=3)
    assert (again.degraded, again.skipped, again.quarantined) == (0, 5, 1)
    (tmp_path / "all" / "b.png").write_bytes(b"damaged")
    third = degrade_folder(folder, tmp_path / "all", seed=3)
    assert (third.degraded, third.skipped) == (1, 4)
    other = degrade_folder(folder, tmp_path / "all", seed=4)
    assert other.degraded == 5
    assert len(read_lines(other.records)) == 5


def test_records_replay_to_the_same_pixels(folder: Path, tmp_path: Path) -> None:
    first = degrade_folder(folder, tmp_path / "out", preset="bsrgan")
    whole = replay(first.records, None, tmp_path / "again")
    assert (whole.degraded, whole.differing) == (5, [])
    assert pixels(tmp_path / "again") == pixels(tmp_path / "out")
    one = tmp_path / "record.json"  # one record, whose original has moved
    one.write_text(json.dumps(next(row for row in read_lines(first.records) if row["key"] == "b"), indent=1))
    new_folder = tmp_path / "moved"
    folder.rename(new_folder)
    assert replay(one, new_folder, tmp_path / "alone").degraded == 1
    assert pixels(tmp_path / "alone")["b"] == pixels(tmp_path / "out")["b"]


def test_a_replay_notices_other_originals_and_other_pixels(folder: Path, tmp_path: Path) -> None:
    first = degrade_folder(folder, tmp_path / "out")
    rows = {row["key"]: row for row in read_lines(first.records)}
    rows["b"]["pixels_sha256"] = "0" * 64
    rows["gray"]["plan"]["ops"].append({"op": "smear"})
    records = tmp_path / "records.json"
    records.write_text(json.dumps(list(rows.values())))
    (folder / "a.png").write_bytes(encode_png(dead_leaves(64, 9, 9)))
    result = replay(records, None, tmp_path / "again")
    assert result.differing == ["b"]
    assert {row["key"]: row["code"] for row in read_lines(result.quarantine)} == {"a": "changed", "gray": "plan"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        ("{", "holds no records"),
        ('{"key": "a"}', "record 1 lacks source"),
        ('{"key": 5}', "record 1 lacks key"),
        (RECORD % ("../a", "a.png"), "not a valid key"),
        (RECORD % ("a", "../a.png"), "outside its folder"),
        (RECORD % ("a", "/etc/hosts"), "outside its folder"),
        (f"[{RECORD % ('a', 'a.png')}, {RECORD % ('a', 'b.png')}]", "record 2 has the key of an earlier record"),
    ],
)
def test_bad_records_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_records(tmp_path / "r.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_records(tmp_path / "absent.json")


def test_a_changed_plan_is_executed_again(folder: Path, tmp_path: Path) -> None:
    first = degrade_folder(folder / "a.png", tmp_path / "out")
    (row,) = read_lines(first.records)
    record = tmp_path / "edited.json"
    record.write_text(json.dumps(row))
    replay(record, None, tmp_path / "again")
    row["plan"]["ops"] = row["plan"]["ops"][:1]
    record.write_text(json.dumps(row))
    second = replay(record, None, tmp_path / "again")
    assert (second.degraded, second.skipped, second.differing) == (1, 0, ["a"])
    with pytest.raises(UsageError, match="holds the records themselves"):
        replay(first.records, None, tmp_path / "out")


@pytest.mark.parametrize(
    "change", [{"level": float("nan")}, {"level": -1}, {"seed": -1}, {"kind": "snow"}, {"gray": 1}]
)
def test_a_plan_that_cannot_be_executed_costs_its_picture_only(folder: Path, tmp_path: Path, change: dict) -> None:
    first = degrade_folder(folder, tmp_path / "out", preset="x4-noise40")
    rows = read_lines(first.records)
    (noise,) = (op for op in rows[0]["plan"]["ops"] if op["op"] == "noise")
    noise.update(change)
    records = tmp_path / "records.json"
    records.write_text(json.dumps(rows))
    result = replay(records, None, tmp_path / "again")
    assert (result.degraded, result.quarantined) == (4, 1)
    assert read_lines(result.quarantine)[0]["code"] == "plan"


def test_a_stopped_job_continues(folder: Path, tmp_path: Path) -> None:
    """A picture is written before its record, so a kill can leave a picture without a record."""
    first = degrade_folder(folder, tmp_path / "out", seed=3)
    whole = pixels(tmp_path / "out")
    first.records.write_text(
        "".join(line + "\n" for line in first.records.read_text().splitlines()[:2]) + '{"key": "su'
    )
    again = degrade_folder(folder, tmp_path / "out", seed=3)
    assert (again.degraded, again.skipped) == (3, 2)
    assert pixels(tmp_path / "out") == whole
    assert len(read_lines(again.records)) == 5


def test_wrong_names_and_places_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "realesrgan"'):
        degrade_folder(folder, tmp_path / "out", preset="realesrgna")
    with pytest.raises(UsageError, match='Did you mean "sharpen"'):
        degrade_folder(folder, tmp_path / "out", options={"sharpn": True})
    with pytest.raises(UsageError, match="both input and output"):
        degrade_folder(folder, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_bytes(b"my own")
    with pytest.raises(UsageError, match="would be overwritten"):
        degrade_folder(folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "a.png").read_bytes() == b"my own"
    with folder_lock(tmp_path / "mine"), pytest.raises(RetryLater):
        degrade_folder(folder, tmp_path / "mine")


def test_a_sheet_shows_each_group() -> None:
    pictures = [np.full((50, 40, 3), value, np.uint8) for value in (0, 90, 200)]
    data = contact_sheet([([p, p], f"picture {k}\nline two") for k, p in enumerate(pictures)], side_px=32, columns=2)
    sheet = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert sheet is not None
    assert abs(int(sheet[20, 20]) - 0) < 12
    assert abs(int(sheet[20, 20 + 32 * 2 + 8]) - 90) < 12
    assert abs(int(sheet[-40, 20]) - 200) < 30
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
