"""InstantIR's Instant Restoration Previewer: a LoRA on the perceptor's UNet, switched on for one-step previews.

Through peft. Off, the UNet is the prior bit for bit (with the perceptor); on, one call and the consistency boundary
(objectives/consistency.py) give a preview. Files carry previewer_lora_weights.bin's names: "unet." in front,
".processor" left out, and diffusers' older spelling (.lora.down, .lora.up) for the attention projections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.randomness import seeded_init
from components.systems.instantir.perceptor import copy_strictly

ADAPTER = "previewer"
TARGETS = (
    "to_q",
    "to_kv",
    "0.to_out",
    "attn1.to_k",
    "attn1.to_v",
    "to_k_ip",
    "to_v_ip",
    "ln_k_ip.linear",
    "ln_v_ip.linear",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Suffixes of the layers that carry the LoRA (instantir.md section 3)."""

_OLD_SPELLING = (".to_q", ".to_k", ".to_v", ".to_out.0")
_SPELLINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
}


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Size of the Previewer's LoRA; the defaults are the released model's.

    Attributes:
        rank: inner width.
        alpha: the update is scaled by alpha / rank.
        targets: name suffixes of the layers that carry it.
    """

    rank: int = 64
    alpha: float = 1
    targets: Sequence[str] = field(default=TARGETS)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


class PreviewerLora(nn.Module):
    """The LoRA's own weights, for an optimiser or a checkpoint. A view: the modules are the UNet's."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        super().__init__()
        # a ModuleDict's keys may not hold dots
        self.down = nn.ModuleDict({_escape(n): layer.lora_A[ADAPTER] for n, layer in layers.items()})
        self.up = nn.ModuleDict({_escape(n): layer.lora_B[ADAPTER] for n, layer in layers.items()})


def install_previewer(
    unet: UNet2DConditionModel, lora: LoraSettings | Mapping[str, Any] | None = None, seed: int = 0
) -> PreviewerLora:
    """Add a new LoRA to a UNet that has its perceptor (in place), switched off. It starts as no change.

    Args:
        unet: with install_perceptor done, since the LoRA also covers the perceptor.
        lora: its size.
        seed: fixes the random start.

    Raises:
        ValueError: there is a previewer already, or no layer matches the targets.
    """
    settings = lora if isinstance(lora, LoraSettings) else LoraSettings(**(lora or {}))
    if has_previewer(unet):
        raise ValueError("the UNet has a previewer already")
    trainable = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    with seeded_init(seed, "previewer"):
        unet.add_adapter(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,  # type: ignore[arg-type]
                lora_dropout=0.0,
                target_modules=list(settings.targets),
                init_lora_weights=True,
            ),
            adapter_name=ADAPTER,
        )
    # peft freezes what it wraps; whether the prior and the perceptor train is not its business
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            parameter.requires_grad_(trainable[name.replace(".base_layer.", ".")])
    layers = lora_layers(unet)
    _switch(layers.values(), False)
    return PreviewerLora(layers)


def has_previewer(unet: UNet2DConditionModel) -> bool:
    """Whether install_previewer was called."""
    return any(True for _ in _lora_modules(unet))


def previewer_of(unet: UNet2DConditionModel) -> PreviewerLora:
    """The LoRA installed in a UNet. Raises ValueError where there is none."""
    return PreviewerLora(lora_layers(unet))


def lora_layers(unet: UNet2DConditionModel) -> dict[str, LoraLayer]:
    """Layers that carry the LoRA by their name in the UNet. Raises ValueError where there is none."""
    layers = dict(_lora_modules(unet))
    if not layers:
        raise ValueError("the UNet has no previewer: call install_previewer first")
    return layers


@contextlib.contextmanager
def previewer_enabled(unet: UNet2DConditionModel, enabled: bool = True) -> Iterator[None]:
    """Inside, the UNet's calls carry the LoRA (or, with enabled=False, do not); after, as it was before.

    A backward pass may run outside; gradient checkpointing, which repeats calls, takes care of it (checkpointing.py).
    """
    layers = list(lora_layers(unet).values())
    before = not layers[0].disable_adapters
    _switch(layers, enabled)
    try:
        yield
    finally:
        _switch(layers, before)


def previewer_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's weights under previewer_lora_weights.bin's names; the tensors are the modules' own."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(unet).items():
        down, up = released_names(name)
        state[down] = _weight(layer.lora_A).detach()
        state[up] = _weight(layer.lora_B).detach()
    return state


def released_names(layer: str) -> tuple[str, str]:
    """Keys of a layer's down and up weights in previewer_lora_weights.bin, from the layer's name in the UNet."""
    down, up = (".lora.down", ".lora.up") if layer.endswith(_OLD_SPELLING) else (".lora_A", ".lora_B")
    return f"unet.{_file_name(layer)}{down}.weight", f"unet.{_file_name(layer)}{up}.weight"


def split_key(key: str) -> tuple[str, str] | None:
    """(layer, "A" or "B") of a LoRA file's key in any spelling; None for a key of another kind."""
    layer, _, letter = _parameter_name(key).rpartition(" ")
    return (layer, letter) if layer else None


def load_previewer(unet: UNet2DConditionModel, state: Mapping[str, Tensor]) -> None:
    """Copy a LoRA's weights into the installed one.

    Either spelling is taken for every layer (.lora_A/.lora_B or .lora.down/.lora.up), with or without "unet." in front
    and with or without ".processor".

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape; also a layer that is given twice.
    """
    parameters: dict[str, Tensor] = {}
    for name, layer in lora_layers(unet).items():
        parameters[f"{_file_name(name)} A"] = _weight(layer.lora_A)
        parameters[f"{_file_name(name)} B"] = _weight(layer.lora_B)
    given: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _parameter_name(key)
        if name in given:
            raise ValueError(f"the previewer's weights name {name.rpartition(' ')[0]} twice, in different spellings")
        given[name] = tensor
    copy_strictly(parameters, given, "previewer")


def lora_settings_of(unet: UNet2DConditionModel) -> LoraSettings:
    """Size of the installed LoRA. Raises ValueError where there is none."""
    layer = next(iter(lora_layers(unet).values()))
    targets = unet.peft_config[ADAPTER].target_modules
    return LoraSettings(
        rank=layer.r[ADAPTER],
        alpha=layer.lora_alpha[ADAPTER],
        # peft keeps a set, whose order changes from process to process
        targets=sorted(targets, key=lambda t: (TARGETS.index(t) if t in TARGETS else len(TARGETS), t)),
    )


@torch.no_grad()
def each_previewer_delta(unet: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    """(layer's name in the UNet, what the LoRA adds to its weight: (alpha / rank) up @ down), one layer at a time.

    In float32, however the weights are kept. For a convolution `down` is k x k with the layer's stride and padding and
    `up` is 1 x 1.
    """
    for name, layer in lora_layers(unet).items():
        down, up = _weight(layer.lora_A).detach().float(), _weight(layer.lora_B).detach().float()
        delta = up.flatten(1) @ down.flatten(1)
        yield name, (delta * layer.scaling[ADAPTER]).view(len(up), *down.shape[1:])


def previewer_deltas(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """each_previewer_delta, all at once."""
    return dict(each_previewer_delta(unet))


def _lora_modules(unet: UNet2DConditionModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


def _switch(layers: Any, enabled: bool) -> None:
    """Turn the LoRA on or off without touching what trains: peft's own switch also flips requires_grad, and a leaf
    without it drops the gradient of a graph that was recorded before."""
    for layer in layers:
        flags = [(p, p.requires_grad) for p in layer.parameters()]
        layer.enable_adapters(enabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _weight(layers: nn.ModuleDict) -> Tensor:
    return layers[ADAPTER].weight  # type: ignore[return-value]


def _file_name(name: str) -> str:
    return name.replace(".processor.", ".")


def _parameter_name(key: str) -> str:
    """A file's key -> "<layer> A" or "<layer> B"; a key that is neither comes back as it is."""
    for suffix, letter in _SPELLINGS.items():
        if key.endswith(suffix):
            return f"{_file_name(key.removeprefix('unet.').removesuffix(suffix))} {letter}"
    return key


def _escape(name: str) -> str:
    return name.replace(".", "/")
