"""The fast path of SUPIR's networks: the same results with less compute, for many calls with the same conditions.

`FastSupir` belongs to a bundle with fixed weights; `FastRun` to one run, whose conditions stay the same. See
priors/fast_unet.py for what they keep. Control encoder and UNet are one call, so that features are not copied between
two CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.priors.fast_unet import (
    ConditionCache,
    FastAutoencoder,
    GraphCalls,
    Speed,
    Walkable,
    conditions_embedding,
    derive,
    text_keys,
    time_embedding,
)
from components.priors.unet_walk import Blocks, Context, Inputs, walk_unet
from components.systems.supir.connectors import ConnectorJoins, Scale
from components.systems.supir.control import walk_control
from components.systems.supir.network import Adaptor, Supir


class FastSupir(FastAutoencoder):
    """The fast path of one bundle (see the module's docstring).

    Args:
        network: frozen bundle with an adaptor, on its device and in its precision; its weights must not change, unless
            `speed.join` is off.
        speed: settings; None for the defaults.

    Raises:
        ValueError: there is no adaptor.
    """

    def __init__(self, network: Supir, speed: Speed | None = None) -> None:
        if network.adaptor is None:
            raise ValueError("the fast path needs a network with an adaptor")
        self.network, self.speed = network, speed or Speed()
        super().__init__(network.prior, self.speed)
        self.adaptor: Adaptor = network.adaptor
        self.channels_last = self.speed.uses_channels_last(network.prior.device)
        if self.channels_last:
            for module in (network.prior.unet, self.adaptor, network.prior.autoencoder, network.encoder):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        blocks, join = self.speed.blocks(Blocks()), self.speed.join
        self.control = derive(self.adaptor.control, self.speed.walk(walk_control, blocks), join)
        self.unet = derive(network.prior.unet, self.speed.walk(walk_unet, blocks), join)
        self.graphs = GraphCalls(network.prior.device, self.speed.uses_graphs)

    def run(self) -> FastRun:
        """A new object for one run, with empty caches."""
        return FastRun(self)


class FastRun:
    """One run of a FastSupir. Pass the same SizedConditions object in every step, and do not change its tensors."""

    def __init__(self, fast: FastSupir) -> None:
        self.fast = fast
        self._caches = ConditionCache()

    def predict_eps(
        self, latents: Tensor, timesteps: Tensor, lq: Tensor, conditions: SizedConditions, scale: Scale = 1.0
    ) -> Tensor:
        """See Supir.predict_eps."""
        fast, timesteps = self.fast, timesteps.expand(len(latents))
        with fast.unet.own_precision():
            embeddings = [self._embedding(walkable, timesteps, conditions) for walkable in (fast.control, fast.unet)]
            changing = [*embeddings, *(self._layout(x) for x in (lq, latents))]
            number = None if isinstance(scale, Tensor) else float(scale)
            if isinstance(scale, Tensor):  # it differs from step to step, so it is an input and no part of the graph
                changing.append(scale.to(fast.control.dtype).reshape(1))
            constant = self._caches.of(conditions).once("keys", lambda: self._keys(conditions))
            (eps,) = fast.graphs("step", partial(_step, fast, number), changing, constant, number)
        return eps.to(latents.dtype)  # type: ignore[no-any-return]

    def _embedding(self, walkable: Walkable, timesteps: Tensor, conditions: SizedConditions) -> Tensor:
        """The embedding [B, E] after SiLU."""
        name = "control embedding" if walkable is self.fast.control else "unet embedding"
        constant = self._caches.of(conditions).once(name, lambda: conditions_embedding(walkable, conditions))
        return F.silu(time_embedding(walkable, timesteps) + constant)

    def _keys(self, conditions: SizedConditions) -> list[Tensor]:
        """Keys and values of all cross-attentions, the control encoder's first, in one list."""
        walkables = (self.fast.control, self.fast.unet)
        return [tensor for walkable in walkables for pair in text_keys(walkable, conditions) for tensor in pair]

    def _layout(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.fast.control.dtype)
        return latents.contiguous(memory_format=torch.channels_last) if self.fast.channels_last else latents


def _step(
    fast: FastSupir, number: float | None, changing: Sequence[Tensor], constant: Sequence[Tensor]
) -> Sequence[Tensor]:
    """One call of control encoder and UNet: both embeddings, LQ and noisy latents, scale if it is no number."""
    control, embedding, lq, latents, *rest = changing
    count = 2 * len(fast.control.fused)
    features = fast.control.walk(fast.control.network, lq, latents, _inputs(fast.control, control, constant[:count]))
    scale: Any = rest[0] if number is None else number
    joins = ConnectorJoins(fast.adaptor.connectors, fast.adaptor.places, features, scale)
    inputs = _inputs(fast.unet, embedding, constant[count:])
    return (fast.unet.walk(fast.unet.network, latents.to(fast.unet.dtype), inputs, joins),)


def _inputs(walkable: Walkable, embedding: Tensor, keys: Sequence[Tensor]) -> Inputs:
    """A walk's inputs from the embedding after SiLU and the keys and values of its cross-attentions."""
    contexts = [Context(*keys[2 * i : 2 * i + 2]) for i in range(len(walkable.fused))]
    return Inputs(list(walkable.project(embedding)), contexts, walkable.fused)
