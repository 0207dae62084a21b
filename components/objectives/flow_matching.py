"""Conditional flow matching of a rectified flow (Esser et al. 2024, the training of Stable Diffusion 3).

z_t = (1 - t) x0 + t eps,   target velocity eps - x0         (Eq. 13; Lipman et al. 2023)
t = sigmoid(mean + std n),  n standard normal                (Eq. 19, logit-normal times)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VelocityPredictor = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, ...], times [B] in (0, 1)) -> velocity of the latents' shape; a closure over all conditions."""


def logit_normal_times(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Times [B] in (0, 1) from standard normal numbers [B]; the defaults are SD3's.

    Raises:
        ValueError: std is not positive.
    """
    if std <= 0:
        raise ValueError(f"the times' std must be positive, got {std}")
    return torch.sigmoid(mean + std * normal)


def flow_latents(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Noisy latents (1 - t) clean + t noise; clean and noise [B, ...], times [B]."""
    time = times.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    return (1 - time) * clean + time * noise


def flow_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the straight path from clean latents to noise: noise - clean."""
    return noise - clean


def flow_matching_loss(predict: VelocityPredictor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity per sample, float32 [B].

    Args:
        predict: see VelocityPredictor; its result is the only part with gradients.
        clean, noise: [B, ...].
        times: [B] in (0, 1).

    Raises:
        ValueError: the shapes differ.
    """
    if clean.shape != noise.shape or times.shape != clean.shape[:1]:
        raise ValueError(f"shapes differ: {tuple(clean.shape)}, {tuple(noise.shape)} and times {tuple(times.shape)}")
    clean, noise = clean.detach(), noise.detach()
    velocity = predict(flow_latents(clean, noise, times), times)
    return (velocity.float() - flow_target(clean, noise).float()).square().flatten(1).mean(dim=1)
