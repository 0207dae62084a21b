"""The fast path of SDXL-shaped UNets and of copies of their compression path: the same results with less compute.

What depends on the weights alone is computed once for a network (`Walkable`: fused weight matrices, compiled blocks).
What depends on a run's conditions is computed once for a run (`ConditionCache`: keys and values of the text, the
embedding of pooled text and sizes). Each step then computes only the embedding of the time step and the blocks. On a
GPU each call may be one CUDA graph. Systems build their own fast path of these parts.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from components.cuda_graphs import Function, GraphedFunction, can_record
from components.options import check_choices, settings_by_name
from components.priors.autoencoder import scale_latents, unscale_latents
from components.priors.block_calls import BlockFunctions, autocast_is_on, compile_by_kind, recompute
from components.priors.tiling import LatentPrior
from components.priors.unet_walk import Blocks, resnets_of, split_heads, transformers_of

MAX_CONDITIONS = 8
"""Most conditions that a run caches values for; the least recently used is dropped. A step uses at most three."""

SomeBlocks = TypeVar("SomeBlocks", bound=BlockFunctions)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Settings of the fast path. All settings give the same results up to rounding.

    Attributes:
        join: fuse the self-attentions' query, key and value weights, and all projections of the embedding, into single
            matrices (a copy of 1.5 GB for SDXL in bf16).
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
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Settings by name. Raises ValueError for an unknown name; it suggests the nearest one."""
        return settings_by_name(cls, settings, "speed setting")

    def uses_channels_last(self, device: torch.device) -> bool:
        """Whether the convolutions change their layout on this device."""
        return self.channels_last == "on" or (self.channels_last == "auto" and device.type != "cpu")

    @property
    def uses_graphs(self) -> bool:
        """Whether calls are captured where that is possible."""
        return self.graphs == "on" or (self.graphs == "auto" and self.compile in ("blocks", "whole"))

    def compiler(self, fullgraph: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """torch.compile with these settings; the identity with compile "off"."""
        if self.compile == "off":
            return lambda function: function
        settings: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": False, "mode": self.compile_mode or None}
        return lambda function: torch.compile(function, **settings)

    def blocks(self, plain: SomeBlocks) -> SomeBlocks:
        """Block functions compiled by kind, or recomputing in the backward pass."""
        if self.compile == "blocks":
            compiler = self.compiler()
            plain = plain.wrap_all(lambda function: compile_by_kind(function, compiler))
        return plain.wrap_all(recompute) if self.checkpoint else plain

    def walk(self, function: Callable[..., Any], blocks: Blocks) -> Callable[..., Any]:
        """A walk with these blocks, compiled as one with compile "whole"."""

        def walk_with_blocks(*arguments: Any, **options: Any) -> Any:
            return function(*arguments, **options, blocks=blocks)

        return self.compiler()(walk_with_blocks) if self.compile == "whole" else walk_with_blocks


@dataclass(frozen=True)
class Walkable:
    """A UNet or a copy with the values that are derived from its weights.

    Attributes:
        network: the module, an argument of `walk`.
        project: the embedding after SiLU [B, E] -> its shift for each resnet, then what other layers of `projections`
            make of it.
        fused: see unet_walk.Inputs.
        walk: the network's walk, plain or compiled.
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

    def own_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast is off for networks below float32: it would only cast their norms to float32 and back."""
        device = self.network.conv_in.weight.device.type
        below = self.dtype != torch.float32 and autocast_is_on(device)
        return torch.autocast(device, enabled=False) if below else contextlib.nullcontext()


class TextConditions(Protocol):
    """What every system's conditions hold: token embeddings [B, S, D], pooled text [B, P] and size ids [B, 6]."""

    @property
    def text(self) -> Tensor: ...

    @property
    def pooled(self) -> Tensor: ...

    @property
    def time_ids(self) -> Tensor: ...


@dataclass
class Cache:
    """Values computed from one conditions object; it holds the object, so that its id is not reused."""

    conditions: Any
    values: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name, made at the first call."""
        if name not in self.values:
            self.values[name] = make()
        return self.values[name]


class ConditionCache:
    """Caches by the identity of conditions. Pass the same object in every step, and do not change its tensors."""

    def __init__(self) -> None:
        self._caches: OrderedDict[int, Cache] = OrderedDict()

    def of(self, conditions: Any) -> Cache:
        """The cache of one conditions object."""
        cache = self._caches.get(id(conditions))
        if cache is None:
            cache = self._caches[id(conditions)] = Cache(conditions)
            if len(self._caches) > MAX_CONDITIONS:
                self._caches.popitem(last=False)
        self._caches.move_to_end(id(conditions))
        return cache


class GraphCalls:
    """The networks' calls by name, each as CUDA graphs if `on` and a capture is possible."""

    def __init__(self, device: torch.device, on: bool) -> None:
        self.on, self._device = on, device
        self._functions: dict[str, GraphedFunction] = {}

    def __call__(
        self,
        name: str,
        function: Function,
        changing: Sequence[Tensor],
        constant: Sequence[Tensor],
        also: Hashable = None,
    ) -> Any:
        """The results of a call; arguments as in GraphedFunction."""
        if not (self.on and can_record(self._device)):
            return function(changing, constant)
        if name not in self._functions:
            self._functions[name] = GraphedFunction(function)
        return self._functions[name](changing, constant, also)


class FastAutoencoder:
    """A prior's autoencoder, compiled if the settings say so; a tiling.LatentPrior."""

    def __init__(self, prior: LatentPrior, speed: Speed) -> None:
        self.prior, self._speed = prior, speed
        # diffusers' own forward, where a graph break costs little
        self._decode = speed.compiler(fullgraph=False)(_decode)
        self._encode = speed.compiler(fullgraph=False)(_encode)

    @property
    def autoencoder(self) -> nn.Module:
        return self.prior.autoencoder

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def factor(self) -> int:
        return self.prior.factor

    @property
    def latent_channels(self) -> int:
        return self.prior.latent_channels

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Prior.encode, compiled if `compile` is on."""
        if noise is not None or not self._compiles():
            return self.prior.encode(images, noise)
        with torch.autocast(images.device.type, enabled=False):
            return scale_latents(self.autoencoder, self._encode(self.autoencoder, images))

    def decode(self, latents: Tensor) -> Tensor:
        """Prior.decode, compiled if `compile` is on."""
        if not self._compiles():
            return self.prior.decode(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return self._decode(self.autoencoder, unscale_latents(self.autoencoder, latents))  # type: ignore[no-any-return]

    def _compiles(self) -> bool:
        """Whether the autoencoder is compiled; one with its own tiling is not."""
        autoencoder = self.autoencoder
        return self._speed.compile != "off" and isinstance(autoencoder, AutoencoderKL) and not autoencoder.use_tiling


def derive(
    network: Any,
    walk: Callable[..., Any],
    join: bool,
    layers: Sequence[nn.Linear] | None = None,
    replace: bool = False,
) -> Walkable:
    """A network with what is derived from its weights.

    Args:
        walk: see Walkable.
        join: fuse weights; a network in training is never fused, since its weights change.
        layers: layers with the embedding as input; None for the resnets' projections alone.
        replace: the network's layers become views of the fused matrices, which then take no extra memory.
    """
    layers = resnet_projections(network) if layers is None else layers
    is_frozen = not any(parameter.requires_grad for parameter in network.parameters())
    parts = _fuse_layers(network, layers, replace) if join and is_frozen else call_each_layer(network, layers)
    return Walkable(network, *parts, walk)


def resnet_projections(network: Any) -> list[Any]:
    """The layer of each resnet that takes the embedding."""
    return [resnet.time_emb_proj for resnet in resnets_of(network)]


def call_each_layer(
    network: Any, layers: Sequence[nn.Linear]
) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable that calls each layer, so that weights may change and a LoRA works."""
    return lambda embedding: [layer(embedding) for layer in layers], [None] * len(transformers_of(network))


@torch.no_grad()
def _fuse_layers(
    network: Any, layers: Sequence[nn.Linear], replace: bool
) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable with one product for all projections, and one for query, key and value."""
    weight, bias = concat_weights(layers, replace), torch.cat([layer.bias.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    fused: list[Tensor | None] = []
    for block in transformers_of(network):
        three: list[Any] = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        fused.append(concat_weights(three, replace) if all(layer.bias is None for layer in three) else None)
    return lambda embedding: F.linear(embedding, weight, bias).split(sizes, dim=-1), fused


def concat_weights(layers: Sequence[nn.Linear], replace: bool) -> Tensor:
    """The layers' weights, concatenated [sum of outputs, inputs]; with `replace` the layers become views of it."""
    matrix = torch.cat([layer.weight.detach() for layer in layers])
    if replace:
        for layer, part in zip(layers, matrix.split([layer.out_features for layer in layers]), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
    return matrix


def time_embedding(walkable: Walkable, timesteps: Tensor) -> Tensor:
    """The embedding's time term [B, E] for timesteps [B]."""
    network = walkable.network
    embedding: Tensor = network.time_embedding(network.time_proj(timesteps).to(walkable.dtype))
    return embedding


def conditions_embedding(walkable: Walkable, conditions: TextConditions) -> Tensor:
    """The embedding's term of pooled text and sizes [B, E]."""
    network = walkable.network
    sizes = network.add_time_proj(conditions.time_ids.flatten()).view(len(conditions.pooled), -1)
    embedding: Tensor = network.add_embedding(
        torch.cat([conditions.pooled, sizes.to(conditions.pooled.dtype)], dim=-1).to(walkable.dtype)
    )
    return embedding


def text_keys(walkable: Walkable, conditions: TextConditions) -> list[tuple[Tensor, Tensor]]:
    """The text's keys and values [B, heads, S, d] of each cross-attention."""
    text, keys = conditions.text.to(walkable.dtype), []
    for block in transformers_of(walkable.network):
        attention: Any = block.attn2
        heads = attention.heads
        keys.append((split_heads(attention.to_k(text), heads), split_heads(attention.to_v(text), heads)))
    return keys


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
