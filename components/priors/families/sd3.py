"""The family of Stable Diffusion 3: an MM-DiT that takes joint text tokens and pooled text, trained by flow matching.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from components.priors.families.record import FamilyPrior, PriorFamily, TextLayout
from components.priors.sd3_config import (
    LICENCES,
    SD3_AUTOENCODER,
    SD3_MEDIUM,
    SD3_SCHEDULE,
    SD3_TRANSFORMER,
    SD35_MEDIUM,
    SD35_TRANSFORMER,
)

if TYPE_CHECKING:
    from torch import nn

    from components.priors.conditions import NetworkInputs
    from components.priors.files import Precision


def _open(name: str, precision: Precision, with_network: bool) -> FamilyPrior:
    from components.priors.sd3_files import load_sd3_prior

    return load_sd3_prior(name, precision, with_network=with_network)


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(**arguments)


def _inputs() -> NetworkInputs:
    from components.priors.sd3 import joint_inputs

    return joint_inputs


SD3_FAMILY = PriorFamily(
    name="sd3",
    default_prior=SD3_MEDIUM,
    kind="dit",
    part="transformer",
    networks={SD3_MEDIUM: SD3_TRANSFORMER, SD35_MEDIUM: SD35_TRANSFORMER},
    latents=SD3_AUTOENCODER,
    schedule=SD3_SCHEDULE,
    prediction="flow_prediction",
    text=TextLayout(halved=True),
    licences=LICENCES,
    build=_build,
    inputs=_inputs,
    open=_open,
)
