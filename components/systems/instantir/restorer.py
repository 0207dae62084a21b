"""The restorer of a trained InstantIR model, for batch jobs, the service and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from components.batches import group_jobs, request_noise, restore_batches
from components.color import transfer_colors
from components.images import pad_to_multiple, working_size
from components.priors.tiling import decode_images, encode_images, step_boxes
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.schedules import Schedule
from components.samplers.tiles import tiled
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.fast import FastInstantIR, Speed
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.options import Options, parse_options
from components.systems.instantir.preprocess import released_sizes, resize, view_pixels
from components.systems.instantir.references import REFERENCE_NOISE
from components.types import Box, Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError


@dataclass(frozen=True)
class _Job:
    """A prepared request.

    Attributes:
        index: position among the requests.
        padded: `unpadded`, padded to sides that are multiples of prior.multiple_px.
        unpadded: the input, resized to the size at which the networks run.
        hq: the HQ reference, resized and padded like the input; None unless options.reference is "hq".
        size: (height, width) of the result.
    """

    index: int
    request: Request
    options: Options
    padded: Image
    unpadded: Image
    hq: Image | None
    size: tuple[int, int]


class InstantIRRestorer(Restorer):
    """InstantIR's implementation of types.Restorer.

    Args:
        network: networks with perceptor, previewer and aggregator; their weights must not change while this object is
            in use.
        defaults: default options from a recipe; they replace the built-in ones.
        batch_size: largest number of pictures in a batch; they have one size and equal options. With 1, a picture's
            bytes do not depend on the other requests, so the service and the batch job give equal bytes. Above 1,
            convolutions and matrix products may round differently, by about 1e-6 before rounding to 8 bit.
        speed: settings of the fast path, see fast.Speed.

    Raises:
        ValueError: a part is missing, or a default is unknown or outside its range.
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
        """Restore pictures; the results are in request order.

        Args:
            requests: pictures of any sizes and aspect ratios. `size` is the size of the result. The input is resized
                before the networks run, see Options.resize. A picture larger than a tile is restored in tiles, so
                memory is bounded, apart from the latents and the 8-bit pictures.
            on_step: called after each sampler step; steps are counted over all batches of this call.
            cancelled: called before each step.

        Raises:
            SampleError: a picture is not uint8 RGB ("bad_image"), or a size is below 1 ("bad_size").
            ValueError: options are unknown or wrong. The message suggests the nearest option and names no request,
                since all requests with these options fail with it.
            Cancellation: `cancelled()` returned True.
        """
        jobs = [self._prepare(i, r) for i, r in enumerate(requests)]
        batches = list(group_jobs(jobs, lambda job: (job.unpadded.shape, job.options), self.batch_size))
        return restore_batches(batches, self._run, _info, on_step, cancelled)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image]:
        """Return the pictures of the preview latents in a StepEvent, uint8 [H, W, 3], with the padding."""
        return decode_images(self.fast, latents, keys=["preview"] * len(latents))

    def _prepare(self, index: int, request: Request) -> _Job:
        image = request.image
        if not _is_picture(image):
            raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
        options = parse_options(request.options, self.defaults)
        height, width = request.size or image.shape[:2]
        if height < 1 or width < 1:
            raise SampleError("bad_size", f"size must be positive, got {height} x {width}", request.key)
        work_size, resampling = _work_size(image, (height, width), options)
        unpadded = resize(image, work_size, resampling)
        hq = None
        if options.reference == "hq":
            if (
                request.reference is None
            ):  # names no picture: a batch job ends if its first pictures all fail for one reason
                raise ValueError("option reference=hq needs the HQ picture of every input: give each input a reference")
            if not _is_picture(request.reference):
                raise SampleError("bad_image", "the reference is not a uint8 [H, W, 3] picture", request.key)
            hq = pad_to_multiple(resize(request.reference, work_size, resampling), self.network.prior.multiple_px)
        padded = pad_to_multiple(unpadded, self.network.prior.multiple_px)
        return _Job(index, request, options, padded, unpadded, hq, (height, width))

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Job], on_step: OnStep, cancelled: Cancelled | None) -> list[Image]:
        """The restored pictures of one batch, at their result sizes."""
        prior, options = self.network.prior, batch[0].options
        shape = (prior.latent_channels, *(side // prior.factor for side in batch[0].padded.shape[:2]))
        noise = self._noise(batch, "encode", shape) if options.encoding == "sample" else None
        lq = encode_images(self.fast, [job.padded for job in batch], noise=noise)
        references = [job.hq for job in batch if job.hq is not None]
        hq = encode_images(self.fast, references) if references else None
        del noise
        boxes = self._boxes(shape[1], shape[2], options)
        positive, negative = self._conditions(batch, (boxes[0][2] * prior.factor, boxes[0][3] * prior.factor))
        timesteps = prior.sampling.timesteps(prior.schedule, options.steps)
        sigmas = prior.sampling.sigmas(prior.schedule, timesteps, options.sampler == "ddpm").to(prior.device)
        latents = self._noise(batch, "start", shape)
        if options.start == "lq":
            latents = latents.mul_(sigmas[0]).add_(lq)
        else:
            latents = Schedule.exploding(latents, sigmas[0].expand(len(lq)))
        denoiser = InstantIRDenoiser(
            self.fast.run(),
            lq,
            positive,
            negative,
            options.steps,
            options.loop,
            hq=hq,
            noise=lambda i: self._noise(batch, f"{REFERENCE_NOISE} {i}", shape),
        )
        denoise = tiled(denoiser, shape[1], shape[2], boxes, cancelled)
        if options.sampler == "ddim":
            clean = sample_ddim(denoise, latents, sigmas, on_step, cancelled)
        else:
            step_noise = lambda i: self._noise(batch, f"step {i}", shape)  # noqa: E731
            clean = sample_ddpm(denoise, latents, sigmas, step_noise, on_step, cancelled)
        del denoiser, denoise, latents, lq, hq
        finished = Schedule.preserving(clean, sigmas[-1].expand(len(clean)))
        pictures = decode_images(self.fast, finished, keys=[job.request.key for job in batch])
        return [_finish(job, picture) for job, picture in zip(batch, pictures, strict=True)]

    def _boxes(self, height: int, width: int, options: Options) -> list[Box]:
        """The tiles of a picture, in latent pixels; a picture that fits in one tile has one."""
        return step_boxes(self.network.prior, height, width, options.tile_px, options.tile_overlap)

    def _conditions(self, batch: Sequence[_Job], size: tuple[int, int]) -> tuple[Conditions, Conditions | None]:
        """The positive conditions, and the negative ones if guidance is on (else None).

        Every tile gets the image tokens of the whole picture. Its size ids are those of a picture of the tile's size,
        because the size and crop offsets of a large picture are far outside the prior's training range
        (docs/decisions/0006).

        Args:
            size: (height, width) of a tile in pixels, or of the picture if it is not tiled.
        """
        prior = self.network.prior
        text, pooled = prior.embed_prompts([job.request.prompt for job in batch])
        sizes = torch.tensor([[*size, 0, 0, *size]]).expand(len(batch), -1)
        views = torch.stack([view_pixels(job.unpadded, prior.view, batch[0].options.view) for job in batch])
        pixels = views.flatten(0, 1).to(prior.device, next(prior.image_encoder.parameters()).dtype)
        tokens = prior.image_encoder(pixel_values=pixels).last_hidden_state
        positive = Conditions(
            text=text,
            pooled=pooled,
            time_ids=prior.time_ids(sizes),
            image_tokens=tokens.unflatten(0, views.shape[:2]),
        )
        if not batch[0].options.loop.guided:
            return positive, None
        return positive, self.network.unconditional(positive, [job.request.negative_prompt for job in batch])

    def _noise(self, batch: Sequence[_Job], name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of each request's seed, [B, *shape]."""
        return request_noise([job.request for job in batch], name, shape, self.network.prior.device)


def _is_picture(image: Image) -> bool:
    return image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and 0 not in image.shape


def _work_size(image: Image, size: tuple[int, int], options: Options) -> tuple[tuple[int, int], Pillow.Resampling]:
    """Return (height, width) at which the networks run, without padding, and the filter that resizes to it."""
    if options.resize == "released":
        (width, height), _ = released_sizes((image.shape[1], image.shape[0]), size[1], size[0])
        return (height, width), Pillow.Resampling.BILINEAR
    return working_size(size, options.min_side_px), Pillow.Resampling.BICUBIC


def _finish(job: _Job, picture: Image) -> Image:
    """Remove the padding, transfer the colours and resize to the result's size."""
    height, width = job.unpadded.shape[:2]
    picture = transfer_colors(np.ascontiguousarray(picture[:height, :width]), job.unpadded, job.options.color)
    resampling = Pillow.Resampling.BILINEAR if job.options.resize == "released" else Pillow.Resampling.BICUBIC
    return resize(picture, job.size, resampling)


def _info(job: _Job) -> dict[str, str]:
    """The system, the seed and all options, for the PNG's text chunks; restoring.png_text adds model and prompt."""
    options = {name: str(value) for name, value in asdict(job.options).items()}
    return {"system": "instantir", "seed": str(job.request.seed), **options}
