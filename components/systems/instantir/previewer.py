"""InstantIR's Instant Restoration Previewer: a LoRA on the perceptor's UNet, switched on for one-step previews.

The LoRA is a peft adapter. With the LoRA off, the results equal those of the UNet without LoRA, bit for bit. With the
LoRA on, one call and the consistency boundary (objectives/consistency.py) give a preview. Files have the key names of
previewer_lora_weights.bin: prefix "unet.", no ".processor", and diffusers' older spelling (.lora.down, .lora.up) for
the attention projections.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from components.priors.lora import LoraWeights, add_lora, each_lora_delta, lora_weight, switch_lora
from components.priors.lora import lora_layers as _layers
from components.priors.parameters import copy_strictly

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
"""Name suffixes of the layers that have the LoRA (instantir.md section 3)."""

_OLD_SPELLING = (".to_q", ".to_k", ".to_v", ".to_out.0")
_ENDING = re.compile(
    r"(?:\.lora_(?P<letter>[AB])(?:\.(?P<adapter>[^.]+))?"  # peft; its live modules add an adapter's name
    r"|\.lora_(?P<kohya>down|up)|\.lora\.(?P<diffusers>down|up)"
    r"|(?:\.lora_linear_layer|_lora)\.(?P<older>down|up))\.weight$"  # diffusers before and after attention processors
)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Size of the Previewer's LoRA; the defaults are those of the released model.

    Attributes:
        rank: inner width.
        alpha: the update's scale is alpha / rank.
        targets: name suffixes of the layers that have the LoRA.
    """

    rank: int = 64
    alpha: float = 1
    targets: Sequence[str] = field(default=TARGETS)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "targets": list(self.targets)}


class PreviewerLora(LoraWeights):
    """The Previewer's weights, see LoraWeights."""

    def __init__(self, layers: Mapping[str, LoraLayer]) -> None:
        super().__init__(layers, ADAPTER)


def install_previewer(
    unet: UNet2DConditionModel, lora: LoraSettings | Mapping[str, Any] | None = None, seed: int = 0
) -> PreviewerLora:
    """Add a new LoRA, switched off, to a UNet that has a perceptor (in place). Its update starts at zero.

    Args:
        unet: UNet after install_perceptor, since the LoRA also covers the perceptor.
        lora: size of the LoRA.
        seed: fixes the random start.

    Raises:
        ValueError: the UNet already has a previewer, or no layer matches the targets.
    """
    settings = lora if isinstance(lora, LoraSettings) else LoraSettings(**(lora or {}))
    if has_previewer(unet):
        raise ValueError("the UNet has a previewer already")
    layers = add_lora(unet, ADAPTER, rank=settings.rank, alpha=settings.alpha, targets=settings.targets, seed=seed)
    switch_lora(layers.values(), False)
    return PreviewerLora(layers)


def has_previewer(unet: UNet2DConditionModel) -> bool:
    """Whether the UNet has a previewer."""
    return bool(_layers(unet, ADAPTER))


def previewer_of(unet: UNet2DConditionModel) -> PreviewerLora:
    """The LoRA of a UNet. Raises ValueError if it has none."""
    return PreviewerLora(lora_layers(unet))


def lora_layers(unet: UNet2DConditionModel) -> dict[str, LoraLayer]:
    """Layers with the LoRA by their name in the UNet. Raises ValueError if there are none."""
    layers = _layers(unet, ADAPTER)
    if not layers:
        raise ValueError("the UNet has no previewer: call install_previewer first")
    return layers


@contextlib.contextmanager
def previewer_enabled(unet: UNet2DConditionModel, enabled: bool = True) -> Iterator[None]:
    """Inside the context the LoRA is on (or off, with enabled=False); afterwards as before.

    A backward pass may run outside the context; gradient checkpointing restores the switch (checkpointing.py).
    """
    layers = list(lora_layers(unet).values())
    before = not layers[0].disable_adapters
    switch_lora(layers, enabled)
    try:
        yield
    finally:
        switch_lora(layers, before)


def previewer_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The LoRA's weights by previewer_lora_weights.bin's keys; the tensors share memory with the modules."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(unet).items():
        down, up = released_names(name)
        state[down] = lora_weight(layer.lora_A, ADAPTER).detach()
        state[up] = lora_weight(layer.lora_B, ADAPTER).detach()
    return state


def released_names(layer: str) -> tuple[str, str]:
    """Keys of a layer's down and up weights in previewer_lora_weights.bin, by the layer's name in the UNet."""
    down, up = (".lora.down", ".lora.up") if layer.endswith(_OLD_SPELLING) else (".lora_A", ".lora_B")
    return f"unet.{_file_name(layer)}{down}.weight", f"unet.{_file_name(layer)}{up}.weight"


def split_key(key: str) -> tuple[str, str] | None:
    """(layer, "A" or "B") of a LoRA file's key in any spelling; None for other keys."""
    layer, _, letter = _parameter_name(key).rpartition(" ")
    return (layer, letter) if layer else None


def adapter_names(keys: Iterable[str]) -> list[str]:
    """Names of the peft adapters in a LoRA file's keys; empty where the keys name none."""
    return sorted({m["adapter"] for key in keys if (m := _ENDING.search(key)) and m["adapter"]})


def load_previewer(unet: UNet2DConditionModel, state: Mapping[str, Tensor]) -> None:
    """Copy a LoRA's weights into the UNet's LoRA.

    Each key may have any spelling of split_key, with or without the prefix "unet." and ".processor".

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape, or names a duplicate layer.
    """
    parameters: dict[str, Tensor] = {}
    for name, layer in lora_layers(unet).items():
        parameters[f"{_file_name(name)} A"] = lora_weight(layer.lora_A, ADAPTER)
        parameters[f"{_file_name(name)} B"] = lora_weight(layer.lora_B, ADAPTER)
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _parameter_name(key)
        if name in tensors:
            raise ValueError(f"the previewer's weights name {name.rpartition(' ')[0]} twice, in different spellings")
        tensors[name] = tensor
    copy_strictly(parameters, tensors, "previewer")


def lora_settings_of(unet: UNet2DConditionModel) -> LoraSettings:
    """Size of the UNet's LoRA. Raises ValueError if it has none."""
    layer = next(iter(lora_layers(unet).values()))
    targets = unet.peft_config[ADAPTER].target_modules
    return LoraSettings(
        rank=layer.r[ADAPTER],
        alpha=layer.lora_alpha[ADAPTER],
        # peft holds a set, whose order differs between processes
        targets=sorted(targets, key=lambda t: (TARGETS.index(t) if t in TARGETS else len(TARGETS), t)),
    )


def each_previewer_delta(unet: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    """See each_lora_delta."""
    return each_lora_delta(lora_layers(unet), ADAPTER)


def previewer_deltas(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The updates of each_previewer_delta as a dictionary."""
    return dict(each_previewer_delta(unet))


def _file_name(name: str) -> str:
    return name.replace(".processor.", ".")


def _parameter_name(key: str) -> str:
    """A file's key -> "<layer> A" or "<layer> B"; other keys are returned as they are."""
    match = _ENDING.search(key)
    if match is None:
        return key
    way = match["letter"] or match["kohya"] or match["diffusers"] or match["older"]
    layer = _file_name(key[: match.start()].removeprefix("unet."))
    if match[0].startswith("_lora") and layer.endswith(".to_out"):
        layer += ".0"  # attention processors named it without its place in the list
    return f"{layer} {'A' if way in ('A', 'down') else 'B'}"
