"""The families of priors: records, a one-step training in SD3's shape, and a fourth family of this file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from helper_modules import load_helper
from torch import Tensor, nn

from components.models import ModelCard, load_model, save_model
from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.conditions import Conditions, NetworkInputs
from components.priors.families import FAMILIES, family_of, licence_of
from components.priors.families.record import FamilyPrior, PriorFamily, TextLayout
from components.priors.files import Precision
from components.priors.one_text_config import PIXART, SD21
from components.priors.sd3_config import SD3_MEDIUM
from components.priors.sdxl_config import SDXL
from components.randomness import Noise, seeded_init
from components.recipes import RecipeError
from components.samplers.schedules import FlowSchedule, Schedule, schedule_from
from components.systems.instarevive.backbone import open_backbone
from components.systems.instarevive.build import build_restorer
from components.systems.instarevive.network import build_network
from components.systems.instarevive.training import BackboneObjective, build_objective
from components.systems.instarevive.weights import expected_layout, import_weights
from components.systems.recipes import load_recipe
from components.systems.weights_io import ImportJob
from components.training import build_optimizers, train_step
from components.types import Batch, Prediction, Request

tiny = load_helper("components/_tiny_sd3.py")


def test_the_records_agree_with_the_networks_that_they_build() -> None:
    assert list(FAMILIES) == ["pixart", "sd", "sdxl", "nano", "sd3"]
    for name, family in FAMILIES.items():
        assert family.name == name and family_of(name) is family
        assert (family.part == "unet") == (family.kind == "unet")
        assert callable(family.inputs())
        for arguments in family.networks.values():
            with torch.device("meta"):
                network = build_network(name, arguments)
            assert network.config["in_channels"] == family.latents["latent_channels"]  # type: ignore[index]
        flow = isinstance(schedule_from(family.schedule), FlowSchedule)
        assert flow == (family.prediction == "flow_prediction") == (name == "sd3")
        assert set(family.licences) >= set(family.networks)
    assert schedule_from(FAMILIES["pixart"].schedule) == Schedule(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear"
    )
    assert schedule_from(FAMILIES["sd3"].schedule) == FlowSchedule(shift=3.0)
    assert {name for name, family in FAMILIES.items() if family.text.columns} == {"sdxl", "nano"}
    assert {name for name, family in FAMILIES.items() if family.text.halved} == {"pixart", "sd", "sd3"}
    defaults = {name: family.default_prior for name, family in FAMILIES.items()}
    assert defaults == {"pixart": PIXART, "sd": SD21, "sdxl": SDXL, "nano": "nano", "sd3": SD3_MEDIUM}


def test_licences() -> None:
    assert licence_of(SDXL) == licence_of(PIXART) == licence_of(SD21) == "CreativeML OpenRAIL++-M"
    assert licence_of(SD3_MEDIUM) == "Stability AI Community License"
    assert licence_of("somebody/else") == "see there"


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r'unknown prior family .*Did you mean "sdxl"'):
        family_of("sdx")
    with pytest.raises(RecipeError, match=r'family: unknown prior family .*Did you mean "pixart"'):
        load_recipe("instarevive-bsr-nano", ["family=pixrt"])
    with pytest.raises(RecipeError, match="family sd3 must embed its own"):
        load_recipe("instarevive-bsr-nano", ["family=sd3", "prior=", "embeddings=text"])


# -- training and restoring --------------------------------------------------------------------------------------------


def batch_of(side: int = 32) -> Batch:
    draw = np.random.default_rng(0)
    hq, lq = (torch.from_numpy(draw.uniform(-1, 1, (2, 3, side, side)).astype("float32")) for _ in range(2))
    return Batch(
        keys=["a", "b"],
        positions=np.arange(2),
        hq=hq,
        lq=lq,
        prompts=["red", ""],
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1),
    )


def train_and_restore(family: str, prior: str, folder: Path) -> BackboneObjective:
    """One optimiser step of the one-step distillation; the trained folder then restores a picture."""
    recipe = load_recipe("instarevive-bsr-nano", [f"family={family}", f"prior={prior}", "resolution=32"])
    objective = build_objective(recipe, {})
    before = {k: v.clone() for k, v in objective.parts()["generator"].items()}
    batch, optimizers = batch_of(), build_optimizers(objective, recipe.optimizer)
    metrics = train_step(objective, [(batch, Noise(0, batch.positions))], optimizers, lr=1e-3, clip_norm=1.0)
    assert {"loss_regression", "loss_dsm", "loss_fake"} <= set(metrics) and np.isfinite(list(metrics.values())).all()
    assert any(not torch.equal(v, before[k]) for k, v in objective.parts()["generator"].items())
    card = ModelCard(name="m", system="instarevive", prior=objective.backbone.source, config=dict(objective.config))
    model = save_model(folder / "model", card, objective.parts())
    restorer = build_restorer(load_model(model.path))
    image = np.full((20, 28, 3), 90, dtype=np.uint8)
    (restored,) = restorer.restore([Request(key="k", image=image, prompt="red")])
    assert restored.image.shape == image.shape
    return objective


def test_a_prior_of_sd3s_shape_trains_and_restores(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "prior")
    objective = train_and_restore("sd3", str(tmp_path / "prior"), tmp_path)
    assert objective.config["family"] == "sd3" and objective.config["prediction"] == "flow_prediction"
    layout = expected_layout(prior=str(tmp_path / "prior"), sizes={"family": "sd3"})["InstaRevive_v1.ckpt"]
    assert {k: tuple(v.shape) for k, v in objective.parts()["generator"].items()} == layout


def test_sd3s_velocity_becomes_noise_as_written_by_hand(tmp_path: Path) -> None:
    """eps = x + (1 - t) v, at the shifted time t of the step, and the network sees 1000 t."""
    tiny.pipeline().save_pretrained(tmp_path / "prior")
    backbone = open_backbone("sd3", str(tmp_path / "prior"))
    predictor = backbone.predictor()
    latents, timesteps = tiny.normal(2, 16, 8, 8), torch.tensor([100, 800])
    conditions = backbone.conditions(["red", "blue"], torch.zeros(2, 6))
    times = torch.tensor([3 * t / (1 + 2 * t) for t in (0.1, 0.8)])
    with torch.no_grad():
        velocity = backbone.network(
            latents,
            timestep=1000 * times,
            encoder_hidden_states=conditions.text,
            pooled_projections=conditions.pooled,
        ).sample
        eps = predictor.predict_eps(latents, timesteps, conditions)
    torch.testing.assert_close(eps, latents + (1 - times.view(2, 1, 1, 1)) * velocity, atol=1e-5, rtol=1e-5)


# -- a fourth family ---------------------------------------------------------------------------------------------------


class Convolutions(ModelMixin, ConfigMixin):
    """A denoiser of a new kind: two convolutions; the text adds a bias to every pixel."""

    @register_to_config
    def __init__(self, in_channels: int = 4, width: int = 8, text_dim: int = 3, patch_size: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, in_channels, 1)
        self.text, self.time = nn.Linear(text_dim, width), nn.Linear(1, width)

    def forward(self, latents: Tensor, timestep: Tensor, words: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        bias = self.text(words.mean(dim=1)) + self.time(timestep.view(-1, 1).to(words) / 1000)
        return (self.second(torch.tanh(self.first(latents) + bias[:, :, None, None])),)


@dataclass(kw_only=True)
class LetterPrior:
    """A prior of the new family: a prompt's tokens are the codes of its first four letters, in three channels."""

    name: str
    network: Any
    autoencoder: nn.Module
    schedule: Schedule = field(default_factory=Schedule)
    digest: str = ""
    prediction: Prediction = "v_prediction"
    factor: int = 2
    latent_channels: int = 4

    @property
    def source(self) -> dict[str, str]:
        return {"id": self.name, "digest": self.digest}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.network, "autoencoder": self.autoencoder}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: str | torch.device) -> LetterPrior:
        for module in self.modules.values():
            module.to(device)
        return self

    def freeze(self) -> LetterPrior:
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def halve_text_encoder(self) -> LetterPrior:
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.autoencoder.encode(images)  # type: ignore[operator, no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)  # type: ignore[operator, no-any-return]

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        codes = [[ord(c) / 128 for c in prompt[:4].ljust(4)] for prompt in prompts]
        return Conditions(text=torch.tensor(codes)[..., None].expand(-1, -1, 3).contiguous())


def open_letters(name: str, precision: Precision, with_network: bool) -> FamilyPrior:
    with seeded_init(0, name):
        return LetterPrior(
            name=name, network=Convolutions(), autoencoder=SpaceToDepthAutoencoder(factor=2, latent_channels=4, width=8)
        ).freeze()


def word_inputs() -> NetworkInputs:
    return lambda network, conditions, dtype: {"words": conditions.text.to(dtype)}


LETTERS = PriorFamily(
    name="letters",
    default_prior="a/letters",
    kind="dit",
    part="transformer",
    networks={"a/letters": {"in_channels": 4, "width": 8}},
    latents={"latent_channels": 4},
    prediction="v_prediction",
    text=TextLayout(),
    licences={"a/letters": "public domain"},
    build=lambda arguments: Convolutions(**arguments),
    inputs=word_inputs,
    open=open_letters,
)


def test_a_fourth_family_trains_and_restores_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="unknown prior family"):
        load_recipe("instarevive-bsr-nano", ["family=letters"])
    monkeypatch.setitem(FAMILIES, "letters", LETTERS)
    objective = train_and_restore("letters", "", tmp_path)
    assert objective.config["family"] == "letters" and objective.backbone.source["id"] == "a/letters"
    assert licence_of("a/letters") == "public domain"
    torch.save(objective.parts()["generator"], tmp_path / "InstaRevive_v1.ckpt")
    report = import_weights(
        ImportJob(files=[tmp_path / "InstaRevive_v1.ckpt"], out=tmp_path / "imported", sizes={"family": "letters"})
    )
    assert "public domain" in load_model(str(report.model)).info["permitted_use"]
    with pytest.raises(RecipeError, match="needs a real score of a UNet: family sd, sdxl or nano"):
        load_recipe("instarevive-bsr-nano", ["family=letters", "ip_adapter=x", "picture_encoder=y"])
