"""The conditions of an SDXL-shaped UNet besides latents and time: texts and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.priors.sdxl import Prior


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The inputs of a call besides latents and time; B rows each.

    Attributes:
        text: token embeddings [B, L, D].
        pooled: pooled text [B, P].
        time_ids: size ids, float [B, 6].
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor

    def concat(self, other: Conditions) -> Conditions:
        """These rows, then the rows of `other`."""
        return Conditions(
            text=torch.cat([self.text, other.text]),
            pooled=torch.cat([self.pooled, other.pooled]),
            time_ids=torch.cat([self.time_ids, other.time_ids]),
        )

    def to(self, dtype: torch.dtype) -> Conditions:
        """Embeddings in another dtype; the size ids stay in float32, since half precision rounds 1023."""
        return Conditions(text=self.text.to(dtype), pooled=self.pooled.to(dtype), time_ids=self.time_ids)


def prompt_conditions(
    prior: Prior, prompts: Sequence[str], size: tuple[int, int], device: torch.device, chunks: int = 1
) -> Conditions:
    """Conditions of prompts for whole pictures (or tiles) of one size.

    Args:
        size: (height, width) in pixels: original and target size of the size ids, with the crop at (0, 0).
        device: of the results.
        chunks: pieces of the text encoders' length in which all prompts are encoded, see Prior.embed_long_prompts.
    """
    text, pooled = prior.embed_long_prompts(prompts, chunks)
    sizes = torch.tensor([[*size, 0, 0, *size]]).expand(len(prompts), -1)
    return Conditions(text=text.to(device), pooled=pooled.to(device), time_ids=sizes.to(device, torch.float32))
