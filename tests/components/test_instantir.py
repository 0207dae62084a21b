"""InstantIR's parts, objectives and restorer at a tiny size, with an untrained SDXL-shaped prior."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from components.images import pad_to_multiple
from components.objectives.consistency import boundary_scalings, consistency_output, pseudo_huber
from components.objectives.diffusion import drop_conditions
from components.options import UnknownOption
from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.sdxl import Prior
from components.randomness import Noise, generator
from components.samplers.schedules import Schedule
from components.systems.instantir.aggregator import Aggregator
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.network import Conditions, InstantIR, predict_noise
from components.systems.instantir.objectives import AggregatorObjective, PerceptorObjective, PreviewerObjective
from components.systems.instantir.options import LoopSettings, Options, check_options, parse_options
from components.systems.instantir.perceptor import ResamplerConfig, install_perceptor, perceptor_of
from components.systems.instantir.previewer import install_previewer, previewer_enabled, previewer_of
from components.systems.instantir.restorer import InstantIRRestorer
from components.types import Batch, Cancellation, Request, SampleError, StepEvent

TINY: dict[str, Any] = {
    "autoencoder": {"factor": 4, "latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
    "text_encoder": {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_length": 6,
    "image_encoder": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 16,
    },
    "view": {"shortest_edge_px": 16, "crop_px": 16, "fit": "squash"},
    "schedule": {},
}
RESAMPLER = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}
LORA = {"rank": 2, "alpha": 1}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture
def make_prior() -> Callable[[], Prior]:
    def make() -> Prior:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prior = build_prior(TINY, build_tokenizer_json(["red", "blue", "sky"], TINY["text_length"]))
        return prior.freeze()

    return make


@pytest.fixture
def network(make_prior: Callable[[], Prior]) -> InstantIR:
    """A network with all parts, where layers that start at zero have other values."""
    network = InstantIR(make_prior(), RESAMPLER, LORA, aggregator=True)
    randomize_zeros(network)
    return network


@torch.no_grad()
def randomize_zeros(network: InstantIR) -> None:
    modules = [network.prior.unet, *([network.aggregator] if network.aggregator is not None else [])]
    for module in modules:
        for name, parameter in module.named_parameters():
            if not bool(parameter.any()):
                values = generator(5, name).standard_normal(tuple(parameter.shape), dtype=np.float32)
                parameter.copy_(0.1 * torch.from_numpy(values))


def tensor(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(1, name).standard_normal(shape, dtype=np.float32))


def batch(size: int = 3, first: int = 0) -> Batch:
    pictures = torch.stack([tensor(3, 16, 16, name=f"picture {first + i}") for i in range(size)]).clamp(-1, 1)
    return Batch(
        keys=[f"p{first + i}" for i in range(size)],
        positions=np.arange(first, first + size),
        hq=pictures,
        lq=torch.nn.functional.avg_pool2d(pictures, 5, 1, 2),
        prompts=["red sky"] * size,
        sizes=torch.tensor([[16, 16, 0, 0, 16, 16]]).expand(size, -1),
    )


def make_conditions(network: InstantIR, size: int) -> Conditions:
    text, pooled = network.prior.embed_prompts(["red"] * size)
    return Conditions(
        text=text,
        pooled=pooled,
        time_ids=network.prior.time_ids(batch(size).sizes),
        image_tokens=network.prior.embed_images(batch(size).lq),
    )


def request(key: str = "a", seed: int = 3, size: tuple[int, int] | None = None, **options: Any) -> Request:
    image = generator(2, key).integers(0, 256, (13, 19, 3), dtype=np.uint8)
    return Request(key=key, image=image, seed=seed, prompt="red", size=size, options={"steps": 2, **options})


# ---------------------------------------------------------------------------------------------------------- modules


def test_parameter_counts_at_sdxl_size_are_the_published_files() -> None:
    """Counts of reference/instantir.md section 1; the published files have 4 bytes for each parameter."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        perceptor = install_perceptor(unet, ResamplerConfig())
        processors = sum(p.numel() for p in perceptor.ip_adapter.parameters())
        assert sum(p.numel() for p in perceptor.image_proj.parameters()) == 82_695_424
        assert processors == 767_104_000
        assert list(perceptor.ip_adapter)[:3] == ["1", "3", "5"]
        assert list(perceptor.ip_adapter)[-1] == "139"
        assert len(perceptor.ip_adapter) == 70
        lora = install_previewer(unet)
        assert sum(p.numel() for p in lora.parameters()) == 232_173_568
        assert len(lora.down) == 942
        assert sum(p.numel() for p in Aggregator.from_unet(unet).parameters()) == 1_004_809_280


def test_a_new_network_predicts_as_the_prior(make_prior: Callable[[], Prior]) -> None:
    """At the start LoRA and aggregator change nothing. The perceptor does: its weights start as the text's."""
    network = InstantIR(make_prior(), RESAMPLER, LORA, aggregator=True)
    latents, timesteps, conditions = tensor(2, 4, 4, 4), torch.tensor([3, 900]), make_conditions(network, 2)
    eps = network.denoise_eps(latents, timesteps, conditions)
    residuals = network.residuals(latents, timesteps, latents, conditions)
    assert not bool(residuals.mid.any())
    assert torch.equal(network.denoise_eps(latents, timesteps, conditions, residuals), eps)
    with previewer_enabled(network.unet):
        assert torch.equal(predict_noise(network.unet, latents, timesteps, conditions), eps)
    for processor in network.perceptor.ip_adapter.values():
        processor.scale = 0.0  # type: ignore[assignment]
    bare = make_prior().unet
    added_cond_kwargs = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    expected = bare(latents, timesteps, conditions.text, added_cond_kwargs=added_cond_kwargs).sample
    torch.testing.assert_close(network.denoise_eps(latents, timesteps, conditions), expected, atol=1e-5, rtol=0)


def test_every_part_has_an_effect(network: InstantIR) -> None:
    latents, timesteps, conditions = tensor(2, 4, 4, 4), torch.tensor([3, 900]), make_conditions(network, 2)
    eps = network.denoise_eps(latents, timesteps, conditions)
    residuals = network.residuals(tensor(2, 4, 4, 4, name="lq"), timesteps, latents, conditions)
    other = replace(conditions, image_tokens=conditions.image_tokens * 1.5)
    assert not torch.allclose(network.denoise_eps(latents, timesteps, other), eps)
    assert not torch.allclose(network.denoise_eps(latents, timesteps, conditions, residuals), eps)
    with previewer_enabled(network.unet):
        assert not torch.allclose(predict_noise(network.unet, latents, timesteps, conditions), eps)
    assert torch.equal(network.denoise_eps(latents, timesteps, conditions), eps), (
        "the LoRA's switch must restore its state"
    )


def test_the_lora_switch_preserves_gradients_of_earlier_calls(network: InstantIR) -> None:
    """peft's own switch changes requires_grad, so an existing graph would drop the LoRA's gradients."""
    lora = previewer_of(network.unet).requires_grad_(True)
    latents, timesteps, conditions = tensor(1, 4, 4, 4), torch.tensor([500]), make_conditions(network, 1)
    preview = network.preview(latents, timesteps, conditions)
    with torch.no_grad():
        network.denoise_eps(latents, timesteps, conditions)
    preview.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in lora.up.parameters())


def test_parts_loaded_into_another_network_give_the_same_bits(
    network: InstantIR, make_prior: Callable[[], Prior]
) -> None:
    prior = make_prior()
    prior.unet.load_state_dict(bare_weights(network))
    other = InstantIR.from_parts(prior, network.config(), network.parts())
    assert other.config() == network.config()
    latents, timesteps, conditions = tensor(1, 4, 4, 4), torch.tensor([500]), make_conditions(network, 1)
    assert torch.equal(network.preview(latents, timesteps, conditions), other.preview(latents, timesteps, conditions))
    ours, theirs = (n.residuals(latents, timesteps, latents, conditions) for n in (network, other))
    assert torch.equal(ours.mid, theirs.mid)


def bare_weights(network: InstantIR) -> dict[str, Tensor]:
    """The prior's weights from a UNet with perceptor and previewer."""
    state = {n.replace(".base_layer.", "."): v for n, v in network.unet.state_dict().items() if ".lora_" not in n}
    return {n: v for n, v in state.items() if ".processor." not in n and not n.startswith("encoder_hid_proj.")}


def test_the_loader_accepts_both_spellings(network: InstantIR) -> None:
    state = {n: v.clone() for n, v in network.parts()["previewer"].items()}
    assert any(".lora.down." in n for n in state), "attention projections have diffusers' older names"
    renamed_state = {
        n.removeprefix("unet.").replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): 2 * v
        for n, v in state.items()
    }
    network.load_parts({"previewer": renamed_state})
    assert all(torch.equal(v, 2 * state[n]) for n, v in network.parts()["previewer"].items())


@pytest.mark.parametrize("part", ["perceptor", "previewer", "aggregator"])
def test_weights_that_do_not_fit_are_all_listed_and_none_is_copied(part: str, network: InstantIR) -> None:
    state = {n: v.clone() + 1 for n, v in network.parts()[part].items()}
    before = {n: v.clone() for n, v in network.parts()[part].items()}
    missing, misshapen, *_ = list(state)
    del state[missing]
    state[misshapen] = torch.zeros(1, 2, 3)
    state["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing: .*1 unexpected: surprise; 1 of the wrong shape"):
        network.load_parts({part: state})
    assert all(torch.equal(v, before[n]) for n, v in network.parts()[part].items())


def test_wrong_parts_are_refused(network: InstantIR, make_prior: Callable[[], Prior]) -> None:
    parts = network.parts()
    del parts["previewer"]
    with pytest.raises(ValueError, match="got \\['aggregator', 'perceptor'\\]"):
        InstantIR.from_parts(make_prior(), network.config(), parts)
    with pytest.raises(ValueError, match="no such part 'generator'"):
        network.load_parts({"generator": {}})
    with pytest.raises(ValueError, match="already"):
        network.add_previewer()
    with pytest.raises(ValueError, match="installed once"):
        install_perceptor(network.unet, RESAMPLER)


def test_the_aggregator_copies_the_unet_without_its_parts(network: InstantIR, make_prior: Callable[[], Prior]) -> None:
    bare = make_prior().unet
    bare.load_state_dict(bare_weights(network))
    from_bare, from_whole = Aggregator.from_unet(bare), Aggregator.from_unet(network.unet)
    for (name, one), other in zip(from_bare.named_parameters(), from_whole.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(from_bare.ref_conv_in.weight, bare.conv_in.weight)
    assert not any("attn2" in n or ("norm2" in n and "transformer" in n) for n, _ in from_bare.named_parameters())


def test_the_aggregator_refuses_sides_that_it_cannot_halve(network: InstantIR) -> None:
    conditions, timesteps = make_conditions(network, 1), torch.tensor([5])
    with pytest.raises(ValueError, match="multiples of 2"):
        network.residuals(tensor(1, 4, 3, 4), timesteps, tensor(1, 4, 3, 4), conditions)
    with pytest.raises(ValueError, match="differ in shape"):
        network.residuals(tensor(1, 4, 4, 4), timesteps, tensor(1, 4, 4, 6), conditions)


def test_initial_weights_depend_on_the_seed_and_not_on_the_global_generator(make_prior: Callable[[], Prior]) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (InstantIR(make_prior(), RESAMPLER, LORA, True, seed=s).parts() for s in (1, 1, 2))
    assert not torch.equal(one["perceptor"]["image_proj.latents"], other["perceptor"]["image_proj.latents"])
    for part in one:
        assert all(torch.equal(one[part][n], same[part][n]) for n in one[part])
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- objectives


def test_boundary_scalings_are_the_identity_at_time_zero() -> None:
    skip, out = boundary_scalings(torch.tensor([0, 999]))
    assert skip[0] == 1.0
    assert out[0] == 0.0
    assert float(out[1]) == pytest.approx(1.0, abs=1e-6)
    x = tensor(1, 4, 2, 2)
    assert torch.equal(consistency_output(Schedule(), x, x * 3, torch.tensor([0])), x)


def test_huber_is_linear_for_large_and_square_for_small_distances() -> None:
    far, near = torch.full((1, 4), 10.0), torch.full((1, 4), 1e-4)
    assert float(pseudo_huber(far, torch.zeros(1, 4), 0.001)) == pytest.approx(9.999, abs=1e-3)
    assert float(pseudo_huber(near, torch.zeros(1, 4), 0.1)) == pytest.approx(1e-8 / 0.2, rel=0.2)


def test_dropout_uses_one_draw() -> None:
    u = torch.tensor([0.01, 0.06, 0.12, 0.5])
    drop = drop_conditions(u, 0.05, 0.05, 0.05)
    assert drop.image.tolist() == [True, False, True, False]
    assert drop.text.tolist() == [False, True, True, False]
    everything = drop_conditions(torch.tensor([0.0, 0.9, 1 - 2**-24]), 0.0, 0.85, 0.15)
    assert everything.text.all()
    assert everything.image.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="sum to at most 1"):
        drop_conditions(u, 0.5, 0.5, 0.5)


def stages() -> Iterator[Any]:
    yield pytest.param("perceptor", {}, id="perceptor")
    yield pytest.param("previewer", {}, id="previewer-released")
    yield pytest.param("previewer", {"huber_c": None, "guidance_range": None}, id="previewer-paper")
    yield pytest.param("aggregator", {}, id="aggregator")


def objective_of(stage: str, make_prior: Callable[[], Prior], settings: dict[str, Any]) -> Any:
    network = InstantIR(
        make_prior(), RESAMPLER, LORA if stage != "perceptor" else None, aggregator=stage == "aggregator"
    )
    randomize_zeros(network)
    kinds = {"perceptor": PerceptorObjective, "previewer": PreviewerObjective, "aggregator": AggregatorObjective}
    return kinds[stage](network, **settings)


@pytest.mark.parametrize(("stage", "settings"), stages())
def test_a_stage_trains_only_its_part(stage: str, settings: dict[str, Any], make_prior: Callable[[], Prior]) -> None:
    objective = objective_of(stage, make_prior, settings)
    (name,) = objective.trainables
    assert name == stage
    before = {n: {k: v.clone() for k, v in p.items()} for n, p in objective.parts().items()}
    frozen = {n: p.detach().clone() for n, p in objective.network.unet.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(objective.trainables[stage].parameters(), lr=0.1)
    ((trainable, loss),) = objective.phases(batch(), Noise(0, batch().positions))
    assert trainable == stage
    assert set(loss.metrics) >= {"loss"}
    assert not any(m.requires_grad for m in loss.metrics.values())
    loss.value.backward()
    optimizer.step()
    for part, weights in objective.parts().items():
        changes = [n for n, v in weights.items() if not torch.equal(v, before[part][n])]
        assert bool(changes) == (part == stage), part
        if part == stage:
            assert len(changes) > 0.9 * len(weights), "nearly all tensors of the part must change"
    for n, p in objective.network.unet.named_parameters():
        assert n not in frozen or torch.equal(p, frozen[n]), n


@pytest.mark.parametrize(("stage", "settings"), stages())
def test_loss_depends_on_seed_and_position_only(
    stage: str, settings: dict[str, Any], make_prior: Callable[[], Prior]
) -> None:
    """A half of a batch has the same loss alone: the mean over both halves is the loss of the whole batch."""
    objective = objective_of(stage, make_prior, settings)

    def loss(rows: Batch, seed: int = 0) -> float:
        ((_, result),) = objective.phases(rows, Noise(seed, rows.positions))
        return float(result.value.detach())

    whole, halves = loss(batch(4)), [loss(batch(2)), loss(batch(2, first=2))]
    assert whole == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert whole == loss(batch(4))
    assert whole != loss(batch(4), seed=1)


def test_objectives_refuse_a_network_of_the_wrong_stage(network: InstantIR, make_prior: Callable[[], Prior]) -> None:
    with pytest.raises(ValueError, match="before there is a previewer"):
        PerceptorObjective(network)
    with pytest.raises(ValueError, match="no previewer"):
        PreviewerObjective(InstantIR(make_prior(), RESAMPLER))
    with pytest.raises(ValueError, match="previewer and an aggregator"):
        AggregatorObjective(InstantIR(make_prior(), RESAMPLER, LORA))
    for settings in ({"huber_c": 0.0}, {"guidance_range": (5.0, 3.0)}, {"num_ddim_timesteps": 0}):
        with pytest.raises(ValueError, match="must be"):
            PreviewerObjective(network, **settings)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- restorer


@pytest.mark.parametrize(
    "options",
    [{}, {"start": "noise"}, {"cfg_scale": 1.0}, {"sampler": "ddpm"}, {"preview_start": 0.6, "aggregator_stop": 0.5}],
    ids=str,
)
def test_a_restored_picture_has_its_size_and_its_options(network: InstantIR, options: dict[str, Any]) -> None:
    (restored,) = InstantIRRestorer(network).restore([request(**options)])
    assert restored.image.shape == (13, 19, 3)
    assert restored.image.dtype == np.uint8
    expected = {"system": "instantir", "seed": "3", "steps": "2", "cfg_scale": str(options.get("cfg_scale", 7.0))}
    assert {k: restored.info[k] for k in expected} == expected


def test_bytes_depend_only_on_the_request(network: InstantIR) -> None:
    restorer = InstantIRRestorer(network)
    alone = restorer.restore([request("a")])[0]
    company = restorer.restore([request("b"), request("a", size=(20, 20)), request("a"), request("c")])
    assert [r.key for r in company] == ["b", "a", "a", "c"]
    assert np.array_equal(company[2].image, alone.image)
    assert not np.array_equal(restorer.restore([request("a", seed=4)])[0].image, alone.image)
    together = InstantIRRestorer(network, batch_size=3).restore([request("b"), request("a"), request("c")])[1]
    assert np.abs(together.image.astype(int) - alone.image).max() <= 1


def test_size_enlarges_and_options_differ_by_picture(network: InstantIR) -> None:
    events: list[StepEvent] = []
    requests = [request("a", size=(26, 38)), request("b", steps=3), request("c")]
    restored = InstantIRRestorer(network, batch_size=2).restore(requests, events.append)
    assert [r.image.shape[:2] for r in restored] == [(26, 38), (13, 19), (13, 19)]
    assert [r.info["steps"] for r in restored] == ["2", "3", "2"]
    assert [(e.step, e.of) for e in events] == [(i, 7) for i in range(1, 8)]
    assert all(e.preview is not None for e in events)


def test_cancelling_stops_before_the_next_step(network: InstantIR) -> None:
    events: list[StepEvent] = []
    with pytest.raises(Cancellation):
        InstantIRRestorer(network).restore([request("a"), request("b")], events.append, lambda: len(events) >= 3)
    assert len(events) == 3


def test_a_tile_of_the_denoiser_has_its_own_lq_latents_and_steps(network: InstantIR) -> None:
    lq, conditions = tensor(1, 4, 8, 8), make_conditions(network, 1)
    whole = InstantIRDenoiser(network, lq, conditions, None, 2, LoopSettings(cfg_scale=1.0))
    latents, sigma = tensor(1, 4, 8, 8, name="latents"), torch.tensor([3.0])
    whole(latents, sigma)
    tile = whole.tile((2, 4, 4, 4))
    alone = InstantIRDenoiser(network, lq[..., 2:6, 4:8], conditions, None, 2, LoopSettings(cfg_scale=1.0))
    part = latents[..., 2:6, 4:8]
    assert torch.allclose(tile(part, sigma), alone(part, sigma), atol=1e-6) and tile.step == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 2}, "unknown option 'step'. Did you mean \"steps\""),
        ({"steps": 2.5}, "option steps must be an integer, got 2.5"),
        ({"steps": 10**400}, "option steps must be an integer, got 1000"),
        ({"steps": True}, "option steps must be an integer"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 5000}, "steps must be between 1 and 1000"),
        ({"cfg_scale": float("nan")}, "option cfg_scale must be a number"),
        ({"start": "lqq"}, "option start must be one of lq, noise"),
        ({"aggregator_stop": 1.5}, "aggregator_stop must be between 0 and 1"),
    ],
)
def test_wrong_options_are_refused_by_name(network: InstantIR, options: dict[str, Any], message: str) -> None:
    """The message names no picture: a job ends early if all its pictures fail with one message."""
    with pytest.raises(ValueError, match=f"^{message}"):
        InstantIRRestorer(network).restore([request("a", **options)])


def test_options_are_checked_and_converted_without_a_network() -> None:
    options = check_options({"cfg_scale": 3, "steps": 2.0, "sampler": "ddpm"})
    assert json.dumps(options) == '{"cfg_scale": 3.0, "steps": 2, "sampler": "ddpm"}'
    with pytest.raises(UnknownOption) as error:
        check_options({"stps": 2})
    assert str(pickle.loads(pickle.dumps(error.value))) == "unknown option 'stps'. Did you mean \"steps\"?"


def test_wrong_pictures_are_refused(network: InstantIR) -> None:
    restorer = InstantIRRestorer(network)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(SampleError, match="broken") as error:
            restorer.restore([Request(key="broken", image=image)])
        assert error.value.code == "bad_image"
    with pytest.raises(SampleError, match="bad_size"):
        restorer.restore([request("a", size=(0, 10))])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 40), (16, 16)])
def test_any_size_works(network: InstantIR, shape: tuple[int, int]) -> None:
    image = generator(0, "any").integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = Request(key="x", image=image, options={"steps": 1})
    assert InstantIRRestorer(network).restore([picture])[0].image.shape == (*shape, 3)
    padded = pad_to_multiple(image, 8)
    assert padded.shape[0] % 8 == padded.shape[1] % 8 == 0
    assert np.array_equal(padded[: shape[0], : shape[1]], image)


def test_defaults_come_from_the_recipe(network: InstantIR, make_prior: Callable[[], Prior]) -> None:
    restorer = InstantIRRestorer(network, {"steps": 4, "cfg_scale": 2})
    plain = replace(request(), options={})
    assert restorer.restore([plain])[0].info["steps"] == "4"
    assert parse_options({"steps": 8}, restorer.defaults) == Options(steps=8, cfg_scale=2.0)
    with pytest.raises(ValueError, match='Did you mean "cfg_scale"'):
        InstantIRRestorer(network, {"cfg": 2})
    with pytest.raises(ValueError, match="previewer and an aggregator"):
        InstantIRRestorer(InstantIR(make_prior(), RESAMPLER))


def test_loop_settings_follow_the_shares_of_the_steps() -> None:
    """The official rule: the Aggregator stops if (i + 1) / N exceeds the end; previews start at i / N >= start."""
    settings = LoopSettings(aggregator_stop=0.67, preview_start=0.3, aggregator_scale=[1, 2, 3, 4, 5, 6])
    assert [settings.scale_at(i, 6) for i in range(6)] == [1, 2, 3, 4, 0, 0]
    assert [settings.previews_at(i, 6) for i in range(6)] == [False, False, True, True, True, True]


def test_perceptor_of_returns_the_same_modules(network: InstantIR) -> None:
    again = perceptor_of(network.unet)
    assert again.image_proj is network.perceptor.image_proj
    assert list(again.ip_adapter) == list(network.perceptor.ip_adapter)
