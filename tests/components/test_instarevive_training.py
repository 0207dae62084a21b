"""From a recipe to a trained model folder and back: distillation on the shipped nano prior."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.objectives.distillation import Distillation
from components.randomness import Noise
from components.recipes import Optimizer, RecipeError, as_dict
from components.systems import SYSTEMS, build_restorer
from components.systems.instarevive.network import OneStepGenerator
from components.systems.instarevive.recipe import InstaReviveRecipe
from components.systems.instarevive.training import (
    MEASURE_SEED,
    BackboneObjective,
    BackboneTexts,
    build_objective,
    look,
    measure,
    prior_of_teacher,
)
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import build_swinir
from components.training import build_optimizers, train_step
from components.types import Batch, Request


def recipe(**changes: Any) -> InstaReviveRecipe:
    defaults = {"family": "nano", "prior": "nano", "steps": 3, "batch_size": 2, "resolution": 64, "short_side": 64}
    return InstaReviveRecipe(name="test", system="instarevive", stage="onestep", **{**defaults, **changes})


def batch(side: int = 64) -> Batch:
    rows = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 8, 8)).astype(np.float32)
    hq, lq = (torch.nn.functional.interpolate(torch.from_numpy(part), (side, side), mode="bicubic") for part in rows)
    return Batch(
        keys=["a", "b"],
        positions=np.arange(2),
        hq=hq.clamp(-1, 1),
        lq=lq.clamp(-1, 1),
        prompts=["red", ""],
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1),
    )


def train(objective: BackboneObjective, steps: int = 2) -> dict[str, float]:
    optimizers = build_optimizers(objective, Optimizer())
    metrics = {}
    for step in range(steps):
        noise = Noise(0, np.arange(2) + 2 * step)
        metrics = train_step(objective, [(batch(), noise)], optimizers, lr=1e-4, clip_norm=1.0)
    return metrics


def save_folder(objective: BackboneObjective, recipe: InstaReviveRecipe, path: Path) -> Model:
    card = ModelCard(
        name=path.name,
        system="instarevive",
        recipe=as_dict(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    return save_model(path, card, objective.parts())


def coarse_model(path: Path) -> Model:
    config = SwinIRConfig(img_size=8, embed_dim=12, depths=[1], num_heads=[2], window_size=4, sf=4, unshuffle_scale=4)
    card = ModelCard(name="coarse", system="swinir", config=config.to_dict())
    return save_model(path, card, {"swinir": dict(build_swinir(config).named_parameters())})


@pytest.mark.parametrize("changes", [{}, {"input": "noise"}, {"distillation": Distillation(fake="lora", lora_rank=4)}])
def test_a_recipe_trains_and_its_folder_restores(changes: dict[str, Any], tmp_path: Path) -> None:
    coarse = coarse_model(tmp_path / "coarse")
    settings = recipe(coarse=str(coarse.path), restore_options={"color": "wavelet"}, **changes)
    objective = build_objective(settings, {})
    before = {k: v.clone() for k, v in objective.parts()["generator"].items()}
    metrics = train(objective)
    assert {"t_max", "alpha", "loss_regression", "loss_dsm", "loss_fake"} <= set(metrics)
    after = objective.parts()["generator"]
    assert not all(torch.equal(before[key], value) for key, value in after.items())
    assert not [key for key in after if "lora" in key]
    preview = look(objective, settings, batch().lq, ["red", ""], seed=0)
    assert preview.shape == (2, 3, 64, 64)
    model = save_folder(objective, settings, tmp_path / "model")
    restorer = build_restorer(model.path)
    image = np.zeros((40, 52, 3), dtype=np.uint8)
    result = restorer.restore([Request(key="k", image=image)])[0]
    assert result.image.shape == image.shape and result.info["color"] == "wavelet"
    assert model.info["config"]["coarse"] == {"id": str(coarse.path.resolve()), "digest": coarse.digest}
    # the preview during training equals the restoration of the folder
    from components.tensors import images_to_tensor, tensor_to_images

    (again,) = restorer.restore([Request(key="k", image=tensor_to_images(batch().lq)[0], prompt="red", seed=0)])
    assert (images_to_tensor([again.image]) - preview[:1]).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["lq", "noise"])
def test_held_out_psnr_is_that_of_the_generators_pictures(kind: str) -> None:
    objective, heldout = build_objective(recipe(input=kind), {}), batch()
    psnrs = measure(objective, [heldout, heldout])
    with torch.no_grad():
        noise = Noise(MEASURE_SEED, heldout.positions, "cpu")
        lq = objective.backbone.encode(heldout.lq)
        start = noise.normal("generator", tuple(lq.shape[1:])) if kind == "noise" else None
        conditions = objective.backbone.conditions(heldout.prompts, heldout.sizes)
        restored = objective.backbone.decode(objective.generator(lq, conditions, start))
    for name, images in (("psnr_heldout", restored), ("psnr_heldout_lq", heldout.lq)):
        levels = 127.5 * (images.clamp(-1, 1) - heldout.hq).double()
        expected = [20 * np.log10(255 / float(picture.square().mean().sqrt())) for picture in levels]
        assert psnrs[name] == pytest.approx(np.mean(expected), abs=1e-3)
    scores_alone = recipe(distillation=Distillation(regression="none"))
    assert measure(build_objective(scores_alone, {}), [heldout]) == {}


def test_previews_do_not_change_the_training() -> None:
    objective = build_objective(recipe(), {})
    objective.generator.train()
    with torch.no_grad():
        look(objective, recipe(), batch().lq, ["", ""], seed=0)
    assert objective.generator.training and all(p.requires_grad for p in objective.generator.parameters())
    train(objective, 1)


def test_a_generator_starts_from_another_folder(tmp_path: Path) -> None:
    first = build_objective(recipe(), {})
    train(first)
    model = save_folder(first, recipe(), tmp_path / "first")
    second = build_objective(recipe(warm_start=str(model.path), input="noise"), {})
    assert isinstance(second.generator, OneStepGenerator)
    start = second.parts()["generator"]
    assert all(torch.equal(value, start[key]) for key, value in model.part("generator").items())
    prior_network = second.backbone.network.state_dict()  # the scores start from the prior's weights
    assert any(not torch.equal(value, start[key]) for key, value in prior_network.items())
    with pytest.raises(ModelError, match="not an InstaRevive to start from"):
        build_objective(recipe(warm_start="nano"), {})
    other = ModelCard(name="x", system="instarevive", prior=dict(model.info["prior"]), config=model.info["config"])
    small = {**model.info["config"]["network"], "block_out_channels": [16, 24, 32]}
    narrow = save_model(tmp_path / "narrow", other, {"generator": dict(narrower(small).state_dict())})
    info = load_model(narrow.path)
    info.info["config"]["network"].update(small)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="does not have the shapes of the prior's network"):
        build_objective(recipe(), {"start": info})


def test_the_settings_of_a_warm_start_are_kept_or_refused(tmp_path: Path) -> None:
    """Its time step and mask hold unless the recipe sets others; settings that cannot be used are refused."""
    first = build_objective(recipe(input="noise", timestep=300, mask_as_bias=True), {})
    model = save_folder(first, recipe(), tmp_path / "first")
    config = build_objective(recipe(input="noise"), {"onestep": model}).config
    assert (config["one_step"]["timestep"], config["mask_as_bias"]) == (300, True)
    config = build_objective(recipe(input="noise", timestep=200, mask_as_bias=False), {"onestep": model}).config
    assert (config["one_step"]["timestep"], config["mask_as_bias"]) == (200, False)
    with pytest.raises(ModelError, match="takes noise"):
        build_objective(recipe(), {"onestep": model})
    for key, value, words in (
        ("prediction", "v_prediction", "trained with the prediction v_prediction"),
        ("schedule", {**model.info["config"]["schedule"], "beta_end": 0.02}, "trained with the noise schedule"),
    ):
        other = load_model(model.path)
        other.info["config"][key] = value  # type: ignore[index]
        with pytest.raises(ModelError, match=words):
            build_objective(recipe(input="noise"), {"onestep": other})


@pytest.mark.parametrize(
    ("config", "family"), [({}, "sdxl"), ({"family": ""}, "sdxl"), ({"family": "pixart"}, "pixart")]
)
def test_the_family_and_the_prior_of_a_teacher(config: dict[str, Any], family: str) -> None:
    record = {"id": "nano", "digest": "d"}
    teacher = Model(path=Path("teacher"), info={"system": "s", "config": config, "prior": record}, digest="")
    assert prior_of_teacher(teacher) == (family, "nano", record)


def test_with_a_teacher_the_recipes_own_family_is_not_checked() -> None:
    """The teacher's family counts, and only the teacher's model folder has it."""
    settings = recipe(family="pixart", prior="", distil=True, teacher="nano", embeddings="text")
    with pytest.raises(ModelError, match="has no prior"):
        build_objective(settings, {})


def narrower(config: dict[str, Any]) -> torch.nn.Module:
    from components.systems.instarevive.network import build_network

    return build_network("nano", config)


def test_regression_alone_has_no_fake_score() -> None:
    objective = build_objective(recipe(distillation=Distillation(score=False)), {})
    assert set(objective.trainables) == {"generator"}
    assert "loss_dsm" not in train(objective, 1)


def test_texts_of_a_backbone_are_those_of_its_prior() -> None:
    objective = build_objective(recipe(gradient_checkpointing=True), {})
    rows = batch()
    dropped = torch.tensor([True, False])
    for texts in (objective.texts, BackboneTexts(objective.backbone)):
        conditions, empty = texts.conditions(rows, dropped), texts.unconditional(rows)
        torch.testing.assert_close(conditions.text[0], empty.text[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(conditions.text, empty.text, atol=1e-5, rtol=1e-5)  # both prompts are empty now
    train(objective, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel": 2}, "kernel 1 or 3"),
        ({"align_start": "noised"}, "align_start=noised needs input=noise"),
        ({"timestep": -3}, "timestep >= -1"),
        ({"family": "pixart", "embeddings": "text"}, "must embed its own"),
        ({"restore_options": {"windw": "equal"}}, 'Did you mean "window"'),
    ],
)
def test_wrong_recipes_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**changes)


def test_the_system_is_registered() -> None:
    system = SYSTEMS["instarevive"]
    assert [(stage.name, stage.version) for stage in system.stages] == [("onestep", 1)] and system.weights is not None
    assert system.check_options is not None and system.check_options({"tile_px": 512.0}, {}) == {"tile_px": 512}
    layout = system.weights.code().layout(sizes={})
    assert sum(torch.Size(s).numel() for s in layout["InstaRevive_v1.ckpt"].values()) == 610_856_096
    assert asdict(recipe())["distillation"]["kappa"] == 1.5


def test_a_recipe_with_lpips_gives_the_objective_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str]] = []

    def perceptual(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return (restored - clean).abs().flatten(1).mean(dim=1)

    def load(place: str, device: str) -> Any:
        opened.append((place, device))
        return perceptual

    monkeypatch.setattr("components.systems.instarevive.training.load_lpips", load)
    objective = build_objective(recipe(distillation=Distillation(regression="perceptual", lpips="PLACE")), {})
    assert opened == [("PLACE", "cpu")] and objective.perceptual is perceptual


def test_parts_are_the_builders() -> None:
    objective = build_objective(recipe(), {})
    parts = objective.parts()
    assert set(parts) and all(isinstance(tensors, dict) and tensors for tensors in parts.values())
