"""The fast path of DRA's networks: the same results with less compute, for many calls with the same conditions.

`FastDra` belongs to a bundle with fixed weights; `FastRun` to one run, whose conditions stay the same. See
priors/fast_unet.py for what they keep. Adapters and UNet are one call, so one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.priors.fast_unet import (
    ConditionCache,
    FastAutoencoder,
    GraphCalls,
    Speed,
    conditions_embedding,
    derive,
    text_keys,
    time_embedding,
)
from components.priors.unet_walk import Context, Inputs, walk_unet
from components.systems.dra.adapters import AdapterBlocks, AdapterJoins, UnetAdapters
from components.systems.dra.network import Dra


class FastDra(FastAutoencoder):
    """The fast path of one bundle (see the module's docstring).

    Args:
        network: frozen bundle, on its device and in its precision; its weights must not change, unless `speed.join` is
            off. With a LoRA that is not merged nothing is fused, since the weights of its layers lack the LoRA's part.
        speed: settings; None for the defaults.
    """

    def __init__(self, network: Dra, speed: Speed | None = None) -> None:
        self.network, self.speed = network, speed or Speed()
        super().__init__(network.prior, self.speed)
        self.channels_last = self.speed.uses_channels_last(network.prior.device)
        if self.channels_last:
            for module in (network.prior.unet, network.adapters, network.prior.autoencoder, network.encoder):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert isinstance(network.adapters, UnetAdapters), "a ControlNet has no fast path"
        self.adapters = network.adapters
        blocks = self.speed.blocks(AdapterBlocks())
        self.adapter_block = blocks.adapter
        self.unet = derive(network.prior.unet, self.speed.walk(walk_unet, blocks), self.speed.join and not network.lora)
        self.graphs = GraphCalls(network.prior.device, self.speed.uses_graphs)

    def run(self) -> FastRun:
        """A new object for one run, with empty caches."""
        return FastRun(self)


class FastRun:
    """One run of a FastDra. Pass the same SizedConditions object in every step, and do not change its tensors."""

    def __init__(self, fast: FastDra) -> None:
        self.fast = fast
        self._caches = ConditionCache()

    def features(self, lq: Tensor) -> list[Tensor]:
        """See UnetAdapters.features."""
        with self.fast.unet.own_precision():
            return self.fast.adapters.features(self._layout(lq.to(self.fast.adapters.dtype)))

    def predict_eps(
        self, latents: Tensor, timesteps: Tensor, features: Sequence[Tensor], conditions: SizedConditions
    ) -> Tensor:
        """See Dra.predict_eps."""
        fast = self.fast
        with fast.unet.own_precision():
            cache = self._caches.of(conditions)
            constant = cache.once("keys", lambda: [t for pair in text_keys(fast.unet, conditions) for t in pair])
            embedding = time_embedding(fast.unet, timesteps.expand(len(latents))) + cache.once(
                "embedding", lambda: conditions_embedding(fast.unet, conditions)
            )
            # tiles share the conditions but no features, so features count as changing
            changing = [embedding, self._layout(latents.to(fast.unet.dtype)), *features]
            (eps,) = fast.graphs("step", partial(_step, fast), changing, constant)
        return cast(Tensor, eps).to(latents.dtype)

    def _layout(self, latents: Tensor) -> Tensor:
        return latents.contiguous(memory_format=torch.channels_last) if self.fast.channels_last else latents


def _step(fast: FastDra, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Sequence[Tensor]:
    """One call: the whole embedding before SiLU, noisy latents, LQ features; keys and values of the text."""
    embedding, latents, *features = changing
    adapters = fast.adapters
    joins = AdapterJoins(adapters, features, adapters.shifts(embedding), fast.adapter_block)
    contexts = [Context(*constant[2 * i : 2 * i + 2]) for i in range(len(fast.unet.fused))]
    inputs = Inputs(list(fast.unet.project(F.silu(embedding))), contexts, fast.unet.fused)
    return (fast.unet.walk(fast.unet.network, latents, inputs, joins),)
