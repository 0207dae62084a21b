"""Every diffusion system through the same verbs: batch job, evaluation, service, one-step distillation with its gate.

The models are untrained, see benchmarks/untrained.py. Nothing here depends on the system.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helper_modules import load_helper

from components.images import encode_png, read_png_text
from components.models import Model, ModelCard, load_model, save_model
from components.recipes import as_dict
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.recipes import load_recipe
from pipelines.core.pool import Pool
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation.degrade import degrade_folder
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.gate import pass_gate
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model
from pipelines.service.client import check_service
from pipelines.service.serve import start

untrained = load_helper("benchmarks/untrained.py")


@pytest.fixture(params=untrained.MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return untrained.save_untrained(request.param, tmp_path / "model", steps=2)  # type: ignore[no-any-return]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, two of them of one size, and their degraded copies in the folder lq beside."""
    hq = tmp_path / "hq"
    hq.mkdir()
    for number in range(3):
        side = 64 if number < 2 else 80
        (hq / f"p{number}.png").write_bytes(encode_png(dead_leaves(side, 3, number)))
    degrade_folder(hq, tmp_path / "lq", "realesrgan-nano", seed=1)
    return hq


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_batch_job_scores_and_service_agree(model: Model, pictures: Path, tmp_path: Path, ray_session: None) -> None:
    """The batch job restores all, alone or in company; its pictures are scored; the service returns its bytes."""
    opened, lq = open_model(model.path), tmp_path / "lq"
    results = {}
    for batch_size in (1, 2):
        out = tmp_path / f"restored-{batch_size}"
        result = restore_folder(opened, lq, out, RestoreJob(seed=4), Pool(workers=0, batch_size=batch_size))
        assert (result.restored, result.quarantined) == (3, 0)
        results[batch_size] = {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}
    assert results[1] == results[2] and len(results[1]) == 3

    summary = evaluate(tmp_path / "restored-1", lq, pictures, tmp_path / "scores", ["psnr", "consistency", "gmsd"])
    assert not summary.missing
    rows = [json.loads(line) for line in (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(row["scores"]["restored"].values())).all() for row in rows) and len(rows) == 3

    with start(opened, timeout_s=200) as service:
        for name, png in results[1].items():
            assert check_service(service.url, lq / name, png)["bytes"] == len(png)
            assert read_png_text(png)["system"] == model.info["system"]


@pytest.mark.slow
def test_it_teaches_a_student_of_one_step(model: Model, tmp_path: Path) -> None:
    """The student is built on its teacher's prior, and the gate compares both."""
    samples: list[tuple[str, str, bytes, dict[str, Any]]] = [
        (f"p{n}", "png", encode_png(dead_leaves(72, 11, n)), {}) for n in range(10)
    ]
    write_corpus(tmp_path / "corpus", "leaves", {"train": samples[:4], "held_out": samples[4:]})
    small = ["resolution=32", "short_side=48", "gate.psnr_db=50", "gate.perceptual=100", "gate.pictures=6"]
    recipe: Any = load_recipe("distil-onestep-nano", [f"teacher={model.path}", *small])
    objective: Any = SYSTEMS[recipe.system].build_objective(recipe, {})
    assert objective.prior.source["digest"] == load_model(model.path).info["prior"]["digest"]
    card = ModelCard(
        name="student",
        system=recipe.system,
        recipe=as_dict(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    save_model(tmp_path / "out" / "model", card, objective.parts(), getattr(objective, "files", None))
    result = pass_gate(recipe, {"corpus": tmp_path / "corpus"}, tmp_path / "out", on_ray=False)
    assert result.passed and len(result.pictures) == 6
