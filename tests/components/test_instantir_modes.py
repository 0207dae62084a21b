"""InstantIR's modes of restoration: references, AdaRes, presets, views and tiles, each against its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.sdxl_config import ImageView
from components.samplers.ddim import sample_ddim
from components.samplers.schedules import Schedule
from components.samplers.tiles import tile_boxes, tiled
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.fast import FastRun
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.options import (
    LoopSettings,
    Options,
    check_options,
    parse_options,
    restore_defaults,
)
from components.systems.instantir.preprocess import released_sizes, view_pixels
from components.systems.instantir.references import noised_reference
from components.systems.instantir.restorer import InstantIRRestorer
from components.types import Request, SampleError
from tests.components.test_instantir import LORA, RESAMPLER, TINY, randomize_zeros, request, tensor

OURS = LoopSettings(released_rules=False)
LQ, HQ = tensor(1, 4, 8, 8, name="lq"), tensor(1, 4, 8, 8, name="hq")


@pytest.fixture(scope="module")
def network() -> InstantIR:
    """A tiny network where every part has an effect; all tests share it, and none changes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(TINY, build_tokenizer_json(["red", "blue", "sky"], TINY["text_length"]))
    network = InstantIR(prior.freeze(), RESAMPLER, LORA, aggregator=True)
    randomize_zeros(network)
    return network


def make_conditions(network: InstantIR, prompt: str = "red", rows: int = 1) -> tuple[Conditions, Conditions]:
    """Positive and negative conditions."""
    text, pooled = network.prior.embed_prompts([prompt] * rows)
    tokens = network.prior.embed_images(tensor(rows, 3, 16, 16, name="seen").clamp(-1, 1))
    sizes = network.prior.time_ids(torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(rows, -1))
    positive = Conditions(text=text, pooled=pooled, time_ids=sizes, image_tokens=tokens)
    return positive, network.unconditional(positive, ["blue"] * rows)


class RecordedLoop:
    """A loop over `steps` that records the inputs and outputs of each part."""

    def __init__(self, network: InstantIR, settings: LoopSettings, steps: int = 3, prompt: str = "red", **kwargs: Any):
        self.references: list[Tensor] = []
        self.residuals: list[Residuals | None] = []
        self.previews: list[Tensor | None] = []
        self.clean: list[Tensor] = []
        self.noisy: list[Tensor] = []
        self.schedule, self.steps = network.prior.schedule, steps
        positive, negative = make_conditions(network, prompt)
        denoiser = InstantIRDenoiser(network, LQ, positive, negative, steps, settings, **kwargs)
        aggregate, predict = network.residuals, network.denoise_eps

        def spy_aggregate(lq: Tensor, timesteps: Tensor, preview: Tensor, conditions: Conditions) -> Residuals:
            self.references.append(preview)
            return aggregate(lq, timesteps, preview, conditions)

        def spy_predict(latents: Tensor, timesteps: Tensor, conditions: Conditions, residuals: Any = None) -> Tensor:
            self.residuals.append(residuals)
            return predict(latents, timesteps, conditions, residuals)

        network.residuals, network.denoise_eps = spy_aggregate, spy_predict  # type: ignore[method-assign]
        try:
            self.timesteps = self.schedule.timesteps(steps)
            self.sigmas = self.schedule.sampling_sigmas(self.timesteps)

            def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
                self.noisy.append(Schedule.preserving(latents, sigma))
                self.clean.append(denoiser(latents, sigma))
                self.previews.append(denoiser.preview)
                return self.clean[-1]

            with torch.no_grad():
                start = LQ + self.sigmas[0] * tensor(1, 4, 8, 8, name="start")
                self.final = sample_ddim(denoise, start, self.sigmas)
        finally:
            del network.residuals, network.denoise_eps  # type: ignore[method-assign]
        self.denoiser = denoiser

    def alpha(self, step: int) -> Tensor:
        return self.schedule.alphas_cumprod[self.timesteps[step]]


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=atol, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- references


@torch.no_grad()
def test_each_reference_follows_table_2a(network: InstantIR) -> None:
    runs = {
        kind: RecordedLoop(network, replace(OURS, reference=kind), hq=HQ)  # type: ignore[arg-type]
        for kind in ("preview", "preview_dcp", "preview_unconditional", "mean", "lq", "hq")
    }
    first = {kind: run.references[0] for kind, run in runs.items()}
    assert all(reference.shape == (2, 4, 8, 8) for reference in first.values())
    assert close(first["lq"], LQ.repeat(2, 1, 1, 1)) and close(first["hq"], HQ.repeat(2, 1, 1, 1))
    run = runs["mean"]
    positive, negative = make_conditions(network)
    noisy, timesteps = run.noisy[0].repeat(2, 1, 1, 1), run.timesteps[:1].repeat(2)
    eps = network.denoise_eps(noisy, timesteps, negative.concat(positive))
    a = run.alpha(0)
    assert close(first["mean"], (noisy - (1 - a).sqrt() * eps) / a.sqrt(), 1e-3)  # Eq. 2
    empty = network.unconditional(positive, [""])
    blank = network.preview(run.noisy[0], run.timesteps[:1], empty)
    picture = network.preview(run.noisy[0], run.timesteps[:1], replace(empty, image_tokens=positive.image_tokens))
    full = network.preview(run.noisy[0], run.timesteps[:1], positive)
    assert close(first["preview_unconditional"], blank.repeat(2, 1, 1, 1), 1e-4)
    assert close(first["preview_dcp"], torch.cat([blank, picture]), 1e-4)
    assert close(first["preview"][1:], full, 1e-4)
    finals = [run.final for run in runs.values()]
    assert all(not close(a, b) for i, a in enumerate(finals) for b in finals[:i])


def test_only_the_full_preview_depends_on_the_prompt(network: InstantIR) -> None:
    for kind, depends in (("preview", True), ("preview_dcp", False), ("preview_unconditional", False)):
        settings = replace(OURS, reference=kind)  # type: ignore[arg-type]
        red, blue = (RecordedLoop(network, settings, prompt=prompt).references[0] for prompt in ("red", "blue sky"))
        assert close(red, blue) is not depends


def test_a_noised_reference_has_the_steps_noise(network: InstantIR) -> None:
    noises = [tensor(1, 4, 8, 8, name=f"noise {i}") for i in range(3)]
    run = RecordedLoop(network, replace(OURS, reference_noise=True), noise=noises.__getitem__)
    for step, reference in enumerate(run.references):
        preview, a = run.previews[step], run.alpha(step)
        assert preview is not None
        assert close(reference, a.sqrt() * preview + (1 - a).sqrt() * noises[step].repeat(2, 1, 1, 1), 1e-4)
    both = noised_reference(run.schedule, LQ.repeat(2, 1, 1, 1), HQ.repeat(2, 1, 1, 1), torch.tensor([500]))
    a = run.schedule.alphas_cumprod[500]
    assert close(both[1:], a.sqrt() * LQ + (1 - a).sqrt() * HQ)


def test_creative_restoration_stops_aggregator_and_previewer_late(network: InstantIR) -> None:
    run = RecordedLoop(network, replace(OURS, aggregator_stop=0.5), steps=4)
    assert [r is not None for r in run.residuals] == [True, True, False, False]
    late = RecordedLoop(network, replace(OURS, aggregator_start=0.5), steps=4)  # the released pipeline fails here
    assert [r is not None for r in late.residuals] == [False, False, True, True]
    window = RecordedLoop(network, replace(OURS, preview_start=0.3, preview_stop=0.8), steps=4)
    is_lq = [close(reference, LQ.repeat(2, 1, 1, 1)) for reference in window.references]
    assert is_lq == [True, True, False, True]


def test_references_without_their_inputs_are_refused(network: InstantIR) -> None:
    positive, negative = make_conditions(network)
    for settings, message in (
        (replace(OURS, reference="hq"), "needs HQ latents"),
        (replace(OURS, reference_noise=True), "needs noise"),
    ):
        with pytest.raises(ValueError, match=message):
            InstantIRDenoiser(network, LQ, positive, negative, 2, settings)
    with pytest.raises(ValueError, match="compares previews"):
        replace(OURS, reference="lq", adaptive="paper")


# ------------------------------------------------------------------------------------------------------------ AdaRes


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])  # the released pipeline fails without guidance
@pytest.mark.parametrize("clamp", [True, False])
def test_adares_of_the_paper_is_algorithm_1(network: InstantIR, cfg_scale: float, clamp: bool) -> None:
    settings = replace(OURS, adaptive="paper", adaptive_clamp=clamp, cfg_scale=cfg_scale)
    run = RecordedLoop(network, settings, steps=4)
    delta, before = 1.0, torch.zeros_like(LQ)
    for step in range(4):
        preview = run.previews[step]
        assert preview is not None
        factor = min(max(delta, 0.0), 1.0) if clamp else delta
        assert close(run.references[step], preview + factor * (LQ - preview), 1e-3)  # line 5
        positive = preview[-1:]
        delta = float((positive - run.clean[step]).square().sum() / (positive - before).square().sum())  # line 7
        before = positive
    assert float(run.denoiser.factor) == pytest.approx(delta, rel=1e-4)
    assert not clamp or close(run.references[0][-1:], LQ, 1e-4)  # delta is 1 at first


def test_the_step_of_algorithm_1_is_ddims_not_the_printed_one(network: InstantIR) -> None:
    """Our sampler's step equals line 8 with the missing factor beta_{t-1}, and differs from line 8 as printed."""
    run = RecordedLoop(network, replace(OURS, adaptive="paper"), steps=4)
    for step in range(3):
        a, b = run.alpha(step).sqrt(), (1 - run.alpha(step)).sqrt()
        a_next, b_next = run.alpha(step + 1).sqrt(), (1 - run.alpha(step + 1)).sqrt()
        z, clean = run.noisy[step], run.clean[step]
        corrected = b_next / b * z - (b_next * a / b - a_next) * clean
        uncorrected = b_next / b * z - (a / b - a_next) * clean
        assert close(run.noisy[step + 1], corrected, 1e-4)
        assert not close(run.noisy[step + 1], uncorrected, 1e-2)


def test_released_adares_scales_residuals_and_our_factor_stays_finite(network: InstantIR) -> None:
    scales = [1.0, 0.05, 0.9]  # 0.05: a step that the released rules skip
    released = RecordedLoop(network, LoopSettings(adaptive="released", aggregator_scale=scales))
    ours = RecordedLoop(network, replace(OURS, adaptive="released", aggregator_scale=scales))
    assert len(released.references) == 2 and len(ours.references) == 3
    assert not torch.equal(released.denoiser.residual_scale, torch.zeros(2))
    positive, negative = make_conditions(network)
    for settings, endless in ((LoopSettings(), True), (OURS, False)):
        settings = replace(settings, adaptive="released", aggregator_scale=[1.0, 0.05])
        denoiser = InstantIRDenoiser(network, LQ, positive, negative, 2, settings)
        latents = LQ + 5 * tensor(1, 4, 8, 8, name="z")
        with torch.no_grad():
            for sigma in (5.0, 2.0):
                denoiser(latents, torch.tensor([sigma]))
        assert bool(denoiser.factor.isinf().all()) is endless


def test_a_skipped_step_reuses_residuals_only_by_the_released_rules(network: InstantIR) -> None:
    scales = [1.0, 0.05, 0.0]
    released = RecordedLoop(network, LoopSettings(aggregator_scale=scales))
    first, second, third = released.residuals
    assert first is not None and second is not None and third is not None
    assert close(second.mid, 0.05 * first.mid) and not bool(third.mid.any())
    ours = RecordedLoop(network, replace(OURS, aggregator_scale=scales))
    first, second, third = ours.residuals
    assert first is not None and second is not None and third is None
    assert not close(second.mid, 0.05 * first.mid)


def test_a_scale_above_one_is_capped_only_by_the_released_rules(network: InstantIR) -> None:
    for settings, scale in ((OURS, 1.5), (LoopSettings(), 1.0)):
        run = RecordedLoop(network, replace(settings, aggregator_scale=1.5), steps=1)
        assert run.denoiser.residual_scale.tolist() == [scale] * 2


# ----------------------------------------------------------------------------------------------------------- presets


def test_presets_set_options_and_explicit_ones_override_them() -> None:
    nano = Options(steps=4, cfg_scale=1.0)  # as from a recipe
    released = parse_options({"preset": "released"}, nano)
    assert (released.sampler, released.steps, released.view, released.encoding) == ("ddpm", 30, "crop", "sample")
    assert released.loop.released_rules and not nano.loop.released_rules
    assert (nano.color, released.color) == ("wavelet", "none")
    preset_and_options = parse_options({"preset": "released", "steps": 4, "sampler": "ddim"}, nano)
    assert (preset_and_options.sampler, preset_and_options.steps, preset_and_options.cfg_scale) == ("ddim", 4, 7.0)
    paper = parse_options({"preset": "paper"}, nano)
    assert (paper.sampler, paper.start, paper.adaptive) == ("ddim", "noise", "paper")
    assert parse_options({"preset": "creative"}, nano).aggregator_stop == 0.7
    assert parse_options({"preset": "default"}, replace(released, steps=4, cfg_scale=1.0)) == nano
    assert check_options({"reference_noise": "True", "adaptive_clamp": False}) == {
        "reference_noise": True,
        "adaptive_clamp": False,
    }
    recipe = {"steps_at_restore": 4, "cfg_scale": 1.0, "reference_noise": True}
    assert restore_defaults(recipe) == {"steps": 4, "cfg_scale": 1.0, "reference_noise": True}


def test_options_that_exclude_the_models_defaults_are_refused_before_a_job() -> None:
    defaults = restore_defaults({"reference": "lq"})
    for options in ({"preset": "paper"}, {"adaptive": "released"}):
        assert check_options(options) == options
        with pytest.raises(ValueError, match=r"compares previews, so reference must be one of preview.*got lq"):
            check_options(options, defaults)
    assert check_options({"preset": "paper", "reference": "preview"}, defaults)["reference"] == "preview"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papr"}, "preset must be one of default, paper, released, creative"),
        ({"preset": "paper", "reference": "hq"}, "compares previews"),
        ({"reference_noise": "yes"}, "must be true or false"),
        ({"reference_noise": 1}, "must be true or false"),
        ({"preset": "released", "min_side_px": 512}, "its own shortest side"),
        ({"tile_px": 8}, "tile_px must be 0 or between 64 and 8192"),
        ({"tile_overlap": 0.8}, "tile_overlap must be between 0 and 0.75"),
        ({"aggregator_start": 2}, "aggregator_start must be between 0 and 1"),
        ({"color": "lab"}, "color must be one of none, adain, wavelet"),
    ],
)
def test_impossible_options_are_refused_before_a_job(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(options)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "paper", "steps": 2},
        {"preset": "released", "steps": 1, "cfg_scale": 1.0, "resize": "native"},
        {"preset": "creative", "steps": 3},
        {"adaptive": "released"},
        {"adaptive": "released", "cfg_scale": 1.0},
        {"reference": "mean", "color": "adain"},
        {"reference": "preview_dcp", "color": "wavelet", "view": "pad"},
        {"reference_noise": True, "view": "crops"},
        {"view": "crops", "cfg_scale": 1.0},
        {"min_side_px": 24},
    ],
    ids=str,
)
def test_every_mode_restores(network: InstantIR, options: dict[str, Any]) -> None:
    job = request(**options)
    plain, again = (InstantIRRestorer(network).restore([job])[0] for _ in range(2))
    assert plain.image.shape == (13, 19, 3) and np.array_equal(plain.image, again.image)
    assert plain.info["preset"] == options.get("preset", "default")
    if options != {"adaptive": "released"}:  # here the factor may be above 1, which has no effect
        usual = InstantIRRestorer(network).restore([request(steps=int(plain.info["steps"]))])[0]
        assert not np.array_equal(plain.image, usual.image)


def test_the_released_sizes_reach_the_networks(network: InstantIR, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture's sides are not multiples of 64, so the rule's multiple shows in the networks' size."""
    sizes: list[tuple[int, ...]] = []
    predict = FastRun.denoise_eps

    def spy(run: FastRun, latents: Tensor, *args: Any) -> Tensor:
        sizes.append(tuple(latents.shape[-2:]))
        return predict(run, latents, *args)

    monkeypatch.setattr(FastRun, "denoise_eps", spy)
    restorer = InstantIRRestorer(network, {"tile_px": 8192})
    options = {"resize": "released", "cfg_scale": 1.0, "aggregator_scale": 0.0, "steps": 1}
    image = np.zeros((20, 30, 3), np.uint8)
    (restored,) = restorer.restore([Request(key="a", image=image, options=options)])
    (width, height), _ = released_sizes((30, 20))
    assert sizes == [(height // 4, width // 4)] and restored.image.shape == (20, 30, 3)


def test_hq_reference_is_the_reference_of_the_request(network: InstantIR) -> None:
    restorer = InstantIRRestorer(network)
    job = request("a", reference="hq")
    with pytest.raises(ValueError, match="needs the HQ picture"):
        restorer.restore([job])
    images = [
        restorer.restore([replace(job, reference=np.full(shape, 90, np.uint8))])[0].image
        for shape in ((13, 19, 3), (26, 38, 3))
    ]
    assert np.array_equal(*images)  # a reference of any size is resized to the picture's
    other = restorer.restore([replace(job, reference=np.full((13, 19, 3), 200, np.uint8))])[0].image
    assert not np.array_equal(images[0], other)
    with pytest.raises(SampleError, match="reference"):
        restorer.restore([replace(job, reference=np.zeros((4, 4), np.uint8))])


# -------------------------------------------------------------------------------------------------------------- view


def test_only_the_released_view_ignores_the_sides() -> None:
    view = ImageView(shortest_edge_px=32, crop_px=28)
    image = np.full((40, 160, 3), 120, np.uint8)
    other_sides = image.copy()
    other_sides[:, :30], other_sides[:, -30:] = 10, 250
    for fit, blind in (("crop", True), ("whole", False), ("pad", False), ("crops", False)):
        pixels, other_pixels = (view_pixels(i, view, fit) for i in (image, other_sides))  # type: ignore[arg-type]
        assert pixels.shape == ((len(pixels), 3, 28, 28)) and (len(pixels) > 1) == (fit == "crops")
        assert torch.equal(pixels, other_pixels) is blind, fit
    places = view_pixels(np.arange(160, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2), view, "crops")
    assert len(places) == 2 * 5  # a 128 x 32 picture in squares of 28


@torch.no_grad()
def test_several_empty_views_equal_one_empty_view(network: InstantIR) -> None:
    """With several views the negative half has as many empty views; the result must not change."""
    positive, _ = make_conditions(network)
    one = network.unconditional(positive, [""])
    tokens = positive.image_tokens.unsqueeze(1).expand(-1, 3, -1, -1)
    many = network.unconditional(replace(positive, image_tokens=tokens), [""])
    noisy, timesteps = tensor(1, 4, 8, 8), torch.tensor([400])
    assert many.image_tokens.shape[1] == 3
    assert close(network.denoise_eps(noisy, timesteps, one), network.denoise_eps(noisy, timesteps, many), 1e-4)


# ------------------------------------------------------------------------------------------------------------- tiles


def large(key: str = "large", seed: int = 1, **options: Any) -> Request:
    image = tensor(3, 120, 200, name=key).mul(40).add(128).clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    options = {"steps": 2, "tile_px": 64, "cfg_scale": 1.0, **options}
    return Request(key=key, image=np.ascontiguousarray(image), seed=seed, options=options)


@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": "ddpm"}, {"adaptive": "paper"}, {"reference_noise": True, "cfg_scale": 2.0}, {"reference": "hq"}],
    ids=str,
)
def test_tiled_bytes_depend_only_on_the_request(network: InstantIR, options: dict[str, Any]) -> None:
    restorer = InstantIRRestorer(network)
    job = large(**options)
    if "reference" in options:
        job = replace(job, reference=large("other").image)
    alone = restorer.restore([job])[0].image
    company = restorer.restore([large("b", tile_px=128), job])[1].image
    assert alone.shape == (120, 200, 3) and np.array_equal(alone, company)
    assert not np.array_equal(restorer.restore([replace(job, seed=2)])[0].image, alone)
    whole = restorer.restore([replace(job, options={**job.options, "tile_px": 8192})])[0].image
    assert 0 < np.abs(whole.astype(float) - alone).mean() < 12


def test_all_tiles_share_one_adaptive_factor(network: InstantIR) -> None:
    lq = tensor(1, 4, 8, 16, name="wide")
    positive, _ = make_conditions(network)
    boxes = tile_boxes(8, 16, (8, 8), 0.0, 2)
    settings = replace(OURS, adaptive="paper", cfg_scale=1.0)
    whole = InstantIRDenoiser(network, lq, positive, None, 2, settings)
    latents, sigma = lq + 5 * tensor(1, 4, 8, 16, name="z"), torch.tensor([5.0])
    with torch.no_grad():
        tiled(whole, 8, 16, boxes)(latents, sigma)
        sums = torch.zeros(2)
        for box in boxes:
            alone = InstantIRDenoiser(network, lq[..., box[1] : box[1] + 8], positive, None, 2, settings)
            clean = alone(latents[..., box[1] : box[1] + 8], sigma)
            assert alone.preview is not None
            sums += torch.stack([(alone.preview - clean).square().sum(), alone.preview.square().sum()])
    assert float(whole.factor) == pytest.approx(float(sums[0] / sums[1]), rel=1e-4)


def test_every_tile_has_the_whole_pictures_tokens_and_its_own_size(
    network: InstantIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Conditions] = []
    predict = FastRun.denoise_eps

    def spy(run: FastRun, latents: Tensor, timesteps: Tensor, conditions: Conditions, residuals: Any = None) -> Tensor:
        calls.append(conditions)
        return predict(run, latents, timesteps, conditions, residuals)

    monkeypatch.setattr(FastRun, "denoise_eps", spy)
    InstantIRRestorer(network).restore([large(steps=1)])
    assert len(calls) == 12  # 120 x 200 px in tiles of 64 with a quarter overlap: 3 rows of 4
    pixels = view_pixels(large().image, network.prior.view, "whole")
    tokens = network.prior.image_encoder(pixel_values=pixels).last_hidden_state
    for conditions in calls:
        assert conditions.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
        assert close(conditions.image_tokens[:, 0], tokens)


def test_the_start_noise_covers_the_whole_picture_before_tiling(
    network: InstantIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a noise prediction of zero the result is the start noise: overlapping tiles must agree on it."""
    calls: list[Tensor] = []

    def no_noise(run: FastRun, latents: Tensor, *args: Any) -> Tensor:
        calls.append(latents)
        return torch.zeros_like(latents)

    monkeypatch.setattr(FastRun, "denoise_eps", no_noise)
    InstantIRRestorer(network).restore([large(steps=1, start="noise", aggregator_scale=0.0)])
    boxes = tile_boxes(30, 50, (16, 16), 0.25, 2)
    assert len(calls) == len(boxes)
    canvas = torch.full((1, 4, 30, 50), float("nan"))
    for latents, (top, left, height, width) in zip(calls, boxes, strict=True):
        part = canvas[..., top : top + height, left : left + width]
        overlap = ~part.isnan()
        assert torch.equal(part[overlap], latents[overlap])
        canvas[..., top : top + height, left : left + width] = latents
    assert not bool(canvas.isnan().any())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 5), (7, 5)])
def test_any_shape_from_one_pixel_is_restored(network: InstantIR, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    for options in ({}, {"view": "crops", "color": "adain", "min_side_px": 8}):
        job = Request(key="k", image=image, options={"steps": 1, "cfg_scale": 1.0, **options})
        assert InstantIRRestorer(network).restore([job])[0].image.shape == (*size, 3)


def test_a_strip_has_a_bounded_number_of_views() -> None:
    view = ImageView(shortest_edge_px=16, crop_px=16)
    for shape, views in (((1, 3000, 3), 20), ((3000, 2, 3), 20), ((16, 64, 3), 4)):
        assert len(view_pixels(np.zeros(shape, np.uint8), view, "crops")) == views
        assert len(view_pixels(np.zeros(shape, np.uint8), view, "crop")) == 1
