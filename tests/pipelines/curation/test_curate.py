"""Curation: every file ends in the manifest or the quarantine, reruns repeat nothing, and bytes do not change."""

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
import tarfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from components.corpora import Bounds, CorpusSpec, DedupSpec, FilterSpec, SourceSpec, SplitSpec
from components.types import SampleError
from pipelines.core.errors import Failure, RetryLater, UsageError
from pipelines.corpus import shards
from pipelines.curation import curate as curating
from pipelines.curation.curate import curate, load_spec, replay, retryable_reasons
from pipelines.curation.measure import look
from pipelines.curation.select import held_out_by_fraction, split_hash, thresholds
from pipelines.curation.sources import list_entries
from pipelines.curation.write import remove_old_shards

pytestmark = pytest.mark.slow
with_ray = pytest.mark.usefixtures("ray_session")
in_process = pytest.mark.usefixtures("without_ray")


def picture(seed: int, width: int = 160, height: int = 130, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    target = io.BytesIO()
    Pillow.fromarray(pixels).save(target, kind)
    return target.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight good pictures, one of them in a subfolder, and nearly every kind of bad file."""
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


@with_ray
def test_every_file_has_a_row_and_accepted_bytes_stay(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = curate(spec(folder), tmp_path / "out", progress=lambda count, of=0, note="": calls.append((count, of)))
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
    manifest = {row["key"]: row for row in corpus.rows()}
    for name, split in corpus.splits.items():
        for number in range(len(split)):
            _, entry = split.locate(number)
            row = manifest[entry["key"]]
            data = shards.read_sample(corpus, name, number)
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert data == (folder / row["source"].removeprefix("folder:")).read_bytes()
            assert row["split"] == name
            assert (row["width"], row["height"]) == (160, 130)
    train = corpus.split("train")
    assert {train.locate(number)[1]["ext"] for number in range(len(train))} <= {"jpg", "png"}
    assert len(corpus.split("held_out")) >= 2
    assert result.digest == corpus.digest
    assert str(folder) not in (tmp_path / "out" / "manifest.jsonl").read_text()
    assert calls[-1][0] == calls[-1][1]


@in_process
def test_result_depends_on_the_pictures_alone(folder: Path, tmp_path: Path) -> None:
    first = curate(spec(folder), tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere, symlinks=True)
    second = curate(spec(elsewhere), tmp_path / "b")
    assert first.digest == second.digest
    assert (tmp_path / "a" / "index.json").read_bytes() == (tmp_path / "b" / "index.json").read_bytes()


@in_process
def test_a_second_run_measures_only_changed_files(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(spec(folder), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    again = curate(spec(folder), out)
    assert again.reused == 17  # all but the dangling link, which is tried again
    assert again.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    (folder / "good3.jpg").write_bytes(picture(99))
    third = curate(spec(folder), out)
    assert third.reused == again.reused - 1  # the other rows of the file's part are reused
    assert third.digest != first.digest
    assert shards.verify(shards.open_corpus(out)) == []
    names = {shard["name"] for split in shards.open_corpus(out).splits.values() for shard in split.shards}
    assert {path.name for path in out.rglob("*.tar")} == names  # no file of the first run is left


@in_process
def test_torn_files_of_a_killed_run_are_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(spec(folder), out)
    log = out / "shards.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:2]) + lines[2][:20])
    for path in (*(out / "work" / "measured").glob("*"), out / "work" / "selected.json"):
        path.write_bytes(path.read_bytes()[:100])
    (out / "index.json").unlink()
    again = curate(spec(folder), out)
    assert (again.digest, again.reused) == (first.digest, 0)
    assert curate(spec(folder), out).reused == 17


@in_process
def test_kill_minus_nine_and_rerun(folder: Path, tmp_path: Path) -> None:
    """tests/cluster tests it with Ray."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        from conftest import phase_in_process, task_in_process
        from tests_spec import spec
        from pipelines.curation import curate
        curate._run, curate._in_task = phase_in_process, task_in_process
        def progress(count, of=0, note=""):
            if note == "shards" and count == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        curate.curate(spec, Path({str(tmp_path / "out")!r}), progress=progress)
    """)
    settings = f"""
from components.corpora import *
spec = CorpusSpec(name="test", sources=[SourceSpec(kind="folder", path={str(folder)!r})],
                  split=SplitSpec(held_out_fraction=0.2), shard_mib=0.04)
"""
    (tmp_path / "tests_spec.py").write_text(settings)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}:{Path(curating.__file__).parents[2]}",
    }
    job = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=240)
    assert job.returncode == -signal.SIGKILL, job.stderr.decode()[-2000:]
    assert not (tmp_path / "out" / "index.json").exists()
    row = rows(tmp_path / "out" / "shards.jsonl")[0]
    shard = tmp_path / "out" / row["split"] / row["entry"]["name"]
    stamp = shard.stat().st_mtime_ns
    result = curate(spec(folder), tmp_path / "out")
    assert result.reused == 17
    assert shard.stat().st_mtime_ns == stamp
    assert result.digest == curate(spec(folder), tmp_path / "fresh").digest
    assert not list((tmp_path / "out").rglob("*.tmp-*"))


def test_only_own_temporary_files_are_removed(tmp_path: Path) -> None:
    own = [tmp_path / name for name in ("train/.train-00000.tmp-7", "work/.plan.json.tmp-7", "work/pieces/.x.tmp-7")]
    foreign = [tmp_path / name for name in (".notes.tmp-7", "train/.notes.tmp-7", "held_out/.train-00000.tmp-7")]
    for path in (*own, *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    remove_old_shards(tmp_path, [])
    assert [path.exists() for path in (*own, *foreign)] == [False] * 3 + [True] * 3


def hostile(data: bytes, filters: object, key: str) -> dict:
    """A decoder that crashes on one picture, never returns for another, and raises unexpected errors on two more."""
    if key == "good3":
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "good4":
        time.sleep(1000)
    if key == "good5":
        raise RuntimeError("a library's own trouble")
    if key == "good6":
        raise MemoryError
    return look(data, filters, key)  # type: ignore[arg-type]


@with_ray
def test_a_picture_that_kills_or_hangs_its_process_does_not_affect_others(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before = curate(spec(folder, sample_timeout_s=2.0), tmp_path / "out", look_at=hostile)
    codes = {row["key"]: row["code"] for row in rows(tmp_path / "out" / "quarantine.jsonl")}
    mine = {"good3": "crashed", "good4": "timeout", "good5": "crashed", "good6": "out_of_memory"}
    assert codes == {key: code for key, code in {**EXPECTED, **mine}.items() if code}
    assert not list((tmp_path / "out" / "work" / "cursors").iterdir())
    request.getfixturevalue("without_ray")
    # With a better decoder, only rows with these codes are measured again.
    after = replay(tmp_path / "out", codes=["crashed"])
    assert (after.accepted, after.rejected) == (
        before.accepted + 4,
        before.rejected - 4,
    )  # codes timeout and out_of_memory are always tried again
    assert after.digest == curate(spec(folder, sample_timeout_s=2.0), tmp_path / "fresh").digest


@in_process
def test_replay_tries_only_broken_pictures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    curate(spec(folder), out)
    assert retryable_reasons(out) == {
        "not_image": 2,
        "empty": 1,
        "truncated": 1,
        "too_small": 1,
        "aspect": 1,
        "unreadable": 1,
    }
    (folder / "nowhere.jpg").write_bytes(picture(50))  # the target of the dangling link, which is a new file too
    (folder / "small.jpg").write_bytes(picture(51))  # repaired
    os.utime(folder / "good0.jpg", (1, 1))  # an accepted file with a new time is not measured again
    log_path = tmp_path / "log"

    def watching(data: bytes, filters: object, key: str) -> dict:
        with log_path.open("a") as log:
            log.write(key + "\n")
        return look(data, filters, key)  # type: ignore[arg-type]

    result = replay(out, look_at=watching)
    assert set(log_path.read_text().split()) == {"empty", "cut", "page", "small", "strip", "dangling"}
    accepted = {row["key"] for row in rows(out / "manifest.jsonl")}
    assert {"dangling", "small"} <= accepted
    assert "nowhere" not in accepted | {row["key"] for row in rows(out / "quarantine.jsonl")}
    assert (result.accepted, result.rejected, result.skipped) == (11, 7, 2)
    again = curate(spec(folder), out)  # lists again; the new file is a copy of the link's target
    assert again.reasons["duplicate"] == 2
    assert again.digest == curate(spec(folder), tmp_path / "fresh").digest
    with pytest.raises(UsageError, match='Did you mean "truncated"'):
        replay(out, codes=["truncate"])
    with pytest.raises(UsageError, match="no spec"):
        replay(tmp_path)
    next((out / "work" / "measured").iterdir()).unlink()  # as after a later curation that was stopped
    with pytest.raises(UsageError, match="did not finish"):
        replay(out)
    shutil.rmtree(out / "work")
    with pytest.raises(UsageError, match="work/ was deleted"):
        replay(out)


@in_process
def test_replay_reads_a_mended_archive_and_leaves_a_new_one_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    def tar(name: str, numbers: range, length: int | None = None) -> None:
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as archive:
            for number in numbers:
                info = tarfile.TarInfo(f"p{number}.jpg")
                info.size = len(data := picture(number))
                archive.addfile(info, io.BytesIO(data))
        (tmp_path / "in" / name).write_bytes(target.getvalue()[:length])

    tar("a.tar", range(3))
    tar("b.tar", range(3, 6), length=len(picture(3)) + len(picture(4)) + 3000)
    pq.write_table(pa.table({"image": [picture(20), picture(21)[:900]]}), tmp_path / "in" / "t.parquet")
    source = tmp_path / "in"
    corpus_spec = CorpusSpec(
        name="archives",
        sources=[
            SourceSpec(kind="tar", path=str(source / "*.tar")),
            SourceSpec(kind="parquet", path=str(source / "*.parquet"), image_column="image"),
        ],
        filters=FilterSpec(min_side_px=16),
    )
    out = tmp_path / "out"
    before = curate(corpus_spec, out)
    assert before.reasons == {"truncated": 2}
    tar("b.tar", range(3, 6))
    tar("c.tar", range(6, 9))
    pq.write_table(pa.table({"image": [picture(20), picture(21)]}), tmp_path / "in" / "t.parquet")
    pq.write_table(pa.table({"image": [picture(22)]}), tmp_path / "in" / "u.parquet")
    after = replay(out)
    assert (after.accepted, after.rejected) == (8, 0)
    assert after.reused == 3  # all of a.tar
    assert {row["key"] for row in rows(out / "manifest.jsonl")} == {f"p{n}" for n in range(6)} | {
        "t-00000-000000",
        "t-00000-000001",
    }
    assert curate(corpus_spec, out).accepted == 12


@in_process
def test_too_many_broken_pictures_end_the_run_with_a_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(300):
        data = picture(number, 64, 64) if number % 2 else picture(number, 64, 64)[:500]
        (tmp_path / "in" / f"{number:03d}.jpg").write_bytes(data)
    with pytest.raises(Failure, match=r"(?s)max_bad_fraction 0\.25.*truncated") as error:
        curate(spec(tmp_path / "in", max_bad_fraction=0.25), tmp_path / "out")
    rows_at_the_end = int(str(error.value).split(" of the first ")[1].split()[0])
    assert 64 <= rows_at_the_end < 300  # the run ended early
    (tmp_path / "few").mkdir()
    for number in range(4):
        (tmp_path / "few" / f"{number}.jpg").write_bytes(picture(number)[: None if number else 500])
    assert curate(spec(tmp_path / "few", max_bad_fraction=0.25), tmp_path / "out2").accepted == 3
    with pytest.raises(Failure, match=r"1 of the first 4 pictures"):
        curate(spec(tmp_path / "few", max_bad_fraction=0.2), tmp_path / "out3")


@in_process
def test_changed_thresholds_need_no_second_measurement(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = curate(spec(folder), out)

    def never(data: bytes, filters: object, key: str) -> dict:
        raise SampleError("looked", "nothing needs to be looked at", key)

    filters = FilterSpec(scores={"luma_std": Bounds(min=200.0)})
    with pytest.raises(Failure, match=r"none of the 18.*11 flat"):
        curate(spec(folder, filters=filters), out, look_at=never)
    assert (out / "work" / "measured").is_dir()
    (folder / "dangling.jpg").unlink()
    back = curate(spec(folder), out, look_at=never)
    assert back.digest == first.digest


@in_process
@pytest.mark.parametrize("name", ["none", "file.txt", "empty", "sidecars"])
def test_folders_without_pictures_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars" / "a.json").write_text("{}")
    with pytest.raises(UsageError) as error:
        curate(spec(tmp_path), tmp_path / "out", images=tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@in_process
def test_nothing_usable_is_a_failure_that_counts_codes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    with pytest.raises(Failure, match="1 empty"):
        curate(spec(tmp_path / "in"), tmp_path / "out")
    assert rows(tmp_path / "out" / "quarantine.jsonl")[0]["code"] == "empty"


@in_process
def test_unwritable_output_and_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failure, match=r"cannot write to .*out: Not a directory"):
        curate(spec(folder), tmp_path / "file" / "out")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(Failure, match=r"needs \d+ MiB"):
        curate(spec(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


@in_process
def test_two_curations_of_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RetryLater, match="out is in use by another process"):
            curate(spec(folder), tmp_path / "out")


@in_process
def test_file_that_changes_between_measuring_and_writing(folder: Path, tmp_path: Path) -> None:
    def change(count: int, of: int = 0, note: str = "") -> None:
        if note == "shards" and count == 0:
            (folder / "good5.jpg").write_bytes(picture(77))

    with pytest.raises(Failure, match=r"good5\.jpg.*changed"):
        curate(spec(folder), tmp_path / "out", progress=change)
    assert not (tmp_path / "out" / "index.json").exists()


def held_out(names: list[str], fraction: float) -> set[str]:
    keys, split = np.array([split_hash(name) for name in names], np.uint64), SplitSpec(held_out_fraction=fraction)
    return {names[n] for n in held_out_by_fraction(keys, np.arange(len(names)), split)}


@in_process
def test_held_out_by_fraction_is_stable_and_has_a_floor() -> None:
    names = [f"k{n}" for n in range(200)]
    few = held_out(names[:100], 0.2)
    many = held_out(names, 0.2)
    assert few <= many  # new pictures do not move old ones
    assert 20 <= len(many) <= 60
    assert [len(held_out(names[:n], 0.001)) for n in (1, 2, 5, 6)] == [0, 1, 1, 2]
    assert held_out(names, 0.0) == set()
    assert held_out(names, 1.0) == set(names)


@in_process
def test_dead_leaves_source_is_reproducible(tmp_path: Path) -> None:
    source = SourceSpec(kind="dead_leaves", count=3, size_px=64, seed=5)
    corpus_spec = spec(tmp_path, sources=[source], split=SplitSpec())
    first, second = curate(corpus_spec, tmp_path / "a"), curate(corpus_spec, tmp_path / "b")
    assert first.accepted == 3
    assert first.digest == second.digest


@in_process
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
        (["split.held_out_fraction=1.5"], "0..1"),
        (["filters.scores.sharpnes.min=3"], "sharpness"),
        (["filters.preset=restorashun"], "restoration"),
    ],
)
@in_process
def test_wrong_specs_are_refused_with_the_near_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        thresholds(load_spec("demo", overrides))


@in_process
def test_unknown_names_are_refused_with_the_near_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "demo"'):
        load_spec("demp")
    with pytest.raises(UsageError, match='Did you mean "good3"'):
        curate(spec(folder, split=SplitSpec(held_out=["goood3"])), tmp_path / "out")
    with pytest.raises(UsageError, match=r"chelsea\.png"):
        list_entries(spec(folder, sources=[SourceSpec(kind="skimage", names=["chelse.png"])]))
    with pytest.raises(UsageError, match="needs its path"):
        list_entries(load_spec("folder"))


ODD = {
    "animated": "animated_10_frames.gif animated_10_frames.webp animated_apng.png multipage.tiff",
    "aspect": "odd_primary_item.avif",
    "blocky": "decoy_jpeg_q5.jpg",
    "corrupt": "bad_crc.png jpeg_signature_then_noise.jpg",
    "duplicate": "dup_b_exact_copy.jpg",
    "empty": "zero_bytes.jpg",
    "flat": "decoy_all_black.png rgba_fully_transparent.png",
    "letterbox": "decoy_letterbox.jpg",
    "near_duplicate": "dup_c_recompressed_q60.jpg dup_d_half_size.png dup_e_cropped_5pc.jpg",
    "noisy": "decoy_noise_sigma40.jpg decoy_pure_noise.png",
    "not_image": "html_error_page_named.jpg random_bytes_named.png text_named.jpg",
    "smooth": "decoy_gradient.png",
    "text_page": "bilevel_1bit.png decoy_text_page.png",
    "too_large": "header_claims_65500x65500.jpg png_65536x65536_header.png png_bomb_20000x20000_rgb.png",
    "too_small": "animated_97_frames_13x169.webp one_by_one.png png16_rgb_with_trns.png png_text_chunk_bomb.png "
    "strip_17x2000.png strip_4000x60.jpg",
    "truncated": "corrupt_header.jpg missing_eoi.jpg truncated.jpg truncated.png",
    "unsupported_format": "heic_bytes_named.jpg",
    "unsupported_mode": "float32_gray.tiff",
    "upscaled": "decoy_upscaled_x8_blur.jpg rgb.bmp",
    "watermark": "decoy_watermark.jpg",
}
"""Which file of shared images/odd is refused, and why."""


@in_process
def test_real_odd_pictures(images_dir: Path, tmp_path: Path) -> None:
    """Every file is accepted or quarantined with its reason, decoys included; of several copies one stays."""
    out = tmp_path / "out"
    result = curate(load_spec("folder", ["dedup.near=true"]), out, images=images_dir / "odd")
    files = {path.name for path in (images_dir / "odd").iterdir() if path.suffix != ".csv"}
    codes = {row["source"].removeprefix("folder:"): row["code"] for row in rows(out / "quarantine.jsonl")}
    accepted = {row["source"].removeprefix("folder:") for row in rows(out / "manifest.jsonl")}
    assert accepted | codes.keys() == files
    assert not accepted & codes.keys()
    assert (result.accepted, result.rejected) == (len(accepted), len(codes))
    expected = {name: code for code, names in ODD.items() for name in names.split()}
    assert {name: codes.get(name, "") for name in expected} == expected
    others = {name: code for name, code in codes.items() if name not in expected}
    assert set(others.values()) <= {"near_duplicate"}
    assert {"dup_a_reference.jpg", "dup_f_mirrored.jpg", "gray_wolf.jpg"} <= accepted
    assert shards.verify(shards.open_corpus(out)) == []


@in_process
@pytest.mark.full
def test_no_good_photograph_is_refused(images_dir: Path, tmp_path: Path) -> None:
    for name in ("hq", "train"):
        result = curate(load_spec("folder", ["dedup.near=true"]), tmp_path / name, images=images_dir / name)
        assert dict(result.reasons) == {}, name
        assert result.accepted == len([p for p in (images_dir / name).iterdir() if p.suffix not in (".csv", ".md")])


@in_process
def test_a_second_corpus_excludes_the_pictures_of_the_first(images_dir: Path, tmp_path: Path) -> None:
    """Exact and near copies of an earlier corpus' pictures are refused, with the key of the original."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    odd = images_dir / "odd"
    shutil.copy(odd / "dup_a_reference.jpg", tmp_path / "a" / "reference.jpg")
    for file in ("dup_b_exact_copy.jpg", "dup_c_recompressed_q60.jpg", "gray_wolf.jpg"):
        shutil.copy(odd / file, tmp_path / "b" / file)
    curate(spec(tmp_path / "a", split=SplitSpec()), tmp_path / "first")
    dedup = DedupSpec(near=True, against=[str(tmp_path / "first")])
    curate(spec(tmp_path / "b", split=SplitSpec(), dedup=dedup), tmp_path / "second")
    reasons = {row["key"]: (row["code"], row["detail"]) for row in rows(tmp_path / "second" / "quarantine.jsonl")}
    assert reasons == {
        "dup_b_exact_copy": ("duplicate", "same bytes as reference of an earlier corpus"),
        "dup_c_recompressed_q60": ("near_duplicate", "looks like reference of an earlier corpus"),
    }
    assert [row["key"] for row in rows(tmp_path / "second" / "manifest.jsonl")] == ["gray_wolf"]
