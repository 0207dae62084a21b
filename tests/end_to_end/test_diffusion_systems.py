"""Every diffusion system through the same verbs: batch job, evaluation, service, one-step distillation with its gate.

The models are untrained, with random numbers in their zero weights, on the shipped nano prior. Nothing here depends on
the system but the function that makes its model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.images import encode_png, read_png_text
from components.models import Model, ModelCard, load_model, save_model
from components.priors.opening import load_prior
from components.randomness import generator
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

Parts = Mapping[str, Mapping[str, Tensor]]


def filled(parts: Parts) -> dict[str, dict[str, Tensor]]:
    """Copies of all parts; tensors of zeros get random numbers, so that nothing trained is without effect."""
    copies = {part: {name: value.clone() for name, value in tensors.items()} for part, tensors in parts.items()}
    for part, tensors in copies.items():
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(value.any()):
                noise = generator(5, part, name).standard_normal(tuple(value.shape), dtype=np.float32)
                tensors[name] = 0.02 * torch.from_numpy(noise)
    return copies


def save(system: str, parts: Parts, config: Mapping[str, Any], digest: str, path: Path) -> Model:
    recipe = {"name": "tiny", "restore_options": {"steps": 2}, "steps_at_restore": 2, "cfg_scale": 2.0}
    card = ModelCard(
        name="tiny", system=system, recipe=recipe, prior={"id": "nano", "digest": digest}, config=dict(config)
    )
    return save_model(path, card, filled(parts))


def make_instantir(path: Path) -> Model:
    from components.systems.instantir.network import InstantIR

    prior = load_prior("nano")
    resampler = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}
    network = InstantIR(prior, resampler, {"rank": 2, "alpha": 1}, aggregator=True)
    return save("instantir", network.parts(), network.config(), prior.digest, path)


def make_supir(path: Path) -> Model:
    from components.priors.robust_encoder import RobustEncoder
    from components.systems.supir.config import AdaptorConfig
    from components.systems.supir.network import Adaptor, Supir

    prior = load_prior("nano")
    network = Supir(prior, RobustEncoder(prior.autoencoder), Adaptor(prior.unet, AdaptorConfig()))
    return save("supir", network.parts(), network.config(), prior.digest, path)


def make_dra(path: Path) -> Model:
    from components.systems.dra.config import LoraConfig
    from components.systems.dra.network import Dra

    prior = load_prior("nano")
    network = Dra(prior, None, LoraConfig(rank=2))
    return save("dra", network.parts(), network.config(), prior.digest, path)


MAKERS: Mapping[str, Callable[[Path], Model]] = {"instantir": make_instantir, "supir": make_supir, "dra": make_dra}


@pytest.fixture(params=MAKERS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return MAKERS[request.param](tmp_path / "model")


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
