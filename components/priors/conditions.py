"""The conditions of an SDXL-shaped UNet besides latents and time: texts and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
