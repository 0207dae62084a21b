"""Latents and prompts of a batch: what it brings along, else what the prior's encoders make of it.

What is brought along was rounded to float16 (relative 2**-11), and so is all that is made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.objectives.diffusion import replace_rows

if TYPE_CHECKING:
    from components.priors.sdxl import Prior
    from components.types import Batch


@torch.no_grad()
def clean_latents(prior: Prior, batch: Batch, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Scaled latents of the targets [B, C, h, w]; only rows that bring none are encoded.

    Args:
        encode: instead of Prior.encode, for example compiled.
    """
    encode = encode or prior.encode
    if batch.latents is None:
        return encode(batch.hq)
    if not batch.latents_missing:
        return batch.latents
    rows = torch.tensor(list(batch.latents_missing), device=batch.hq.device)
    return batch.latents.index_copy(0, rows, encode(batch.hq[rows]).to(batch.latents.dtype))


@torch.no_grad()
def embedded_prompts(
    prior: Prior, batch: Batch, dropped: Tensor, nothing: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, L, D] and pooled embeddings [B, P] of a batch that brings embeddings along.

    Args:
        dropped: bool [B], rows that get the empty prompt.
        nothing: its embeddings [1, L, D] and [1, P], see `embed_nothing`.

    Returns:
        The batch's own; only rows that bring none, and are not dropped, go through the text encoders.
    """
    found = [batch.embeddings["text"], batch.embeddings["pooled"]]
    gone = dropped.tolist()
    asked = [row for row in batch.embeddings_missing if not gone[row]]
    if asked:
        rows = torch.tensor(asked, device=found[0].device)
        fresh = prior.embed_prompts([batch.prompts[row] for row in asked])
        found = [old.index_copy(0, rows, new.to(old.dtype)) for old, new in zip(found, fresh, strict=True)]
    made = [replace_rows(old, new.to(old.dtype), dropped) for old, new in zip(found, nothing, strict=True)]
    return made[0], made[1]


@torch.no_grad()
def embed_nothing(prior: Prior) -> tuple[Tensor, Tensor]:
    """The empty prompt's embeddings [1, L, D] and [1, P] in full precision, whatever stands around the call."""
    with torch.autocast(prior.device.type, enabled=False):
        return prior.embed_prompts([""])


def repeated(nothing: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Embeddings of one prompt for that many rows; views."""
    return nothing[0].expand(rows, -1, -1), nothing[1].expand(rows, -1)
