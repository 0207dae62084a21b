"""Restores pictures with a trained InstaRevive: coarse restorer, encoder, one step, decoder; large ones in tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor, nn

from components.color import transfer_colors
from components.images import pad_to_multiple, working_size
from components.priors.conditions import Conditions
from components.priors.tiling import TILE, decode_images, encode_images, paint
from components.randomness import generator as random_generator
from components.samplers.tiles import equal_weights, gaussian_weights, tile_boxes, tiled
from components.systems.instarevive import parity
from components.systems.instarevive.backbone import Backbone
from components.systems.instarevive.fast import FastOneStep, Speed
from components.systems.instarevive.network import OneStepGenerator
from components.systems.instarevive.options import FIXED_PROMPTS, Options, parse_options
from components.tensors import images_to_tensor
from components.types import (
    Box,
    Cancellation,
    Cancelled,
    Denoiser,
    Image,
    OnStep,
    Request,
    Restored,
    Restorer,
    SampleError,
    StepEvent,
)

COARSE_TILE_PX = 1024
"""Larger pictures go through the coarse restorer in tiles; the number is ours."""

WHITE = 128
"""A pixel is missing where the reference picture's mean over channels is at least this; the number is ours."""


@dataclass(frozen=True)
class Coarse:
    """A coarse restorer.

    Attributes:
        network: [B, 3, H, W] in [0, 1] -> the same shape, not clipped.
        multiple_px: sides must be multiples of it.
    """

    network: nn.Module
    multiple_px: int = 64

    def __call__(self, images: Tensor) -> Tensor:
        """float32 for every dtype of the network."""
        weight = next(self.network.parameters())
        return self.network(images.to(weight)).to(torch.float32)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Job:
    """A prepared request.

    Attributes:
        index: its position among the requests.
        image: the picture at the working size, padded to the multiples that the networks need.
        missing: bool [H, W] of that size, true where a pixel is missing; None to restore all.
        inside: (height, width) of `image` without its padding.
        size: (height, width) of the result.
    """

    index: int
    request: Request
    options: Options
    image: Image
    missing: np.ndarray | None
    inside: tuple[int, int]
    size: tuple[int, int]


class InstaReviveRestorer(Restorer):
    """See types.Restorer.

    Args:
        generator: trained.
        backbone: its prior.
        coarse: restorer in front of the generator; None for none.
        defaults: options that replace the built-in defaults, from a recipe.
        batch_size: pictures of equal size and options that go through the networks together. With 1, a picture's bytes
            do not depend on the other requests; above, rounding may differ by about 1e-6.
        speed: how the networks are made fast; their weights must not change while this object is used.

    Raises:
        ValueError: a default is unknown or out of range.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        backbone: Backbone,
        coarse: Coarse | None = None,
        defaults: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        speed: Speed | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.generator, self.backbone, self.coarse = generator.eval(), backbone, coarse
        self.batch_size, self.defaults = batch_size, parse_options(defaults or {}, Options())
        self.fast = FastOneStep(generator, backbone, speed)
        self.multiple_px = backbone.factor * generator.predictor.multiple

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order.

        Args:
            requests: any sizes and aspects; `size` enlarges or shrinks by bicubic interpolation first. A picture
                larger than a tile is restored in tiles. Memory is then bounded, except for the latents and the 8-bit
                pictures. The seed has an effect if the generator takes noise.
            on_step: called after each batch, as a picture takes one step.
            cancelled: called before each batch and each tile of the generator.

        Raises:
            SampleError: a picture that is not uint8 RGB ("bad_image"), an impossible size ("bad_size"), or inpainting
                without a missing pixel ("no_mask").
            ValueError: unknown or wrong options; the message names the nearest option.
            Cancellation: `cancelled()` became true.
        """
        batches = list(self._batches([self._prepare(i, r) for i, r in enumerate(requests)]))
        restored: dict[int, Restored] = {}
        for number, batch in enumerate(batches, start=1):
            if cancelled is not None and cancelled():
                raise Cancellation("cancelled between two pictures")
            for job, image in zip(batch, self._run(batch, cancelled), strict=True):
                restored[job.index] = Restored(key=job.request.key, image=image, info=_info(job))
            if on_step is not None:
                on_step(StepEvent(step=number, of=len(batches)))
        return [restored[i] for i in range(len(requests))]

    @torch.inference_mode()
    def preview(self, request: Request) -> Image | None:
        """The coarse restoration of a request's picture, for captions.

        Returns:
            uint8 [H, W, 3] at the working size; None without a coarse restorer.

        Raises:
            SampleError, ValueError: as in restore.
        """
        job = self._prepare(0, request)
        if self.coarse is None or not job.options.coarse:
            return None
        height, width = job.inside
        return np.ascontiguousarray(self._coarse_images([job.image], [request.key])[0][:height, :width])

    def check_prompts_used(self, options: Mapping[str, Any]) -> None:
        """Check that the options pass each request's own prompt to the network.

        Raises:
            ValueError: they use a fixed prompt.
        """
        text = parse_options(options, Options()).text  # a default text gives way to a picture's own prompt
        if text != "given":
            raise ValueError(f"text={text} uses one fixed prompt for all pictures: set text=given for their own")

    def _prepare(self, index: int, request: Request) -> Job:
        image = request.image
        if not _is_picture(image):
            raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
        options = parse_options(request.options, self.defaults)
        if request.prompt and not {"text", "preset"} & set(request.options):
            options = replace(options, text="given")  # a prompt of the request goes before the model's default text
        height, width = request.size or image.shape[:2]
        if height < 1 or width < 1:
            raise SampleError("bad_size", f"size must be positive, got {height} x {width}", request.key)
        work = working_size((height, width), options.min_side_px)
        mask = None if options.inpaint == "none" else _missing(request, options)
        if mask is not None:  # as in training: the networks must not see what is missing
            image = np.where(mask[:, :, None] > 0, np.uint8(255), image)
        resized = _resize(image, work, Pillow.Resampling.BICUBIC)
        multiple = self.multiple_px
        if self.coarse is not None and options.coarse:
            multiple = math.lcm(multiple, self.coarse.multiple_px)
        padded = (
            pad_to_multiple(resized, multiple) if options.padding == "mirror" else _pad_with_zeros(resized, multiple)
        )
        missing = None
        if mask is not None:
            resized_mask = _resize(mask, work, Pillow.Resampling.NEAREST) > 0
            missing = np.zeros(padded.shape[:2], dtype=bool)
            missing[: work[0], : work[1]] = resized_mask
        return Job(index, request, options, padded, missing, work, (height, width))

    def _batches(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Batches of jobs with equal working size and options, in order of their first appearance."""
        groups: dict[Any, list[Job]] = {}
        for job in jobs:
            groups.setdefault((job.image.shape, job.inside, job.options), []).append(job)
        for group in groups.values():
            for first in range(0, len(group), self.batch_size):
                yield group[first : first + self.batch_size]

    @torch.inference_mode()
    def _run(self, batch: Sequence[Job], cancelled: Cancelled | None) -> list[Image]:
        """Restored pictures of one batch, at their sizes."""
        options = batch[0].options
        if options.released:
            return self._run_released(batch, cancelled)
        images = [job.image for job in batch]
        use_coarse = self.coarse is not None and options.coarse
        sources = self._coarse_images(images, _keys(batch)) if use_coarse else images
        lq = encode_images(self.fast, sources)
        clean = self._clean(batch, lq, self._boxes(lq, options), cancelled)
        if batch[0].missing is not None:
            input_latents = encode_images(self.fast, images) if use_coarse else lq
            clean = torch.where(self._missing_latents(batch, F.adaptive_max_pool2d), clean, input_latents)
        pictures = decode_images(self.fast, clean, keys=_keys(batch))
        results = []
        for job, picture, source in zip(batch, pictures, sources, strict=True):
            height, width = job.inside
            picture, source = (np.ascontiguousarray(p[:height, :width]) for p in (picture, source))
            picture = transfer_colors(picture, source, options.color)
            results.append(_resize(picture, job.size, Pillow.Resampling.BICUBIC))
        return results

    def _run_released(self, batch: Sequence[Job], cancelled: Cancelled | None) -> list[Image]:
        """Like the official command line; see options.PRESETS."""
        options = batch[0].options
        pixels = (images_to_tensor([job.image for job in batch]) * 0.5 + 0.5).to(self.backbone.device)
        source = self.coarse(pixels) if self.coarse is not None and options.coarse else pixels
        lq = self.fast.encode(source * 2 - 1)
        boxes = self._boxes(lq, options)
        clean = self._clean(batch, lq, boxes, cancelled)
        if batch[0].missing is not None:
            input_latents = self.fast.encode(pixels * 2 - 1)
            clean = torch.where(self._missing_latents(batch, parity.nearest_pool), clean, input_latents)
        if options.tiles == "never":
            restored = self.fast.decode(clean) / 2 + 0.5
        else:
            restored = parity.decode_windows(
                self.fast.decode, clean, source, boxes, self.backbone.factor, options.color
            )
        results = []
        pictures = parity.to_levels(restored, options.rounding, _keys(batch))
        for job, picture in zip(batch, pictures, strict=True):
            height, width = job.inside
            inside = np.ascontiguousarray(picture[:height, :width])
            results.append(_resize(inside, job.size, Pillow.Resampling.LANCZOS))
        return results

    def _clean(self, batch: Sequence[Job], lq: Tensor, boxes: Sequence[Box], cancelled: Cancelled | None) -> Tensor:
        """Clean latents of LQ latents [B, C, h, w], in tiles."""
        options, factor = batch[0].options, self.backbone.factor
        height, width = boxes[0][2] * factor, boxes[0][3] * factor
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(batch), -1)
        conditions = self.backbone.conditions([_prompt(job) for job in batch], sizes)
        noise = self._noise(batch, lq) if self.generator.takes_noise else None
        weigh = gaussian_weights if options.window == "gaussian" else equal_weights
        step = tiled(_Step(self.fast, conditions, noise), lq.shape[-2], lq.shape[-1], boxes, cancelled, weigh)
        return step(lq, lq.new_zeros(len(lq)))

    def _boxes(self, lq: Tensor, options: Options) -> list[Box]:
        """Tiles of the latent grid; one if the picture is at most as large as a tile, or with tiles=never."""
        height, width = int(lq.shape[-2]), int(lq.shape[-1])
        multiple = self.generator.predictor.multiple
        side = options.tile_px // self.backbone.factor or self._native_side()
        side = max(multiple, side // multiple * multiple)
        if options.tiles == "never" or max(height, width) <= side:
            return [(0, 0, height, width)]
        if options.window == "equal":
            return parity.windows(height, width, side, max(1, round(side * (1 - options.tile_overlap))))
        return tile_boxes(height, width, (side, side), options.tile_overlap, multiple)

    def _native_side(self) -> int:
        """Side of the network's native size in latent pixels; TILE if its configuration has none."""
        side = self.generator.predictor.network.config.get("sample_size")  # type: ignore[union-attr, operator]
        return side if isinstance(side, int) else TILE

    def _coarse_images(self, images: Sequence[Image], keys: Sequence[str]) -> list[Image]:
        """Coarse restorations of pictures of one size, rounded to 8 bits; in tiles above COARSE_TILE_PX."""
        assert self.coarse is not None
        device, multiple = self.backbone.device, self.coarse.multiple_px
        coarse = self.coarse

        def run(top: int, bottom: int, left: int, right: int) -> Tensor:
            rows, columns = (slice(a * multiple, b * multiple) for a, b in ((top, bottom), (left, right)))
            pixels = images_to_tensor([image[rows, columns] for image in images]).to(device)
            return coarse(pixels * 0.5 + 0.5) * 2 - 1

        size = (images[0].shape[0] // multiple, images[0].shape[1] // multiple)
        return paint(len(images), size, max(1, COARSE_TILE_PX // multiple), 1, 1, multiple, run, keys)

    def _missing_latents(self, batch: Sequence[Job], pool: Any) -> Tensor:
        """bool [B, 1, h, w]: latents with a missing pixel.

        Args:
            pool: (float [B, 1, H, W], (h, w)) -> [B, 1, h, w].
        """
        masks = np.stack([job.missing for job in batch if job.missing is not None])
        pixels = torch.from_numpy(masks).to(self.backbone.device, torch.float32)[:, None]
        size = tuple(side // self.backbone.factor for side in masks.shape[1:])
        return pool(pixels, size) > 0  # type: ignore[no-any-return]

    def _noise(self, batch: Sequence[Job], lq: Tensor) -> Tensor:
        """Standard normal of lq's shape for whole pictures; each depends on its own request's seed only."""
        shape = tuple(lq.shape[1:])
        rows = [random_generator(job.request.seed, "start").standard_normal(shape, dtype=np.float32) for job in batch]
        return torch.from_numpy(np.stack(rows)).to(lq)


class _Step:
    """The generator as a Denoiser for samplers.tiles: `tile` crops the noise with the latents; sigma is ignored."""

    def __init__(self, fast: FastOneStep, conditions: Conditions, noise: Tensor | None) -> None:
        self.fast, self.conditions, self.noise = fast, conditions, noise

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return self.fast.generate(latents, self.conditions, self.noise)

    def tile(self, box: Box) -> Denoiser:
        top, left, height, width = box
        noise = None if self.noise is None else self.noise[..., top : top + height, left : left + width].contiguous()
        return _Step(self.fast, self.conditions, noise)


def _keys(batch: Sequence[Job]) -> list[str]:
    return [job.request.key for job in batch]


def _prompt(job: Job) -> str:
    return job.request.prompt if job.options.text == "given" else FIXED_PROMPTS[job.options.text]


def _is_picture(image: Image) -> bool:
    return image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and 0 not in image.shape


def _missing(request: Request, options: Options) -> Image:
    """uint8 [H, W], 255 where a pixel of the request's picture is missing; raises SampleError."""
    if options.inpaint == "white":
        missing = (request.image == 255).all(axis=2)
    else:
        if request.reference is None:  # not a SampleError: a job without masks must end at once
            raise ValueError(
                "inpaint=reference needs a mask for each input: give a reference that is white where pixels are missing"
            )
        if not _is_picture(request.reference):
            raise SampleError("bad_image", "the reference is not a uint8 [H, W, 3] picture", request.key)
        size = (request.image.shape[0], request.image.shape[1])
        missing = _resize(request.reference, size, Pillow.Resampling.NEAREST).mean(axis=2) >= WHITE
    if not missing.any():
        raise SampleError("no_mask", f"inpaint {options.inpaint} finds no missing pixel", request.key)
    return missing.astype(np.uint8) * 255


def _pad_with_zeros(image: Image, multiple: int) -> Image:
    """Black rows and columns below and to the right, up to multiples."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % multiple), (0, -width % multiple), (0, 0)))


def _resize(image: Image, size: tuple[int, int], resampling: Pillow.Resampling) -> Image:
    """uint8 [H, W, 3] or [H, W] resized to (height, width) by Pillow; unchanged if it has that size."""
    if image.shape[:2] == size:
        return image
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), resampling))


def _info(job: Job) -> dict[str, str]:
    """Text chunks of the PNG: enough to restore the picture again."""
    options = {name: str(value) for name, value in asdict(job.options).items()}
    return {"system": "instarevive", "seed": str(job.request.seed), **options}
