"""The sizes of a prior of any family from its configuration, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from components.models import ModelError, load_model
from components.places import SHIPPED_PRIORS
from components.priors.families.record import PriorFamily
from components.priors.files import check_prior_folder
from components.priors.hub import read_configs

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """The sizes of a denoiser and its autoencoder.

    Attributes:
        family: of the prior.
        id, digest: identify the prior.
        network: arguments of the denoiser's class.
        autoencoder: arguments of AutoencoderKL, or of SpaceToDepthAutoencoder for our own priors; empty if a diffusers
            folder does not hold them.
    """

    family: PriorFamily
    id: str
    digest: str
    network: Mapping[str, Any]
    autoencoder: Mapping[str, Any]

    def build(self) -> nn.Module:
        """An untrained denoiser; no memory is needed inside torch.device("meta")."""
        return self.family.build(self.network)


def network_shape(name: str, family: PriorFamily) -> NetworkShape:
    """Sizes of a prior from its configuration files; those of published priors need no files.

    Args:
        name: a shipped name, a model folder, a diffusers folder or a hub id.
        family: of the prior.

    Raises:
        ModelError: the prior is missing, is not a prior, or is of another family.
    """
    try:
        model = load_model(name, prior=True)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
    else:
        check_prior_folder(model)
        config = model.info["config"]
        if family.part not in config:
            raise ModelError(
                f"{model.path}: a prior of the family {family.name} has a {family.part}, this one has none"
            )
        own = model.path.name if model.path.parent == SHIPPED_PRIORS else str(model.path.resolve())
        return _shape(family, own, model.digest, config[family.part], config["autoencoder"])
    files = (f"{family.part}/config.json", "vae/config.json")
    published = {key: {files[0]: sizes, files[1]: family.latents} for key, sizes in family.networks.items()}
    configs, own = read_configs(name, files, published, [])
    return _shape(family, own, "", configs[files[0]], configs.get(files[1], {}))


def _shape(
    family: PriorFamily, name: str, digest: str, network: Mapping[str, Any], autoencoder: Mapping[str, Any]
) -> NetworkShape:
    # diffusers writes its class and version as _class_name and _diffusers_version
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in network.items() if not k.startswith("_")}
    return NetworkShape(family=family, id=name, digest=digest, network=arguments, autoencoder=autoencoder)
