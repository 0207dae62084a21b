"""The training of a degradation-robust encoder E_dr for a frozen autoencoder (E, D); see priors/robust_encoder.py.

SUPIR prints (section 3.1, Yu et al. 2024):

    L = | D(E_dr(lq)) - D(E_dr(hq)) |^2

Both sides move with E_dr, so an encoder that maps all pictures to one point has no loss: users who trained with it
alone report dark or blurred pictures (supir.md, section 2). The default here is anchored. The target is the
autoencoder's own reconstruction of HQ, the best that D can give, and good pictures must keep theirs:

    L = | D(E_dr(lq)) - D(E(hq)) |^2 + keep | D(E_dr(hq)) - D(E(hq)) |^2

All distances are means over pixels and colours of pictures in [-1, 1]. With loss "log_mse" both are logarithms, so that
all pictures count alike, in decibels: a mean of the errors themselves belongs to the noisiest pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from components.objectives.regression import latent_distance, log_mse_distance
from components.priors.autoencoder import decode_latents, encode_pixels
from components.priors.robust_encoder import RobustEncoder, first_restoration
from components.randomness import Noise
from components.tensors import psnr_of_batch
from components.types import Batch, Loss, Objective

Anchor = Literal["reconstruction", "hq", "printed"]
EncoderLoss = Literal["mse", "log_mse"]

LOG_MSE_EPS = 4e-5  # a picture closer than 50 dB hardly counts, as in UNetRes, whose pictures are in [0, 1]


def robust_loss(
    encoder: RobustEncoder, lq: Tensor, hq: Tensor, anchor: Anchor, keep: float, loss: EncoderLoss = "mse"
) -> dict[str, Tensor]:
    """The loss per picture: "loss" [B], its terms "loss_lq" and, with keep above 0, "loss_hq", and the picture "first".

    Args:
        encoder: E_dr with its autoencoder.
        lq, hq: pictures [B, 3, H, W] in [-1, 1].
        anchor: target of D(E_dr(lq)): "reconstruction" D(E(hq)), "hq" itself, or "printed" D(E_dr(hq)), with gradients
            through both sides.
        keep: weight of the distance of D(E_dr(hq)) to the target; not with "printed", where it would be zero.
        loss: "mse", or "log_mse": log(mse + 4e-5) of either distance.
    """
    distance = latent_distance if loss == "mse" else partial(log_mse_distance, eps=LOG_MSE_EPS)
    first = first_restoration(encoder, lq)
    clean = first_restoration(encoder, hq) if keep or anchor == "printed" else None
    if anchor == "printed":
        assert clean is not None, "computed above"
        target = clean
    else:
        target = hq
        if anchor == "reconstruction":
            with torch.no_grad():
                autoencoder = encoder.autoencoder
                target = decode_latents(autoencoder, encode_pixels(autoencoder, hq))
    terms = {"loss_lq": distance(first, target)}
    total = terms["loss_lq"]
    if keep and clean is not None and anchor != "printed":
        terms["loss_hq"] = distance(clean, target)
        total = total + keep * terms["loss_hq"]
    return {"loss": total, **terms, "first": first}


class RobustEncoderObjective(Objective):
    """Trains E_dr alone; the autoencoder stays frozen.

    Args:
        encoder: all of its parameters train.
        anchor, keep, loss: see robust_loss.
        config: architecture for model.json.
        prior: the prior whose autoencoder it is.

    Raises:
        ValueError: an unknown anchor or loss, a negative keep, or a keep with "printed".
    """

    def __init__(
        self,
        encoder: RobustEncoder,
        anchor: Anchor = "reconstruction",
        keep: float = 1.0,
        config: Mapping[str, Any] | None = None,
        prior: Any = None,
        loss: EncoderLoss = "mse",
    ) -> None:
        if loss not in get_args(EncoderLoss):
            raise ValueError(f"loss must be one of {', '.join(get_args(EncoderLoss))}, got {loss!r}")
        if anchor not in get_args(Anchor):
            raise ValueError(f"anchor must be one of {', '.join(get_args(Anchor))}, got {anchor!r}")
        if keep < 0 or (keep and anchor == "printed"):
            raise ValueError(f"keep must be at least 0, and 0 with anchor printed; got {keep}")
        encoder.autoencoder.eval().requires_grad_(False)
        self.encoder, self.anchor, self.keep = encoder.train().requires_grad_(True), anchor, keep
        self.loss = loss
        self._prior = prior
        self.trainables: Mapping[str, nn.Module] = {"encoder": encoder}
        self.config: Mapping[str, Any] = dict(config or {})
        self.progress: MutableMapping[str, float] = {}

    @property
    def prior(self) -> Any:
        """The prior whose autoencoder it is."""
        return self._prior

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The encoder."""
        return {"encoder": {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase, without noise. Metrics, means: loss, its terms, and psnr of the first restoration to HQ, dB."""
        values = robust_loss(self.encoder, batch.lq, batch.hq, self.anchor, self.keep, self.loss)
        first = values.pop("first").detach()
        psnr = psnr_of_batch((first + 1) / 2, (batch.hq + 1) / 2)
        metrics = {name: value.detach().mean() for name, value in values.items()}
        yield "encoder", Loss(value=values["loss"].mean(), metrics={**metrics, "psnr": psnr.mean()})


@torch.no_grad()
def measure_encoder(encoder: RobustEncoder, heldout: Any) -> dict[str, float]:
    """Mean PSNR to HQ over held-out pictures, dB: of D(E_dr(lq)), of the plain encoder's D(E(lq)), and of LQ."""
    psnrs: dict[str, list[Tensor]] = {}
    for batch in heldout:
        plain = decode_latents(encoder.autoencoder, encode_pixels(encoder.autoencoder, batch.lq))
        pictures = {"psnr_robust": first_restoration(encoder, batch.lq), "psnr_plain": plain, "psnr_lq": batch.lq}
        for name, images in pictures.items():
            value = psnr_of_batch((images.clamp(-1, 1) + 1) / 2, (batch.hq + 1) / 2)
            psnrs.setdefault(name, []).append(value)
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}
