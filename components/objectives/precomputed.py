"""Latents and prompt embeddings of a batch: precomputed ones, otherwise from the prior's encoders.

Precomputed values were rounded to float16 (relative error 2**-11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from components.objectives.diffusion import replace_rows
from components.priors.sdxl import Prior
from components.types import Batch


class LatentEncoder(Protocol):
    """A prior of any family."""

    def encode(self, images: Tensor) -> Tensor: ...


@torch.no_grad()
def clean_latents(prior: LatentEncoder, batch: Batch, encode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Scaled latents of the targets [B, C, h, w]; only rows without precomputed latents are encoded.

    Args:
        encode: replaces the prior's, for example with a compiled version.
    """
    encode = encode or prior.encode
    if batch.latents is None:
        return encode(batch.hq)
    if not batch.latents_missing:
        return batch.latents
    rows = torch.tensor(list(batch.latents_missing), device=batch.hq.device)
    return batch.latents.index_copy(0, rows, encode(batch.hq[rows]).to(batch.latents.dtype))


@torch.no_grad()
def embed_batch_prompts(
    prior: Prior, batch: Batch, dropped: Tensor, empty: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, L, D] and pooled embeddings [B, P] of a batch with precomputed embeddings.

    Args:
        dropped: bool [B], true for rows that get the empty prompt.
        empty: embeddings of the empty prompt, [1, L, D] and [1, P], see `embed_empty_prompt`.

    Returns:
        The batch's embeddings. Only rows without embeddings that are not dropped go through the text encoders.
    """
    embeddings = [batch.embeddings["text"], batch.embeddings["pooled"]]
    is_dropped = dropped.tolist()
    missing = [row for row in batch.embeddings_missing if not is_dropped[row]]
    if missing:
        rows = torch.tensor(missing, device=embeddings[0].device)
        fresh = prior.embed_prompts([batch.prompts[row] for row in missing])
        embeddings = [old.index_copy(0, rows, new.to(old.dtype)) for old, new in zip(embeddings, fresh, strict=True)]
    results = [replace_rows(old, new.to(old.dtype), dropped) for old, new in zip(embeddings, empty, strict=True)]
    return results[0], results[1]


@torch.no_grad()
def embed_empty_prompt(prior: Prior) -> tuple[Tensor, Tensor]:
    """The empty prompt's embeddings [1, L, D] and [1, P] in full precision, also under autocast."""
    with torch.autocast(prior.device.type, enabled=False):
        return prior.embed_prompts([""])


def repeat_embeddings(embeddings: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """The embeddings of one prompt as views with `rows` rows."""
    return embeddings[0].expand(rows, -1, -1), embeddings[1].expand(rows, -1)
