"""Learned scores of a curation: computed for accepted candidates only, stored, and compared with thresholds later."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from components.corpora import Bounds, CorpusSpec, FilterSpec, ModelScore, SourceSpec
from components.images import decode
from pipelines.core.errors import UsageError
from pipelines.corpus import shards
from pipelines.curation.curate import curate


def jpeg(seed: int, quality: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    picture = cv2.resize(small, (160, 160), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def spec(folder: Path, model: ModelScore) -> CorpusSpec:
    filters = FilterSpec(min_side_px=16, models=[model])
    return CorpusSpec(name="scored", sources=[SourceSpec(kind="folder", path=str(folder))], filters=filters)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_metric_of_pyiqa_filters_a_corpus(tmp_path: Path) -> None:
    import pyiqa
    import torch

    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        (folder / f"good{number}.jpg").write_bytes(jpeg(number, 95))
        (folder / f"poor{number}.jpg").write_bytes(jpeg(number, 4))
    (folder / "flat.png").write_bytes(cv2.imencode(".png", np.full((160, 160, 3), 90, np.uint8))[1].tobytes())
    model = ModelScore(name="piqe", kind="pyiqa", model="piqe", batch_size=2)
    every = curate(spec(folder, model), out)
    assert (every.accepted, dict(every.reasons)) == (8, {"flat": 1})
    scores = {row["key"]: row["verdicts"]["piqe"] for row in shards.open_corpus(out).rows()}
    metric = pyiqa.create_metric("piqe", device="cpu")
    for key, score in scores.items():
        pixels = torch.from_numpy(decode((folder / f"{key}.jpg").read_bytes())).permute(2, 0, 1)[None] / 255
        assert score == pytest.approx(float(metric(pixels)), abs=0.01)
    middle = float(np.mean(sorted(scores.values())[3:5]))
    below = {key for key, score in scores.items() if score <= middle}
    assert len(below) == 4
    tables = [pq.read_table(path) for path in (out / "work" / "scored" / "piqe").glob("*.parquet")]
    values = [value for table in tables for value in table.column("value").to_pylist()]
    assert values.count(None) == 1  # the flat picture has no score
    stamps = {path: path.stat().st_mtime_ns for path in (out / "work" / "scored").rglob("*.parquet")}

    model.bounds = Bounds(max=middle)
    strict = curate(spec(folder, model), out)
    assert {row["key"] for row in shards.open_corpus(out).rows()} == below
    assert dict(strict.reasons) == {"flat": 1, "piqe": 4}
    rejected = [row for row in map(json.loads, (out / "quarantine.jsonl").open()) if row["code"] == "piqe"]
    assert all(row["stage"] == "filter" and "accepted is" in row["detail"] for row in rejected)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # a threshold costs no second scoring


@pytest.mark.slow
def test_names_of_models_are_checked_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match='Did you mean "piqe"'):
        curate(spec(tmp_path, ModelScore(name="quality", kind="pyiqa", model="piqee")), tmp_path / "out")
    wrong = ModelScore(name="quality", kind="classifier", model=str(tmp_path / "none"), label="nsfw")
    with pytest.raises(UsageError, match="score quality"):
        curate(spec(tmp_path, wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()
