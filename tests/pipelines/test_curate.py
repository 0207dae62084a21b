"""Curation: every file ends in the manifest or the quarantine, reruns repeat nothing, and bytes stay as they were."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from components.images import Limits
from pipelines import curate as curating
from pipelines import shards
from pipelines.curate import curate, load_spec, measure_all
from pipelines.errors import Failure, RetryLater, UsageError
from pipelines.sources import Entry, list_entries

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def picture(seed: int, width: int = 160, height: int = 130, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = io.BytesIO()
    Pillow.fromarray(pixels).save(target, kind)
    return target.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight good pictures, one in a folder below, and nearly every way to be bad."""
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    for number in range(7):
        (place / f"good{number}.jpg").write_bytes(picture(number))
    (place / "sub" / "named.by.mistake.jpg").write_bytes(picture(7, kind="PNG"))
    (place / "copy.jpg").write_bytes(picture(1))
    (place / "good2.png").write_bytes(picture(20, kind="PNG"))
    (place / "empty.jpg").write_bytes(b"")
    (place / "cut.jpg").write_bytes(picture(21)[:3000])
    (place / "page.jpg").write_bytes(b"<html>not found</html>")
    (place / "film.mov").write_bytes(b"moving")
    (place / "small.jpg").write_bytes(picture(22, 40, 40))
    (place / "strip.jpg").write_bytes(picture(23, 1400, 130))
    buffer = io.BytesIO()
    Pillow.new("RGB", (200, 200), (9, 9, 9)).save(buffer, "PNG")
    (place / "flat.png").write_bytes(buffer.getvalue())
    (place / "dangling.jpg").symlink_to(place / "nowhere.jpg")
    (place / "notes.txt").write_text("a sidecar")
    (place / ".hidden.jpg").write_bytes(picture(1))
    return place


EXPECTED = {
    "copy": "",  # listed before good1, so it stays and good1 is the copy
    "good1": "duplicate",
    "good2": "",
    "empty": "empty",
    "cut": "truncated",
    "page": "not_image",
    "film_mov": "not_image",
    "small": "too_small",
    "strip": "aspect",
    "flat": "flat",
    "dangling": "unreadable",
}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spec(folder: Path, **changes: object) -> CorpusSpec:
    settings: dict = {
        "name": "test",
        "sources": [SourceSpec(kind="folder", path=str(folder))],
        "split": SplitSpec(held_out_fraction=0.2),
        "shard_mib": 0.04,
    }
    return CorpusSpec(**{**settings, **changes})


def test_every_file_is_accounted_for_and_bytes_are_kept(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = curate(spec(folder), tmp_path / "out", progress=lambda done, of=0, note="": seen.append((done, of)))
    corpus = shards.open_corpus(tmp_path / "out")
    accepted = rows(tmp_path / "out" / "manifest.jsonl")
    rejected = rows(tmp_path / "out" / "quarantine.jsonl")
    assert shards.verify(corpus) == []
    assert (result.accepted, result.rejected, result.skipped) == (len(accepted), len(rejected), 2)
    assert result.accepted + result.rejected == 18
    codes = {row["key"]: row["code"] for row in rejected}
    assert codes == {key: code for key, code in EXPECTED.items() if code}
    twins = [
        f"good2-{hashlib.sha256((folder / f'good2.{ext}').read_bytes()).hexdigest()[:8]}" for ext in ("jpg", "png")
    ]
    assert all(row["detail"] and row["stage"] for row in rejected)
    assert {row["key"] for row in accepted} == {
        "copy",
        "sub__named_by_mistake",
        *twins,
        *(f"good{n}" for n in (0, 3, 4, 5, 6)),
    }
    for name, split in corpus.splits.items():
        for number in range(len(split)):
            _, entry = split.locate(number)
            row = corpus.manifest[entry["key"]]
            data = shards.read_sample(corpus, name, number)
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert data == (folder / row["source"].removeprefix("folder:")).read_bytes()
            assert row["split"] == name
            assert (row["width"], row["height"]) == (160, 130)
    assert {entry["ext"] for shard in corpus.split("train").shards for entry in shard["samples"]} <= {"jpg", "png"}
    assert len(corpus.split("held_out")) >= 2
    assert result.digest == corpus.digest
    assert str(folder) not in (tmp_path / "out" / "manifest.jsonl").read_text()
    assert seen[-1][0] == seen[-1][1]


def test_result_depends_on_the_pictures_alone(folder: Path, tmp_path: Path) -> None:
    first = curate(spec(folder), tmp_path / "a")
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved, symlinks=True)
    second = curate(spec(moved), tmp_path / "b")
    assert first.digest == second.digest
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()


def test_rerun_repeats_nothing_and_changed_files_are_seen(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(spec(folder), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    again = curate(spec(folder), out)
    assert again.reused == 16  # all but the dangling link, which is settled while listing, and film.mov
    assert again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    (folder / "good3.jpg").write_bytes(picture(99))
    third = curate(spec(folder), out)
    assert third.reused == again.reused - 1
    assert third.digest != first.digest
    assert shards.verify(shards.open_corpus(out)) == []
    named = {shard["name"] for split in shards.open_corpus(out).splits.values() for shard in split.shards}
    assert {path.name for path in out.rglob("*.tar")} == named  # nothing of the first run lies about


def test_torn_log_lines_are_ignored(folder: Path, tmp_path: Path) -> None:
    first = curate(spec(folder), tmp_path / "out")
    log = tmp_path / "out" / "verdicts.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:20])
    (tmp_path / "out" / "index.json").unlink()
    assert curate(spec(folder), tmp_path / "out").digest == first.digest
    assert curate(spec(folder), tmp_path / "out").reused == 16


def test_kill_minus_nine_and_rerun(folder: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(curating.__file__).parents[1])!r})
        from pathlib import Path
        from tests_spec import spec
        from pipelines.cluster import local_ray
        from pipelines.curate import curate
        def progress(done, of=0, note=""):
            if note == "shards" and done == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        with local_ray():
            curate(spec, Path({str(tmp_path / "out")!r}), progress=progress)
    """)
    settings = f"""
from components.corpora import *
spec = CorpusSpec(name="test", sources=[SourceSpec(kind="folder", path={str(folder)!r})],
                  split=SplitSpec(held_out_fraction=0.2), shard_mib=0.04)
"""
    (tmp_path / "tests_spec.py").write_text(settings)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(curating.__file__).parents[1]}"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=240)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert not (tmp_path / "out" / "index.json").exists()
    written = rows(tmp_path / "out" / "shards.jsonl")[0]
    shard = tmp_path / "out" / written["split"] / written["entry"]["name"]
    stamp = shard.stat().st_mtime_ns
    result = curate(spec(folder), tmp_path / "out")
    assert result.reused == 16
    assert shard.stat().st_mtime_ns == stamp
    assert result.digest == curate(spec(folder), tmp_path / "fresh").digest
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


def kill_the_process(entry: Entry, limits: Limits, flat_below: float) -> dict:
    """A decoder with a segmentation fault on one picture."""
    if entry.key == "killer":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"bytes": 1, "sha256": entry.key}


def test_a_picture_that_kills_its_process_costs_only_itself() -> None:
    entries = [Entry(key=key, source=key) for key in ("a", "b", "killer", "c", *map(str, range(12)))]
    found = dict(measure_all(entries, Limits(), 0.0, kill_the_process))
    assert {entries[number].key: verdict.get("code", "") for number, verdict in found.items()} == {
        entry.key: "crashed" if entry.key == "killer" else "" for entry in entries
    }


def test_memory_error_and_unknown_errors_become_verdicts(tmp_path: Path) -> None:
    # The path exists, but reading it fails in a way that no decoder declares.
    verdict = curating.measure(Entry(key="x", source="x", path=str(tmp_path), size=1), Limits(), 0.0)
    assert verdict["code"] == "unreadable"
    verdict = curating.measure(Entry(key="x", source="x", leaves=(10**9, 0, 0)), Limits(), 0.0)
    assert verdict["code"] == "crashed"
    assert "MemoryError" in verdict["detail"] or "Error" in verdict["detail"]


@pytest.mark.parametrize("name", ["none", "file.txt", "empty", "sidecars"])
def test_useless_folders_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars" / "a.json").write_text("{}")
    with pytest.raises(UsageError) as error:
        curate(spec(tmp_path), tmp_path / "out", images=tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_a_failure_that_counts_codes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(Failure, match="1 empty"):
        curate(spec(tmp_path / "in"), tmp_path / "out")
    assert rows(tmp_path / "out" / "quarantine.jsonl")[0]["code"] == "empty"


def test_unwritable_output_and_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failure, match="cannot be written"):
        curate(spec(folder), tmp_path / "file" / "out")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(Failure, match=r"needs \d+ MiB"):
        curate(spec(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_two_curations_of_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RetryLater, match="another process"):
            curate(spec(folder), tmp_path / "out")


def test_file_that_changes_between_measuring_and_writing(folder: Path, tmp_path: Path) -> None:
    def change(done: int, of: int = 0, note: str = "") -> None:
        if note == "shards" and done == 0:
            (folder / "good5.jpg").write_bytes(picture(77))

    with pytest.raises(Failure, match=r"good5\.jpg.*changed"):
        curate(spec(folder), tmp_path / "out", progress=change)
    assert not (tmp_path / "out" / "index.json").exists()


def test_held_out_by_fraction_is_stable_and_has_a_floor() -> None:
    names = [f"k{n}" for n in range(200)]
    few = curating._held_out(names[:100], SplitSpec(held_out_fraction=0.2))
    many = curating._held_out(names, SplitSpec(held_out_fraction=0.2))
    assert few <= many  # adding pictures moves none
    assert 20 <= len(many) <= 60
    assert [len(curating._held_out(names[:n], SplitSpec(held_out_fraction=0.001))) for n in (1, 2, 5, 6)] == [
        0,
        1,
        1,
        2,
    ]
    assert curating._held_out(names, SplitSpec()) == set()


def test_dead_leaves_source_is_reproducible(tmp_path: Path) -> None:
    source = SourceSpec(kind="dead_leaves", count=3, size_px=64, seed=5)
    made = spec(tmp_path, sources=[source], split=SplitSpec())
    first, second = curate(made, tmp_path / "a"), curate(made, tmp_path / "b")
    assert first.accepted == 3
    assert first.digest == second.digest


def test_shipped_demo_spec_lists_the_cleared_pictures() -> None:
    demo = load_spec("demo")
    entries, _ = list_entries(demo)
    assert len(demo.split.held_out) == 12
    assert len(entries) >= 36
    assert all(entry.refused is None for entry in entries)
    assert all(entry.licence in ("CC0-1.0", "CC-BY-2.0", "public domain") and entry.credit for entry in entries)
    shipped = [entry for entry in entries if entry.source.startswith("demo_corpus:")]
    assert sum(entry.size for entry in shipped) <= 8 << 20
    held_out = {shards.safe_key(name) for name in demo.split.held_out}
    details = {entry.key for entry in entries if "-detail-" in entry.key}
    assert not {key.split("-detail-")[0] for key in details} & held_out  # a detail in training would leak


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["filters.min_side=9"], "min_side_px"),
        (["shard_mb=9"], "shard_mib"),
        (["shard_mib=-1"], "positive"),
        (["split.held_out_fraction=0.9"], "0..0.5"),
    ],
)
def test_wrong_specs_die_with_the_near_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_spec("demo", overrides)


def test_unknown_names_die_with_did_you_mean(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "demo"'):
        load_spec("demp")
    with pytest.raises(UsageError, match='Did you mean "good3"'):
        curate(spec(folder, split=SplitSpec(held_out=["goood3"])), tmp_path / "out")
    with pytest.raises(UsageError, match=r"chelsea\.png"):
        list_entries(spec(folder, sources=[SourceSpec(kind="skimage", names=["chelse.png"])]))
    with pytest.raises(UsageError, match="needs its path"):
        list_entries(load_spec("folder"))


def test_real_odd_pictures(images_dir: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    result = curate("folder", tmp_path / "out", images=images_dir / "odd")
    files = [path for path in (images_dir / "odd").iterdir() if path.suffix != ".csv"]
    assert result.accepted + result.rejected == len(files)
    assert {"empty", "truncated", "not_image", "too_large", "duplicate", "animated"} <= set(result.reasons)
    assert "crashed" not in result.reasons
    assert shards.verify(shards.open_corpus(tmp_path / "out")) == []
    assert time.monotonic() - started < 120
