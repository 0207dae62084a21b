"""`restoray analyze seeds`: any system's results over seeds; closed forms on a restorer with exact noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from components.evaluation.diversity import block_means, coarse_error, spread
from components.images import decode, encode_png
from components.randomness import generator
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer
from pipelines.analysis.model import StudyJob, WholeModel
from pipelines.analysis.seeds import analyze_seeds, picture_values
from pipelines.analysis.studies import analyze
from pipelines.core.errors import UsageError
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model

SIDE = 32


class Noisy(Restorer):
    """Adds noise to every input: one draw for each pixel, or for each block of 8, or none."""

    def __init__(self, fine: float = 0.0, coarse: float = 0.0) -> None:
        self.fine, self.coarse, self.calls = fine, coarse, 0

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        self.calls += len(requests)
        return [Restored(key=request.key, image=self._one(request)) for request in requests]

    def _one(self, request: Request) -> Image:
        random = generator(request.seed, "noisy")
        height, width = request.image.shape[:2]
        pixel = self.fine * random.choice([-1.0, 1.0], size=(height, width // 2, 1, 3)) * np.array([1, -1])[:, None]
        block = self.coarse * random.choice([-1.0, 1.0], size=(height // 8, width // 8, 1))
        noise = pixel.reshape(height, width, 3) + np.kron(block, np.ones((8, 8, 1)))
        return np.clip(request.image.astype(float) + noise, 0, 255).astype(np.uint8)


def subject(images: Path, out: Path, restorer: Noisy) -> WholeModel:
    job = StudyJob(model="noisy", images=images, out=out, side_px=SIDE)
    return WholeModel(job=job, name="noisy", digest="0" * 64, system="none", restorer=restorer, options={}, check=dict)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "in"
    pictures.mkdir()
    for index in range(6):
        middle = dead_leaves(48, 0, index) // 2 + 64  # leaves room for the noise: no clipping
        (pictures / f"p{index}.png").write_bytes(encode_png(middle))
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    return pictures


def test_a_spread_is_that_of_its_parts() -> None:
    gray = np.full((16, 20, 3), 100, np.uint8)  # the last four columns fill no block
    assert spread([gray, gray]).total == 0
    parts = spread([gray, gray + 10])  # whole blocks move: variance (5^2 + 5^2) / 1
    assert (parts.total, parts.coarse, parts.fine) == pytest.approx((50**0.5, 50**0.5, 0.0))
    checks = np.indices((16, 20)).sum(axis=0)[:, :, None] % 2 * np.full(3, 10, np.uint8)
    parts = spread([gray, (gray + checks - 5).astype(np.uint8)])  # +-5 within every block: its mean stays
    assert (parts.coarse, parts.fine) == pytest.approx((0.0, 12.5**0.5))
    assert coarse_error(gray, gray + 10) == pytest.approx(10) and coarse_error(gray, gray) == 0
    assert block_means(gray).shape == (2, 2, 3)
    for wrong in ([gray], [gray, gray[:8]], [gray[:4], gray[:4]]):
        with pytest.raises(ValueError, match=r"spread needs|no block"):
            spread(wrong)


def test_psnr_of_results_and_of_their_mean() -> None:
    gray = np.full((8, 8, 3), 100, np.uint8)
    values = picture_values([gray + 10, gray - 10], gray, gray)
    assert values["psnr"] == pytest.approx(20 * np.log10(25.5), rel=1e-4)
    assert values["psnr_of_mean"] is None and values["psnr_of_input"] is None  # they equal the original
    assert values["psnr_range"] == pytest.approx(0) and values["result_to_input"] == pytest.approx(10)


def test_fine_noise_agrees_with_the_input_and_coarse_does_not(folder: Path, tmp_path: Path) -> None:
    fine = analyze_seeds(subject(folder, tmp_path / "f", Noisy(fine=6)), mixed="realesrgan-nano", seeds=8)
    assert (fine.measured, fine.quarantined) == (6, 1)
    assert "100 % of that variance is detail" in fine.seen[0]
    assert sum("agree with the input more than the original" in sentence for sentence in fine.seen) == 3
    for row in read_lines(tmp_path / "f" / "values.jsonl"):
        for values in row["levels"].values():
            assert values["coarse"] == values["result_to_input"] == 0
            # a fair coin's unbiased variance over 8 draws has mean 36 and, over 512 pairs a channel, little spread
            assert values["total"] == pytest.approx(6, abs=0.3)
    coarse = analyze_seeds(subject(folder, tmp_path / "c", Noisy(coarse=30)), mixed="realesrgan-nano", seeds=4)
    assert "0 % of that variance is detail" in coarse.seen[0]
    assert sum("agree with the input less than the original" in sentence for sentence in coarse.seen) == 3
    for row in read_lines(tmp_path / "c" / "values.jsonl"):
        assert all(values["result_to_input"] == pytest.approx(30) for values in row["levels"].values())
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    means = [row["levels"]["x8"]["total"] for row in read_lines(tmp_path / "c" / "values.jsonl")]
    assert summary["levels"]["x8"]["total"]["mean"] == pytest.approx(np.mean(means))


def test_it_resumes_and_draws(folder: Path, tmp_path: Path) -> None:
    out, restorer = tmp_path / "out", Noisy(fine=4)
    first = analyze_seeds(subject(folder, out, restorer), mixed="realesrgan-nano", seeds=2)
    assert restorer.calls == 6 * 4 * 2
    page = first.report.read_bytes()
    assert b"data:image/png" in page and b"data:image/jpeg" in page
    kept, damaged, *_ = sorted((out / "strips").glob("*.png"))
    damaged.write_bytes(b"damaged")
    again = analyze_seeds(subject(folder, out, restorer), mixed="realesrgan-nano", seeds=2)
    assert (again.measured, again.kept, restorer.calls) == (1, 5, 7 * 4 * 2)
    assert again.report.read_bytes() == page
    strip = decode(kept.read_bytes())
    assert strip.shape == (4 * 96, 5 * 96, 3)  # a line per level: original, input, two results, their differences


def test_the_report_names_a_model_without_noise(folder: Path, tmp_path: Path) -> None:
    result = analyze_seeds(subject(folder, tmp_path / "out", Noisy()), mixed="realesrgan-nano")
    assert result.seen == ["Every seed gives the same picture: this model takes no noise."]


def test_wrong_numbers_die_at_once(tiny: Path, folder: Path, tmp_path: Path) -> None:
    for seeds in (1, 101):
        with pytest.raises(UsageError, match="--seeds must be between 2 and 100"):
            analyze_seeds(subject(folder, tmp_path / "out", Noisy()), seeds=seeds)
    with pytest.raises(UsageError, match=r'unknown study "seed".*seeds'):
        analyze("seed", StudyJob(model="instantir-nano", images=folder, out=tmp_path / "out"))
    with pytest.raises(UsageError, match="step"):
        analyze("seeds", StudyJob(model=tiny, images=folder, out=tmp_path / "out", options={"stesp": 2}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_first_results_are_those_of_restore(tiny: Path, folder: Path, tmp_path: Path) -> None:
    """The strip's results equal those that `restore --seed` writes, with a real model."""
    (folder / "broken.jpg").unlink()
    job = StudyJob(model=tiny, images=folder, out=tmp_path / "out", options={"steps": 1}, side_px=96)
    analyze("seeds", job, mixed="realesrgan-nano", seeds=2)
    row = read_lines(tmp_path / "out" / "values.jsonl")[0]
    assert row["levels"]["HQ"]["total"] > 0
    strip = decode((tmp_path / "out" / "strips" / "p0.png").read_bytes())
    (tmp_path / "lq").mkdir()
    (tmp_path / "lq" / "p0.png").write_bytes(encode_png(np.ascontiguousarray(strip[:96, 96:192])))
    for seed in (0, 1):
        model = open_model(tiny)
        restore_job = RestoreJob(ask=model.request_options({"steps": 1}), seed=seed)
        restore_folder(model, tmp_path / "lq", tmp_path / f"r{seed}", restore_job, Pool(workers=0))
        expected = decode((tmp_path / f"r{seed}" / "p0.png").read_bytes())
        assert np.array_equal(strip[:96, (2 + seed) * 96 :][:, :96], expected)
    assert picture_seed(0, "p0") != picture_seed(1, "p0")
