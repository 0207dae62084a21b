"""Negative samples of a corpus: bits do not depend on the workers, no picture is made twice, and errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.corpora import NegativeSpec
from components.images import center_crop, decode, encode_png, read_png_text, resize_short_side
from components.negatives import NEGATIVE_PROMPTS
from pipelines.core.errors import Failure, UsageError
from pipelines.core.rows import read_lines
from pipelines.corpus.shards import open_corpus, read_sample, write_corpus
from pipelines.curation.negatives import (
    NegativesJob,
    NegativesResult,
    NegativesWorker,
    NegativeTask,
    choose_samples,
    make_negatives,
)

NAMES = ("casa-mila", "blue-periwinkle", "solaris-grapes", "ryan-schroeder", "oakland-zoo-otters")
FAST: dict[str, Any] = {"resolution": 32, "steps": 4, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photographs and, at the end, a sample that is not a picture."""
    demo = Path(__file__).resolve().parents[3] / "pipelines" / "demo_corpus"
    small = [center_crop(resize_short_side(decode((demo / f"{name}.jpg").read_bytes()), 64), 64, 64) for name in NAMES]
    samples = [(name, "png", encode_png(picture), {}) for name, picture in zip(NAMES, small, strict=True)]
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, "test", {"train": [*samples, ("broken", "png", b"no picture at all", {})]}, 2)
    return folder


def run_job(corpus: Path, out: Path, count: int = 6, **changes: Any) -> NegativesResult:
    """A job in this process; changes are settings, or options of `make_negatives`."""
    options = {name: changes.pop(name) for name in ("split", "progress") if name in changes}
    settings = {"prior": "nano", "count": count, "workers": 0, **FAST, **changes}
    return make_negatives(corpus, out, NegativeSpec(**settings), **options)


def a_job(corpus: Path, out: Path) -> NegativesJob:
    """The job that `make_negatives` gives to its workers."""
    from components.models import load_model

    return NegativesJob(
        corpus=corpus,
        split="train",
        corpus_digest=open_corpus(corpus).digest,
        model_digest=load_model("nano", prior=True).digest,
        out=out,
        spec=NegativeSpec(prior="nano", prompts=[NEGATIVE_PROMPTS["supir-samples"]], **FAST),
    )


def files(out: Path) -> dict[str, bytes]:
    """Pictures and captions by their path."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.glob("pictures/*/*"))}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted job over every sample, once."""
    out = tmp_path_factory.mktemp("whole")
    result = run_job(corpus, out)
    assert (result.new, result.skipped, result.quarantined) == (5, 0, 1)
    return out


def test_pictures_captions_and_records_belong_together(corpus: Path, whole: Path) -> None:
    from components.models import load_model

    records = read_lines(whole / "records.jsonl")
    assert sorted(row["source_key"] for row in records) == sorted(NAMES)
    assert [row["number"] for row in records] == sorted(row["number"] for row in records)
    corpus_reader = open_corpus(corpus)
    for row in records:
        png = (whole / row["output"]).read_bytes()
        assert decode(png).shape == (32, 32, 3)
        assert hashlib.sha256(png).hexdigest() == row["output_sha256"]
        assert (
            (whole / row["output"]).with_suffix(".txt").read_text()
            == row["prompt"]
            == NEGATIVE_PROMPTS["supir-samples"]
        )
        assert hashlib.sha256(read_sample(corpus_reader, "train", row["sample"])).hexdigest() == row["source_sha256"]
        assert (
            row["model_digest"] == load_model("nano", prior=True).digest and row["seed"] == 0 and row["strength"] == 0.5
        )
        assert read_png_text(png)["source_key"] == row["source_key"]
    assert len({row["output_sha256"] for row in records}) == 5
    assert (whole / "contact.jpg").stat().st_size > 0


def test_a_broken_source_is_quarantined(whole: Path) -> None:
    (row,) = read_lines(whole / "quarantine.jsonl")
    assert (row["source_key"], row["code"], row["stage"]) == ("broken", "not_image", "read")
    assert row["number"] not in {other["number"] for other in read_lines(whole / "records.jsonl")}


def test_an_interrupted_job_continues_and_repeats_nothing(corpus: Path, whole: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(count: int, of: int = 0, note: str = "") -> None:
        if count == 4:
            raise Stop

    with pytest.raises(Stop):
        run_job(corpus, tmp_path, progress=stop)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) >= 3
    # a kill between two writes: the last picture has no record, and the line before it is incomplete
    (tmp_path / "records.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pictures/*/*")}
    run_job(corpus, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert files(tmp_path) == files(whole)
    assert (tmp_path / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()
    assert (tmp_path / "quarantine.jsonl").read_text() == (whole / "quarantine.jsonl").read_text()


def test_a_damaged_or_missing_file_is_made_again(corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    pictures = sorted(out.glob("pictures/*/*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:-20])
    pictures[1].unlink()
    pictures[2].with_suffix(".txt").unlink()
    result = run_job(corpus, out)
    assert (result.new, result.skipped, result.quarantined) == (2, 3, 1)
    assert files(out) == files(whole)


def test_a_larger_count_keeps_the_pictures_of_a_smaller_one(corpus: Path, whole: Path, tmp_path: Path) -> None:
    first = run_job(corpus, tmp_path, count=2)
    before = files(tmp_path)
    second = run_job(corpus, tmp_path, count=6)
    assert first.new + first.quarantined == 2 and second.skipped == first.new
    assert before.items() <= files(tmp_path).items()
    assert files(tmp_path) == files(whole)


def test_other_settings_need_another_folder(corpus: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of another strength"):
        run_job(corpus, whole, strength=0.75)
    with pytest.raises(UsageError, match="of another prompts, seed"):
        run_job(corpus, whole, seed=1, prompts=["dirty"])
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UsageError, match="was not made by this job"):
        run_job(corpus, tmp_path)


def test_every_prompt_gets_its_pictures(corpus: Path, tmp_path: Path) -> None:
    run_job(corpus, tmp_path, count=12, prompts=["dirty", "supir-code"], resolution=16, steps=2)
    captions = [path.read_text() for path in tmp_path.glob("pictures/*/*.txt")]
    assert set(captions) == {"dirty", NEGATIVE_PROMPTS["supir-code"]}
    rows = read_lines(tmp_path / "records.jsonl")
    twice = [row for row in rows if row["source_key"] == NAMES[0]]
    assert (
        len(twice) == 2 and twice[0]["output_sha256"] != twice[1]["output_sha256"]
    )  # the second round has its own noise


def test_samples_are_drawn_without_repetition() -> None:
    samples = choose_samples(10, 25, seed=3)
    for start in (0, 10):
        assert sorted(samples[start : start + 10]) == list(range(10))
    assert len(set(samples[20:].tolist())) == 5
    assert not np.array_equal(samples[:10], samples[10:20])
    assert np.array_equal(choose_samples(10, 13, seed=3), samples[:13])
    assert not np.array_equal(choose_samples(10, 25, seed=4), samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.0}, "strength"),
        ({"prompts": []}, "printable prompts that are not blank"),
        ({"resolution": 40}, "multiple of 16"),
        ({"split": "trein"}, 'Did you mean "train"'),
        ({"count": 0}, "at least 1"),
        ({"workers": -1}, "workers >= 0"),
    ],
)
def test_wrong_settings_are_refused(corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_job(corpus, tmp_path / "out", **changes)
    with pytest.raises(UsageError, match="no_such_prior"):
        run_job(corpus, tmp_path / "out", 1, prior=str(tmp_path / "no_such_prior"))


def test_a_model_that_fails_on_every_picture_ends_the_job(corpus: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from components.models import file_sha256
    from components.places import SHIPPED_PRIORS

    broken = Path(shutil.copytree(SHIPPED_PRIORS / "nano", tmp_path / "nan"))
    info = json.loads((broken / "model.json").read_text())
    weights = broken / info["parts"]["unet"]["file"]
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    info["parts"]["unet"]["sha256"] = file_sha256(weights)
    (broken / "model.json").write_text(json.dumps(info))
    with pytest.raises(Failure, match="no negative sample can be made"):
        run_job(corpus, tmp_path / "out", 3, prior=str(broken), seed=2)
    codes = {row["code"] for row in read_lines(tmp_path / "out" / "quarantine.jsonl")}
    assert codes == {"not_finite"}


def test_a_number_that_killed_two_workers_is_quarantined(corpus: Path, tmp_path: Path) -> None:
    job = a_job(corpus, tmp_path)
    (tmp_path / ".attempts").mkdir()
    (tmp_path / ".attempts" / "7").write_bytes(b"..")  # two workers died over it
    lethal, other = NegativesWorker(job)([NegativeTask(number=7, sample=0), NegativeTask(number=8, sample=0)])
    assert (lethal.status, lethal.row["code"]) == ("quarantined", "worker_died")
    assert other.status == "new"


def test_workers_give_the_same_bits_in_any_share_and_order(corpus: Path, whole: Path, tmp_path: Path) -> None:
    run_job(corpus, tmp_path, count=1)  # writes negatives.json and the folders
    samples = choose_samples(6, 6, seed=0)
    workers = [NegativesWorker(a_job(corpus, tmp_path)) for _ in range(2)]
    for number in (5, 3, 4, 1, 2):
        workers[number % 2]([NegativeTask(number=number, sample=int(samples[number]))])
    assert files(tmp_path) == files(whole)


def test_the_pictures_are_a_folder_source_with_captions(whole: Path, tmp_path: Path) -> None:
    from components.corpora import CorpusSpec, SourceSpec
    from pipelines.curation.sources import candidates, list_parts

    spec = CorpusSpec(name="negatives", sources=[SourceSpec(kind="folder", path=str(whole / "pictures"))])
    parts = list_parts(spec, tmp_path).parts
    pictures = [one for part in parts for one in candidates(part, spec, tmp_path, lambda _: False)]
    assert len(pictures) == 5
    for one in pictures:
        assert one.problem is None and one.load is not None and decode(one.load()).shape == (32, 32, 3)
        assert one.caption == NEGATIVE_PROMPTS["supir-samples"]


@pytest.mark.slow
@pytest.mark.full  # half a minute each; test_columns.py also compares the bytes of a pool
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_of_ray_make_the_same_bits_as_one_process(
    ray_session: None, corpus: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    result = run_job(corpus, tmp_path, workers=workers)
    assert (result.new, result.quarantined) == (5, 1)
    assert files(tmp_path) == files(whole)
    assert (tmp_path / "records.jsonl").read_text() == (whole / "records.jsonl").read_text()
