"""Sample pictures during training: held-out LQ pictures, restored with the parts that exist at that stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from components.randomness import Noise
from components.recipes import as_dict
from components.samplers.ddim import sample_ddim
from components.samplers.guidance import guide
from components.samplers.schedules import Schedule
from components.systems.instantir.fast import Speed
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.objectives import StageObjective
from components.systems.instantir.options import restore_defaults
from components.systems.instantir.recipe import InstantIRRecipe
from components.systems.instantir.restorer import InstantIRRestorer
from components.tensors import images_to_tensor, tensor_to_images
from components.training import preserve_requires_grad
from components.types import Request


def look(objective: StageObjective, recipe: InstantIRRecipe, lq: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Restore LQ pictures [B, 3, H, W] in [-1, 1] with the network in training; the result has their shape and range.

    With the perceptor alone, a picture is sampled from noise with guidance. With the previewer, it is one preview of LQ
    latents, noised to half of the schedule. With the aggregator, it is the whole restoration.
    """
    network = objective.network
    with torch.no_grad(), preserve_requires_grad(objective.trainables.values()):
        if network.aggregator is not None:
            # these weights still train: no copies are derived from them, and their memory layout does not change
            plain = Speed(merge_previewer="off", join=False, channels_last="off")
            restorer = InstantIRRestorer(network, restore_defaults(as_dict(recipe)), speed=plain)
            requests = [
                Request(key=f"sample {i}", image=image, seed=seed + i, prompt=prompt)
                for i, (image, prompt) in enumerate(zip(tensor_to_images(lq), prompts, strict=True))
            ]
            return images_to_tensor([r.image for r in restorer.restore(requests)])
        height, width = lq.shape[-2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(lq), -1)
        text, pooled = network.prior.embed_prompts(list(prompts))
        tokens = network.prior.embed_images(lq)
        conditions = Conditions(text=text, pooled=pooled, time_ids=network.prior.time_ids(sizes), image_tokens=tokens)
        latents = network.prior.encode(lq)
        noise = Noise(seed, np.arange(len(lq)), str(lq.device)).normal("start", tuple(latents.shape[1:]))
        if network.has_previewer:
            half = torch.full((len(lq),), network.prior.schedule.num_train_timesteps // 2 - 1, device=lq.device)
            noisy = network.prior.schedule.add_noise(latents, noise, half)
            return network.prior.decode(network.preview(noisy, half, conditions))
        return network.prior.decode(_generate(network, noise, conditions, recipe))


def _generate(network: InstantIR, noise: Tensor, conditions: Conditions, recipe: InstantIRRecipe) -> Tensor:
    schedule = network.prior.schedule
    both = network.unconditional(conditions, [""] * len(noise)).concat(conditions)

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        noisy = Schedule.preserving(latents, sigma).repeat(2, 1, 1, 1)
        eps = network.denoise_eps(noisy, schedule.timestep_of(sigma).repeat(2), both)
        negative, positive = eps.chunk(2)
        return latents - sigma.view(-1, 1, 1, 1) * guide(negative, positive, recipe.cfg_scale)

    sampling = network.prior.sampling
    sigmas = sampling.sigmas(schedule, sampling.timesteps(schedule, recipe.steps_at_restore)).to(noise.device)
    latents = sample_ddim(denoise, Schedule.exploding(noise, sigmas[0].expand(len(noise))), sigmas)
    return Schedule.preserving(latents, sigmas[-1].expand(len(noise)))
