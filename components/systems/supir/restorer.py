"""The restorer of a trained SUPIR model, for batch jobs, the service and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.batches import group_jobs, request_noise, restore_batches
from components.color import transfer_colors
from components.images import pad_to_multiple, working_size
from components.priors.conditions import SizedConditions, join
from components.priors.fast_unet import Speed
from components.priors.pictures import Pictures
from components.priors.robust_encoder import RobustLatents
from components.priors.tiling import step_boxes, step_tile_side
from components.residence import Residence
from components.samplers.edm import (
    Churn,
    LevelDenoiser,
    Pull,
    edm_sigmas,
    karras_sigmas,
    level_table,
    sample_dpmpp_2m,
    sample_edm,
    sample_euler_ancestral,
    substep_sigmas,
)
from components.samplers.tiles import gaussian_weights, released_weights, strided_boxes, tiled
from components.systems.supir.denoiser import Ramp, SupirDenoiser
from components.systems.supir.fast import FastSupir
from components.systems.supir.network import Supir
from components.systems.supir.options import Options, parse_options
from components.systems.supir.preprocess import page_resize, released_sizes, resize, resize_result, to_tensor
from components.systems.supir.texts import negative_text, positive_text, tile_captions
from components.types import Box, Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError

RELEASED_SIZE = 1024
"""Side in the official size ids, whatever the picture's."""


@dataclass(frozen=True)
class _Job:
    """A prepared request.

    Attributes:
        index: position among the requests.
        padded: `unpadded`, padded to sides that are multiples of prior.multiple_px.
        unpadded: the input, resized to the size at which the networks run.
        size: (height, width) of the result.
        texts: the positive prompts, one for the whole picture or one for each tile, and the negative one.
        chunks: pieces of the text encoders' length that the longest of them needs.
    """

    index: int
    request: Request
    options: Options
    padded: Image
    unpadded: Image
    size: tuple[int, int]
    texts: tuple[str, ...]
    chunks: int


class SupirRestorer(Restorer):
    """SUPIR's implementation of types.Restorer.

    Args:
        network: prior, robust encoder and adaptor; their weights must not change while this object is in use.
        defaults: default options from a recipe; they replace the built-in ones.
        batch_size: largest number of pictures in a batch; they have one size and equal options. With 1, a picture's
            bytes do not depend on the other requests. Above 1, convolutions and matrix products may round differently,
            in fp32 by about 1e-6 before rounding to 8 bit; noise never depends on the company.
        speed: settings of the fast path, see fast_unet.Speed.
        device: where the phases of a restoration compute; None for the networks' own.
        offload: keep the autoencoders, the text encoders, and UNet with adaptor on the device in turns: the others wait
            on the CPU. Not with weights that `speed` fuses.

    Raises:
        ValueError: there is no adaptor, or a default is unknown or outside its range.
    """

    def __init__(
        self,
        network: Supir,
        defaults: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        speed: Speed | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
    ) -> None:
        if network.adaptor is None:
            raise ValueError("restoring needs a network with an adaptor")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network, self.batch_size = network.freeze(), batch_size
        self.defaults = parse_options(defaults or {}, Options())
        prior, speed = network.prior, speed or Speed()
        if offload and (speed.join or speed.uses_graphs):
            raise ValueError("offload moves weights: give join=false and graphs=off with it")
        self.device = prior.device if device is None else torch.device(device)
        self.fast = FastSupir(self.network, speed)
        groups = {
            "pictures": (prior.autoencoder, network.encoder),
            "texts": tuple(prior.text_encoders),
            "steps": (prior.unet, network.adaptor),
        }
        self.residence = Residence(self.device, groups, offload)
        self.table = level_table(network.prior.schedule)
        self._robust = RobustLatents(network.encoder)

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore pictures; the results are in request order.

        Args:
            requests: pictures of any sizes and aspect ratios. `size` is the size of the result. The input is resized
                before the networks run, see Options.resize. A picture larger than a tile is restored in tiles, so
                memory is bounded, apart from the latents and the 8-bit pictures.
            on_step: called after each sampler step; steps are counted over all batches of this call.
            cancelled: called before each step, and before each tile of the networks and of the autoencoder.

        Raises:
            SampleError: a picture is not uint8 RGB ("bad_image"), a size is below 1 ("bad_size"), or it has another
                number of tiles than of tile_prompts ("bad_tiles").
            ValueError: options are unknown or wrong. The message suggests the nearest option and names no request,
                since all requests with these options fail with it.
            Cancellation: `cancelled()` returned True.
        """
        jobs = [self._prepare(i, r) for i, r in enumerate(requests)]
        batches = list(group_jobs(jobs, lambda job: (job.unpadded.shape, job.options, job.chunks), self.batch_size))
        return restore_batches(batches, self._run, _info, on_step, cancelled)

    @torch.inference_mode()
    def preview(self, request: Request) -> Image:
        """The first restoration D(E_dr(lq)), uint8 at the networks' size: what a captioner should see (Fig. 18)."""
        job = self._prepare(0, request)
        height, width = job.unpadded.shape[:2]
        coder = self._pictures(job.options, None)
        with self.residence.phase("pictures"):
            (first,) = coder.decode(coder.lq_latents([job.padded]), [request.key]).images
        return np.ascontiguousarray(first[:height, :width])

    def _prepare(self, index: int, request: Request) -> _Job:
        image = request.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
        options = parse_options(request.options, self.defaults)
        height, width = request.size or image.shape[:2]
        if height < 1 or width < 1:
            raise SampleError("bad_size", f"size must be positive, got {height} x {width}", request.key)
        if options.resize == "released":
            unpadded = resize(image, released_sizes((height, width))[0])
        elif options.resize == "page":
            unpadded = page_resize(image, height / image.shape[0])
        else:
            unpadded = resize(image, working_size((height, width), options.min_side_px))
        padded = pad_to_multiple(unpadded, self.network.prior.multiple_px)
        captions = [request.prompt]
        if parts := tile_captions(options.tile_prompts):
            rows, columns = (side // self.network.prior.factor for side in padded.shape[:2])
            boxes = self._boxes(rows, columns, options)
            if len(parts) != len(boxes):
                detail = f"{len(parts)} tile_prompts for a picture of {len(boxes)} tiles"
                raise SampleError("bad_tiles", detail, request.key)
            captions = parts
        texts = [positive_text(caption, options.positive_words, options.joined_words) for caption in captions]
        texts.append(negative_text(request.negative_prompt, options.negative_words))
        chunks = 1
        if options.long_texts == "pieces":
            chunks = max(self.network.prior.prompt_chunks(text) for text in texts)
        return _Job(index, request, options, padded, unpadded, (height, width), tuple(texts), chunks)

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Job], on_step: OnStep, cancelled: Cancelled | None) -> list[Image]:
        """The restored pictures of one batch, at their result sizes."""
        prior, options, keys = self.network.prior, batch[0].options, [job.request.key for job in batch]
        shape = (prior.latent_channels, *(side // prior.factor for side in batch[0].padded.shape[:2]))
        coder = self._pictures(options, cancelled)
        target, styles = None, [job.padded for job in batch]
        with self.residence.phase("pictures"):
            lq = coder.lq_latents([job.padded for job in batch])
            pulled = options.tau > 0 and options.algorithm == "released"
            colored = options.color != "none" and options.color_from == "first"
            if pulled or colored:
                firsts = coder.decode(lq, keys)
                if colored:
                    styles = firsts.images
                if pulled:
                    noise = self._noise(batch, "encode", shape) if options.encoding == "sample" else None
                    target = coder.latents(firsts, noise).to(self.device)
                del firsts
        lq = lq.to(self.device)
        boxes = self._boxes(shape[1], shape[2], options)
        with self.residence.phase("texts"):
            conditions = self._all_conditions(batch, boxes)
        with self.residence.phase("steps"):
            denoise = self._denoiser(batch, lq, conditions, boxes, cancelled)
            clean = self._sample(batch, denoise, lq if target is None else target, shape, on_step, cancelled)
        del lq, target, denoise
        with self.residence.phase("pictures"):
            pictures = coder.decode(clean, keys).images
        return [_finish(*each) for each in zip(batch, pictures, styles, strict=True)]

    def _pictures(self, options: Options, cancelled: Cancelled | None) -> Pictures:
        return Pictures(prior=self.fast, robust=self._robust, tiles=options.autoencoder_tiles, cancelled=cancelled)

    def _sample(
        self,
        batch: Sequence[_Job],
        denoise: LevelDenoiser,
        target: Tensor,
        shape: tuple[int, ...],
        on_step: OnStep,
        cancelled: Cancelled | None,
    ) -> Tensor:
        """Clean latents [B, C, h, w]; `target` of the restoration guidance has their shape."""
        options, device = batch[0].options, self.device
        table = self.table.to(device)
        sigma_max = table[-1]
        noise = self._noise(batch, "start", shape)
        step_noise: Callable[[int], Tensor] = lambda step: self._noise(batch, f"step {step}", shape)  # noqa: E731
        if options.algorithm == "paper":
            latents = noise * sigma_max
        else:
            latents = noise * (1 + sigma_max.square()).sqrt()
        if options.sampler == "substep":
            sigmas = substep_sigmas(table, options.steps)
            return sample_euler_ancestral(
                denoise, latents, sigmas, step_noise, 1.0, options.noise_scale, on_step, cancelled
            )
        sigmas = edm_sigmas(table, options.steps)
        if options.sampler == "dpmpp2m":
            levels = karras_sigmas(options.steps, float(sigmas[-2]), float(sigma_max)).to(device)
            return sample_dpmpp_2m(
                denoise, latents, levels, step_noise, 1.0, options.noise_scale, on_step=on_step, cancelled=cancelled
            )
        pull = None
        if options.tau:
            pull = Pull(target=target, tau=options.tau, sigma_max=float(sigma_max))
            if options.algorithm == "paper":
                pull = replace(pull, low=-1.0)  # every step, the last one too
        churn = Churn(amount=options.churn, noise_scale=options.noise_scale)
        return sample_edm(denoise, latents, sigmas, step_noise, churn, pull, on_step, cancelled)

    def _all_conditions(self, batch: Sequence[_Job], boxes: Sequence[Box]) -> list[SizedConditions]:
        """SizedConditions of the whole picture, or of each tile; with guidance the negative rows come first."""
        options, prior = batch[0].options, self.network.prior
        size = (RELEASED_SIZE, RELEASED_SIZE)
        if options.sizes == "tile":
            size = (boxes[0][2] * prior.factor, boxes[0][3] * prior.factor)
        conditions = [self._conditions(batch, place, size) for place in range(len(batch[0].texts) - 1)]
        if options.guided:
            negative = self._conditions(batch, -1, size)
            conditions = [join([negative, positive]) for positive in conditions]
        return conditions

    def _denoiser(
        self,
        batch: Sequence[_Job],
        lq: Tensor,
        conditions: Sequence[SizedConditions],
        boxes: Sequence[Box],
        cancelled: Cancelled | None,
    ) -> LevelDenoiser:
        """The networks as a denoiser over the whole latents, in tiles where they do not fit in one."""
        options = batch[0].options
        cfg, control = options.cfg_ends, options.control_ends
        whole = SupirDenoiser(
            predict=self.fast.run().predict_eps,
            table=self.table.to(self.device),
            lq=lq,
            conditions=conditions[0],
            guided=options.guided,
            cfg_scale=Ramp(start=cfg[0], end=cfg[1]),
            control_scale=Ramp(start=control[0], end=control[1]),
            sigma_max=float(self.table[-1]),
            tiles=dict(zip(boxes, conditions, strict=True)) if len(conditions) > 1 else {},
        )
        weigh = released_weights if options.tiles == "released" else gaussian_weights
        return tiled(whole, lq.shape[-2], lq.shape[-1], boxes, cancelled, weigh)

    def _conditions(self, batch: Sequence[_Job], place: int, size: tuple[int, int]) -> SizedConditions:
        """SizedConditions of the texts at `place`, for the whole batch.

        Args:
            size: (height, width) in the size ids.
        """
        texts = [job.texts[place] for job in batch]
        return self.network.prior.sized_conditions(texts, size, self.device, batch[0].chunks)

    def _boxes(self, height: int, width: int, options: Options) -> list[Box]:
        """The tiles of a picture, in latent pixels; a picture that fits in one tile has one."""
        prior = self.network.prior
        side = step_tile_side(prior, options.tile_px)
        if options.tiles == "released" and min(height, width) >= side:
            return strided_boxes(height, width, side, max(1, side // 2))
        return step_boxes(prior, height, width, options.tile_px, options.tile_overlap)

    def _noise(self, batch: Sequence[_Job], name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise of each request's seed, [B, *shape]."""
        return request_noise([job.request for job in batch], name, shape, self.device)


def _finish(job: _Job, picture: Image, style: Image) -> Image:
    """Remove the padding, transfer the colours of `style` and resize to the result's size."""
    height, width = job.unpadded.shape[:2]
    picture, style = (np.ascontiguousarray(each[:height, :width]) for each in (picture, style))
    picture = transfer_colors(picture, style, job.options.color)
    if job.options.resize == "released":
        return resize_result(to_tensor(picture), job.size)
    return resize(picture, job.size)


def _info(job: _Job) -> dict[str, str]:
    """The system, the seed and all options, for the PNG's text chunks; restoring.png_text adds model and prompt."""
    options = {name: str(value) for name, value in asdict(job.options).items()}
    return {"system": "supir", "seed": str(job.request.seed), **options}
