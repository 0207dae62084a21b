"""InstaRevive's networks: noise predictors of several families behind one call, and the generator of one step.

    x_t = signal clean + noise eps                             at time step t of the prior's own schedule
    G(z) = (z - noise eps(z, t)) / signal                      at one fixed t, where z stands for x_t

On a variance-preserving schedule signal and noise are sqrt(a) and sqrt(1 - a), a = alphas_cumprod[t]; on that of a
flow-matching prior they are 1 - time and time. Generator, real score and fake score are of the same class and differ in
their weights only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from components.naming import did_you_mean
from components.priors.conditions import Conditions, NetworkInputs, cross_attention_inputs
from components.priors.families import FAMILIES
from components.samplers.schedules import FlowSchedule, Schedule
from components.systems.instarevive.settings import AlignStart
from components.types import Prediction

InputMode = Literal["lq", "noise"]

ONE_STEP_ALPHA = 0.19357
"""alphas_cumprod at the released step: 400 of 1000 with linear betas 1e-4 .. 2e-2 (reference, section 1)."""


class EpsPredictor(nn.Module):
    """A diffusers network as a ScoreNetwork.

    Args:
        network: a denoiser of any family, such as PixArtTransformer2DModel or UNet2DConditionModel.
        schedule: the one of its training.
        prediction: what it predicts; the schedule's eps_from_velocity turns velocities into noise.
        mask_as_bias: add the 0/1 prompt mask to the attention's logits. The released inference does so, because it
            passes the mask with one dimension too many: padding is not masked, tokens only weigh e times as much.
        inputs: turns conditions into the network's arguments, see PriorFamily.inputs; default: that of networks with
            cross-attention.

    Raises:
        ValueError: an unknown prediction, or one that does not fit the schedule.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule | FlowSchedule,
        prediction: Prediction = "epsilon",
        mask_as_bias: bool = False,
        inputs: NetworkInputs = cross_attention_inputs,
    ) -> None:
        super().__init__()
        check_prediction(prediction, schedule)
        self.network, self._schedule = network, schedule
        self.prediction, self.mask_as_bias, self.inputs = prediction, mask_as_bias, inputs

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        return self._schedule

    @property
    def latent_channels(self) -> int:
        return int(self.network.config["in_channels"])  # type: ignore[index, arg-type]

    @property
    def multiple(self) -> int:
        """See latent_multiple."""
        return latent_multiple(self.network.config)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """predict_eps, for wrappers of modules, which call forward."""
        return self.predict_eps(latents, timesteps, conditions)

    def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See ScoreNetwork. Drops learned variances, the second half of a DiT's channels."""
        prediction = self.raw(latents, timesteps, conditions)[:, : latents.shape[1]].to(latents.dtype)
        if self.prediction == "epsilon":
            return prediction
        return self.schedule.eps_from_velocity(latents, prediction, timesteps)

    def raw(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The network's own output [B, C or 2C, h, w], in the network's dtype.

        Raises:
            ValueError: a condition that the network needs is missing.
        """
        dtype = next(self.network.parameters()).dtype
        arguments = self.inputs(self.network, conditions, dtype)
        if self.mask_as_bias and "encoder_attention_mask" in arguments:
            arguments["encoder_attention_mask"] = arguments["encoder_attention_mask"][:, None]
        network_times = self.schedule.network_times(timesteps)
        output = self.network(latents.to(dtype), timestep=network_times, return_dict=False, **arguments)
        return output[0]  # type: ignore[no-any-return]


def check_prediction(prediction: str, schedule: Schedule | FlowSchedule) -> None:
    """Raises ValueError for an unknown prediction, or one that does not fit the schedule."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"unknown prediction {prediction!r}. {did_you_mean(prediction, get_args(Prediction))}")
    if (prediction == "flow_prediction") != isinstance(schedule, FlowSchedule):
        raise ValueError(
            f"{prediction} does not fit {schedule}: flow_prediction needs a flow schedule, and the other way round"
        )


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """How a predictor makes clean latents in one step.

    Attributes:
        timestep: where the step starts; -1 for the one whose share of signal is nearest to ONE_STEP_ALPHA.
        input: "lq": the LQ latents replace the noisy ones (released, deterministic); "noise": an aligning convolution
            combines them with noise (the paper), so that results depend on the seed.
        kernel: side of the aligning convolution, 1 or 3.

    Raises:
        ValueError: an unknown input, or numbers out of range.
    """

    timestep: int = -1
    input: InputMode = "lq"
    kernel: int = 1

    def __post_init__(self) -> None:
        if self.input not in get_args(InputMode):
            raise ValueError(f"unknown input {self.input!r}. {did_you_mean(self.input, get_args(InputMode))}")
        if self.kernel not in (1, 3):
            raise ValueError(f"kernel must be 1 or 3, got {self.kernel}")
        if self.timestep < -1:
            raise ValueError(f"timestep must be at least 0, or -1 for the nearest, got {self.timestep}")


class OneStepGenerator(nn.Module):
    """LQ latents (and noise) -> clean latents, by one call of a predictor at one time step.

    Args:
        predictor: trained or to be trained.
        settings: see OneStep.
        align_start: start weights of the aligning convolution, see aligning_conv.

    Raises:
        ValueError: a time step beyond the predictor's schedule.
    """

    def __init__(
        self, predictor: EpsPredictor, settings: OneStep | None = None, align_start: AlignStart = "lq"
    ) -> None:
        super().__init__()
        settings = settings or OneStep()
        steps = predictor.schedule.num_train_timesteps
        if settings.timestep >= steps:
            raise ValueError(f"timestep must be below {steps}, got {settings.timestep}")
        self.predictor, self.settings = predictor, settings
        self.timestep = nearest_timestep(predictor.schedule) if settings.timestep < 0 else settings.timestep
        # plain numbers: a lookup in a table on the device would split a compiled step in two
        self.signal, self.noise = predictor.schedule.shares(self.timestep)
        self.align: nn.Conv2d | None = None
        if settings.input == "noise":
            shares = (1.0, 0.0) if align_start == "lq" else (self.signal, self.noise)
            self.align = aligning_conv(predictor.latent_channels, settings.kernel, shares)

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        return self.predictor.schedule

    @property
    def takes_noise(self) -> bool:
        """Whether the generator takes noise, so that its result depends on a seed."""
        return self.align is not None

    def forward(self, lq: Tensor, conditions: Conditions, noise: Tensor | None = None) -> Tensor:
        """Clean latents [B, C, h, w].

        Args:
            lq: scaled latents of the LQ picture, or of its coarse restoration.
            conditions: of B samples.
            noise: standard normal of lq's shape, with input "noise" only.

        Raises:
            ValueError: noise is missing with input "noise", or given with input "lq".
        """
        latents = self.network_input(lq, noise)
        timesteps = torch.full((len(lq),), self.timestep, device=lq.device)
        eps = self.predictor.predict_eps(latents, timesteps, conditions)
        return (latents - self.noise * eps) / self.signal

    def network_input(self, lq: Tensor, noise: Tensor | None) -> Tensor:
        """The predictor's input, which replaces noisy latents; see forward."""
        if self.align is None:
            if noise is not None:
                raise ValueError("this generator takes LQ latents alone (input lq): leave noise out")
            return lq
        if noise is None:
            raise ValueError("this generator combines LQ latents with noise (input noise): give noise")
        return self.align(torch.cat([lq, noise], dim=1).to(self.align.weight.dtype)).to(lq.dtype)  # type: ignore


def aligning_conv(channels: int, kernel: int = 1, shares: tuple[float, float] = (1.0, 0.0)) -> nn.Conv2d:
    """LQ latents and noise [B, 2C, h, w] -> [B, C, h, w]; the paper does not give its start weights.

    Args:
        shares: of LQ latents and noise in the output of the untrained convolution. (1, 0), align_start "lq", starts as
            a generator without noise; the noise half still has a gradient. (signal, noise) at the step's time,
            "noised", starts with LQ latents noised to that time, as in the prior's training: seeds matter at once.
    """
    conv = nn.Conv2d(2 * channels, channels, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        for half, share in enumerate(shares):
            rows = slice(half * channels, (half + 1) * channels)
            conv.weight[:, rows, kernel // 2, kernel // 2] = share * torch.eye(channels)
    return conv


def nearest_timestep(schedule: Schedule | FlowSchedule, alpha: float = ONE_STEP_ALPHA) -> int:
    """The time step whose share of signal variance is nearest to `alpha`: 400 on the released schedule.

    The share is 1 / (1 + s^2), where s is noise over signal. On a variance-preserving schedule it is alphas_cumprod.
    """
    share = 1 / (1 + schedule.sigmas.double().square())
    return int((share - alpha).abs().argmin())


def latent_multiple(config: Mapping[str, Any]) -> int:
    """Latent sides must be multiples of this: a DiT's patch, or 2 for each halving of a UNet, multiplied."""
    if "patch_size" in config:
        return int(config["patch_size"])
    return 2 ** (len(config["block_out_channels"]) - 1)


def build_network(family: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained network of a family from its diffusers arguments; it needs no memory inside torch.device("meta").

    Raises:
        ValueError: an unknown family, or a configuration of another family.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown generator family {family!r}. {did_you_mean(str(family), FAMILIES)}")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    try:
        return FAMILIES[family].build(arguments)
    except TypeError as error:
        raise ValueError(f"not the configuration of a {family} network: {error}") from error
