"""Folders of the commit before the rooms: today's code opens them, continues their work, and writes the same bytes.

fixtures/before-the-rooms holds a corpus, a run that was killed after its first checkpoint, and a model with pictures
that it restored. Its README.md explains how they were made. Each test runs the same commands on a copy in another
place.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.images import PNG_LEVEL

FIXTURES = Path(__file__).parent / "fixtures" / "before-the-rooms"
RECORDED: dict[str, Any] = json.loads((FIXTURES / "recorded.json").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = {name: stage["folder"] for name, stage in RECORDED["stages"].items()}

OK, QUARANTINED = 0, 3
"""Exit codes. The corpus has a broken picture, so commands that curate it end with QUARANTINED."""

RECORDED_PNG_LEVEL = 6
"""Compression of the recorded pictures; results have another one by default since then, so their bytes differ."""

PIXEL_LEVELS = 2
WEIGHT_TOLERANCE = 2e-3
SCORE_TOLERANCE = 0.01
"""Tolerances of restored pixels, trained weights and scores on another kind of processor.

With the kernels of older processors (SSE 4 or AVX2 only) they differed by 1 level, 2e-4 and 2e-5 dB. A training without
the optimizer's state in its checkpoint ended with differences of 40 levels, 2e-2 and 0.4 dB.
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the fixtures, with their modification times: curation compares them, and git does not store them."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES, folder)
    for path in (folder / "pictures").iterdir():
        os.utime(path, (RECORDED["modified"], RECORDED["modified"]))
    return folder


def restoray(folder: Path, *arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    """Run the installed command inside a folder and check its exit code."""
    command = [str(Path(sys.executable).with_name("restoray")), *arguments]
    # Ray Train polls its workers every 2 s; a tiny training would mostly wait for the polls.
    environment = {**os.environ, "RESTORAY_HOME": str(folder / "home"), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == code, process.stderr[-3000:]
    return process


def shards_module() -> ModuleType:
    """Import the module that opens a corpus, by today's name or by its name in the commit that wrote the fixtures."""
    for name in ("pipelines.corpus.shards", "pipelines.shards"):
        parent, _, _ = name.rpartition(".")
        if importlib.util.find_spec(parent) and importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise AssertionError("no module of pipelines is named shards")


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Read all files below a folder whose names match, by relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern)) if p.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def computes_as_recorded() -> bool:
    """Whether floating-point sums on this machine equal those on the machine that made the fixtures.

    The libraries below torch choose their kernels by the processor's vector instructions and vendor. Kernels add in
    different orders, so the last bits of a sum depend on the processor and on the version of torch. If all three are
    as recorded, the tests require equal bytes; otherwise they use the tolerances above.
    """
    import torch

    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        processor = ""
    vendors = [line.partition(":")[2].strip() for line in processor.splitlines() if line.startswith("vendor_id")]
    here = {
        "torch": torch.__version__.partition("+")[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vendor": vendors[0] if vendors else "",
    }
    return here == RECORDED["arithmetic"]


def check_pictures(folder: Path, recorded: Path, level: int) -> None:
    """Check that both folders have the same PNGs: equal pixels and texts, or nearly equal pixels on another processor.

    The bytes are equal too if the level of compression is that of the fixtures.
    """
    theirs, ours = files(recorded, "*.png"), files(folder, "*.png")
    assert theirs and ours.keys() == theirs.keys()
    tolerance = 0 if computes_as_recorded() else PIXEL_LEVELS
    for name in theirs:
        pictures = [Image.open(where / name) for where in (folder, recorded)]
        here, there = (np.asarray(picture).astype(int) for picture in pictures)
        assert here.shape == there.shape and int(abs(here - there).max()) <= tolerance, name
        assert pictures[0].info == pictures[1].info, name
    if computes_as_recorded() and level == RECORDED_PNG_LEVEL:
        assert [name for name in theirs if ours[name] != theirs[name]] == []


def check_model(folder: Path, recorded: Path) -> None:
    """Check that both model folders have the same files: equal bytes, or nearly equal weights on another processor."""
    theirs, ours = files(recorded), files(folder)
    assert "model.json" in theirs and ours.keys() == theirs.keys()
    if computes_as_recorded():
        assert [name for name in theirs if ours[name] != theirs[name]] == []
        return
    from safetensors.numpy import load

    for name in (name for name in theirs if name.endswith(".safetensors")):
        here, there = load(ours[name]), load(theirs[name])
        assert here.keys() == there.keys()
        for key, weights in there.items():
            np.testing.assert_allclose(here[key], weights, rtol=0, atol=WEIGHT_TOLERANCE, err_msg=key)


def check_scores(path: Path, recorded: Path) -> None:
    """Check that both files have the same pictures with the same scores, which the files store rounded."""
    # The fixtures' SSIM is pyiqa's, whose sums in float32 are up to 2e-5 off; ours sums in float64.
    tolerance = 5e-5 if computes_as_recorded() else SCORE_TOLERANCE
    theirs, ours = lines(recorded), lines(path)
    assert len(theirs) == 2 and [row["key"] for row in ours] == [row["key"] for row in theirs]
    for here, there in zip(ours, theirs, strict=True):
        assert here["scores"].keys() == there["scores"].keys()
        for arm, scores in there["scores"].items():
            assert here["scores"][arm] == pytest.approx(scores, abs=tolerance), (here["key"], arm)


def test_the_old_corpus_opens(old: Path) -> None:
    """Each row has the picture's original bytes and its caption under its number."""
    shards = shards_module()
    corpus = shards.open_corpus(old / "corpus")
    rows: Mapping[str, list[list[str]]] = RECORDED["corpus"]["rows"]
    assert {name: len(split) for name, split in corpus.splits.items()} == {name: len(rows[name]) for name in rows}
    for name, samples in rows.items():
        for number, (key, caption) in enumerate(samples):
            _, entry = corpus.split(name).locate(number)
            assert (entry["key"], entry["caption"]) == (key, caption)
            assert shards.read_sample(corpus, name, number) == (old / "pictures" / f"{key}.jpg").read_bytes()
    assert [row["key"] for row in corpus.rows()] == [key for samples in rows.values() for key, _ in samples]
    assert shards.verify(corpus) == []


def test_the_old_quarantine_is_listed(old: Path) -> None:
    process = restoray(old, "replay", "corpus", "--list", "--json", code=OK)
    assert json.loads(process.stdout) == {"truncated": 1}


@pytest.mark.slow
def test_curating_the_old_corpus_again_measures_nothing_and_gives_the_same_bytes(old: Path) -> None:
    """Files with paths differ, since the pictures are in another folder: spec.yaml, the report, and most of work/."""
    process = restoray(
        old, "curate", "spec.yaml", "--images", "pictures", "--out", "corpus", "--json", code=QUARANTINED
    )
    assert json.loads(process.stdout)["reused"] == RECORDED["corpus"]["candidates"]

    def files_without_paths(corpus: Path) -> dict[str, bytes]:
        names = ("shards.jsonl", "index.json", "manifest.jsonl", "quarantine.jsonl")
        data_of = {name: data for kind in ("*.tar", "*.arrow", *names) for name, data in files(corpus, kind).items()}
        return {**data_of, **{f"work/pieces/{name}": data for name, data in files(corpus / "work" / "pieces").items()}}

    before, after = files_without_paths(FIXTURES / "corpus"), files_without_paths(old / "corpus")
    assert after.keys() == before.keys() and len(before) > 10
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.slow
def test_the_old_stopped_run_goes_on_and_ends_as_an_undisturbed_one(old: Path) -> None:
    """The corpus is not curated again, the training resumes from its checkpoint, and the results are as recorded.

    The run was killed at step 8, with a checkpoint of step 4. So it takes four steps twice.
    """
    run, before, finished = old / "stopped-run", FIXTURES / "stopped-run", FIXTURES / "finished-run"
    corpus = run / FOLDERS["corpus"]
    times = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    stderr = restoray(old, "run", "plan.yaml", "--images", "pictures", "--out", "stopped-run", code=QUARANTINED).stderr

    assert f"corpus: done before, skipped ({FOLDERS['corpus']})" in stderr
    assert f"restorer: continues in {FOLDERS['restorer']}" in stderr
    assert sorted(path.name for path in run.glob("*-????????")) == sorted(FOLDERS.values())
    for name, stage in RECORDED["stages"].items():
        assert json.loads((run / stage["folder"] / "done.json").read_text())["digest"] == stage["digest"], name
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == times
    assert files(corpus) == files(before / FOLDERS["corpus"])

    restorer = run / FOLDERS["restorer"]
    old_steps, steps = lines(before / FOLDERS["restorer"] / "order.jsonl"), lines(restorer / "order.jsonl")
    whole = lines(finished / "order.jsonl")
    start, end = RECORDED["checkpoint_step"], whole[-1]["step"]
    assert steps[: len(old_steps)] == old_steps and 0 < start < old_steps[-1]["step"] < end
    assert steps[len(old_steps) :] == [row for row in whole if row["step"] > start]

    check_model(restorer / "model", FIXTURES / "model")
    check_pictures(run / FOLDERS["restored"] / "restored", finished / "restored", level=PNG_LEVEL)
    check_scores(run / FOLDERS["scores"] / "scores.jsonl", finished / "scores.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("level", [PNG_LEVEL, RECORDED_PNG_LEVEL])
def test_the_old_model_restores_the_same_pictures_and_what_is_up_to_date_is_skipped(old: Path, level: int) -> None:
    """The test removes two of three results: the job restores these two, and skips the third by its old record.

    With the recorded level of compression the bytes are equal.
    """
    restored, remaining = old / "restored", "oakland-zoo-otters.png"
    for name in files(restored, "*.png").keys() - {remaining}:
        (restored / name).unlink()
    time = (restored / remaining).stat().st_mtime_ns
    result = json.loads(
        restoray(
            old,
            *("restore", "low-quality", "--model", "model", "--out", "restored", "--json", f"png_level={level}"),
            code=OK,
        ).stdout
    )
    assert {name: result[name] for name in ("restored", "skipped", "quarantined")} == {
        "restored": 2,
        "skipped": 1,
        "quarantined": 0,
    }
    assert (restored / remaining).stat().st_mtime_ns == time
    check_pictures(restored, FIXTURES / "restored", level)

    def stable_records(folder: Path) -> list[dict[str, Any]]:
        """Records without seconds and path, which may differ, and without the sha256 of the bytes compared above."""
        unstable = ("seconds", "source", "output_sha256")
        return [{k: v for k, v in row.items() if k not in unstable} for row in lines(folder / "records.jsonl")]

    assert stable_records(restored) == stable_records(FIXTURES / "restored") and len(stable_records(restored)) == 3
