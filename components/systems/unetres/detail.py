"""The generator: adds detail to a regression's result in one step, trained by dynamic score matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from components.models import ModelError
from components.objectives.distillation import Distillation
from components.objectives.regression import feature_distance, latent_distance, pyramid_distance
from components.objectives.score_distillation import Inputs, ScoreDistillation, ScoreNetwork
from components.randomness import Noise
from components.systems.unetres.build import GENERATOR, REGRESSION, parameters_of
from components.systems.unetres.network import UNetRes
from components.systems.unetres.recipe import Features
from components.systems.unetres.score import PictureScore
from components.types import Batch


class DetailObjective(ScoreDistillation):
    """The distillation on pictures; their latents are the pictures themselves. See ScoreDistillation.

    Args:
        generator: takes the regression's result, which it changes, and LQ.
        regression: frozen.
        features: see UNetResRecipe.
        real, fake, settings: see ScoreDistillation; of the settings, those about texts and autoencoders have no effect.
    """

    def __init__(
        self,
        generator: UNetRes,
        regression: UNetRes,
        real: ScoreNetwork,
        fake: PictureScore | None,
        settings: Distillation | None = None,
        features: Features | None = None,
    ) -> None:
        super().__init__(generator.train(), real, fake, settings)
        self.features = features or Features()
        if self.features.weight and not isinstance(real, PictureScore):
            raise ValueError("a distance of features needs the score's network")
        self.regression = regression.eval().requires_grad_(False)
        self.config: Mapping[str, Any] = {
            REGRESSION: regression.config.to_dict(),
            GENERATOR: generator.config.to_dict(),
        }

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Regression and generator."""
        return {REGRESSION: parameters_of(self.regression), GENERATOR: parameters_of(self.generator)}

    @torch.no_grad()
    def _inputs(self, batch: Batch, noise: Noise) -> Inputs:
        return Inputs(conditions=None, target=batch.hq, lq=self.regression(batch.lq))

    def _generate(self, batch: Batch, conditions: Any, noise: Noise, lq: Tensor) -> Tensor:
        return self.generator(lq, batch.lq)  # type: ignore[no-any-return]

    def _regression(
        self, latents: Tensor, target: Tensor, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The pyramid, mean squares, or both (see Distillation.regression), and the distance of features."""
        settings, terms = self.settings, dict[str, Tensor]()
        if settings.regression != "l2":
            terms["loss_perceptual"] = settings.perceptual_weight * pyramid_distance(latents, target)
        if settings.regression != "perceptual":
            terms["loss_l2"] = settings.l2_weight * latent_distance(latents, target)
        if self.features.weight:
            terms["loss_features"] = self.features.weight * self._feature_distance(latents, target, noise)
        total = torch.stack(list(terms.values())).sum(dim=0)
        return total, {"loss_regression": total, **(terms if len(terms) > 1 else {})}

    def _feature_distance(self, latents: Tensor, target: Tensor, noise: Noise) -> Tensor:
        """Distance of the real score's features of both pictures with the same noise, which hides what is finer."""
        assert isinstance(self.real, PictureScore), "the constructor has checked it"
        latents, target = self.windows("feature_window", noise, latents, target)
        t = noise.integers("feature_timestep", self.features.t_low, self.features.t_high + 1)
        eps = noise.normal("feature_noise", tuple(latents.shape[1:])).to(latents)
        mine = self.real.features(self.schedule.add_noise(latents, eps, t), t)
        with torch.no_grad():
            goal = self.real.features(self.schedule.add_noise(target, eps, t), t)
        return feature_distance(mine, goal)


@torch.no_grad()
def start_from_regression(generator: UNetRes, regression: UNetRes) -> None:
    """Give a new generator the regression's weights: it computes the regression's features of LQ and changes nothing.

    Its last layer is zero and its first one ignores the regression's result, so both can be learned at once.

    Raises:
        ModelError: the networks have different sizes.
    """
    if generator.config != regression.config:
        raise ModelError(
            f"generator_start=regression needs equal sizes, but the generator has {generator.config} and the "
            f"regression {regression.config}: name generator_start=new"
        )
    own = regression.state_dict()
    channels = regression.head.weight.shape[1]
    head = torch.zeros_like(generator.head.weight)
    head[:, channels:] = own["head.weight"]
    tail = {name: torch.zeros_like(own[name]) for name in own if name.startswith("tail.")}
    generator.load_state_dict({**own, **tail, "head.weight": head})
