"""The prior's training stages by hand, on a stand-in prior with simple functions: losses, sampling, measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models import Model
from components.priors.nano import NANO
from components.randomness import Noise, generator
from components.samplers.schedules import Sampling, Schedule
from components.systems.prior.recipe import PriorRecipe
from components.systems.prior.training import (
    AutoencoderObjective,
    DenoiserObjective,
    ImageEncoderObjective,
    autoencoder_objective,
    denoiser_objective,
    generate,
    image_encoder_objective,
    look,
    measure,
    merge_sizes,
    picture_vectors,
    retrieval_share,
)
from components.types import Batch, Loss


def pictures(batch: int, side: int = 16, name: str = "x") -> Tensor:
    """Pictures [batch, 3, side, side] in [-1, 1]."""
    return torch.from_numpy(generator(5, name).uniform(-1, 1, (batch, 3, side, side)).astype(np.float32))


def batch_of(hq: Tensor, lq: Tensor, prompts: Sequence[str] | None = None, first: int = 7) -> Batch:
    """A batch at the positions `first`, `first` + 1, ..."""
    rows = len(hq)
    return Batch(
        keys=[f"k{n}" for n in range(rows)],
        positions=np.arange(first, first + rows),
        hq=hq,
        lq=lq,
        prompts=prompts or [f"p{n}" for n in range(rows)],
        sizes=torch.arange(6 * rows).view(rows, 6),
    )


@dataclass(kw_only=True)
class StandIn:
    """A prior whose latents are halved means of 2 x 2 pixels, and whose denoiser returns what `eps` says.

    A prompt's embedding is the number of its letters.
    """

    autoencoder: nn.Module = field(default_factory=lambda: nn.Linear(2, 2))
    calls: list[dict[str, Any]] = field(default_factory=list)
    grid: int = 8
    latent_channels: int = 3
    factor: int = 2
    image_token_dim: int = 3
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        names = ("unet", "text_encoder", "text_encoder_2", "image_encoder")
        self.modules: dict[str, nn.Module] = {name: nn.Linear(1, 1) for name in names}
        self.modules["autoencoder"] = self.autoencoder
        self.image_encoder = self.modules["image_encoder"]
        self.schedule = Schedule()

    def freeze(self) -> StandIn:
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 2) / 2

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents * 2, scale_factor=2.0)

    def embed_images(self, images: Tensor) -> Tensor:
        patches = F.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(patches[:, :1], 9.0), patches], dim=1)

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return lengths.view(-1, 1, 1), 10 * lengths.view(-1, 1)

    def time_ids(self, sizes: Tensor) -> Tensor:
        return sizes.float()

    def unet(self, noisy: Tensor, t: Tensor, **conditions: Any) -> SimpleNamespace:
        """Noise: 0.01 times the letters of the prompt, plus 0.1 times the latents."""
        self.calls.append({"noisy": noisy, "t": t, **conditions})
        letters = conditions["encoder_hidden_states"].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=0.01 * letters + 0.1 * noisy)


def only(objective: Any, batch: Batch, noise: Noise) -> tuple[str, Loss]:
    """The single phase of an objective."""
    (phase,) = objective.phases(batch, noise)
    return phase


def test_the_autoencoders_loss_by_hand() -> None:
    """Mean absolute plus four times mean square error, of the decoded latents with noise of the recipe's deviation."""
    prior = StandIn()
    objective = AutoencoderObjective(prior, {"a": 1}, "words", latent_noise=0.3)  # type: ignore[arg-type]
    batch, noise = batch_of(pictures(2), pictures(2, name="lq")), Noise(1, np.array([7, 8]))
    name, loss = only(objective, batch, noise)
    latents = F.avg_pool2d(batch.hq, 2) / 2 + 0.3 * noise.normal("latents", (3, 8, 8))
    error = (F.interpolate(2 * latents, scale_factor=2.0) - batch.hq).double()
    mse = float((error**2).mean())
    assert name == "autoencoder"
    assert float(loss.value) == pytest.approx(float(error.abs().mean()) + 4 * mse, rel=1e-5)
    assert float(loss.metrics["loss"]) == pytest.approx(mse, rel=1e-5)
    psnrs = [10 * math.log10(4 / float((picture**2).mean())) for picture in error]  # a range of 2
    assert float(loss.metrics["psnr"]) == pytest.approx(sum(psnrs) / 2, rel=1e-5)
    assert objective.files == {"tokenizer.json": "words"} and objective.config == {"a": 1}
    assert [name for name, m in prior.modules.items() if any(p.requires_grad for p in m.parameters())] == [
        "autoencoder"
    ]
    assert set(objective.parts()) == {"unet", "text_encoder", "text_encoder_2", "image_encoder", "autoencoder"}
    assert set(objective.parts()["autoencoder"]) == {"weight", "bias"}


def vector(tokens: Tensor) -> list[float]:
    """A unit vector of a picture's 64 patch tokens [65, D]: means of 2 x 2 patches, channel by channel."""
    values = []
    for channel in range(tokens.shape[1]):
        plane = tokens[1:, channel].double().view(8, 8)
        values += [float(plane[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()) for y in range(4) for x in range(4)]
    length = math.sqrt(sum(value**2 for value in values))
    return [value / length for value in values]


def test_a_pictures_vector_by_hand() -> None:
    tokens = StandIn().embed_images(pictures(2))
    vectors = picture_vectors(tokens)
    assert vectors.shape == (2, 48)
    torch.testing.assert_close(vectors.double(), torch.tensor([vector(t) for t in tokens], dtype=torch.float64))


def test_the_picture_encoders_loss_by_hand() -> None:
    """Cross-entropies of rows and columns over their mean, and four times the read-out's error of 2 x 2 thumbnails."""
    prior = StandIn()
    objective = ImageEncoderObjective(prior, {}, "", temperature=0.2, seed=3)  # type: ignore[arg-type]
    hq = pictures(3, 32)
    lq = (0.5 * hq + 0.7 * pictures(3, 32, "more")).roll(1, 0)  # each LQ picture belongs to another row
    name, loss = only(objective, batch_of(hq, lq), Noise(1, np.arange(3)))
    mine, theirs = ([vector(t) for t in prior.embed_images(images)] for images in (lq, hq))
    logits = [[sum(a * b for a, b in zip(x, y, strict=True)) / 0.2 for y in theirs] for x in mine]
    contrast = 0.0
    for n in range(3):
        for line in (logits[n], [row[n] for row in logits]):
            contrast += math.log(sum(math.exp(v) for v in line)) - line[n]
    contrast /= 6
    weight, bias = (p.detach().double() for p in objective.readout.parameters())
    errors = []
    for row in range(3):
        tokens = prior.embed_images(lq)[row, 1:].double().view(8, 8, 3)
        thumbnail = F.avg_pool2d(hq[row : row + 1], 2)[0].double()  # 16 x 16: two pixels for a patch's side
        for y in range(8):
            for x in range(8):
                cell = thumbnail[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(-1)
                errors.append((tokens[y, x] @ weight.T + bias - cell).square().mean())
    colour = float(torch.stack(errors).mean())
    assert name == "encoder" and objective.readout.weight.shape == (12, 3)
    assert float(loss.metrics["colour"].detach()) == pytest.approx(colour, rel=1e-4)
    assert float(loss.metrics["loss"].detach()) == pytest.approx(contrast, rel=1e-4)
    assert float(loss.value) == pytest.approx(contrast + 4 * colour, rel=1e-4)
    right = [max(range(3), key=lambda k, n=n: logits[n][k]) == n for n in range(3)]  # type: ignore[misc]
    assert float(loss.metrics["found"]) == pytest.approx(sum(right) / 3) != 1
    trained = {name for name, p in objective.trainables["encoder"].named_parameters() if p.requires_grad}
    assert trained == {"image_encoder.weight", "image_encoder.bias", "readout.weight", "readout.bias"}
    again = ImageEncoderObjective(StandIn(), {}, "", temperature=0.2, seed=3)  # type: ignore[arg-type]
    other = ImageEncoderObjective(StandIn(), {}, "", temperature=0.2, seed=4)  # type: ignore[arg-type]
    assert torch.equal(again.readout.weight, objective.readout.weight)
    assert not torch.equal(other.readout.weight, objective.readout.weight)


def test_the_denoisers_loss_by_hand() -> None:
    """Prompts are dropped by their own numbers, the pooled prompt by others; time ids and noise are the batch's."""
    prior = StandIn()
    objective = DenoiserObjective(prior, {}, "", text_dropout=0.5, pooled_dropout=0.5, noise_offset=0.2)  # type: ignore[arg-type]
    rows = 8
    batch = batch_of(pictures(rows), pictures(rows, name="lq"), [f"{'a' * (n + 3)}" for n in range(rows)])
    noise = Noise(2, batch.positions)
    name, loss = only(objective, batch, noise)
    drop_text = (noise.uniform("text_dropout") < 0.5).tolist()
    drop_pooled = (noise.uniform("pooled_dropout") < 0.5).tolist()
    assert len({*zip(drop_text, drop_pooled, strict=True)}) == 4  # all four cases are in the batch
    letters = torch.tensor([0.0 if drop else n + 3.0 for n, drop in enumerate(drop_text)])
    pooled = torch.tensor([0.0 if drop else 10 * float(letters[n]) for n, drop in enumerate(drop_pooled)])
    (call,) = prior.calls
    t = noise.integers("timestep", 0, 1000)
    eps = noise.normal("noise", (3, 8, 8)) + 0.2 * noise.normal("noise_offset", (3, 1, 1))
    alpha = Schedule().alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * F.avg_pool2d(batch.hq, 2) / 2 + (1 - alpha).sqrt() * eps
    assert torch.equal(call["t"], t)
    torch.testing.assert_close(call["noisy"], noisy)
    torch.testing.assert_close(call["encoder_hidden_states"].flatten(), letters)
    torch.testing.assert_close(call["added_cond_kwargs"]["text_embeds"].flatten(), pooled)
    torch.testing.assert_close(call["added_cond_kwargs"]["time_ids"], batch.sizes.float())
    assert name == "denoiser"
    expected = (0.01 * letters.view(-1, 1, 1, 1) + 0.1 * noisy - eps).double().square().mean()
    assert float(loss.value) == pytest.approx(float(expected), rel=1e-5)
    assert set(objective.trainables["denoiser"]) == {"unet", "text_encoder", "text_encoder_2"}  # type: ignore[call-overload]


def test_the_denoisers_loss_has_the_recipes_weights() -> None:
    prior = StandIn()
    objective = DenoiserObjective(prior, {}, "", text_dropout=0.0, max_clean_weight=30.0)  # type: ignore[arg-type]
    batch = batch_of(pictures(4), pictures(4, name="lq"))
    _, loss = only(objective, batch, Noise(2, batch.positions))
    (call,) = prior.calls
    torch.testing.assert_close(call["added_cond_kwargs"]["text_embeds"].flatten(), torch.full((4,), 20.0))  # "p0" ...
    weights = (1 / Schedule().alphas_cumprod.double()).clamp_max(30)
    weights /= weights.mean()
    eps = Noise(2, batch.positions).normal("noise", (3, 8, 8))
    plain = (0.02 + 0.1 * call["noisy"] - eps).double().square().mean((1, 2, 3))
    assert float(loss.value) == pytest.approx(float((plain * weights[call["t"]]).mean()), rel=1e-4)
    assert float(loss.metrics["plain_loss"]) == pytest.approx(float(plain.mean()), rel=1e-5)


def test_pictures_from_prompts_have_a_closed_form() -> None:
    """A denoiser with eps = 0.01 letters: guidance gives 0.04 letters, and DDIM ends at start - sigma_0 times that."""
    prior = StandIn()

    def unet(noisy: Tensor, t: Tensor, **conditions: Any) -> SimpleNamespace:
        prior.calls.append({"noisy": noisy, "t": t, **conditions})
        return SimpleNamespace(sample=0.01 * conditions["encoder_hidden_states"].view(-1, 1, 1, 1).expand_as(noisy))

    prior.unet = unet  # type: ignore[method-assign]
    noise = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    clean = generate(prior, noise, ["abc", "abcde"], (8, 12), steps=5)  # type: ignore[arg-type]
    sigma = float(Schedule().sigmas[801])
    guided = 4 * torch.tensor([0.03, 0.05]).view(2, 1, 1, 1)
    torch.testing.assert_close(clean, noise * math.sqrt(1 + sigma**2) - sigma * guided, atol=1e-4, rtol=1e-4)
    assert [call["t"].tolist() for call in prior.calls] == [[t] * 4 for t in (801, 601, 401, 201, 1)]
    first = prior.calls[0]
    torch.testing.assert_close(first["noisy"], noise.repeat(2, 1, 1, 1), atol=1e-5, rtol=1e-5)
    assert first["encoder_hidden_states"].flatten().tolist() == [0, 0, 3, 5]
    assert first["added_cond_kwargs"]["text_embeds"].flatten().tolist() == [0, 0, 30, 50]
    assert first["added_cond_kwargs"]["time_ids"].tolist() == [[8, 12, 0, 0, 8, 12]] * 4


def test_previews_of_the_stages() -> None:
    prior, lq = StandIn(), pictures(2, 16, "lq")
    objective = AutoencoderObjective(prior, {}, "", 0.0)  # type: ignore[arg-type]
    views = {
        stage: look(objective, recipe(stage), lq, ["abc", ""], seed=4)
        for stage in ("autoencoder", "encoder", "denoiser")
    }
    torch.testing.assert_close(views["autoencoder"], F.interpolate(F.avg_pool2d(lq, 2), scale_factor=2.0))
    assert views["encoder"] is lq
    assert len(prior.calls) == 20 and views["denoiser"].shape == lq.shape
    start = Noise(4, np.arange(2)).normal("start", (3, 8, 8))
    torch.testing.assert_close(views["denoiser"], prior.decode(generate(prior, start, ["abc", ""], (16, 16))))  # type: ignore[arg-type]


def test_measures_by_hand() -> None:
    """PSNR of the clamped reconstruction, mean over pictures; the nearest HQ is counted among at most 64."""
    prior = StandIn()
    objective = AutoencoderObjective(prior, {}, "", 0.0)  # type: ignore[arg-type]
    hq = torch.cat([pictures(3, 16), torch.full((1, 3, 16, 16), 0.5)])
    hq[0, :, :2, :2] = 1.5  # beyond the range: the reconstruction is clamped to 1
    batches = [batch_of(hq[:3], hq[:3].roll(1, 0)), batch_of(hq[3:], hq[3:])]
    numbers = measure(objective, batches)
    restored = F.interpolate(F.avg_pool2d(hq, 2), scale_factor=2.0).clamp(-1, 1)
    errors = (restored - hq).double().square().mean((1, 2, 3))
    psnrs = [10 * math.log10(4 / max(float(error), 1e-10)) for error in errors]
    assert numbers["autoencoder_psnr_heldout"] == pytest.approx(sum(psnrs) / 4, rel=1e-4)
    assert psnrs[3] == pytest.approx(106.0206, abs=1e-3)
    assert numbers["encoder_found_among_64"] == 0.25  # the first three are shifted by one row
    many = pictures(66, 8)
    assert retrieval_share(prior, many, many) == 1  # type: ignore[arg-type]
    swapped = torch.cat([many[:64], many[64:].flip(0)])
    assert measure(objective, [batch_of(many, swapped)])["encoder_found_among_64"] == 1


SMALL = {
    "autoencoder": {"factor": 2, "latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1},
    "unet": {"in_channels": 4, "out_channels": 4},
    "image_encoder": {"num_hidden_layers": 1},
}


def recipe(stage: str, **fields: Any) -> PriorRecipe:
    """A recipe of a small prior."""
    run = {"name": "small", "system": "prior", "steps": 1, "batch_size": 1, "seed": 5}
    return PriorRecipe(**run, stage=stage, **{"size": SMALL, **fields})


def test_the_stages_are_built_from_the_recipe_and_the_stage_before(tmp_path: Any) -> None:
    """Sizes replace single entries of the nano prior; the parent's weights and config win over the recipe's."""
    with pytest.raises(ValueError, match="needs example pictures"):
        autoencoder_objective(recipe("autoencoder"), {})
    shown = pictures(2, 16)
    first = autoencoder_objective(recipe("autoencoder", latent_noise=0.3), {}, lambda: shown)
    assert first.latent_noise == 0.3
    assert first.config["unet"] == {**NANO["unet"], "in_channels": 4, "out_channels": 4}
    assert first.config["image_encoder"]["num_hidden_layers"] == 1 and NANO["image_encoder"]["num_hidden_layers"] == 4
    again = autoencoder_objective(recipe("autoencoder"), {}, lambda: shown)
    for part, tensors in first.parts().items():
        assert all(torch.equal(tensor, again.parts()[part][key]) for key, tensor in tensors.items()), part
    other = autoencoder_objective(recipe("autoencoder"), {}, lambda: pictures(2, 16, "other"))
    assert any(
        not torch.equal(tensor, other.parts()["autoencoder"][key])
        for key, tensor in first.parts()["autoencoder"].items()
    )

    class Parent(Model):
        """The first stage's result, in memory."""

        def __init__(self) -> None:
            object.__setattr__(self, "path", tmp_path)
            object.__setattr__(self, "info", {"config": first.config})
            (tmp_path / "tokenizer.json").write_text(first.files["tokenizer.json"], encoding="utf-8")

        def file(self, name: str) -> Any:
            return tmp_path / name

        def part(self, name: str) -> Any:
            return {
                key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in first.parts()[name].items()
            }

    fresh = recipe("denoiser", size={}, text_dropout=0.2, pooled_dropout=0.3)
    fresh.noise_offset, fresh.max_clean_weight, fresh.contrast_temperature = 0.4, 7.0, 0.6
    last = denoiser_objective(fresh, {"encoder": Parent()})
    assert last.config == first.config
    assert (last.text_dropout, last.pooled_dropout, last.loss.noise_offset) == (0.2, 0.3, 0.4)
    weights = (1 / Schedule().alphas_cumprod).clamp_max(7)
    torch.testing.assert_close(last.loss.weights, weights / weights.mean())
    for part, tensors in first.parts().items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                torch.testing.assert_close(last.parts()[part][key], tensor + 1)
    assert image_encoder_objective(fresh, {"autoencoder": Parent()}).temperature == 0.6
    assert autoencoder_objective(fresh, {"autoencoder": Parent()}).config == first.config  # needs no pictures


def test_changes_of_a_config_aremerge_sizesd_by_key() -> None:
    base = {"unet": {"heads": 2, "blocks": [1]}, "text_length": 8}
    changes = {"unet": {"heads": 4}, "text_length": {"a": 1}, "view": {"side": 3}}
    merged = {"unet": {"heads": 4, "blocks": [1]}, "text_length": {"a": 1}, "view": {"side": 3}}
    assert merge_sizes(base, changes) == merged and base["unet"] == {"heads": 2, "blocks": [1]}
