"""A real score that sees whose picture it is: the prior's UNet with an IP-Adapter (Ye et al. 2023; app. A.5, fig. 17).

Where a style changes and a face must stay the same person's, the teacher is told the input photograph beside the text:
its picture embedding becomes a few tokens more, which every text attention looks at through keys and values of their
own. Generator and fake score stay as they are, so a trained generator needs none of this.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from components.models import ModelError
from components.systems.instarevive.network import EpsPredictor

GROUPS = ("image_proj", "ip_adapter")
"""First parts of the keys in an IP-Adapter's file."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of what CLIP's picture encoder was trained on, pictures in 0..1 (Radford et al. 2021)."""


class PictureEmbedder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> CLIP embeddings [B, D], frozen.

    Args:
        encoder: CLIPVisionModelWithProjection.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.side = int(encoder.config.image_size)  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The whole picture is squeezed into CLIP's square: a face at the border counts too."""
        size = (self.side, self.side)
        seen = F.interpolate(images.float() * 0.5 + 0.5, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (seen.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return self.encoder((seen.clamp(0, 1) - mean) / std).image_embeds  # type: ignore[no-any-return]


def load_picture_embedder(place: str) -> PictureEmbedder:
    """The embedder of a folder, of a hub id, or of a folder in a hub repository ("owner/name/folder").

    Raises:
        ModelError: there is no CLIP picture encoder.
    """
    from transformers import CLIPVisionModelWithProjection

    name, folder = (place, "") if Path(place).is_dir() else _split(place)
    try:
        more: dict[str, Any] = {"subfolder": folder} if folder else {}
        encoder = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True, **more)
    except (OSError, ValueError) as error:
        raise ModelError(f"picture encoder {place!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return PictureEmbedder(encoder)


def load_ip_adapter(place: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of an IP-Adapter by group, from a safetensors file, or "owner/name/file" on the hub.

    Raises:
        ModelError: no such file, or keys of something else, which are named.
    """
    path = Path(place).expanduser()
    try:
        if not path.is_file():
            from huggingface_hub import hf_hub_download

            repository, file = _split(place)
            path = Path(hf_hub_download(repository, file))
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"IP-Adapter {place!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    found: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for key, value in tensors.items():
        group, _, rest = key.partition(".")
        if group not in found:
            raise ModelError(f"{path}: {key} is no key of an IP-Adapter ({' and '.join(GROUPS)})")
        found[group][rest] = value
    if empty := [group for group, part in found.items() if not part]:
        raise ModelError(f"{path}: no IP-Adapter: it holds nothing of {' and '.join(empty)}")
    return found


def with_ip_adapter(predictor: EpsPredictor, weights: dict[str, dict[str, Tensor]]) -> EpsPredictor:
    """A frozen copy of a UNet's predictor that takes `Conditions.image` [B, D] beside the text.

    Raises:
        ModelError: the network is no UNet, or the adapter is one of another UNet.
    """
    if not isinstance(predictor.network, UNet2DConditionModel):
        raise ModelError("an IP-Adapter sits on a UNet: choose family sdxl, sd or nano")
    network = copy.deepcopy(predictor.network)
    try:
        # diffusers' pipelines load adapters by this call; there is no public one on the network
        network._load_ip_adapter_weights(dict(weights), low_cpu_mem_usage=False)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the IP-Adapter does not fit this prior's network: {reason}") from error
    wanted = set(weights["ip_adapter"])
    crosses = sum(not name.endswith("attn1.processor") for name in network.attn_processors)
    if len(wanted) != 2 * crosses:
        raise ModelError(
            f"the IP-Adapter does not fit this prior's network: it holds {len(wanted)} keys and values of attention, "
            f"the network needs {2 * crosses}"
        )
    network.eval().requires_grad_(False)
    return EpsPredictor(network, predictor.schedule, predictor.prediction, predictor.mask_as_bias)


def _split(place: str) -> tuple[str, str]:
    """("owner/name", rest) of a place on the hub."""
    parts = place.split("/")
    if len(parts) < 2:
        raise ModelError(f"{place!r} is neither a path nor a place on the hub (owner/name/file)")
    return "/".join(parts[:2]), "/".join(parts[2:])
