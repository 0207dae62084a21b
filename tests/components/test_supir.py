"""SUPIR at a tiny size with an untrained SDXL-shaped prior: losses by hand, conditions, restorer, long prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor

from components.captions.views import find_view
from components.models import ModelCard, ModelError, save_model
from components.priors.conditions import SizedConditions
from components.priors.fast_unet import Speed
from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.randomness import Noise, generator
from components.recipes import RecipeError
from components.residence import Residence
from components.samplers.edm import between, edm_sigmas, nearest_index
from components.systems import SYSTEMS, build_restorer
from components.systems.recipes import load_recipe
from components.systems.supir.build import adaptor_objective, encoder_objective, look, network_of
from components.systems.supir.config import AdaptorConfig, adaptor_config
from components.systems.supir.connectors import ZeroConv, ZeroCrossAttn, ZeroSFT
from components.systems.supir.network import ADAPTOR, ENCODER, Adaptor, Supir
from components.systems.supir.objectives import AdaptorObjective
from components.systems.supir.options import PRESETS, Options, check_options, parse_options
from components.systems.supir.released import RELEASE_DEFAULTS
from components.systems.supir.restorer import SupirRestorer
from components.systems.supir.texts import NEGATIVE, POSITIVE, positive_text, tile_captions
from components.types import Batch, Cancellation, Request, SampleError, StepEvent

TINY = load_helper("components/test_instantir.py").TINY
WORDS = ["red", "blue", "sky", "green", "dog", "cat", "low", "quality"]


def make_prior() -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(TINY, build_tokenizer_json(WORDS, TINY["text_length"]))
    return prior.freeze()


def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(generator(5, name).standard_normal(shape).astype(np.float32))


def make_network(config: AdaptorConfig | None = None, trained: bool = True) -> Supir:
    """Networks whose zero layers are not zero, if `trained`."""
    prior = make_prior()
    network = Supir(prior, RobustEncoder(prior.autoencoder), Adaptor(prior.unet, config or AdaptorConfig()))
    if trained:
        for name, parameter in [*network.adaptor.named_parameters(), *network.encoder.named_parameters()]:  # type: ignore[union-attr]
            parameter.data.add_(0.03 * tensor(name, *parameter.shape))
    return network


def picture(height: int, width: int, name: str = "p") -> np.ndarray:
    return generator(9, name).integers(0, 256, (height, width, 3)).astype(np.uint8)


def make_batch(size: int = 3, side: int = 16, **more: Any) -> Batch:
    return Batch(
        keys=tuple("abc"[:size]),
        positions=np.arange(size),
        hq=tensor("hq", size, 3, side, side).clamp(-1, 1),
        lq=tensor("lq", size, 3, side, side).clamp(-1, 1),
        prompts=("red sky", "blue", "low quality")[:size],
        plans=({},) * size,
        sizes=torch.tensor([[side, side, 0, 0, side, side]] * size),
        **more,
    )


def test_weights_in_8_bits_restore_nearly_as_bf16_does(tmp_path: Path) -> None:
    """On the nano prior, whose weights are large enough. Other systems refuse fp8."""
    untrained = load_helper("benchmarks/untrained.py")
    model = untrained.save_untrained("supir", tmp_path / "supir", steps=2)
    request = Request(key="p", image=picture(64, 64), seed=1)
    images = {}
    for precision in ("bf16", "fp8"):
        restorer = build_restorer(model.path, precision=precision)
        dtypes = {p.dtype for p in restorer.network.prior.unet.parameters()}  # type: ignore[attr-defined]
        assert (torch.float8_e4m3fn in dtypes) == (precision == "fp8")
        images[precision] = restorer.restore([request])[0].image.astype(float)
    difference = np.abs(images["fp8"] - images["bf16"])
    assert 0 < difference.mean() < 4
    other = untrained.save_untrained("instantir", tmp_path / "instantir")
    with pytest.raises(ModelError, match="does not run in fp8, but in fp32, bf16, fp16"):
        build_restorer(other.path, precision="fp8")


# ------------------------------------------------------------------------------------------------------------- adaptor


def test_a_new_adaptor_ignores_lq_and_a_scale_of_zero_is_the_prior() -> None:
    network = make_network(trained=False)
    latents, other = tensor("z", 2, 4, 8, 8), tensor("o", 2, 4, 8, 8)
    t = torch.tensor([10, 500])
    conditions = AdaptorObjective(network).conditions(make_batch(2), Noise(0, np.arange(2)))
    with torch.no_grad():
        eps = [network.predict_eps(latents, t, lq, conditions) for lq in (latents, other)]
        plain = network.prior.unet(
            latents,
            t,
            conditions.text,
            added_cond_kwargs={"text_embeds": conditions.pooled, "time_ids": conditions.time_ids},
        ).sample
        nothing = network.predict_eps(latents, t, other, conditions, 0.0)
    assert torch.equal(eps[0], eps[1])  # the input convolution of LQ is zero
    torch.testing.assert_close(nothing, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(eps[0], plain, atol=1e-4)  # the norm of a new connector changes the prior's function


def test_connectors_by_hand() -> None:
    control, skip, decoder = tensor("c", 2, 8, 5, 6), tensor("s", 2, 4, 5, 6), tensor("d", 2, 12, 5, 6)
    sft = ZeroSFT(8, 4, 12, 4)
    for name, parameter in sft.named_parameters():
        parameter.data.add_(0.3 * tensor(name, *parameter.shape))
    raw = torch.cat([decoder, skip], 1)
    inner = torch.cat([decoder, skip + sft.zero_conv(control)], 1).view(2, 4, -1)
    mean, variance = inner.mean(2, keepdim=True), inner.var(2, unbiased=False, keepdim=True)
    norm = ((inner - mean) / (variance + 1e-5).sqrt()).view_as(raw)
    norm = norm * sft.param_free_norm.weight.view(1, -1, 1, 1) + sft.param_free_norm.bias.view(1, -1, 1, 1)
    hidden = sft.mlp_shared[0](control)
    hidden = hidden * torch.sigmoid(hidden)
    expected = norm * (1 + sft.zero_mul(hidden)) + sft.zero_add(hidden)
    torch.testing.assert_close(sft(control, skip, decoder), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sft(control, skip, decoder, 0.3), 0.3 * expected + 0.7 * raw, rtol=1e-4, atol=1e-5)
    assert torch.equal(sft(control, skip, decoder, 0.0), raw)
    number = torch.tensor(0.3)
    torch.testing.assert_close(sft(control, skip, decoder, number), sft(control, skip, decoder, 0.3))
    plain = ZeroConv(8, 4)
    assert torch.equal(plain(control, skip, decoder), raw)
    cross = ZeroCrossAttn(8, 12, 4)
    assert not torch.allclose(cross(control, decoder), decoder, atol=1e-4)  # not zero at first, despite its name
    assert torch.equal(cross(control, decoder, 0.0), decoder)
    moved = cross(control, decoder, 0.5) - decoder
    torch.testing.assert_close(2 * moved, cross(control, decoder) - decoder, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [AdaptorConfig(connector="zero_conv"), AdaptorConfig(cross_attention=False, transformer_depth=(1, 1))]
)
def test_other_adaptors_work_and_their_folders_load(config: AdaptorConfig, tmp_path: Any) -> None:
    network = make_network(config)
    assert network.adaptor is not None
    depth = len(network.adaptor.control.down_blocks[1].attentions[0].transformer_blocks)  # type: ignore[union-attr, arg-type, index]
    assert depth == (1 if config.transformer_depth else 2)
    card = ModelCard(name="s", system="supir", config=network.config(), prior={"id": "x", "digest": ""})
    model = save_model(tmp_path / "m", card, network.parts())
    again = network_of(model, make_prior())
    conditions = AdaptorObjective(network).conditions(make_batch(1), Noise(0, np.arange(1)))
    latents, t = tensor("z", 1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        assert torch.equal(
            network.predict_eps(latents, t, latents, conditions), again.predict_eps(latents, t, latents, conditions)
        )
    wrong = dict(network.parts()[ADAPTOR])
    wrong.pop(next(iter(wrong)))
    broken = save_model(tmp_path / "w", card, {**network.parts(), ADAPTOR: wrong})
    with pytest.raises(ModelError, match="do not fit"):
        network_of(broken, make_prior())


def test_the_adaptors_loss_by_hand_and_what_trains() -> None:
    network, batch = make_network(), make_batch()
    objective = AdaptorObjective(network, text_dropout=0.5)
    noise = Noise(3, batch.positions)
    ((name, loss),) = objective.phases(batch, noise)
    prior = network.prior
    dropped = noise.uniform("conditions") < 0.5
    prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
    assert 0 < int(dropped.sum()) < 3
    text, pooled = prior.embed_prompts(prompts)
    conditions = SizedConditions(text=text, pooled=pooled, time_ids=batch.sizes.float())
    t, eps = noise.integers("timestep", 0, 1000), noise.normal("noise", (4, 4, 4))
    alpha = prior.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * prior.encode(batch.hq) + (1 - alpha).sqrt() * eps
    expected = (network.predict_eps(noisy, t, network.encoder(batch.lq), conditions) - eps).square().mean()
    assert name == ADAPTOR and float(loss.value) == pytest.approx(float(expected), rel=1e-5)
    loss.value.backward()
    assert network.adaptor is not None
    lacking = [n for n, p in network.adaptor.named_parameters() if p.grad is None or not p.grad.any()]
    assert not lacking, f"no gradient: {lacking}"
    for frozen in (*prior.modules.values(), network.encoder):
        assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())
    assert set(objective.parts()) == {ENCODER, ADAPTOR}


def test_checkpointing_gives_the_same_gradients() -> None:
    from components.priors.block_calls import recompute

    gradients = []
    for again in (False, True):
        network, batch = make_network(), make_batch()
        if again:
            network.blocks = network.blocks.wrap_all(recompute)
        ((_, loss),) = AdaptorObjective(network).phases(batch, Noise(3, batch.positions))
        loss.value.backward()
        gradients.append([p.grad for p in network.adaptor.parameters()])  # type: ignore[union-attr]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_frozen_prior_in_half_precision_trains_an_adaptor_in_full_precision(precision: str, tmp_path: Path) -> None:
    """Without autocast, as held-out losses and samples are computed; continuing keeps the weights' bits."""
    recipe = load_recipe("supir-adaptor-nano", [f"frozen_precision={precision}", "restore_options.steps=1"])
    encoder = encoder_objective(load_recipe("supir-encoder-nano"), {})  # type: ignore[arg-type]
    card = ModelCard(name="e", system="supir", config=encoder.config, prior=encoder.prior.source)
    start = save_model(tmp_path / "e", card, encoder.parts())
    objective = adaptor_objective(recipe, {"encoder": start})  # type: ignore[arg-type]
    assert objective.network.dtype != torch.float32
    assert {p.dtype for p in objective.trainables[ADAPTOR].parameters()} == {torch.float32}
    own = dict(objective.network.adaptor.control.named_parameters())["conv_in.weight"]  # type: ignore[union-attr]
    unet = dict(make_nano().unet.named_parameters())["conv_in.weight"]
    assert torch.equal(own, unet)  # not rounded on the way
    if precision == "bf16":  # the CPU has no fp16 convolutions worth waiting for
        batch = make_batch(1, 32)
        ((_, loss),) = objective.phases(batch, Noise(0, batch.positions))
        loss.value.backward()
        assert torch.isfinite(loss.value)
        images = look(objective, recipe, batch.lq, batch.prompts, 0)  # type: ignore[arg-type]
        assert images.shape == batch.lq.shape
    card = ModelCard(name="a", system="supir", config=objective.config, prior=objective.prior.source)
    for parameter in objective.trainables[ADAPTOR].parameters():
        parameter.data.add_(1e-5)
    trained = save_model(tmp_path / "a", card, objective.parts())
    again = adaptor_objective(recipe, {"adaptor": trained})  # type: ignore[arg-type]
    for mine, theirs in zip(
        again.trainables[ADAPTOR].parameters(), objective.trainables[ADAPTOR].parameters(), strict=True
    ):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
    with pytest.raises(ModelError, match="leave the recipe's adaptor out"):
        adaptor_objective(
            load_recipe("supir-adaptor-nano", ["adaptor.cross_attention=false"]),
            {"adaptor": trained},  # type: ignore[arg-type]
        )
    wrong = load_recipe("supir-adaptor-nano", ["adaptor.transformer_depth=[1, 1]"])
    with pytest.raises(ModelError, match="needs 3 numbers"):
        adaptor_objective(wrong, {"encoder": start})  # type: ignore[arg-type]
    assert set(encoder_objective(load_recipe("supir-encoder-nano"), {"adaptor": trained}).parts()) == {ENCODER}  # type: ignore[arg-type]


def make_nano() -> Prior:
    from components.priors.opening import load_prior

    return load_prior("nano")


# -------------------------------------------------------------------------------------------------------------- texts


def test_a_long_prompt_is_encoded_in_pieces() -> None:
    prior = make_prior()  # four words fit between start and end
    short, long = "red sky", "red blue sky green dog cat"
    assert (prior.prompt_chunks(""), prior.prompt_chunks(short), prior.prompt_chunks(long)) == (1, 1, 2)
    text, pooled = prior.embed_long_prompts([short, long], 2)
    first, first_pooled = prior.embed_prompts(["red blue sky green"])
    second, _ = prior.embed_prompts(["dog cat"])
    torch.testing.assert_close(text[1:], torch.cat([first, second], 1))
    torch.testing.assert_close(pooled[1:], first_pooled)
    own, empty = prior.embed_prompts([short, ""])[0].split(1)
    torch.testing.assert_close(text[:1], torch.cat([own, empty], 1))
    assert torch.equal(prior.embed_long_prompts([short], 1)[0], prior.embed_prompts([short])[0])


def test_texts_of_quality() -> None:
    assert positive_text("a dog", "none") == "a dog"
    assert positive_text("a dog", "released").startswith("a dog, Cinematic, High")
    assert positive_text("a dog", "released", joined=False).startswith("a dogCinematic")
    assert "unreal engine" in POSITIVE["paper"] and "unreal engine" not in POSITIVE["released"].lower()
    assert "unreal engine" in NEGATIVE["released"] and "unreal engine" not in NEGATIVE["paper"]
    assert tile_captions(" a | b|") == ["a", "b", ""] and tile_captions(" ") == []


# ------------------------------------------------------------------------------------------------------------ restorer

QUICK = {"steps": 2, "positive_words": "none", "negative_words": "none"}


def test_pictures_of_any_size_are_restored_alike_in_any_company() -> None:
    network = make_network()
    requests = [
        Request(key="a", image=picture(18, 30), seed=1, prompt="red", options=QUICK),
        Request(key="b", image=picture(16, 16), seed=2, options={**QUICK, "tau": 4.0}),
        Request(key="c", image=picture(18, 30, "q"), seed=3, prompt="red blue sky green dog", options=QUICK),
    ]
    events: list[StepEvent] = []
    answers = SupirRestorer(network, batch_size=3).restore(requests, on_step=events.append)
    assert [answer.key for answer in answers] == ["a", "b", "c"]
    again = SupirRestorer(network).restore(requests)
    for alone, request in zip(again, requests, strict=True):  # in batches of one, the same bytes
        assert np.array_equal(alone.image, SupirRestorer(network).restore([request])[0].image)
    assert [answer.image.shape for answer in answers] == [(18, 30, 3), (16, 16, 3), (18, 30, 3)]
    assert [(e.step, e.of) for e in events] == [(n, 6) for n in range(1, 7)]
    assert answers[0].info["system"] == "supir" and answers[1].info["tau"] == "4.0"
    for answer, request in zip(answers, requests, strict=True):
        alone = SupirRestorer(network).restore([request])[0].image
        assert np.abs(alone.astype(int) - answer.image).max() <= 1
    twins = [replace_key(requests[0], "x"), Request(key="y", image=picture(18, 30, "q"), seed=7, options=QUICK)]
    both = SupirRestorer(network, batch_size=2).restore(twins)
    assert np.abs(both[0].image.astype(int) - answers[0].image).max() <= 1


def replace_key(request: Request, key: str) -> Request:
    return Request(key=key, image=request.image, seed=request.seed, prompt=request.prompt, options=request.options)


def test_one_step_without_guidance_by_hand() -> None:
    """The whole chain of a restoration of one step: encode, noise, denoise at the snapped level, pull, decode."""
    network, image = make_network(), picture(16, 24)
    options = {**QUICK, "steps": 1, "cfg_scale": 1.0, "churn": 0.0, "tau": 2.0, "control_scale": 0.8, "color": "none"}
    restorer = SupirRestorer(network)
    table, prior = restorer.table, network.prior
    sigma = edm_sigmas(table, 1)[0]
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        lq = network.encoder(pixels)
        noise = torch.from_numpy(generator(4, "start").standard_normal((4, 4, 6), dtype=np.float32))[None]
        latents = noise * (1 + sigma**2).sqrt()
        t = nearest_index(table, sigma[None])
        text, pooled = prior.embed_prompts(["red"])
        conditions = SizedConditions(text=text, pooled=pooled, time_ids=torch.tensor([[16.0, 24, 0, 0, 16, 24]]))
        eps = network.predict_eps(latents / (1 + sigma**2).sqrt(), t, lq, conditions, 0.8)
        # the only step ends at 0, where the released rule does not pull
        expected = prior.decode(latents - sigma * eps)
    answer = restorer.restore([Request(key="k", image=image, seed=4, prompt="red", options=options)])[0].image
    levels = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(levels - answer).max() <= 1
    paper = restorer.restore(
        [Request(key="k", image=image, seed=4, prompt="red", options={**options, "algorithm": "paper"})]
    )[0].image
    with torch.no_grad():
        first = prior.decode(lq)  # as printed the last step is pulled too, here wholly
    levels = ((first[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(levels - paper).max() <= 1


def test_two_guided_steps_by_hand() -> None:
    """Both ramps, the pull to the latents of the first restoration, and the Euler step."""
    network, image, sigma_max = make_network(), picture(16, 24), 14.614641
    options = {**QUICK, "cfg_scale": 2.0, "cfg_start": 1.5, "control_scale": 0.9, "control_start": 0.4}
    options |= {"churn": 0.0, "tau": 1.5, "color": "none"}
    restorer = SupirRestorer(network)
    table, prior = restorer.table, network.prior
    sigmas = edm_sigmas(table, 2)
    with torch.no_grad():
        lq = network.encoder(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
        target = prior.encode(prior.decode(lq))
        z = torch.from_numpy(generator(4, "start").standard_normal((4, 4, 6), dtype=np.float32))[None]
        z = z * (1 + sigmas[0] ** 2).sqrt()
        ids = torch.tensor([[16.0, 24, 0, 0, 16, 24]])
        for step in range(2):
            sigma, t = sigmas[step], nearest_index(table, sigmas[step][None])
            share = float(sigma) / sigma_max
            clean = []
            for prompt in ("dog", "red"):  # the negative first
                text, pooled = prior.embed_prompts([prompt])
                conditions = SizedConditions(text=text, pooled=pooled, time_ids=ids)
                x = z / (1 + sigma**2).sqrt()
                clean.append(z - sigma * network.predict_eps(x, t, lq, conditions, 0.9 + (0.4 - 0.9) * share))
            d = clean[0] + (2.0 + (1.5 - 2.0) * share) * (clean[1] - clean[0])
            if step == 0:
                d = d - (d - target) * share**1.5
            z = z + (z - d) / sigma * (sigmas[step + 1] - sigma)
        expected = prior.decode(z)
    request = Request(key="k", image=image, seed=4, prompt="red", negative_prompt="dog", options=options)
    levels = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(levels - restorer.restore([request])[0].image).max() <= 1


def test_guidance_and_texts_reach_the_result() -> None:
    network = make_network()
    restorer, image = SupirRestorer(network), picture(16, 16)

    def run(prompt: str = "", negative: str = "", **options: Any) -> np.ndarray:
        request = Request(
            key="k", image=image, seed=1, prompt=prompt, negative_prompt=negative, options={**QUICK, **options}
        )
        return restorer.restore([request])[0].image

    plain = run()
    assert not np.array_equal(run(prompt="red"), plain)
    assert not np.array_equal(run(negative="low quality"), plain)
    off = {"cfg_scale": 1.0, "cfg_start": -1.0}
    assert np.array_equal(run(negative="low quality", **off), run(**off))  # without guidance it has no effect
    assert not np.array_equal(run(control_scale=0.5), plain)
    assert np.array_equal(run(control_scale=1.0, control_start=1.0), plain)
    for sampler in ("dpmpp2m", "substep"):
        assert run(sampler=sampler).shape == image.shape
    assert not np.array_equal(run(churn=0.0), plain) and not np.array_equal(run(sizes="released"), plain)
    pulled = run(tau=0.5, color="none")
    assert not np.array_equal(run(tau=0.5, color="none", encoding="sample"), run(color="none"))
    assert np.abs(pulled.astype(int) - run(color="none")).max() > 1
    for how in ({"tau": 0.5}, {}):  # the first restoration is there in both cases, but only one takes its colours
        assert not np.array_equal(run(color_from="lq", **how), run(**how))
    assert run(min_side_px=24).shape == image.shape


@pytest.mark.full
def test_the_released_forms_restore_at_their_sizes() -> None:
    restorer, image = SupirRestorer(make_network()), picture(16, 20)
    for options in ({"preset": "released"}, {"preset": "fidelity", "resize": "page"}, {"preset": "lightning"}):
        answer = restorer.restore([Request(key="k", image=image, seed=1, options={**options, **QUICK})])[0].image
        assert answer.shape == image.shape


def test_tiles_with_captions_of_their_own() -> None:
    restorer, image = SupirRestorer(make_network()), picture(64, 160)
    options = {**QUICK, "tile_px": 64, "color": "none"}

    def run(text: str) -> np.ndarray:
        request = Request(key="k", image=image, seed=1, prompt="red", options={**options, "tile_prompts": text})
        return restorer.restore([request])[0].image

    same, left = run("red|red|red"), run("blue|red|red")
    assert np.array_equal(run(""), same)
    changed = np.abs(left.astype(int) - same).max(axis=(0, 2))
    assert changed[:20].max() > 0 and changed[-20:].max() == 0  # the last tile does not see the first one's text
    with pytest.raises(SampleError, match="2 tile_prompts for a picture of 3 tiles"):
        run("red|red")


def test_the_first_restoration_is_what_a_captioner_sees() -> None:
    network, image = make_network(), picture(18, 30)
    first = SupirRestorer(network).preview(Request(key="k", image=image))
    assert find_view("coarse", SYSTEMS["supir"].views)(hq=None, lq=image, preview=first) is first
    assert first is not None and first.shape == image.shape
    with torch.no_grad():
        padded = np.pad(
            image, ((0, -18 % network.prior.multiple_px), (0, -30 % network.prior.multiple_px), (0, 0)), "reflect"
        )
        pixels = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected = network.prior.decode(network.encoder(pixels))
    levels = ((expected[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()[:18, :30]
    assert np.abs(levels - first).max() <= 1


def test_networks_in_turns_give_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase has its networks on the device, which here is the CPU under another name."""
    request = Request(key="k", image=picture(16, 16), seed=1, prompt="red", options={**QUICK, "tau": 2.0})
    plain = SupirRestorer(make_network(), speed=Speed(join=False)).restore([request])[0].image
    phases: list[str] = []
    inner = Residence.phase

    def phase(self: Residence, name: str) -> Any:
        phases.append(name)
        return inner(self, name)

    monkeypatch.setattr(Residence, "phase", phase)
    network = make_network()
    turns = SupirRestorer(network, speed=Speed(join=False, graphs="off"), device="cpu", offload=True)
    assert np.array_equal(turns.restore([request])[0].image, plain)
    assert phases == ["pictures", "texts", "steps", "pictures"]
    with pytest.raises(ValueError, match="join=false"):
        SupirRestorer(network, offload=True)


def test_a_cancelled_restoration_ends() -> None:
    calls = iter([False, True])
    with pytest.raises(Cancellation):
        SupirRestorer(make_network()).restore(
            [Request(key="k", image=picture(16, 16), options=QUICK)], cancelled=lambda: next(calls)
        )


def test_bad_pictures_name_themselves() -> None:
    restorer = SupirRestorer(make_network())
    with pytest.raises(SampleError, match="bad_image") as raised:
        restorer.restore([Request(key="gray", image=np.zeros((4, 4), np.uint8))])
    assert raised.value.key == "gray"


# --------------------------------------------------------------------------------------------------- options, recipes


def test_presets_are_options() -> None:
    for name in PRESETS:
        for defaults in (Options(), parse_options(RELEASE_DEFAULTS, Options())):
            assert parse_options({"preset": name}, defaults).preset == name
    assert parse_options({"preset": "paper"}, parse_options(RELEASE_DEFAULTS, Options())).resize == "native"
    assert parse_options({"preset": "paper"}, Options()).tau == 4
    assert parse_options({"preset": "paper", "tau": 6}, Options()).tau == 6
    assert parse_options({"preset": "advice-5"}, Options()).cfg_ends == (2.0, 5.0)
    assert parse_options({"preset": "lightning"}, Options()).cfg_ends == (2.0, 2.0)
    level = torch.tensor(14.6146)
    assert float(between(level, 14.6146, 1.0, 4.0)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"step": 3}, "steps"),
        ({"steps": 0}, "between 1"),
        ({"sampler": "substep", "steps": 5}, "between 1 and 4"),
        ({"tau": -1}, "at least 0"),
        ({"cfg_start": -2}, "or -1"),
        ({"resize": "released", "min_side_px": 64}, "leave min_side_px out"),
        ({"positive_words": "good"}, "one of none"),
        ({"tile_prompts": 3}, "must be text"),
        ({"preset": "best"}, "one of default"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        check_options(options)


def test_recipes_have_the_papers_numbers() -> None:
    recipe = load_recipe("supir-adaptor")
    assert (recipe.batch_size, recipe.resolution, recipe.optimizer.lr, recipe.placement.workers) == (256, 512, 1e-5, 64)
    assert recipe.mixture == "supir"
    for name in ("supir-encoder", "supir-adaptor", "supir-adaptor-node"):
        recipe = load_recipe(name)
        assert (recipe.system, recipe.resolution, recipe.short_side, recipe.optimizer.lr) == ("supir", 512, 1024, 1e-5)
        assert recipe.degradation.preset == "supir"
    for name in ("supir-encoder-nano", "supir-adaptor-nano"):
        assert load_recipe(name).prior == "nano"


@pytest.mark.parametrize(
    ("stage", "override", "word"),
    [
        ("encoder", "anchor=printed", "keep=0"),
        ("encoder", "text_dropout=0.1", "for stage adaptor"),
        ("adaptor", "adaptor.connector=plain", "connector must be"),
        ("adaptor", "adaptor.depth=[1]", "unknown adaptor settings"),
        ("adaptor", "restore_options.step=1", "steps"),
        ("adaptor", "keep=0", "for stage encoder"),
    ],
)
def test_wrong_recipes_die_at_once(stage: str, override: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        load_recipe(f"supir-{stage}-nano", [override])
    assert adaptor_config({}).connector == "zero_sft"
