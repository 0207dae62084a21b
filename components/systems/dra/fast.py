"""The fast path of DRA's networks: the same results with less compute, for many calls with the same conditions.

`FastDra` and `FastTokenDra` belong to a bundle with fixed weights; `FastRun` and `FastTokenRun` to one run, whose
conditions stay the same. See priors/fast_unet.py and priors/fast_mmdit.py for what they keep. Adapters and denoiser are
one call, so one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from components.priors.conditions import Conditions, SizedConditions
from components.priors.fast_mmdit import FastMMDiT, ModulatedBlocks, derive_mmdit, modulated_block
from components.priors.fast_unet import (
    Cache,
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
from components.priors.unet_walk import Context, Inputs, walk_unet
from components.systems.dra.adapters import (
    AdapterBlocks,
    AdapterJoins,
    RunAdapter,
    TokenAdapterJoins,
    TokenAdapters,
    UnetAdapters,
    run_adapter,
)
from components.systems.dra.network import Dra
from components.systems.dra.tokens import TokenDra


class FastDra(FastAutoencoder):
    """The fast path of one bundle (see the module's docstring).

    Args:
        network: frozen bundle, on its device and in its precision; its weights must not change, unless `speed.join` is
            off. With a LoRA that is not merged nothing is fused, since the weights of its layers lack the LoRA's part.
        speed: settings; None for the defaults.
        like: the fast path of another bundle on the same prior with the same settings: what is derived from the prior
            is there once. The weights of the prior may then change in place between runs.
        resident: whether other bundles will share it.
    """

    def __init__(
        self, network: Dra, speed: Speed | None = None, like: FastDra | None = None, resident: bool = False
    ) -> None:
        self.network, self.speed = network, speed or Speed()
        super().__init__(network.prior, self.speed)
        self.channels_last = self.speed.uses_channels_last(network.prior.device)
        if self.channels_last:
            for module in (network.prior.unet, network.adapters, network.prior.autoencoder, network.encoder):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        assert isinstance(network.adapters, UnetAdapters), "a ControlNet has no fast path"
        self.adapters = network.adapters
        if like is not None:
            self.unet: Walkable = like.unet
            self.adapter_block: RunAdapter = like.adapter_block
            self._decode, self._encode = like._decode, like._encode
        else:
            blocks, join = self.speed.blocks(AdapterBlocks()), self.speed.join and not network.lora
            self.adapter_block = blocks.adapter
            self.unet = derive(network.prior.unet, self.speed.walk(walk_unet, blocks), join, replace=resident)
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


# --- of an MM-DiT -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastTokenBlocks(ModulatedBlocks):
    """The block functions of the MM-DiT's fast walk and of the adapters, plain or compiled."""

    modulated: Callable[..., tuple[Tensor, Tensor]] = modulated_block
    adapter: RunAdapter = run_adapter


class FastTokenDra(FastAutoencoder):
    """The fast path of one bundle on an MM-DiT; arguments as in FastDra. Its blocks compile, not the whole."""

    def __init__(
        self, network: TokenDra, speed: Speed | None = None, like: FastTokenDra | None = None, resident: bool = False
    ) -> None:
        self.network, self.speed = network, speed or Speed()
        super().__init__(network.prior, self.speed)
        assert isinstance(network.adapters, TokenAdapters), "a ControlNet has no fast path"
        self.adapters = network.adapters
        if like is not None:
            self.mmdit: FastMMDiT = like.mmdit
            self.blocks: FastTokenBlocks = like.blocks
            self._decode, self._encode = like._decode, like._encode
        else:
            self.mmdit = derive_mmdit(network.prior.network, self.speed.join and not network.lora, resident)
            self.blocks = self.speed.blocks(FastTokenBlocks())
        self.graphs = GraphCalls(network.prior.device, self.speed.uses_graphs)

    def run(self) -> FastTokenRun:
        """A new object for one run, with empty caches."""
        return FastTokenRun(self)


class FastTokenRun:
    """One run of a FastTokenDra. Pass the same Conditions object in every step, and do not change its tensors.

    All tiles of a step pass the same object for the times: its modulations are then computed once.
    """

    def __init__(self, fast: FastTokenDra) -> None:
        self.fast = fast
        self._caches = ConditionCache()
        self._step: tuple[Tensor, Cache, Sequence[Tensor]] | None = None

    def features(self, lq: Tensor) -> list[Tensor]:
        """See TokenAdapters.features."""
        return self.fast.adapters.features(lq)

    def predict_velocity(
        self, latents: Tensor, times: Tensor, features: Sequence[Tensor], conditions: Conditions
    ) -> Tensor:
        """See TokenDra.predict_velocity."""
        fast, cache = self.fast, self._caches.of(conditions)
        assert conditions.pooled is not None, "of an MM-DiT"
        constant = cache.once("text", lambda: [fast.mmdit.embed_text(conditions.text)])
        if self._step is None or self._step[0] is not times or self._step[1] is not cache:
            self._step = (times, cache, self._modulations(times, cache, conditions))
        # tiles share the conditions but no features, so features count as changing
        changing = [latents.to(fast.mmdit.dtype), *self._step[2], *features]
        (velocity,) = fast.graphs("step", partial(_token_step, fast), changing, constant)
        return cast(Tensor, velocity).to(latents.dtype)

    def _modulations(self, times: Tensor, cache: Cache, conditions: Conditions) -> list[Tensor]:
        """The denoiser's modulations [H B, M], and each adapter's shift [H B, C]."""
        mmdit, pooled = self.fast.mmdit, conditions.pooled
        assert pooled is not None, "of an MM-DiT"
        own = cache.once("pooled", lambda: mmdit.embed_pooled(pooled))
        steps = times.repeat(len(own) // len(times)) * self.fast.network.prior.schedule.num_train_timesteps
        embedding = mmdit.embed_times(steps) + own
        return [mmdit.project(embedding), *self.fast.adapters.shifts(embedding)]


def _token_step(fast: FastTokenDra, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Sequence[Tensor]:
    """One call: noisy latents, modulations, the adapters' shifts, LQ features; the embedded text."""
    latents, modulations, *rest = changing
    count = len(fast.adapters.adapters)
    joins = TokenAdapterJoins(fast.adapters, rest[count:], rest[:count], fast.blocks.adapter)
    return (fast.mmdit.walk(latents, constant[0], modulations, joins, fast.blocks),)
