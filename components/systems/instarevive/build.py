"""Builds the generator and the restorer of a model folder, and the parts of a folder from a generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from components.models import Model, ModelError, load_model, load_strictly
from components.options import restore_defaults
from components.priors.families import FAMILIES
from components.priors.files import DTYPES, Precision
from components.samplers.schedules import schedule_from
from components.systems.instarevive.backbone import Backbone, network_like, open_backbone
from components.systems.instarevive.fast import Speed
from components.systems.instarevive.network import EpsPredictor, OneStep, OneStepGenerator
from components.systems.instarevive.restorer import Coarse, InstaReviveRestorer
from components.systems.swinir.weights import network_of as swinir_of

REQUIRED_KEYS = ("family", "network", "schedule", "prediction", "one_step")
"""Keys that model.json's config must have."""

COARSE_SYSTEMS = ("swinir", "regressor")
"""Systems whose models can be the coarse restorer."""


def generator_config(
    backbone: Backbone, generator: OneStepGenerator, coarse: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The config of a generator for model.json.

    Args:
        coarse: the coarse restorer in front of it in training: {"id": name or folder, "digest": of its model folder}.
    """
    return {
        **backbone.config(),
        "mask_as_bias": generator.predictor.mask_as_bias,
        "one_step": asdict(generator.settings),
        "coarse": dict(coarse) if coarse else None,
    }


def generator_parts(generator: OneStepGenerator) -> dict[str, dict[str, Tensor]]:
    """Parts of a model folder: the network under the released keys, and the aligning convolution, if any."""
    parts = {"generator": dict(generator.predictor.network.state_dict())}
    if generator.align is not None:
        parts["align"] = dict(generator.align.state_dict())
    return parts


def load_generator(model: Model, precision: Precision = "fp32") -> OneStepGenerator:
    """The generator of a model folder, on the CPU, frozen.

    Raises:
        ModelError: the folder is incomplete, or keys or shapes do not fit its config; the message names all of them.
    """
    config = model.info["config"]
    missing_keys = [name for name in REQUIRED_KEYS if name not in config]
    if missing_keys or "generator" not in model.info["parts"]:
        what = f"no {', '.join(missing_keys)} in its config" if missing_keys else "no part generator"
        raise ModelError(f"{model.path}: not an InstaRevive model: {what}")
    try:
        network = network_like(config, precision)
        predictor = EpsPredictor(
            network,
            schedule_from(config["schedule"]),
            config["prediction"],
            bool(config.get("mask_as_bias", False)),
            FAMILIES[config["family"]].inputs(),
        )
        generator = OneStepGenerator(predictor, OneStep(**config["one_step"]))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{model.path}: its config makes no generator: {error}") from error
    load_strictly(network, model.part("generator"), f"{model.path}: part generator")
    if generator.align is not None:
        load_strictly(generator.align, model.part("align"), f"{model.path}: part align")
    return generator.eval().requires_grad_(False)


def open_coarse(name: str, digest: str = "", precision: Precision = "fp32") -> Coarse:
    """A coarse restorer from the model folder of a SwinIR or of a regressor, frozen.

    Args:
        name: a folder, or a name below RESTORAY_HOME/weights.
        digest: the expected one, from the generator's config; "" for any.

    Raises:
        ModelError: no such model, a model of another system, or another digest.
    """
    model = load_model(name)
    check_coarse(model)
    if digest and model.digest != digest:
        raise ModelError(
            f"coarse restorer {name!r} has digest {model.digest[:12]}, but the generator was trained behind "
            f"{digest[:12]}: bring that one back, or name another with coarse_model"
        )
    if model.info["system"] == "swinir":
        network = swinir_of(model).to(DTYPES[precision]).eval().requires_grad_(False)
        return Coarse(network, network.config.multiple_px)
    from components.systems.regressor.network import SameSize, network_of  # brings spandrel

    regressor = network_of(model)
    if precision in regressor.config.precisions:
        regressor.to(DTYPES[precision])  # the others stay in float32: the coarse restorer is a small part of the work
    return Coarse(SameSize(regressor), regressor.config.factor)


def check_coarse(model: Model) -> None:
    """Raises ModelError unless a coarse restorer can be made of a model."""
    if model.info["system"] not in COARSE_SYSTEMS:
        raise ModelError(
            f"{model.path}: holds a {model.info['system']} model, not a coarse restorer ({' or '.join(COARSE_SYSTEMS)})"
        )


def build_restorer(
    model: Model,
    device: str = "cpu",
    batch_size: int = 1,
    precision: Precision = "fp32",
    speed: Mapping[str, Any] | None = None,
    coarse_model: str = "",
    **defaults: Any,
) -> InstaReviveRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder with a generator.
        device: where the networks go.
        batch_size: see InstaReviveRestorer.
        precision: of the networks' weights; latents and noise stay in float32, and fp16 keeps a KL autoencoder in fp32.
        speed: settings of fast.Speed by name.
        coarse_model: replaces the coarse restorer of the config; "none" for none.
        defaults: options that replace those of the recipe.

    Raises:
        ModelError: a part is missing, or the prior or coarse restorer cannot be opened.
        ValueError: an unknown or wrong speed setting or option.
    """
    speed_settings = Speed.of(speed or {})
    generator = load_generator(model, precision)
    config, prior = model.info["config"], model.info.get("prior") or {}
    backbone = open_backbone(config["family"], str(prior.get("id", "")), prior, precision, with_network=False)
    if backbone.latent_channels != generator.predictor.latent_channels:
        raise ModelError(
            f"{model.path}: its generator takes latents of {generator.predictor.latent_channels} channels, the prior "
            f"{backbone.source['id']} makes {backbone.latent_channels}"
        )
    backbone.network = generator.predictor.network  # replaces the prior's own, which is not needed
    coarse_record = config.get("coarse") or {}
    coarse = None
    if coarse_model != "none" and (coarse_model or coarse_record):
        coarse_name = coarse_model or str(coarse_record["id"])
        coarse = open_coarse(coarse_name, "" if coarse_model else str(coarse_record.get("digest", "")), precision)
        coarse.network.to(device)
    backbone.to(device)
    generator.to(torch.device(device))
    options = {**restore_defaults(model.info.get("recipe") or {}), **defaults}
    return InstaReviveRestorer(generator, backbone, coarse, options, batch_size, speed_settings)
