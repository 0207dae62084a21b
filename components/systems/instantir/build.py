"""Builders of InstantIR: the objective of a training stage from a recipe, and a restorer from a model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from components.models import Model, ModelError
from components.priors.files import Precision
from components.priors.opening import open_recorded_prior
from components.priors.sdxl import Prior
from components.randomness import seeded_init
from components.systems.instantir.checkpointing import checkpoint_gradients
from components.systems.instantir.fast import Speed
from components.systems.instantir.network import PARTS, InstantIR
from components.systems.instantir.objectives import (
    AggregatorObjective,
    PerceptorObjective,
    PreviewerObjective,
)
from components.systems.instantir.options import restore_defaults
from components.systems.instantir.recipe import STAGES, WEIGHTING, InstantIRRecipe
from components.systems.instantir.restorer import InstantIRRestorer
from components.systems.system import stage_of


def perceptor_objective(
    recipe: InstantIRRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> PerceptorObjective:
    """The objective of stage dcp, which trains the perceptor (the paper's degradation content perceptor).

    Args:
        recipe: resolved recipe.
        parents: empty, or one model whose perceptor continues training. The parent's previewer and aggregator are
            dropped: they fit only the perceptor that they were trained with.
        examples: unused; builders of other systems take example pictures.
        device: device of the networks.

    Raises:
        ModelError: the prior cannot be opened, or the parent's sizes differ from the recipe's.
    """
    network = _stage_networks(recipe, parents, device).network
    return PerceptorObjective(network, **_dropout(recipe), **_weighting(recipe))


def previewer_objective(
    recipe: InstantIRRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> PreviewerObjective:
    """The objective of stage previewer; arguments and errors as for perceptor_objective.

    `parents` holds the model of stage dcp, or a model that already has a previewer.
    """
    guidance_range = recipe.teacher_cfg_scale
    return PreviewerObjective(
        _stage_networks(recipe, parents, device).network,
        num_ddim_timesteps=recipe.teacher_timesteps,
        huber_c=recipe.huber_c if recipe.distance == "huber" else None,
        guidance_range=(guidance_range[0], guidance_range[1]) if guidance_range else None,
        **_dropout(recipe),
    )


def aggregator_objective(
    recipe: InstantIRRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> AggregatorObjective:
    """The objective of stage aggregator; arguments and errors as for perceptor_objective.

    `parents` holds the model of stage previewer, or a model that already has an aggregator.
    """
    stage = _stage_networks(recipe, parents, device)
    return AggregatorObjective(
        stage.network,
        reference=recipe.reference,
        reference_noise=recipe.reference_noise,
        preview_cfg_scale=recipe.preview_cfg_scale,
        speed=stage.speed,
        parent_parts=stage.parent_parts,
        **_dropout(recipe),
        **_weighting(recipe),
    )


@dataclass(frozen=True, kw_only=True)
class _StageNetworks:
    """What a stage trains with.

    Attributes:
        network: the stage's networks.
        speed: settings of the fast path; None if the recipe sets none.
        parent_parts: the parent's parts in fp32, by name, if the frozen networks have a lower precision; else empty.
    """

    network: InstantIR
    speed: Speed | None
    parent_parts: Mapping[str, Mapping[str, Tensor]]


def _stage_networks(recipe: InstantIRRecipe, parents: Mapping[str, Model], device: str) -> _StageNetworks:
    """Build the networks of a stage from the recipe, its prior and the parent model (the first of `parents`)."""
    parent = next(iter(parents.values()), None)
    prior = open_recorded_prior(recipe.prior, parent.info["prior"] if parent else None, device)
    resampler = {
        "dim": recipe.resampler_dim,
        "depth": recipe.resampler_depth,
        "dim_head": recipe.resampler_head_dim,
        "heads": recipe.resampler_heads,
        "num_queries": recipe.resampler_queries,
    }
    with seeded_init(recipe.seed, "instantir"):
        if parent is None:
            network = InstantIR(prior, resampler, seed=recipe.seed, time_modulation=recipe.time_modulation)
        else:
            network = network_of(parent, prior, only_perceptor=recipe.stage == "dcp")
            _check_settings(recipe, network, resampler, parent)
        _check_parts(recipe.stage, network, parent)
        if recipe.stage == "previewer" and not network.has_previewer:
            network.add_previewer({"rank": recipe.lora_rank, "alpha": recipe.lora_alpha}, seed=recipe.seed)
        if recipe.stage == "aggregator" and network.aggregator is None:
            network.add_aggregator(seed=recipe.seed)
    if recipe.perceptor_scale is not None:
        network.perceptor_scale = recipe.perceptor_scale
    prior.view = replace(prior.view, fit="squash" if recipe.view == "whole" else "crop")
    parent_parts: dict[str, dict[str, Tensor]] = {}
    if recipe.frozen_precision != "fp32" and parent is not None:
        parent_parts = {name: parent.part(name) for name in ("perceptor", "previewer")}
        prior.in_precision(recipe.frozen_precision)
    network.to(device)
    if recipe.compile != "off" or recipe.frozen_precision != "fp32":
        speed = Speed(compile=recipe.compile, checkpoint=recipe.gradient_checkpointing)
        return _StageNetworks(network=network, speed=speed, parent_parts=parent_parts)
    checkpoint_gradients(network, recipe.gradient_checkpointing)
    return _StageNetworks(network=network, speed=None, parent_parts=parent_parts)


def _dropout(recipe: InstantIRRecipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in ("image_dropout", "text_dropout", "both_dropout")}


def _weighting(recipe: InstantIRRecipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in WEIGHTING}


def _check_parts(stage: str, network: InstantIR, parent: Model | None) -> None:
    """Raise ModelError if the stage's parent model is missing or lacks a part that the stage needs."""
    parent_stage = stage_of(STAGES, stage).follows
    if parent_stage and parent is None:
        raise ModelError(f"stage {stage} needs the model folder of stage {parent_stage}")
    if stage == "aggregator" and not network.has_previewer:
        raise ModelError(f"{parent.path if parent else ''} has no previewer; stage aggregator follows stage previewer")


def _check_settings(recipe: InstantIRRecipe, network: InstantIR, resampler: Mapping[str, int], parent: Model) -> None:
    """Raise ModelError if a part that continues training has other settings in the parent than in the recipe."""
    model_settings, recipe_settings = network.config(), dict[str, Any]()
    if recipe.stage == "dcp":
        recipe_settings = {"resampler": resampler, "time_modulation": recipe.time_modulation}
    elif recipe.stage == "previewer" and network.has_previewer:
        recipe_settings = {"lora": {"rank": recipe.lora_rank, "alpha": recipe.lora_alpha}}
    differences = []
    for name, setting in recipe_settings.items():
        expected = setting if isinstance(setting, Mapping) else {"": setting}
        actual = model_settings[name] if isinstance(setting, Mapping) else {"": model_settings[name]}
        differences += [
            f"{name}_{key}".rstrip("_") + f" is {actual[key]}, not {value}"
            for key, value in expected.items()
            if actual[key] != value
        ]
    if differences:
        raise ModelError(
            f"{parent.path}: stage {recipe.stage} cannot continue from this model, because its settings differ from "
            f"the recipe's: {'; '.join(differences)}"
        )


def network_of(model: Model, prior: Prior, only_perceptor: bool = False) -> InstantIR:
    """Build the networks of a model folder with their prior: all parts, or only the perceptor.

    Raises:
        ModelError: the prior's image encoder makes tokens of another width than the perceptor takes.
    """
    token_dim = int(model.info["config"]["resampler"]["embedding_dim"])
    if token_dim != prior.image_token_dim:
        raise ModelError(
            f"{model.path}: its perceptor was trained on image tokens of width {token_dim}, but the image encoder "
            f"{prior.image_encoder_name or prior.name} makes tokens of width {prior.image_token_dim}: "
            "open the prior with the image encoder of the training"
        )
    if only_perceptor:
        config = {**model.info["config"], "lora": None, "aggregator": False}
        return InstantIR.from_parts(prior, config, {"perceptor": model.part("perceptor")})
    return InstantIR.from_parts(prior, model.info["config"], model.parts())


def build_restorer(
    model: Model,
    device: str = "cpu",
    batch_size: int = 1,
    precision: Precision = "fp32",
    speed: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> InstantIRRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder with perceptor, previewer and aggregator.
        device: device of the networks.
        batch_size: see InstantIRRestorer.
        precision: precision of the networks' weights; latents, noise and the sampler's arithmetic stay in float32.
        speed: settings of fast.Speed by name.
        defaults: default options that replace those of the model's recipe.

    Raises:
        ModelError: a part is missing, or the prior cannot be opened.
        ValueError: `speed` has an unknown name or a wrong value.
    """
    missing = [part for part in PARTS if part not in model.info["parts"]]
    if missing:  # checked before gigabytes are loaded
        raise ModelError(f"{model.path}: restoring needs {' and '.join(missing)} too, which the model does not have")
    speed_settings = Speed.of(speed or {})
    # All parts are built on the CPU in the given precision, and then move to the device together.
    prior = open_recorded_prior(str(model.info["prior"]["id"]), model.info["prior"], "cpu", precision)
    network = network_of(model, prior)
    network.to(device)
    return InstantIRRestorer(
        network, {**restore_defaults(model.info["recipe"]), **defaults}, batch_size, speed_settings
    )
