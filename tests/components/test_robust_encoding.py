"""The degradation-robust encoder at a tiny size: losses and gradients by hand, and the collapse of the printed loss."""

from __future__ import annotations

import pytest
import torch
from helper_modules import load_helper

from components.objectives.robust_encoding import RobustEncoderObjective, measure_encoder, robust_loss
from components.priors.robust_encoder import RobustEncoder, RobustLatents
from components.randomness import Noise

supir = load_helper("components/test_supir.py")
make_prior, make_batch, tensor = supir.make_prior, supir.make_batch, supir.tensor


def test_a_new_robust_encoder_is_the_autoencoders_own() -> None:
    prior = make_prior()
    encoder = RobustEncoder(prior.autoencoder)
    images = make_batch().lq
    assert torch.equal(encoder(images), prior.encode(images))
    names = {name for name, _ in encoder.named_parameters()}
    assert names and all(name.startswith("encoder.") for name in names)  # the frozen autoencoder is no part of it
    encoder.encoder["linear"].weight.data.mul_(2)  # type: ignore[index, union-attr, operator]
    assert not torch.equal(encoder(images), prior.encode(images))
    latents = RobustLatents(encoder)
    assert (latents.factor, latents.latent_channels) == (prior.factor, prior.latent_channels)
    with pytest.raises(ValueError, match="mode"):
        latents.encode(images, torch.zeros(1))


@pytest.mark.parametrize("loss_name", ["mse", "log_mse"])
@pytest.mark.parametrize("anchor", ["reconstruction", "hq", "printed"])
def test_the_encoders_loss_and_gradient_by_hand(anchor: str, loss_name: str) -> None:
    prior, batch, keep = make_prior(), make_batch(), 0.0 if anchor == "printed" else 0.7
    encoder, copy = (RobustEncoder(prior.autoencoder).requires_grad_(True) for _ in range(2))
    for name, parameter in encoder.named_parameters():
        parameter.data.add_(0.1 * tensor(name, *parameter.shape))
    copy.load_state_dict(encoder.state_dict())
    objective = RobustEncoderObjective(encoder, anchor, keep, loss=loss_name)  # type: ignore[arg-type]
    ((name, loss),) = objective.phases(batch, Noise(0, batch.positions))
    first, clean = (prior.decode(copy(images)) for images in (batch.lq, batch.hq))

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        errors = torch.stack([(a - b).square().mean() for a, b in zip(one, other, strict=True)])
        return (errors if loss_name == "mse" else (errors + 4e-5).log()).mean()

    if anchor == "printed":
        expected = distance(first, clean)
    else:
        with torch.no_grad():
            target = batch.hq if anchor == "hq" else prior.decode(prior.encode(batch.hq))
        expected = distance(first, target) + keep * distance(clean, target)
    assert name == "encoder" and float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.value.backward()
    expected.backward()
    for mine, theirs in zip(encoder.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    assert not any(p.requires_grad for p in prior.autoencoder.parameters())


def test_the_printed_loss_has_a_collapse_and_the_anchored_one_none() -> None:
    """An encoder that maps all pictures to one point: Eq. 1 is zero, and the default is not."""
    encoder, batch = RobustEncoder(make_prior().autoencoder), make_batch()
    for parameter in encoder.parameters():
        parameter.data.zero_()
    assert robust_loss(encoder, batch.lq, batch.hq, "printed", 0.0)["loss"].abs().max() == 0
    assert robust_loss(encoder, batch.lq, batch.hq, "reconstruction", 1.0)["loss"].min() > 0.01
    with pytest.raises(ValueError, match="keep"):
        RobustEncoderObjective(encoder, "printed", 1.0)
    numbers = measure_encoder(encoder, [batch])
    assert numbers["psnr_robust"] != numbers["psnr_plain"] and set(numbers) == {"psnr_robust", "psnr_plain", "psnr_lq"}
