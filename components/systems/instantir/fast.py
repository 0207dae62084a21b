"""InstantIR's networks made ready for many calls under the same conditions: the same numbers for less work.

Two objects. `FastInstantIR` belongs to a bundle whose weights stand still and holds what follows from the weights
alone: the UNet without LoRA wrappers (its parameters are the bundle's own), a second one with the Previewer merged in
where memory allows, joined weight matrices, compiled blocks. `FastRun` belongs to one run (a picture, a batch, all
tiles of a picture) and holds what follows from its conditions: text keys and values of every cross-attention, the
Resampler's tokens and the picture's keys and values before modulation, the embedding of pooled text and sizes. Only the
modulation by time is left to each step. A run offers preview, residuals and denoise_eps as InstantIR does, so a
denoiser takes either.

Nothing is hidden in the modules: drop the object and the bundle is as it was (but for the memory layout of its
convolutions under channels_last).
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.cuda_graphs import Function, Graphed, can_record
from components.objectives.consistency import consistency_output
from components.options import check_choices, settings_by_name
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.block_calls import autocasts, by_kind, computed_again
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.perceptor import normalised, split_heads
from components.systems.instantir.previewer import each_previewer_delta, lora_layers, previewer_enabled
from components.systems.instantir.walk import (
    Blocks,
    Context,
    Inputs,
    check_walkable,
    resnets_of,
    transformers_of,
    walk_aggregator,
    walk_unet,
)

if TYPE_CHECKING:
    from components.priors.sdxl import Prior

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""Tables of a module that copy.copy would share."""

KEPT_CONDITIONS = 8
"""Conditions whose keys and values a run keeps; the longest unused go first. A step of any mode needs at most three."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How a bundle is made fast. Results agree to rounding whatever is chosen.

    Attributes:
        merge_previewer: "on" keeps a second copy of the layers that the LoRA changes, with it merged in; "off" switches
            the LoRA on and off in the one UNet; "auto" merges where the copy takes at most half of the device's free
            memory (a quarter of the machine's on a CPU). Below float32 a merged weight is rounded once.
        join: join the self-attentions' query, key and value weights, and all projections of the embedding, into single
            matrices (a copy of 1.5 GB at SDXL size in bf16; the merged UNet's needs none).
        compile: what goes through torch.compile: "autoencoder" alone (seconds), "blocks", each kind of block of the
            networks once too (a minute or two at SDXL size), "whole", each network as one (minutes), or "off".
        compile_mode: torch.compile's mode, for example "max-autotune-no-cudagraphs"; "" for the default.
        channels_last: memory layout of the convolutions; "auto" is on wherever there is a GPU.
        checkpoint: for training: keep only the blocks' inputs for the backward pass and compute the rest again; not
            with compile "whole".
        graphs: record each network's call as a CUDA graph, so that Python starts one thing instead of thousands; costs
            the values of a call as memory for each size of latents. "auto": on a GPU with compile "blocks" or "whole".

    Raises:
        ValueError: a value outside its set.
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
    def of(cls, given: Mapping[str, Any]) -> Speed:
        """From settings by name. Raises ValueError for an unknown name, with the near one."""
        return settings_by_name(cls, given, "speed setting")


@dataclass(frozen=True)
class Walkable:
    """A UNet or aggregator with what was derived from its weights.

    Attributes:
        network: the module that is walked.
        project: the embedding after SiLU [B, E] -> its part for each resnet, then the modulation of keys and of values
            [B, 2 W] for each cross-attention.
        fused: see walk.Inputs.
        walk: walk_unet or walk_aggregator, perhaps compiled.
        inside: context in which the network is used (LoRA on).
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
    """See the module's docstring.

    Args:
        network: frozen, on its device and in its precision; its perceptor, previewer and UNet must not change any more
            (make another object after loading weights). An aggregator that trains is used as it stands at each call.
        speed: what is done.

    Attributes:
        merged: whether the Previewer is merged.

    Raises:
        ValueError: the UNet is not built as SDXL's.
    """

    def __init__(self, network: InstantIR, speed: Speed | None = None) -> None:
        self.network, self.speed = network, speed or Speed()
        check_walkable(network.unet)
        self._covered = tuple(lora_layers(network.unet)) if network.has_previewer else ()
        device = network.prior.device
        self.channels_last = self.speed.channels_last == "on" or (
            self.speed.channels_last == "auto" and device.type != "cpu"
        )
        if self.channels_last:
            for module in (network.unet, network.aggregator, network.prior.autoencoder):
                if module is not None:
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        compiler = self._compiler()
        blocks = Blocks().wrapped(lambda f: by_kind(f, compiler)) if self.speed.compile == "blocks" else Blocks()
        if self.speed.checkpoint:
            blocks = blocks.wrapped(computed_again)

        def walk(function: Callable[..., Any]) -> Callable[..., Any]:
            def walked(*arguments: Any, **named: Any) -> Any:
                return function(*arguments, **named, blocks=blocks)

            return compiler(walked) if self.speed.compile == "whole" else walked

        self._walk_unet, self._walk_aggregator = walk(walk_unet), walk(walk_aggregator)
        self.base = self._walkable(bare_unet(network.unet), self._walk_unet)
        self.merged = network.has_previewer and self._merges(device)
        self.previewer = self._previewer() if network.has_previewer else None
        self.aggregator = None
        if network.aggregator is not None:
            self.aggregator = self._walkable(network.aggregator, self._walk_aggregator)
        self._decode = self._compiler(fullgraph=False)(_decode)  # diffusers' own forward: a break costs little
        self._encode = self._compiler(fullgraph=False)(_encode)
        self.graphs = self.speed.graphs == "on" or (
            self.speed.graphs == "auto" and self.speed.compile in ("blocks", "whole")
        )
        self._graphed: dict[str, Graphed] = {}

    @property
    def autoencoder(self) -> nn.Module:
        """The prior's, as are the next three: a tiling.LatentPrior."""
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
        """An object for one run, empty at first."""
        return FastRun(self)

    def call(self, name: str, function: Function, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> Any:
        """The results of one network's call, recorded where that is wanted and possible."""
        if not (self.graphs and can_record(self.network.prior.device)):
            return function(changing, standing)
        if name not in self._graphed:
            self._graphed[name] = Graphed(function)
        return self._graphed[name](changing, standing, self.network.time_modulation)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """As Prior.encode, compiled with the rest."""
        prior = self.network.prior
        if noise is not None or not self._compiles(prior.autoencoder):
            return prior.encode(images, noise)
        with torch.autocast(images.device.type, enabled=False):
            return self._encode(prior.autoencoder, images) * prior.autoencoder.config["scaling_factor"]  # type: ignore

    def decode(self, latents: Tensor) -> Tensor:
        """As Prior.decode, compiled with the rest."""
        prior = self.network.prior
        if not self._compiles(prior.autoencoder):
            return prior.decode(latents)
        return self._decode(prior.autoencoder, latents / prior.autoencoder.config["scaling_factor"])  # type: ignore[index]

    def _compiles(self, autoencoder: nn.Module) -> bool:
        """Whether an autoencoder is compiled: one that tiles by itself is left to do so."""
        return self.speed.compile != "off" and isinstance(autoencoder, AutoencoderKL) and not autoencoder.use_tiling

    def _merges(self, device: torch.device) -> bool:
        if self.speed.merge_previewer != "auto":
            return self.speed.merge_previewer == "on"
        return merged_bytes(self.network.unet) <= memory_to_spare(device)

    def _previewer(self) -> Walkable:
        unet = self.network.unet
        if self.merged:
            return self._walkable(merged_unet(unet, self.channels_last), self._walk_unet, owned=True)
        # with the wrappers in place: neither joined nor compiled, since the wrappers decide in Python what they do
        return Walkable(unet, *_apart(unet), walk_unet, lambda: previewer_enabled(unet))

    def _walkable(self, network: Any, walk: Callable[..., Any], owned: bool = False) -> Walkable:
        still = not any(parameter.requires_grad for parameter in network.parameters())
        return Walkable(network, *(_joined(network, owned) if self.speed.join and still else _apart(network)), walk)

    def lora_covers(self, parts: tuple[str, ...]) -> bool:
        """Whether the LoRA changes a layer whose name holds one of `parts`."""
        return any(part in f".{name}." for name in self._covered for part in parts)

    def _compiler(self, fullgraph: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        if self.speed.compile == "off":
            return lambda function: function
        settings: dict[str, Any] = {"fullgraph": fullgraph, "dynamic": False, "mode": self.speed.compile_mode or None}
        return lambda function: torch.compile(function, **settings)


class FastRun:
    """One run's share of a FastInstantIR: the three calls of a step, with what its conditions settle kept.

    Conditions are recognised by identity, and their tensors must not be changed in place: hand in the same object in
    every step. Latents come and go in their own precision, whatever the networks'. Gradients pass through `latents`,
    `preview` and `residuals` only.
    """

    def __init__(self, fast: FastInstantIR) -> None:
        self.fast, self.network = fast, fast.network
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._last: tuple[Tensor, Conditions, Tensor] | None = None

    @property
    def prior(self) -> Prior:
        """The bundle's."""
        return self.network.prior

    def unconditional(self, given: Conditions, negative_prompts: list[str]) -> Conditions:
        """As InstantIR.unconditional."""
        return self.network.unconditional(given, negative_prompts)

    def denoise_eps(
        self, latents: Tensor, timesteps: Tensor, given: Conditions, residuals: Residuals | None = None
    ) -> Tensor:
        """As InstantIR.denoise_eps."""
        return self._predict(self.fast.base, latents, timesteps, given, residuals)

    def preview(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        """As InstantIR.preview. Raises ValueError where there is no previewer."""
        if self.fast.previewer is None:
            raise ValueError("the network has no previewer")
        eps = self._predict(self.fast.previewer, latents, timesteps, given, None)
        return consistency_output(self.prior.schedule, latents, eps, timesteps.expand(len(latents)))

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, given: Conditions) -> Residuals:
        """As InstantIR.residuals."""
        walkable = self.fast.aggregator
        if walkable is None:
            raise ValueError("the network has no aggregator")
        added = self._keep(given).once("added to aggregator", lambda: _added(walkable, given))
        embedded = F.silu(_time(walkable, timesteps.expand(len(lq))) + added)
        changing = (embedded, self._layout(lq, walkable), self._layout(preview, walkable))
        *down, mid = self.fast.call("aggregator", partial(_aggregate, walkable), changing, ())
        return Residuals(tuple(down), mid)

    def _predict(
        self, walkable: Walkable, latents: Tensor, timesteps: Tensor, given: Conditions, residuals: Residuals | None
    ) -> Tensor:
        with walkable.inside(), _own_precision(walkable):
            embedded = F.silu(self._embedding(walkable, timesteps, given))
            changing = [embedded, self._layout(latents, walkable)]
            if residuals is not None:
                residuals = residuals.to(walkable.dtype)
                changing += [*residuals.down, residuals.mid]
            name = "previewer" if walkable is self.fast.previewer else "base"
            standing = self._keep(given).once(f"standing {name}", lambda: self._standing(walkable, given))
            function = partial(_predict, walkable, self.network)
            (eps,) = self.fast.call(name, function, changing, standing)
        return eps.to(latents.dtype)  # type: ignore[no-any-return]

    def _standing(self, walkable: Walkable, given: Conditions) -> list[Tensor]:
        """The first four of Context for each cross-attention, one after the other."""
        texts, pictures = self._texts(walkable, given), self._pictures(walkable, given)
        return [tensor for text, picture in zip(texts, pictures, strict=True) for tensor in (*text, *picture)]

    def _layout(self, latents: Tensor, walkable: Walkable) -> Tensor:
        """Latents as the network wants them."""
        latents = latents.to(walkable.dtype)
        return latents.contiguous(memory_format=torch.channels_last) if self.fast.channels_last else latents

    def _embedding(self, walkable: Walkable, timesteps: Tensor, given: Conditions) -> Tensor:
        """The UNet's whole embedding [B, E]; Previewer and UNet of one step share it, as the LoRA leaves it alone."""
        source, name = self._source(walkable, "embedding", (".time_embedding.", ".add_embedding."))
        if self._last is not None and name == "" and self._last[0] is timesteps and self._last[1] is given:
            return self._last[2]
        added = self._keep(given).once(f"added {name}", lambda: _added(source, given))
        embedded = _time(source, timesteps.expand(len(added))) + added
        if name == "":
            self._last = (timesteps, given, embedded)
        return embedded

    def _texts(self, walkable: Walkable, given: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The text's keys and values of each cross-attention; both UNets' are the same unless a LoRA covers them."""
        source, name = self._source(walkable, "text", (".attn2.to_k.", ".attn2.to_v."))
        return self._keep(given).once(f"text {name}", lambda: _text_keys(source, given))

    def _pictures(self, walkable: Walkable, given: Conditions) -> list[tuple[Tensor, Tensor]]:
        """The picture's normalised keys and values of each cross-attention, before modulation."""
        name = "previewer" if walkable is self.fast.previewer else ""
        return self._keep(given).once(f"picture {name}", lambda: _picture_keys(walkable, given))

    def _source(self, walkable: Walkable, what: str, parts: tuple[str, ...]) -> tuple[Walkable, str]:
        """(network to compute with, name to keep it under): the base's for both where the LoRA leaves it alone."""
        if walkable is self.fast.previewer and self.fast.lora_covers(parts):
            return walkable, "previewer"
        return self.fast.base, ""

    def _keep(self, given: Conditions) -> _Kept:
        kept = self._kept.get(id(given))
        if kept is None:
            kept = self._kept[id(given)] = _Kept(given)
            if len(self._kept) > KEPT_CONDITIONS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(id(given))
        return kept


@dataclass
class _Kept:
    """What was computed from one Conditions object, which is held so that its identity stays its own."""

    given: Conditions
    values: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.values:
            self.values[name] = make()
        return self.values[name]


def bare_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet without LoRA wrappers: other module objects around the same parameters, so no weight is copied."""
    return _without_wrappers(unet)  # type: ignore[return-value]


def _without_wrappers(module: nn.Module) -> nn.Module:
    """A module tree with objects and parameter tables of its own, in which what peft wrapped stands in its place."""
    if isinstance(module, LoraLayer):
        module = module.get_base_layer()
    bare = copy.copy(module)
    bare._parameters = dict(module._parameters)
    for name in HOOKS:  # who watches one of the two does not watch the other
        setattr(bare, name, OrderedDict(getattr(module, name)))
    bare._modules = {n: None if m is None else _without_wrappers(m) for n, m in module._modules.items()}
    return bare


@torch.no_grad()
def merged_unet(unet: UNet2DConditionModel, channels_last: bool = False) -> UNet2DConditionModel:
    """bare_unet with the LoRA merged in: the layers that it changes are copies, all others the bundle's own.

    Sums are made in float32 and rounded once to the weights' precision.
    """
    bare = bare_unet(unet)
    for name, delta in each_previewer_delta(unet):
        layer: Any = bare.get_submodule(name)
        merged = (layer.weight.float() + delta).to(layer.weight.dtype)
        if channels_last and merged.ndim == 4:
            merged = merged.contiguous(memory_format=torch.channels_last)
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return bare


def merged_bytes(unet: UNet2DConditionModel) -> int:
    """Memory that merged_unet takes: the weights of all layers that carry the LoRA."""
    layers: list[Any] = [layer.get_base_layer() for layer in lora_layers(unet).values()]
    weights = [layer.weight for layer in layers]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def memory_to_spare(device: torch.device) -> int:
    """Bytes that a merged copy may take: half of a GPU's free memory, a quarter of all on a CPU, elsewhere none."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    if device.type != "cpu":
        return 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):  # not every system tells
        return 0


def _projections(network: Any) -> list[nn.Linear]:
    """Layers that the embedding goes through: each resnet's, then the modulations of each cross-attention."""
    layers: list[Any] = [resnet.time_emb_proj for resnet in resnets_of(network)]
    for block in transformers_of(network):
        if block.attn2 is not None:
            processor: Any = block.attn2.processor
            layers += [processor.ln_k_ip.linear, processor.ln_v_ip.linear]
    return layers


def _apart(network: Any) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable with every layer called by itself, so that weights may change and LoRA acts."""
    layers = _projections(network)
    return lambda embedded: [layer(embedded) for layer in layers], [None] * len(transformers_of(network))


@torch.no_grad()
def _joined(network: Any, owned: bool) -> tuple[Callable[[Tensor], Sequence[Tensor]], list[Tensor | None]]:
    """(project, fused) of a Walkable with one product for all projections, and one for query, key and value.

    Where the network is `owned`, its layers then look into the joined matrices, which so cost no memory.
    """
    layers = _projections(network)
    weight, bias = _in_one(layers, owned), torch.cat([layer.bias.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    fused: list[Tensor | None] = []
    for block in transformers_of(network):
        three: list[Any] = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        fused.append(_in_one(three, owned) if all(layer.bias is None for layer in three) else None)
    return lambda embedded: F.linear(embedded, weight, bias).split(sizes, dim=-1), fused


def _in_one(layers: Sequence[nn.Linear], owned: bool) -> Tensor:
    """The layers' weights below each other [sum of outputs, inputs]."""
    joined = torch.cat([layer.weight.detach() for layer in layers])
    if owned:
        for layer, part in zip(layers, joined.split([layer.out_features for layer in layers]), strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
    return joined


def _own_precision(walkable: Walkable) -> contextlib.AbstractContextManager[Any]:
    """Networks below float32 compute as they are: autocast would only take their norms to float32 and back."""
    device = walkable.network.conv_in.weight.device.type
    below = walkable.dtype != torch.float32 and autocasts(device)
    return torch.autocast(device, enabled=False) if below else contextlib.nullcontext()


def _decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """AutoencoderKL's decoding of unscaled latents, without its wrapping."""
    if autoencoder.post_quant_conv is not None:
        latents = autoencoder.post_quant_conv(latents)
    decoded: Tensor = autoencoder.decoder(latents)
    return decoded


def _encode(autoencoder: Any, images: Tensor) -> Tensor:
    """The mode of AutoencoderKL's posterior, unscaled, without its wrapping."""
    moments = autoencoder.encoder(images.to(autoencoder.dtype))
    if autoencoder.quant_conv is not None:
        moments = autoencoder.quant_conv(moments)
    found: Tensor = moments.chunk(2, dim=1)[0].to(images.dtype)
    return found


def _predict(
    walkable: Walkable, network: InstantIR, changing: Sequence[Tensor], standing: Sequence[Tensor]
) -> Sequence[Tensor]:
    """A UNet's call: (embedding after SiLU, latents, perhaps residuals), see FastRun._standing -> (noise,)."""
    embedded, latents, *added = changing
    parts, count = list(walkable.project(embedded)), 2 * len(walkable.fused)
    shifts = parts[:-count]
    if not network.time_modulation:  # see PerceptorAttnProcessor: what is left are the biases
        parts = list(walkable.project(torch.zeros_like(embedded)))
    modulations = parts[-count:]
    contexts = [
        Context(*standing[4 * i : 4 * i + 4], *modulations[2 * i : 2 * i + 2]) for i in range(len(walkable.fused))
    ]
    residuals = Residuals(tuple(added[:-1]), added[-1]) if added else None
    return (walkable.walk(walkable.network, latents, Inputs(shifts, contexts, walkable.fused), residuals),)


def _aggregate(walkable: Walkable, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> Sequence[Tensor]:
    """The aggregator's call: (embedding after SiLU, LQ latents, preview) -> residuals, the middle's last."""
    embedded, lq, preview = changing
    inputs = Inputs(list(walkable.project(embedded)), [None] * len(walkable.fused), walkable.fused)
    residuals = walkable.walk(walkable.network, lq, preview, inputs)
    return [*residuals.down, residuals.mid]


def _time(walkable: Walkable, timesteps: Tensor) -> Tensor:
    """The time's part of the embedding [B, E] for timesteps [B]."""
    network = walkable.network
    embedded: Tensor = network.time_embedding(network.time_proj(timesteps).to(walkable.dtype))
    return embedded


def _added(walkable: Walkable, given: Conditions) -> Tensor:
    """The part of the embedding [B, E] that pooled text and sizes settle."""
    network = walkable.network
    sizes = network.add_time_proj(given.time_ids.flatten()).view(len(given.pooled), -1)
    added: Tensor = network.add_embedding(
        torch.cat([given.pooled, sizes.to(given.pooled.dtype)], dim=-1).to(walkable.dtype)
    )
    return added


def _text_keys(walkable: Walkable, given: Conditions) -> list[tuple[Tensor, Tensor]]:
    """The text's keys and values [B, heads, S, d] of each cross-attention."""
    text, keys = given.text.to(walkable.dtype), []
    for block in transformers_of(walkable.network):
        attention: Any = block.attn2
        heads = attention.heads
        keys.append((split_heads(attention.to_k(text), heads), split_heads(attention.to_v(text), heads)))
    return keys


def _picture_keys(walkable: Walkable, given: Conditions) -> list[tuple[Tensor, Tensor]]:
    """The picture's keys and values [B, Q, W] of each cross-attention, normalised but not modulated."""
    resampler = walkable.network.encoder_hid_proj.image_projection_layers[0]
    tokens, keys = given.image_tokens.to(walkable.dtype), []
    if tokens.ndim == 4:  # [B, views, N, D]: each view has queries of its own
        tokens = resampler(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).flatten(1, 2)
    else:
        tokens = resampler(tokens)
    for block in transformers_of(walkable.network):
        attention: Any = block.attn2
        key, value = attention.processor.to_k_ip(tokens), attention.processor.to_v_ip(tokens)
        keys.append((normalised(key), normalised(value)))
    return keys
