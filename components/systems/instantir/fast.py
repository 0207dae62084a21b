"""The fast path of InstantIR's networks: the same results with less compute, for many calls with the same conditions.

There are two objects. `FastInstantIR` belongs to a bundle with fixed weights and holds all values that depend on the
weights alone: the UNet without LoRA wrappers (with the bundle's own parameters), a second UNet with the Previewer
merged in where memory allows, fused weight matrices, compiled blocks. `FastRun` belongs to one run (a picture, a batch,
all tiles of a picture) and holds all values that depend on its conditions: text keys and values of every
cross-attention, the Resampler's tokens, the picture's keys and values before modulation, the embedding of pooled text
and sizes. Each step then computes only the modulation by time. A run has the methods preview, residuals and denoise_eps
of InstantIR, so a denoiser takes either.

The bundle's modules do not change, apart from the convolutions' memory layout with channels_last.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.objectives.consistency import consistency_output
from components.priors import fast_unet
from components.priors.fast_unet import (
    ConditionCache,
    FastAutoencoder,
    GraphCalls,
    Walkable,
    call_each_layer,
    conditions_embedding,
    derive,
    resnet_projections,
    text_keys,
    time_embedding,
)
from components.priors.sdxl import Prior
from components.priors.unet_walk import Context, Inputs, check_walkable, transformers_of
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.perceptor import layer_norm
from components.systems.instantir.previewer import each_previewer_delta, lora_layers, previewer_enabled
from components.systems.instantir.walk import AggregatorBlocks, walk_aggregator, walk_unet_with_residuals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""Attributes of a module that copy.copy would share with the copy."""


@dataclass(frozen=True, kw_only=True)
class Speed(fast_unet.Speed):
    """Settings of the fast path, see fast_unet.Speed.

    Attributes:
        merge_previewer: "on" holds a second copy of the layers that the LoRA changes, with the LoRA merged in; "off"
            switches the LoRA on and off in one UNet; "auto" merges if the copy takes at most half of the device's free
            memory (a quarter of the machine's on a CPU). Below float32 a merged weight is rounded once. The merged UNet
            needs no copy for `join`.

    Raises:
        ValueError: a value is outside its set.
    """

    merge_previewer: Literal["auto", "on", "off"] = "auto"


class FastInstantIR(FastAutoencoder):
    """The fast path of one bundle (see the module's docstring).

    Args:
        network: frozen bundle on its device and in its precision. Its perceptor, previewer and UNet must not change
            (make another object after loading weights). An aggregator in training is used with its current weights.
        speed: settings; None for the defaults.

    Attributes:
        merged: whether the Previewer is merged.

    Raises:
        ValueError: the UNet's blocks differ from SDXL's.
    """

    def __init__(self, network: InstantIR, speed: Speed | None = None) -> None:
        self.network, self.speed = network, speed or Speed()
        super().__init__(network.prior, self.speed)
        check_walkable(network.unet)
        self._lora_names = tuple(lora_layers(network.unet)) if network.has_previewer else ()
        device = network.prior.device
        self.channels_last = self.speed.uses_channels_last(device)
        if self.channels_last:
            for module in (network.unet, network.aggregator, network.prior.autoencoder):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        blocks = self.speed.blocks(AggregatorBlocks())
        self._walk_unet = self.speed.walk(walk_unet_with_residuals, blocks)
        self._walk_aggregator = self.speed.walk(walk_aggregator, blocks)
        self.base = self._derive(bare_unet(network.unet), self._walk_unet)
        self.merged = network.has_previewer and self._merges(device)
        self.previewer = self._previewer() if network.has_previewer else None
        self.aggregator = None
        if network.aggregator is not None:
            self.aggregator = self._derive(network.aggregator, self._walk_aggregator)
        self.graphs = GraphCalls(device, self.speed.uses_graphs)

    def run(self) -> FastRun:
        """A new object for one run, with empty caches."""
        return FastRun(self)

    def _merges(self, device: torch.device) -> bool:
        if self.speed.merge_previewer != "auto":
            return self.speed.merge_previewer == "on"
        return merged_bytes(self.network.unet) <= memory_to_spare(device)

    def _previewer(self) -> Walkable:
        unet = self.network.unet
        if self.merged:
            return self._derive(merged_unet(unet, self.channels_last), self._walk_unet, replace=True)
        # with LoRA wrappers: neither fused nor compiled, since the wrappers choose their computation in Python
        parts = call_each_layer(unet, _projections(unet))
        return Walkable(unet, *parts, walk_unet_with_residuals, lambda: previewer_enabled(unet))

    def _derive(self, network: Any, walk: Any, replace: bool = False) -> Walkable:
        return derive(network, walk, self.speed.join, _projections(network), replace)

    def lora_covers(self, parts: tuple[str, ...]) -> bool:
        """Whether the LoRA changes a layer whose name contains one of `parts`."""
        return any(part in f".{name}." for name in self._lora_names for part in parts)


class FastRun:
    """One run of a FastInstantIR: the three calls of a step, with a cache of the values that depend on the conditions.

    The cache identifies conditions by object identity. Pass the same object in every step, and do not change its
    tensors in place. Results have the precision of the latents, whatever the networks' precision. Gradients pass only
    through `latents`, `preview` and `residuals`.
    """

    def __init__(self, fast: FastInstantIR) -> None:
        self.fast, self.network = fast, fast.network
        self._caches = ConditionCache()
        self._last: tuple[Tensor, Conditions, Tensor] | None = None

    @property
    def prior(self) -> Prior:
        """The bundle's prior."""
        return self.network.prior

    def unconditional(self, conditions: Conditions, negative_prompts: list[str]) -> Conditions:
        """See InstantIR.unconditional."""
        return self.network.unconditional(conditions, negative_prompts)

    def denoise_eps(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, residuals: Residuals | None = None
    ) -> Tensor:
        """See InstantIR.denoise_eps."""
        return self._predict(self.fast.base, latents, timesteps, conditions, residuals)

    def preview(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See InstantIR.preview. Raises ValueError if there is no previewer."""
        if self.fast.previewer is None:
            raise ValueError("the network has no previewer")
        eps = self._predict(self.fast.previewer, latents, timesteps, conditions, None)
        return consistency_output(self.prior.schedule, latents, eps, timesteps.expand(len(latents)))

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, conditions: Conditions) -> Residuals:
        """See InstantIR.residuals."""
        walkable = self.fast.aggregator
        if walkable is None:
            raise ValueError("the network has no aggregator")
        constant_part = self._caches.of(conditions).once(
            "aggregator embedding", lambda: conditions_embedding(walkable, conditions)
        )
        embedding = F.silu(time_embedding(walkable, timesteps.expand(len(lq))) + constant_part)
        changing = (embedding, self._layout(lq, walkable), self._layout(preview, walkable))
        *down, mid = self._call("aggregator", partial(_aggregate, walkable), changing, ())
        return Residuals(tuple(down), mid)

    def _predict(
        self,
        walkable: Walkable,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        residuals: Residuals | None,
    ) -> Tensor:
        with walkable.inside(), walkable.own_precision():
            embedding = F.silu(self._embedding(walkable, timesteps, conditions))
            changing = [embedding, self._layout(latents, walkable)]
            if residuals is not None:
                residuals = residuals.to(walkable.dtype)
                changing += [*residuals.down, residuals.mid]
            name = "previewer" if walkable is self.fast.previewer else "base"
            cache = self._caches.of(conditions)
            constant = cache.once(f"constants {name}", lambda: self._constants(walkable, conditions))
            function = partial(_predict, walkable, self.network)
            (eps,) = self._call(name, function, changing, constant)
        return eps.to(latents.dtype)  # type: ignore[no-any-return]

    def _call(self, name: str, function: Any, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Any:
        """The results of one network's call, by a CUDA graph where that is possible."""
        return self.fast.graphs(name, function, changing, constant, self.network.time_modulation)

    def _constants(self, walkable: Walkable, conditions: Conditions) -> list[Tensor]:
        """The first four tensors of Context for each cross-attention, in one list."""
        texts, pictures = self._texts(walkable, conditions), self._pictures(walkable, conditions)
        return [tensor for text, picture in zip(texts, pictures, strict=True) for tensor in (*text, *picture)]

    def _layout(self, latents: Tensor, walkable: Walkable) -> Tensor:
        """Latents in the network's dtype and memory layout."""
        latents = latents.to(walkable.dtype)
        return latents.contiguous(memory_format=torch.channels_last) if self.fast.channels_last else latents

    def _embedding(self, walkable: Walkable, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's whole embedding [B, E]; Previewer and UNet of a step share it unless the LoRA changes it."""
        source, name = self._source(walkable, "embedding", (".time_embedding.", ".add_embedding."))
        if self._last is not None and name == "" and self._last[0] is timesteps and self._last[1] is conditions:
            return self._last[2]
        constant_part = self._caches.of(conditions).once(
            f"embedding {name}", lambda: conditions_embedding(source, conditions)
        )
        embedding = time_embedding(source, timesteps.expand(len(constant_part))) + constant_part
        if name == "":
            self._last = (timesteps, conditions, embedding)
        return embedding

    def _texts(self, walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The text's keys and values of each cross-attention; both UNets share them unless the LoRA changes them."""
        source, name = self._source(walkable, "text", (".attn2.to_k.", ".attn2.to_v."))
        return self._caches.of(conditions).once(f"text {name}", lambda: text_keys(source, conditions))

    def _pictures(self, walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The picture's normalised keys and values of each cross-attention, before modulation."""
        name = "previewer" if walkable is self.fast.previewer else ""
        return self._caches.of(conditions).once(f"picture {name}", lambda: _picture_keys(walkable, conditions))

    def _source(self, walkable: Walkable, what: str, parts: tuple[str, ...]) -> tuple[Walkable, str]:
        """(network to compute with, name in the cache): the base network unless the LoRA changes one of `parts`."""
        if walkable is self.fast.previewer and self.fast.lora_covers(parts):
            return walkable, "previewer"
        return self.fast.base, ""


def bare_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet without LoRA wrappers: new module objects with the same parameters, so no weight is copied."""
    return _without_wrappers(unet)  # type: ignore[return-value]


def _without_wrappers(module: nn.Module) -> nn.Module:
    """A copy of the module tree, with its own parameter tables, where the base layers replace peft's wrappers."""
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    bare = copy.copy(module)
    bare._parameters = dict(module._parameters)
    for name in HOOKS:  # hooks of one copy do not run in the other
        setattr(bare, name, OrderedDict(getattr(module, name)))
    bare._modules = {n: None if m is None else _without_wrappers(m) for n, m in module._modules.items()}
    return bare


@torch.no_grad()
def merged_unet(unet: UNet2DConditionModel, channels_last: bool = False) -> UNet2DConditionModel:
    """bare_unet with the LoRA merged in: only layers with the LoRA are copies.

    Sums are computed in float32 and rounded once to the weights' precision.
    """
    bare = bare_unet(unet)
    for name, delta in each_previewer_delta(unet):
        layer: Any = bare.get_submodule(name)
        weight = (layer.weight.float() + delta).to(layer.weight.dtype)
        if channels_last and weight.ndim == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return bare


def merged_bytes(unet: UNet2DConditionModel) -> int:
    """Bytes that merged_unet takes: the weights of all layers with the LoRA."""
    layers: list[Any] = [layer.get_base_layer() for layer in lora_layers(unet).values()]
    weights = [layer.weight for layer in layers]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def memory_to_spare(device: torch.device) -> int:
    """Bytes that a merged copy may take: half of a GPU's free memory, a quarter of a CPU's total, else 0."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    if device.type != "cpu":
        return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):  # some systems lack these values
        return 0


def _projections(network: Any) -> list[Any]:
    """Layers with the embedding as input: one of each resnet, then two modulations of each cross-attention."""
    layers = resnet_projections(network)
    for block in transformers_of(network):
        if block.attn2 is not None:
            processor: Any = block.attn2.processor
            layers += [processor.ln_k_ip.linear, processor.ln_v_ip.linear]
    return layers


def _predict(
    walkable: Walkable, network: InstantIR, changing: Sequence[Tensor], constant: Sequence[Tensor]
) -> Sequence[Tensor]:
    """A UNet's call: (embedding after SiLU, latents, residuals if any), FastRun._constants -> (noise,)."""
    embedding, latents, *residual_tensors = changing
    parts, count = list(walkable.project(embedding)), 2 * len(walkable.fused)
    shifts = parts[:-count]
    if not network.time_modulation:  # see PerceptorAttnProcessor: only the biases remain
        parts = list(walkable.project(torch.zeros_like(embedding)))
    modulations = parts[-count:]
    contexts = [
        Context(*constant[4 * i : 4 * i + 4], *modulations[2 * i : 2 * i + 2]) for i in range(len(walkable.fused))
    ]
    residuals = Residuals(tuple(residual_tensors[:-1]), residual_tensors[-1]) if residual_tensors else None
    return (walkable.walk(walkable.network, latents, Inputs(shifts, contexts, walkable.fused), residuals),)


def _aggregate(walkable: Walkable, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Sequence[Tensor]:
    """The aggregator's call: (embedding after SiLU, LQ latents, preview) -> residuals, the middle block's last."""
    embedding, lq, preview = changing
    inputs = Inputs(list(walkable.project(embedding)), [None] * len(walkable.fused), walkable.fused)
    residuals = walkable.walk(walkable.network, lq, preview, inputs)
    return [*residuals.down, residuals.mid]


def _picture_keys(walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
    """The picture's keys and values [B, Q, W] of each cross-attention, normalised but not modulated."""
    resampler = walkable.network.encoder_hid_proj.image_projection_layers[0]
    tokens, keys = conditions.image_tokens.to(walkable.dtype), []
    if tokens.ndim == 4:  # [B, views, N, D]: the Resampler takes each view separately
        tokens = resampler(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).flatten(1, 2)
    else:
        tokens = resampler(tokens)
    for block in transformers_of(walkable.network):
        attention: Any = block.attn2
        key, value = attention.processor.to_k_ip(tokens), attention.processor.to_v_ip(tokens)
        keys.append((layer_norm(key), layer_norm(value)))
    return keys
