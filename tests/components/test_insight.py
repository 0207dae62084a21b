"""InstantIR's insight: closed forms of Fig. 4's distances, recorded runs, the time-blind perceptor, token retrieval."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.priors.nano import build_prior, build_tokenizer_json
from components.randomness import generator
from components.samplers.schedules import Schedule
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.insight import (
    TOKEN_VIEWS,
    Recorder,
    Trajectory,
    conditions_of,
    distances,
    errors,
    record,
    retrieve,
    time_blind,
    token_vectors,
)
from components.systems.instantir.network import InstantIR, unet_embedding
from components.systems.instantir.options import LoopSettings, Options, parse_options
from components.systems.instantir.perceptor import cross_attentions
from components.systems.instantir.restorer import InstantIRRestorer
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Request

TINY: dict[str, Any] = {
    "autoencoder": {"factor": 4, "latent_channels": 4, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1},
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1],
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


@pytest.fixture(scope="module")
def network() -> InstantIR:
    """An untrained network with all parts, where layers that start at zero have other values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(TINY, build_tokenizer_json(["red", "blue", "sky"], TINY["text_length"])).freeze()
    resampler = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}
    network = InstantIR(prior, resampler, {"rank": 2, "alpha": 1}, aggregator=True)
    assert network.aggregator is not None
    with torch.no_grad():
        for module in (network.unet, network.aggregator):
            for name, parameter in module.named_parameters():
                if not bool(parameter.any()):
                    values = generator(5, name).standard_normal(tuple(parameter.shape), dtype=np.float32)
                    parameter.copy_(0.1 * torch.from_numpy(values))
    return network


def picture(name: str, side: int = 16) -> np.ndarray:
    return generator(2, name).integers(0, 256, (side, side, 3), dtype=np.uint8)


class ScriptedDenoiser:
    """A denoiser with fixed previews and clean latents. None repeats the preview before; `lq` is not a new preview."""

    def __init__(self, previews: list[Tensor | None], clean: list[Tensor], lq: Tensor) -> None:
        self.previews, self.clean, self.lq = previews, clean, lq
        self.preview: Tensor | None = None
        self.renewed = False
        self.factor = torch.ones(len(lq))
        self.step = 0

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        preview = self.previews[self.step]
        self.preview = self.preview if preview is None else preview
        self.renewed = preview is not None and preview is not self.lq
        clean = self.clean[self.step]
        self.step += 1
        self.factor = torch.full((len(latents),), float(self.step))
        return clean


def run_script(denoiser: ScriptedDenoiser, steps: int) -> Trajectory:
    recorder = Recorder(denoiser)
    for _ in range(steps):
        recorder(torch.zeros_like(denoiser.lq), torch.ones(len(denoiser.lq)))
    return Trajectory(
        timesteps=torch.arange(steps, 0, -1),
        previews=torch.stack(recorder.previews),
        denoised=torch.stack(recorder.denoised),
        renewed=torch.tensor(recorder.renewed),
        factors=torch.stack(recorder.factors),
        latents=torch.zeros_like(denoiser.lq),
    )


def constant(value: float, rows: int = 1) -> Tensor:
    return torch.full((rows, 2, 3, 3), value)


def test_distances_of_constant_previews_have_closed_forms() -> None:
    """For constant latents the root mean square is the difference of the constants."""
    run = run_script(
        ScriptedDenoiser([constant(1.0), constant(4.0), constant(3.5)], [constant(0.0)] * 3, constant(9.0)), 3
    )
    curves = distances(run)
    assert curves.to_denoised[:, 0].tolist() == [1.0, 4.0, 3.5]
    assert math.isnan(curves.change[0, 0])
    assert curves.change[1:, 0].tolist() == [3.0, 0.5]
    assert curves.delta[1:, 0].tolist() == pytest.approx([(4 / 3) ** 2, 49.0])
    wrong = errors(run, constant(2.0))
    assert wrong["preview"][:, 0].tolist() == [1.0, 2.0, 1.5]
    assert wrong["denoised"][:, 0].tolist() == [2.0, 2.0, 2.0]


def test_a_distance_is_the_norm_over_the_root_of_its_elements() -> None:
    """A second derivation with numpy, for rows that differ."""
    parts = [torch.from_numpy(generator(1, f"{i}").standard_normal((2, 3, 4, 5))) for i in range(4)]
    run = run_script(ScriptedDenoiser([parts[0], parts[1]], [parts[2], parts[3]], torch.zeros(2, 3, 4, 5)), 2)
    curves = distances(run)
    for row in range(2):
        norm = np.linalg.norm((parts[1] - parts[3])[row].numpy().ravel())
        change = np.linalg.norm((parts[1] - parts[0])[row].numpy().ravel())
        assert float(curves.to_denoised[1, row]) == pytest.approx(norm / math.sqrt(60))
        assert float(curves.change[1, row]) == pytest.approx(change / math.sqrt(60))
        assert float(curves.delta[1, row]) == pytest.approx((norm / change) ** 2)


def test_a_guided_run_records_the_positive_half() -> None:
    both = torch.cat([constant(7.0), constant(1.0)])  # negative, positive
    run = run_script(ScriptedDenoiser([both], [constant(0.0)], constant(5.0)), 1)
    assert run.previews.shape == (1, 1, 2, 3, 3)
    assert float(run.previews.mean()) == 1.0


def test_steps_without_a_new_preview_have_no_distance() -> None:
    """The third step repeats the second preview; the fourth step's reference is the LQ latents."""
    lq = constant(8.0)
    run = run_script(ScriptedDenoiser([constant(1.0), constant(2.0), None, lq], [constant(0.0)] * 4, lq), 4)
    assert run.renewed.tolist() == [True, True, False, False]
    curves = distances(run)
    assert torch.isnan(curves.to_denoised[:, 0]).tolist() == [False, False, True, True]
    assert torch.isnan(curves.change[:, 0]).tolist() == [True, False, True, True]
    assert torch.isnan(errors(run, lq)["preview"][:, 0]).tolist() == [False, False, True, True]
    never = run_script(ScriptedDenoiser([None], [constant(3.0)], lq), 1)
    assert never.renewed.tolist() == [False]
    assert torch.isnan(distances(never).to_denoised).all()


@pytest.mark.parametrize(
    "more",
    [
        {"sampler": "ddim"},
        {"sampler": "ddpm"},
        {"sampler": "ddim", "view": "crops", "reference_noise": True},
        {"sampler": "ddpm", "view": "pad", "encoding": "sample", "start": "noise", "adaptive": "paper"},
        {"preset": "released", "resize": "native"},
    ],
)
def test_a_recorded_run_equals_the_restorers(network: InstantIR, more: dict[str, Any]) -> None:
    """With the same picture, seed and prompt, the recorded latents decode to the restorer's picture."""
    options = {"steps": 3, "cfg_scale": 3.0, "color": "none", **more}  # a record ends before the colour transfer
    image = picture("a")
    request = Request(key="a", image=image, seed=11, prompt="red", negative_prompt="blue", options=options)
    (restored,) = InstantIRRestorer(network).restore([request])
    run = record(network, images_to_tensor([image]), parse_options(options, Options()), [11], ["red"], ["blue"])
    with torch.inference_mode():
        (pixels,) = tensor_to_images(network.prior.decode(run.latents))
    difference = np.abs(pixels.astype(int) - restored.image)
    assert (
        difference.max() <= 1 and difference.mean() < 0.01
    )  # another order of calls may round differently by one level
    assert run.renewed.tolist() == [True] * 3 or "preset" in more
    assert run.timesteps.tolist() == network.prior.schedule.timesteps(3).tolist()
    assert float(run.previews[0].std()) > 0


def test_delta_is_the_adaptive_factor(network: InstantIR) -> None:
    """Eq. 7 here equals the loop's factor, with the rules that skip no preview."""
    prior = network.prior
    with torch.inference_mode():
        images = images_to_tensor([picture("a"), picture("b")])
        lq = prior.encode(images)
        conditions = conditions_of(network, images, ["", ""])
        settings = LoopSettings(cfg_scale=1.0, adaptive="released", released_rules=False)
        denoiser = InstantIRDenoiser(network, lq, conditions, None, 3, settings)
        recorder = Recorder(denoiser)
        sigmas = prior.schedule.sampling_sigmas(prior.schedule.timesteps(3))
        latents = Schedule.exploding(torch.randn(lq.shape, generator=torch.Generator().manual_seed(0)), sigmas[:1])
        for step in range(3):
            clean = recorder(latents, sigmas[step].expand(2))
            latents = clean + sigmas[step + 1] / sigmas[step] * (latents - clean)
    run = Trajectory(
        timesteps=torch.arange(3),
        previews=torch.stack(recorder.previews),
        denoised=torch.stack(recorder.denoised),
        renewed=torch.tensor(recorder.renewed),
        factors=torch.stack(recorder.factors),
        latents=latents,
    )
    assert recorder.renewed == [True] * 3
    torch.testing.assert_close(distances(run).delta[1:].float(), run.factors[1:], rtol=1e-4, atol=0)


def test_record_refuses_inputs_that_do_not_fit(network: InstantIR) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        record(network, torch.zeros(1, 3, 12, 16), Options(steps=1), [0])
    with pytest.raises(ValueError, match="as many seeds"):
        record(network, torch.zeros(2, 3, 16, 16), Options(steps=1), [0])
    for options in ({"min_side_px": 64}, {"tile_px": 64}, {"resize": "released"}, {"reference": "hq"}):
        with pytest.raises(ValueError, match=f"without {next(iter(options))}="):
            record(network, torch.zeros(1, 3, 16, 16), parse_options({"steps": 1, **options}, Options()), [0])


def test_the_time_blind_perceptor_gets_one_time_step(network: InstantIR) -> None:
    """Every processor gets the fixed step's embedding with the true text and sizes; UNet blocks get the true step's."""
    prior, unet = network.prior, network.unet
    with torch.inference_mode():
        images = images_to_tensor([picture("a")])
        conditions = conditions_of(network, images, ["red"])
        latents = prior.encode(images)
        true, replacement = torch.tensor([700]), torch.tensor([300])
        processor_inputs: list[Tensor] = []
        block_inputs: list[Tensor] = []
        hooks = [
            attention.processor.ln_k_ip.register_forward_pre_hook(
                lambda _m, args: processor_inputs.append(args[1].clone())
            )
            for attention in cross_attentions(unet).values()
        ]
        hooks.append(
            unet.mid_block.resnets[0].register_forward_pre_hook(lambda _m, args: block_inputs.append(args[1].clone()))
        )
        ordinary = network.preview(latents, true, conditions)
        count = len(processor_inputs)
        with time_blind(network, 300):
            blind = network.preview(latents, true, conditions)
            same = network.preview(latents, replacement, conditions)
        again = network.preview(latents, true, conditions)
        plain = network.preview(latents, replacement, conditions)
        for hook in hooks:
            hook.remove()
        expected = {t: unet_embedding(unet, latents, torch.tensor([t]), conditions) for t in (300, 700)}
    assert count == len(cross_attentions(unet))
    for place, timestep in ((0, 700), (1, 300), (2, 300), (3, 700), (4, 300)):
        for embedding in processor_inputs[place * count : (place + 1) * count]:
            torch.testing.assert_close(embedding, expected[timestep], rtol=1e-4, atol=1e-5)
    for place, timestep in enumerate((700, 700, 300, 700, 300)):
        torch.testing.assert_close(block_inputs[place], expected[timestep], rtol=1e-4, atol=1e-5)
    assert not torch.equal(ordinary, blind)
    assert torch.equal(ordinary, again)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)


def test_time_blind_refuses_a_step_outside_the_schedule_and_removes_its_hook_after_an_error(network: InstantIR) -> None:
    before = len(network.unet._forward_pre_hooks)
    with pytest.raises(ValueError, match=r"0 and 999, got 1000"), time_blind(network, 1000):
        pass
    with pytest.raises(RuntimeError), time_blind(network, 5):
        raise RuntimeError
    assert len(network.unet._forward_pre_hooks) == before


def test_the_rank_counts_nearer_pictures() -> None:
    """Unit vectors in the plane, by angle: their cosines are exact."""

    def at(*degrees: float) -> Tensor:
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    result = retrieve(at(10, 50, 170), at(0, 60, 90), torch.tensor([0, 0, 2]))
    assert result.rank.tolist() == [1, 3, 1]
    cos = [math.cos(math.radians(d)) for d in (10, 50, 80)]
    assert result.similarity.tolist() == pytest.approx(cos)
    others = [math.cos(math.radians(d)) for d in (50, 10, 110)]
    assert result.margin.tolist() == pytest.approx([mine - other for mine, other in zip(cos, others, strict=True)])
    tie = retrieve(at(45), at(0, 90), torch.tensor([0]))
    assert tie.rank.tolist() == [2] or float(tie.margin[0]) != 0
    alone = retrieve(at(10), at(0), torch.tensor([0]))
    assert alone.rank.tolist() == [1]
    assert math.isnan(float(alone.margin[0]))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        retrieve(at(1), at(0, 60, 90), torch.tensor([3]))


def test_ties_count_against_the_query() -> None:
    vectors = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    assert retrieve(vectors, vectors, torch.arange(3)).rank.tolist() == [2, 2, 1]


def test_token_vectors_are_unit_vectors_and_match_themselves(network: InstantIR) -> None:
    images = images_to_tensor([picture(name) for name in "abcd"])
    vectors = token_vectors(network, images)
    assert list(vectors) == list(TOKEN_VIEWS)
    with torch.inference_mode():
        tokens = network.prior.embed_images(images)
    for name, vector in vectors.items():
        torch.testing.assert_close(vector.norm(dim=1), torch.ones(4, dtype=torch.float64))
        assert retrieve(vector, vector, torch.arange(4)).rank.tolist() == [1] * 4, name
    mean = tokens[:, 1:].double().mean(dim=1)
    torch.testing.assert_close(vectors["pooled"], mean / mean.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert vectors["perceptor"].shape == (4, 4 * 16)
    with pytest.raises(ValueError, match="pooled"):
        token_vectors(network, images, ["poled"])
