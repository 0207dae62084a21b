"""ST-LPIPS (Ghildyal and Liu 2022): LPIPS on an AlexNet that tolerates small shifts, with the authors' weights.

The weights lie in the PyPI wheel stlpips-pytorch (BSD-2-Clause), which is installed with the project. Only its file is
read; its code is not imported. The network has convolutions of stride 1, and blurs before each halving.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models import load_strictly
from components.tensor_files import read_tensors

PACKAGE, FILE = "stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth"

CONVS = {
    "slice1.0": (3, 64, 11, 2),
    "slice2.5": (64, 192, 5, 2),
    "slice3.9": (192, 384, 3, 1),
    "slice4.11": (384, 256, 3, 1),
    "slice5.13": (256, 256, 3, 1),
}
"""(channels in, channels out, kernel, padding) of the convolutions, by their key in the file. Each is a tap."""

BLURRED_AFTER, POOLED_BEFORE = ("slice1.0",), ("slice2.5", "slice3.9")


class ShiftTolerantLpips(nn.Module):
    """Distance of two pictures, 0 for equal ones. Frozen: gradients reach the pictures only.

    State-dict keys: net.<slice>.weight and .bias, and lin<k>.model.1.weight [1, C, 1, 1], as in the authors' file; the
    blurs and the scaling of its other keys are constants.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict(
            {_name(key): nn.Conv2d(a, b, kernel, padding=padding) for key, (a, b, kernel, padding) in CONVS.items()}
        )
        self.lins = nn.ModuleList(nn.Conv2d(sizes[1], 1, 1, bias=False) for sizes in CONVS.values())
        for name in ("shift", "scale"):  # ImageNet's mean and deviation for pictures in [-1, 1], from the file
            self.register_buffer(name, torch.zeros(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distance of pictures [B, 3, H, W] in [0, 1], sides of 32 px or more -> float32 [B]."""
        total = images.new_zeros(len(images), dtype=torch.float32)
        x = (torch.cat([images, targets]).float() * 2 - 1 - self.shift) / self.scale
        for number, key in enumerate(CONVS):
            if key in POOLED_BEFORE:
                x = halve(F.max_pool2d(x, 3, stride=1))
            x = self.convs[_name(key)](x)
            x = F.relu(halve(x) if key in BLURRED_AFTER else x)
            first, second = (x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            total = total + self.lins[number]((first - second).square()).mean(dim=(1, 2, 3))
        return total


def halve(x: Tensor) -> Tensor:
    """Every second value of a binomial blur [1, 2, 1] / 4 along both sides, with two mirrored values at each border."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device) / 4
    window = (kernel[:, None] * kernel[None]).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), window, stride=2, groups=x.shape[1])


def load_st_lpips(device: str = "cpu") -> ShiftTolerantLpips:
    """The metric with the wheel's weights.

    Raises:
        FileNotFoundError: the wheel is not installed.
        ModelError: its file is damaged; the message names the keys.
    """
    package = importlib.util.find_spec(PACKAGE)
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    if not folders or not (Path(folders[0]) / FILE).is_file():
        raise FileNotFoundError("stlpips-pytorch is not installed: install the project's requirements")
    tensors = read_tensors(Path(folders[0]) / FILE)
    own = {f"convs.{_name(key)}.{part}": f"net.{key}.{part}" for key in CONVS for part in ("weight", "bias")}
    own |= {f"lins.{number}.weight": f"lin{number}.model.1.weight" for number in range(len(CONVS))}
    network = ShiftTolerantLpips()
    constants = {"shift": "scaling_layer.shift", "scale": "scaling_layer.scale"}
    names = {**own, **constants}
    load_strictly(network, {name: tensors[key] for name, key in names.items() if key in tensors}, str(FILE))
    return network.to(device).eval()


def _name(key: str) -> str:
    return key.replace(".", "_")
