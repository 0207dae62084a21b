"""InstaRevive's training for its tasks: inpainting, unpaired targets, captions of the coarse restoration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper

from components.captions.views import find_view, view_for
from components.objectives.distillation import Distillation
from components.recipes import RecipeError
from components.systems import SYSTEMS
from components.systems.recipes import load_recipe
from components.types import SampleError

objectives, trainings = (
    load_helper("components/test_instarevive_objective.py"),
    load_helper("components/test_instarevive_training.py"),
)
prior = objectives.prior


def test_inpainting_keeps_input_latents_and_trains_the_missing_ones(prior: Any) -> None:
    rows = objectives.tiny.batch()
    input_latents = prior.encode(rows.lq)
    factor = rows.lq.shape[-1] // input_latents.shape[-1]
    masks = torch.zeros(len(rows), 1, 16, 16)
    masks[:, :, 0, 0] = 1  # one pixel is missing, so only its latent is missing
    fixed = objectives.FixedGenerator(torch.full_like(input_latents, 0.25))
    objective = objectives.make(prior, Distillation(inpaint=True, regression="l2", text_dropout=0))
    objective.generator = fixed
    noise, masked = objectives.Noise(0, rows.positions), replace(rows, masks=masks)
    latents = objective._generate(masked, objective.texts.unconditional(rows), noise, objective.lq_latents(masked))
    assert factor > 1 and torch.equal(latents[..., 1:, :], input_latents[..., 1:, :])
    assert torch.equal(latents[..., 1:], input_latents[..., 1:])
    assert (latents[..., 0, 0] == 0.25).all()
    phases = objective.phases(masked, noise)
    next(phases)[1].value.backward()
    gradient = fixed.latents.grad
    assert gradient is not None and gradient[..., 0, 0].abs().min() > 0
    assert (gradient != 0).sum() == gradient[..., 0, 0].numel(), "latents outside the mask have no gradient"
    with pytest.raises(ValueError, match="needs masks"):
        next(objective.phases(rows, objectives.Noise(0, rows.positions)))


def test_unpaired_targets_train_by_the_scores_alone(prior: Any) -> None:
    rows = objectives.tiny.batch()
    objective = objectives.make(prior, Distillation(regression="none", weight=2.0, text_dropout=0))
    losses = objectives.run(objective, rows)
    metrics = losses["generator"].metrics
    assert "loss_regression" not in metrics and metrics["alpha"] == 0
    torch.testing.assert_close(losses["generator"].value, 2 * metrics["loss_dsm"])
    # another target changes T_max only, as there is no regression
    far = objectives.run(objective, replace(rows, hq=-rows.hq))
    assert far["generator"].metrics["distance"] != metrics["distance"]
    assert set(losses) == {"generator", "fake_score"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["distillation.inpaint=true", "degradation.preset=x4"], "degradation.preset=strokes"),
        (["degradation.preset=none", "unpaired=day"], "distillation.regression=none"),
        (["degradation.preset=none", "unpaired=day", "teacher=nano"], "leave teacher or unpaired out"),
        (["distillation.regression=none", "distillation.score=false"], "leaves no loss"),
        (["pairs=lq"], "with either set degradation.preset=none"),
        (["degradation.preset=none", "pairs=lq", "unpaired=day"], "set only one of pairs and unpaired"),
        (["prompt=night, {caption}", "embeddings=embeddings"], "leave prompt or embeddings out"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("instarevive-bsr-nano", changes)


def test_the_coarse_restoration_can_be_captioned(tmp_path: Path) -> None:
    views = SYSTEMS["instarevive"].views
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    plain_view = find_view("coarse", views)
    assert plain_view(hq=None, lq=None, preview=picture) is picture and plain_view.needs_lq
    with pytest.raises(SampleError, match="no_view"):
        plain_view(hq=picture, lq=picture, preview=None)
    with pytest.raises(ValueError, match="coarse=MODEL"):
        view_for(load_recipe("instarevive-bsr-nano"), "coarse", views)
    model = trainings.coarse_model(tmp_path / "coarse")
    view = view_for(load_recipe("instarevive-bsr-nano", [f"coarse={model.path}"]), "coarse", views)
    restored = view(hq=None, lq=picture, preview=None)
    assert restored.shape == picture.shape and restored.dtype == np.uint8 and not np.array_equal(restored, picture)
    assert np.array_equal(restored, view(hq=None, lq=picture.astype(np.float32) / 255, preview=None))
