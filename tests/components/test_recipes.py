"""Recipes resolve, and a wrong one dies at once with the near name."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.recipes import RecipeError, identity, load_recipe, recipe_names
from components.systems.instantir.recipe import InstantIRRecipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves_under_its_own_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert name.startswith(f"{recipe.system}-{recipe.stage}")


def test_the_papers_numbers_stand_in_the_recipes() -> None:
    dcp, previewer, aggregator = (load_recipe(f"instantir-{s}") for s in ("dcp", "previewer", "aggregator"))
    assert isinstance(aggregator, InstantIRRecipe)
    assert (dcp.steps, dcp.batch_size, dcp.resolution, dcp.optimizer.lr) == (200_000, 256, 1024, 1e-4)
    assert (previewer.steps, previewer.batch_size) == (30_000, 256)
    assert (aggregator.steps, aggregator.batch_size, aggregator.both_dropout) == (200_000, 96, 0.15)
    assert [r.image_dropout + r.both_dropout for r in (dcp, previewer, aggregator)] == [0.15] * 3  # 4.1: LQ dropout
    assert (previewer.distance, previewer.teacher_cfg_scale) == ("l2", [])  # Eq. 5
    assert dcp.sources == previewer.sources == {"journeydb": 1.0}  # section 4.2
    assert set(aggregator.sources) == {"div2k", "lsdir", "flickr2k", "ffhq"}


RELEASED = {
    "dcp": (96, 12, 512, 2000, (0.05, 0.05, 0.05)),
    "previewer": (32, 4, 1024, 4000, (0.0, 0.0, 0.0)),
    "aggregator": (12, 2, 512, 3000, (0.0, 0.85, 0.15)),
}
"""The scripts' batch_size, accumulation (ours but for the aggregator), resolution, checkpoint_every and dropout of
picture, text and both (reference sheet of InstantIR, section 7)."""


@pytest.mark.parametrize("stage", sorted(RELEASED))
def test_the_released_twins_have_the_scripts_numbers(stage: str) -> None:
    recipe, wanted = load_recipe(f"instantir-{stage}-released"), RELEASED[stage]
    assert isinstance(recipe, InstantIRRecipe)
    dropout = (recipe.image_dropout, recipe.text_dropout, recipe.both_dropout)
    assert (recipe.batch_size, recipe.accumulation, recipe.resolution, recipe.checkpoint_every, dropout) == wanted
    assert recipe.short_side == recipe.resolution and not recipe.flip and recipe.scale == [1.0, 1.0]
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.eps) == (1e-4, [0.9, 0.999], 1e-2, 1e-8)
    assert (optimizer.clip_norm, optimizer.schedule, optimizer.warmup_steps) == (1.0, "cosine", 1000)
    assert recipe.sources == {"ffhq": 0.1, "div2k": 0.3, "lsdir": 0.3, "flickr2k": 0.1}
    assert (recipe.precision, recipe.seed, recipe.ema_decay, recipe.captioner) == ("fp16", 42, 0.0, "")
    assert recipe.degradation.preset == "instantir" and recipe.gradient_checkpointing
    assert (recipe.timestep_importance, recipe.noise_offset, recipe.max_clean_weight) == (0.0, 0.0, 1.0)
    assert (recipe.preview_cfg_scale, recipe.reference, recipe.reference_noise) == (1.0, "preview", False)
    if stage == "previewer":
        assert (recipe.distance, recipe.huber_c, recipe.teacher_cfg_scale) == ("huber", 0.001, [3.0, 15.0])
        assert (recipe.teacher_timesteps, recipe.lora_rank, recipe.lora_alpha) == (50, 64, 1.0)


def test_the_released_target_is_the_sharpened_picture() -> None:
    from components.degradations import PRESETS
    from components.degradations.real_esrgan import RealESRGAN

    preset = PRESETS["instantir"]
    assert isinstance(preset, RealESRGAN) and preset.sharpen_target and preset.clean_prob == 0.01


@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.endswith("-nano")])
def test_corpora_of_full_size_recipes_stand_in_the_catalogue(name: str) -> None:
    """What a recipe's sources name can be curated by that name."""
    corpora = {path.stem for path in (Path(__file__).parents[2] / "datasets").glob("*.yaml")}
    assert set(load_recipe(name).sources) <= corpora


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "lr"),
        (["resolutoin=64"], "resolution"),
        (["steps=many"], "steps"),
        (["precision=fp8"], "precision"),
        (["steps"], "not key=value"),
        (["steps=0"], "at least 1"),
        (["placement.workers=3"], "no multiple"),
        (["short_side=64"], "short_side"),
        (["image_dropout=0.9", "text_dropout=0.9"], "must not exceed 1"),
        (["perceptor_scale=0"], "above 0 where"),
        (["timestep_importance=1"], "timestep_importance"),
        (["preview_cfg_scale=0.5"], "preview_cfg_scale"),
        (["reference=lq", "preview_cfg_scale=3"], "reference lq has none"),
        (["reference=hq"], "reference"),
    ],
)
def test_wrong_overrides_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("instantir-dcp-nano", overrides)


def test_a_wrong_name_suggests_the_near_one() -> None:
    with pytest.raises(RecipeError, match='Did you mean "instantir-dcp-nano"'):
        load_recipe("instantir-dcp-nanoo")


def test_a_wrong_system_or_stage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("system: instantirr\n")
    with pytest.raises(RecipeError, match='Did you mean "instantir"'):
        load_recipe(path)
    path.write_text("system: instantir\nstage: dpc\nsteps: 1\nbatch_size: 1\n")
    with pytest.raises(RecipeError, match='Did you mean "dcp"'):
        load_recipe(path)
    path.write_text("system: instantir\nstage: dcp\nbatch_size: 1\n")
    with pytest.raises(RecipeError, match="no value for steps"):
        load_recipe(path)


def test_placement_is_no_part_of_the_identity() -> None:
    assert identity(load_recipe("instantir-dcp-nano")) == identity(
        load_recipe("instantir-dcp-nano", ["placement.workers=2", "placement.threads=1"])
    )
