"""InstantIR's training stages: references, loss weights, parts left out, EMA, half precision, checkpointing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from components.models import ModelCard, ModelError, save_model
from components.objectives.consistency import consistency_output
from components.objectives.diffusion import WeightedEpsilon, importance_weights, offset_noise
from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.randomness import Noise, generator
from components.recipes import Optimizer, RecipeError
from components.samplers.schedules import Schedule
from components.synthetic import dead_leaves
from components.systems.instantir.checkpointing import checkpoint_gradients
from components.systems.instantir.network import Conditions, InstantIR, predict_noise
from components.systems.instantir.objectives import AggregatorObjective, PerceptorObjective, PreviewerObjective
from components.systems.instantir.options import restore_defaults
from components.systems.instantir.preprocess import view_pixels
from components.systems.instantir.previewer import previewer_enabled
from components.systems.instantir.references import REFERENCE_NOISE, noised_reference
from components.systems.instantir.system import INSTANTIR
from components.systems.recipes import load_recipe
from components.tensors import images_to_tensor
from components.training import Ema, build_optimizers, build_scaler, restore_state, train_step, training_state
from components.types import Batch

tiny = load_helper("components/test_instantir.py")
batch, make_conditions, tensor, randomize_zeros = tiny.batch, tiny.make_conditions, tiny.tensor, tiny.randomize_zeros
STAGES = ("perceptor", "previewer", "aggregator")
KINDS = {"perceptor": PerceptorObjective, "previewer": PreviewerObjective, "aggregator": AggregatorObjective}


def make_prior() -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(tiny.TINY, build_tokenizer_json(["red", "blue", "sky"], tiny.TINY["text_length"]))
    return prior.freeze()


def make_network(stage: str = "aggregator", **more: Any) -> InstantIR:
    """A network with the parts of a stage, where layers that start at zero have other values."""
    lora = tiny.LORA if stage != "perceptor" else None
    network = InstantIR(make_prior(), tiny.RESAMPLER, lora, aggregator=stage == "aggregator", **more)
    randomize_zeros(network)
    return network


def loss_of(objective: Any, rows: Batch) -> Any:
    ((_, loss),) = objective.phases(rows, Noise(0, rows.positions))
    return loss


# ----------------------------------------------------------------------------------------------- the diffusion loss


def test_importance_weights_follow_the_released_formula() -> None:
    """1 - cos(pi t / T) / 2, divided by its mean: factor 0.5 at t = 0 and almost 1.5 at the end."""
    weights = importance_weights(1000, 0.5)
    mean = 1 - 0.5 / 1000  # the cosines of t and T - t cancel, except at t = 0
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    assert [float(weights[t]) for t in (0, 500, 250)] == pytest.approx(
        [0.5 / mean, 1 / mean, (1 - 0.5 * 2**-0.5) / mean], rel=1e-5
    )
    assert torch.equal(importance_weights(1000, 0.0), torch.ones(1000))
    with pytest.raises(ValueError, match="timestep_importance"):
        importance_weights(1000, 1.0)


def test_importance_weighs_each_sample_by_its_time_step() -> None:
    prediction, target, timesteps = tensor(2, 4, 4, 4), tensor(2, 4, 4, 4, name="y"), torch.tensor([0, 999])
    plain, important = WeightedEpsilon(Schedule()), WeightedEpsilon(Schedule(), timestep_importance=0.5)
    each = (prediction - target).square().flatten(1).mean(1)
    by_hand = (each * importance_weights(1000, 0.5)[timesteps]).mean()
    torch.testing.assert_close(important(prediction, target, timesteps).value, by_hand)
    assert torch.equal(plain(prediction, target, timesteps).value, each.mean())


# ---------------------------------------------------------------------------------------- the aggregator's inputs


@pytest.fixture
def aggregator_inputs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[AggregatorObjective, Tensor, Tensor]]:
    """(objective, LQ latents, reference): the Aggregator's inputs in one phase."""

    def call(**settings: Any) -> tuple[AggregatorObjective, Tensor, Tensor]:
        objective, calls = AggregatorObjective(make_network(), **settings), []
        aggregator = objective.network.aggregator
        assert aggregator is not None
        handle = aggregator.register_forward_pre_hook(lambda _, inputs: calls.append((inputs[0], inputs[2])))
        loss_of(objective, batch())
        handle.remove()
        ((lq, reference),) = calls
        return objective, lq, reference

    return call


def draw_again(objective: AggregatorObjective) -> tuple[Noise, Any, Tensor, Tensor]:
    """(noise, conditions, noisy latents, timesteps) of the batch, computed again."""
    noise = Noise(0, batch().positions)
    clean, conditions = objective.clean_latents(batch()), objective.conditions(batch(), noise)
    timesteps = noise.integers("timestep", 0, 1000)
    return (
        noise,
        conditions,
        Schedule().add_noise(clean, noise.normal("noise", tuple(clean.shape[1:])), timesteps),
        timesteps,
    )


def test_the_reference_is_the_frozen_previewers_output(aggregator_inputs: Any) -> None:
    objective, lq, reference = aggregator_inputs()
    _, conditions, noisy, timesteps = draw_again(objective)
    torch.testing.assert_close(reference, objective.network.preview(noisy, timesteps, conditions))
    torch.testing.assert_close(lq, objective.network.prior.encode(batch().lq))


def test_without_previews_the_reference_is_the_lq_latents(aggregator_inputs: Any) -> None:
    _, lq, reference = aggregator_inputs(reference="lq")
    assert torch.equal(reference, lq)


def test_a_noised_reference_has_fresh_noise_of_the_time_step(aggregator_inputs: Any) -> None:
    _, _, plain = aggregator_inputs()
    objective, _, reference = aggregator_inputs(reference_noise=True)
    noise, _, _, timesteps = draw_again(objective)
    alpha = Schedule().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    fresh = noise.normal(REFERENCE_NOISE, tuple(plain.shape[1:]))
    torch.testing.assert_close(reference, alpha.sqrt() * plain + (1 - alpha).sqrt() * fresh)
    assert not torch.allclose(fresh, noise.normal("noise", tuple(plain.shape[1:])))
    torch.testing.assert_close(noised_reference(Schedule(), plain, fresh, timesteps), reference)


def test_guided_previews_come_from_guided_noise(aggregator_inputs: Any) -> None:
    """The scale is from U[1, CFG]; guiding previews equals guiding the noise."""
    objective, _, reference = aggregator_inputs(preview_cfg_scale=5.0)
    noise, conditions, noisy, timesteps = draw_again(objective)
    network = objective.network
    scale = noise.uniform("guidance", 1.0, 5.0).view(-1, 1, 1, 1)
    assert bool((scale > 1).all()) and bool((scale < 5).all())
    with torch.no_grad(), previewer_enabled(network.unet):
        positive = predict_noise(network.unet, noisy, timesteps, conditions)
        negative = predict_noise(network.unet, noisy, timesteps, network.unconditional(conditions, [""] * 3))
    eps = negative + scale * (positive - negative)
    expected = consistency_output(Schedule(), noisy, eps, timesteps)
    torch.testing.assert_close(reference, expected, atol=1e-3, rtol=1e-4)


def test_a_stage_refuses_settings_outside_their_range() -> None:
    for settings in ({"preview_cfg_scale": 0.5}, {"reference": "hq"}, {"timestep_importance": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
            AggregatorObjective(make_network(), **settings)


# ------------------------------------------------------------------------------------------------- parts left out


def test_without_time_modulation_keys_and_values_are_the_same_at_every_time() -> None:
    tokens, early, late = tensor(2, 4, 16), tensor(2, 32), tensor(2, 32, name="late")
    for time_modulation in (True, False):
        processor = next(iter(make_network("perceptor", time_modulation=time_modulation).perceptor.ip_adapter.values()))
        for one, other in zip(
            processor.keys_and_values(tokens, early), processor.keys_and_values(tokens, late), strict=True
        ):
            assert torch.equal(one, other) != time_modulation


def test_a_perceptor_without_time_modulation_learns_biases_and_its_files_stay_compatible() -> None:
    """Its modulation's weights stay zero, so that tools with modulation compute the same from its files."""
    network = InstantIR(make_prior(), tiny.RESAMPLER, time_modulation=False)
    objective = PerceptorObjective(network)
    optimizers = build_optimizers(objective, Optimizer(lr=1e-2))
    for step in range(3):
        train_step(objective, [(batch(), Noise(step, batch().positions))], optimizers, lr=1e-2, clip_norm=1.0)
    linears = [p.ln_k_ip.linear for p in network.perceptor.ip_adapter.values()]
    assert not any(bool(linear.weight.any()) for linear in linears)
    assert all(bool(linear.bias.any()) for linear in linears)
    config = network.config()
    assert config["time_modulation"] is False
    same = InstantIR.from_parts(make_prior(), config, network.parts())
    released = InstantIR.from_parts(make_prior(), {**config, "time_modulation": True}, network.parts())
    assert not same.time_modulation and released.time_modulation
    latents, timesteps, conditions = tensor(2, 4, 4, 4), torch.tensor([3, 900]), make_conditions(network, 2)
    eps = network.denoise_eps(latents, timesteps, conditions)
    assert torch.equal(same.denoise_eps(latents, timesteps, conditions), eps)
    torch.testing.assert_close(released.denoise_eps(latents, timesteps, conditions), eps)


def test_without_the_perceptor_picture_tokens_have_no_effect() -> None:
    network = make_network(perceptor_scale=0.0)
    assert network.config()["perceptor_scale"] == 0
    again = InstantIR.from_parts(make_prior(), network.config(), network.parts())
    conditions = make_conditions(network, 2)
    other = replace(conditions, image_tokens=conditions.image_tokens * 2)
    latents, timesteps = tensor(2, 4, 4, 4), torch.tensor([3, 900])
    for each in (network, again):
        assert torch.equal(
            each.denoise_eps(latents, timesteps, conditions), each.denoise_eps(latents, timesteps, other)
        ) and torch.equal(each.preview(latents, timesteps, conditions), each.preview(latents, timesteps, other))
    with pytest.raises(ValueError, match="cannot be trained"):
        PerceptorObjective(make_network("perceptor", perceptor_scale=0.0))


def test_restore_defaults_follow_the_training_recipe() -> None:
    assert restore_defaults({"steps_at_restore": 4, "cfg_scale": 2.0}) == {"steps": 4, "cfg_scale": 2.0}
    assert restore_defaults({"reference": "lq"}) == {"reference": "lq"}
    assert restore_defaults({"view": "crop"}) == {"view": "crop"}
    assert restore_defaults({"reference": "preview", "reference_noise": True}) == {"reference_noise": True}


def test_recipe_keys_reach_the_network() -> None:
    """The keys of the dcp recipe reach the network through build_objective, at nano size."""
    overrides = [
        "time_modulation=false",
        "perceptor_scale=0.5",
        "timestep_importance=0.5",
        "gradient_checkpointing=true",
    ]
    recipe = load_recipe("instantir-dcp-nano", [*overrides, "max_clean_weight=1"])
    objective = INSTANTIR.build_objective(recipe, {})
    assert objective.config["time_modulation"] is False and objective.config["perceptor_scale"] == 0.5
    assert torch.equal(objective.loss.weights, WeightedEpsilon(Schedule(), timestep_importance=0.5).weights)
    assert all(m.gradient_checkpointing for m in objective.network.unet.down_blocks)


def test_training_and_restoring_use_the_same_view() -> None:
    """The restorer's view equals the training's, whatever the crop settings in the prior's files."""
    picture = np.ascontiguousarray(dead_leaves(96, 0, 1)[:48])
    for view in ("whole", "crop"):
        prior = INSTANTIR.build_objective(load_recipe("instantir-dcp-nano", [f"view={view}"]), {}).prior
        training_view = prior.view_images(images_to_tensor([picture]))
        restorer_view = view_pixels(picture, prior.view, view)
        assert float((training_view - restorer_view).abs().mean()) < 0.02, view  # two bicubic filters
        other = view_pixels(picture, prior.view, "crop" if view == "whole" else "whole")
        assert float((training_view - other).abs().mean()) > 0.1, view
    assert load_recipe("instantir-dcp").view == "whole"
    assert all(load_recipe(f"instantir-{s}-released").view == "crop" for s in ("dcp", "previewer", "aggregator"))


def test_parts_of_the_parent_train_further(tmp_path: Path) -> None:
    """From a whole model, stage dcp trains its perceptor further; stage previewer its Previewer, if sizes agree."""
    nano = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_queries": 16}
    whole = InstantIR(load_prior("nano"), nano, {"rank": 16, "alpha": 16.0}, aggregator=True, perceptor_scale=0.5)
    card = ModelCard(
        name="whole",
        system="instantir",
        recipe={"stage": "aggregator"},
        prior=whole.prior.source,
        config=whole.config(),
    )
    parent = save_model(tmp_path / "model", card, whole.parts())
    for stage, parts in (("dcp", {"perceptor"}), ("previewer", {"perceptor", "previewer", "aggregator"})):
        objective = INSTANTIR.build_objective(load_recipe(f"instantir-{stage}-nano"), {"aggregator": parent})
        new_parts = objective.parts()
        assert set(new_parts) == parts
        assert all(
            torch.equal(new_parts[part][key], value) for part in parts for key, value in parent.part(part).items()
        )
        assert objective.config["perceptor_scale"] == 0.5  # the parent's value, since the recipe sets none
    with pytest.raises(ModelError, match="differ from the recipe's: lora_rank is 16, not 8"):
        INSTANTIR.build_objective(load_recipe("instantir-previewer-nano", ["lora_rank=8"]), {"aggregator": parent})
    other = load_recipe("instantir-dcp-nano", ["resampler_dim=32", "time_modulation=false"])
    with pytest.raises(ModelError, match=r"resampler_dim is 64, not 32; .*time_modulation is True, not False"):
        INSTANTIR.build_objective(other, {"aggregator": parent})


# ------------------------------------------------------------------------------------------ gradient checkpointing


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are created inside: current and peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = id(storage), storage.nbytes()
        if number not in self.storages:
            self.storages.add(number)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._release, number, size)

    def _release(self, number: int, size: int) -> None:
        self.storages.discard(number)
        self.alive -= size


def gradients(objective: Any, rows: Batch, checkpoint: bool) -> dict[str, Tensor]:
    """Gradients of the part in training; the backward pass runs after the phase, as in train_step."""
    checkpoint_gradients(objective.network, checkpoint)
    (module,) = objective.trainables.values()
    module.zero_grad(set_to_none=True)
    loss_of(objective, rows).value.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointed_gradients_equal_the_plain_ones(stage: str) -> None:
    """Also for the previewer, whose LoRA is already off when the backward pass repeats its calls."""
    objective = KINDS[stage](make_network(stage))
    plain, recomputed = (gradients(objective, batch(), checkpoint) for checkpoint in (False, True))
    assert set(plain) == set(recomputed) and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def nano_rows(size: int) -> Batch:
    """A batch of two noise pictures with sides of `size` pixels."""
    pictures = tensor(2, 3, size, size).clamp(-1, 1)
    sizes = torch.tensor([[size, size, 0, 0, size, size]]).expand(2, -1)
    return replace(batch(2), hq=pictures, lq=pictures, sizes=sizes)


def test_checkpointing_lowers_peak_memory_at_nano() -> None:
    """At 128 px most of the peak is activations (51 MiB, 21 with checkpointing); the rest is two sets of gradients."""
    resampler = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4}
    objective = PerceptorObjective(InstantIR(load_prior("nano"), resampler))
    peaks = []
    for checkpoint in (False, True):
        memory = PeakMemory()
        with memory:
            gradients(objective, nano_rows(128), checkpoint)
        peaks.append(memory.peak)
    assert peaks[1] < 0.5 * peaks[0], peaks


# ---------------------------------------------------------------------------------------------- half precision, EMA


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_gives_nearly_the_same_loss_and_a_step(stage: str, precision: str) -> None:
    losses = {}
    for name in ("fp32", precision):
        objective = KINDS[stage](make_network(stage))
        optimizers, scaler = build_optimizers(objective, Optimizer()), build_scaler(name, "cpu")
        before = {n: p.detach().clone() for n, p in objective.trainables[stage].named_parameters()}
        report = train_step(
            objective,
            [(batch(), Noise(0, batch().positions))],
            optimizers,
            lr=1e-3,
            clip_norm=1.0,
            precision=name,
            scaler=scaler,
        )
        losses[name] = report["loss"]
        assert report["bad_steps"] == 0
        changes = [n for n, p in objective.trainables[stage].named_parameters() if not torch.equal(p, before[n])]
        assert len(changes) > 0.9 * len(before)
        assert all(p.dtype == torch.float32 for p in objective.trainables[stage].parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)


def test_frozen_networks_in_half_precision_keep_the_models_parts_in_full_precision(tmp_path: Path) -> None:
    """With recipes and model folders: the parent's parts in the new model keep their bits."""
    dcp = INSTANTIR.build_objective(load_recipe("instantir-dcp-nano"), {})
    randomize_zeros(dcp.network)
    dcp.network.add_previewer({"rank": 2, "alpha": 1})
    card = ModelCard(name="previewer", system="instantir", config=dcp.network.config(), prior=dcp.prior.source)
    parent = save_model(tmp_path / "previewer", card, dcp.network.parts())
    recipe = load_recipe("instantir-aggregator-nano", ["frozen_precision=bf16"])
    objective = INSTANTIR.build_objective(recipe, {"previewer": parent})
    assert objective.network.unet.dtype == torch.bfloat16
    assert {p.dtype for p in objective.network.aggregator.parameters()} == {torch.float32}
    rows = nano_rows(64)
    optimizers = build_optimizers(objective, Optimizer(lr=1e-3))
    metrics = train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=1e-3, clip_norm=1.0)
    whole = INSTANTIR.build_objective(load_recipe("instantir-aggregator-nano"), {"previewer": parent})
    expected = float(loss_of(whole, rows).value.detach())
    assert metrics["loss"] == pytest.approx(expected, rel=0.02)
    parts = objective.parts()
    for name in ("perceptor", "previewer"):
        before = parent.part(name)
        assert set(parts[name]) == set(before)
        assert all(torch.equal(parts[name][key], value) for key, value in before.items())
    with pytest.raises(RecipeError, match="stage aggregator"):
        load_recipe("instantir-dcp-nano", ["frozen_precision=bf16"])


def test_the_autoencoder_never_computes_in_half_precision() -> None:
    prior = make_prior()
    latents = prior.encode(batch().hq)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior.encode(batch().hq), latents)
        assert torch.equal(prior.decode(latents), make_prior().decode(latents))


@pytest.mark.parametrize("stage", STAGES)
def test_ema_weights_survive_a_resume_and_are_saved(stage: str) -> None:
    """Two steps, a checkpoint, two more steps: a new objective with the checkpoint ends with the same bits."""

    def train(objective: Any, optimizers: Any, ema: Ema, first: int, last: int) -> None:
        for step in range(first, last):
            train_step(objective, [(batch(), Noise(step, batch().positions))], optimizers, lr=1e-2, clip_norm=1.0)
            ema.update(step)

    def start() -> tuple[Any, Any, Ema]:
        objective = KINDS[stage](make_network(stage))
        return objective, build_optimizers(objective, Optimizer()), Ema(objective.trainables, 0.5)

    first_run = start()
    train(*first_run, 0, 2)
    state = deepcopy(training_state(*first_run, 2, 2))
    train(*first_run, 2, 4)
    second_run = start()
    assert restore_state(state, *second_run) == 2
    train(*second_run, 2, 4)

    weights = {name: value.clone() for name, value in first_run[0].parts()[stage].items()}
    with first_run[2].swap_in():
        ema = {name: value.clone() for name, value in first_run[0].parts()[stage].items()}
    with second_run[2].swap_in():
        resumed_ema = {name: value.clone() for name, value in second_run[0].parts()[stage].items()}
    assert all(torch.equal(ema[name], resumed_ema[name]) for name in ema)
    assert sum(not torch.equal(ema[name], weights[name]) for name in ema) > 0.9 * len(ema)
    assert all(torch.equal(value, weights[name]) for name, value in first_run[0].parts()[stage].items())
    # second derivation: the decay is (1 + step) / (10 + step) while that is below 0.5
    parameter = next(n for n, p in first_run[0].trainables[stage].named_parameters() if bool((p != 0).all()))
    follow = start()
    average = dict(follow[0].trainables[stage].named_parameters())[parameter].detach().clone()
    for step in range(4):
        train(*follow, step, step + 1)
        decay = (1 + step) / (10 + step)
        value = dict(follow[0].trainables[stage].named_parameters())[parameter].detach()
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(first_run[2].shadow[f"{stage}.{parameter}"], average)


# ---------------------------------------------------------------------------------------------------------- learning


def edges(count: int, first: int) -> Batch:
    """Pictures of two colours with an edge at a random place; LQ is blurred."""
    pictures = []
    for index in range(first, first + count):
        draw = generator(3, "edges", index)
        one, other = (torch.from_numpy(draw.uniform(-0.8, 0.8, (3, 1, 1))).float() for _ in range(2))
        pictures.append(torch.where(torch.arange(32) < int(draw.integers(4, 28)), one, other).expand(3, 32, 32))
    hq = torch.stack(pictures)
    return Batch(
        keys=[f"edge {i}" for i in range(first, first + count)],
        positions=np.arange(first, first + count),
        hq=hq,
        lq=torch.nn.functional.avg_pool2d(hq, 5, 1, 2, count_include_pad=False),
        prompts=["red"] * count,
        sizes=torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(count, -1),
    )


@torch.no_grad()
def noise_error(network: InstantIR, rows: Batch) -> float:
    """Mean squared error of the predicted noise, by plain network calls and without the objective."""
    prior, noise = network.prior, Noise(9, rows.positions)
    clean, lq, timesteps = prior.encode(rows.hq), prior.encode(rows.lq), noise.integers("held-out time", 0, 1000)
    eps = noise.normal("held-out noise", tuple(clean.shape[1:]))
    alpha = Schedule().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * eps
    text, pooled = prior.embed_prompts(rows.prompts)
    conditions = Conditions(
        text=text, pooled=pooled, time_ids=rows.sizes.float(), image_tokens=prior.embed_images(rows.lq)
    )
    residuals = None
    if network.aggregator is not None:
        residuals = network.residuals(lq, timesteps, network.preview(noisy, timesteps, conditions), conditions)
    return float((network.denoise_eps(noisy, timesteps, conditions, residuals) - eps).square().mean())


@pytest.mark.parametrize(("stage", "lr"), [("perceptor", 3e-3), ("aggregator", 1e-3)])
def test_a_few_steps_lower_the_error_on_other_pictures(stage: str, lr: float) -> None:
    """From the nano prior, so that a wrong target (the clean latents, noise with the wrong sign) raises the error.

    From random networks any target lowers it: at first they only learn to predict less.
    """
    lora = tiny.LORA if stage == "aggregator" else None
    network = InstantIR(load_prior("nano"), tiny.RESAMPLER, lora, aggregator=stage == "aggregator")
    objective, heldout = KINDS[stage](network), edges(16, 1000)
    optimizer = torch.optim.AdamW(objective.trainables[stage].parameters(), lr=lr)
    before = noise_error(network, heldout)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(objective, edges(4, 4 * step)).value.backward()
        optimizer.step()
    after = noise_error(network, heldout)
    assert before < 0.5, "the nano prior's own error"
    assert after < 0.9 * before, (before, after)


def test_offset_noise_is_the_sum() -> None:
    noise, offset = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1), torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    assert offset_noise(noise, offset, 0.1).flatten().tolist() == [2.0, 0.0]
    assert offset_noise(noise, offset, 0.0) is noise
