"""The objectives themselves against golden tensors: what `phases` computes from the golden networks' predictions.

The checks of distill_step, dsm and tmax in the golden tests call the building blocks one by one, as the official
scripts do, so they pass for an objective that combines the blocks wrongly. Here the product's own objective gets the
golden file's latents, draws and predictions, and its loss and gradients must be the file's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from components.objectives.distillation import Distillation
from components.objectives.score_matching import smallest_timesteps
from components.priors.conditions import Conditions
from components.priors.nano import build_prior, build_tokenizer_json
from components.randomness import Noise
from components.samplers.schedules import Schedule
from components.systems.instantir.network import InstantIR
from components.systems.instantir.objectives import PreviewerObjective
from components.systems.instantir.previewer import lora_layers
from components.systems.instarevive.network import EpsPredictor, build_network
from components.systems.instarevive.objective import InstaReviveObjective
from components.types import Batch

tiny = load_helper("components/test_instantir.py")


def golden(folder: Path, name: str) -> tuple[Mapping[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(description, inputs and weights, outputs) of a golden file; floats as float32."""
    tensors = {
        key: value.float() if value.is_floating_point() else value
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }
    outputs = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
    others = {k.removeprefix("input/"): v for k, v in tensors.items() if not k.startswith("output/")}
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), others, outputs


class GoldenDraws(Noise):
    """The golden file's draws by name; any other name is an error."""

    def __init__(self, **draws: Tensor) -> None:
        super().__init__(0, np.arange(len(next(iter(draws.values())))))
        self.draws = draws

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert self.draws[name].shape[1:] == shape
        return self.draws[name]

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        assert bool((self.draws[name] >= low).all()) and bool((self.draws[name] <= high).all())
        return self.draws[name]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        assert low <= int(self.draws[name].min()) and int(self.draws[name].max()) < high
        return self.draws[name]


def batch_of(latents: Tensor, side: int = 16) -> Batch:
    """Samples with these clean latents."""
    count = len(latents)
    pictures = tiny.tensor(count, 3, side, side, name="pictures").clamp(-1, 1)
    return Batch(
        keys=[str(i) for i in range(count)],
        positions=np.arange(count),
        hq=pictures,
        lq=pictures.flip(-1),
        prompts=["red sky"] * count,
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(count, -1),
        latents=latents,
    )


# ------------------------------------------------------------------------------------------------ InstantIR's previewer


def test_the_previewers_objective_has_the_golden_loss(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UNet answers each of the four calls with the golden prediction, and refuses any other call."""
    description, inputs, outputs = golden(golden_dir, "instantir_distill_step")
    config, tolerance = description["config"], description["tolerance"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(tiny.TINY, build_tokenizer_json(["red", "blue", "sky"], tiny.TINY["text_length"]))
    network = InstantIR(prior, tiny.RESAMPLER, tiny.LORA)
    batch = batch_of(inputs["latents"])
    rows = len(batch)
    prompt, empty = (prior.embed_prompts([text] * rows) for text in ("red sky", ""))
    picture, blank = prior.embed_images(batch.lq), prior.null_image_tokens(rows)
    layer = next(iter(lora_layers(network.unet).values()))
    noisy, previous = outputs["noisy"], outputs["x_prev"]
    start, end = outputs["start_timesteps"], outputs["end_timesteps"]
    calls: list[str] = []

    def answer(latents: Tensor, timesteps: Tensor, **arguments: Any) -> tuple[Tensor]:
        extra = arguments["added_cond_kwargs"]
        (tokens,) = extra["image_embeds"]

        def is_close(one: Tensor, other: Tensor, atol: float = 1e-5) -> bool:
            return bool(torch.allclose(one, other, atol=atol, rtol=1e-4))

        def sees(text: tuple[Tensor, Tensor], image: Tensor) -> bool:
            same = is_close(arguments["encoder_hidden_states"], text[0]) and is_close(extra["text_embeds"], text[1])
            return same and is_close(tokens.squeeze(1), image)

        at_start = torch.equal(timesteps, start) and is_close(latents, noisy)
        at_end = torch.equal(timesteps, end) and is_close(latents, previous, tolerance["atol"])
        lora = not layer.disable_adapters
        gradient = torch.is_grad_enabled()
        which = {
            "teacher_cond": at_start and not lora and not gradient and sees(prompt, picture),
            "teacher_uncond": at_start and not lora and not gradient and sees(empty, blank),
            "target_pred": at_end and lora and not gradient and sees(empty, picture),
            "student_pred": at_start and lora and gradient and sees(empty, picture),
        }
        (name,) = [name for name, fits in which.items() if fits]
        calls.append(name)
        return (inputs[name].clone().requires_grad_(gradient),)

    monkeypatch.setattr(network.unet, "forward", answer)
    objective = PreviewerObjective(
        network,
        num_ddim_timesteps=config["num_ddim_timesteps"],
        huber_c=config["huber_c"],
        guidance_range=tuple(config["w_range"]),
    )
    draws = GoldenDraws(
        index=inputs["index"],
        noise=inputs["noise"],
        guidance=inputs["w"].flatten(),
        conditions=torch.full((rows,), 0.5),
    )
    ((name, loss),) = objective.phases(batch, draws)
    assert name == "previewer"
    assert sorted(calls) == ["student_pred", "target_pred", "teacher_cond", "teacher_uncond"]
    torch.testing.assert_close(
        loss.value.detach()[None], outputs["huber_loss"], atol=tolerance["atol"], rtol=tolerance["rtol"]
    )
    error = (outputs["student_x0"] - inputs["latents"]).square().mean()
    torch.testing.assert_close(loss.metrics["preview_error"], error, atol=0.0, rtol=1e-4)


# -------------------------------------------------------------------------------------------- InstaRevive's two phases


class GoldenTexts:
    """The golden file's conditions of the prompts and of the negative prompt."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.prompt = Conditions(text=inputs["prompt_embeds"], mask=inputs["prompt_mask"])
        self.negative = Conditions(text=inputs["negative_embeds"], mask=inputs["negative_mask"])

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        assert not bool(dropped.any())
        return self.prompt

    def unconditional(self, batch: Batch) -> Conditions:
        return self.negative.expand(len(batch))


class GoldenAutoencoder:
    """Latents are given, so only the shape of the encoded LQ pictures is used."""

    def encode(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 4, 8, 8)

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("no loss on pictures")


class FixedGenerator(nn.Module):
    """A generator whose latents are a copy of its parameter."""

    takes_noise = False

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = nn.Parameter(latents.clone())

    def forward(self, lq: Tensor, conditions: Any, noise: Tensor | None = None) -> Tensor:
        return self.latents * 1


def schedule_of(description: Mapping[str, Any]) -> Schedule:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return Schedule(**{name: description["scheduler"][name] for name in names})


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0, 7.5])
def test_instarevives_objective_has_the_golden_losses_and_gradients(cfg_scale: float, golden_dir: Path) -> None:
    """Both phases: the generator's score matching at alpha 0, then the fake score's own loss on the same latents."""
    description, inputs, outputs = golden(golden_dir, "instarevive_dsm")
    assert cfg_scale in description["cfg_scales"]
    schedule, tolerance = schedule_of(description), description["tolerance"]
    scores = {}
    for role in ("real", "fake"):
        network, prefix = build_network("pixart", description["config"]), f"weights/{role}."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)})
        scores[role] = EpsPredictor(network.eval(), schedule)
    scores["real"].requires_grad_(False)
    settings = Distillation(cfg_scale=cfg_scale, regression="none", dynamic=False, text_dropout=0.0)
    fixed = FixedGenerator(inputs["latents"])
    objective = InstaReviveObjective(
        fixed,
        scores["real"],
        scores["fake"],
        GoldenAutoencoder(),
        GoldenTexts(inputs),  # type: ignore[arg-type]
        settings,
    )
    low, last = int(smallest_timesteps(torch.tensor(999), settings.t_share)), 999
    assert bool((inputs["t"] >= low).all())
    draws = GoldenDraws(
        text_dropout=torch.full((len(fixed.latents),), 0.5),
        score_timestep=(inputs["t"] - low + 0.5) / (last - low + 1),
        score_noise=inputs["noise"],
        fake_timestep=inputs["fake_t"],
        fake_noise=inputs["fake_noise"],
    )
    target = tiny.tensor(*fixed.latents.shape, name="hq latents")
    phases = objective.phases(batch_of(target), draws)
    name, loss = next(phases)
    assert name == "generator"
    expected = outputs[f"cfg{cfg_scale:g}/loss"][0]
    torch.testing.assert_close(loss.value.detach(), expected, atol=0.0, rtol=tolerance["loss_rtol"])
    loss.value.backward()
    assert fixed.latents.grad is not None
    torch.testing.assert_close(
        fixed.latents.grad,
        outputs[f"cfg{cfg_scale:g}/grad_latents"],
        atol=tolerance["grad_atol"],
        rtol=tolerance["grad_rtol"],
    )
    assert all(p.grad is None for p in scores["fake"].parameters())
    with torch.no_grad():
        fixed.latents.add_(100.0)  # the generator's step does not reach the second phase
    fixed.latents.grad = None
    name, loss = next(phases)
    assert name == "fake_score"
    torch.testing.assert_close(loss.value.detach()[None], outputs["fake/loss"], atol=0.0, rtol=tolerance["loss_rtol"])
    loss.value.backward()
    assert fixed.latents.grad is None
    parameters = dict(scores["fake"].network.named_parameters())
    names = [n.removeprefix("fake/grad_") for n in outputs if n.startswith("fake/grad_")]
    assert names
    for key in names:
        gradient, expected = parameters[key].grad, outputs[f"fake/grad_{key}"]
        assert gradient is not None
        # the file's absolute tolerance is for the latents' small gradient; see check_dsm
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, atol=tolerance["grad_rtol"] * largest, rtol=0.0)
    with pytest.raises(StopIteration):
        next(phases)


def check_control(metrics: Mapping[str, Tensor], outputs: Mapping[str, Tensor], prefix: str, rtol: float) -> None:
    """Distance within the file's tolerance, T_max within one step (its rule of rounding), alpha T_max / 1000."""
    torch.testing.assert_close(metrics["distance"][None], outputs[f"{prefix}/d"], atol=0.0, rtol=rtol)
    t_max = float(outputs[f"{prefix}/T_max"][0])
    assert abs(float(metrics["t_max"]) - t_max) <= 1
    assert float(metrics["alpha"]) == pytest.approx(float(metrics["t_max"]) / 1000)


@pytest.mark.parametrize("pair", ["p0", "p1", "p2", "p3", "p4"])
def test_instarevives_objective_has_the_golden_control(pair: str, golden_dir: Path) -> None:
    """T_max and alpha of `phases` from the generator's latents; the regression is weighted by alpha."""
    description, inputs, outputs = golden(golden_dir, "instarevive_tmax")
    x, x_hq = inputs[f"{pair}/x"], inputs[f"{pair}/x_hq"]
    predictor = EpsPredictor(nn.Identity(), schedule_of(description))
    texts: Any = GoldenTexts(
        dict.fromkeys(("prompt_embeds", "negative_embeds", "prompt_mask", "negative_mask"), torch.zeros(1, 1))
    )
    batch = batch_of(x_hq)
    draws = GoldenDraws(text_dropout=torch.full((len(x),), 0.5))
    for name, reduction in (("literal", "sum"), ("rms", "mean")):
        settings = Distillation(
            score=False,
            kappa=description["kappa"],
            reduction=reduction,
            t_floor=1,
            regression="l2",  # type: ignore[arg-type]
        )
        objective = InstaReviveObjective(FixedGenerator(x), predictor, None, GoldenAutoencoder(), texts, settings)
        ((_, loss),) = objective.phases(batch, draws)
        check_control(loss.metrics, outputs, f"{pair}/{name}", description["tolerance"]["d_rtol"])
    settings = Distillation(score=False, kappa=description["kappa"], t_floor=1, regression="l2", per_sample=True)
    objective = InstaReviveObjective(FixedGenerator(x), predictor, None, GoldenAutoencoder(), texts, settings)
    ((_, loss),) = objective.phases(batch, draws)
    expected = outputs[f"{pair}/per_sample_rms/T_max"].float().mean()
    assert abs(float(loss.metrics["t_max"]) - float(expected)) <= 1
