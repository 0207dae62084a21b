"""Recipes resolve, and a wrong one raises an error that suggests the right name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from components.priors.families import FAMILIES
from components.recipes import RecipeError, identity
from components.systems import SYSTEMS
from components.systems.instantir.recipe import InstantIRRecipe
from components.systems.instarevive.recipe import InstaReviveRecipe
from components.systems.recipes import MIXTURES, load_mixture, load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves_and_has_its_files_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    # a system of one stage need not name it
    prefix = f"{recipe.system}-{recipe.stage}" if len(SYSTEMS[recipe.system].stages) > 1 else recipe.system
    # a distillation is named after its task, since it works for several systems
    assert name.startswith("distil-" if getattr(recipe, "distil", False) else prefix)


def test_recipes_have_the_papers_numbers() -> None:
    dcp, previewer, aggregator = (load_recipe(f"instantir-{s}") for s in ("dcp", "previewer", "aggregator"))
    assert isinstance(aggregator, InstantIRRecipe)
    assert (dcp.steps, dcp.batch_size, dcp.resolution, dcp.optimizer.lr) == (200_000, 256, 1024, 1e-4)
    assert (previewer.steps, previewer.batch_size) == (30_000, 256)
    assert (aggregator.steps, aggregator.batch_size, aggregator.both_dropout) == (200_000, 96, 0.15)
    assert [r.image_dropout + r.both_dropout for r in (dcp, previewer, aggregator)] == [0.15] * 3  # 4.1: LQ dropout
    assert (previewer.distance, previewer.teacher_cfg_scale) == ("l2", [])  # Eq. 5
    assert dcp.sources == previewer.sources == {"journeydb": 1.0}  # section 4.2
    assert set(aggregator.sources) == {"div2k", "lsdir", "flickr2k", "ffhq"}


def test_recipes_have_instarevives_numbers() -> None:
    tasks = ("bsr", "bfr", "saltpepper", "derain", "lowlight", "inpaint", "cartoon", "daynight")
    recipes = {task: load_recipe(f"instarevive-{task}") for task in tasks}
    for recipe in recipes.values():
        assert isinstance(recipe, InstaReviveRecipe)
        assert (recipe.batch_size, recipe.resolution, recipe.family, recipe.input) == (32, 512, "pixart", "noise")
        assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-6, 1e-2)  # section 4.1
        assert (recipe.distillation.kappa, recipe.distillation.weight, recipe.distillation.t_share) == (1.5, 1.0, 0.02)
        assert recipe.prior == FAMILIES["pixart"].default_prior
    for name in recipe_names():
        recipe = load_recipe(name)
        if isinstance(recipe, InstaReviveRecipe) and not recipe.distil:
            assert recipe.prior == FAMILIES[recipe.family].default_prior, name
    assert load_recipe("instarevive-bsr", ["family=sd"]).prior == FAMILIES["sd"].default_prior
    assert load_recipe("instarevive-bsr", ["family=sd", "prior=mine/own"]).prior == "mine/own"
    steps = {task: recipe.steps for task, recipe in recipes.items()}
    assert (steps["bsr"], steps["bfr"], steps["saltpepper"], steps["cartoon"]) == (35_000, 25_000, 8_000, 10_000)
    assert steps["lowlight"] == steps["inpaint"] == steps["daynight"] == 10_000  # app. A.3
    starts = {task: getattr(recipe, "warm_start", None) for task, recipe in recipes.items()}
    assert starts["bsr"] == starts["bfr"] == "" and starts["lowlight"] == "instarevive"
    assert starts["inpaint"] == starts["cartoon"] == "instarevive-bfr"
    assert {task for task, recipe in recipes.items() if recipe.pairs} == {"derain", "lowlight", "cartoon"}
    released = load_recipe("instarevive-bsr-released")
    assert isinstance(released, InstaReviveRecipe)
    assert (released.input, released.timestep, released.mask_as_bias, released.precision) == ("lq", 400, True, "fp16")


RELEASED = {
    "dcp": (96, 12, 512, 2000, (0.05, 0.05, 0.05)),
    "previewer": (32, 4, 1024, 4000, (0.0, 0.0, 0.0)),
    "aggregator": (12, 2, 512, 3000, (0.0, 0.85, 0.15)),
}
"""The scripts' batch_size, accumulation (ours except for the aggregator), resolution, checkpoint_every and dropout of
picture, text and both (reference sheet of InstantIR, section 7)."""


@pytest.mark.parametrize("stage", sorted(RELEASED))
def test_the_released_twins_have_the_scripts_numbers(stage: str) -> None:
    recipe, expected = load_recipe(f"instantir-{stage}-released"), RELEASED[stage]
    assert isinstance(recipe, InstantIRRecipe)
    dropout = (recipe.image_dropout, recipe.text_dropout, recipe.both_dropout)
    assert (recipe.batch_size, recipe.accumulation, recipe.resolution, recipe.checkpoint_every, dropout) == expected
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


@pytest.mark.parametrize("name", [n for n in recipe_names() if not re.search("-nano$|^unetres|^regressor", n)])
def test_sources_of_full_size_recipes_are_in_the_catalogue(name: str) -> None:
    """Each source of a recipe has a corpus spec of its name."""
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
        (["placement.workers=3"], "not a multiple"),
        (["short_side=64"], "short_side"),
        (["image_dropout=0.9", "text_dropout=0.9"], "must not exceed 1"),
        (["perceptor_scale=0"], "above 0 where"),
        (["timestep_importance=1"], "timestep_importance"),
        (["preview_cfg_scale=0.5"], "preview_cfg_scale"),
        (["reference=hq"], "reference"),
        (["steps_at_restore=0"], "steps_at_restore must be at least 1"),
        (["resampler_dim=0"], "resampler_dim must be at least 1"),
        (["cfg_scale=-4"], "at least 0"),
    ],
)
def test_wrong_overrides_name_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("instantir-dcp-nano", overrides)


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("aggregator", "time_modulation=false", "time_modulation is for stage dcp, not aggregator"),
        ("aggregator", "lora_rank=8", "lora_rank is for stage previewer, not aggregator"),
        ("aggregator", "teacher_cfg_scale=[3,15]", "teacher_cfg_scale is for stage previewer"),
        ("previewer", "noise_offset=0.1", "noise_offset is for stage dcp and aggregator, not previewer"),
        ("previewer", "reference_noise=true", "reference_noise is for stage aggregator"),
        ("previewer", "compile=autoencoder", "compile is for stage aggregator, not previewer"),
        ("dcp", "reference=lq", "reference is for stage aggregator"),
        ("dcp", "distance=huber", "distance is for stage previewer"),
        ("aggregator", "reference=lq preview_cfg_scale=3", "reference lq has none"),
        ("previewer", "huber_c=-1", "huber_c must be above 0"),
        ("previewer", "teacher_timesteps=0", "teacher_timesteps must be at least 1"),
        ("previewer", "teacher_cfg_scale=[-3,1]", "teacher_cfg_scale must be at least 0"),
    ],
)
def test_a_setting_that_a_stage_ignores_is_refused(stage: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"instantir-{stage}-nano", override.split())


def test_an_override_without_a_value_sets_an_empty_text() -> None:
    assert load_recipe("instarevive-bsr", ["coarse=", "missing_captions.model="]).missing_captions.model == ""
    with pytest.raises(RecipeError, match="steps"):
        load_recipe("instarevive-bsr", ["steps="])


def test_the_error_for_a_wrong_name_suggests_one() -> None:
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


def test_placement_is_not_part_of_the_identity() -> None:
    assert identity(load_recipe("instantir-dcp-nano")) == identity(
        load_recipe("instantir-dcp-nano", ["placement.workers=2", "placement.threads=1"])
    )


def test_a_later_setting_is_part_of_the_identity_only_where_it_is_used() -> None:
    """So runs and models of the versions before it keep their digests, also for settings inside of settings."""
    plain = identity(load_recipe("unetres-generator", ["turn=false", "relight=0", "distillation.matching_distance=0"]))
    assert not {"turn", "relight"} & set(plain) and "matching_distance" not in plain["distillation"]
    assert "flip" in plain and "weight" in plain["distillation"]
    changes = ["turn=true", "relight=0.3", "distillation.matching_distance=0.1"]
    changed = identity(load_recipe("unetres-generator", changes))
    assert (changed["turn"], changed["relight"], changed["distillation"]["matching_distance"]) == (True, 0.3, 0.1)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixture(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    return f"mixture={path}"


def test_supirs_mixture_has_the_papers_sizes_and_negative_prompts() -> None:
    """SUPIR section 4.1: 20 million photographs, 70 thousand faces, 100 thousand negatives and their prompts."""
    recipe = load_recipe("instantir-dcp", ["mixture=supir"])
    assert recipe.sources == {"supir-20m": 20e6 + 70e3, "supir-negatives": 100e3}
    assert recipe.captioners == {"supir-negatives": "negative"} and recipe.captioner == "manifest"
    assert load_mixture("supir")["sources"] == recipe.sources


@pytest.mark.parametrize("name", recipe_names(MIXTURES))
def test_every_mixture_fits_every_system(name: str) -> None:
    for recipe in ("instantir-dcp-nano", "prior-denoiser-nano"):
        assert load_recipe(recipe, [f"mixture={name}"]).sources == load_mixture(name)["sources"]


def test_a_mixture_replaces_the_recipes_sources_and_overrides_win(tmp_path: Path) -> None:
    override = mixture(tmp_path, "sources: {a: 3, b: 1}\ncaptioners: {b: tags}\n")
    recipe = load_recipe("instantir-dcp-nano", [override, "sources.b=2", "sources.c=1", "captioners.a=negative"])
    assert recipe.sources == {"a": 3, "b": 2, "c": 1}
    assert recipe.captioners == {"a": "negative", "b": "tags"} and recipe.captioner == "tags"
    assert load_recipe("instantir-dcp-nano", [override, "sources.b=0"]).sources == {"a": 3}


def test_a_recipes_sources_replace_the_default(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("system: prior\nstage: denoiser\nsteps: 1\nbatch_size: 1\nsources: {photographs: 1.0}\n")
    assert load_recipe(path).sources == {"photographs": 1.0}
    path.write_text("system: prior\nstage: denoiser\nsteps: 1\nbatch_size: 1\n")
    assert load_recipe(path).sources == {"corpus": 1.0}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("sources: {a: 1}\nweights: {}\n", [], "'weights' is neither"),
        ("captioners: {}\n", [], "there are no sources"),
        ("sources: {a: 1}\ncaptioners: {b: tags}\n", [], "captioners names 'b'"),
        ("sources: {a: 1}\ncaptioners: {a: tag}\n", [], 'Did you mean "tags"'),
        ("sources: {a: -1}\n", [], "at least 0"),
        ("sources: {a: 1}\n", ["sources.a=0"], "one weight above 0"),
    ],
)
def test_a_wrong_mixture_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("instantir-dcp-nano", [mixture(tmp_path, text), *overrides])


def test_the_error_for_an_unknown_mixture_suggests_one() -> None:
    with pytest.raises(RecipeError, match='Did you mean "supir"'):
        load_recipe("instantir-dcp-nano", ["mixture=suppir"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_stage_has_a_builder_and_a_place_in_the_graph(name: str) -> None:
    system = SYSTEMS[name]
    names = [stage.name for stage in system.stages]
    assert list(system.networks().objectives) == names and len(set(names)) == len(names)
    for number, stage in enumerate(system.stages):
        assert stage.follows in ["", *names[:number]] and set(stage.continues) <= set(names)
        assert set(stage.keys) <= {field.name for field in dataclasses.fields(system.recipe)}
    assert (system.check_options is None) == (system.networks().build_restorer is None)


def test_a_key_that_the_stage_does_not_read_is_refused() -> None:
    with pytest.raises(RecipeError, match="lora_rank is for stage previewer, not dcp"):
        load_recipe("instantir-dcp-nano", ["lora_rank=8"])
    with pytest.raises(RecipeError, match="noise_offset is for stage dcp and aggregator, not previewer"):
        load_recipe("instantir-previewer-nano", ["noise_offset=0.1"])


def test_every_paper_recipe_of_instarevive_asks_for_lpips_and_nano_ones_say_that_they_do_without() -> None:
    """Appendix: LPIPS is the regression. Day to night has no regression (its inputs show other places)."""
    tasks = ("bsr", "bsr-released", "bfr", "saltpepper", "derain", "lowlight", "inpaint", "cartoon", "identity")
    for task in tasks:
        settings = load_recipe(f"instarevive-{task}").distillation  # type: ignore[attr-defined]
        assert (settings.regression, settings.lpips) == ("perceptual", "lpips-vgg"), task
    for task in ("daynight", "bsr-nano", "inpaint-nano", "pairs-nano", "unpaired-nano"):
        recipe = load_recipe(f"instarevive-{task}")
        assert not recipe.loss_weights and recipe.distillation.regression in ("none", "both"), task  # type: ignore[attr-defined]
