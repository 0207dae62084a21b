"""InstaRevive's generators and restorer: families, one step, noise, tiles, inpainting, options."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from components.models import ModelCard, ModelError, load_model, save_model
from components.priors.conditions import Conditions, join
from components.priors.nano import NANO, build_prior, build_tokenizer_json
from components.priors.one_text import OneTextPrior
from components.priors.one_text_config import PIXART_DIT, SD21_UNET, SD_VAE
from components.priors.sdxl_config import SDXL_UNET
from components.randomness import seeded_init
from components.samplers.schedules import FlowSchedule, Schedule, schedule_from
from components.systems.instarevive.backbone import Backbone, open_backbone
from components.systems.instarevive.build import build_restorer, generator_config, generator_parts, load_generator
from components.systems.instarevive.fast import FastOneStep, Speed
from components.systems.instarevive.network import (
    EpsPredictor,
    OneStep,
    OneStepGenerator,
    aligning_conv,
    build_network,
    nearest_timestep,
)
from components.systems.instarevive.options import FIXED_PROMPTS, check_options
from components.systems.instarevive.parity import windows
from components.systems.instarevive.restorer import Coarse, InstaReviveRestorer
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Cancellation, Request, SampleError, StepEvent

LINEAR = Schedule(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
FLOW = FlowSchedule(shift=3.0)
TINY_DIT = {
    **PIXART_DIT,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
}
TINY_SD = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "sample_size": 8,
}
TINY_SDXL = {
    **TINY_SD,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
TINY_VAE = {**SD_VAE, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
CONFIGS = {"pixart": TINY_DIT, "sd": TINY_SD, "sdxl": TINY_SDXL, "nano": NANO["unet"]}


def tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def tiny_predictor(family: str = "pixart", **options: Any) -> EpsPredictor:
    with seeded_init(0, family):
        network = build_network(family, CONFIGS[family]).eval()
    return EpsPredictor(network, LINEAR if family == "pixart" else Schedule(), **options)


def conditions(family: str, batch: int = 2, side: int = 64) -> Conditions:
    noise = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(batch, -1)
    if family == "pixart":
        return Conditions(text=random(batch, 6, 12), mask=(torch.arange(6) < 4).float().expand(batch, -1))
    if family == "sd":
        return Conditions(text=random(batch, 6, 12))
    config = CONFIGS[family]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return Conditions(text=random(batch, 6, config["cross_attention_dim"]), pooled=random(batch, pooled), time_ids=ids)


def dit_backbone(predictor: EpsPredictor) -> Backbone:
    """A DiT's backbone of small random networks with embeddings of the released prompts and the empty one."""
    with seeded_init(1, "vae"):
        autoencoder = AutoencoderKL(**tuples(TINY_VAE)).eval()
    prompt_conditions = conditions("pixart", 3)
    embeddings = {
        prompt: (
            prompt_conditions.text[i : i + 1],
            prompt_conditions.mask[i : i + 1] if prompt_conditions.mask is not None else None,
        )
        for i, prompt in enumerate(["", *FIXED_PROMPTS.values()])
    }
    prior = OneTextPrior(
        name="tiny",
        digest="",
        network=predictor.network,
        autoencoder=autoencoder,
        text_encoder=None,
        tokenizer=None,
        schedule=LINEAR,
        prompt_embeddings=embeddings,
    )
    return Backbone(family="pixart", prior=prior.freeze())


def nano_backbone() -> Backbone:
    with seeded_init(2, "nano"):
        prior = build_prior(NANO, build_tokenizer_json(["red", "blue"], NANO["text_length"]))
    return Backbone(family="nano", prior=prior.freeze())


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture."""
    rough = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    from PIL import Image

    return np.array(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


class Darker(nn.Module):
    """A coarse restorer whose result is easy to check: it halves the brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] % 32 == 0 and images.shape[-2] % 32 == 0
        return images * self.factor


def restore(restorer: InstaReviveRestorer, image: np.ndarray, seed: int = 0, **options: Any) -> np.ndarray:
    reference = options.pop("mask", None)
    request = Request(key="k", image=image, seed=seed, options=options, reference=reference)
    return restorer.restore([request])[0].image


# -- networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_makes_clean_latents_in_one_step(family: str) -> None:
    predictor, prompt_conditions = tiny_predictor(family), conditions(family)
    generator = OneStepGenerator(predictor)
    lq = torch.randn(2, predictor.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    clean = generator(lq, prompt_conditions)
    assert clean.shape == lq.shape and clean.dtype == lq.dtype
    # x0 from the network's eps at the generator's step
    t = torch.full((2,), generator.timestep)
    eps = predictor.raw(lq, t, prompt_conditions)[:, : lq.shape[1]]
    torch.testing.assert_close(clean, predictor.schedule.x0_from_eps(lq, eps, t), atol=1e-5, rtol=1e-5)
    clean.square().mean().backward()
    assert all(
        p.grad is not None for n, p in predictor.network.named_parameters() if "proj_out" in n or "conv_out" in n
    )


@pytest.mark.parametrize(
    ("family", "config", "count"),
    [("pixart", PIXART_DIT, 610_856_096), ("sd", SD21_UNET, 865_910_724), ("sdxl", SDXL_UNET, 2_567_463_684)],
)
def test_published_sizes_have_the_parameters_of_the_reference(family: str, config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = build_network(family, config)
    assert sum(p.numel() for p in network.parameters()) == count


def test_the_autoencoder_has_the_parameters_of_the_reference() -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**tuples(dict(SD_VAE)))
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863


def test_the_step_has_the_released_noise_level_on_every_schedule() -> None:
    assert nearest_timestep(LINEAR) == 400
    for schedule in (LINEAR, Schedule(), Schedule(num_train_timesteps=500, beta_end=0.02)):
        t = nearest_timestep(schedule)
        before, here, after = (float(a) for a in schedule.alphas_cumprod[t - 1 : t + 2])
        assert (before + here) / 2 > 0.19357 > (here + after) / 2


def test_v_prediction_becomes_noise() -> None:
    prompt_conditions = conditions("sd")
    predictor = tiny_predictor("sd", prediction="v_prediction")
    clean, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    t = torch.tensor([100, 700])
    noisy = predictor.schedule.add_noise(clean, noise, t)
    alpha = predictor.schedule.alpha(t, 4)
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean  # Salimans and Ho 2022
    predictor.network.forward = lambda *_, **__: (v,)  # type: ignore[method-assign]
    torch.testing.assert_close(predictor.predict_eps(noisy, t, prompt_conditions), noise, atol=1e-5, rtol=1e-5)


def test_a_flows_velocity_becomes_noise_and_its_step_is_exact() -> None:
    """Esser et al. 2024: the network predicts noise - clean and takes the shifted time out of 1,000."""
    prompt_conditions, timesteps = conditions("sd"), []
    predictor = EpsPredictor(tiny_predictor("sd").network, FLOW, "flow_prediction")
    clean, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))

    def exact(latents: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        timesteps.append(timestep)
        return (noise - clean,)

    predictor.network.forward = exact  # type: ignore[method-assign]
    t = torch.tensor([100, 700])
    eps = predictor.predict_eps(FLOW.add_noise(clean, noise, t), t, prompt_conditions)
    torch.testing.assert_close(eps, noise, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(timesteps[0], torch.tensor([250.0, 875.0]))  # 3 t / (1 + 2 t)
    generator = OneStepGenerator(predictor)
    step = torch.full((2,), generator.timestep)
    torch.testing.assert_close(
        generator(FLOW.add_noise(clean, noise, step), prompt_conditions), clean, atol=1e-5, rtol=1e-5
    )
    level = 1 / (1 + FLOW.sigmas.double().square())  # the released share of signal on the flow's schedule
    assert level[generator.timestep - 1] > 0.19357 > level[generator.timestep + 1]
    assert abs(float(level[generator.timestep]) - 0.19357) < 1e-3


@pytest.mark.parametrize(("schedule", "prediction"), [(FLOW, "epsilon"), (LINEAR, "flow_prediction")])
def test_a_prediction_must_go_with_its_schedule(schedule: Any, prediction: Any) -> None:
    with pytest.raises(ValueError, match=f"{prediction} does not fit"):
        EpsPredictor(nn.Identity(), schedule, prediction)


def test_a_model_folder_keeps_a_flow(tmp_path: Path) -> None:
    backbone = dit_backbone(tiny_predictor())
    backbone.prior.schedule, backbone.prior.prediction = FLOW, "flow_prediction"  # type: ignore[union-attr, assignment]
    generator = OneStepGenerator(backbone.predictor(trainable=True))
    card = ModelCard(
        name="flow", system="instarevive", recipe={}, prior={}, config=generator_config(backbone, generator)
    )
    loaded = load_generator(load_model(save_model(tmp_path / "model", card, generator_parts(generator)).path))
    assert (loaded.schedule, loaded.predictor.prediction, loaded.timestep) == (
        FLOW,
        "flow_prediction",
        generator.timestep,
    )
    lq, prompt_conditions = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), conditions("pixart", 1)
    with torch.no_grad():
        assert torch.equal(loaded(lq, prompt_conditions), generator(lq, prompt_conditions))
    assert schedule_from(asdict(LINEAR)) == LINEAR
    with pytest.raises(TypeError, match="beta_start"):
        schedule_from({"shift": 3.0, "beta_start": 1e-4})


def test_the_mask_hides_padding_unless_it_is_a_bias() -> None:
    prompt_conditions, t = conditions("pixart"), torch.tensor([10, 400])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert prompt_conditions.mask is not None
    changed = Conditions(
        text=prompt_conditions.text + 5 * (1 - prompt_conditions.mask)[..., None], mask=prompt_conditions.mask
    )
    for as_bias, same in ((False, True), (True, False)):
        predictor = tiny_predictor(mask_as_bias=as_bias)
        one, other = (predictor.predict_eps(latents, t, c) for c in (prompt_conditions, changed))
        assert torch.allclose(one, other, atol=1e-5) == same


def test_a_generator_with_noise_starts_as_one_without() -> None:
    predictor, prompt_conditions = tiny_predictor(), conditions("pixart")
    lq, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    plain = OneStepGenerator(predictor)
    for kernel in (1, 3):
        generator = OneStepGenerator(predictor, OneStep(input="noise", kernel=kernel))
        torch.testing.assert_close(generator(lq, prompt_conditions, noise), plain(lq, prompt_conditions))
        generator(lq, prompt_conditions, noise).square().mean().backward()
        assert generator.align is not None and generator.align.weight.grad is not None
        assert generator.align.weight.grad[:, 4:].abs().sum() > 0  # the noise half has a gradient from the first step
    with pytest.raises(ValueError, match="give noise"):
        generator(lq, prompt_conditions)
    with pytest.raises(ValueError, match="leave noise out"):
        plain(lq, prompt_conditions, noise)


@pytest.mark.parametrize("schedule", [LINEAR, FLOW], ids=["vp", "flow"])
def test_a_generator_may_begin_with_lq_latents_noised_to_its_time(schedule: Any) -> None:
    kind: Any = "flow_prediction" if schedule is FLOW else "epsilon"
    predictor, prompt_conditions = EpsPredictor(tiny_predictor().network, schedule, kind), conditions("pixart")
    lq, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    generator = OneStepGenerator(predictor, OneStep(input="noise"), "noised")
    t = torch.full((2,), generator.timestep)
    with torch.no_grad():
        torch.testing.assert_close(generator.network_input(lq, noise), schedule.add_noise(lq, noise, t))
        eps = predictor.predict_eps(schedule.add_noise(lq, noise, t), t, prompt_conditions)
        expected = schedule.x0_from_eps(schedule.add_noise(lq, noise, t), eps, t)
        torch.testing.assert_close(generator(lq, prompt_conditions, noise), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(generator(lq, prompt_conditions, noise), generator(lq, prompt_conditions, -noise))


def test_conditions_are_joined_and_replaced_by_rows() -> None:
    one, other = conditions("sdxl", 2), conditions("sdxl", 1).expand(1)
    both = join([one, other])
    assert len(both) == 3 and both.mask is None
    dropped = one.replace_rows(other, torch.tensor([True, False]))
    assert torch.equal(dropped.text[0], other.text[0]) and torch.equal(dropped.text[1], one.text[1])
    assert dropped.pooled is not None and other.pooled is not None and torch.equal(dropped.pooled[0], other.pooled[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_network("pixrt", TINY_DIT), 'Did you mean "pixart"'),
        (lambda: build_network("sd", TINY_SDXL), "addition_embed_type"),
        (lambda: build_network("sdxl", TINY_SD), "text_time"),
        (lambda: build_network("sd", {"sizes": 3}), "not the configuration of a sd network"),
        (lambda: tiny_predictor(prediction="v"), "unknown prediction"),
        (lambda: OneStep(input="noisy"), 'Did you mean "noise"'),  # type: ignore[arg-type]
        (lambda: OneStep(kernel=2), "kernel must be 1 or 3"),
        (lambda: OneStep(timestep=-2), "at least 0"),
        (lambda: OneStepGenerator(tiny_predictor(), OneStep(timestep=1000)), "below 1000"),
        (
            lambda: tiny_predictor("sdxl").raw(torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), conditions("sd")),
            "pooled",
        ),
        (lambda: open_backbone("dit"), "unknown generator family"),
    ],
)
def test_bad_networks_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# -- restorer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 80), (61, 33), (16, 16), (1, 9)])
def test_any_size_is_restored_to_its_size(size: tuple[int, int]) -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor), Coarse(Darker(), 32))
    for options in ({}, {"preset": "released", "min_side_px": 64}):
        assert restore(restorer, picture(*size), **options).shape == (*size, 3)
    larger = restorer.restore([Request(key="k", image=picture(*size), size=(70, 50))])[0]
    assert larger.image.shape == (70, 50, 3) and larger.info["system"] == "instarevive"


def test_results_keep_order_and_do_not_depend_on_the_batch() -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor), batch_size=4)
    images = [picture(32, 48, 0), picture(48, 32, 1), picture(32, 48, 2)]
    together = restorer.restore([Request(key=str(i), image=image) for i, image in enumerate(images)])
    assert [r.key for r in together] == ["0", "1", "2"]
    for image, result in zip(images, together, strict=True):
        assert np.abs(restore(restorer, image).astype(int) - result.image).max() <= 1


def test_seeds_matter_only_where_the_generator_takes_noise() -> None:
    predictor = tiny_predictor()
    backbone, image = dit_backbone(predictor), picture(32, 32)
    plain = InstaReviveRestorer(OneStepGenerator(predictor), backbone)
    assert np.array_equal(restore(plain, image, seed=0), restore(plain, image, seed=1))
    generator = OneStepGenerator(predictor, OneStep(input="noise"))
    assert generator.align is not None
    with torch.no_grad():
        generator.align.weight[:, 4:, 0, 0] = 0.3 * torch.eye(4)
    diverse = InstaReviveRestorer(generator, backbone)
    assert not np.array_equal(restore(diverse, image, seed=0), restore(diverse, image, seed=1))
    assert np.array_equal(restore(diverse, image, seed=1), restore(diverse, image, seed=1))


def test_the_coarse_restorer_comes_first_and_gives_the_colours() -> None:
    predictor, image = tiny_predictor(), picture(32, 64)
    backbone = dit_backbone(predictor)
    with_coarse = InstaReviveRestorer(OneStepGenerator(predictor), backbone, Coarse(Darker(), 32))
    without = InstaReviveRestorer(OneStepGenerator(predictor), backbone)
    half = np.round(image / 2).astype(np.uint8)
    assert np.abs(restore(with_coarse, image).astype(int) - restore(without, half)).max() <= 2
    assert np.array_equal(restore(with_coarse, image, coarse=False), restore(without, image))
    colored = restore(with_coarse, image, color="adain")
    assert np.allclose(colored.mean(axis=(0, 1)), half.mean(axis=(0, 1)), atol=6)


@pytest.mark.parametrize("window", ["gaussian", "equal"])
def test_tiles_of_a_local_network_equal_the_whole(window: str) -> None:
    """A network that treats each latent by itself gives the same result in tiles."""
    backbone = nano_backbone()
    predictor = EpsPredictor(backbone.network, backbone.prior.schedule)
    predictor.raw = lambda latents, timesteps, conditions: latents.sin()  # type: ignore[method-assign]
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), backbone)
    image = picture(200, 264)
    whole = restore(restorer, image, tiles="never")
    calls: list[int] = []
    step = restorer.fast.generate
    restorer.fast.generate = lambda *arguments: calls.append(1) or step(*arguments)  # type: ignore[method-assign, func-returns-value]
    tiled = restore(restorer, image, tile_px=64, window=window)
    assert len(calls) > 4
    assert np.abs(whole.astype(int) - tiled).max() <= 1


def test_large_pictures_go_through_all_networks_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse restorer, encoder, generator and decoder give the same result in tiles as on the whole picture."""
    backbone, coarse = nano_backbone(), Coarse(Darker(), 32)
    predictor = EpsPredictor(backbone.network, backbone.prior.schedule)
    predictor.raw = lambda latents, timesteps, conditions: latents.sin()  # type: ignore[method-assign]
    generator = OneStepGenerator(predictor)
    image = picture(608, 544)  # more than 128 latents, a tile of the autoencoder
    with torch.inference_mode():
        coarse_levels = coarse(images_to_tensor([image]) * 0.5 + 0.5).mul(255).round().div(255)
        prompt_conditions = backbone.conditions([""], torch.zeros(1, 6))
        whole = tensor_to_images(backbone.decode(generator(backbone.encode(coarse_levels * 2 - 1), prompt_conditions)))[
            0
        ]
    sides: set[int] = set()
    for name in ("encode", "decode"):
        call = getattr(backbone.autoencoder, name)
        monkeypatch.setattr(backbone.autoencoder, name, lambda x, call=call: sides.add(max(x.shape[-2:])) or call(x))
    monkeypatch.setattr("components.systems.instarevive.restorer.COARSE_TILE_PX", 128)
    tiled = restore(InstaReviveRestorer(generator, backbone, coarse), image, tile_px=128, color="none")
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    assert sides and 608 not in sides and 152 not in sides


def test_pixels_outside_the_mask_keep_their_latents() -> None:
    predictor = tiny_predictor()
    backbone = dit_backbone(predictor)
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), backbone)
    image = np.minimum(picture(64, 64), 250)
    image[16:32, 16:48] = 255
    mask = np.zeros_like(image)
    mask[16:32, 16:48] = 255
    by_white = restore(restorer, image, inpaint="white")
    assert np.array_equal(by_white, restore(restorer, image, inpaint="reference", mask=mask))
    other_image = image.copy()
    other_image[16:32, 16:48] = picture(
        16, 32
    )  # the networks must not see pixels under the mask, which are not white in most pictures
    for size in (None, (96, 96)):
        ask = {"key": "k", "reference": mask, "size": size, "options": {"inpaint": "reference"}}
        results = restorer.restore([Request(image=source, **ask) for source in (image, other_image)])
        assert np.array_equal(results[0].image, results[1].image)
    with torch.inference_mode():
        input_latents = backbone.encode(images_to_tensor([image]))
    decoder_inputs: list[Tensor] = []
    decode = restorer.fast.decode
    restorer.fast.decode = lambda latents: decoder_inputs.append(latents) or decode(latents)  # type: ignore[method-assign, func-returns-value]
    for preset in ("default", "released"):
        restore(restorer, image, inpaint="white", preset=preset, min_side_px=0)
        same = (decoder_inputs[-1] == input_latents).all(dim=1)[0]
        assert not same[2:4, 2:6].any() and same.sum() == 64 - 8
    with pytest.raises(SampleError, match="no missing pixel"):
        restore(restorer, picture(32, 32) // 2, inpaint="white")
    with pytest.raises(ValueError, match="give a reference"):
        restore(restorer, image, inpaint="reference")


def test_released_prompts_and_unknown_ones() -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor))
    image = picture(32, 32)
    results = [restore(restorer, image, text=text) for text in ("given", "photo", "face")]
    assert not np.array_equal(results[0], results[1]) and not np.array_equal(results[1], results[2])
    with pytest.raises(ValueError, match="no text encoder; usable prompts are"):
        restorer.restore([Request(key="k", image=image, prompt="a cat")])


def test_progress_and_cancellation() -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor))
    requests = [Request(key=str(i), image=picture(32, 32, i)) for i in range(3)]
    events: list[StepEvent] = []
    restorer.restore(requests, on_step=events.append)
    assert [(e.step, e.of) for e in events] == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(Cancellation):
        restorer.restore(requests, cancelled=lambda: len(events) > 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"windw": "equal"}, 'Did you mean "window"'),
        ({"window": "cosine"}, "gaussian, equal"),
        ({"tile_px": 10}, "between 16 and 8192"),
        ({"tile_overlap": 0.95}, "between 0 and 0.9"),
        ({"min_side_px": -1}, "between 0 and 4096"),
        ({"coarse": 3}, "true or false"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_options(options)


def test_bad_pictures_are_refused() -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor))
    with pytest.raises(SampleError, match="bad_image"):
        restore(restorer, np.zeros((8, 8), dtype=np.uint8))
    with pytest.raises(SampleError, match="bad_size"):
        restorer.restore([Request(key="k", image=picture(8, 8), size=(0, 3))])
    with pytest.raises(ValueError, match="batch_size"):
        InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor), batch_size=0)


def test_released_windows() -> None:
    assert windows(12, 16, 8, 4) == [(t, l, 8, 8) for t in (0, 4) for l in (0, 4, 8)]  # noqa: E741
    assert windows(6, 21, 8, 7) == [(0, left, 6, 8) for left in (0, 7, 13)]
    with pytest.raises(ValueError, match="stride"):
        windows(8, 8, 4, 5)


# -- model folders and speed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [OneStep(), OneStep(input="noise", kernel=3, timestep=300)])
def test_a_model_folder_restores_as_the_networks_did(step: OneStep, tmp_path: Path) -> None:
    backbone = open_backbone("nano")
    generator = OneStepGenerator(backbone.predictor(trainable=True), step)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    card = ModelCard(
        name="tiny",
        system="instarevive",
        recipe={"restore_options": {"color": "adain"}},
        prior=backbone.source,
        config=generator_config(backbone, generator),
    )
    model = save_model(tmp_path / "model", card, generator_parts(generator))
    restorer = build_restorer(model)
    assert restorer.defaults.color == "adain"
    direct = InstaReviveRestorer(generator, backbone, defaults={"color": "adain"})
    image = picture(64, 48)
    assert np.array_equal(restore(restorer, image, seed=4), restore(direct, image, seed=4))
    half = build_restorer(model, precision="bf16", color="none", speed={"channels_last": "on"})
    assert np.abs(restore(half, image).astype(int) - restore(restorer, image, color="none")).mean() < 6
    with pytest.raises(ValueError, match='Did you mean "compile"'):
        build_restorer(model, speed={"compil": "off"})
    with pytest.raises(ModelError, match="not a coarse restorer"):
        build_restorer(model, coarse_model="nano")
    broken = save_model(tmp_path / "broken", card, {"generator": {"x": torch.zeros(1)}})
    with pytest.raises(ModelError, match=r"\d+ missing: .*\d+ unexpected: "):
        build_restorer(broken)


def test_embeddings_are_cached_and_can_train(tmp_path: Path) -> None:
    backbone = nano_backbone()
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).expand(2, -1)
    with torch.inference_mode():
        first = backbone.conditions(["red", "blue"], sizes)
    again = backbone.conditions(["red", "red"], sizes)
    assert torch.equal(again.text[0], first.text[0]) and torch.equal(again.text[0], again.text[1])
    conv = aligning_conv(12).requires_grad_(True)
    predictor = backbone.predictor(trainable=True)
    latents = conv(torch.randn(2, 24, 16, 16, generator=torch.Generator().manual_seed(0)))
    predictor.predict_eps(latents, torch.tensor([5, 5]), again).sum().backward()
    assert conv.weight.grad is not None


def test_speed_settings_are_checked() -> None:
    predictor = tiny_predictor()
    backbone = dit_backbone(predictor)
    with pytest.raises(ValueError, match="compile must be one of"):
        Speed(compile="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a CUDA device"):
        FastOneStep(OneStepGenerator(predictor), backbone, Speed(graphs="on"))


@pytest.mark.slow
@pytest.mark.full
def test_compiled_blocks_compute_the_same() -> None:
    predictor = tiny_predictor()
    backbone, image = dit_backbone(predictor), picture(64, 64)
    plain = restore(InstaReviveRestorer(OneStepGenerator(predictor), backbone), image)
    fast = InstaReviveRestorer(OneStepGenerator(predictor), backbone, speed=Speed(compile="blocks"))
    assert np.abs(restore(fast, image).astype(int) - plain).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 5), (7, 5)])
def test_any_shape_from_one_pixel_is_restored(size: tuple[int, int]) -> None:
    predictor = tiny_predictor()
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), dit_backbone(predictor), Coarse(Darker(), 32))
    for options in ({}, {"preset": "released", "min_side_px": 32, "tile_px": 128}, {"color": "wavelet"}):
        assert restore(restorer, picture(*size), **options).shape == (*size, 3)
