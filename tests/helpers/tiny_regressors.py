"""Tiny networks of spandrel's architectures with random weights, and their files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from spandrel import MAIN_REGISTRY
from torch import Tensor, nn

SWIN: Mapping[str, Any] = {"embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 8, "mlp_ratio": 2}
SHUFFLE: Mapping[str, Any] = {"upscale": 2, "upsampler": "pixelshuffle"}


def _class(module: str) -> Any:
    return getattr(importlib.import_module(f"spandrel.architectures.{module}"), module)


TINY: Mapping[str, Callable[[], nn.Module]] = {
    "Compact": lambda: _class("Compact")(num_feat=8, num_conv=2, upscale=4),
    "DAT": lambda: _class("DAT")(
        embed_dim=16, depth=[2], num_heads=[2], expansion_factor=2.0, split_size=[8, 16], **SHUFFLE
    ),
    "DnCNN": lambda: _class("DnCNN")(in_nc=1, out_nc=1, nc=8, nb=5),
    "ESRGAN": lambda: _class("ESRGAN")(num_filters=4, num_blocks=1, scale=4),
    "HAT": lambda: _class("HAT")(**SWIN, num_feat=8, squeeze_factor=4, upscale=2),
    "NAFNet": lambda: _class("NAFNet")(width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]),
    "OmniSR": lambda: _class("OmniSR")(num_feat=16, up_scale=2),
    "SAFMN": lambda: _class("SAFMN")(dim=8, n_blocks=1, upscaling_factor=2),
    "SwinIR": lambda: _class("SwinIR")(**SWIN, **SHUFFLE),
}
"""Constructors by architecture; OmniSR looks at the whole picture, DnCNN is for gray ones."""


def tiny_state(name: str, seed: int = 0) -> dict[str, Tensor]:
    """The weights of a tiny network with some noise, under the keys of its published files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TINY[name]()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    return {esrgan_key(key): tensor for key, tensor in state.items()} if name == "ESRGAN" else state


def esrgan_key(key: str) -> str:
    """The key in Real-ESRGAN's files of a key of spandrel's ESRGAN with one block and factor 4."""
    if match := re.fullmatch(r"model\.1\.sub\.0\.RDB(\d)\.conv(\d)\.0\.(\w+)", key):
        return f"body.0.rdb{match[1]}.conv{match[2]}.{match[3]}"
    names = {"0": "conv_first", "1.sub.1": "conv_body", "3": "conv_up1", "6": "conv_up2", "8": "conv_hr"}
    names["10"] = "conv_last"
    match = re.fullmatch(r"model\.(.+)\.(weight|bias)", key)
    assert match is not None
    return f"{names[match[1]]}.{match[2]}"


def write_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the weights as a pickle, as most of them are published."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pth"
    torch.save({"params_ema": tiny_state(name, seed)}, path)
    return path


def detecting_keys(name: str) -> dict[str, Tensor]:
    """Empty tensors under the keys by which spandrel detects an architecture."""

    def keys(condition: Any) -> list[str]:
        inner = condition._keys if condition._kind == "all" else condition._keys[:1]
        return [key for one in inner for key in ([one] if isinstance(one, str) else keys(one))]

    return {key: torch.zeros(1) for key in keys(MAIN_REGISTRY[name].architecture._detect)}
