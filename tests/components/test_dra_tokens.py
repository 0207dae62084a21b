"""DRA on an MM-DiT at a tiny size: the walk, adapters, loss by hand, restorer by hand, folders, files, recipes."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helper_modules import load_helper
from torch import Tensor, nn

from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.priors.block_calls import recompute
from components.priors.conditions import Conditions, join
from components.priors.families import FAMILIES
from components.priors.mmdit_walk import walk_mmdit
from components.priors.nano import build_tokenizer_json
from components.priors.sd3 import SD3Prior
from components.priors.sd3_config import NANO_SD3, SD3_MEDIUM
from components.priors.sd3_nano import build_sd3_prior
from components.randomness import Noise, generator, seeded_init
from components.recipes import RecipeError
from components.residence import Residence
from components.samplers.schedules import FlowSchedule
from components.systems.dra.build import adapters_objective, build_restorer, look, network_of
from components.systems.dra.bundle import ADAPTERS, ENCODER, FAMILY, LORA
from components.systems.dra.config import AdapterConfig, LoraConfig, shape_of
from components.systems.dra.memory import plan_memory
from components.systems.dra.objectives import FlowAdaptersObjective
from components.systems.dra.options import check_options, restore_defaults
from components.systems.dra.released import SIDECAR, find_files
from components.systems.dra.restorer import DraRestorer
from components.systems.dra.tokens import TokenDra
from components.systems.dra.weights import expected_layout, export_weights, import_weights
from components.systems.recipes import load_recipe
from components.systems.weights_io import ImportJob
from components.types import Cancellation, Request

tiny_sd3 = load_helper("components/_tiny_sd3.py")
tiny = load_helper("components/test_dra.py")
hand = load_helper("components/test_dra_restorer.py")
tensor, train_a_little, make_batch = tiny.tensor, tiny.train_a_little, tiny.make_batch
picture, levels = hand.picture, hand.levels

SMALL = LoraConfig(rank=3, alpha=6.0)
TWO = AdapterConfig(every=2)
"""Of five blocks the second and the fourth have an adapter."""
FORMS = [TWO, AdapterConfig(every=2, chain="fused", silu="after"), AdapterConfig()]
QUICK: dict[str, Any] = {"steps": 2, "cfg_scale": 1.5, "negative_words": "none"}
SD35: dict[str, Any] = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}


def make_prior(**changes: Any) -> SD3Prior:
    pipe = tiny_sd3.pipeline(**{"num_layers": 5, **changes})
    return SD3Prior(
        name="untrained",
        digest="",
        network=pipe.transformer,
        autoencoder=pipe.vae,
        text_encoders=(pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3),
        tokenizers=(pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3),
        schedule=FlowSchedule(shift=3.0),
        t5_tokens=tiny_sd3.T5_LENGTH,
    ).freeze()


def make_network(config: AdapterConfig = TWO, lora: LoraConfig = SMALL, trained: bool = True) -> TokenDra:
    network = TokenDra(make_prior(), config, lora)
    return train_a_little(network) if trained else network  # type: ignore[no-any-return]


def run(restorer: DraRestorer, image: np.ndarray, prompt: str = "", negative: str = "", **options: Any) -> np.ndarray:
    request = Request(
        key="k", image=image, seed=4, prompt=prompt, negative_prompt=negative, options={**QUICK, **options}
    )
    return restorer.restore([request])[0].image


def diffusers_velocity(prior: SD3Prior, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
    velocity: Tensor = prior.network(
        latents,
        encoder_hidden_states=conditions.text,
        pooled_projections=conditions.pooled,
        timestep=1000 * times,
    ).sample
    return velocity


# ------------------------------------------------------------------------------------------------- walk and adapters


@pytest.mark.parametrize("changes", [{}, SD35])
@torch.no_grad()
def test_the_walk_is_diffusers_own_forward_bit_for_bit(changes: dict[str, Any]) -> None:
    prior = make_prior(**changes)
    latents, times = tensor("z", 2, 16, 8, 12), torch.tensor([0.3, 0.9])
    conditions = prior.conditions(["red", "blue dark"])
    network: Any = prior.network
    embedding = network.time_text_embed(1000 * times, conditions.pooled)
    walked = walk_mmdit(network, latents, embedding, conditions.text)
    assert torch.equal(walked, diffusers_velocity(prior, latents, times, conditions))
    assert walked.shape == latents.shape and float(walked.abs().max()) > 1e-3


def hooked_velocity(network: TokenDra, latents: Tensor, times: Tensor, lq: Tensor, conditions: Conditions) -> Tensor:
    """diffusers' transformer with a hook after each block that has an adapter, which runs there from the formulas."""
    dit: Any = network.prior.network
    config, handles, hidden = network.adapters.config, [], torch.empty(0)
    e = dit.time_text_embed(1000 * times, conditions.pooled)
    feature = network.adapters.patch_embed(lq).flatten(2).transpose(1, 2)
    feature = feature + tiny.token_positions(network.adapters.width, lq.shape[-2] // 2, lq.shape[-1] // 2)

    def hook(adapter: Any) -> Any:
        def act(block: nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal feature, hidden
            text, x = output
            feature = adapter.lq(feature)
            shift = adapter.emb(F.silu(e)) if config.silu == "before" else F.silu(adapter.emb(e))
            h = feature.repeat(len(x) // len(feature), 1, 1) + x + shift[:, None]
            h = h + adapter.r1(h)
            h = h + adapter.r2(h)
            if config.chain == "fused":
                feature = h
            return text, x + h @ adapter.out.weight.T + adapter.out.bias

        return act

    for number, adapter in enumerate(network.adapters.adapters):
        block = dit.transformer_blocks[config.every * (number + 1) - 1]
        handles.append(block.register_forward_hook(hook(adapter)))
    velocity = diffusers_velocity(network.prior, latents, times, conditions)
    for handle in handles:
        handle.remove()
    return velocity


@pytest.mark.parametrize("config", FORMS)
@torch.no_grad()
def test_new_adapters_leave_the_velocity_bit_equal_and_trained_ones_follow_hooks(config: AdapterConfig) -> None:
    latents, lq, times = tensor("z", 2, 16, 8, 12), tensor("lq", 2, 16, 8, 12), torch.tensor([0.2, 0.8])
    prior = make_prior()
    conditions = prior.conditions(["red", "blue"])
    plain = diffusers_velocity(prior, latents, times, conditions)
    network = TokenDra(prior, config, SMALL)
    assert len(network.adapters.adapters) == 5 // config.every
    assert torch.equal(network.predict_velocity(latents, times, network.features(lq), conditions), plain)
    train_a_little(network)
    own = network.predict_velocity(latents, times, network.features(lq), conditions)
    torch.testing.assert_close(own, hooked_velocity(network, latents, times, lq, conditions), rtol=1e-4, atol=1e-5)
    assert float((own - plain).abs().max()) > 1e-3
    other = network.predict_velocity(latents, times, network.features(tensor("other", *lq.shape)), conditions)
    assert float((own - other).abs().max()) > 1e-4  # LQ reaches the result


@torch.no_grad()
def test_the_lora_is_on_the_pictures_stream_alone_and_merges() -> None:
    network = make_network()
    assert len(network.lora) == 4 * 5 and not [name for name in network.lora if "add_" in name]
    latents, times = tensor("z", 2, 16, 8, 8), torch.tensor([0.2, 0.8])
    conditions, features = network.prior.conditions(["red", "blue"]), network.features(0.5 * latents)
    own = network.predict_velocity(latents, times, features, conditions)
    network.merge_lora()
    assert LORA not in network.parts()
    torch.testing.assert_close(
        network.predict_velocity(latents, times, features, conditions), own, rtol=1e-4, atol=1e-5
    )
    both = TokenDra(make_prior(), TWO, LoraConfig(rank=2, targets="all"))
    assert [name for name in both.lora if "add_q_proj" in name]
    assert not lora_of(TokenDra(make_prior(), TWO, LoraConfig(rank=0)))


def lora_of(network: TokenDra) -> list[str]:
    return [name for name, _ in network.prior.network.named_parameters() if "lora" in name]


# --------------------------------------------------------------------------------------------------------- objective


def test_the_loss_by_hand_and_what_trains() -> None:
    """Variants, logit-normal times, the straight path and its velocity (dra.md, section 4)."""
    network, batch = make_network(), make_batch(side=16)
    objective = FlowAdaptersObjective(network, null_share=0.3, lq_share=0.5, time_mean=0.4, time_deviation=1.5)
    noise = Noise(7, batch.positions)
    ((name, loss),) = objective.phases(batch, noise)
    prior = network.prior
    prompts, clean = tiny.variants_by_hand(prior, batch, noise)
    eps = noise.normal("noise", (16, 8, 8))
    t = torch.tensor([1 / (1 + np.exp(-(0.4 + 1.5 * n))) for n in noise.normal("time", ()).tolist()]).float()
    rows = t.view(-1, 1, 1, 1)
    predicted = hooked_velocity(
        network, (1 - rows) * clean + rows * eps, t, prior.encode(batch.lq), prior.conditions(prompts)
    )
    expected = (predicted - (eps - clean)).square().mean()
    assert name == ADAPTERS and float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(loss.metrics["loss"]) == float(loss.value.detach())
    loss.value.backward()
    trained = dict(objective.trainables[ADAPTERS].named_parameters())
    assert any(key.startswith(LORA) for key in trained) and any(key.startswith(ADAPTERS) for key in trained)
    lacking = [key for key, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not lacking, f"no gradient: {lacking}"
    own = {id(p) for p in trained.values()}
    frozen = [p for module in prior.modules.values() for p in module.parameters() if id(p) not in own]
    assert frozen and all(not p.requires_grad and p.grad is None for p in frozen)


def test_the_shift_moves_the_times_towards_noise() -> None:
    normal = torch.tensor([-1.0, 0.0, 2.0])
    plain = FlowAdaptersObjective(make_network()).times(normal)
    assert plain.tolist() == pytest.approx([1 / (1 + np.exp(-n)) for n in (-1.0, 0.0, 2.0)])
    moved = FlowAdaptersObjective(make_network(), time_shift=3.0).times(normal)
    assert moved.tolist() == pytest.approx([3 * t / (1 + 2 * t) for t in plain.tolist()])
    with pytest.raises(ValueError, match="above 0"):
        FlowAdaptersObjective(make_network(), time_deviation=0.0)


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        network, batch = make_network(), make_batch(2)
        if again:
            network.blocks = network.blocks.wrap_all(recompute)
        objective = FlowAdaptersObjective(network)
        ((_, loss),) = objective.phases(batch, Noise(3, batch.positions))
        loss.value.backward()
        gradients.append([p.grad for p in objective.trainables[ADAPTERS].parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_training_on_one_batch_lowers_its_loss() -> None:
    """From new adapters, with the LoRA: the same pictures and noise again and again."""
    network, batch = make_network(trained=False), make_batch()
    objective = FlowAdaptersObjective(network)
    optimizer = torch.optim.Adam(objective.trainables[ADAPTERS].parameters(), 1e-2)
    losses = []
    for _ in range(25):
        ((_, loss),) = objective.phases(batch, Noise(3, batch.positions))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        losses.append(float(loss.value.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


# ---------------------------------------------------------------------------------------------------------- restorer


@pytest.mark.parametrize("mode", ["latent", "x0", "renoised"])
@torch.no_grad()
def test_three_guided_steps_by_hand(mode: str) -> None:
    """Encode, Euler steps of the guided velocity at SD3's shifted levels, the pull of Eqs. 1-2, decode."""
    network, image = make_network(), picture(16, 24)
    prior = network.prior
    lq = prior.encode(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    z = start = torch.from_numpy(generator(4, "start").standard_normal((16, 8, 12), dtype=np.float32))[None]
    features, times, strengths = network.features(lq), [], [0.6 * (2 / 3 - 0.25) / 0.75, 0.6 * (1 / 3 - 0.25) / 0.75, 0]
    first = 3 * 0.001 / (1 + 2 * 0.001)
    for even in (1.0, (1 + first) / 2, first):
        times.append(3 * even / (1 + 2 * even))
    times.append(0.0)
    for step in range(3):
        now, after = times[step], times[step + 1]
        v = [
            hooked_velocity(network, z, torch.tensor([now]), lq, prior.conditions([prompt]))
            for prompt in ("dark", "red")
        ]
        velocity = v[0] + 2.5 * (v[1] - v[0])
        clean, eps = z - now * velocity, z + (1 - now) * velocity
        if mode == "x0":
            clean = clean + strengths[step] * (lq - clean)
        z = (1 - after) * clean + after * eps
        if mode == "latent":
            z = z + strengths[step] * (lq - z)
        if mode == "renoised":
            z = z + strengths[step] * ((1 - after) * lq + after * start - z)
    assert len(features) == 2
    options = {"steps": 3, "cfg_scale": 2.5, "rss_mode": mode, "rss_weight": 0.6, "rss_threshold": 0.25}
    options["color"] = "none"
    answer = run(DraRestorer(network), image, "red", "dark", **options)
    assert np.abs(levels(prior.decode(z)) - answer).max() <= 1
    without = run(DraRestorer(network), image, "red", "dark", **{**options, "rss_weight": 0.0})
    assert np.abs(without.astype(int) - answer).max() > 1


def test_the_lq_path_is_computed_once_for_a_picture() -> None:
    """Once over all steps and both halves of guidance; once more for each tile; in every step when it is fused."""
    for config, once in ((TWO, True), (FORMS[1], False)):
        network = make_network(config)
        calls, _ = hand.count_calls(network)
        run(DraRestorer(network), picture(16, 16), "red", steps=3, cfg_scale=2.0)
        assert [calls[f"lq {n}"] for n in range(2)] == ([1, 1] if once else [1, 3])
        assert [calls[f"out {n}"] for n in range(2)] == [3, 3]
    network = make_network()
    calls, _ = hand.count_calls(network)
    patches: Counter[str] = Counter()
    network.adapters.patch_embed.register_forward_hook(lambda *_: patches.update(["patch"]))
    run(DraRestorer(network), picture(24, 40), steps=2, cfg_scale=1.0)
    assert patches["patch"] == 1 and calls["lq 0"] == 1


def test_tiles_and_any_sizes() -> None:
    """Positions reach 16 x 16 tokens here, so a tile of 64 px is the largest, whatever the options ask for."""
    network = make_network()
    calls, _ = hand.count_calls(network)
    answer = run(DraRestorer(network), picture(61, 150), steps=2, cfg_scale=1.0, tile_px=64, tile_overlap=0.25)
    assert answer.shape == (61, 150, 3) and calls["lq 0"] == 3
    same = {"steps": 2, "cfg_scale": 1.0, "tile_overlap": 0.25}
    assert np.array_equal(run(DraRestorer(network), picture(61, 150), **same), answer)
    assert np.array_equal(run(DraRestorer(network), picture(61, 150), **same, tile_px=1024), answer)
    requests = [
        Request(key="a", image=picture(18, 30), seed=1, prompt="red", options=QUICK),
        Request(key="b", image=picture(18, 30, "q"), seed=3, prompt="blue", options=QUICK, size=(20, 28)),
        Request(key="c", image=picture(17, 30, "r"), seed=3, options={**QUICK, "color": "wavelet"}),
    ]
    answers = DraRestorer(network, batch_size=2).restore(requests)
    assert [each.image.shape for each in answers] == [(18, 30, 3), (20, 28, 3), (17, 30, 3)]
    assert answers[0].info["sampler"] == "flow" and answers[0].info["system"] == "dra"
    for request, each in zip(requests, answers, strict=True):
        alone = DraRestorer(make_network()).restore([request])[0].image
        assert np.abs(alone.astype(int) - each.image).max() <= 1


def test_options_reach_the_result_and_samplers_of_the_other_shape_do_not_fit() -> None:
    restorer, image = DraRestorer(make_network()), picture(16, 16)
    plain = run(restorer, image, "red")
    assert np.array_equal(run(restorer, image, "red"), plain)
    assert np.array_equal(run(restorer, image, "red", sampler="flow"), plain)
    for change in ({"steps": 3}, {"cfg_scale": 2.0}, {"rss_threshold": 0.0, "rss_weight": 0.5}):
        assert not np.array_equal(run(restorer, image, "red", **change), plain), change
    assert not np.array_equal(run(restorer, image, "blue"), plain)
    assert not np.array_equal(run(restorer, image, "red", "dark"), plain)
    with pytest.raises(ValueError, match="sampler must be flow"):
        run(restorer, image, sampler="edm")
    with pytest.raises(ValueError, match="sampler must be flow"):
        DraRestorer(make_network(), {"sampler": "ddim"})
    with pytest.raises(ValueError, match="edm or ddim or ddpm"):
        DraRestorer(tiny.make_network(), {"sampler": "flow"})
    with pytest.raises(ValueError, match="edm or ddim or ddpm"):
        check_options({"sampler": "flow"})
    defaults = restore_defaults({"family": "sd3", "restore_options": {"steps": 7}})
    assert defaults == {"sampler": "flow", "steps": 7} and check_options({"steps": 3}, defaults) == {"steps": 3}
    with pytest.raises(ValueError, match="sampler must be flow"):
        check_options({"sampler": "edm"}, defaults)
    answers = iter([False, True])
    with pytest.raises(Cancellation):
        restorer.restore([Request(key="k", image=image, options=QUICK)], cancelled=lambda: next(answers, True))


def test_networks_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(key="k", image=picture(16, 16), seed=1, prompt="red", options=QUICK)
    speed = hand.Speed(join=False)
    plain = DraRestorer(make_network(), speed=speed).restore([request])[0].image
    phases: list[str] = []
    inner = Residence.phase
    monkeypatch.setattr(Residence, "phase", lambda self, name: (phases.append(name), inner(self, name))[1])
    turns = DraRestorer(make_network(), speed=speed, device="cpu", offload=True)
    assert np.array_equal(turns.restore([request])[0].image, plain)
    assert phases == ["pictures", "texts", "steps", "pictures"]


# --------------------------------------------------------------------------------------------------- folders and files


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An untrained prior of nano-sd3's form, with two blocks, as a model folder."""
    sizes = {"num_layers": 3, "num_attention_heads": 2, "caption_projection_dim": 64}
    config = {**NANO_SD3, "transformer": {**NANO_SD3["transformer"], **sizes}}
    tokenizer = build_tokenizer_json(tiny.WORDS, config["text_length"])
    with seeded_init(0, "prior"):
        prior = build_sd3_prior(config, tokenizer)
    parts = {name: dict(module.state_dict()) for name, module in prior.modules.items()}
    card = ModelCard(name="p", system="prior", config=config)
    return save_model(tmp_path_factory.mktemp("prior") / "p", card, parts, {"tokenizer.json": tokenizer})


def test_training_continues_restores_and_travels(prior_folder: Model, tmp_path: Path) -> None:
    """The nano recipe on such a prior: objective, a second training, a restorer, files and back."""
    quick = [f"prior={prior_folder.path}", "lora.rank=4", "restore_options.steps=2", "adapters.every=1"]
    recipe: Any = load_recipe("dra-sd3-nano", quick)
    objective = adapters_objective(recipe, {})
    assert isinstance(objective.network, TokenDra) and len(objective.network.adapters.adapters) == 3
    batch = make_batch(2, 32)
    ((_, loss),) = objective.phases(batch, Noise(0, batch.positions))
    assert torch.isfinite(loss.value)
    images = look(objective, recipe, batch.lq, batch.prompts, 0)
    assert images.shape == batch.lq.shape and all(p.requires_grad for p in objective.trainables[ADAPTERS].parameters())
    network: Any = train_a_little(objective.network)
    prior_record = dict(network.prior.source)
    assert prior_record["digest"] == prior_folder.digest
    recipe_dict = {"family": "sd3", "restore_options": {"steps": 2, "cfg_scale": 2.0}}
    card = ModelCard(name="m", system="dra", config=network.config(), prior=prior_record, recipe=recipe_dict)
    model = save_model(tmp_path / "m", card, network.parts())
    assert model.info["config"][FAMILY] == "sd3"
    again = adapters_objective(recipe, {"adapters": model})
    for part, tensors in network.parts().items():
        assert all(torch.equal(value, again.parts()[part][key]) for key, value in tensors.items())
    with pytest.raises(ModelError, match="family sd3, not sdxl"):
        adapters_objective(load_recipe("dra-sdxl-nano"), {"adapters": model})  # type: ignore[arg-type]
    image = picture(40, 52)
    request = Request(key="k", image=image, seed=3, prompt="red")
    with torch.no_grad():
        merged = build_restorer(load_model(model.path)).restore([request])[0]
        live = DraRestorer(network, restore_defaults(recipe_dict)).restore([request])[0]
    assert merged.image.shape == image.shape and merged.info["steps"] == "2"
    assert np.abs(merged.image.astype(int) - live.image).max() <= 1
    half = build_restorer(load_model(model.path), precision="bf16")
    assert half.network.dtype == torch.bfloat16 and not half.network.lora
    assert 0 < np.abs(half.restore([request])[0].image.astype(int) - live.image).mean() < 8

    folder = tmp_path / "files"
    report = export_weights(model.path, folder, form="safetensors")
    assert report.parameters == sum(v.numel() for tensors in network.parts().values() for v in tensors.values())
    back = import_weights(ImportJob(files=find_files(folder), out=tmp_path / "back"))
    assert back.config == model.info["config"] and back.prior == prior_record
    assert back.permitted_use == "unstated"
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps({**sidecar, "permitted_use": ""}))
    assert (
        f"of the prior {prior_record['id']}: see there"
        in import_weights(ImportJob(files=find_files(folder))).permitted_use
    )
    for part in (ADAPTERS, LORA):
        one, other = model.part(part), load_model(tmp_path / "back").part(part)
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    restored = build_restorer(load_model(tmp_path / "back")).restore([request])[0]
    assert np.array_equal(restored.image, merged.image)
    layout = expected_layout(str(prior_folder.path), sizes=model.info["config"])
    assert {name: set(keys) for name, keys in layout.items()} == {
        "adapters.safetensors": set(model.part(ADAPTERS)),
        "adapter_model.safetensors": set(model.part(LORA)),
    }
    with pytest.raises(ModelError, match="family sdxl has a unet"):
        expected_layout(str(prior_folder.path), sizes={**model.info["config"], FAMILY: "sdxl"})


@torch.no_grad()
def test_peft_reads_the_exported_lora(tmp_path: Path) -> None:
    from peft import PeftModel

    network = make_network()
    model = tiny.save(network, tmp_path / "m")
    export_weights(model.path, tmp_path / "f", form="safetensors")
    fresh = make_prior()
    latents, times, conditions = tensor("z", 2, 16, 8, 8), torch.tensor([0.2, 0.7]), fresh.conditions(["red", "blue"])
    ours = diffusers_velocity(network.prior, latents, times, conditions)
    assert not torch.equal(diffusers_velocity(fresh, latents, times, conditions), ours)
    other = copy.copy(fresh)
    other.network = PeftModel.from_pretrained(fresh.network, tmp_path / "f")  # type: ignore[arg-type, assignment]
    assert torch.equal(diffusers_velocity(other, latents, times, conditions), ours)


@torch.no_grad()
def test_diffusers_reads_the_exported_lora(tmp_path: Path) -> None:
    """The two steps of StableDiffusion3Pipeline.load_lora_weights; alpha is not the rank here."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

    network, folder = make_network(), tmp_path / "f"
    export_weights(tiny.save(network, tmp_path / "m").path, folder, form="safetensors")
    state, config = StableDiffusion3Pipeline.lora_state_dict(str(folder), return_lora_metadata=True)
    fresh = make_prior()
    latents, times, conditions = tensor("z", 2, 16, 8, 8), torch.tensor([0.2, 0.7]), fresh.conditions(["red", "blue"])
    plain = diffusers_velocity(fresh, latents, times, conditions)
    StableDiffusion3Pipeline.load_lora_into_transformer(state, fresh.network, metadata=config)
    own = diffusers_velocity(network.prior, latents, times, conditions)
    assert torch.equal(diffusers_velocity(fresh, latents, times, conditions), own)
    assert not torch.equal(plain, own)


@torch.no_grad()
def test_a_folder_gives_the_same_network(tmp_path: Path) -> None:
    network = make_network(FORMS[1])
    again: Any = network_of(tiny.save(network, tmp_path / "m"), make_prior())
    assert isinstance(again, TokenDra) and again.config() == network.config()
    both = join([network.prior.conditions(["red"]), network.prior.conditions(["blue"])])
    latents, times = tensor("z", 2, 16, 8, 8), torch.tensor([0.2, 0.7])
    results = [
        each.predict_velocity(latents, times, each.features(each.encode_lq(tensor("i", 1, 3, 16, 16))), both)
        for each in (network, again)
    ]
    assert torch.equal(*results)


def test_the_plan_of_memory_at_real_size(tmp_path: Path) -> None:
    """MM-DiT and adapters by parameters (the LoRA is merged), three text encoders, and SD3's autoencoder."""
    config = {
        FAMILY: "sd3",
        ADAPTERS: AdapterConfig().to_dict(),
        LORA: LoraConfig().to_dict(),
        ENCODER: False,
    }
    card = ModelCard(name="m", system="dra", config=config, prior={"id": SD3_MEDIUM, "digest": ""})
    model = save_model(tmp_path / "m", card, {ADAPTERS: {"x": torch.zeros(1)}})
    plan = {phase.name: phase for phase in plan_memory(model, (1024, 1024), {}, "bf16").phases}
    positions = 192 * 192 * 1536  # a buffer
    assert plan["steps"].weights == 2 * (2_028_328_000 + positions + 70_880_256 + 99_840)
    assert 5.4e9 < plan["texts"].weights / 2 < 5.7e9  # CLIP-L, bigG and T5-XXL
    one = {phase.name: phase for phase in plan_memory(model, (1024, 1024), {"cfg_scale": 1.0}, "bf16").phases}
    assert 0.4 * plan["steps"].peak < one["steps"].peak < 0.8 * plan["steps"].peak
    large = {phase.name: phase for phase in plan_memory(model, (8192, 8192), {"tile_px": 8192}, "bf16").phases}
    largest = {phase.name: phase for phase in plan_memory(model, (3072, 3072), {"tile_px": 8192}, "bf16").phases}
    assert large["steps"].peak == largest["steps"].peak  # 192 tokens a side
    with pytest.raises(ValueError, match='Did you mean "tile_px"'):
        plan_memory(model, (1024, 1024), {"tile_pix": 512})


# ------------------------------------------------------------------------------------------------------------- recipes


def test_the_records_of_the_families_decide() -> None:
    assert {name: shape_of(FAMILIES[name]) for name in ("sdxl", "nano", "sd3")} == {
        "sdxl": "maps",
        "nano": "maps",
        "sd3": "tokens",
    }
    for name in ("pixart", "sd"):
        with pytest.raises(ValueError, match=f"family {name}"):
            shape_of(FAMILIES[name])
    with pytest.raises(ValueError, match="tokens must be 2 x 2"):
        TokenDra.adapters_of(make_prior(patch_size=4).network, AdapterConfig(), 8)


def test_recipes_have_the_papers_numbers() -> None:
    recipe: Any = load_recipe("dra-sd3")
    assert (recipe.prior, recipe.resolution, recipe.optimizer.lr) == (SD3_MEDIUM, 512, 1e-5)
    assert (recipe.time_mean, recipe.time_deviation, recipe.time_shift) == (0.0, 1.0, 1.0)
    assert recipe.lora == {"rank": 32} and recipe.adapters == {"every": 4}
    options = {"sampler": "flow", "steps": 100, "cfg_scale": 7.5, "rss_weight": 0.05, "rss_threshold": 0.8}
    assert recipe.restore_options == options
    assert load_recipe("dra-sd3-nano").prior == "nano-sd3"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("family=pixart", "no adapters for priors of the family pixart"),
        ("family=sd33", "unknown prior family"),
        ("embeddings=text", "must embed its own"),
        ("max_clean_weight=5", "max_clean_weight: not a setting"),
        ("time_deviation=0", "above 0"),
        ("adapters.block=conv3", "block: not a setting of adapters on tokens"),
        ("adapters.every=0", "whole number from 1"),
        ("restore_options.sampler=edm", "sampler must be flow"),
    ],
)
def test_wrong_recipes_die_at_once(override: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        load_recipe("dra-sd3-nano", [override])
    for other in ("time_mean=1", "adapters.every=2", "restore_options.sampler=flow"):
        with pytest.raises(RecipeError):
            load_recipe("dra-sdxl-nano", [other])
