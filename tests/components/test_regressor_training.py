"""Community restorers in trainings: a start, a teacher, InstaRevive's coarse restorer; and in the service."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tiny_regressors import tiny_state, write_tiny
from torch import Tensor

from components.images import decode, encode_png
from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.objectives.regression import charbonnier_distance
from components.randomness import Noise
from components.recipes import RecipeError, as_dict
from components.restoring import Picture, parse_ask, restore_batch
from components.synthetic import dead_leaves
from components.systems import SYSTEMS, build_restorer
from components.systems.instarevive.build import open_coarse
from components.systems.instarevive.training import prior_of_teacher
from components.systems.recipes import load_recipe
from components.systems.regressor.network import SameSize, network_of
from components.systems.regressor.objective import (
    FinetuneObjective,
    finetune_objective,
    look,
    measure,
    released_keys,
    to_unit,
)
from components.systems.regressor.recipe import RegressorRecipe
from components.systems.regressor.weights import export_weights, import_weights
from components.systems.weights_io import ImportJob
from components.training import build_optimizers, evaluate_loss, train_step
from components.types import Batch, Request
from pipelines.restoration.models import open_model
from pipelines.service.front import ServeLimits, build_app
from pipelines.service.serve import RestorerReplica


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("regressors")
    names = ("Compact", "ESRGAN", "HAT", "NAFNet", "SwinIR", "DnCNN")
    for name in names:
        import_weights(ImportJob(files=[write_tiny(name, folder / "files")], out=folder / name))
    return {name: load_model(folder / name) for name in names}


def recipe(start: Model | None, *more: str) -> RegressorRecipe:
    own = [f"warm_start={start.path if start else ''}", "resolution=32", "short_side=32", "batch_size=4", *more]
    loaded = load_recipe("regressor-finetune", own)
    assert isinstance(loaded, RegressorRecipe)
    return loaded


def batch(first: int = 0, size: int = 4, side: int = 32) -> Batch:
    pictures = np.stack([dead_leaves(side, 2, first + index) for index in range(size)])
    hq = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = torch.nn.functional.avg_pool2d(hq, 2)
    return Batch(
        keys=[f"p{first + index}" for index in range(size)],
        positions=np.arange(first, first + size),
        hq=hq,
        lq=torch.nn.functional.interpolate(small, scale_factor=2.0),
        prompts=[""] * size,
        sizes=torch.zeros(size, 6, dtype=torch.int64),
    )


def train(objective: FinetuneObjective, settings: RegressorRecipe, steps: int, lr: float) -> dict[str, float]:
    optimizers, metrics = build_optimizers(objective, settings.optimizer), {}
    for step in range(steps):
        rows = batch(4 * step % 16)
        metrics = train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=lr, clip_norm=1.0)
    return metrics


# -------------------------------------------------------------------------------------------------------------- start


def test_fine_tuning_lowers_the_held_out_loss_and_exports_the_files_keys(
    models: dict[str, Model], tmp_path: Path
) -> None:
    """ESRGAN's released keys are renamed when it loads; the trained tensors go back under the released ones."""
    settings = recipe(models["ESRGAN"])
    objective = finetune_objective(settings, {})
    heldout = [batch(100)]
    before = evaluate_loss(objective, heldout, 0)["network"]
    metrics = train(objective, settings, 8, lr=3e-3)
    assert metrics["bad_steps"] == 0 and evaluate_loss(objective, heldout, 0)["network"] < 0.9 * before
    parts = objective.parts()
    assert parts["network"].keys() == tiny_state("ESRGAN").keys()
    card = ModelCard(name="tuned", system="regressor", recipe=as_dict(settings), config=objective.config)
    model = save_model(tmp_path / "tuned", card, parts)
    images = to_unit(batch(100).lq)
    with torch.no_grad():
        trained = objective.network.eval()(images)
        torch.testing.assert_close(SameSize(network_of(model))(images), trained, atol=1e-5, rtol=0)
        assert float((SameSize(network_of(models["ESRGAN"]))(images) - trained).abs().max()) > 0.01
    assert build_restorer(model.path).restore([Request(key="a", image=dead_leaves(24, 0, 0))])[0].image.shape[0] == 24
    report = export_weights(model.path, tmp_path / "out")
    (file,) = report.files
    again = import_weights(ImportJob(files=[tmp_path / "out" / file], out=tmp_path / "again"))
    assert load_model(str(again.model)).info["parts"] == model.info["parts"]
    preview = look(objective, settings, heldout[0].lq, [""] * 4, 0)
    assert preview.shape == heldout[0].lq.shape
    assert set(measure(objective, heldout)) == {"psnr_heldout", "psnr_heldout_lq"}


@pytest.mark.parametrize("name", ["Compact", "HAT", "NAFNet", "SwinIR", "DnCNN"])
def test_every_parameter_has_its_place_in_the_file(models: dict[str, Model], name: str) -> None:
    network = network_of(models[name])
    keys = released_keys(models[name].part("network"), network)
    assert {f"network.{key}" for key in keys} == set(keys.values())
    assert {parameter for parameter, _ in network.named_parameters()} <= set(keys.values())
    settings = recipe(models[name])
    objective = finetune_objective(settings, {})
    # the same samples give the same loss: no layer draws numbers of its own
    losses = [next(objective.phases(batch(), Noise(0, np.arange(4))))[1].value for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    losses[0].backward()
    gradients = [p.grad for p in objective.network.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients)


def test_rearranged_tensors_cannot_be_trained(models: dict[str, Model]) -> None:
    released = models["Compact"].part("network")
    network = network_of(models["Compact"])
    with torch.no_grad():
        network.network.body[0].weight.mul_(2)  # type: ignore[index, union-attr]
    keys = released_keys(released, network)  # by marks: the values alone do not tell
    assert keys["body.0.weight"] == "network.body.0.weight"
    extra = torch.nn.Parameter(torch.zeros(3))
    network.register_parameter("fused", extra)
    with pytest.raises(ModelError, match=r"cannot be trained from this file.*1 tensors \(fused\)"):
        released_keys(released, network)


def test_a_start_is_needed_and_wrong_settings_are_refused(models: dict[str, Model]) -> None:
    with pytest.raises(ModelError, match="warm_start=MODEL"):
        finetune_objective(recipe(None), {})
    assert finetune_objective(recipe(None), {"start": models["DnCNN"]}).config["architecture"] == "DnCNN"
    for wrong, reason in (
        ("loss=gan", "loss"),
        ("teacher_weight=2", "teacher_weight must be between 0 and 1"),
        ("log_mse_eps=0", "log_mse_eps must be positive"),
        ("restore_options.tile_pxx=3", 'Did you mean "tile_px"'),
    ):
        with pytest.raises(RecipeError, match=reason):
            recipe(models["DnCNN"], wrong)


# ------------------------------------------------------------------------------------------------------------ teacher


def test_the_teacher_is_a_second_target(models: dict[str, Model]) -> None:
    start, teacher, rows = models["NAFNet"], models["SwinIR"], batch()
    settings = recipe(start, f"teacher={teacher.path}", "teacher_weight=0.25")
    assert settings.student_gate is settings.gate and recipe(start).student_gate is None
    objective = finetune_objective(settings, {})
    ((name, loss),) = objective.phases(rows, Noise(0, rows.positions))
    with torch.no_grad():
        lq, hq = to_unit(rows.lq), to_unit(rows.hq)
        restored, goal = SameSize(network_of(start))(lq), SameSize(network_of(teacher))(lq)
        to_hq, to_goal = charbonnier_distance(restored, hq).mean(), charbonnier_distance(restored, goal).mean()
    assert name == "network"
    torch.testing.assert_close(loss.value.detach(), 0.75 * to_hq + 0.25 * to_goal, atol=1e-5, rtol=1e-4)
    before = {key: tensor.clone() for key, tensor in objective.teacher.state_dict().items()}  # type: ignore[union-attr]
    train(objective, settings, 1, lr=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in objective.teacher.state_dict().items())  # type: ignore[union-attr]
    with pytest.raises(ModelError):  # a teacher of one step has a prior
        prior_of_teacher(teacher)


# ------------------------------------------------------------------------------------------------- coarse restorer


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_regressor_is_a_coarse_restorer(models: dict[str, Model], precision: Any) -> None:
    """HAT does not run in fp16 and then stays in float32."""
    coarse = open_coarse(str(models["HAT"].path), models["HAT"].digest, precision)
    images: Tensor = to_unit(batch(side=48).lq)
    expected = SameSize(network_of(models["HAT"]))(images)
    result = coarse(images)
    assert result.shape == images.shape and result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-6 if precision != "bf16" else 0.05, rtol=0)
    with pytest.raises(ModelError, match="has digest"):
        open_coarse(str(models["HAT"].path), "0" * 64)


def test_other_models_are_no_coarse_restorers() -> None:
    with pytest.raises(ModelError, match=r"not a coarse restorer \(swinir or regressor\)"):
        open_coarse("nano")


# ------------------------------------------------------------------------------------------------------------ service


@pytest.mark.parametrize("name", ["Compact", "ESRGAN", "HAT", "NAFNet", "SwinIR", "DnCNN"])
def test_the_service_answers_with_the_batch_jobs_bytes(models: dict[str, Model], name: str) -> None:
    """Through the HTTP front and a replica of this process, at the model's own scale."""
    opened = open_model(models[name].path)
    replica = RestorerReplica(opened.factory, opened.identity, ServeLimits(), threads=1)
    data = encode_png(dead_leaves(24, 7, 0))

    class Backend:
        async def health(self) -> tuple[str, str]:
            return "READY", ""

        async def restore(self, *picture: Any) -> Any:
            return await replica.restore(*picture)

    async def exchange(query: str) -> httpx.Response:
        app = build_app(Backend(), opened.identity, ServeLimits(), opened.check)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front") as client:
            headers = {"Content-Type": "image/png"}
            return await client.post(f"/v1/restore?key=a&seed=1&{query}", content=data, headers=headers)

    answer = asyncio.run(exchange("scale=keep&tile_px=64"))
    ask = opened.request_options({"scale": "keep", "tile_px": 64})
    (expected,) = restore_batch(
        build_restorer(models[name].path), opened.identity, [Picture(key="a", data=data, seed=1)], ask
    )
    side = 24 * int(SYSTEMS["regressor"].own_scale(models[name].info["config"]))
    assert answer.status_code == 200 and answer.content == expected
    assert decode(answer.content).shape == (side, side, 3)
    assert parse_ask({"scale": side / 24, "tile_px": 64}, opened.check) == ask
    wrong = asyncio.run(exchange("context_pxx=3"))
    assert wrong.status_code == 422 and "context_px" in wrong.json()["detail"]
