"""Stage flow: the loss by hand; the recipe of the nano prior of SD3's shape trains; its folder opens and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor, nn

from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.priors.conditions import Conditions
from components.priors.families import FAMILIES
from components.priors.opening import load_prior
from components.priors.sd3 import SD3Prior, generate_latents
from components.priors.sd3_files import load_sd3_prior
from components.randomness import Noise
from components.recipes import RecipeError, as_dict, identity
from components.samplers.flow import Velocity
from components.samplers.schedules import FlowSchedule
from components.systems.prior.flow import FlowObjective, flow_objective, look, measure
from components.systems.prior.recipe import PriorRecipe
from components.systems.prior.system import PRIOR
from components.systems.recipes import load_recipe
from components.training import build_optimizers, train_step
from components.types import Batch

by_hand = load_helper("components/test_prior_training.py")
batch_of, pictures = by_hand.batch_of, by_hand.pictures

SMALL = ["size.transformer.num_layers=2", "size.transformer.num_attention_heads=2", "resolution=32", "steps=4"]
SMALL += ["size.transformer.caption_projection_dim=64", "batch_size=2", "short_side=32"]


class StandIn(by_hand.StandIn):  # type: ignore[misc, name-defined]
    """A prior whose velocity is 0.1 x + 0.01 letters - 0.5 t, and 0.001 times the pooled letters."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = FlowSchedule(shift=3.0)
        self.modules = {name: nn.Linear(1, 1) for name in ("transformer", "text_encoder", "text_encoder_3")}
        self.modules["autoencoder"] = self.autoencoder

    def velocity(self, conditions: Conditions) -> Velocity:
        def run(latents: Tensor, sigma: Tensor) -> Tensor:
            self.calls.append({"latents": latents, "sigma": sigma})
            assert conditions.pooled is not None
            letters, pooled = (value.view(-1, 1, 1, 1) for value in (conditions.text, conditions.pooled))
            return 0.1 * latents + 0.01 * letters + 0.001 * pooled - 0.5 * sigma.view(-1, 1, 1, 1)

        return run


@pytest.mark.parametrize("pooled_dropout", [0.0, 0.5])
def test_the_loss_by_hand(pooled_dropout: float) -> None:
    """Shifted logit-normal times, noisy latents on the straight path, target noise - clean, prompts dropped."""
    prior = StandIn()
    settings: dict[str, Any] = {"text_dropout": 0.5, "pooled_dropout": pooled_dropout}
    objective = FlowObjective(prior, {"a": 1}, "words", **settings, time_mean=0.4, time_deviation=1.5)  # type: ignore
    rows = 8
    batch = batch_of(pictures(rows), pictures(rows, name="lq"), [f"{'a' * (n + 3)}" for n in range(rows)])
    noise = Noise(2, batch.positions)
    ((name, loss),) = objective.phases(batch, noise)
    clean = torch.nn.functional.avg_pool2d(batch.hq, 2).double() / 2
    eps = noise.normal("noise", (3, 8, 8)).double()
    plain = [1 / (1 + float(np.exp(-(0.4 + 1.5 * n)))) for n in noise.normal("time", ()).tolist()]
    times = torch.tensor([3 * t / (1 + 2 * t) for t in plain], dtype=torch.float64)
    drop_text = (noise.uniform("text_dropout") < 0.5).tolist()
    drop_pooled = (noise.uniform("pooled_dropout") < pooled_dropout).tolist()
    letters = [0.0 if drop else n + 3.0 for n, drop in enumerate(drop_text)]
    pooled = [0.0 if drop else 10 * letters[n] for n, drop in enumerate(drop_pooled)]
    assert {True, False} == set(drop_text) and any(drop_pooled) == bool(pooled_dropout)
    total = 0.0
    for n, t in enumerate(times.tolist()):
        latents = (1 - t) * clean[n] + t * eps[n]
        velocity = 0.1 * latents + 0.01 * letters[n] + 0.001 * pooled[n] - 0.5 * t
        total += float((velocity - (eps[n] - clean[n])).square().mean()) / rows
    assert name == "denoiser" and set(loss.metrics) == {"loss"}
    assert float(loss.value) == pytest.approx(total, rel=1e-5) == float(loss.metrics["loss"])
    torch.testing.assert_close(prior.calls[0]["sigma"].double(), times)
    trained = {name for name, m in prior.modules.items() if any(p.requires_grad for p in m.parameters())}
    assert trained == {"transformer", "text_encoder", "text_encoder_3"} == set(objective.trainables["denoiser"])  # type: ignore


def recipe(*changes: str) -> PriorRecipe:
    small = load_recipe("prior-flow-nano", [*SMALL, *changes])
    assert isinstance(small, PriorRecipe)
    return small


def store(objective: FlowObjective, settings: PriorRecipe, path: Path) -> Model:
    card = ModelCard(name=path.name, system="prior", recipe=as_dict(settings), config=objective.config)
    return save_model(path, card, objective.parts(), objective.files, half=True)


def train(objective: FlowObjective, steps: int, settings: PriorRecipe) -> list[float]:
    optimizers, losses = build_optimizers(objective, settings.optimizer), []
    for step in range(steps):
        batch: Batch = batch_of(pictures(2, 32), pictures(2, 32, "lq"), ["red, dark", "blue"], first=2 * step)
        noise = Noise(settings.seed, np.array([1, 2]))  # the same noise each time, so that the loss must fall
        losses.append(train_step(objective, [(batch, noise)], optimizers, lr=2e-3, clip_norm=1.0)["loss"])
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[FlowObjective, Model]:
    settings = recipe()
    objective = PRIOR.build_objective(settings, {})
    assert isinstance(objective, FlowObjective)
    losses = train(objective, 4, settings)
    assert losses[-1] < losses[0] - 0.01
    return objective, store(objective, settings, tmp_path_factory.mktemp("prior") / "mine")


def test_the_trained_folder_opens_and_samples(trained: tuple[FlowObjective, Model]) -> None:
    objective, model = trained
    prior = FAMILIES["sd3"].open(str(model.path), "fp32", True)
    assert isinstance(prior, SD3Prior) and prior.absent == ()
    assert prior.source == {"id": str(model.path), "digest": model.digest}
    for part, module in prior.modules.items():
        expected = objective.parts()[part]
        for key, value in module.state_dict().items():
            torch.testing.assert_close(value, expected[key].half().float(), msg=f"{part} {key}")
    noise = Noise(0, np.arange(2)).normal("start", (12, 8, 8))
    with torch.no_grad():
        latents = generate_latents(prior, noise, ["red, dark", "blue"], steps=2, cfg_scale=2.0)
        pictures_of = prior.decode(latents)
    assert pictures_of.shape == (2, 3, 32, 32) and pictures_of.isfinite().all()
    half = load_sd3_prior(str(model.path), "bf16")
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="SDXL's shape is needed"):
        load_prior(str(model.path))


def test_the_autoencoder_is_that_of_nano_and_stays_frozen(trained: tuple[FlowObjective, Model]) -> None:
    objective, model = trained
    nano = load_model("nano", prior=True)
    for key, value in nano.part("autoencoder").items():
        assert torch.equal(model.part("autoencoder")[key], value), key
    assert objective.config["autoencoder"] == nano.info["config"]["autoencoder"]
    assert objective.config["family"] == "sd3"
    assert set(model.info["parts"]) == {
        "transformer",
        "autoencoder",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    }


def test_previews_and_measures(trained: tuple[FlowObjective, Model]) -> None:
    objective, _ = trained
    lq = pictures(2, 32, "lq")
    with torch.no_grad():
        preview = look(objective, recipe(), lq, ["red, dark", ""], seed=3)
        noise = Noise(3, np.arange(2)).normal("start", (12, 8, 8))
        latents = generate_latents(objective.prior, noise, ["red, dark", ""], steps=20, cfg_scale=4.0)
        torch.testing.assert_close(preview, objective.prior.decode(latents))
    heldout = batch_of(pictures(3, 32), pictures(3, 32, "lq"))
    restored = objective.prior.decode(objective.prior.encode(heldout.hq)).clamp(-1, 1)
    psnrs = [float(10 * torch.log10(4 / e)) for e in (restored - heldout.hq).square().mean((1, 2, 3))]
    assert measure(objective, [heldout]) == {"autoencoder_psnr_heldout": pytest.approx(sum(psnrs) / 3, rel=1e-4)}


def test_a_training_goes_on_from_a_warm_start(trained: tuple[FlowObjective, Model]) -> None:
    objective, model = trained
    again = flow_objective(recipe(f"warm_start={model.path}", "size.transformer.num_layers=9"), {})
    assert again.config == objective.config, "the folder's sizes win"
    assert again.files == objective.files
    state = again.parts()["transformer"]
    assert all(torch.equal(state[k], v.half().float()) for k, v in objective.parts()["transformer"].items())


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ("size.transformer.in_channels=16", "takes 16 channels, the autoencoder makes 12"),
        ("size.text_encoder_3.d_model=32", "T5 makes 32"),
        ("size.transformer.layers=3", "layers"),
        ("autoencoder_from=nothing-there", "nothing-there"),
    ):
        with pytest.raises(ModelError, match=words):
            flow_objective(recipe(change), {})
    save_model(tmp_path / "m", ModelCard(name="x", system="swinir"), {"a": {"w": torch.zeros(1)}})
    with pytest.raises(ModelError, match="not a prior"):
        flow_objective(recipe(f"autoencoder_from={tmp_path / 'm'}"), {})


def test_a_prior_without_t5_trains(tmp_path: Path) -> None:
    objective = flow_objective(recipe("size.text_encoder_3={}"), {})
    # an empty mapping is merged, so the recipe names null to leave T5 out
    assert "text_encoder_3" in objective.prior.modules
    objective = flow_objective(recipe("size.text_encoder_3=null"), {})
    assert objective.prior.absent == ("text_encoder_3",)
    train(objective, 1, recipe())


def settings_of(recipe: PriorRecipe, names: Sequence[str]) -> list[Any]:
    return [getattr(recipe, name) for name in names]


def test_the_recipe_and_its_stage() -> None:
    nano = load_recipe("prior-flow-nano")
    assert isinstance(nano, PriorRecipe)
    names = ("autoencoder_from", "time_mean", "time_deviation", "checkpoint_every", "steps")
    assert settings_of(nano, names) == ["nano", 0.0, 1.0, 200, 8000]
    assert nano.trains_prior and not nano.opens_prior
    networks = PRIOR.networks()
    assert networks.encoded_with(nano, {}) == "nano"
    assert networks.encoded_with(recipe("warm_start=mine"), {}) == "mine"
    assert networks.encoded_with(load_recipe("prior-denoiser-nano"), {"encoder": Path("e")}) == "e"
    assert not {"autoencoder_from", "time_mean", "time_deviation"} & set(identity(load_recipe("prior-denoiser-nano")))
    for name, change in (
        ("prior-denoiser-nano", "time_mean=1.0"),
        ("prior-flow-nano", "noise_offset=0.2"),
        ("prior-flow-nano", "time_deviation=0.0"),
    ):
        with pytest.raises(RecipeError, match=change.partition("=")[0]):
            load_recipe(name, [change])
