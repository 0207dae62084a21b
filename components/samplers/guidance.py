"""Classifier-free guidance on network predictions."""

from __future__ import annotations

from torch import Tensor


def guide(negative: Tensor, positive: Tensor, scale: float | Tensor, rescale: float = 0.0) -> Tensor:
    """negative + scale (positive - negative) (Ho and Salimans 2022, written as InstantIR's code has it).

    Args:
        negative, positive: predictions [B, ...].
        scale: 1 gives `positive`; a tensor must broadcast.
        rescale: share of the guided prediction that is brought back to the positive one's standard deviation per
            sample (Lin et al. 2023, Sec. 3.4); 0 leaves it alone.
    """
    guided = negative + scale * (positive - negative)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    matched = guided * (positive.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def distillation_guide(negative: Tensor, positive: Tensor, w: Tensor) -> Tensor:
    """positive + w (positive - negative), w [B]: the form in which InstantIR's Previewer teacher is guided."""
    return positive + w.view(-1, *[1] * (positive.ndim - 1)) * (positive - negative)
