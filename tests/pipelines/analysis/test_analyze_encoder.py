"""`restoray analyze encoder`: what the robust encoder is worth; numbers by hand on untrained models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from typer.testing import CliRunner

from components.captions.presets import build_captioner
from components.captions.text import tidy
from components.degradations import build_degradation
from components.evaluation.statistics import psnr
from components.images import encode_png, to_float, to_uint8
from components.models import load_model
from components.priors.opening import load_prior
from components.synthetic import dead_leaves
from components.systems.supir.build import network_of
from components.tensors import images_to_tensor, tensor_to_images
from pipelines.analysis.model import StudyJob
from pipelines.analysis.studies import analyze
from pipelines.analysis.supir.encoder import FAULTS
from pipelines.commands.analyze import app
from pipelines.core.errors import UsageError
from pipelines.core.rows import read_lines

untrained = load_helper("benchmarks/untrained.py")
SIDE = 64


@pytest.fixture
def job(tmp_path: Path) -> StudyJob:
    (tmp_path / "in").mkdir()
    for number in range(6):
        (tmp_path / "in" / f"p{number}.png").write_bytes(encode_png(dead_leaves(SIDE, 3, number)))
    model = untrained.save_untrained("supir", tmp_path / "model")
    return StudyJob(model=model.path, images=tmp_path / "in", out=tmp_path / "out", side_px=SIDE)


def other_seed(model: Path, path: Path) -> Path:
    """The model with another robust encoder."""
    from components.models import ModelCard, save_model

    whole = load_model(model)
    parts = {name: dict(whole.part(name)) for name in whole.info["parts"]}
    parts["encoder"] = {name: value * 1.05 for name, value in parts["encoder"].items()}
    card = ModelCard(name="other", system="supir", recipe={}, prior=whole.info["prior"], config=whole.info["config"])
    return save_model(path, card, parts).path


def test_the_numbers_of_a_picture_by_hand(job: StudyJob, tmp_path: Path) -> None:
    arms = {"seed 0": {"model": str(job.model)}, "seed 1": {"model": str(other_seed(Path(job.model), tmp_path / "m1"))}}
    result = analyze("encoder", job, arms=arms, mixed="realesrgan-nano")
    rows = {row["key"]: row for row in read_lines(job.out / "values.jsonl")}
    assert (result.measured, len(rows)) == (6, 6) and set(rows["p0"]["psnr"]) == {*FAULTS, "realesrgan-nano"}

    picture, degradation = dead_leaves(SIDE, 3, 0), build_degradation("x8")
    lq = to_uint8(degradation.apply(to_float(picture), degradation.draw(0, "p0", 0)))
    prior = load_prior("nano")
    encoder = network_of(load_model(arms["seed 1"]["model"]), prior, ("encoder",)).encoder
    with torch.no_grad():
        pixels = images_to_tensor([lq])
        plain = tensor_to_images(prior.decode(prior.encode(pixels)).clamp(-1, 1))[0]
        robust = tensor_to_images(prior.decode(encoder(pixels)).clamp(-1, 1))[0]
    own = rows["p0"]["psnr"]["x8"]
    assert own["lq"] == pytest.approx(psnr(lq, picture)) and own["plain"] == pytest.approx(psnr(plain, picture))
    assert own["seed 0"] == own["plain"], "a new robust encoder is the autoencoder's own"
    assert own["seed 1"] == pytest.approx(psnr(robust, picture)) != own["plain"]

    texts = [tidy(text) for text in build_captioner("tags").caption([picture, lq])]
    assert [rows["p0"]["captions"]["x8"][name] for name in ("hq", "lq")] == texts
    mine, other = (set(text.lower().split()) for text in texts)
    assert rows["p0"]["agreement"]["x8"]["lq"] == pytest.approx(len(mine & other) / len(mine | other))

    summary = json.loads((job.out / "summary.json").read_text())
    gains = [
        (row["psnr"]["x8"]["seed 0"] + row["psnr"]["x8"]["seed 1"]) / 2 - row["psnr"]["x8"]["plain"]
        for row in rows.values()
    ]
    assert summary["gain"]["x8"]["mean"] == pytest.approx(np.mean(gains), abs=1e-6)
    assert (job.out / "encoder.jpg").is_file() and "Fig. 14" in result.report.read_text()
    assert analyze("encoder", job, arms=arms, mixed="realesrgan-nano").kept == 6


def test_wrong_models_and_arms_are_refused(job: StudyJob, tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        analyze("encoder", job, **changes)

    with pytest.raises(UsageError, match="no robust encoder"):
        run(arms={"a": {"model": "nano"}})
    with pytest.raises(UsageError, match="model=FOLDER and nothing else"):
        run(arms={"a": {"model": str(job.model), "tau": 1}})
    with pytest.raises(UsageError, match="tagz"):
        run(captioner="tagz")
    arguments = ["encoder", "--model", str(job.model), "--images", str(job.images), "--out", str(tmp_path / "o")]
    answer = CliRunner().invoke(app, [*arguments, "--side", "64", "--limit", "1", "--json"])
    assert answer.exit_code == 0 and json.loads(answer.output)["measured"] == 1, answer.output
