"""Builders of SUPIR: the objective of a training stage from a recipe, a restorer from a model folder, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from components.models import Model, ModelError
from components.objectives.robust_encoding import RobustEncoderObjective, measure_encoder
from components.options import restore_defaults
from components.priors.block_calls import recompute
from components.priors.fast_unet import Speed
from components.priors.files import Precision
from components.priors.opening import open_recorded_prior
from components.priors.robust_encoder import RobustEncoder, first_restoration
from components.priors.sdxl import Prior
from components.recipes import as_dict
from components.systems.supir.config import AdaptorConfig, adaptor_config
from components.systems.supir.network import ADAPTOR, ENCODER, Adaptor, Supir
from components.systems.supir.objectives import AdaptorObjective
from components.systems.supir.recipe import SupirRecipe
from components.systems.supir.restorer import SupirRestorer
from components.tensors import images_to_tensor, tensor_to_images
from components.training import preserve_requires_grad
from components.types import Batch, Request
from components.weight_storage import store_in_8_bits

SupirObjective = RobustEncoderObjective | AdaptorObjective


def encoder_objective(
    recipe: SupirRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> RobustEncoderObjective:
    """The objective of stage encoder.

    Args:
        recipe: resolved recipe.
        parents: empty, or one model whose encoder continues training. Its adaptor is dropped: it fits only the encoder
            that it was trained with.
        examples: unused; builders of other systems take example pictures.
        device: device of the networks.

    Raises:
        ModelError: the prior cannot be opened, or the parent does not fit it.
    """
    parent, prior = _parent_and_prior(recipe, parents, device)
    encoder = RobustEncoder(prior.autoencoder)
    if parent is not None:
        encoder = network_of(parent, prior, parts=(ENCODER,)).encoder
    config = {ADAPTOR: None}
    return RobustEncoderObjective(encoder.to(device), recipe.anchor, recipe.keep, config, prior, recipe.loss)


def adaptor_objective(
    recipe: SupirRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> AdaptorObjective:
    """The objective of stage adaptor, on the model of stage encoder or a whole one; see encoder_objective.

    Raises:
        ModelError: there is no parent, or its adaptor has other sizes than the recipe's.
    """
    parent, prior = _parent_and_prior(recipe, parents, device)
    if parent is None:
        raise ModelError("stage adaptor needs the model folder of stage encoder")
    network, config = network_of(parent, prior), adaptor_config(recipe.adaptor)
    if network.adaptor is None:
        try:
            network.adaptor = Adaptor(prior.unet, config, recipe.seed)
        except ValueError as error:
            raise ModelError(f"prior {prior.name!r} takes no such adaptor: {error}") from error
    elif recipe.adaptor and not _same(network.adaptor.config, config, prior):
        raise ModelError(
            f"{parent.path}: its adaptor has {network.adaptor.config.to_dict()}, not {config.to_dict()}: leave the "
            "recipe's adaptor out"
        )
    prior.in_precision(recipe.frozen_precision)  # after the copies, which train in fp32
    if recipe.gradient_checkpointing:
        network.blocks = network.blocks.wrap_all(recompute)
    network.to(device)
    return AdaptorObjective(
        network,
        text_dropout=recipe.text_dropout,
        max_clean_weight=recipe.max_clean_weight,
        noise_offset=recipe.noise_offset,
        timestep_importance=recipe.timestep_importance,
    )


def _parent_and_prior(recipe: SupirRecipe, parents: Mapping[str, Model], device: str) -> tuple[Model | None, Prior]:
    parent = next(iter(parents.values()), None)
    record = parent.info["prior"] if parent is not None else None
    return parent, open_recorded_prior(recipe.prior, record, device, image_encoder="")


def _same(one: AdaptorConfig, other: AdaptorConfig, prior: Prior) -> bool:
    """Whether two adaptors have the same sizes; no depths are the prior's own."""
    depths = tuple(prior.unet.config["transformer_layers_per_block"])
    one, other = (replace(each, transformer_depth=each.transformer_depth or depths) for each in (one, other))
    return one == other


def network_of(model: Model, prior: Prior, parts: Sequence[str] = (ENCODER, ADAPTOR)) -> Supir:
    """The networks of a model folder, or only some of its parts.

    Raises:
        ModelError: the weights do not fit the prior.
    """
    config = dict(model.info["config"])
    if ADAPTOR not in parts:
        config[ADAPTOR] = None
    names = [name for name in model.info["parts"] if name in parts]
    try:
        return Supir.from_parts(prior, config, {name: model.part(name) for name in names})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: {error}") from error


def build_restorer(
    model: Model,
    device: str = "cpu",
    batch_size: int = 1,
    precision: Precision = "fp32",
    speed: Mapping[str, Any] | None = None,
    offload: bool = False,
    **defaults: Any,
) -> SupirRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder with encoder and adaptor.
        device: device of the networks.
        batch_size: see SupirRestorer.
        precision: precision of the networks' weights; latents, noise and the sampler's arithmetic stay in float32.
            "fp8" stores the weights of UNet, adaptor and text encoders in 8 bits and computes in bf16.
        speed: settings of fast_unet.Speed by name.
        offload: the networks are on the device in turns, see SupirRestorer.
        defaults: default options that replace those of the model's recipe.

    Raises:
        ModelError: a part is missing, or the prior cannot be opened.
        ValueError: `speed` has an unknown name or a wrong value.
    """
    plain = {"join": False} if offload or precision == "fp8" else {}  # joined weights are wide copies
    settings = Speed.of({**plain, **({"graphs": "off"} if offload else {}), **(speed or {})})
    missing = [part for part in (ENCODER, ADAPTOR) if part not in model.info["parts"]]
    if missing:  # checked before gigabytes are loaded
        raise ModelError(f"{model.path}: restoring needs {' and '.join(missing)} too, which the model does not have")
    record = model.info["prior"]
    # all parts are built on the CPU in the given precision, and then move to the device together
    prior = open_recorded_prior(str(record["id"]), record, "cpu", precision, image_encoder="")
    network = network_of(model, prior)
    if precision == "fp8":
        assert network.adaptor is not None, "checked above"
        store_in_8_bits([prior.unet, *prior.text_encoders, network.adaptor])
    if not offload:
        network.to(device)
    options = {**restore_defaults(model.info["recipe"] or {}), **defaults}
    return SupirRestorer(network, options, batch_size, settings, device, offload)


def look(objective: SupirObjective, recipe: SupirRecipe, lq: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Sample pictures during training: D(E_dr(lq)), or with an adaptor the whole restoration; LQ's shape and range."""
    if isinstance(objective, RobustEncoderObjective):
        return first_restoration(objective.encoder, lq)
    with torch.no_grad(), preserve_requires_grad(objective.trainables.values()):
        # these weights still train: nothing is derived from them, and their memory layout does not change
        plain = Speed(join=False, channels_last="off")
        restorer = SupirRestorer(objective.network, restore_defaults(as_dict(recipe)), speed=plain)
        requests = [
            Request(key=f"sample {i}", image=image, seed=seed + i, prompt=prompt)
            for i, (image, prompt) in enumerate(zip(tensor_to_images(lq), prompts, strict=True))
        ]
        return images_to_tensor([answer.image for answer in restorer.restore(requests)])


def measure(objective: SupirObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Numbers for the model card: see measure_encoder; none for an adaptor."""
    return measure_encoder(objective.encoder, heldout) if isinstance(objective, RobustEncoderObjective) else {}
