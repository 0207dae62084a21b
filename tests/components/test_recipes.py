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
