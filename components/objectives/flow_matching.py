"""Conditional flow matching: the loss of velocities, and the times at which it is taken.

x = (1 - t) clean + t noise,   loss = mean (v(x, t) - (noise - clean))^2           (Lipman et al. 2023, Eq. 23)
t = 1 / (1 + exp(-u)),         u normal with mean m and deviation s                (Esser et al. 2024, Eq. 19)
"""

from __future__ import annotations

import torch
from torch import Tensor

from components.samplers.flow import path_velocity, shift_times


def logit_normal_times(normal: Tensor, mean: float = 0.0, deviation: float = 1.0, shift: float = 1.0) -> Tensor:
    """Times of training in (0, 1), float32 of the shape of `normal`.

    Args:
        normal: standard normal numbers.
        mean, deviation: of the times' logits; 0 and 1 are SD3's.
        shift: moves the times towards noise, see shift_times.

    Raises:
        ValueError: deviation or shift is not positive.
    """
    if deviation <= 0 or shift <= 0:
        raise ValueError(f"logit-normal times need a deviation and a shift above 0, got {deviation} and {shift}")
    return shift_times(torch.sigmoid(mean + deviation * normal.float()), shift)


def flow_matching_loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of predicted velocities per sample: three tensors [B, ...] -> float32 [B]."""
    target = path_velocity(clean.float(), noise.float())
    return (prediction.float() - target).square().flatten(1).mean(dim=1)
