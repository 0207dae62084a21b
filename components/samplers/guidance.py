"""Classifier-free guidance on network predictions."""

from __future__ import annotations

from torch import Tensor


def guide(negative: Tensor, positive: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """negative + scale (positive - negative) (Ho and Salimans 2022, in the form of InstantIR's code).

    Args:
        negative, positive: predictions [B, ...].
        scale: 1 gives `positive`; a tensor must broadcast.
        rescale: share of the guided prediction that gets the positive prediction's standard deviation per sample (Lin
            et al. 2023, Sec. 3.4); 0 changes nothing.
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    same_deviation = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return rescale * same_deviation + (1 - rescale) * guided


def distillation_guide(negative: Tensor, positive: Tensor, w: Tensor) -> Tensor:
    """positive + w (positive - negative), w [B]: the guidance of InstantIR's Previewer teacher."""
    return positive + w.view(-1, *[1] * (positive.ndim - 1)) * (positive - negative)
