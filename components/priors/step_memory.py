"""The memory of a restoration in steps by a denoiser and modules of a system, on the meta device.

Three phases: pictures (autoencoder), texts (text encoders) and steps (denoiser and the system's modules).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from components.peak_memory import MemoryPlan, Phase, parameter_bytes, peak_bytes
from components.priors.autoencoder import SpaceToDepthAutoencoder, autoencoder_factor
from components.priors.conditions import SizedConditions
from components.priors.files import DTYPES, Precision
from components.priors.layer_tiles import LayerTiles
from components.priors.pictures import EXACT_PX
from components.priors.tiling import FADE, TILE
from components.weight_storage import store_in_8_bits

SDXL_TEXT_PARAMETERS = 817_720_320
"""Of SDXL's two text encoders: CLIP-L's text model (123 million) and OpenCLIP bigG's (695 million)."""

TOKENS = 77


class StepOptions(Protocol):
    """What the memory depends on; fields of every such system's options."""

    @property
    def tile_px(self) -> int: ...

    @property
    def autoencoder_tiles(self) -> str: ...

    @property
    def guided(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class StepNetworks:
    """A system's own modules, on the meta device.

    Attributes:
        steps: on the device in each step, the denoiser first.
        pictures: on the device with the autoencoder.
        call: ((height, width) of a tile in latent pixels, rows) -> anything, by one call; guidance doubles the rows.
        text_parameters: of the text encoders beside an AutoencoderKL.
        largest_side: the longest side of latents that the denoiser takes; None for any.
    """

    steps: tuple[nn.Module, ...]
    pictures: tuple[nn.Module, ...]
    call: Callable[[tuple[int, int], int], Any]
    text_parameters: int = SDXL_TEXT_PARAMETERS
    largest_side: int | None = None


def plan_steps(
    autoencoder_config: Mapping[str, Any],
    build: Callable[[nn.Module], StepNetworks],
    size: tuple[int, int],
    options: StepOptions,
    precision: Precision,
    offload: bool,
) -> MemoryPlan:
    """The memory that a picture takes on the device. What exact tiles store lies in the CPU's memory on a GPU.

    Args:
        autoencoder_config: of the prior, as in hub.PriorShape.
        build: autoencoder on the meta device -> the networks.
        size: (height, width) at which the networks run, in pixels.
        options: of the restoration.
        precision: of the modules of the steps and text encoders; the autoencoder stays in fp32.
        offload: the networks are on the device in turns.
    """
    with torch.device("meta"):
        autoencoder = meta_autoencoder(autoencoder_config)
        own = build(autoencoder)
        for module in own.steps:
            nn.Module.to(module, dtype=DTYPES[precision])
        if precision == "fp8":
            store_in_8_bits(own.steps)
        steps = peak_bytes(
            lambda: own.call(_tile(size, options, autoencoder, own.largest_side), 2 if options.guided else 1)
        )
        pictures = peak_bytes(lambda: _pictures(autoencoder, _whole(size, options, autoencoder)))
    element = 1 if precision == "fp8" else torch.empty(0, dtype=DTYPES[precision]).element_size()
    texts = own.text_parameters * element if isinstance(autoencoder, AutoencoderKL) else 0
    phases = (
        Phase(name="pictures", weights=parameter_bytes(autoencoder, *own.pictures), peak=pictures),
        Phase(name="texts", weights=texts, peak=0),
        Phase(name="steps", weights=parameter_bytes(*own.steps), peak=steps),
    )
    settings: dict[str, Any] = {"precision": precision, "offload": offload, "tile_px": options.tile_px or "default"}
    settings["autoencoder_tiles"] = options.autoencoder_tiles
    return MemoryPlan(settings=settings, phases=phases, in_turns=offload)


def meta_autoencoder(config: Mapping[str, Any]) -> nn.Module:
    """The autoencoder of a configuration; inside torch.device("meta") without memory."""
    if "factor" in config:
        return SpaceToDepthAutoencoder(**config)
    return AutoencoderKL.from_config(dict(config))  # type: ignore[return-value]


def _tile(size: tuple[int, int], options: StepOptions, autoencoder: nn.Module, largest: int | None) -> tuple[int, int]:
    """(height, width) of a tile of the steps, in latent pixels."""
    factor = autoencoder_factor(autoencoder)
    side = options.tile_px // factor if options.tile_px else TILE
    side = min(side, largest or side)
    height, width = (min(side, -(-length // factor)) for length in size)
    return (max(8, height // 8 * 8), max(8, width // 8 * 8))


def _whole(size: tuple[int, int], options: StepOptions, autoencoder: nn.Module) -> tuple[int, int]:
    """(height, width) of the autoencoder's largest part, in pixels: the picture, or a tile with its border."""
    factor, largest = autoencoder_factor(autoencoder), TILE
    if max(size) > TILE * factor:
        exact = options.autoencoder_tiles in ("exact", "released")
        exact = exact or (options.autoencoder_tiles == "auto" and size[0] * size[1] <= EXACT_PX)
        layered = exact and isinstance(autoencoder, AutoencoderKL)
        largest = LayerTiles().decoder_tile + 2 if layered else TILE + 4 * FADE
    height, width = (min(-(-length // factor), largest) * factor for length in size)
    return (height, width)


def unet_inputs(unet: Any, tile: tuple[int, int], rows: int) -> tuple[Tensor, Tensor, SizedConditions]:
    """Latents, time steps and conditions of one call of an SDXL-shaped UNet."""
    dtype = next(unet.parameters()).dtype
    latents = torch.empty(rows, unet.config["in_channels"], *tile, dtype=dtype)
    pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    conditions = SizedConditions(
        text=torch.empty(rows, TOKENS, unet.config["cross_attention_dim"], dtype=dtype),
        pooled=torch.empty(rows, pooled, dtype=dtype),
        time_ids=torch.empty(rows, 6),
    )
    return latents, torch.zeros(rows, dtype=torch.int64), conditions


def _pictures(autoencoder: Any, size: tuple[int, int]) -> None:
    """One encoding and one decoding, without the casts that the meta device lacks."""
    images, factor = torch.empty(1, 3, *size), autoencoder_factor(autoencoder)
    shape = (1, _latent_channels(autoencoder), size[0] // factor, size[1] // factor)
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        autoencoder.encode_residual(nn.functional.pixel_unshuffle(images, factor))
        nn.functional.pixel_shuffle(autoencoder.decode_residual(torch.empty(shape)), factor)
    else:
        autoencoder.encoder(images)
        autoencoder.decoder(torch.empty(shape))


def _latent_channels(autoencoder: Any) -> int:
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        return autoencoder.latent_channels
    return int(autoencoder.config["latent_channels"])
