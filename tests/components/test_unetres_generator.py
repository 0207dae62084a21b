"""UNetRes' denoiser and generator: their losses by hand, the chain of stages, strength, and a short distillation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor

from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.objectives.distillation import Distillation
from components.objectives.regression import pyramid_distance
from components.objectives.score_matching import WEIGHT_EPS
from components.randomness import Noise, generator
from components.recipes import RecipeError
from components.samplers.schedules import Schedule
from components.systems import build_restorer
from components.systems.recipes import load_recipe
from components.systems.unetres.build import DENOISER, GENERATOR, REGRESSION
from components.systems.unetres.config import config_from
from components.systems.unetres.detail import DetailObjective
from components.systems.unetres.network import UNetRes, build_unetres
from components.systems.unetres.objective import (
    RegressionObjective,
    denoiser_objective,
    generator_objective,
    look,
    measure,
    regression_objective,
)
from components.systems.unetres.recipe import Features, UNetResRecipe
from components.systems.unetres.score import SCHEDULE, DenoiserObjective, NoScore, score_of
from components.training import build_optimizers, train_step
from components.types import Objective, Request

basic = load_helper("components/test_unetres.py")


def network(name: str, pictures: int = 1, level: bool = False) -> UNetRes:
    """A small network whose tail is not zero."""
    unetres = build_unetres(config_from(basic.TINY), 0, name, pictures, level)
    with torch.no_grad():
        unetres.tail.weight.copy_(torch.from_numpy(generator(1, name).normal(0, 0.03, unetres.tail.weight.shape)))
    return unetres


def settings(**values: Any) -> Distillation:
    return Distillation(
        **{"cfg_scale": 1.0, "prompt": False, "text_dropout": 0.0, "dynamic": False, "fixed_alpha": 0.3, **values}
    )


# ---------------------------------------------------------------------------------------------------------- the score


def test_the_level_is_a_map_of_the_noise() -> None:
    """-1 at the least noise and 1 at the most, linear in the logarithm; the network's change is the noise."""
    score, images = score_of(network("d", level=True)), basic.rows("x", 3)
    schedule, steps = Schedule(**SCHEDULE), torch.tensor([0, 400, 999])
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()[steps]
    level = 2 * (sigmas / sigmas[0]).log() / (sigmas[2] / sigmas[0]).log() - 1
    assert float(sigmas[0]) == pytest.approx(0.01, rel=0.01) and float(sigmas[2]) == pytest.approx(1.0, rel=0.05)
    torch.testing.assert_close(score.predict_eps(images, steps), score.network.change(images, level=level))
    plain = torch.cat([torch.nn.functional.pixel_unshuffle(images, 2), level.view(3, 1, 1, 1).expand(3, 1, 8, 8)], 1)
    inputs: list[Tensor] = []
    score.network.head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    score.predict_eps(images, steps)
    torch.testing.assert_close(inputs[0], plain)
    with pytest.raises(ValueError, match="takes a level"):
        score.network.change(images)
    with pytest.raises(ValueError, match="takes no level"):
        network("r").change(images, level=level)


def test_the_denoisers_loss_by_hand() -> None:
    """Mean square of predicted minus true noise on noisy HQ; LQ and regression have no part in it."""
    score, regression, data = score_of(network("d", level=True)), network("r"), basic.batch(3)
    objective = DenoiserObjective(score, regression)
    ((name, loss),) = objective.phases(data, Noise(4, data.positions))
    noise, schedule = Noise(4, data.positions), score.schedule
    t, eps = noise.integers("timestep", 0, 1000), noise.normal("noise", (3, 16, 16))
    share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = share.sqrt() * data.hq + (1 - share).sqrt() * eps
    expected = (score.predict_eps(noisy, t) - eps).square().mean()
    assert name == DENOISER and float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.value.backward()
    assert all(p.grad is not None for p in score.network.parameters())
    assert set(objective.parts()) == {REGRESSION, DENOISER} and objective.trainables == {DENOISER: score.network}


# ------------------------------------------------------------------------------------------------------ the generator


def detail(**values: Any) -> DetailObjective:
    real, fake = (score_of(network(name, level=True)) for name in ("real", "fake"))
    return DetailObjective(network("g", pictures=2), network("r"), real, fake, settings(**values))


@pytest.mark.parametrize("distance", [0.0, 0.4])
def test_the_generators_loss_and_gradient_by_hand(distance: float) -> None:
    """alpha pyramid(x, hq) + (1 - alpha) lambda c |x - stopped(x - weight coeff)|^2 with x = g(f(lq), lq).

    c is d^2 / (d^2 + distance^2) with the squared distance d^2 of each result from its target, and has no gradient.
    """
    objective, data = detail(weight=0.7, matching_distance=distance), basic.batch(3)
    phases = objective.phases(data, Noise(4, data.positions))
    name, loss = next(phases)
    loss.value.backward()
    noise, schedule = Noise(4, data.positions), objective.schedule
    other = copy.deepcopy(objective.generator)
    other.zero_grad()
    with torch.no_grad():
        coarse = objective.regression(data.lq)
    x = other(coarse, data.lq)
    low = 20  # share 0.02 of the last step 999, rounded up
    t = low + (noise.uniform("score_timestep").double() * (999 - low + 1)).floor().long()
    share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = share.sqrt() * x + (1 - share).sqrt() * noise.normal("score_noise", (3, 16, 16))
        real, fake = objective.real.predict_eps(noisy, t, None), objective.fake.predict_eps(noisy, t)
        clean = (noisy - (1 - share).sqrt() * real) / share.sqrt()
        weight = 1 / ((x - clean).abs().mean((1, 2, 3), keepdim=True) + WEIGHT_EPS)
        target = x - weight * ((1 - share) / share).sqrt() * (real - fake)
        squares = (x - data.hq).square().mean((1, 2, 3))
        counts = squares / (squares + distance**2)
    assert bool((counts < 0.9).all()) == bool(distance) and len(counts.unique()) == (3 if distance else 1)
    expected = 0.3 * pyramid_distance(x, data.hq) + 0.7 * 0.7 * counts * (x - target).square().mean((1, 2, 3))
    expected.mean().backward()
    assert name == "generator"
    assert float(loss.value.detach()) == pytest.approx(float(expected.mean().detach()), rel=1e-5)
    for ours, theirs in zip(objective.generator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None for module in (objective.regression, objective.fake) for p in module.parameters())


def test_the_fake_scores_loss_by_hand() -> None:
    objective, data = detail(), basic.batch(2)
    losses = dict(objective.phases(data, Noise(4, data.positions)))
    noise, schedule = Noise(4, data.positions), objective.schedule
    with torch.no_grad():
        x = objective.generator(objective.regression(data.lq), data.lq)
    t, eps = noise.integers("fake_timestep", 1, 1000), noise.normal("fake_noise", (3, 16, 16))
    share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = share.sqrt() * x + (1 - share).sqrt() * eps
    expected = (objective.fake.predict_eps(noisy, t) - eps).square().mean()
    assert float(losses["fake_score"].value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def window(noise: Noise, name: str, images: Tensor, side: int) -> Tensor:
    """The window of each sample, by hand."""
    tops, lefts = (noise.integers(f"{name} {axis}", 0, 16 - side + 1) for axis in (0, 1))
    return torch.stack([images[n, :, tops[n] : tops[n] + side, lefts[n] : lefts[n] + side] for n in range(len(images))])


def test_scores_and_features_see_a_window_and_the_regression_sees_all() -> None:
    """Both scores and both pictures of the features have the same window; the pyramid has the whole picture."""
    real, fake = (score_of(network(name, level=True)) for name in ("real", "fake"))
    own = settings(window=8, weight=0.7)
    objective = DetailObjective(network("g", pictures=2), network("r"), real, fake, own, Features(weight=0.5))
    data = basic.batch(5)
    losses = dict(objective.phases(data, Noise(4, data.positions)))
    noise, schedule = Noise(4, data.positions), objective.schedule
    with torch.no_grad():
        x = objective.generator(objective.regression(data.lq), data.lq)
        seen = window(noise, "score_window", x, 8)
        assert len({tuple(value.flatten()[:4].tolist()) for value in seen}) == 5 and seen.shape == (5, 3, 8, 8)
        t = 20 + (noise.uniform("score_timestep").double() * (999 - 20 + 1)).floor().long()
        share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * seen + (1 - share).sqrt() * noise.normal("score_noise", (3, 8, 8))
        eps_real, eps_fake = real.predict_eps(noisy, t), fake.predict_eps(noisy, t)
        clean = (noisy - (1 - share).sqrt() * eps_real) / share.sqrt()
        weight = 1 / ((seen - clean).abs().mean((1, 2, 3), keepdim=True) + WEIGHT_EPS)
        matching = (weight * ((1 - share) / share).sqrt() * (eps_real - eps_fake)).square().mean((1, 2, 3))
        t, eps = noise.integers("feature_timestep", 0, 401), noise.normal("feature_noise", (3, 8, 8))
        share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        levels = [
            real.features(share.sqrt() * window(noise, "feature_window", images, 8) + (1 - share).sqrt() * eps, t)
            for images in (x, data.hq)
        ]
        distance = sum(
            ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum(1).flatten(1).mean(1)
            for a, b in zip(*levels, strict=True)
        )
        t, eps = noise.integers("fake_timestep", 1, 1000), noise.normal("fake_noise", (3, 8, 8))
        share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = share.sqrt() * window(noise, "fake_window", x, 8) + (1 - share).sqrt() * eps
        fake_loss = (fake.predict_eps(noisy, t) - eps).square().mean()
    expected = 0.3 * (pyramid_distance(x, data.hq) + 0.5 * distance) + 0.7 * 0.7 * matching
    assert float(losses["generator"].value.detach()) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(losses["fake_score"].value.detach()) == pytest.approx(float(fake_loss), rel=1e-4)
    assert torch.equal(objective.windows("w", noise, x)[0], window(noise, "w", x, 8))
    with pytest.raises(ValueError, match="window is 8, larger than 4 x 16"):
        objective.windows("w", noise, x[:, :, :4])
    assert detail().windows("w", noise, x)[0] is x
    with pytest.raises(RecipeError, match="window is 136, above resolution 128"):
        load_recipe("unetres-generator", ["distillation.window=136"])


def test_the_regression_may_be_squares_or_both() -> None:
    data = basic.batch(2)
    terms = {}
    for kind in ("perceptual", "l2", "both"):
        objective = detail(regression=kind, perceptual_weight=0.5, l2_weight=2.0)
        terms[kind] = float(next(objective.phases(data, Noise(0, data.positions)))[1].metrics["loss_regression"])
    with torch.no_grad():
        x = objective.generator(objective.regression(data.lq), data.lq)
    assert terms["perceptual"] == pytest.approx(0.5 * float(pyramid_distance(x, data.hq).mean()), rel=1e-5)
    assert terms["l2"] == pytest.approx(2 * float((x - data.hq).square().mean()), rel=1e-5)
    assert terms["both"] == pytest.approx(terms["perceptual"] + terms["l2"], rel=1e-5)


# -------------------------------------------------------------------------------------------------------- the stages


def folder(tmp_path: Path, name: str, objective: Objective, recipe: UNetResRecipe) -> Model:
    card = ModelCard(name=name, system="unetres", config=objective.config, recipe={"restore_options": {}})
    return save_model(tmp_path / name, card, objective.parts())


def recipe(stage: str, *more: str) -> UNetResRecipe:
    window = ["distillation.window=0"] if stage == "generator" else []
    small = "size={widths: [8, 12], blocks: [1, 1, 1], factor: 2}"
    stage_recipe = load_recipe(f"unetres-{stage}", [small, *window, *more])
    assert isinstance(stage_recipe, UNetResRecipe)
    return stage_recipe


def test_the_stages_follow_each_other(tmp_path: Path) -> None:
    """Each passes on what the next one needs; the last folder restores at any strength."""
    first = regression_objective(recipe("regression"), {})
    with torch.no_grad():
        first.network.tail.weight.normal_(0, 0.03)
    regression = folder(tmp_path, "r", first, recipe("regression"))
    second = denoiser_objective(recipe("denoiser"), {"regression": regression})
    denoiser = folder(tmp_path, "d", second, recipe("denoiser"))
    third = generator_objective(recipe("generator"), {"denoiser": denoiser})
    data = basic.batch(2)
    assert torch.equal(third.generator(third.regression(data.lq), data.lq), first.network(data.lq))  # starts as it
    with torch.no_grad():
        third.generator.tail.weight.normal_(0, 0.03)
    model = folder(tmp_path, "g", third, recipe("generator"))
    assert set(load_model(model.path).info["parts"]) == {REGRESSION, GENERATOR}
    assert torch.equal(third.regression.head.weight, first.network.head.weight)
    assert torch.equal(third.real.network.head.weight, second.score.network.head.weight)  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in third.real.network.parameters())  # type: ignore[attr-defined]
    assert third.fake is not None and all(p.requires_grad for p in third.fake.parameters())
    image = basic.picture(18, 25)
    images = {
        strength: build_restorer(model.path).restore([Request(key="a", image=image, options={"strength": strength})])
        for strength in (0.0, 0.5, 1.0)
    }
    pixels = {strength: results[0].image.astype(float) for strength, results in images.items()}
    alone = build_restorer(regression.path).restore([Request(key="a", image=image)])[0].image
    assert np.array_equal(pixels[0.0], alone) and not np.array_equal(pixels[1.0], alone)
    inside = (pixels[1.0] > 0) & (pixels[1.0] < 255) & (pixels[0.0] > 0) & (pixels[0.0] < 255)  # clipped ones bend
    assert np.abs(pixels[0.5] - (pixels[0.0] + pixels[1.0]) / 2)[inside].max() <= 1.01
    again = regression_objective(recipe("regression", f"warm_start={model.path}"), {})
    tuned = folder(tmp_path, "t", again, recipe("regression"))
    assert torch.equal(tuned.part(GENERATOR)["tail.weight"], third.generator.tail.weight)  # fine-tuning keeps it
    assert again.trainables == {REGRESSION: again.network}
    assert (
        build_restorer(tuned.path).restore([Request(key="a", image=image, options={"strength": 1.0})])[0].image.tolist()
        == pixels[1.0].tolist()
    )


def test_a_new_generator_has_the_regressions_features_and_changes_nothing(tmp_path: Path) -> None:
    regression = network("r")
    start = folder(tmp_path, "r", RegressionObjective(regression), recipe("regression"))
    options = (
        "distillation.score=false",
        "features.weight=0",
    )
    images = basic.batch(2).lq
    fresh = generator_objective(recipe("generator", "generator_start=new", *options), {"regression": start}).generator
    copied = generator_objective(recipe("generator", *options), {"regression": start}).generator
    other = torch.randn_like(images)
    features = regression.features(images)
    for mine, goal in zip(copied.features(other, images), features, strict=True):  # whatever the first picture is
        assert torch.equal(mine, goal)
    assert not torch.equal(fresh.features(other, images)[0], features[0])
    for each in (fresh, copied):
        assert not each.change(other, images).any()
    with pytest.raises(ModelError, match="equal sizes"):
        generator_objective(recipe("generator", "size.widths=[8, 16]", *options), {"regression": start})


def test_a_generator_goes_on_beside_the_denoisers_model(tmp_path: Path) -> None:
    """Its weights come from the warm start, regression and scores from the parent."""

    def folder(name: str, *parts: str) -> Path:
        own = {part: network(f"{name} {part}", 2 if part == GENERATOR else 1, part == DENOISER) for part in parts}
        card = ModelCard(
            name=name, system="unetres", config={part: each.config.to_dict() for part, each in own.items()}
        )
        weights = {part: {key: p.detach() for key, p in each.named_parameters()} for part, each in own.items()}
        return save_model(tmp_path / name, card, weights).path

    parent, earlier = folder("parent", REGRESSION, DENOISER), folder("earlier", REGRESSION, GENERATOR)
    recipe: Any = load_recipe("unetres-generator", [f"warm_start={earlier}", "distillation.window=0"])
    objective = generator_objective(recipe, {"denoiser": load_model(parent)})
    assert torch.equal(objective.generator.head.weight, network(f"earlier {GENERATOR}", 2).head.weight)
    assert torch.equal(objective.regression.head.weight, network(f"parent {REGRESSION}").head.weight)


def test_a_stage_without_its_model_is_told() -> None:
    for stage, build in (("denoiser", denoiser_objective), ("generator", generator_objective)):
        with pytest.raises(ModelError, match=r"name (its|their) model"):
            build(recipe(stage), {})  # type: ignore[operator]


def test_a_generator_without_scores_learns_by_regression_alone(tmp_path: Path) -> None:
    regression = folder(tmp_path, "r", RegressionObjective(network("r")), recipe("regression"))
    objective = generator_objective(
        recipe("generator", "distillation.score=false", "features.weight=0", "distillation.fixed_alpha=1"),
        {"regression": regression},
    )
    assert objective.fake is None and set(objective.trainables) == {"generator"}
    data = basic.batch(2)
    ((name, loss),) = objective.phases(data, Noise(0, data.positions))
    with torch.no_grad():
        expected = pyramid_distance(objective.generator(objective.regression(data.lq), data.lq), data.hq).mean()
    assert name == "generator" and float(loss.value.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_distance_of_features_by_hand() -> None:
    """Both pictures get the same noise; the real score's features become unit vectors, whose squares are summed."""
    real, fake = (score_of(network(name, level=True)) for name in ("real", "fake"))
    real.requires_grad_(False)
    plain = DetailObjective(network("g", pictures=2), network("r"), real, fake, settings())
    own = DetailObjective(
        network("g", pictures=2), network("r"), real, fake, settings(), Features(weight=0.5, t_low=100, t_high=300)
    )
    data = basic.batch(3)
    losses = [next(objective.phases(data, Noise(4, data.positions)))[1] for objective in (plain, own)]
    noise, schedule = Noise(4, data.positions), plain.schedule
    t, eps = noise.integers("feature_timestep", 100, 301), noise.normal("feature_noise", (3, 16, 16))
    share = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        x = plain.generator(plain.regression(data.lq), data.lq)
        levels = []
        for images in (x, data.hq):
            noisy = share.sqrt() * images + (1 - share).sqrt() * eps
            log = schedule.sigma(t).log()
            level = 2 * (log - schedule.sigmas[0].log()) / (schedule.sigmas[-1] / schedule.sigmas[0]).log() - 1
            levels.append(real.network.features(noisy, level=level))
        expected = sum(
            ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum(1).mean()
            for a, b in zip(*levels, strict=True)
        )
    difference = float((losses[1].value - losses[0].value).detach())
    assert difference == pytest.approx(0.3 * 0.5 * float(expected), rel=1e-3)  # 0.3: alpha
    assert float(losses[1].metrics["loss_features"]) == pytest.approx(0.5 * float(expected), rel=1e-4)
    losses[1].value.backward()
    assert all(p.grad is not None for p in own.generator.parameters())
    with pytest.raises(ValueError, match="needs the score's network"):
        DetailObjective(network("g", pictures=2), network("r"), NoScore(), None, settings(score=False), own.features)


def test_features_are_what_the_levels_compute_on_the_way_down() -> None:
    unetres, images, level = network("d", level=True), basic.rows("x", 2), torch.tensor([0.1, -0.4])
    seen: dict[str, Tensor] = {}
    for name, module in (("fine", unetres.down[0]), ("bottom", unetres.bottom)):
        module.register_forward_hook(lambda _m, _i, result, name=name: seen.update({name: result}))
    features = unetres.features(images, level=level)
    assert torch.equal(features[0], seen["fine"]) and torch.equal(features[-1], seen["bottom"])
    assert len(features) == len(basic.TINY["widths"])


@pytest.mark.parametrize(
    ("stage", "override", "word"),
    [
        ("generator", "features.weigth=1", "Did you mean: 'weight'"),
        ("generator", "features.t_high=1000", "t_high <= 999"),
        ("denoiser", "features.weight=1", "features is for stage generator, not denoiser"),
        ("regression", "distillation.weight=2", "distillation is for stage generator, not regression"),
        ("generator", "charbonnier_eps=0.1", "charbonnier_eps is for stage regression, not generator"),
        ("generator", "distillation.cfg_scale=3", "no texts"),
        ("generator", "distillation.fake=lora", "fake=full"),
        ("generator", "distillation.regression=none", "targets that match"),
    ],
)
def test_settings_without_effect_are_refused(stage: str, override: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        recipe(stage, override)


def test_previews_and_measures_are_those_of_the_stage() -> None:
    data, objective = basic.batch(2), detail()
    with torch.no_grad():
        expected = objective.generator(objective.regression(data.lq), data.lq)
        preview = look(objective, recipe("generator"), data.lq, ["", ""], 0)
    assert preview is not None and torch.equal(preview, expected)
    clipped = (((expected + 1) / 2).clamp(0, 1) - (data.hq + 1) / 2).square().flatten(1).mean(1)
    psnr = float((-10 * torch.log10(clipped)).mean())
    assert measure(objective, [data])["psnr_heldout"] == pytest.approx(psnr, rel=1e-5)
    denoiser = DenoiserObjective(score_of(network("d", level=True)), network("r"))
    assert look(denoiser, recipe("denoiser"), data.lq, ["", ""], 0) is None and measure(denoiser, [data]) == {}


def test_a_distillation_sharpens_what_the_regression_blurs() -> None:
    """Real pictures have a contrast of 1, the regression's result 0.5: the scores raise it, a regression cannot.

    The scores are exact: pictures of one level +c or -c, all pixels alike, with c known to each score.
    """

    class TwoLevels(torch.nn.Module):
        """The noise of pictures that are +c or -c everywhere, each with equal odds."""

        def __init__(self, contrast: float) -> None:
            super().__init__()
            self.contrast = torch.nn.Parameter(torch.tensor(contrast))
            self.schedule = Schedule(**SCHEDULE)

        def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Any = None) -> Tensor:
            share = self.schedule.alpha(timesteps, latents.ndim)
            mean = (latents / (1 - share)).mean((1, 2, 3), keepdim=True) * share.sqrt() * self.contrast
            clean = self.contrast * torch.tanh(mean * latents[0].numel() / 50)
            return (latents - share.sqrt() * clean) / (1 - share).sqrt()

    torch.manual_seed(0)
    objective = DetailObjective(network("g", pictures=2), network("r"), TwoLevels(0.8), TwoLevels(0.4), settings())
    torch.nn.init.zeros_(objective.generator.tail.weight)
    torch.nn.init.zeros_(objective.regression.tail.weight)
    data = basic.batch(4)
    levels = torch.tensor([0.4, -0.4, 0.4, -0.4]).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
    data = replace(data, hq=levels, lq=levels)
    optimizers = build_optimizers(objective, recipe("generator").optimizer)
    for step in range(40):
        train_step(objective, [(data, Noise(step, data.positions))], {**optimizers}, lr=1e-2, clip_norm=10.0)
        with torch.no_grad():
            objective.fake.contrast.fill_(0.4)
    with torch.no_grad():
        result = objective.generator(objective.regression(data.lq), data.lq)
    assert float(result[0].mean()) > 0.45 and float(result[1].mean()) < -0.45
