"""The conditions of a denoiser, one type for all families, and the arguments that diffusers' networks take of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions of a network for B samples.

    Attributes:
        text: token embeddings [B, L, D].
        mask: [B, L], 1 for a token and 0 for padding; None: all are tokens.
        pooled: pooled text [B, P], for the shapes of SDXL and SD3.
        time_ids: size ids float [B, 6] (original h, w, crop top, left, target h, w) in pixels, for SDXL's shape and for
            DiTs that take their resolution.
        image: picture embeddings [B, D], for networks with an IP-Adapter; other networks ignore them.
    """

    text: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in tensors.items() if value is not None}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    def cast(self, dtype: torch.dtype) -> Self:
        """Embeddings in another dtype; mask and size ids keep theirs, since half precision rounds 1023."""
        kept = ("mask", "time_ids")
        return replace(self, **{name: v.to(dtype) for name, v in self.tensors().items() if name not in kept})

    def expand(self, batch: int) -> Self:
        """Conditions of one sample for `batch` samples, without a copy."""
        return replace(self, **{n: v.expand(batch, *v.shape[1:]) for n, v in self.tensors().items()})

    def row(self, index: int) -> Self:
        """Conditions of one sample, each tensor with one row."""
        return replace(self, **{n: v[index : index + 1] for n, v in self.tensors().items()})

    def with_sizes(self, time_ids: Tensor) -> Self:
        """The same text with other size ids [B, 6]."""
        return replace(self, time_ids=time_ids)

    def replace_rows(self, other: Conditions, rows: Tensor) -> Self:
        """Rows of `other` (B samples or one) where bool [B] `rows` is true, else of this: prompt dropout."""
        return replace(
            self,
            **{
                name: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), other.tensors()[name], value)
                for name, value in self.tensors().items()
            },
        )


@dataclass(frozen=True, kw_only=True)
class SizedConditions(Conditions):
    """Conditions of an SDXL-shaped UNet: pooled text and size ids are always there."""

    pooled: Tensor
    time_ids: Tensor


AnyConditions = TypeVar("AnyConditions", bound=Conditions)


def join(parts: Sequence[AnyConditions]) -> AnyConditions:
    """Concatenate along the batch: guidance calls the network once for both halves."""
    return replace(
        parts[0], **{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()}
    )


class NetworkInputs(Protocol):
    """Conditions -> a network's arguments by name, besides the latents and the time step."""

    def __call__(self, network: nn.Module, conditions: Conditions, dtype: torch.dtype) -> dict[str, Any]: ...


def cross_attention_inputs(network: nn.Module, conditions: Conditions, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a UNet2DConditionModel or a PixArtTransformer2DModel; its configuration says which it needs.

    Args:
        network: takes the text by cross-attention.
        conditions: of B samples.
        dtype: of the network's weights.

    Raises:
        ValueError: a condition that the network needs is missing.
    """
    arguments: dict[str, Any] = {"encoder_hidden_states": conditions.text.to(dtype)}
    if conditions.mask is not None:
        arguments["encoder_attention_mask"] = conditions.mask.to(dtype)
    added = _size_conditions(network, conditions, dtype)
    # an attribute, not an item: diffusers marks a loaded adapter so
    if getattr(network.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        if conditions.image is None:
            raise ValueError("a network with an IP-Adapter needs picture embeddings with the conditions")
        added = {**(added or {}), "image_embeds": [conditions.image.to(dtype)[:, None]]}
    return arguments if added is None else {**arguments, "added_cond_kwargs": added}


def _size_conditions(network: nn.Module, conditions: Conditions, dtype: torch.dtype) -> dict[str, Any] | None:
    """The inputs of the network's time embedding other than the time step; None if it has none."""
    if getattr(network, "use_additional_conditions", False):
        if conditions.time_ids is None:
            raise ValueError("this DiT takes its resolution: give size ids with the conditions")
        size = conditions.time_ids[:, 4:6].to(dtype)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    if network.config.get("addition_embed_type") == "text_time":  # type: ignore[union-attr, operator]
        if conditions.pooled is None or conditions.time_ids is None:
            raise ValueError("a UNet of SDXL's shape needs pooled text and size ids with the conditions")
        return {"text_embeds": conditions.pooled.to(dtype), "time_ids": conditions.time_ids}
    return None
