"""Training of an SDXL-shaped prior: autoencoder, then picture encoder, then denoiser with its text encoders.

Each stage's model folder is a whole prior, in which later parts are untrained. `load_prior` loads any of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.captions.tags import VOCABULARY
from components.models import Model, load_model, load_strictly
from components.objectives.diffusion import WeightedEpsilon, replace_rows
from components.objectives.precomputed import clean_latents
from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.families.record import FamilyPrior
from components.priors.nano import NANO, build_prior, build_tokenizer_json
from components.priors.sdxl import Prior
from components.randomness import Noise, seeded_init
from components.samplers.ddim import sample_ddim
from components.samplers.guidance import guide
from components.samplers.schedules import Schedule
from components.systems.prior.recipe import PriorRecipe
from components.training import gather_rows, worker_place
from components.types import Batch, Loss, Objective

TrainedPrior = TypeVar("TrainedPrior", bound=FamilyPrior)


class PriorObjective(Objective, Generic[TrainedPrior]):
    """The base of the stages: the prior in training, its parts and its config."""

    def __init__(
        self, prior: TrainedPrior, config: Mapping[str, Any], tokenizer_json: str, trainables: Mapping[str, nn.Module]
    ) -> None:
        self._prior, self.config, self.trainables = prior, config, trainables
        prior.freeze()
        self.files = {"tokenizer.json": tokenizer_json}
        self.progress: MutableMapping[str, float] = {}
        for module in trainables.values():
            module.requires_grad_(True)

    @property
    def prior(self) -> TrainedPrior:
        """The prior in training."""
        return self._prior

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {name: dict(module.state_dict()) for name, module in self.prior.modules.items()}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase; each stage has its own."""
        raise AssertionError("each stage has its own")


class AutoencoderObjective(PriorObjective[Prior]):
    """L1 plus mean square error of the reconstruction, from latents with a little noise."""

    def __init__(self, prior: Prior, config: Mapping[str, Any], tokenizer_json: str, latent_noise: float) -> None:
        super().__init__(prior, config, tokenizer_json, {"autoencoder": prior.autoencoder})
        self.latent_noise = latent_noise

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        latents = self.prior.encode(batch.hq)
        jitter = noise.normal("latents", tuple(latents.shape[1:])) * self.latent_noise
        error = self.prior.decode(latents + jitter) - batch.hq
        mse = error.square().mean()
        psnr = -10 * torch.log10(error.detach().square().mean(dim=(1, 2, 3)).clamp_min(1e-10) / 4)
        yield (
            "autoencoder",
            Loss(value=error.abs().mean() + 4 * mse, metrics={"loss": mse, "psnr": psnr.mean()}),
        )


class ImageEncoderObjective(PriorObjective[Prior]):
    """An LQ picture's tokens must identify its HQ picture in the batch, and hold the layout.

    InfoNCE between the patch tokens of LQ and HQ, in both directions, and a linear read-out of each patch's HQ colours
    from its LQ token. Without the read-out the tokens would hold the identity only.
    """

    def __init__(
        self, prior: Prior, config: Mapping[str, Any], tokenizer_json: str, temperature: float, seed: int
    ) -> None:
        self.cells = 2  # a 2 x 2 thumbnail of the patch is read out of each token
        with seeded_init(seed, "readout"):
            self.readout = nn.Linear(prior.image_token_dim, 3 * self.cells**2)
        trainable = nn.ModuleDict({"image_encoder": prior.image_encoder, "readout": self.readout})
        super().__init__(prior, config, tokenizer_json, {"encoder": trainable})
        self.temperature = temperature

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        return self._phases(batch, None)

    def step_phases(self, batches: Sequence[tuple[Batch, Noise]]) -> Sequence[Iterator[tuple[str, Loss]]]:
        """`phases` of each micro-batch; all of them contrast with the pictures of the step's whole batch.

        The pictures are embedded twice, first without gradients. The gradients of the micro-batches then add up to that
        of one large batch, since each has the gradient by its own pictures alone (Gao et al. 2021, GradCache).
        """
        rank, workers = worker_place() if torch.is_grad_enabled() else (0, 1)
        if len(batches) * workers == 1:
            return [self.phases(batch, noise) for batch, noise in batches]
        with torch.no_grad():
            sides = [torch.cat([self._vectors(getattr(b, side)) for b, _ in batches]) for side in ("lq", "hq")]
        own = len(sides[0])
        lq, hq = (gather_rows(vectors) for vectors in sides) if workers > 1 else sides
        starts = [rank * own + sum(len(batch) for batch, _ in batches[:n]) for n in range(len(batches))]
        return [
            self._phases(batch, _Pictures(lq, hq, start)) for (batch, _), start in zip(batches, starts, strict=True)
        ]

    def _vectors(self, images: Tensor) -> Tensor:
        return picture_vectors(self.prior.embed_images(images))

    def _phases(self, batch: Batch, pictures: _Pictures | None) -> Iterator[tuple[str, Loss]]:
        """`phases`; the contrast is with `pictures`, or without them with the batch alone."""
        lq, hq = self.prior.embed_images(batch.lq), self.prior.embed_images(batch.hq)
        lq_vectors, hq_vectors = picture_vectors(lq), picture_vectors(hq)
        start, count, share = 0, len(batch), 1.0
        if pictures is not None:
            start, share = pictures.start, len(pictures.lq) / count
            lq_vectors, hq_vectors = pictures.with_rows(lq_vectors, hq_vectors)
        similarity = lq_vectors @ hq_vectors.T
        target = torch.arange(len(similarity), device=similarity.device)
        logits = similarity / self.temperature
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        side = round((lq.shape[1] - 1) ** 0.5)
        thumbnail = F.interpolate(batch.hq, (side * self.cells,) * 2, mode="area")
        colours = F.pixel_unshuffle(thumbnail, self.cells).flatten(2).transpose(1, 2)
        colour = (self.readout(lq[:, 1:]) - colours).square().mean()
        accuracy = (logits.argmax(1) == target)[start : start + count].float().mean()
        value = contrast
        if pictures is not None:  # the loop averages gradients, and those of the parts of this loss must add up
            value = contrast.detach() + share * (contrast - contrast.detach())
        yield (
            "encoder",
            Loss(value=value + 4 * colour, metrics={"loss": contrast, "found": accuracy, "colour": colour}),
        )


@dataclass(frozen=True)
class _Pictures:
    """Vectors of all pictures of a step [N, D], and the row of a micro-batch's first picture."""

    lq: Tensor
    hq: Tensor
    start: int

    def with_rows(self, *own: Tensor) -> list[Tensor]:
        """`lq` and `hq` with the micro-batch's own rows, which carry gradients, in their places."""
        rest = self.start + len(own[0])
        return [
            torch.cat([every[: self.start], rows.to(every.dtype), every[rest:]])
            for every, rows in zip((self.lq, self.hq), own, strict=True)
        ]


def picture_vectors(tokens: Tensor) -> Tensor:
    """Tokens [B, N, D] -> a unit vector per picture [B, N' * D]: patch tokens pooled to a grid, so layout counts."""
    patches = tokens[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    return F.normalize(F.adaptive_avg_pool2d(grid, 4).flatten(1), dim=-1)


class DenoiserObjective(PriorObjective[Prior]):
    """The plain diffusion loss (InstantIR Eq. 1) on text and picture pairs; UNet and both text encoders train."""

    def __init__(
        self,
        prior: Prior,
        config: Mapping[str, Any],
        tokenizer_json: str,
        text_dropout: float,
        pooled_dropout: float = 0.0,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
    ) -> None:
        trainable = nn.ModuleDict({k: prior.modules[k] for k in ("unet", "text_encoder", "text_encoder_2")})
        super().__init__(prior, config, tokenizer_json, {"denoiser": trainable})
        self.text_dropout, self.pooled_dropout = text_dropout, pooled_dropout
        self.loss = WeightedEpsilon(prior.schedule, max_clean_weight, noise_offset)

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        latents = clean_latents(self.prior, batch)
        noisy, eps, t = self.loss.noisy(latents, noise)
        text, pooled = embed_with_dropout(self.prior, batch.prompts, noise, self.text_dropout, self.pooled_dropout)
        prediction = self.prior.unet(
            noisy,
            t,
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": self.prior.time_ids(batch.sizes)},
        ).sample
        yield "denoiser", self.loss(prediction, eps, t)


class TextEmbedder(Protocol):
    """A prior with token embeddings and pooled embeddings."""

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


def embed_with_dropout(
    prior: TextEmbedder, prompts: Sequence[str], noise: Noise, text_dropout: float, pooled_dropout: float
) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, L, D] and pooled embeddings [B, P]; see PriorRecipe for the two dropouts.

    Draws "text_dropout", and "pooled_dropout" if it is above 0.
    """
    dropped = noise.uniform("text_dropout") < text_dropout
    kept = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
    text, pooled = prior.embed_prompts(kept)
    if pooled_dropout:
        _, empty_prompt = prior.embed_prompts([""])
        pooled = replace_rows(pooled, empty_prompt, noise.uniform("pooled_dropout") < pooled_dropout)
    return text, pooled


def autoencoder_objective(
    recipe: PriorRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> AutoencoderObjective:
    """The objective of stage autoencoder.

    Args:
        recipe: resolved recipe.
        parents: none.
        examples: returns pictures [N, 3, H, W] in [-1, 1]; the autoencoder starts from their principal components.
        device: where the networks go.
    """
    training = _prior_in_training(recipe, parents, device)
    if not training.pretrained:
        if examples is None:
            raise ValueError("the autoencoder stage needs example pictures for its principal components")
        assert isinstance(training.prior.autoencoder, SpaceToDepthAutoencoder)
        training.prior.autoencoder.set_principal_components(examples().to(device))
    return AutoencoderObjective(training.prior, training.config, training.tokenizer_json, recipe.latent_noise)


def image_encoder_objective(
    recipe: PriorRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> ImageEncoderObjective:
    """The objective of stage encoder, on the model of stage autoencoder; arguments as in autoencoder_objective."""
    training = _prior_in_training(recipe, parents, device)
    return ImageEncoderObjective(
        training.prior, training.config, training.tokenizer_json, recipe.contrast_temperature, recipe.seed
    )


def denoiser_objective(
    recipe: PriorRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> DenoiserObjective:
    """The objective of stage denoiser, on the model of stage encoder; arguments as in autoencoder_objective."""
    training = _prior_in_training(recipe, parents, device)
    return DenoiserObjective(
        training.prior,
        training.config,
        training.tokenizer_json,
        text_dropout=recipe.text_dropout,
        pooled_dropout=recipe.pooled_dropout,
        max_clean_weight=recipe.max_clean_weight,
        noise_offset=recipe.noise_offset,
    )


@dataclass(frozen=True, kw_only=True)
class _InTraining:
    """A prior in training; `pretrained` if its weights come from a model."""

    prior: Prior
    config: Mapping[str, Any]
    tokenizer_json: str
    pretrained: bool


def _prior_in_training(recipe: PriorRecipe, parents: Mapping[str, Model], device: str) -> _InTraining:
    config: Mapping[str, Any] = merge_sizes(NANO, recipe.size)
    tokenizer_json = build_tokenizer_json(VOCABULARY, int(config["text_length"]))
    start: Model | None = next(iter(parents.values()), None)
    if start is None and recipe.warm_start:
        start = load_model(recipe.warm_start, prior=True)
    if start is not None:
        config, tokenizer_json = start.info["config"], start.file("tokenizer.json").read_text(encoding="utf-8")
    with seeded_init(recipe.seed, "prior"):
        prior = build_prior(config, tokenizer_json)
    if start is not None:
        for part, module in prior.modules.items():
            load_strictly(module, start.part(part), f"{start.path}: part {part}")
    prior.to(device)
    return _InTraining(prior=prior, config=config, tokenizer_json=tokenizer_json, pretrained=start is not None)


def merge_sizes(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with changes: inner mappings are merged, other values replaced."""
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        merged[key] = (
            merge_sizes(merged[key], value)
            if isinstance(value, Mapping) and isinstance(merged.get(key), dict)
            else value
        )
    return merged


def look(
    objective: PriorObjective[Prior], recipe: PriorRecipe, lq: Tensor, prompts: Sequence[str], seed: int
) -> Tensor:
    """Previews of a stage, [B, 3, H, W] in [-1, 1].

    Autoencoder: reconstructed LQ pictures. Denoiser: pictures from the prompts alone, 20 steps, guidance 4. Picture
    encoder: the LQ pictures themselves, as it generates none.
    """
    prior = objective.prior
    if recipe.stage == "autoencoder":
        return prior.decode(prior.encode(lq))
    if recipe.stage == "encoder":
        return lq
    latents_shape = (prior.latent_channels, lq.shape[-2] // prior.factor, lq.shape[-1] // prior.factor)
    noise = Noise(seed, np.arange(len(lq)), str(lq.device)).normal("start", latents_shape)
    return prior.decode(generate(prior, noise, prompts, (lq.shape[-2], lq.shape[-1])))


def generate(
    prior: Prior, noise: Tensor, prompts: Sequence[str], size: tuple[int, int], steps: int = 20, cfg_scale: float = 4.0
) -> Tensor:
    """Clean latents [B, C, h, w] from prompts alone, by DDIM from standard normal noise."""
    text, pooled = prior.embed_prompts([""] * len(noise) + list(prompts))
    ids = prior.time_ids(torch.tensor([[*size, 0, 0, *size]]).expand(2 * len(noise), -1))
    sigmas = prior.sampling.sigmas(prior.schedule, prior.sampling.timesteps(prior.schedule, steps)).to(noise.device)

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        eps = prior.unet(
            Schedule.preserving(latents, sigma).repeat(2, 1, 1, 1),
            prior.schedule.timestep_of(sigma).repeat(2),
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample
        negative, positive = eps.chunk(2)
        return latents - sigma.view(-1, 1, 1, 1) * guide(negative, positive, cfg_scale)

    latents = sample_ddim(denoise, Schedule.exploding(noise, sigmas[0].expand(len(noise))), sigmas)
    return Schedule.preserving(latents, sigmas[-1].expand(len(noise)))


@torch.no_grad()
def measure(objective: PriorObjective[Prior], heldout: Sequence[Batch]) -> dict[str, float]:
    """Numbers of the parts for the model card, on held-out crops of the run's own size.

    autoencoder_psnr_heldout: mean over pictures, dB; no restoration exceeds it. encoder_found_among_64: share of
    LQ pictures whose own HQ is the nearest of (up to) 64.
    """
    prior = objective.prior
    lq, hq = (torch.cat([getattr(b, side) for b in heldout])[:64] for side in ("lq", "hq"))
    return {
        "autoencoder_psnr_heldout": autoencoder_psnr(prior, heldout),
        "encoder_found_among_64": retrieval_share(prior, lq, hq),
    }


@torch.no_grad()
def autoencoder_psnr(prior: FamilyPrior, heldout: Sequence[Batch]) -> float:
    """Mean PSNR in dB of the targets after the autoencoder, over pictures."""
    errors = []
    for batch in heldout:
        restored = prior.decode(prior.encode(batch.hq)).clamp(-1, 1)
        errors.append((restored - batch.hq).square().mean(dim=(1, 2, 3)))
    return float((-10 * torch.log10(torch.cat(errors).clamp_min(1e-10) / 4)).mean())


def retrieval_share(prior: Prior, lq: Tensor, hq: Tensor) -> float:
    """Share of LQ pictures [N, 3, H, W] whose own HQ is the nearest of all N by the picture encoder's tokens."""
    similarity = picture_vectors(prior.embed_images(lq)) @ picture_vectors(prior.embed_images(hq)).T
    return float((similarity.argmax(1) == torch.arange(len(lq), device=similarity.device)).float().mean())
