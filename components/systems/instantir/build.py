"""Builders: from a recipe to a stage's objective, from a model folder to a restorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from components.models import Model, ModelError, resolve_model
from components.priors.hub import Precision
from components.priors.sdxl import Prior, load_prior
from components.priors.sdxl_config import DINOV2
from components.randomness import seeded_init
from components.systems.instantir.checkpointing import checkpoint_gradients
from components.systems.instantir.fast import Speed
from components.systems.instantir.network import PARTS, InstantIR
from components.systems.instantir.objectives import (
    AggregatorObjective,
    PerceptorObjective,
    PreviewerObjective,
    StageObjective,
)
from components.systems.instantir.options import restore_defaults
from components.systems.instantir.recipe import InstantIRRecipe
from components.systems.instantir.restorer import InstantIRRestorer


def open_prior(
    recipe_prior: str, recorded: Mapping[str, str] | None, device: str, precision: Precision = "fp32"
) -> Prior:
    """The prior that a model or recipe names; refuses another one than the parents were trained on.

    Args:
        recipe_prior: see load_prior.
        recorded: what model.json says of it: id, digest ("" where it is not of ours), image_encoder.
        device: where it goes.
        precision: of its weights.

    Raises:
        ModelError: no such prior, or its digest is not the recorded one.
    """
    wanted = (recorded or {}).get("digest", "")
    encoder = (recorded or {}).get("image_encoder") or DINOV2
    try:
        # with a digest: never a hub
        prior = load_prior(resolve_model(recipe_prior) if wanted else recipe_prior, device, encoder, precision)
    except ModelError as error:
        if not wanted:
            raise
        raise ModelError(
            f"the model was trained on prior {recipe_prior!r} with digest {wanted[:12]}: bring it back there ({error})"
        ) from error
    if wanted and prior.digest and wanted != prior.digest:
        raise ModelError(
            f"prior {recipe_prior!r} has digest {prior.digest[:12]}, but the model was trained on {wanted[:12]}: "
            "bring that prior back, or train the model again"
        )
    return prior


def build_objective(
    recipe: InstantIRRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> StageObjective:
    """The objective of a stage.

    Args:
        recipe: resolved recipe.
        parents: the model folder to go on from, under any name: none for dcp, dcp's for previewer, previewer's for
            aggregator; or a model that has the stage's own part already, which is trained on. The perceptor's own
            training leaves out previewer and aggregator: they go with the perceptor that they were trained with.
        examples: unused; other systems look at pictures while they are built.
        device: where the networks go.

    Raises:
        ModelError: the parent is missing or of another stage, or its sizes are not the recipe's.
    """
    parent = next(iter(parents.values()), None)
    prior = open_prior(recipe.prior, parent.info["prior"] if parent else None, device)
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
    inherited: dict[str, Any] = {}
    if recipe.frozen_precision != "fp32" and parent is not None:
        inherited = {name: parent.part(name) for name in ("perceptor", "previewer")}
        prior.in_precision(recipe.frozen_precision)
    network.to(device)
    speed = Speed(compile=recipe.compile, checkpoint=recipe.gradient_checkpointing)
    fast = recipe.compile != "off" or recipe.frozen_precision != "fp32"
    if not fast:
        checkpoint_gradients(network, recipe.gradient_checkpointing)
    dropout: dict[str, Any] = {
        "image_dropout": recipe.image_dropout,
        "text_dropout": recipe.text_dropout,
        "both_dropout": recipe.both_dropout,
    }
    weighting: dict[str, Any] = {
        "max_clean_weight": recipe.max_clean_weight,
        "noise_offset": recipe.noise_offset,
        "timestep_importance": recipe.timestep_importance,
    }
    objective: StageObjective
    if recipe.stage == "dcp":
        objective = PerceptorObjective(network, **dropout, **weighting)
    elif recipe.stage == "previewer":
        low_high = recipe.teacher_cfg_scale
        objective = PreviewerObjective(
            network,
            num_ddim_timesteps=recipe.teacher_timesteps,
            huber_c=recipe.huber_c if recipe.distance == "huber" else None,
            guidance_range=(low_high[0], low_high[1]) if low_high else None,
            **dropout,
        )
    else:
        objective = AggregatorObjective(
            network,
            reference=recipe.reference,
            reference_noise=recipe.reference_noise,
            preview_cfg_scale=recipe.preview_cfg_scale,
            speed=speed if fast else None,
            inherited=inherited,
            **dropout,
            **weighting,
        )
    return objective


def _check_parts(stage: str, network: InstantIR, parent: Model | None) -> None:
    needs = {"dcp": "", "previewer": "dcp", "aggregator": "previewer"}
    if stage not in needs:
        raise ValueError(f"no stage {stage!r}; there are {sorted(needs)}")
    if needs[stage] and parent is None:
        raise ModelError(f"stage {stage} needs the model folder of stage {needs[stage]}")
    if stage == "aggregator" and not network.has_previewer:
        raise ModelError(f"{parent.path if parent else ''}: has no previewer; stage aggregator follows stage previewer")


def _check_settings(recipe: InstantIRRecipe, network: InstantIR, resampler: Mapping[str, int], parent: Model) -> None:
    """Raises ModelError where a part that is trained on has other settings than the recipe says."""
    has, wants = network.config(), dict[str, Any]()
    if recipe.stage == "dcp":
        wants = {"resampler": resampler, "time_modulation": recipe.time_modulation}
    elif recipe.stage == "previewer" and network.has_previewer:
        wants = {"lora": {"rank": recipe.lora_rank, "alpha": recipe.lora_alpha}}
    faults = []
    for name, wanted in wants.items():
        pairs = wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]
        there = has[name] if isinstance(wanted, Mapping) else {"": has[name]}
        faults += [f"{name}_{key}".rstrip("_") + f" is {there[key]}, not {v}" for key, v in pairs if there[key] != v]
    if faults:
        raise ModelError(
            f"{parent.path}: what stage {recipe.stage} would train on has other sizes: {'; '.join(faults)}"
        )


def network_of(model: Model, prior: Prior, only_perceptor: bool = False) -> InstantIR:
    """The networks of a model folder on its prior; only the perceptor where nothing else is wanted."""
    tokens = int(model.info["config"]["resampler"]["embedding_dim"])
    if tokens != prior.image_token_dim:
        raise ModelError(
            f"{model.path}: its perceptor was trained on picture tokens of {tokens}, but the picture encoder "
            f"{prior.image_encoder_name or prior.name} makes tokens of {prior.image_token_dim}: another DINOv2?"
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
        device: where the networks go.
        batch_size: see InstantIRRestorer.
        precision: of the networks' weights; latents, noise and the sampler's arithmetic stay in float32.
        speed: settings of fast.Speed by name.
        defaults: options that replace the recipe's.

    Raises:
        ModelError: a part is missing, or the prior cannot be opened.
        ValueError: an unknown or wrong setting of speed.
    """
    lacking = [part for part in PARTS if part not in model.info["parts"]]
    if lacking:  # before gigabytes are read
        raise ModelError(f"{model.path}: restoring needs {' and '.join(lacking)} too, which the model does not have")
    wanted = Speed.of(speed or {})
    # on the CPU first: the parts are made there, in the wanted precision, and go to the device together
    prior = open_prior(str(model.info["prior"]["id"]), model.info["prior"], "cpu", precision)
    network = network_of(model, prior)
    network.to(device)
    return InstantIRRestorer(network, {**restore_defaults(model.info["recipe"]), **defaults}, batch_size, wanted)
