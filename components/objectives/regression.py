"""Regression losses that keep a one-step generator near its target: LPIPS, a loss without weights, or plain L2.

    lpips     distance of VGG-16 features, weights from files (Zhang et al. 2018); InstaRevive's appendix
    pyramid   mean absolute difference of the bands of a Laplacian pyramid (Bojanowski et al. 2018, Eq. 3), summed
    l2        mean square of latents, InstaRevive Eq. 4
    charbonnier  sqrt(difference^2 + eps^2) (Charbonnier et al. 1994), for coarse restorers
    features  distance of features of any network, for example of the score that the project trains itself
    log_mse   logarithm of each picture's mean square error: all pictures count alike in decibels

All are per sample and do not grow with the size of the picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models import load_strictly
from components.priors.hub import find_folder
from components.tensor_files import WeightsFileError, read_tensors

Regression = Literal["perceptual", "l2", "both"]

PerceptualLoss = Callable[[Tensor, Tensor], Tensor]
"""(restored, clean), both [B, 3, H, W] in [-1, 1] or a little outside -> float32 [B]."""

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for pictures in [-1, 1], with the numbers of LPIPS."""

VGG_CONVS: Mapping[int, tuple[int, int]] = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
"""(channels in, out) of VGG-16's convolutions by their index in torchvision's `features`."""

TAPS: Mapping[int, int] = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}
"""Convolutions whose rectified output LPIPS compares, each with the number of its `lin` weights."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Suffixes of weights files that a folder is searched for."""

# ------------------------------------------------------------------------------------------------ without weights


def pyramid_distance(prediction: Tensor, target: Tensor, levels: int = 5) -> Tensor:
    """Sum over the bands of a Laplacian pyramid of the mean absolute difference: [B, C, H, W] -> float32 [B].

    The paper weighs the sum over band j by 4^j. That equals the mean over the band, which has 4^j times fewer pixels.
    The last band is the coarse picture.

    Args:
        prediction, target: pictures of one size.
        levels: largest number of bands; a picture with a side below 4 pixels is not halved.
    """
    # the pyramid is linear: that of the difference is the difference of the pyramids
    residual = prediction.float() - target.float()
    total = residual.new_zeros(len(residual))
    for _ in range(levels - 1):
        if min(residual.shape[-2:]) < 4:
            break
        coarse = F.avg_pool2d(_binomial_blur(residual), 2, ceil_mode=True, count_include_pad=False)
        enlarged = F.interpolate(coarse, residual.shape[-2:], mode="bilinear", align_corners=False)
        total = total + (residual - enlarged).abs().flatten(1).mean(dim=1)
        residual = coarse
    return total + residual.abs().flatten(1).mean(dim=1)


def _binomial_blur(x: Tensor) -> Tensor:
    """Blurs with [1, 2, 1] / 4 along both sides; edges repeat."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
    return (across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]) / 4


def latent_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square error per sample: [B, ...] -> float32 [B] (InstaRevive Eq. 4, with a mean instead of the sum)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


def charbonnier_distance(prediction: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference^2 + eps^2) per sample: [B, ...] -> float32 [B]."""
    difference = prediction.float() - target.float()
    return (difference.square() + eps**2).sqrt().flatten(1).mean(dim=1)


def log_mse_distance(prediction: Tensor, target: Tensor, eps: float = 1e-5) -> Tensor:
    """log(mean square error + eps) per sample: [B, ...] -> float32 [B]; ln(10) / 10 of it are a decibel.

    A mean over pictures of the plain error belongs to the worst of them. `eps` keeps the best ones, whose error is
    below it, from owning the mean of the logarithms.
    """
    return (latent_distance(prediction, target) + eps).log()


def feature_distance(prediction: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Distance of a network's features of two pictures, as LPIPS has it without its weights: float32 [B].

    At every place the channels become a vector of length 1. The squared difference of the vectors is averaged over
    places and summed over levels.

    Args:
        prediction, target: features [B, C, h, w] of each level.
    """
    total = torch.zeros(len(prediction[0]), device=prediction[0].device)
    for mine, goal in zip(prediction, target, strict=True):
        difference = _unit_vectors(mine.float()) - _unit_vectors(goal.float())
        total = total + difference.square().sum(dim=1).flatten(1).mean(dim=1)
    return total


def _unit_vectors(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


class VggLpips(nn.Module):
    """LPIPS on VGG-16 (version 0.1). Frozen: gradients reach the pictures only.

    State-dict keys: features.<i>.weight, features.<i>.bias (torchvision's numbers) and lin<k>.weight [1, C, 1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {str(number): nn.Conv2d(*channels, 3, padding=1) for number, channels in VGG_CONVS.items()}
        )
        for conv, tap in TAPS.items():
            self.add_module(f"lin{tap}", nn.Conv2d(VGG_CONVS[conv][1], 1, 1, bias=False))
        self.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of pictures [B, 3, H, W] in [-1, 1], sides of 16 px or more -> float32 [B]."""
        with torch.autocast(prediction.device.type, enabled=False):
            total = prediction.new_zeros(len(prediction), dtype=torch.float32)
            both = self._tap_features(torch.cat([prediction.float(), target.float()]))
            for tap, features in both:
                mine, goal = _unit_vectors(features).chunk(2)
                total = total + self.get_submodule(f"lin{tap}")((mine - goal).square()).mean(dim=(1, 2, 3))
            return total

    def _tap_features(self, images: Tensor) -> Iterable[tuple[int, Tensor]]:
        shift, scale = (images.new_tensor(v).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x = (images - shift) / scale
        before = -2
        for number in VGG_CONVS:
            if number - before > 2:  # a pooling layer lies between the two
                x = F.max_pool2d(x, 2)
            x = F.relu(self.features[str(number)](x))
            if number in TAPS:
                yield TAPS[number], x
            before = number


def load_lpips(place: str | Path, device: str = "cpu") -> VggLpips:
    """Loads LPIPS from a file, a folder, or a repository on the hub.

    The weights are in one file or in two: torchvision's VGG-16 (vgg16-397923af.pth) and the learned weights
    (LPIPS_v0.1_vgg.pth). Accepted keys are those of torchvision, of the lpips package and of its copies; the classifier
    and unused layers are ignored.

    Args:
        place: a file, a folder, a name below RESTORAY_HOME/weights, or a hub id.
        device: torch device.

    Raises:
        ModelError: no weights, an unreadable file, or tensors that are missing, contradictory or of a wrong shape (the
            message names all of them).
    """
    path = Path(place).expanduser()
    if path.is_file():
        files = [path]
    else:
        patterns = tuple(f"*{suffix}" for suffix in _SUFFIXES)
        folder, _ = find_folder(str(place), (), patterns, {})
        files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)
        if not files:
            raise WeightsFileError(f"{folder}: no weights, looked for {', '.join(patterns)}")
    tensors: dict[str, Tensor] = {}
    unknown: list[str] = []
    for file in files:
        for key, tensor in read_tensors(file).items():
            name = _lpips_name(key)
            if name is None:
                unknown.append(key)
            elif name and name in tensors and not torch.equal(tensors[name], tensor):
                raise WeightsFileError(f"{file}: {key} differs from the same tensor in an earlier file")
            elif name:
                tensors[name] = tensor
    if unknown:
        raise WeightsFileError(f"{files[0].parent}: not weights of LPIPS on VGG-16; unexpected {sorted(unknown)[:8]}")
    network = VggLpips()
    load_strictly(network, tensors, f"{place}: LPIPS")
    if any(bool((value < 0).any()) for key, value in tensors.items() if key.startswith("lin")):
        raise WeightsFileError(f"{place}: negative learned weights; those of LPIPS are not negative")
    return network.to(device).eval()


def _lpips_name(key: str) -> str | None:
    """Our key of a tensor; "" for an unused tensor, None for an unknown one."""
    if match := re.fullmatch(r"(?:net\.)?(?:vgg\.)?(?:features|slice\d)\.(\d+)\.(weight|bias)", key):
        return f"features.{match[1]}.{match[2]}" if int(match[1]) in VGG_CONVS else None
    if match := re.fullmatch(r"lins?\.?(\d)(?:\.model)?(?:\.1)?\.weight", key):
        return f"lin{match[1]}.weight" if int(match[1]) in TAPS.values() else None
    if re.match(r"(classifier\.|(?:scaling_layer\.)?(?:shift|scale)$)", key):
        return ""
    return None
