"""The losses of the prior's three stages, written out from plain network calls; see the test of InstantIR's losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helper_modules import load_helper
from torch import Tensor

from components.priors.sdxl import Prior
from components.randomness import Noise
from components.systems.prior.training import AutoencoderObjective, DenoiserObjective, ImageEncoderObjective
from components.types import Batch

by_hand = load_helper("components/test_instantir_objectives_by_hand.py")
ROWS = by_hand.ROWS


@pytest.fixture(scope="module")
def prior() -> Prior:
    return by_hand.build_prior_awake()


@pytest.fixture
def batch() -> Batch:
    rows: Batch = by_hand.rows()
    return rows


def loss_of(objective: Any, batch: Batch, seed: int = 0) -> Any:
    ((name, loss),) = objective.phases(batch, Noise(seed, batch.positions))
    assert [name] == list(objective.trainables)
    return loss


def test_the_autoencoders_loss_is_the_formula(prior: Prior, batch: Batch) -> None:
    """Mean |error| + 4 mean error^2 of the pictures decoded from jittered latents; PSNR over the range of 2."""
    loss = loss_of(AutoencoderObjective(prior, {}, "", 0.3), batch)
    jitter = 0.3 * Noise(0, batch.positions).normal("latents", by_hand.SHAPE)
    error = prior.decode(prior.encode(batch.hq) + jitter) - batch.hq
    mse = (error**2).mean()
    torch.testing.assert_close(loss.value, error.abs().mean() + 4 * mse)
    torch.testing.assert_close(loss.metrics["loss"], mse)
    psnrs = [10 * math.log10(4 / float((picture**2).mean())) for picture in error.detach()]
    assert float(loss.metrics["psnr"].detach()) == pytest.approx(sum(psnrs) / len(psnrs), rel=1e-5)


def test_the_image_encoders_loss_is_the_formula(prior: Prior, batch: Batch) -> None:
    """InfoNCE over the batch in both directions, and four times the error of each patch's colours from its LQ token."""
    objective = ImageEncoderObjective(prior, {}, "", 0.2, 0)
    loss = loss_of(objective, batch)
    lq, hq = prior.embed_images(batch.lq)[:, 1:], prior.embed_images(batch.hq)[:, 1:]

    def vector(tokens: Tensor) -> Tensor:  # 2 x 2 patches, each four times in the 4 x 4 grid
        grid = tokens.view(2, 2, -1).repeat_interleave(2, 0).repeat_interleave(2, 1)
        return grid.flatten() / grid.norm()

    near = torch.stack([torch.stack([vector(a) @ vector(b) for b in hq]) for a in lq]).exp().pow(1 / 0.2)
    towards_hq = torch.stack([-(near[i, i] / near[i].sum()).log() for i in range(ROWS)]).mean()
    towards_lq = torch.stack([-(near[i, i] / near[:, i].sum()).log() for i in range(ROWS)]).mean()
    squares = []
    for i in range(ROWS):
        for patch in range(4):
            top, left = 8 * (patch // 2), 8 * (patch % 2)
            cells = F.avg_pool2d(batch.hq[i, :, top : top + 8, left : left + 8], 4)  # [3, 2, 2]
            squares.append((objective.readout(lq[i, patch]) - cells.flatten()) ** 2)
    colour = torch.cat(squares).mean()
    contrast = (towards_hq + towards_lq) / 2
    torch.testing.assert_close(loss.value, contrast + 4 * colour, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.metrics["colour"], colour, rtol=1e-4, atol=1e-6)
    right = sum(int(near[i].argmax()) == i for i in range(ROWS)) / ROWS
    assert float(loss.metrics["found"]) == pytest.approx(right)


def test_the_denoisers_loss_is_the_formula(prior: Prior, batch: Batch) -> None:
    """Eq. 1 with weights; a sample's text, and apart from it its pooled vector, may be that of the empty prompt."""
    objective = DenoiserObjective(prior, {}, "", 0.4, 0.4, max_clean_weight=4.0, noise_offset=0.4)
    seed = 2  # its draws drop the text, the pooled vector, both and neither
    loss = loss_of(objective, batch, seed)
    noise = Noise(seed, batch.positions)
    no_text = (noise.uniform("text_dropout") < 0.4).tolist()
    no_pooled = (noise.uniform("pooled_dropout") < 0.4).tolist()
    assert len(set(zip(no_text, no_pooled, strict=True))) == 4
    t = noise.integers("timestep", 0, 1000)
    eps = noise.normal("noise", by_hand.SHAPE) + 0.4 * noise.normal("noise_offset", (4, 1, 1))
    noisy = by_hand.add_noise(prior.encode(batch.hq), eps, t)
    text, pooled = prior.embed_prompts(["" if no else p for p, no in zip(batch.prompts, no_text, strict=True)])
    empty = prior.embed_prompts([""])[1][0]
    pooled = torch.stack([empty if no else own for own, no in zip(pooled, no_pooled, strict=True)])
    prediction = prior.unet(
        noisy,
        t,
        encoder_hidden_states=text,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.sizes.float()},
    ).sample
    expected = by_hand.epsilon_error(prediction, eps, t, by_hand.time_weights(4.0, 0.0))
    torch.testing.assert_close(loss.value, expected, rtol=1e-5, atol=1e-6)
    parameters = [p for p in objective.trainables["denoiser"].parameters() if p.requires_grad]
    for ours, theirs in zip(
        *(torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss.value, expected)), strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
