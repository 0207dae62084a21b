"""Sizes of the restoration adapters and of the LoRA. Torch-free: recipes and option checks need them early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from components.options import check_choices, settings_by_name
from components.priors.families.record import PriorFamily

Block = Literal["conv31", "conv3", "naf"]
Targets = Literal["self", "qkv", "qv", "all"]

PATCH = 2
"""Side in latent pixels of a token of an MM-DiT."""

Shape = Literal["maps", "tokens"]
"""What the adapters of a family of priors act on: feature maps of an SDXL-shaped UNet, or an MM-DiT's tokens."""

UNET_TARGETS: Mapping[str, tuple[str, ...]] = {
    "self": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "qv": ("attn1.to_q", "attn1.to_v"),
    "all": tuple(
        f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ),
}
"""Name suffixes of a UNet's layers with the LoRA; "self" is all of self-attention, "all" adds cross-attention."""

TOKEN_TARGETS: Mapping[str, tuple[str, ...]] = {
    "self": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qv": ("attn.to_q", "attn.to_v"),
    "all": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
}
"""The same of an MM-DiT: the picture's stream of its joint attention; "all" adds the text's."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Form of the restoration adapters; widths and number follow from the prior.

    The paper fixes the order of the parts and their number, not the blocks (its Fig. 3). The defaults give its counts.

    Attributes:
        form: "adapters", or "controlnet" for the twin of the paper's Table 3, a trainable copy of the prior's first
            blocks: 838 million parameters in SDXL (paper: 839), 539 in SD3 medium (504).
        block: form of a UNet's adapter blocks. "conv31": two residual blocks of a 3x3 and a 1x1 convolution, and a 1x1
            for the LQ feature; 134.7 million parameters in SDXL, with the LoRA 156.0 million (paper: 157). "conv3":
            single 3x3 convolutions, the twin of the MM-DiT's form; 164.0 million. "naf": NAF blocks (Chen et al. 2022),
            whose channel attention depends on the size of a tile; 134.5 million. An MM-DiT has linear layers.
        norm: "group" puts a group norm in front of each block of a UNet's adapters but the one of the LQ latents. An
            MM-DiT's have a layer norm.
        chain: what the next adapter gets. "lq": the LQ feature, which depends on neither time nor noise: it is computed
            once for a picture. "fused": the adapter's whole hidden feature, computed again in every step.
        silu: place of the time embedding's SiLU, "before" or "after" its linear layer.
        adapt_skip: whether the skip feature of a compression block changes too; False leaves it as in the prior.
        every: an MM-DiT has an adapter after every block with a number that this divides (from 1); 4 in section 4.1.
        layers: joint blocks of a ControlNet on an MM-DiT.
        hint: what a ControlNet on a UNet sees of LQ. "picture": diffusers' ControlNet without its middle block, which
            encodes the picture; 837,896,720 parameters in SDXL. "latents": the adapters' own input, by the robust
            encoder if there is one, through a zero convolution; 835,182,400.

    Raises:
        ValueError: a value is outside its set.
    """

    form: Literal["adapters", "controlnet"] = "adapters"
    block: Block = "conv31"
    norm: Literal["none", "group"] = "none"
    chain: Literal["lq", "fused"] = "lq"
    silu: Literal["before", "after"] = "before"
    adapt_skip: bool = False
    every: int = 4
    layers: int = 6
    hint: Literal["picture", "latents"] = "picture"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("every", "layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r:.80}")

    def to_dict(self) -> dict[str, Any]:
        """For model.json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size of the diffusion adapters: a LoRA on the prior's self-attention.

    Attributes:
        rank: inner width, 32 in section 4.1; 0 for no LoRA (Fig. 6b).
        alpha: the update's scale is alpha / rank; 0 takes the rank.
        targets: layers, see UNET_TARGETS and TOKEN_TARGETS.

    Raises:
        ValueError: a value is outside its range or set.
    """

    rank: int = 32
    alpha: float = 0.0
    targets: Targets = "self"

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise ValueError(f"rank must be a whole number from 0, got {self.rank!r:.80}")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha < 1e6:
            raise ValueError(f"alpha must be a number from 0, got {self.alpha!r:.80}")

    @property
    def scale(self) -> float:
        """The alpha that peft gets."""
        return self.alpha or float(self.rank)

    def to_dict(self) -> dict[str, Any]:
        """For model.json."""
        return asdict(self)


def adapter_config(values: Mapping[str, Any]) -> AdapterConfig:
    """The form by name. Raises ValueError for an unknown name, with the nearest one, or see AdapterConfig."""
    return settings_by_name(AdapterConfig, values, "adapter setting")


def stored_adapter_config(values: Mapping[str, Any], shape: Shape) -> AdapterConfig:
    """The form that a model's config names. Before `hint` existed, a ControlNet on a UNet took latents."""
    older = {"hint": "latents"} if shape == "maps" and values.get("form") == "controlnet" else {}
    return adapter_config({**older, **values})


def shape_of(family: PriorFamily) -> Shape:
    """The shape of a family's adapters, by its record. Raises ValueError for a family that takes none."""
    if family.prediction == "flow_prediction":
        return "tokens"
    if family.kind == "unet" and family.text.columns:
        return "maps"
    raise ValueError(f"no adapters for priors of the family {family.name}: it is neither SDXL's shape nor an MM-DiT's")


def check_adapter_shape(config: AdapterConfig, shape: Shape) -> None:
    """Raises ValueError for a setting of another shape or form that is not at its default."""
    plain = AdapterConfig()
    counts = _SETTINGS[config.form, shape]
    changed = [field.name for field in fields(config) if getattr(config, field.name) != getattr(plain, field.name)]
    if foreign := [name for name in changed if name not in ("form", *counts)]:
        raise ValueError(f"{', '.join(foreign)}: not a setting of {config.form} on {shape}")


_SETTINGS: Mapping[tuple[str, Shape], tuple[str, ...]] = {
    ("adapters", "maps"): ("block", "norm", "chain", "silu", "adapt_skip"),
    ("adapters", "tokens"): ("chain", "silu", "every"),
    ("controlnet", "maps"): ("hint",),
    ("controlnet", "tokens"): ("layers",),
}
"""The settings that count by form and shape."""


def lora_config(values: Mapping[str, Any]) -> LoraConfig:
    """The LoRA's size by name. Raises ValueError for an unknown name, with the nearest one, or see LoraConfig."""
    return settings_by_name(LoraConfig, values, "LoRA setting")
