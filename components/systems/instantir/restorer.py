"""Restores pictures with a trained InstantIR: the object behind batch jobs, the service and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from components.randomness import generator
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.schedules import Schedule
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.fast import FastInstantIR, Speed
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.options import Options, parse_options
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Cancelled, Image, OnStep, Request, Restored, SampleError, StepEvent


@dataclass(frozen=True)
class _Job:
    """A request made ready: its options, and its picture enlarged and padded to what the networks take."""

    index: int
    request: Request
    options: Options
    image: Image
    size: tuple[int, int]


class InstantIRRestorer:
    """See types.Restorer.

    Args:
        network: with perceptor, previewer and aggregator.
        defaults: options that replace the built-in defaults, from a recipe.
        batch_size: pictures of one size and of equal options that go through the networks together. With 1, a picture's
            bytes are the same whatever else is asked for, which is why the service and the batch job agree to the byte;
            above, convolutions and matrix products may round differently, by about 1e-6 before rounding to 8 bit.
        speed: how the networks are made fast. The network's weights must stand still while this object is used.

    Raises:
        ValueError: a part is missing, or a default is unknown or out of range.
    """

    def __init__(
        self,
        network: InstantIR,
        defaults: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        speed: Speed | None = None,
    ) -> None:
        if network.aggregator is None or not network.has_previewer:
            raise ValueError("restoring needs a network with a previewer and an aggregator")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network, self.batch_size = network.freeze(), batch_size
        self.defaults = parse_options(defaults or {}, Options())
        self.fast = FastInstantIR(self.network, speed)

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order.

        Args:
            requests: any sizes; `size` enlarges or shrinks by bicubic interpolation first.
            on_step: told after each sampler step; steps are counted over all batches of this call.
            cancelled: asked before each step.

        Raises:
            SampleError: a picture that is not uint8 RGB ("bad_image"), or an impossible size ("bad_size").
            ValueError: unknown or wrong options; names the near option, and no request: all that share them fail alike.
            Cancellation: `cancelled()` became true.
        """
        batches = list(self._batches([self._prepare(i, r) for i, r in enumerate(requests)]))
        total, done = sum(batch[0].options.steps for batch in batches), 0
        restored: dict[int, Restored] = {}

        def report(event: StepEvent) -> None:
            if on_step is not None:
                on_step(replace(event, step=done + event.step, of=total))

        for batch in batches:
            for job, image in zip(batch, self._run(batch, report, cancelled), strict=True):
                restored[job.index] = Restored(key=job.request.key, image=image, info=_info(job))
            done += batch[0].options.steps
        return [restored[i] for i in range(len(requests))]

    def _prepare(self, index: int, request: Request) -> _Job:
        image = request.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
        options = parse_options(request.options, self.defaults)
        height, width = request.size or image.shape[:2]
        if height < 1 or width < 1:
            raise SampleError("bad_size", f"size must be positive, got {height} x {width}", request.key)
        if (height, width) != image.shape[:2]:
            image = np.asarray(Pillow.fromarray(image).resize((width, height), Pillow.Resampling.BICUBIC))
        return _Job(index, request, options, pad_to_multiple(image, self._multiple_px()), (height, width))

    def _multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that UNet and aggregator halve evenly."""
        return int(self.network.prior.factor * 2 ** (len(self.network.unet.config["block_out_channels"]) - 1))

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Jobs of one padded size and one set of options, in order of their first appearance."""
        groups: dict[Any, list[_Job]] = {}
        for job in jobs:
            groups.setdefault((job.image.shape, job.options), []).append(job)
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Job], on_step: OnStep, cancelled: Cancelled | None) -> list[Image]:
        """Restored pictures of one batch, cropped to their size."""
        prior, options = self.network.prior, batch[0].options
        images = images_to_tensor([job.image for job in batch]).to(prior.device)
        lq = prior.encode(images)
        positive, negative = self._conditions(batch, images)
        timesteps = prior.schedule.timesteps(options.steps)
        sigmas = prior.schedule.sampling_sigmas(timesteps).to(prior.device)
        noise = self._noise(batch, "start", lq)
        if options.start == "lq":
            latents = lq + sigmas[0] * noise
        else:
            latents = Schedule.exploding(noise, sigmas[0].expand(len(lq)))
        denoise = InstantIRDenoiser(self.fast.run(), lq, positive, negative, options.steps, options.loop)
        if options.sampler == "ddim":
            clean = sample_ddim(denoise, latents, sigmas, on_step, cancelled)
        else:
            clean = sample_ddpm(
                denoise, latents, sigmas, lambda i: self._noise(batch, f"step {i}", lq), on_step, cancelled
            )
        pictures = tensor_to_images(self.fast.decode(clean))
        return [
            np.ascontiguousarray(picture[: job.size[0], : job.size[1]])
            for job, picture in zip(batch, pictures, strict=True)
        ]

    def _conditions(self, batch: Sequence[_Job], images: Tensor) -> tuple[Conditions, Conditions | None]:
        """Positive and, with guidance, negative conditions."""
        prior = self.network.prior
        text, pooled = prior.embed_prompts([job.request.prompt for job in batch])
        height, width = images.shape[-2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(batch), -1)
        positive = Conditions(
            text=text, pooled=pooled, time_ids=prior.time_ids(sizes), image_tokens=prior.embed_images(images)
        )
        if not batch[0].options.loop.guided:
            return positive, None
        return positive, self.network.unconditional(positive, [job.request.negative_prompt for job in batch])

    def _noise(self, batch: Sequence[_Job], name: str, like: Tensor) -> Tensor:
        """Standard normal [B, C, h, w]; each picture's depends on its own seed only."""
        shape = tuple(like.shape[1:])
        rows = [generator(job.request.seed, name).standard_normal(shape, dtype=np.float32) for job in batch]
        return torch.from_numpy(np.stack(rows)).to(like)


def pad_to_multiple(image: Image, multiple: int) -> Image:
    """The picture [H, W, 3] with mirrored rows and columns below and to the right, up to multiples of `multiple`."""
    height, width = image.shape[:2]
    below, right = -height % multiple, -width % multiple
    if not below and not right:
        return image
    # "reflect" cannot mirror a single row without repeating it; "symmetric" can, and meets no seam worse
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect" if min(height, width) > 1 else "symmetric")


def _info(job: _Job) -> dict[str, str]:
    """What the PNG's text chunks say: enough to make the picture again."""
    options = {name: str(value) for name, value in asdict(job.options).items()}
    return {"system": "instantir", "seed": str(job.request.seed), **options}
