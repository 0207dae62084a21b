"""Builders of DRA: the objective of its stage from a recipe, a restorer from a model folder, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from components.models import Model, ModelError, load_model, load_strictly
from components.priors.block_calls import recompute
from components.priors.families.opening import open_family_prior
from components.priors.families.record import FamilyPrior
from components.priors.fast_unet import Speed
from components.priors.files import Precision
from components.priors.resident import ResidentNetwork, Updates
from components.priors.robust_encoder import RobustEncoder
from components.recipes import as_dict
from components.systems.dra.bundle import ADAPTERS, ENCODER, LORA, Bundle
from components.systems.dra.config import Shape, adapter_config, lora_config
from components.systems.dra.objectives import AdaptersObjective, FlowAdaptersObjective, VariantsObjective
from components.systems.dra.options import restore_defaults
from components.systems.dra.recipe import DraRecipe
from components.systems.dra.restorer import DraRestorer, Shared
from components.systems.dra.shapes import bundle_of, family_name
from components.systems.dra.steps import text_encoders_of
from components.tensors import images_to_tensor, tensor_to_images
from components.training import preserve_requires_grad
from components.types import Request
from components.weight_storage import store_in_8_bits


def adapters_objective(
    recipe: DraRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> VariantsObjective[Any]:
    """The objective of stage adapters, by the shape of the recipe's family.

    Args:
        recipe: resolved recipe.
        parents: empty, or one model whose adapters continue training.
        examples: unused; builders of other systems take example pictures.
        device: device of the networks.

    Raises:
        ModelError: the prior or the robust encoder cannot be opened, they do not fit, or the recipe wants other sizes
            than the parent has.
    """
    parent = next(iter(parents.values()), None)
    record = parent.info["prior"] if parent is not None else None
    if parent is not None and (own := family_name(parent.info["config"])) != recipe.family:
        raise ModelError(f"{parent.path}: its prior is of the family {own}, not {recipe.family}")
    prior: Any = open_family_prior(recipe.family, recipe.prior, record, recipe.frozen_precision)
    if parent is not None:
        network = network_of(parent, prior)
        _check_same(recipe, network, parent)
    else:
        encoder = open_encoder(recipe.encoder, prior) if recipe.encoder else None
        try:
            adapters, lora = adapter_config(recipe.adapters), lora_config(recipe.lora)
            network = bundle_of(recipe.family)(prior, adapters, lora, encoder, recipe.seed, recipe.family)
        except ValueError as error:
            raise ModelError(f"prior {prior.name!r} takes no such adapters: {error}") from error
    if recipe.gradient_checkpointing:
        network.blocks = network.blocks.wrap_all(recompute)
    network.to(device)
    return _OBJECTIVES[network.shape](network, recipe)


def _on_maps(network: Any, recipe: DraRecipe) -> AdaptersObjective:
    return AdaptersObjective(
        network,
        null_share=recipe.null_share,
        lq_share=recipe.lq_share,
        max_clean_weight=recipe.max_clean_weight,
        noise_offset=recipe.noise_offset,
        timestep_importance=recipe.timestep_importance,
    )


def _on_tokens(network: Any, recipe: DraRecipe) -> FlowAdaptersObjective:
    return FlowAdaptersObjective(
        network,
        null_share=recipe.null_share,
        lq_share=recipe.lq_share,
        time_mean=recipe.time_mean,
        time_deviation=recipe.time_deviation,
        time_shift=recipe.time_shift,
    )


_OBJECTIVES: Mapping[Shape, Callable[[Any, DraRecipe], VariantsObjective[Any]]] = {
    "maps": _on_maps,
    "tokens": _on_tokens,
}


def open_encoder(name: str, prior: FamilyPrior) -> RobustEncoder:
    """The robust encoder of a model folder that has one, of any system, for this prior.

    Raises:
        ModelError: there is no such model, it has no robust encoder, or the encoder belongs to another prior.
    """
    model = load_model(name)
    if ENCODER not in model.info["parts"]:
        raise ModelError(f"{model.path}: has no robust encoder; its parts are {sorted(model.info['parts'])}")
    record = model.info["prior"] or {}
    if record.get("digest") and prior.digest and record["digest"] != prior.digest:
        raise ModelError(f"{model.path}: its encoder belongs to prior {record['id']!r}, not to {prior.name!r}")
    encoder = RobustEncoder(prior.autoencoder)
    load_strictly(encoder, model.part(ENCODER), f"{model.path}: part {ENCODER}")
    return encoder


def _check_same(recipe: DraRecipe, network: Bundle[Any, Any], parent: Model) -> None:
    """Raises ModelError if the recipe names other sizes than the parent's, or another encoder."""
    asked = {ADAPTERS: adapter_config(recipe.adapters).to_dict(), LORA: lora_config(recipe.lora).to_dict()}
    for name, values in ((ADAPTERS, recipe.adapters), (LORA, recipe.lora)):
        own = network.config()[name]
        if values and own != asked[name]:
            raise ModelError(f"{parent.path}: its {name} have {own}, not {asked[name]}: leave the recipe's {name} out")
    if recipe.encoder:
        raise ModelError(f"{parent.path}: adapters fit only the encoder that they were trained with: leave encoder out")


def network_of(model: Model, prior: FamilyPrior) -> Bundle[Any, Any]:
    """The networks of a model folder.

    Raises:
        ModelError: the weights do not fit the prior.
    """
    try:
        config = model.info["config"]
        return bundle_of(family_name(config)).from_parts(prior, config, model.parts())
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: {error}") from error


def build_restorer(model: Model, **options: Any) -> DraRestorer:
    """The restorer of a model folder; arguments and errors as in build_restorers."""
    return build_restorers([model], **options)[0]


def build_restorers(
    models: Sequence[Model],
    device: str = "cpu",
    batch_size: int = 1,
    precision: Precision = "fp32",
    speed: Mapping[str, Any] | None = None,
    offload: bool = False,
    **defaults: Any,
) -> list[DraRestorer]:
    """The restorers of model folders on one prior, whose weights are in memory once. LoRAs are merged into them.

    Several models take turns, see ResidentNetwork; each gives the bits that it gives alone.

    Args:
        models: trained model folders on the same prior.
        device: device of the networks.
        batch_size: see DraRestorer.
        precision: precision of the networks' weights; latents, noise and the sampler's arithmetic stay in float32.
            "fp8" stores the weights of denoiser, adapters and text encoders in 8 bits and computes in bf16.
        speed: settings of fast_unet.Speed by name.
        offload: the networks are on the device in turns, see DraRestorer.
        defaults: default options that replace those of the models' recipes.

    Raises:
        ModelError: the prior cannot be opened, or weights do not fit it.
        ValueError: `speed` has an unknown name or a wrong value.
    """
    plain = {"join": False} if offload or precision == "fp8" else {}  # joined weights are wide copies
    settings = Speed.of({**plain, **({"graphs": "off"} if offload else {}), **(speed or {})})
    record = models[0].info["prior"]
    # all parts are built on the CPU in the given precision, and then move to the device together
    prior: Any = open_family_prior(family_name(models[0].info["config"]), str(record["id"]), record, precision)
    resident, networks, updates = ResidentNetwork(prior.network), list[Bundle[Any, Any]](), list[Updates]()
    for model in models:
        network = network_of(model, prior)
        network.adapters.to(network.dtype)
        if len(models) == 1:
            network.merge_lora()
        else:
            updates.append(resident.take(LORA))
            network.lora = {}
        networks.append(network)
    if precision == "fp8":
        texts = [encoder for encoder in text_encoders_of(networks[0]) if not getattr(encoder, "is_quantized", False)]
        store_in_8_bits([prior.network, *texts, *(network.adapters for network in networks)])
    restorers: list[DraRestorer] = []
    for number, (model, network) in enumerate(zip(models, networks, strict=True)):
        if not offload:
            network.to(device)
        options = {**restore_defaults(model.info["recipe"] or {}), **defaults}
        shared: Shared | None = None
        if updates:
            like = next((each for each in restorers if each.steps.fast is not None), None)
            shared = Shared(resident=resident, updates=updates[number], like=like)
        restorers.append(DraRestorer(network, options, batch_size, settings, device, offload, shared))
    return restorers


def prior_of(model: Model) -> tuple[str, str]:
    """What models that share a prior have in common, and its name for people."""
    record, family = model.info["prior"] or {}, family_name(model.info["config"])
    return f"{family} {record.get('digest') or record.get('id')}", f"{record.get('id')} (family {family})"


def look(objective: VariantsObjective[Any], recipe: DraRecipe, lq: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Sample pictures during training: the whole restoration; LQ's shape and range."""
    with torch.no_grad(), preserve_requires_grad(objective.trainables.values()):
        # these weights still train: nothing is derived from them, and their memory layout does not change
        plain = Speed(join=False, channels_last="off")
        restorer = DraRestorer(objective.network, restore_defaults(as_dict(recipe)), speed=plain)
        requests = [
            Request(key=f"sample {i}", image=image, seed=seed + i, prompt=prompt)
            for i, (image, prompt) in enumerate(zip(tensor_to_images(lq), prompts, strict=True))
        ]
        return images_to_tensor([answer.image for answer in restorer.restore(requests)])
