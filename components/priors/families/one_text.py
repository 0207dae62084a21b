"""The families with one text encoder: PixArt-alpha (a DiT, T5 and its mask) and Stable Diffusion 2.1 (a UNet, CLIP).

Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from components.priors.families.record import FamilyPrior, PriorFamily, TextLayout
from components.priors.families.unets import attention_inputs, unet_builder
from components.priors.one_text_config import LICENCES, PIXART, PIXART_DIT, PIXART_SCHEDULE, SD21, SD21_UNET, SD_VAE

if TYPE_CHECKING:
    from torch import nn

    from components.priors.files import Precision


def _opener(family: Literal["pixart", "sd"]) -> Callable[[str, Precision, bool], FamilyPrior]:
    def open_one_text(name: str, precision: Precision, with_network: bool) -> FamilyPrior:
        from components.priors.one_text import load_one_text_prior

        return load_one_text_prior(name, family, precision, with_network=with_network)

    return open_one_text


def _build_dit(arguments: Mapping[str, Any]) -> nn.Module:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    own = arguments.get("addition_embed_type")
    if own is not None:
        raise ValueError(f"a pixart network has addition_embed_type None, this one has {own!r}")
    return PixArtTransformer2DModel(**arguments)


PIXART_FAMILY = PriorFamily(
    name="pixart",
    default_prior=PIXART,
    kind="dit",
    part="transformer",
    networks={PIXART: PIXART_DIT},
    latents=SD_VAE,
    schedule=PIXART_SCHEDULE,
    text=TextLayout(halved=True),
    licences={PIXART: LICENCES[PIXART]},
    build=_build_dit,
    inputs=attention_inputs,
    open=_opener("pixart"),
)
SD_FAMILY = PriorFamily(
    name="sd",
    default_prior=SD21,
    kind="unet",
    part="unet",
    networks={SD21: SD21_UNET},
    latents=SD_VAE,
    text=TextLayout(halved=True),
    licences={SD21: LICENCES[SD21]},
    build=unet_builder("sd", None),
    inputs=attention_inputs,
    open=_opener("sd"),
)
