"""InstaRevive's networks: noise predictors of several families behind one call, and the generator of one step.

    x_t = signal clean + noise eps                             at time step t of the prior's own schedule
    G(z) = (z - noise eps(z, t)) / signal                      at one fixed t, where z stands for x_t

On a variance-preserving schedule signal and noise are sqrt(a) and sqrt(1 - a), a = alphas_cumprod[t]; on that of a
flow-matching prior 1 - time and time. The same class serves as generator, as real score and as fake score; they differ
in weights only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.naming import did_you_mean
from components.samplers.schedules import FlowSchedule, Schedule
from components.systems.instarevive.settings import AlignStart, Family
from components.types import Prediction

InputMode = Literal["lq", "noise"]

FAMILIES: tuple[str, ...] = get_args(Family)
ONE_STEP_ALPHA = 0.19357
"""alphas_cumprod at the released step: 400 of 1000 with linear betas 1e-4 .. 2e-2 (reference, section 1)."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a network is told beside the latents, for B samples.

    Attributes:
        text: token embeddings [B, L, D].
        mask: [B, L], 1 for a token and 0 for padding; None: all are tokens.
        pooled: pooled text [B, P], for SDXL's shape.
        time_ids: size ids float [B, 6] (original h, w, crop top, left, target h, w) in pixels, for SDXL's shape and for
            DiTs that are told their resolution.
        image: picture embeddings [B, D], for networks with an IP-Adapter; others do not look at them.
    """

    text: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    image: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions(**{name: value.to(device) for name, value in self.tensors().items()})

    def expand(self, batch: int) -> Conditions:
        """Conditions of one sample for `batch` samples, without a copy."""
        return Conditions(**{n: v.expand(batch, *v.shape[1:]) for n, v in self.tensors().items()})

    def with_sizes(self, time_ids: Tensor) -> Conditions:
        """The same text for another size; ids [B, 6]."""
        return replace(self, time_ids=time_ids)

    def replaced(self, other: Conditions, rows: Tensor) -> Conditions:
        """The rows where bool [B] is true taken from `other` (of as many samples, or of one): prompt dropout."""
        return Conditions(
            **{
                name: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), other.tensors()[name], value)
                for name, value in self.tensors().items()
            }
        )


def join(parts: Sequence[Conditions]) -> Conditions:
    """Conditions of all samples one after another: guidance asks the network once for both halves."""
    return Conditions(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})


class ScoreNetwork(Protocol):
    """A noise predictor: what training asks of real and fake score.

    `latents` are noisy as `schedule` has it at int64 `timesteps` [B]; the result is the predicted standard normal
    noise of the same shape [B, C, h, w], in the latents' own type, whatever the network itself predicts.
    """

    @property
    def schedule(self) -> Schedule | FlowSchedule: ...

    def predict_eps(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor: ...


class EpsPredictor(nn.Module):
    """A diffusers network as a ScoreNetwork.

    Args:
        network: PixArtTransformer2DModel or UNet2DConditionModel.
        schedule: it was trained with.
        prediction: what it predicts; velocities are turned into noise by the schedule's eps_from_velocity.
        mask_as_bias: add the 0/1 prompt mask to the attention's logits, as the released inference does by handing it
            over with one dimension too many: padding is then not masked, tokens only weigh e times as much.

    Raises:
        ValueError: an unknown prediction, or one that does not go with the schedule.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule | FlowSchedule,
        prediction: Prediction = "epsilon",
        mask_as_bias: bool = False,
    ) -> None:
        super().__init__()
        check_prediction(prediction, schedule)
        self.network, self._schedule = network, schedule
        self.prediction, self.mask_as_bias = prediction, mask_as_bias

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        return self._schedule

    @property
    def latent_channels(self) -> int:
        return int(self.network.config["in_channels"])  # type: ignore[index, arg-type]

    @property
    def multiple(self) -> int:
        """Latent sides must be multiples of this: a DiT's patch, or what a UNet's halvings ask for."""
        return latent_multiple(self.network.config)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        """predict_eps, where wrappers of modules want a forward."""
        return self.predict_eps(latents, timesteps, given)

    def predict_eps(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        """See ScoreNetwork. Learned variances, a DiT's second half of channels, are dropped."""
        predicted = self.raw(latents, timesteps, given)[:, : latents.shape[1]].to(latents.dtype)
        if self.prediction == "epsilon":
            return predicted
        return self.schedule.eps_from_velocity(latents, predicted, timesteps)

    def raw(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        """The network's own output [B, C or 2C, h, w], in the network's type.

        Raises:
            ValueError: a condition that the network needs is missing.
        """
        dtype = next(self.network.parameters()).dtype
        arguments: dict[str, Any] = {"encoder_hidden_states": given.text.to(dtype), "return_dict": False}
        mask = given.mask
        if mask is not None and self.mask_as_bias:
            arguments["encoder_attention_mask"] = mask.to(dtype)[:, None]
        elif mask is not None:
            arguments["encoder_attention_mask"] = mask.to(dtype)
        added = self._added(given, dtype)
        if added is not None:
            arguments["added_cond_kwargs"] = added
        told = self.schedule.told(timesteps)
        return self.network(latents.to(dtype), timestep=told, **arguments)[0]  # type: ignore[no-any-return]

    def _added(self, given: Conditions, dtype: torch.dtype) -> dict[str, Any] | None:
        """What the network takes beside text and time step."""
        # an attribute and no item: diffusers notes a loaded adapter so
        if getattr(self.network.config, "encoder_hid_dim_type", None) == "ip_image_proj":
            if given.image is None:
                raise ValueError("a network with an IP-Adapter needs picture embeddings with the conditions")
            return {**(self._sized(given, dtype) or {}), "image_embeds": [given.image.to(dtype)[:, None]]}
        return self._sized(given, dtype)

    def _sized(self, given: Conditions, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """What the network's time embedding takes beside the time step."""
        if getattr(self.network, "use_additional_conditions", False):
            if given.time_ids is None:
                raise ValueError("this DiT is told its resolution: give size ids with the conditions")
            size = given.time_ids[:, 4:6].to(dtype)
            return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        if self.network.config.get("addition_embed_type") == "text_time":  # type: ignore[union-attr, operator]
            if given.pooled is None or given.time_ids is None:
                raise ValueError("a UNet of SDXL's shape needs pooled text and size ids with the conditions")
            return {"text_embeds": given.pooled.to(dtype), "time_ids": given.time_ids}
        return None


def check_prediction(prediction: str, schedule: Schedule | FlowSchedule) -> None:
    """Raises ValueError for an unknown prediction, or one that does not go with the schedule."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"unknown prediction {prediction!r}. {did_you_mean(prediction, get_args(Prediction))}")
    if (prediction == "flow_prediction") != isinstance(schedule, FlowSchedule):
        raise ValueError(f"{prediction} does not go with {schedule}: a flow's velocity and a flow's times do")


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """How a predictor makes clean latents in one step.

    Attributes:
        timestep: where the step starts; -1 takes the one whose share of signal is nearest to ONE_STEP_ALPHA.
        input: "lq": the LQ latents stand in the place of the noisy ones (released, deterministic); "noise": they are
            joined with noise by an aligning convolution (the paper), so that seeds give different results.
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
        align_start: what an untrained aligning convolution gives, see aligning_conv.

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
        # plain numbers: a table that is looked up on the device would break a compiled step in two
        self.signal, self.noise = predictor.schedule.shares(self.timestep)
        self.align: nn.Conv2d | None = None
        if settings.input == "noise":
            shares = (1.0, 0.0) if align_start == "lq" else (self.signal, self.noise)
            self.align = aligning_conv(predictor.latent_channels, settings.kernel, shares)

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        return self.predictor.schedule

    @property
    def wants_noise(self) -> bool:
        """Whether a result depends on a seed."""
        return self.align is not None

    def forward(self, lq: Tensor, given: Conditions, noise: Tensor | None = None) -> Tensor:
        """Clean latents [B, C, h, w].

        Args:
            lq: scaled latents of the LQ picture, or of what a coarse restorer made of it.
            given: for B samples.
            noise: standard normal of lq's shape, with input "noise" only.

        Raises:
            ValueError: noise is missing, or has no place.
        """
        latents = self.joined(lq, noise)
        timesteps = torch.full((len(lq),), self.timestep, device=lq.device)
        eps = self.predictor.predict_eps(latents, timesteps, given)
        return (latents - self.noise * eps) / self.signal

    def joined(self, lq: Tensor, noise: Tensor | None) -> Tensor:
        """What the predictor sees in the place of noisy latents; see forward."""
        if self.align is None:
            if noise is not None:
                raise ValueError("this generator takes LQ latents alone (input lq): noise has no place in it")
            return lq
        if noise is None:
            raise ValueError("this generator joins LQ latents with noise (input noise): give noise")
        return self.align(torch.cat([lq, noise], dim=1).to(self.align.weight.dtype)).to(lq.dtype)  # type: ignore


def aligning_conv(channels: int, kernel: int = 1, shares: tuple[float, float] = (1.0, 0.0)) -> nn.Conv2d:
    """LQ latents and noise [B, 2C, h, w] -> [B, C, h, w]; the paper names no start.

    Args:
        shares: of LQ latents and noise in what comes out at first. (1, 0), align_start "lq", begins as a generator
            without noise; the noise half has a gradient. (signal, noise) of the step's time, "noised", begins with
            what the prior was trained on, LQ latents noised to that time: results differ by seed from the start.
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
    """The time step whose share of the signal's variance is nearest: 400 on the released schedule, others elsewhere.

    The share is 1 / (1 + s^2) of noise over signal s, which is alphas_cumprod where the schedule preserves variance.
    """
    share = 1 / (1 + schedule.sigmas.double().square())
    return int((share - alpha).abs().argmin())


def latent_multiple(config: Mapping[str, Any]) -> int:
    """Latent sides must be multiples of this: a DiT's patch, or what a UNet's halvings ask for."""
    if "patch_size" in config:
        return int(config["patch_size"])
    return 2 ** (len(config["block_out_channels"]) - 1)


def build_network(family: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained network of a family from its diffusers arguments; inside torch.device("meta") without memory.

    Raises:
        ValueError: an unknown family, or a configuration of another shape.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown generator family {family!r}. {did_you_mean(str(family), FAMILIES)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    try:
        network: nn.Module = PixArtTransformer2DModel(**plain) if family == "pixart" else UNet2DConditionModel(**plain)
    except TypeError as error:
        raise ValueError(f"not the configuration of a {family} network: {error}") from error
    told = plain.get("addition_embed_type")
    wanted = "text_time" if family in ("sdxl", "nano") else None
    if told != wanted:
        raise ValueError(f"a {family} network has addition_embed_type {wanted!r}, this one {told!r}")
    return network
