"""Makes a generator and its autoencoder fast: memory layout, compilation, CUDA graphs.

At a batch of one, the three calls of a restoration (encode, one step, decode) are so short that kernel launches take
longer than the kernels. Compilation fuses norms and activations, above all in the decoder, which does half of all work
(reference, section 8). A CUDA graph replays all kernels of a call at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from components.cuda_graphs import GraphedFunction, can_record
from components.options import check_choices, settings_by_name
from components.priors.conditions import Conditions
from components.priors.tiling import LatentPrior
from components.systems.instarevive.network import OneStepGenerator

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
"""The modules that compile="blocks" compiles: nearly all of the work, in few different shapes."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How the networks are made fast. Results of all settings agree up to rounding.

    Attributes:
        compile: "blocks" compiles each kind of block once (torch.compile; tens of seconds), "whole" each of the three
            calls (minutes), "off" neither.
        compile_mode: torch.compile's mode; "" for the default.
        channels_last: memory layout of the convolutions; "auto" is on with a GPU.
        graphs: capture each call, for each shape, in a CUDA graph; "auto" is on with a GPU and compiled calls. A
            capture does not pay for a shape that comes once: turn it off for pictures of many sizes.
        autoencoder: "kept" leaves it in its own precision, which is float32 for SDXL; "bf16" casts it. bfloat16 has
            float32's range, so activations that overflow in half precision do not overflow, and a 1024 picture is
            decoded in a fraction of the time.

    Raises:
        ValueError: a value outside its set.
    """

    compile: Literal["off", "blocks", "whole"] = "off"
    compile_mode: str = ""
    channels_last: Literal["auto", "on", "off"] = "auto"
    graphs: Literal["auto", "on", "off"] = "off"
    autoencoder: Literal["kept", "bf16"] = "kept"

    def __post_init__(self) -> None:
        check_choices(self)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Speed:
        """From settings by name. Raises ValueError for an unknown name, with the nearest one."""
        return settings_by_name(cls, settings, "speed setting")


class FastOneStep:
    """Encode, one step and decode of a generator on its prior; it is a tiling.LatentPrior too.

    Compilation, the memory layout and a cast autoencoder change the modules in place, and graphs read the weights at
    their addresses. Use it only for networks that no longer train.

    Args:
        generator: on its device and in its precision.
        prior: it encodes and decodes the latents.
        speed: settings; None for the defaults.

    Raises:
        ValueError: graphs without a CUDA device.
    """

    def __init__(self, generator: OneStepGenerator, prior: LatentPrior, speed: Speed | None = None) -> None:
        self.generator, self.prior, self.speed = generator, prior, speed or Speed()
        self.autoencoder = prior.autoencoder
        if self.speed.autoencoder == "bf16":
            nn.Module.to(
                self.autoencoder, dtype=torch.bfloat16
            )  # torch's own method: the one of diffusers warns at every cast
        on_gpu = self.device.type == "cuda"
        if self.speed.graphs == "on" and not on_gpu:
            raise ValueError(f"graphs need a CUDA device, the networks are on {self.device}")
        if self.speed.channels_last == "on" or (self.speed.channels_last == "auto" and self.device.type != "cpu"):
            for module in (generator, prior.autoencoder):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls: Sequence[Callable[..., Tensor]] = (prior.encode, self._generate, prior.decode)
        graphs = self.speed.graphs == "on" or (self.speed.graphs == "auto" and on_gpu and self.speed.compile != "off")
        # a graph has one shape anyway, so its kernels are compiled for that shape alone, which is faster
        options: dict[str, Any] = {"mode": self.speed.compile_mode or None, "dynamic": False if graphs else None}
        if self.speed.compile == "blocks":
            for module in (generator, prior.autoencoder):
                compile_blocks(module, **options)
        elif self.speed.compile == "whole":
            calls = [torch.compile(call, **options) for call in calls]
        if self.speed.compile != "off":
            calls = [_many_shapes(call) for call in calls]
        if graphs:
            calls = [_GraphedCall(call) for call in calls]
        self._encode, self._step, self._decode = calls

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
        """See Prior.encode; with noise, the prior itself encodes."""
        return self._encode(images) if noise is None else self.prior.encode(images, noise)

    def generate(self, lq: Tensor, conditions: Conditions, noise: Tensor | None = None) -> Tensor:
        """See OneStepGenerator.forward."""
        return self._step(lq, noise, conditions.text, conditions.mask, conditions.pooled, conditions.time_ids)

    def decode(self, latents: Tensor) -> Tensor:
        """See Prior.decode."""
        return self._decode(latents)

    def _generate(
        self,
        lq: Tensor,
        noise: Tensor | None,
        text: Tensor,
        mask: Tensor | None,
        pooled: Tensor | None,
        time_ids: Tensor | None,
    ) -> Tensor:
        """`generate` with tensors as arguments, which graphs need."""
        conditions = Conditions(text=text, mask=mask, pooled=pooled, time_ids=time_ids)
        return self.generator(lq, conditions, noise)  # type: ignore[no-any-return]


def compile_blocks(module: nn.Module, **options: Any) -> int:
    """Compile every block of BLOCKS in place, with torch.compile's options; returns the number of blocks."""
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        block.compile(**options)
    return len(blocks)


def _many_shapes(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call in which torch compiles a function for up to 64 shapes: blocks have over 20, the default limit is 8."""
    import torch._dynamo.config  # takes a second: imported only to compile

    @functools.wraps(call)
    def patched(*arguments: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
            return call(*arguments)

    return patched


class _GraphedCall:
    """A call with tensors or None as arguments: one CUDA graph for each set of arguments that are not None."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call
        self._graphs: dict[tuple[bool, ...], GraphedFunction] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        present = tuple(argument is not None for argument in arguments)
        tensors = [argument for argument in arguments if argument is not None]
        if not can_record(tensors[0].device):
            return self._call(*arguments)
        if present not in self._graphs:
            self._graphs[present] = GraphedFunction(functools.partial(self._call_present, present))
        return self._graphs[present](tensors, ())[0]

    def _call_present(
        self, present: Sequence[bool], changing: Sequence[Tensor], standing: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        rest = iter(changing)
        return (self._call(*(next(rest) if there else None for there in present)),)
