"""The family of SDXL: a UNet that takes text, pooled text and size ids; and the same shape at nano size. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from components.priors.families.record import FamilyPrior, PriorFamily, TextLayout
from components.priors.families.unets import attention_inputs, unet_builder
from components.priors.sdxl_config import LICENCES, SDXL, SDXL_AUTOENCODER, SDXL_UNET

if TYPE_CHECKING:
    from components.priors.files import Precision


def _open(name: str, precision: Precision, with_network: bool) -> FamilyPrior:
    # the UNet's weights come along, since a model folder and a pipeline's folder hold them in any case
    from components.priors.opening import load_prior

    return load_prior(name, image_encoder="", precision=precision)


SDXL_FAMILY = PriorFamily(
    name="sdxl",
    default_prior=SDXL,
    kind="unet",
    part="unet",
    networks={SDXL: SDXL_UNET},
    latents=SDXL_AUTOENCODER,
    text=TextLayout(columns=True),
    licences=LICENCES,
    build=unet_builder("sdxl", "text_time"),
    inputs=attention_inputs,
    open=_open,
)
NANO_FAMILY = replace(
    SDXL_FAMILY,
    name="nano",
    default_prior="nano",
    networks={},
    latents={},
    licences={},
    build=unet_builder("nano", "text_time"),
)
"""A name of its own, since trained models record it."""
