"""A generator and its autoencoder made ready for many pictures: memory layout, compilation, CUDA graphs.

The three calls of a restoration (encode, one step, decode) are short enough for the launching of kernels to take longer
than the kernels, at a batch of one. Compiling fuses norms and activations, most of all in the decoder, which does half
of all work (reference, section 8); a graph replays all kernels of a call at once.
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

from components.cuda_graphs import Graphed, can_record
from components.options import check_choices, settings_by_name
from components.priors.tiling import LatentPrior
from components.systems.instarevive.network import Conditions, OneStepGenerator

BLOCKS = (BasicTransformerBlock, ResnetBlock2D)
"""What "blocks" compiles: nearly all of the work, in few different forms."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How the networks are made fast. Results agree to rounding whatever is chosen.

    Attributes:
        compile: "blocks" compiles each kind of block once (torch.compile; tens of seconds), "whole" each of the three
            calls (minutes), "off" neither.
        compile_mode: torch.compile's mode; "" for the default.
        channels_last: memory layout of the convolutions; "auto" is on wherever there is a GPU.
        graphs: capture each call, for each shape, in a CUDA graph; "auto" is on wherever there is a GPU and a call is
            compiled. Shapes that come once pay for the capture: leave it off for pictures of many sizes.
        autoencoder: "kept" leaves it in its own precision, which for SDXL's is float32; "bf16" casts it: bfloat16 has
            float32's range, so what overflows in half precision does not overflow here, and a 1024 picture is decoded
            in a fraction of the time.

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
    def of(cls, given: Mapping[str, Any]) -> Speed:
        """From settings by name. Raises ValueError for an unknown name, with the near one."""
        return settings_by_name(cls, given, "speed setting")


class FastOneStep:
    """Encode, one step and decode of a generator on its prior; a tiling.LatentPrior itself.

    Compiling, the memory layout and a cast autoencoder change the modules in place, and graphs read the weights where
    they lie: make this for networks that do not train any more.

    Args:
        generator: on its device and in its precision.
        prior: whose latents it restores.
        speed: what is done.

    Raises:
        ValueError: graphs without a CUDA device.
    """

    def __init__(self, generator: OneStepGenerator, prior: LatentPrior, speed: Speed | None = None) -> None:
        self.generator, self.prior, self.speed = generator, prior, speed or Speed()
        self.autoencoder = prior.autoencoder
        if self.speed.autoencoder == "bf16":
            nn.Module.to(self.autoencoder, dtype=torch.bfloat16)  # torch's own: diffusers' warns of every cast
        card = self.device.type == "cuda"
        if self.speed.graphs == "on" and not card:
            raise ValueError(f"graphs need a CUDA device, the networks are on {self.device}")
        if self.speed.channels_last == "on" or (self.speed.channels_last == "auto" and self.device.type != "cpu"):
            for module in (generator, prior.autoencoder):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        calls: Sequence[Callable[..., Tensor]] = (prior.encode, self._generate, prior.decode)
        graphs = self.speed.graphs == "on" or (self.speed.graphs == "auto" and card and self.speed.compile != "off")
        # a graph is of one shape anyway, so what it holds is compiled for that shape alone, which runs faster
        options: dict[str, Any] = {"mode": self.speed.compile_mode or None, "dynamic": False if graphs else None}
        if self.speed.compile == "blocks":
            for module in (generator, prior.autoencoder):
                compile_blocks(module, **options)
        elif self.speed.compile == "whole":
            calls = [torch.compile(call, **options) for call in calls]
        if self.speed.compile != "off":
            calls = [_many_shapes(call) for call in calls]
        if graphs:
            calls = [_Recorded(call) for call in calls]
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
        """See Prior.encode; with noise it is left to the prior."""
        return self._encode(images) if noise is None else self.prior.encode(images, noise)

    def generate(self, lq: Tensor, given: Conditions, noise: Tensor | None = None) -> Tensor:
        """See OneStepGenerator.forward."""
        return self._step(lq, noise, given.text, given.mask, given.pooled, given.time_ids)

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
        """generate with tensors alone, as graphs want it."""
        given = Conditions(text=text, mask=mask, pooled=pooled, time_ids=time_ids)
        return self.generator(lq, given, noise)  # type: ignore[no-any-return]


def compile_blocks(module: nn.Module, **options: Any) -> int:
    """Compile every block of BLOCKS where it stands, with torch.compile's options; returns how many there are."""
    found = [block for block in module.modules() if isinstance(block, BLOCKS)]
    for block in found:
        block.compile(**options)
    return len(found)


def _many_shapes(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call inside which one function is compiled for every shape: blocks come in over 20, and torch stops at 8."""
    import torch._dynamo.config  # a second's import, for those who compile

    @functools.wraps(call)
    def inside(*arguments: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
            return call(*arguments)

    return inside


class _Recorded:
    """A call of tensors or None, recorded as CUDA graphs for each set of those that are there."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        self._call = call
        self._graphed: dict[tuple[bool, ...], Graphed] = {}

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        present = tuple(argument is not None for argument in arguments)
        given = [argument for argument in arguments if argument is not None]
        if not can_record(given[0].device):
            return self._call(*arguments)
        if present not in self._graphed:
            self._graphed[present] = Graphed(functools.partial(self._filled, present))
        return self._graphed[present](given, ())[0]

    def _filled(
        self, present: Sequence[bool], changing: Sequence[Tensor], standing: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        rest = iter(changing)
        return (self._call(*(next(rest) if there else None for there in present)),)
