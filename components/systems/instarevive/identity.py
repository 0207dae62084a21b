"""A real score that sees the input's identity: the prior's UNet with an IP-Adapter (Ye et al. 2023; app. A.5, fig. 17).

If a task changes the style and must keep the person's face, the teacher takes the input photograph in addition to the
text. The picture's embedding becomes a few more tokens, and every text attention reads them through separate keys and
values. Generator and fake score do not change, so a trained generator needs no IP-Adapter.
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
"""Normalisation of CLIP's picture encoder, for pictures in 0..1 (Radford et al. 2021)."""


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
        """The whole picture is resized to CLIP's square, not cropped: a face may be at the border."""
        size = (self.side, self.side)
        resized = F.interpolate(images.float() * 0.5 + 0.5, size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (resized.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return self.encoder((resized.clamp(0, 1) - mean) / std).image_embeds  # type: ignore[no-any-return]


def load_picture_embedder(place: str) -> PictureEmbedder:
    """The embedder from a folder, a hub id, or a folder in a hub repository ("owner/name/folder").

    Raises:
        ModelError: no CLIP picture encoder there.
    """
    from transformers import CLIPVisionModelWithProjection

    name, folder = (place, "") if Path(place).is_dir() else _split(place)
    try:
        options: dict[str, Any] = {"subfolder": folder} if folder else {}
        encoder = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"picture encoder {place!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return PictureEmbedder(encoder)


def load_ip_adapter(place: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of an IP-Adapter by group, from a safetensors file, or "owner/name/file" on the hub.

    Raises:
        ModelError: no such file, or a key that is not of an IP-Adapter; the message names it.
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
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for key, value in tensors.items():
        group, _, rest = key.partition(".")
        if group not in groups:
            raise ModelError(f"{path}: {key} is not a key of an IP-Adapter ({' and '.join(GROUPS)})")
        groups[group][rest] = value
    if empty := [group for group, part in groups.items() if not part]:
        raise ModelError(f"{path}: not an IP-Adapter: it holds no keys of {' and '.join(empty)}")
    return groups


def with_ip_adapter(predictor: EpsPredictor, weights: dict[str, dict[str, Tensor]]) -> EpsPredictor:
    """A frozen copy of a UNet's predictor that takes `Conditions.image` [B, D] and the text.

    Raises:
        ModelError: the network is not a UNet, or the adapter does not fit it.
    """
    if not isinstance(predictor.network, UNet2DConditionModel):
        raise ModelError("an IP-Adapter needs a UNet: choose family sdxl, sd or nano")
    network = copy.deepcopy(predictor.network)
    try:
        # diffusers' pipelines load adapters with this call; networks have no public one
        network._load_ip_adapter_weights(dict(weights), low_cpu_mem_usage=False)
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the IP-Adapter does not fit this prior's network: {reason}") from error
    keys = set(weights["ip_adapter"])
    cross_attentions = sum(not name.endswith("attn1.processor") for name in network.attn_processors)
    if len(keys) != 2 * cross_attentions:
        raise ModelError(
            f"the IP-Adapter does not fit this prior's network: it holds {len(keys)} keys and values of attention, "
            f"the network needs {2 * cross_attentions}"
        )
    network.eval().requires_grad_(False)
    return EpsPredictor(network, predictor.schedule, predictor.prediction, predictor.mask_as_bias, predictor.inputs)


def _split(place: str) -> tuple[str, str]:
    """A place on the hub -> ("owner/name", rest)."""
    parts = place.split("/")
    if len(parts) < 2:
        raise ModelError(f"{place!r} is neither a path nor a place on the hub (owner/name/file)")
    return "/".join(parts[:2]), "/".join(parts[2:])
