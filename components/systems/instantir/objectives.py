"""Objectives of InstantIR's three training stages: perceptor, previewer, aggregator (instantir.md section 7).

Each objective trains one part of the bundle; the other parts are frozen. All randomness comes from the Noise argument
of `phases`, under these stream names: "timestep" (or "index"), "noise", "conditions" (which ones are dropped),
"guidance" (scale of the teacher or of the previews) and references.REFERENCE_NOISE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.objectives.consistency import (
    SolverGrid,
    ddim_step,
    pseudo_huber,
    squared_distance,
)
from components.objectives.diffusion import WeightedEpsilon, check_dropout, drop_conditions, replace_rows
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt, repeat_embeddings
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.samplers.guidance import distillation_guide, guide
from components.systems.instantir.fast import FastInstantIR, Speed
from components.systems.instantir.network import Conditions, InstantIR, LoopNetworks
from components.systems.instantir.previewer import previewer_of
from components.systems.instantir.references import REFERENCE_NOISE, noised_reference
from components.types import Batch, Loss, Objective


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Probabilities of dropping a sample's picture tokens, its text, or both (one draw decides).

    Raises:
        ValueError: a probability is negative, or their sum exceeds 1.
    """

    image: float = 0.0
    text: float = 0.0
    both: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self.image, self.text, self.both)


class StageObjective(Objective):
    """What the three stages share: a bundle with one part in training, and the conditions of a batch.

    Attributes:
        network: the bundle; all parts but the one in training are frozen.
        trainables: the part in training, by name.
        config: architecture for model.json.
        dropout: dropout probabilities of the conditions.
    """

    def __init__(self, network: InstantIR, name: str, trainable: nn.Module, dropout: Dropout) -> None:
        network.freeze()
        trainable.requires_grad_(True)
        self.network, self.dropout = network, dropout
        self.trainables: Mapping[str, nn.Module] = {name: trainable}
        self.config: Mapping[str, Any] = network.config()
        self.progress: MutableMapping[str, float] = {}
        self._empty_prompt: tuple[Tensor, Tensor] | None = None

    @property
    def prior(self) -> Prior:
        """The frozen prior, with its name and digest."""
        return self.network.prior

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """All weights of the finished model folder, by part and by the released files' keys."""
        return self.network.parts()

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """Yield (trainable, loss); each stage has one phase."""
        raise NotImplementedError

    @property
    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """The empty prompt's embeddings [1, L, D] and [1, P]; the frozen encoders compute them once."""
        if self._empty_prompt is None:
            self._empty_prompt = embed_empty_prompt(self.network.prior)
        return self._empty_prompt

    def clean_latents(self, batch: Batch) -> Tensor:
        """Latents of the HQ targets [B, C, h, w]."""
        return clean_latents(self.network.prior, batch)

    @torch.no_grad()
    def conditions(self, batch: Batch, noise: Noise) -> Conditions:
        """Text, sizes and picture tokens of the LQ inputs, after dropout."""
        prior = self.network.prior
        drop = drop_conditions(noise.uniform("conditions"), self.dropout.image, self.dropout.text, self.dropout.both)
        if batch.embeddings:
            text, pooled = embed_batch_prompts(prior, batch, drop.text, self.empty_prompt)
        else:
            drops_text = drop.text.tolist()
            text, pooled = prior.embed_prompts(
                ["" if empty else p for p, empty in zip(batch.prompts, drops_text, strict=True)]
            )
        tokens = prior.embed_images(batch.lq)
        tokens = replace_rows(tokens, prior.null_image_tokens(len(batch)), drop.image)
        return Conditions(text=text, pooled=pooled, time_ids=prior.time_ids(batch.sizes), image_tokens=tokens)

    @torch.no_grad()
    def without_text(self, conditions: Conditions, batch: Batch) -> Conditions:
        """`conditions` with the empty prompt; for a batch with precomputed embeddings no text encoder runs."""
        rows = len(conditions.text)
        text, pooled = (
            repeat_embeddings(self.empty_prompt, rows)
            if batch.embeddings
            else self.network.prior.embed_prompts([""] * rows)
        )
        return Conditions(text=text, pooled=pooled, time_ids=conditions.time_ids, image_tokens=conditions.image_tokens)


class PerceptorObjective(StageObjective):
    """Stage 1: the perceptor learns to condition the frozen prior (InstantIR Eq. 1).

    Args:
        network: the bundle without a previewer (its LoRA would be inside the layers that train).
        image_dropout, text_dropout, both_dropout: released 0.05 each; the paper drops the picture in 15 %.
        max_clean_weight, noise_offset, timestep_importance: see objectives.diffusion; 1, 0 and 0 are Eq. 1.

    Raises:
        ValueError: there is a previewer, the perceptor is left out (perceptor_scale 0), or a setting is out of range.
    """

    def __init__(
        self,
        network: InstantIR,
        *,
        image_dropout: float = 0.05,
        text_dropout: float = 0.05,
        both_dropout: float = 0.05,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
        timestep_importance: float = 0.0,
    ) -> None:
        if network.has_previewer:
            raise ValueError("the perceptor is trained before there is a previewer")
        if network.perceptor_scale == 0:
            raise ValueError("a perceptor that is left out (perceptor_scale 0) cannot be trained")
        dropout = Dropout(image=image_dropout, text=text_dropout, both=both_dropout)
        super().__init__(network, "perceptor", network.perceptor, dropout)
        self.loss = WeightedEpsilon(network.prior.schedule, max_clean_weight, noise_offset, timestep_importance)

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase: mean squared error of the predicted noise."""
        clean, conditions = self.clean_latents(batch), self.conditions(batch, noise)
        noisy, target, timesteps = self.loss.noisy(clean, noise)
        yield "perceptor", self.loss(self.network.denoise_eps(noisy, timesteps, conditions), target, timesteps)


class PreviewerObjective(StageObjective):
    """The previewer's consistency distillation (InstantIR Eq. 5), as printed or as released.

    The teacher is the same UNet with the LoRA off. It takes one DDIM step from `start` to `end` with text and picture.
    The student's preview is at `start`, the target's preview at `end`; both use the empty prompt.

    Args:
        network: the bundle with a previewer.
        num_ddim_timesteps: points of the teacher's time grid; released 50.
        huber_c: pseudo-Huber constant, released 0.001; None for Eq. 5's squared distance.
        guidance_range: uniform range of the teacher's scale w, released (3, 15); None for no guidance (Eq. 5).
        image_dropout, text_dropout, both_dropout: released 0; text dropout affects the teacher only.

    Raises:
        ValueError: there is no previewer, or a setting is out of range.
    """

    def __init__(
        self,
        network: InstantIR,
        *,
        num_ddim_timesteps: int = 50,
        huber_c: float | None = 0.001,
        guidance_range: tuple[float, float] | None = (3.0, 15.0),
        image_dropout: float = 0.0,
        text_dropout: float = 0.0,
        both_dropout: float = 0.0,
    ) -> None:
        if huber_c is not None and huber_c <= 0:
            raise ValueError(f"huber_c must be positive or null, got {huber_c}")
        if guidance_range is not None and not 0 <= guidance_range[0] <= guidance_range[1]:
            raise ValueError(f"guidance_range must be 0 <= low <= high, got {tuple(guidance_range)}")
        dropout = Dropout(image=image_dropout, text=text_dropout, both=both_dropout)
        super().__init__(network, "previewer", previewer_of(network.unet), dropout)
        self.grid = SolverGrid(network.prior.schedule, num_ddim_timesteps)
        self.huber_c, self.guidance_range = huber_c, guidance_range

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase: distance between the previews at both ends of a teacher step."""
        clean, conditions = self.clean_latents(batch), self.conditions(batch, noise)
        start, end = self.grid.interval(noise.integers("index", 0, self.grid.points))
        noisy = self.network.prior.schedule.add_noise(clean, noise.normal("noise", tuple(clean.shape[1:])), start)
        textless = self.without_text(conditions, batch)
        previous = self._teacher_step(noisy, start, end, conditions, textless, noise)
        conditions = textless
        with torch.no_grad():
            target = self.network.preview(previous, end, conditions)
        student = self.network.preview(noisy, start, conditions)
        distances = (
            squared_distance(student, target) if self.huber_c is None else pseudo_huber(student, target, self.huber_c)
        )
        value = distances.mean()
        # distance of previews from the HQ latents: distillation lowers it, a collapse raises it
        error = squared_distance(student.detach(), clean).mean()
        yield "previewer", Loss(value=value, metrics={"loss": value.detach(), "preview_error": error})

    @torch.no_grad()
    def _teacher_step(
        self, noisy: Tensor, start: Tensor, end: Tensor, conditions: Conditions, textless: Conditions, noise: Noise
    ) -> Tensor:
        schedule = self.network.prior.schedule
        eps = self.network.denoise_eps(noisy, start, conditions)
        clean = schedule.x0_from_eps(noisy, eps, start)
        if self.guidance_range is not None:
            w = noise.uniform("guidance", *self.guidance_range).to(noisy.dtype)
            blank = self.network.prior.null_image_tokens(len(noisy))
            unconditional = replace(textless, image_tokens=blank)
            eps_unconditional = self.network.denoise_eps(noisy, start, unconditional)
            clean = distillation_guide(schedule.x0_from_eps(noisy, eps_unconditional, start), clean, w)
            eps = distillation_guide(eps_unconditional, eps, w)
        return ddim_step(schedule, clean, eps, end)


class AggregatorObjective(StageObjective):
    """Stage 2: the aggregator learns to steer the frozen prior with LQ latents and previews (Eqs. 1 and 6).

    Args:
        network: the bundle with a (trained) previewer and an aggregator.
        image_dropout, text_dropout, both_dropout: released 0, 0.85 and 0.15, so the text is always empty. LQ latents
            are never dropped.
        max_clean_weight, noise_offset, timestep_importance: see objectives.diffusion; 1, 0 and 0 are Eq. 1.
        reference: the Aggregator's second input: "preview" is the frozen Previewer's output, "lq" the LQ latents once
            more, for a model without previews.
        reference_noise: whether the reference has fresh noise of the time step (section 4.4, last row of Table 2a).
        preview_cfg_scale: above 1 previews are guided, with a random scale in 1 .. this (a released option, off).
        speed: settings of the fast path; None for the plain forward passes.
        parent_parts: the parent model's parts in full precision, where the frozen networks are in half precision.

    Raises:
        ValueError: previewer or aggregator is missing, or a setting is out of range.
    """

    def __init__(
        self,
        network: InstantIR,
        *,
        image_dropout: float = 0.0,
        text_dropout: float = 0.85,
        both_dropout: float = 0.15,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
        timestep_importance: float = 0.0,
        reference: Literal["preview", "lq"] = "preview",
        reference_noise: bool = False,
        preview_cfg_scale: float = 1.0,
        speed: Speed | None = None,
        parent_parts: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        if network.aggregator is None or not network.has_previewer:
            raise ValueError("the aggregator's stage needs a network with a previewer and an aggregator")
        if reference not in ("preview", "lq"):
            raise ValueError(f"reference must be preview or lq, got {reference!r}")
        if preview_cfg_scale < 1:
            raise ValueError(f"preview_cfg_scale must be at least 1, got {preview_cfg_scale}")
        self.reference, self.reference_noise = reference, reference_noise
        self.preview_cfg_scale = preview_cfg_scale
        dropout = Dropout(image=image_dropout, text=text_dropout, both=both_dropout)
        super().__init__(network, "aggregator", network.aggregator, dropout)
        self.loss = WeightedEpsilon(network.prior.schedule, max_clean_weight, noise_offset, timestep_importance)
        self.fast = None if speed is None else FastInstantIR(network, speed)
        self._encode = network.prior.encode if self.fast is None else self.fast.encode
        self._parent_parts = dict(parent_parts or {})

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """All weights, see StageObjective.parts; parts in `parent_parts` come from the parent model."""
        return super().parts() | {name: dict(part) for name, part in self._parent_parts.items()}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase: mean squared error of the predicted noise, with residuals."""
        network: LoopNetworks = self.network if self.fast is None else self.fast.run()
        clean = clean_latents(self.network.prior, batch, self._encode)
        conditions = self.conditions(batch, noise)
        noisy, target, timesteps = self.loss.noisy(clean, noise)
        with torch.no_grad():
            lq = self._encode(batch.lq)
            reference = self._reference(network, batch, lq, noisy, timesteps, conditions, noise)
        residuals = network.residuals(lq, timesteps, reference, conditions)
        yield "aggregator", self.loss(network.denoise_eps(noisy, timesteps, conditions, residuals), target, timesteps)

    @torch.no_grad()
    def _reference(
        self,
        network: LoopNetworks,
        batch: Batch,
        lq: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        noise: Noise,
    ) -> Tensor:
        """The Aggregator's second input [B, C, h, w], next to the LQ latents."""
        if self.reference == "lq":
            reference = lq
        else:
            reference = network.preview(noisy, timesteps, conditions)
            if self.preview_cfg_scale > 1:
                # a preview is affine in the predicted noise, so guiding previews equals guiding the noise
                blank = self.network.prior.null_image_tokens(len(lq))
                unconditional = replace(self.without_text(conditions, batch), image_tokens=blank)
                scale = noise.uniform("guidance", 1.0, self.preview_cfg_scale).to(lq.dtype).view(-1, 1, 1, 1)
                reference = guide(network.preview(noisy, timesteps, unconditional), reference, scale)
        if self.reference_noise:
            fresh = noise.normal(REFERENCE_NOISE, tuple(lq.shape[1:])).to(lq.dtype)
            reference = noised_reference(network.prior.schedule, reference, fresh, timesteps)
        return reference
