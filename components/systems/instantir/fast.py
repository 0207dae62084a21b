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

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.cuda_graphs import Function, GraphedFunction, can_record
from components.objectives.consistency import consistency_output
from components.options import check_choices, settings_by_name
from components.priors.autoencoder import scale_latents, unscale_latents
from components.priors.block_calls import autocast_is_on, compile_by_kind, recompute
from components.priors.sdxl import Prior
from components.priors.unet_walk import Context, Inputs, check_walkable, resnets_of, split_heads, transformers_of
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.perceptor import layer_norm
from components.systems.instantir.previewer import each_previewer_delta, lora_layers, previewer_enabled
from components.systems.instantir.walk import AggregatorBlocks, walk_aggregator, walk_unet_with_residuals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""Attributes of a module that copy.copy would share with the copy."""

MAX_CONDITIONS = 8
"""Most conditions that a run caches values for; the least recently used is dropped. A step uses at most three."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Settings of the fast path. All settings give the same results up to rounding.

    Attributes:
        merge_previewer: "on" holds a second copy of the layers that the LoRA changes, with the LoRA merged in; "off"
            switches the LoRA on and off in one UNet; "auto" merges if the copy takes at most half of the device's free
            memory (a quarter of the machine's on a CPU). Below float32 a merged weight is rounded once.
        join: fuse the self-attentions' query, key and value weights, and all projections of the embedding, into single
            matrices (a copy of 1.5 GB at SDXL size in bf16; the merged UNet needs no copy).
        compile: what torch.compile compiles. "autoencoder": only the autoencoder (seconds); "blocks": also each kind of
            block of the networks (a minute or two at SDXL size); "whole": also each network as one (minutes); "off".
        compile_mode: torch.compile's mode, for example "max-autotune-no-cudagraphs"; "" for the default.
        channels_last: memory layout of the convolutions; "auto" is on for all devices but the CPU.
        checkpoint: for training: store only the blocks' inputs for the backward pass and compute the rest again; not
            with compile "whole".
        graphs: capture each network's call as a CUDA graph, so that Python launches one graph instead of thousands of
            kernels. It takes the memory of one call for each latent size. "auto": on a GPU, with compile "blocks" or
            "whole".

    Raises:
        ValueError: a value is outside its set.
    """

    merge_previewer: Literal["auto", "on", "off"] = "auto"
    join: bool = True
    compile: Literal["off", "autoencoder", "blocks", "whole"] = "off"
    compile_mode: str = ""
    channels_last: Literal["auto", "on", "off"] = "auto"
    checkpoint: bool = False
    graphs: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.checkpoint and self.compile == "whole":
            raise ValueError("checkpoint does not go with compile whole")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Speed:
        """A Speed from settings by name. Raises ValueError for an unknown name; it suggests the nearest one."""
        return settings_by_name(cls, settings, "speed setting")


@dataclass(frozen=True)
class Walkable:
    """A UNet or aggregator with the values that are derived from its weights.

    Attributes:
        network: the module, an argument of `walk`.
        project: the embedding after SiLU [B, E] -> its shift for each resnet, then the modulation of keys and of values
            [B, 2 W] for each cross-attention.
        fused: see unet_walk.Inputs.
        walk: walk_unet_with_residuals or walk_aggregator, plain or compiled.
        inside: context manager for the calls (LoRA on).
    """

    network: Any
    project: Callable[[Tensor], Sequence[Tensor]]
    fused: Sequence[Tensor | None]
    walk: Callable[..., Any]
    inside: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.conv_in.weight.dtype
        return dtype


class FastInstantIR:
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
        check_walkable(network.unet)
        self._lora_names = tuple(lora_layers(network.unet)) if network.has_previewer else ()
        device = network.prior.device
        self.channels_last = self.speed.channels_last == "on" or (
            self.speed.channels_last == "auto" and device.type != "cpu"
        )
        if self.channels_last:
            for module in (network.unet, network.aggregator, network.prior.autoencoder):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compiler = self._compiler()
        blocks = AggregatorBlocks()
        if self.speed.compile == "blocks":
            blocks = blocks.wrap_all(lambda f: compile_by_kind(f, compiler))
        if self.speed.checkpoint:
            blocks = blocks.wrap_all(recompute)

        def walk(function: Callable[..., Any]) -> Callable[..., Any]:
            def walk_with_blocks(*arguments: Any, **options: Any) -> Any:
                return function(*arguments, **options, blocks=blocks)

            return compiler(walk_with_blocks) if self.speed.compile == "whole" else walk_with_blocks

        self._walk_unet, self._walk_aggregator = walk(walk_unet_with_residuals), walk(walk_aggregator)
        self.base = self._walkable(bare_unet(network.unet), self._walk_unet)
        self.merged = network.has_previewer and self._merges(device)
        self.previewer = self._previewer() if network.has_previewer else None
        self.aggregator = None
        if network.aggregator is not None:
            self.aggregator = self._walkable(network.aggregator, self._walk_aggregator)
        # diffusers' own forward, where a graph break costs little
        self._decode = self._compiler(fullgraph=False)(_decode)
        self._encode = self._compiler(fullgraph=False)(_encode)
        self.graphs = self.speed.graphs == "on" or (
            self.speed.graphs == "auto" and self.speed.compile in ("blocks", "whole")
        )
        self._graph_functions: dict[str, GraphedFunction] = {}

    @property
    def autoencoder(self) -> nn.Module:
        """The prior's autoencoder. With the next three properties this class is a tiling.LatentPrior."""
        return self.network.prior.autoencoder

    @property
    def device(self) -> torch.device:
        return self.network.prior.device

    @property
    def factor(self) -> int:
        return self.network.prior.factor

    @property
    def latent_channels(self) -> int:
        return self.network.prior.latent_channels

    def run(self) -> FastRun:
        """A new object for one run, with empty caches."""
        return FastRun(self)

    def call(self, name: str, function: Function, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> Any:
        """The results of one network's call, by a CUDA graph if `graphs` is on and a capture is possible."""
        if not (self.graphs and can_record(self.network.prior.device)):
            return function(changing, constant)
        if name not in self._graph_functions:
            self._graph_functions[name] = GraphedFunction(function)
        return self._graph_functions[name](changing, constant, self.network.time_modulation)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Prior.encode, compiled if `compile` is on."""
        prior = self.network.prior
        if noise is not None or not self._compiles(prior.autoencoder):
            return prior.encode(images, noise)
        with torch.autocast(images.device.type, enabled=False):
            return scale_latents(prior.autoencoder, self._encode(prior.autoencoder, images))

    def decode(self, latents: Tensor) -> Tensor:
        """Prior.decode, compiled if `compile` is on."""
        prior = self.network.prior
        if not self._compiles(prior.autoencoder):
            return prior.decode(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return self._decode(prior.autoencoder, unscale_latents(prior.autoencoder, latents))

    def _compiles(self, autoencoder: nn.Module) -> bool:
        """Whether an autoencoder is compiled; one with its own tiling is not."""
        return self.speed.compile != "off" and isinstance(autoencoder, AutoencoderKL) and not autoencoder.use_tiling

    def _merges(self, device: torch.device) -> bool:
        if self.speed.merge_previewer != "auto":
            return self.speed.merge_previewer == "on"
        return merged_bytes(self.network.unet) <= memory_to_spare(device)

    def _previewer(self) -> Walkable:
        unet = self.network.unet
        if self.merged:
            return self._walkable(merged_unet(unet, self.channels_last), self._walk_unet, replace=True)
        # with LoRA wrappers: neither fused nor compiled, since the wrappers choose their computation in Python
        return Walkable(unet, *_call_each_layer(unet), walk_unet_with_residuals, lambda: previewer_enabled(unet))

    def _walkable(self, network: Any, walk: Callable[..., Any], replace: bool = False) -> Walkable:
        is_frozen = not any(parameter.requires_grad for parameter in network.parameters())
        return Walkable(
            network,
            *(_fuse_layers(network, replace) if self.speed.join and is_frozen else _call_each_layer(network)),
            walk,
        )

    def lora_covers(self, parts: tuple[str, ...]) -> bool:
        """Whether the LoRA changes a layer whose name contains one of `parts`."""
        return any(part in f".{name}." for name in self._lora_names for part in parts)

    def _compiler(self, fullgraph: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        if self.speed.compile == "off":
            return lambda function: function
        settings: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": False, "mode": self.speed.compile_mode or None}
        return lambda function: torch.compile(function, **settings)


class FastRun:
    """One run of a FastInstantIR: the three calls of a step, with a cache of the values that depend on the conditions.

    The cache identifies conditions by object identity. Pass the same object in every step, and do not change its
    tensors in place. Results have the precision of the latents, whatever the networks' precision. Gradients pass only
    through `latents`, `preview` and `residuals`.
    """

    def __init__(self, fast: FastInstantIR) -> None:
        self.fast, self.network = fast, fast.network
        self._caches: OrderedDict[int, _Cache] = OrderedDict()
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
        constant_part = self._cache(conditions).once(
            "aggregator embedding", lambda: _conditions_embedding(walkable, conditions)
        )
        embedding = F.silu(_time_embedding(walkable, timesteps.expand(len(lq))) + constant_part)
        changing = (embedding, self._layout(lq, walkable), self._layout(preview, walkable))
        *down, mid = self.fast.call("aggregator", partial(_aggregate, walkable), changing, ())
        return Residuals(tuple(down), mid)

    def _predict(
        self,
        walkable: Walkable,
        latents: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        residuals: Residuals | None,
    ) -> Tensor:
        with walkable.inside(), _own_precision(walkable):
            embedding = F.silu(self._embedding(walkable, timesteps, conditions))
            changing = [embedding, self._layout(latents, walkable)]
            if residuals is not None:
                residuals = residuals.to(walkable.dtype)
                changing += [*residuals.down, residuals.mid]
            name = "previewer" if walkable is self.fast.previewer else "base"
            constant = self._cache(conditions).once(f"constants {name}", lambda: self._constants(walkable, conditions))
            function = partial(_predict, walkable, self.network)
            (eps,) = self.fast.call(name, function, changing, constant)
        return eps.to(latents.dtype)  # type: ignore[no-any-return]

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
        constant_part = self._cache(conditions).once(
            f"embedding {name}", lambda: _conditions_embedding(source, conditions)
        )
        embedding = _time_embedding(source, timesteps.expand(len(constant_part))) + constant_part
        if name == "":
            self._last = (timesteps, conditions, embedding)
        return embedding

    def _texts(self, walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The text's keys and values of each cross-attention; both UNets share them unless the LoRA changes them."""
        source, name = self._source(walkable, "text", (".attn2.to_k.", ".attn2.to_v."))
        return self._cache(conditions).once(f"text {name}", lambda: _text_keys(source, conditions))

    def _pictures(self, walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The picture's normalised keys and values of each cross-attention, before modulation."""
        name = "previewer" if walkable is self.fast.previewer else ""
        return self._cache(conditions).once(f"picture {name}", lambda: _picture_keys(walkable, conditions))

    def _source(self, walkable: Walkable, what: str, parts: tuple[str, ...]) -> tuple[Walkable, str]:
        """(network to compute with, name in the cache): the base network unless the LoRA changes one of `parts`."""
        if walkable is self.fast.previewer and self.fast.lora_covers(parts):
            return walkable, "previewer"
        return self.fast.base, ""

    def _cache(self, conditions: Conditions) -> _Cache:
        cache = self._caches.get(id(conditions))
        if cache is None:
            cache = self._caches[id(conditions)] = _Cache(conditions)
            if len(self._caches) > MAX_CONDITIONS:
                self._caches.popitem(last=False)
        self._caches.move_to_end(id(conditions))
        return cache


@dataclass
class _Cache:
    """Values computed from one Conditions object; it holds the object, so that its id is not reused."""

    conditions: Conditions
    values: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.values:
            self.values[name] = make()
        return self.values[name]


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


def _projections(network: Any) -> list[nn.Linear]:
    """Layers with the embedding as input: one of each resnet, then two modulations of each cross-attention."""
    layers: list[Any] = [resnet.time_emb_proj for resnet in resnets_of(network)]
    for block in transformers_of(network):
        if block.attn2 is not None:
            processor: Any = block.attn2.processor
            layers += [processor.ln_k_ip.linear, processor.ln_v_ip.linear]
    return layers


def _call_each_layer(network: Any) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable that calls each layer, so that weights may change and the LoRA works."""
    layers = _projections(network)
    return lambda embedding: [layer(embedding) for layer in layers], [None] * len(transformers_of(network))


@torch.no_grad()
def _fuse_layers(network: Any, replace: bool) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable with one product for all projections, and one for query, key and value.

    With `replace`, the network's layers become views of the fused matrices, which then take no extra memory.
    """
    layers = _projections(network)
    weight, bias = _concat_weights(layers, replace), torch.cat([layer.bias.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    fused: list[Tensor | None] = []
    for block in transformers_of(network):
        three: list[Any] = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        fused.append(_concat_weights(three, replace) if all(layer.bias is None for layer in three) else None)
    return lambda embedding: F.linear(embedding, weight, bias).split(sizes, dim=-1), fused


def _concat_weights(layers: Sequence[nn.Linear], replace: bool) -> Tensor:
    """The layers' weights, concatenated [sum of outputs, inputs]; with `replace` the layers become views of it."""
    matrix = torch.cat([layer.weight.detach() for layer in layers])
    if replace:
        for layer, part in zip(layers, matrix.split([layer.out_features for layer in layers]), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
    return matrix


def _own_precision(walkable: Walkable) -> contextlib.AbstractContextManager[Any]:
    """Autocast is off for networks below float32: it would only cast their norms to float32 and back."""
    device = walkable.network.conv_in.weight.device.type
    below = walkable.dtype != torch.float32 and autocast_is_on(device)
    return torch.autocast(device, enabled=False) if below else contextlib.nullcontext()


def _decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """AutoencoderKL's decoding of unscaled latents, in their dtype, without tiling, slicing and its output class."""
    dtype, latents = latents.dtype, latents.to(autoencoder.dtype)
    if autoencoder.post_quant_conv is not None:
        latents = autoencoder.post_quant_conv(latents)
    images: Tensor = autoencoder.decoder(latents)
    return images.to(dtype)


def _encode(autoencoder: Any, images: Tensor) -> Tensor:
    """The mode of AutoencoderKL's posterior, unscaled, without tiling, slicing and its output class.

    In the pictures' dtype.
    """
    moments = autoencoder.encoder(images.to(autoencoder.dtype))
    if autoencoder.quant_conv is not None:
        moments = autoencoder.quant_conv(moments)
    mode: Tensor = moments.chunk(2, dim=1)[0].to(images.dtype)
    return mode


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


def _time_embedding(walkable: Walkable, timesteps: Tensor) -> Tensor:
    """The embedding's time term [B, E] for timesteps [B]."""
    network = walkable.network
    embedding: Tensor = network.time_embedding(network.time_proj(timesteps).to(walkable.dtype))
    return embedding


def _conditions_embedding(walkable: Walkable, conditions: Conditions) -> Tensor:
    """The embedding's term of pooled text and sizes [B, E]."""
    network = walkable.network
    sizes = network.add_time_proj(conditions.time_ids.flatten()).view(len(conditions.pooled), -1)
    embedding: Tensor = network.add_embedding(
        torch.cat([conditions.pooled, sizes.to(conditions.pooled.dtype)], dim=-1).to(walkable.dtype)
    )
    return embedding


def _text_keys(walkable: Walkable, conditions: Conditions) -> list[tuple[Tensor, Tensor]]:
    """The text's keys and values [B, heads, S, d] of each cross-attention."""
    text, keys = conditions.text.to(walkable.dtype), []
    for block in transformers_of(walkable.network):
        attention: Any = block.attn2
        heads = attention.heads
        keys.append((split_heads(attention.to_k(text), heads), split_heads(attention.to_v(text), heads)))
    return keys


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
