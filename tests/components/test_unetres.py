"""UNetRes: the network, its loss by hand, training, model folders and the restorer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.images import decode, encode_png
from components.models import ModelCard, ModelError, load_model, save_model
from components.objectives.regression import charbonnier_distance, feature_distance, log_mse_distance
from components.randomness import Noise, generator
from components.recipes import RecipeError
from components.restoring import Identity, Picture, parse_ask, restore_batch
from components.systems import SYSTEMS
from components.systems import build_restorer as build_any
from components.systems.recipes import load_recipe
from components.systems.unetres.build import network_of
from components.systems.unetres.config import UNetResConfig, config_from
from components.systems.unetres.network import UNetRes, build_unetres
from components.systems.unetres.objective import RegressionObjective, distance_of, look, measure, regression_objective
from components.systems.unetres.options import check_options
from components.systems.unetres.recipe import UNetResRecipe
from components.systems.unetres.restorer import UNetResRestorer
from components.training import build_optimizers, evaluate_loss, train_step
from components.types import Batch, Cancellation, Request, SampleError

TINY: dict[str, Any] = {"widths": [8, 12], "blocks": [1, 1, 1], "factor": 2}


def tiny(pictures: int = 1, seed: int = 3) -> UNetRes:
    """A small network that changes its picture: the tail is not zero."""
    network = build_unetres(config_from(TINY), seed, "regression", pictures)
    with torch.no_grad():
        network.tail.weight.copy_(torch.from_numpy(generator(seed, "tail").normal(0, 0.02, network.tail.weight.shape)))
    return network


def rows(name: str, count: int = 2, side: int = 16) -> Tensor:
    return torch.from_numpy(generator(5, name).uniform(-1, 1, (count, 3, side, side)).astype(np.float32))


def batch(count: int, first: int = 0, side: int = 16) -> Batch:
    """Smooth pictures and the same with noise."""
    positions = np.arange(first, first + count)
    phase = torch.from_numpy(positions).float().view(-1, 1, 1, 1)
    y = torch.linspace(0, 3, side)[None, None, :, None] + phase + torch.arange(3).view(1, 3, 1, 1)
    hq = (torch.sin(y) * 0.7).expand(-1, -1, -1, side).contiguous()
    noise = torch.from_numpy(np.stack([generator(1, int(p)).normal(0, 0.3, (3, side, side)) for p in positions]))
    lq = (hq + noise.float()).clamp(-1, 1)
    return Batch(
        keys=[str(p) for p in positions],
        positions=positions,
        hq=hq,
        lq=lq,
        prompts=[""] * count,
        sizes=torch.zeros(count, 6),
    )


# -------------------------------------------------------------------------------------------------------- the network


def test_the_default_network_has_four_million_weights_and_starts_as_the_identity() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNetRes(UNetResConfig()).parameters()) == 4_044_816
    network = build_unetres(config_from(TINY), 0, "regression")
    images = rows("x")
    assert torch.equal(network(images), images)


def test_start_weights_depend_on_seed_and_name() -> None:
    weights = [
        build_unetres(config_from(TINY), seed, name).head.weight
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_the_network_by_hand() -> None:
    """The order of blocks, skips and residuals, written out with the network's own layers."""
    network, images = tiny(), rows("x")
    x = torch.nn.functional.pixel_unshuffle(images, 2)
    first = network.head(x)

    def block(stack: torch.nn.Module, value: Tensor) -> Tensor:
        (one,) = stack.children()
        return value + one.conv2(one.conv1(value).relu())  # type: ignore[no-any-return, operator, union-attr]

    skip = block(network.down[0], first)
    bottom = block(network.bottom, network.shrink[0](skip))
    x = block(network.up[0], network.enlarge[0](bottom) + skip)
    expected = images + torch.nn.functional.pixel_shuffle(network.tail(x + first), 2)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, images)


def test_further_pictures_go_in_and_the_first_is_changed() -> None:
    network, first, second = tiny(pictures=2), rows("x"), rows("y")
    assert network.head.in_channels == 2 * 12
    assert not torch.equal(network(first, second), network(first, first))
    torch.nn.init.zeros_(network.tail.weight)
    assert torch.equal(network(first, second), first)
    with pytest.raises(ValueError, match="takes 2 pictures, got 1"):
        network(first)
    with pytest.raises(ValueError, match="multiples of 4"):
        network(first[..., :15], second[..., :15])


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ({"width": [4]}, 'Did you mean "widths"'),
        ({"widths": 4}, "must be a list"),
        ({"factor": [4]}, "whole number"),
        ({"widths": [4, 4]}, "need 3 numbers of blocks"),
        ({"widths": [4, 0, 4]}, "positive"),
    ],
)
def test_wrong_sizes_are_told(sizes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        config_from(sizes)
    with pytest.raises(RecipeError, match=word):
        load_recipe("unetres-regression", [f"size={sizes}".replace("'", "")])


# --------------------------------------------------------------------------------------------------------- objectives


def test_charbonnier_by_hand() -> None:
    x, y = rows("x", 2, 3), rows("y", 2, 3)
    expected = [
        sum(((float(a) - float(b)) ** 2 + 0.01**2) ** 0.5 for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 27
        for p, q in zip(x, y, strict=True)
    ]
    assert charbonnier_distance(x, y, 0.01).tolist() == pytest.approx(expected, rel=1e-5)
    assert charbonnier_distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_log_mse_by_hand() -> None:
    x, y = rows("x", 2, 3), rows("y", 2, 3)
    expected = [
        math.log(sum((float(a) - float(b)) ** 2 for a, b in zip(p.flatten(), q.flatten(), strict=True)) / 27 + 0.01)
        for p, q in zip(x, y, strict=True)
    ]
    assert log_mse_distance(x, y, 0.01).tolist() == pytest.approx(expected, rel=1e-5)
    assert log_mse_distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_the_distance_of_features_by_hand() -> None:
    x, y = [rows("a", 2, 3), rows("b", 2, 2)], [rows("c", 2, 3), rows("d", 2, 2)]
    expected = [0.0, 0.0]
    for mine, goal in zip(x, y, strict=True):
        side = mine.shape[-1]
        for sample in range(2):
            for row in range(side):
                for column in range(side):
                    a, b = mine[sample, :, row, column], goal[sample, :, row, column]
                    expected[sample] += float(((a / a.norm() - b / b.norm()) ** 2).sum()) / side**2
    assert feature_distance(x, y).tolist() == pytest.approx(expected, rel=1e-5)
    assert feature_distance([2 * a for a in x], x).tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(("kind", "eps"), [("charbonnier", 0.02), ("log_mse", 0.003)])
def test_the_regressions_loss_by_hand(kind: str, eps: float) -> None:
    """sqrt(d^2 + eps^2), a mean over all, or log(mean of d^2 + eps), a mean over pictures; d is between restored LQ and
    HQ in [0, 1]. The HQ has no other part."""
    network, data = tiny(), batch(3)
    recipe = load_recipe("unetres-regression", [f"loss={kind}", f"{kind}_eps={eps}"])
    assert isinstance(recipe, UNetResRecipe)
    objective = RegressionObjective(network, distance_of(recipe))
    ((name, loss),) = objective.phases(data, Noise(0, data.positions))
    squares = ((network(data.lq) - data.hq) / 2).square().detach()
    assert name == "regression"
    if kind == "charbonnier":
        expected = (squares + eps**2).sqrt().mean()
    else:
        expected = sum((one.mean() + eps).log() for one in squares) / 3
    assert float(loss.value.detach()) == pytest.approx(float(expected), rel=1e-5)
    psnr = -10 * torch.log10(((data.lq - data.hq) / 2).square().flatten(1).mean(1))
    assert float(loss.metrics["psnr_lq"]) == pytest.approx(float(psnr.mean()), rel=1e-5)
    loss.value.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_perfect_input_counts_50_db_in_the_log() -> None:
    network, data = build_unetres(config_from(TINY), 3, "regression"), batch(3)
    data = replace(data, lq=data.hq)
    ((_, loss),) = RegressionObjective(network).phases(data, Noise(0, data.positions))
    assert float(loss.metrics["psnr_lq"]) == float(loss.metrics["psnr"]) == 50


def test_a_short_training_removes_noise() -> None:
    recipe = load_recipe("unetres-regression", ["size={widths: [16, 24], blocks: [1, 1, 1], factor: 2}"])
    assert isinstance(recipe, UNetResRecipe)
    objective = regression_objective(recipe, {})
    optimizers = build_optimizers(objective, recipe.optimizer)
    heldout = [batch(8, first=100)]
    before = evaluate_loss(objective, heldout, 0)["regression"]
    for step in range(80):
        data = batch(8, first=8 * step % 64)
        train_step(objective, [(data, Noise(0, data.positions))], optimizers, lr=2e-3, clip_norm=1.0)
    assert evaluate_loss(objective, heldout, 0)["regression"] < 0.5 * before
    psnrs = measure(objective, heldout)
    assert psnrs["psnr_heldout"] > psnrs["psnr_heldout_lq"] + 3
    with torch.no_grad():
        preview = look(objective, recipe, heldout[0].lq, [""] * 8, 0)
    assert float((preview - heldout[0].hq).square().mean()) < 0.3 * float(
        (heldout[0].lq - heldout[0].hq).square().mean()
    )


# ------------------------------------------------------------------------------------------------ model and restoring


@pytest.fixture
def model(tmp_path: Path) -> Path:
    objective = RegressionObjective(tiny())
    card = ModelCard(name="m", system="unetres", config=objective.config)
    return save_model(tmp_path / "m", card, objective.parts()).path


def picture(height: int, width: int) -> np.ndarray:
    return generator(9, height, width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_folder_gives_the_same_network_and_a_warm_start(model: Path) -> None:
    images = rows("x")
    expected = tiny()(images)
    assert torch.equal(network_of(load_model(model))(images), expected)
    recipe = load_recipe("unetres-regression", [f"warm_start={model}"])
    assert isinstance(recipe, UNetResRecipe)
    assert torch.equal(regression_objective(recipe, {}).network(images), expected)


def test_other_folders_are_refused(model: Path, tmp_path: Path) -> None:
    parts = load_model(model).part("regression")
    other = save_model(tmp_path / "o", ModelCard(name="o", system="swinir"), {"swinir": parts})
    with pytest.raises(ModelError, match="holds no regression of a UNetRes, but a swinir model"):
        network_of(other)
    empty = save_model(tmp_path / "e", ModelCard(name="e", system="unetres"), {"regression": parts})
    with pytest.raises(ModelError, match="its config makes no UNetRes"):
        network_of(empty)
    card = ModelCard(name="c", system="unetres", config={"regression": {**TINY, "widths": [8, 16]}})
    misshapen = save_model(tmp_path / "c", card, {"regression": {**parts, "more": torch.zeros(1)}})
    with pytest.raises(ModelError, match=r"1 unexpected: more;.* of the wrong shape"):
        network_of(misshapen)


@torch.no_grad()
def test_any_size_is_restored_through_mirrored_borders(model: Path) -> None:
    restorer, network = build_any(model), tiny()
    for shape in ((1, 1), (5, 3), (17, 30)):
        image = picture(*shape)
        restored = restorer.restore([Request(key="a", image=image)])[0].image
        height, width = shape
        mode = "reflect" if min(shape) > 1 else "symmetric"
        padded = np.pad(image, ((0, -height % 4), (0, -width % 4), (0, 0)), mode=mode)  # type: ignore[call-overload]
        whole = network(torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1)
        expected = ((whole + 1) * 127.5).clamp(0, 255).round()[0, :, :height, :width].permute(1, 2, 0).numpy()
        assert restored.shape == image.shape and np.abs(restored.astype(int) - expected).max() <= 1


def test_tiles_leave_no_seam(model: Path) -> None:
    restorer, image = build_any(model), picture(90, 110)
    whole, tiled = (
        restorer.restore([Request(key="a", image=image, options={"tile_px": px, "tile_overlap": 0.5})])[0].image
        for px in (256, 48)
    )
    assert np.abs(whole.astype(int) - tiled.astype(int)).max() <= 1


def test_the_restorer_answers_requests(model: Path) -> None:
    steps: list[tuple[int, int]] = []
    requests = [Request(key="a", image=picture(20, 31)), Request(key="b", image=picture(20, 31), size=(40, 62))]
    restorer = build_any(model, tile_px=64)
    a, b = restorer.restore(requests, on_step=lambda event: steps.append((event.step, event.of)))
    assert (a.key, a.image.shape, b.image.shape, steps) == ("a", (20, 31, 3), (40, 62, 3), [(1, 2), (2, 2)])
    assert a.info == {"system": "unetres", "strength": "0.4", "tile_px": "64", "tile_overlap": "0.125"}
    for request, word in (
        (Request(key="d", image=picture(4, 4)[..., 0]), "bad_image"),
        (Request(key="e", image=picture(4, 4), size=(0, 3)), "bad_size"),
    ):
        with pytest.raises(SampleError, match=word):
            restorer.restore([request])
    with pytest.raises(Cancellation):
        restorer.restore(requests, cancelled=lambda: True)
    with pytest.raises(ValueError, match='Did you mean "strength"'):
        check_options({"strenght": 0.5})
    for wrong in ({"strength": 1.1}, {"tile_px": 0}, {"tile_overlap": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            check_options(wrong)
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            load_recipe("unetres-regression", [f"restore_options={wrong}".replace("'", "")])


def test_weights_that_are_not_finite_are_refused() -> None:
    network = tiny()
    torch.nn.init.constant_(network.tail.bias, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(SampleError, match="not_finite"):
        UNetResRestorer(network).restore([Request(key="a", image=picture(8, 8))])


def test_the_batch_jobs_way(model: Path) -> None:
    """As restore and serve call it: bytes in, PNG out, options checked by the system's record."""
    system = SYSTEMS["unetres"]
    assert system.check_options is not None
    defaults = system.restore_defaults({"restore_options": {"strength": 0.5}})
    ask = parse_ask({"tile_px": 64}, lambda options: system.check_options(options, defaults))  # type: ignore[misc]
    identity = Identity(name="m", system="unetres", recipe="r", digest="0" * 64, defaults=defaults)
    data = Picture(key="a", data=encode_png(picture(20, 31)), seed=1)
    (png,) = restore_batch(build_any(model, **defaults), identity, [data], ask)
    assert isinstance(png, bytes)
    assert decode(png, key="a").shape == (20, 31, 3)
