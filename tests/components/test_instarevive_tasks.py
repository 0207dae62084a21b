"""What InstaRevive's tasks ask of its training: inpainting, unpaired targets, captions of the coarse restoration."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.captions.views import find_view, needs_lq, view_for
from components.recipes import RecipeError, load_recipe
from components.systems import SYSTEMS
from components.systems.instarevive.settings import Distillation
from components.types import SampleError


def _by_path(name: str) -> Any:
    """Helpers of another test file; tests are no package."""
    spec = importlib.util.spec_from_file_location(f"{name}_for_tasks", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


objectives, trainings = _by_path("test_instarevive_objective"), _by_path("test_instarevive_training")
prior = objectives.prior


def test_inpainting_keeps_known_latents_and_learns_the_missing_ones(prior: Any) -> None:
    rows = objectives.tiny.batch()
    known = prior.encode(rows.lq)
    factor = rows.lq.shape[-1] // known.shape[-1]
    masks = torch.zeros(len(rows), 1, 16, 16)
    masks[:, :, 0, 0] = 1  # one pixel is missing: the latent above it is, and no other
    held = objectives.Held(torch.full_like(known, 0.25))
    objective = objectives.make(prior, Distillation(inpaint=True, regression="l2", text_dropout=0))
    objective.generator = held
    noise, masked = objectives.Noise(0, rows.positions), replace(rows, masks=masks)
    seen = objective._generate(masked, objective.texts.nothing(rows), noise)
    assert factor > 1 and torch.equal(seen[..., 1:, :], known[..., 1:, :])
    assert torch.equal(seen[..., 1:], known[..., 1:])
    assert (seen[..., 0, 0] == 0.25).all()
    phases = objective.phases(masked, noise)
    next(phases)[1].value.backward()
    gradient = held.latents.grad
    assert gradient is not None and gradient[..., 0, 0].abs().min() > 0
    assert (gradient != 0).sum() == gradient[..., 0, 0].numel(), "what is known has no gradient"
    with pytest.raises(ValueError, match="needs masks"):
        next(objective.phases(rows, objectives.Noise(0, rows.positions)))


def test_unpaired_targets_teach_through_the_scores_alone(prior: Any) -> None:
    rows = objectives.tiny.batch()
    objective = objectives.make(prior, Distillation(regression="none", weight=2.0, text_dropout=0))
    losses = objectives.run(objective, rows)
    metrics = losses["generator"].metrics
    assert "loss_regression" not in metrics and metrics["alpha"] == 0
    torch.testing.assert_close(losses["generator"].value, 2 * metrics["loss_dsm"])
    # another target moves T_max and nothing else: there is no regression towards it
    far = objectives.run(objective, replace(rows, hq=-rows.hq))
    assert far["generator"].metrics["distance"] != metrics["distance"]
    assert set(losses) == {"generator", "fake_score"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["distillation.inpaint=true", "degradation.preset=x4"], "degradation.preset=strokes"),
        (["degradation.preset=none", "unpaired=day"], "distillation.regression=none"),
        (["degradation.preset=none", "unpaired=day", "teacher=nano"], "leave teacher or unpaired out"),
        (["distillation.regression=none", "distillation.score=false"], "nothing to learn from"),
        (["pairs=lq"], "degradation.preset is none"),
        (["degradation.preset=none", "pairs=lq", "unpaired=day"], "the other is empty"),
        (["prompt=night, {caption}", "embeddings=embeddings"], "leave prompt or embeddings out"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("instarevive-bsr-nano", changes)


def test_the_coarse_restoration_can_be_captioned(tmp_path: Path) -> None:
    views = SYSTEMS["instarevive"].views
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    bare = find_view("coarse", views)
    assert bare(hq=None, lq=None, preview=picture) is picture and needs_lq(bare)
    with pytest.raises(SampleError, match="no_view"):
        bare(hq=picture, lq=picture, preview=None)
    with pytest.raises(ValueError, match="coarse=MODEL"):
        view_for(load_recipe("instarevive-bsr-nano"), "coarse", views)
    model = trainings.coarse_model(tmp_path / "coarse")
    view = view_for(load_recipe("instarevive-bsr-nano", [f"coarse={model.path}"]), "coarse", views)
    seen = view(hq=None, lq=picture, preview=None)
    assert seen.shape == picture.shape and seen.dtype == np.uint8 and not np.array_equal(seen, picture)
    assert np.array_equal(seen, view(hq=None, lq=picture.astype(np.float32) / 255, preview=None))
