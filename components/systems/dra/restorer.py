"""The restorer of a trained DRA model, for batch jobs, the service and evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from components.batches import group_jobs, restore_batches
from components.color import transfer_colors
from components.images import pad_to_multiple, working_size
from components.options import option_texts, replace_options
from components.picture_restorer import check_request, resize_bicubic
from components.priors.conditions import Conditions, join
from components.priors.fast_unet import Speed
from components.priors.pictures import Pictures
from components.priors.resident import ResidentNetwork, Updates
from components.priors.robust_encoder import RobustLatents
from components.priors.tiling import step_boxes
from components.residence import Residence
from components.systems.dra.bundle import Bundle
from components.systems.dra.options import SAMPLERS, Options, check_sampler
from components.systems.dra.steps import Run, Steps, steps_of, text_encoders_of
from components.systems.dra.texts import negative_text
from components.tensors import images_to_tensor
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer


@dataclass(frozen=True)
class _Job:
    """A prepared request.

    Attributes:
        index: position among the requests.
        padded: `unpadded`, padded to sides that are multiples of prior.multiple_px.
        unpadded: the input, resized to the size at which the networks run.
        size: (height, width) of the result.
        texts: the prompt and the negative prompt.
        chunks: pieces of the text encoders' length that the longer of them needs.
    """

    index: int
    request: Request
    options: Options
    padded: Image
    unpadded: Image
    size: tuple[int, int]
    texts: tuple[str, str]
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Shared:
    """One model among several on a prior that is in memory once.

    Attributes:
        resident: the prior's denoiser.
        updates: the model's LoRA.
        like: the restorer of an earlier model, which has what is derived from the prior; None for none.
    """

    resident: ResidentNetwork
    updates: Updates
    like: DraRestorer | None = None

    def turn(self) -> AbstractContextManager[None]:
        """The denoiser has this model's LoRA inside."""
        return self.resident.turn(self.updates)


class DraRestorer(Restorer):
    """DRA's implementation of types.Restorer.

    Args:
        network: the networks; their weights must not change while this object is in use.
        defaults: default options from a recipe; they replace the built-in ones.
        batch_size: largest number of pictures in a batch; they have one size and equal options. With 1, a picture's
            bytes do not depend on the other requests.
        speed: settings of the fast path, see fast_unet.Speed.
        device: where the phases of a restoration compute; None for the networks' own.
        offload: keep the autoencoders, the text encoders, and denoiser with adapters on the device in turns: the others
            wait on the CPU. Not with weights that `speed` fuses.
        shared: the place of this model among several on one prior; None if the prior is its own.

    Raises:
        ValueError: a default is unknown or outside its range.
    """

    def __init__(
        self,
        network: Bundle[Any, Any],
        defaults: Mapping[str, object] | None = None,
        batch_size: int = 1,
        speed: Speed | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
        shared: Shared | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.network, self.batch_size = network.freeze(), batch_size
        self.defaults = replace_options({"sampler": SAMPLERS[network.shape][0], **(defaults or {})}, Options())
        check_sampler(self.defaults.sampler, network.shape)
        prior, speed, encoder = network.prior, speed or Speed(), network.encoder
        if offload and (speed.join or speed.uses_graphs):
            raise ValueError("offload moves weights: give join=false and graphs=off with it")
        self.device = prior.device if device is None else torch.device(device)
        self.shared = shared
        like: Steps | None = None if shared is None or shared.like is None else shared.like.steps
        self.steps: Steps = steps_of(self.network, speed, like, resident=shared is not None)
        groups = {
            "pictures": (prior.autoencoder, *(() if encoder is None else (encoder,))),
            "texts": text_encoders_of(network),
            "steps": (prior.network, network.adapters),
        }
        self.residence = Residence(self.device, groups, offload)
        self._robust = None if encoder is None else RobustLatents(encoder)

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore pictures; the results are in request order.

        Args:
            requests: pictures of any sizes and aspect ratios. `size` is the size of the result, at which the networks
                run. A picture larger than a tile is restored in tiles, so memory is bounded, apart from the latents,
                the LQ features and the 8-bit pictures.
            on_step: called after each sampler step; steps are counted over all batches of this call.
            cancelled: called before each step, and before each tile of the networks and of the autoencoder.

        Raises:
            SampleError: a picture is not uint8 RGB ("bad_image"), or a size is below 1 ("bad_size").
            ValueError: options are unknown or wrong. The message suggests the nearest option and names no request,
                since all requests with these options fail with it.
            Cancellation: `cancelled()` returned True.
        """
        with self.shared.turn() if self.shared is not None else contextlib.nullcontext():
            # tokenizers keep padding and truncation of the latest call, so the texts belong to the turn as well
            jobs = [self._prepare(index, request) for index, request in enumerate(requests)]
            batches = list(group_jobs(jobs, lambda job: (job.unpadded.shape, job.options, job.chunks), self.batch_size))
            return restore_batches(batches, self._run, _info, on_step, cancelled)

    def _prepare(self, index: int, request: Request) -> _Job:
        size = check_request(request)
        options = replace_options(request.options, self.defaults)
        check_sampler(options.sampler, self.network.shape)
        unpadded = resize_bicubic(request.image, working_size(size, options.min_side_px))
        padded = pad_to_multiple(unpadded, self.network.prior.multiple_px)
        texts = (request.prompt, negative_text(request.negative_prompt, options.negative_words))
        return _Job(index, request, options, padded, unpadded, size, texts, self.steps.chunks(texts))

    @torch.inference_mode()
    def _run(self, batch: Sequence[_Job], on_step: OnStep, cancelled: Cancelled | None) -> list[Image]:
        """The restored pictures of one batch, at their result sizes."""
        prior, options = self.network.prior, batch[0].options
        tiles = options.autoencoder_tiles
        coder = Pictures(prior=self.steps.autoencoder, robust=self._robust, tiles=tiles, cancelled=cancelled)
        with self.residence.phase("pictures"):
            lq = coder.lq_latents([job.padded for job in batch]).to(self.device)
        pictures = images_to_tensor([job.padded for job in batch]) if self.network.sees_pictures else None
        height, width = lq.shape[-2:]
        boxes = step_boxes(prior, height, width, options.tile_px, options.tile_overlap)
        with self.residence.phase("texts"):
            conditions = self._conditions(batch, (boxes[0][2] * prior.factor, boxes[0][3] * prior.factor))
        with self.residence.phase("steps"):
            run = Run(
                options=options,
                requests=[job.request for job in batch],
                lq=lq,
                pictures=pictures,
                conditions=conditions,
                boxes=boxes,
                on_step=on_step,
                cancelled=cancelled,
            )
            clean = self.steps.sample(run)
        del run, lq, pictures
        with self.residence.phase("pictures"):
            restored = coder.decode(clean, [job.request.key for job in batch]).images
        return [_finish(job, picture) for job, picture in zip(batch, restored, strict=True)]

    def _conditions(self, batch: Sequence[_Job], size: tuple[int, int]) -> Conditions:
        """Conditions of the batch, for tiles of (height, width) `size`; with guidance the negative rows come first."""
        chunks = batch[0].chunks
        positive = self.steps.conditions([job.texts[0] for job in batch], size, self.device, chunks)
        if not batch[0].options.guided:
            return positive
        negative = self.steps.conditions([job.texts[1] for job in batch], size, self.device, chunks)
        return join([negative, positive])


def _finish(job: _Job, picture: Image) -> Image:
    """Remove the padding, transfer the colours of LQ and resize to the result's size."""
    height, width = job.unpadded.shape[:2]
    picture = np.ascontiguousarray(picture[:height, :width])
    return resize_bicubic(transfer_colors(picture, job.unpadded, job.options.color), job.size)


def _info(job: _Job) -> dict[str, str]:
    """The system, the seed and all options, for the PNG's text chunks; restoring.png_text adds model and prompt."""
    return {"system": "dra", "seed": str(job.request.seed), **option_texts(job.options)}
