"""DRA's restorer at a tiny size: steps by hand, the LQ path once, options, exported files, recipes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor

from components.models import ModelError, load_model, save_model
from components.priors.conditions import SizedConditions
from components.priors.fast_unet import Speed
from components.priors.opening import load_prior
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl_config import SDXL
from components.randomness import generator
from components.recipes import RecipeError
from components.residence import Residence
from components.samplers.edm import edm_sigmas, level_table, nearest_index
from components.systems import SYSTEMS
from components.systems.dra.build import build_restorer
from components.systems.dra.config import AdapterConfig, LoraConfig
from components.systems.dra.memory import plan_memory
from components.systems.dra.network import ADAPTERS, ENCODER, LORA, Dra
from components.systems.dra.options import Options, check_options
from components.systems.dra.released import check_sizes, find_files
from components.systems.dra.restorer import DraRestorer
from components.systems.dra.texts import NEGATIVE
from components.systems.dra.weights import expected_layout, export_weights, import_weights
from components.systems.recipes import load_recipe
from components.systems.weights_io import ImportJob
from components.types import Cancellation, Request, SampleError, StepEvent

tiny = load_helper("components/test_dra.py")
make_network, make_prior, make_conditions, tensor = (
    tiny.make_network,
    tiny.make_prior,
    tiny.make_conditions,
    tiny.tensor,
)

QUICK: dict[str, Any] = {"steps": 2, "cfg_scale": 1.5, "churn": 0.5, "negative_words": "none"}


def picture(height: int, width: int, name: str = "p") -> np.ndarray:
    return generator(9, name).integers(0, 256, (height, width, 3)).astype(np.uint8)


def run(restorer: DraRestorer, image: np.ndarray, prompt: str = "", negative: str = "", **options: Any) -> np.ndarray:
    request = Request(
        key="k", image=image, seed=4, prompt=prompt, negative_prompt=negative, options={**QUICK, **options}
    )
    return restorer.restore([request])[0].image


def levels(pictures: Tensor) -> np.ndarray:
    return ((pictures[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("mode", ["latent", "x0", "renoised"])
@torch.no_grad()
def test_two_guided_steps_by_hand(mode: str) -> None:
    """Encode, noise, churn, guidance of the noise, the pull of Eqs. 1-2, decode; with the robust encoder."""
    network, image = make_network(robust=True), picture(16, 32)
    restorer, prior, table = DraRestorer(network), network.prior, level_table(network.prior.schedule)
    options = {"steps": 3, "cfg_scale": 2.5, "churn": 0.9, "noise_scale": 1.1, "color": "none"}
    options |= {"rss_mode": mode, "rss_weight": 0.6, "rss_threshold": 0.25}
    sigmas = edm_sigmas(table, 3)

    def noise(name: str) -> Tensor:
        return torch.from_numpy(generator(4, name).standard_normal((4, 4, 8), dtype=np.float32))[None]

    lq = network.encoder(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    assert not torch.allclose(lq, prior.encode(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1))
    features, ids = network.adapters.features(lq), torch.tensor([[16.0, 32, 0, 0, 16, 32]])
    z = noise("start") * (1 + sigmas[0] ** 2).sqrt()
    strengths = [0.6 * (2 / 3 - 0.25) / 0.75, 0.6 * (1 / 3 - 0.25) / 0.75, 0.0]
    for step in range(3):
        sigma = sigmas[step] * 1.3  # 0.9 / 3
        z = z + 1.1 * noise(f"step {step}") * (sigma**2 - sigmas[step] ** 2).sqrt()
        t = nearest_index(table, sigma[None])
        level, eps = table[t], []
        for prompt in ("dog", "red"):
            text, pooled = prior.embed_prompts([prompt])
            conditions = SizedConditions(text=text, pooled=pooled, time_ids=ids)
            eps.append(network.predict_eps(z / (1 + level**2).sqrt(), t, features, conditions))
        clean = z - level * (eps[0] + 2.5 * (eps[1] - eps[0]))
        if mode == "x0":
            clean = clean + strengths[step] * (lq - clean)
        z = z + (z - clean) / sigma * (sigmas[step + 1] - sigma)
        if mode == "latent":
            z = z + strengths[step] * (lq - z)
        if mode == "renoised":
            z = z + strengths[step] * (lq + sigmas[step + 1] * noise("start") - z)
    answer = run(restorer, image, "red", "dog", **options)
    assert np.abs(levels(prior.decode(z)) - answer).max() <= 1
    assert np.abs(run(restorer, image, "red", "dog", **{**options, "rss_weight": 0.0}).astype(int) - answer).max() > 1


@torch.no_grad()
def test_one_ddim_step_without_guidance_by_hand() -> None:
    network, image = make_network(), picture(16, 16)
    prior = network.prior
    lq = prior.encode(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    x = torch.from_numpy(generator(4, "start").standard_normal((4, 4, 4), dtype=np.float32))[None]
    t = prior.sampling.timesteps(prior.schedule, 1)
    text, pooled = prior.embed_prompts(["red"])
    conditions = SizedConditions(text=text, pooled=pooled, time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]))
    eps = network.predict_eps(x, t, network.adapters.features(lq), conditions)
    clean = prior.schedule.x0_from_eps(x, eps, t)
    options = {
        "steps": 1,
        "cfg_scale": 1.0,
        "rss_threshold": 0.0,
        "rss_weight": 1.0,
        "color": "none",
    }  # no pull: no step is left
    for sampler in ("ddim", "ddpm"):
        answer = run(DraRestorer(network), image, "red", sampler=sampler, **options)
        assert np.abs(levels(prior.decode(clean)) - answer).max() <= 1


# -------------------------------------------------------------------------------------------------------- the LQ path


def count_calls(network: Dra) -> tuple[Counter[str], list[Any]]:
    """Calls of each adapter's LQ block and last layer."""
    calls: Counter[str] = Counter()
    handles = []
    for number, adapter in enumerate(network.adapters.adapters):
        for name in ("lq", "out"):
            key = f"{name} {number}"
            module = getattr(adapter, name)
            handles.append(module.register_forward_hook(lambda *_, key=key: calls.update([key])))
    return calls, handles


def test_the_lq_path_is_computed_once_for_a_picture() -> None:
    """Once over all steps and both halves of guidance; once more for each tile; in every step when it is fused."""
    network = make_network()
    calls, _ = count_calls(network)
    restorer = DraRestorer(network)
    run(restorer, picture(16, 16), "red", steps=3, cfg_scale=2.0)
    assert [calls[f"lq {n}"] for n in range(6)] == [1] * 6
    assert [calls[f"out {n}"] for n in range(6)] == [3] * 6
    calls.clear()
    run(restorer, picture(64, 160), steps=2, cfg_scale=1.0, tile_px=64, tile_overlap=0.25)
    assert [calls[f"lq {n}"] for n in range(6)] == [3] * 6  # three tiles
    fused = make_network(AdapterConfig(chain="fused"))
    calls, _ = count_calls(fused)
    run(DraRestorer(fused), picture(16, 16), steps=3)
    assert [calls[f"lq {n}"] for n in range(6)] == [1, 3, 3, 3, 3, 3]


# --------------------------------------------------------------------------------------------------------- any request


def test_pictures_of_any_size_are_restored_alike_in_any_company() -> None:
    network = make_network()
    requests = [
        Request(key="a", image=picture(18, 30), seed=1, prompt="red", options=QUICK),
        Request(key="b", image=picture(16, 16), seed=2, options={**QUICK, "color": "wavelet"}),
        Request(key="c", image=picture(18, 30, "q"), seed=3, prompt="red blue sky green dog", options=QUICK),
        Request(key="d", image=picture(18, 30, "r"), seed=4, options=QUICK, size=(20, 28)),
    ]
    events: list[StepEvent] = []
    answers = DraRestorer(network, batch_size=3).restore(requests, on_step=events.append)
    assert [answer.image.shape for answer in answers] == [(18, 30, 3), (16, 16, 3), (18, 30, 3), (20, 28, 3)]
    assert [(e.step, e.of) for e in events] == [(n, 8) for n in range(1, 9)]
    assert answers[0].info["system"] == "dra" and answers[1].info["color"] == "wavelet"
    for answer, request in zip(answers, requests, strict=True):
        alone = DraRestorer(network).restore([request])[0].image
        assert np.array_equal(alone, DraRestorer(network).restore([request])[0].image)
        assert np.abs(alone.astype(int) - answer.image).max() <= 1
    twins = [replace(requests[0], key="x"), Request(key="y", image=picture(18, 30, "q"), seed=7, options=QUICK)]
    both = DraRestorer(network, batch_size=2).restore(twins)
    assert np.abs(both[0].image.astype(int) - answers[0].image).max() <= 1


def test_every_option_reaches_the_result() -> None:
    restorer, image = DraRestorer(make_network()), picture(16, 16)
    plain = run(restorer, image, "red")
    assert not np.array_equal(run(restorer, image, "blue"), plain)
    assert not np.array_equal(run(restorer, image, "red", "low quality"), plain)
    words = run(restorer, image, "red", negative_words="descriptors")
    assert np.array_equal(words, run(restorer, image, "red", NEGATIVE["descriptors"]))
    assert not np.array_equal(words, plain)
    off = {"cfg_scale": 1.0}
    assert np.array_equal(run(restorer, image, "red", "low quality", **off), run(restorer, image, "red", **off))
    changes: tuple[dict[str, Any], ...] = (
        {"sampler": "ddim"},
        {"sampler": "ddpm"},
        {"steps": 3},
        {"cfg_scale": 2.0},
        {"churn": 0.0},
        {"noise_scale": 1.2},
        {"rss_threshold": 0.0},
        {"rss_threshold": 0.0, "rss_weight": 0.5},
        {"color": "none"},
        {"color": "adain"},
        {"min_side_px": 32},
    )
    for change in changes:
        assert not np.array_equal(run(restorer, image, "red", **change), plain), change
    pulled = {"rss_threshold": 0.0, "rss_weight": 0.5}
    ways = [run(restorer, image, "red", rss_mode=mode, **pulled) for mode in ("latent", "x0", "renoised")]
    assert not any(np.array_equal(one, other) for one, other in ((ways[0], ways[1]), (ways[1], ways[2])))
    # of two steps one is left after the first: a threshold of 0.8 has no pull then
    assert np.array_equal(run(restorer, image, "red", rss_weight=0.0), plain)
    scaled = run(restorer, image, "red", rss_threshold=0.0, rss_weight=0.01, rss_scaled=True)
    assert np.array_equal(scaled, run(restorer, image, "red", rss_threshold=0.0, rss_weight=0.5))


def test_networks_in_turns_give_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase has its networks on the device, which here is the CPU under another name."""
    request = Request(key="k", image=picture(16, 16), seed=1, prompt="red", options=QUICK)
    plain = DraRestorer(make_network(robust=True), speed=Speed(join=False)).restore([request])[0].image
    phases: list[str] = []
    inner = Residence.phase

    def phase(self: Residence, name: str) -> Any:
        phases.append(name)
        return inner(self, name)

    monkeypatch.setattr(Residence, "phase", phase)
    turns = DraRestorer(make_network(robust=True), speed=Speed(join=False), device="cpu", offload=True)
    assert np.array_equal(turns.restore([request])[0].image, plain)
    assert phases == ["pictures", "texts", "steps", "pictures"]
    with pytest.raises(ValueError, match="join=false"):
        DraRestorer(make_network(), offload=True)


def test_bad_requests_name_their_fault() -> None:
    restorer, calls = DraRestorer(make_network()), iter([False, True])
    with pytest.raises(Cancellation):
        restorer.restore([Request(key="k", image=picture(16, 16), options=QUICK)], cancelled=lambda: next(calls, True))
    with pytest.raises(SampleError, match="bad_image") as raised:
        restorer.restore([Request(key="gray", image=np.zeros((4, 4), np.uint8))])
    assert raised.value.key == "gray"
    with pytest.raises(ValueError, match="batch_size"):
        DraRestorer(make_network(), batch_size=0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rss_weigth": 0.1}, 'Did you mean "rss_weight"'),
        ({"steps": 0}, "between 1"),
        ({"steps": 1.5}, "integer"),
        ({"cfg_scale": -1}, "at least 0"),
        ({"rss_mode": "noise"}, "one of latent, x0, renoised"),
        ({"rss_weight": 1.5}, "between 0 and 1"),
        ({"rss_threshold": 1}, "below 1"),
        ({"min_side_px": 5000}, "between 0 and 4096"),
        ({"tile_px": 8}, "between 64"),
        ({"tile_overlap": 0.9}, "between 0 and 0.75"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_options(options)


def test_the_defaults_are_the_papers() -> None:
    own = Options()
    assert (own.steps, own.cfg_scale, own.rss_weight, own.rss_threshold) == (100, 7.5, 0.05, 0.8)  # section 4.1
    assert own.rss_mode == "latent" and own.color == "wavelet" and own.guided
    assert replace(own, rss_scaled=True, steps=20).pull_weight == pytest.approx(0.25)
    assert replace(own, rss_scaled=True, steps=2).pull_weight == 1.0
    assert check_options({"steps": 20.0}, {"rss_weight": 0.1}) == {"steps": 20}


# ------------------------------------------------------------------------------------------------------ folders, files


@torch.no_grad()
def test_peft_reads_the_exported_lora(tmp_path: Path) -> None:
    from peft import PeftModel

    network = make_network()
    model = tiny.save(network, tmp_path / "m")
    for form in ("safetensors", "pt"):
        folder = tmp_path / form
        report = export_weights(model.path, folder, form=form)
        assert report.parameters == sum(v.numel() for tensors in network.parts().values() for v in tensors.values())
        assert all((folder / name).is_file() and digest for name, digest in report.files.items())
        fresh = make_prior().unet
        peft: Any = PeftModel.from_pretrained(copy.deepcopy(fresh), folder)
        z, t, conditions = tensor("z", 2, 4, 8, 8), torch.tensor([300, 20]), tiny.make_conditions(network.prior)
        arguments: Any = (z, t, conditions.text)
        added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
        ours = network.prior.unet(*arguments, added_cond_kwargs=added).sample
        assert torch.equal(peft(*arguments, added_cond_kwargs=added).sample, ours)
        assert not torch.equal(fresh(*arguments, added_cond_kwargs=added).sample, ours)


@torch.no_grad()
def test_diffusers_reads_the_exported_lora(tmp_path: Path) -> None:
    """The two steps of StableDiffusionXLPipeline.load_lora_weights; alpha is not the rank here."""
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    network, folder = make_network(), tmp_path / "f"
    export_weights(tiny.save(network, tmp_path / "m").path, folder, form="safetensors")
    state, alphas, config = StableDiffusionXLPipeline.lora_state_dict(str(folder), return_lora_metadata=True)
    fresh: Any = make_prior().unet
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, fresh, metadata=config)
    z, t, conditions = tensor("z", 2, 4, 8, 8), torch.tensor([300, 20]), tiny.make_conditions(network.prior)
    added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    own = network.prior.unet(z, t, conditions.text, added_cond_kwargs=added).sample
    assert torch.equal(fresh(z, t, conditions.text, added_cond_kwargs=added).sample, own)
    assert not torch.equal(make_prior().unet(z, t, conditions.text, added_cond_kwargs=added).sample, own)
    assert [path.name for path in find_files(folder)] == ["adapters.safetensors", "adapter_model.safetensors"]


def test_a_folder_restores_on_the_shipped_prior(tmp_path: Path) -> None:
    prior = load_prior("nano")
    network = tiny.train_a_little(Dra(prior, None, LoraConfig(rank=2)))
    model = tiny.save(network, tmp_path / "m", dict(prior.source))
    image = picture(40, 52)
    request = Request(key="k", image=image, seed=3, prompt="red", options={"steps": 2, "cfg_scale": 2.0})
    merged = build_restorer(load_model(model.path)).restore([request])[0]
    live = DraRestorer(network).restore([request])[0]
    assert merged.image.shape == image.shape and merged.info["rss_weight"] == "0.05"
    assert np.abs(merged.image.astype(int) - live.image).max() <= 1
    half = build_restorer(load_model(model.path), precision="bf16", speed={"join": True})
    assert half.network.dtype == torch.bfloat16 == half.network.adapters.dtype and not half.network.lora
    coarse = half.restore([request])[0].image
    assert 0 < np.abs(coarse.astype(int) - live.image).mean() < 8


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_exported_files_come_back(form: str, tmp_path: Path) -> None:
    """On the shipped prior, with the robust encoder."""
    prior = load_prior("nano")

    network = tiny.train_a_little(
        Dra(prior, AdapterConfig(block="naf"), LoraConfig(rank=2), RobustEncoder(prior.autoencoder))
    )
    model, folder = tiny.save(network, tmp_path / "m", dict(prior.source)), tmp_path / "files"
    plan = export_weights(model.path, folder, form=form, write=False)
    assert not folder.exists() and set(plan.files.values()) == {""}
    report = export_weights(model.path, folder, form=form)
    assert list(report.files) == list(plan.files) and len(find_files(folder)) == 3
    back = import_weights(ImportJob(files=find_files(folder), out=tmp_path / "back"))
    assert back.config == model.info["config"] and back.prior["id"] == "nano"
    again = load_model(tmp_path / "back")
    for part in (ADAPTERS, LORA, ENCODER):
        one, other = model.part(part), again.part(part)
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    layout = expected_layout("nano", sizes=model.info["config"])
    assert {name: set(keys) for name, keys in layout.items()} == {
        "adapters.safetensors": set(model.part(ADAPTERS)),
        "adapter_model.safetensors": set(model.part(LORA)),
        "encoder.safetensors": set(model.part(ENCODER)),
    }
    assert import_weights(ImportJob(files=find_files(folder))).model is None
    with pytest.raises(ModelError, match="does not fit these sizes"):
        import_weights(ImportJob(files=find_files(folder), sizes={"lora": {"rank": 3}}))
    with pytest.raises(ModelError, match="also needs encoder"):
        import_weights(ImportJob(files=find_files(folder)[:1]))
    with pytest.raises(ValueError, match="exist"):
        find_files(tmp_path / "none")
    other = save_model(tmp_path / "o", tiny.ModelCard(name="o", system="supir"), {"x": {"y": torch.zeros(1)}})
    with pytest.raises(ModelError, match="holds a supir model"):
        export_weights(other.path, folder)


def test_wrong_sizes_of_files_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown size 'lore'"):
        check_sizes({"lore": {}})
    with pytest.raises(ValueError, match='Did you mean "rank"'):
        check_sizes({"lora": {"rang": 2}})
    with pytest.raises(ValueError, match="true or false"):
        check_sizes({"encoder": 1})
    weights = SYSTEMS["dra"].weights
    assert weights is not None and weights.check_sizes({"adapters": {"block": "conv3"}})


def test_the_plan_of_memory_at_real_size(tmp_path: Path) -> None:
    """From the configurations alone: UNet and adapters by parameters; the LoRA is merged."""
    config = {ADAPTERS: AdapterConfig().to_dict(), LORA: LoraConfig().to_dict(), ENCODER: False}
    plain, robust = (
        save_model(
            tmp_path / name,
            tiny.ModelCard(name="m", system="dra", config={**config, ENCODER: flag}, prior={"id": SDXL, "digest": ""}),
            {ADAPTERS: {"x": torch.zeros(1)}},
        )
        for name, flag in (("plain", False), ("robust", True))
    )
    plan = {phase.name: phase for phase in plan_memory(plain, (1024, 1024), {}, "bf16").phases}
    assert plan["steps"].weights == 2 * (2_567_463_684 + 134_695_360)
    assert plan["pictures"].weights == 4 * 83_653_863
    other = {phase.name: phase for phase in plan_memory(robust, (1024, 1024), {"cfg_scale": 1.0}, "bf16").phases}
    assert other["pictures"].weights == 4 * (83_653_863 + 34_163_592)
    assert 0.4 * plan["steps"].peak < other["steps"].peak < 0.8 * plan["steps"].peak  # one half instead of two
    with pytest.raises(ValueError, match='Did you mean "tile_px"'):
        plan_memory(plain, (1024, 1024), {"tile_pix": 512})


# -------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_have_the_papers_numbers() -> None:
    recipe: Any = load_recipe("dra-sdxl")
    assert (recipe.resolution, recipe.optimizer.lr, recipe.sources) == (512, 1e-5, {"dra-300k": 1.0})  # section 4.1
    assert recipe.restore_options == {
        "sampler": "edm",
        "steps": 100,
        "cfg_scale": 7.5,
        "rss_weight": 0.05,
        "rss_threshold": 0.8,
    }
    assert recipe.lora == {"rank": 32} and recipe.degradation.preset == "dra"
    assert load_recipe("dra-sdxl-nano").prior == "nano"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("adapters.blocks=conv3", 'Did you mean "block"'),
        ("adapters.block=conv5", "one of conv31, conv3, naf"),
        ("lora.ranks=3", 'Did you mean "rank"'),
        ("lora.rank=-1", "whole number from 0"),
        ("lora.alpha=-1", "alpha must be"),
        ("null_share=0.95", "sum to at most 1"),
        ("max_clean_weight=0.5", "at least 1"),
        ("timestep_importance=1", "timestep_importance"),
        ("restore_options.rss_wait=0.1", 'Did you mean "rss_weight"'),
        ("restore_options.rss_threshold=1", "rss_threshold must be"),
    ],
)
def test_wrong_recipes_die_at_once(override: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        load_recipe("dra-sdxl-nano", [override])
