"""InstantIR against tensors from the official code; each test builds its networks from the json's configuration.

The tests take every instantir_*.json of the golden folder by name, so that another set with other sizes and seeds can
replace it. A check must compare every output tensor.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image as Pillow
from safetensors.torch import load_file
from torch import Tensor, nn

from components.objectives.consistency import (
    SolverGrid,
    boundary_scalings,
    consistency_output,
    ddim_step,
    pseudo_huber,
)
from components.priors.parameters import copy_strictly
from components.priors.sdxl import Prior
from components.priors.sdxl_config import ImageView
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.guidance import distillation_guide
from components.samplers.schedules import Schedule
from components.systems.instantir.aggregator import Aggregator, Residuals, load_aggregator
from components.systems.instantir.denoiser import InstantIRDenoiser, LoopSettings
from components.systems.instantir.fast import FastInstantIR, Speed
from components.systems.instantir.network import Conditions, InstantIR, LoopNetworks, predict_noise, unet_embedding
from components.systems.instantir.perceptor import PerceptorAttnProcessor, Resampler, ResamplerConfig, cross_attentions
from components.systems.instantir.preprocess import ResizeRule, released_sizes, resize, view_pixels
from components.systems.instantir.previewer import (
    previewer_deltas,
    previewer_enabled,
)

LATER: set[str] = set()
"""Modules of a later issue; any other unknown module fails."""
NO_TENSORS = {"pipeline_weights_unet_adapter", "pipeline_weights_aggregator", "pipeline_weights_lora"}
"""Files with the weights of the other files."""
OTHER_TESTS = {"instantir_distribution"}
"""Degradation statistics, which the degradations' tests check."""


@dataclass
class Golden:
    """One golden file; `check` compares an output and marks it as compared. With `speed`, the fast path is tested."""

    folder: Path
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    compared: set[str] = field(default_factory=set)
    speed: Speed | None = None

    def calls(self, network: InstantIR) -> LoopNetworks:
        """The network itself, or its fast path."""
        return network if self.speed is None else FastInstantIR(network, self.speed).run()

    def input(self, name: str) -> Tensor:
        return self.tensors[f"input/{name}"]

    def weights(self) -> dict[str, Tensor]:
        return {k.removeprefix("weights/"): v for k, v in self.tensors.items() if k.startswith("weights/")}

    @property
    def config(self) -> dict[str, Any]:
        return self.description["config"]

    def check(self, name: str, value: Tensor) -> None:
        expected = self.tensors[f"output/{name}"]
        tolerance = self.description["tolerance"]
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        torch.testing.assert_close(
            value.detach().to(expected.dtype),
            expected,
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda text: f"{self.description['module']}, output {name}: {text}",
        )
        self.compared.add(f"output/{name}")

    def missing(self) -> set[str]:
        return {name for name in self.tensors if name.startswith("output/")} - self.compared


def check_resampler(golden: Golden) -> None:
    resampler = Resampler(ResamplerConfig(**golden.config))
    copy_strictly(dict(resampler.named_parameters()), golden.weights(), "resampler")
    golden.check("tokens", resampler(golden.input("x")))


def check_attn_processor(golden: Golden) -> None:
    config, weights = golden.config, golden.weights()
    attention = Attention(
        query_dim=config["query_dim"],
        heads=config["heads"],
        dim_head=config["dim_head"],
        cross_attention_dim=config["cross_attention_dim"],
        bias=False,
    )
    width = config["heads"] * config["dim_head"]
    processor = PerceptorAttnProcessor(width, config["cross_attention_dim"], config["time"], config["num_tokens"])
    attention.set_processor(processor)  # type: ignore[arg-type]
    copy_strictly(dict(attention.named_parameters()), weights, "attention")
    hidden, text, tokens, temb = (golden.input(n) for n in ("hidden_states", "text", "ip_tokens", "temb"))
    for name in [n for n in golden.tensors if n.startswith("output/scale")]:
        processor.scale = float(name.removeprefix("output/scale"))
        golden.check(name.removeprefix("output/"), attention(hidden, encoder_hidden_states=(text, [tokens]), temb=temb))
    processor.scale = 1.0
    both = torch.cat([text, tokens], dim=1)
    golden.check("concat_form", attention(hidden, encoder_hidden_states=both, temb=temb))
    key, value = processor.keys_and_values(tokens, temb)
    golden.check("adaln_key", key)
    golden.check("adaln_value", value)


def check_aggregator(golden: Golden) -> None:
    aggregator = Aggregator(golden.config)
    load_aggregator(aggregator, golden.weights())
    for prefix, cat_dim in (("", -2), ("cat_dim_-1/", -1)):
        residuals = aggregator(
            *(golden.input(n) for n in ("lq_latent", "timesteps", "preview_latent", "text_embeds", "time_ids")),
            cat_dim=cat_dim,
        )
        check_residuals(golden, prefix, residuals)


def check_residuals(golden: Golden, prefix: str, residuals: Residuals) -> None:
    for number, residual in enumerate(residuals.down):
        golden.check(f"{prefix}down.{number}", residual)
    golden.check(f"{prefix}mid", residuals.mid)


@cache
def tiny_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(UNet and adapter, LoRA, aggregator) of the golden pipeline."""
    names = ("unet_adapter", "lora", "aggregator")
    files = (load_file(folder / f"instantir_pipeline_weights_{name}.safetensors") for name in names)
    return tuple(files)  # type: ignore[return-value]


def section(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"weights/{name}/"
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def tiny_network(golden: Golden, aggregator: bool = False) -> InstantIR:
    """The golden pipeline in the released layouts: bare UNet, adapter, LoRA, aggregator."""
    config = golden.config
    base, lora, control = tiny_weights(golden.folder)
    unet = UNet2DConditionModel(**config["unet"])
    copy_strictly(dict(unet.named_parameters()), section(base, "unet"), "unet")
    prior = Prior(
        name="golden",
        digest="",
        unet=unet,
        autoencoder=nn.Identity(),  # the files start with latents, embeddings and picture tokens
        text_encoders=(nn.Identity(), nn.Identity()),
        tokenizers=(),
        image_encoder=nn.Identity(),
        schedule=schedule_of(config["scheduler"]),
    )
    size = {k: config["lora"][k] for k in ("rank", "alpha", "targets")}
    network = InstantIR(prior, config["resampler"], size, aggregator)
    network.load_parts({"perceptor": section(base, "adapter"), "previewer": section(lora, "previewer_lora")})
    if aggregator:
        network.load_parts({"aggregator": section(control, "aggregator")})
    return network


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    assert (config["prediction_type"], config["clip_sample"]) == ("epsilon", False)
    return Schedule(**{k: config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")})


def make_conditions(golden: Golden) -> Conditions:
    return Conditions(
        text=golden.input("prompt_embeds"),
        pooled=golden.input("text_embeds"),
        time_ids=golden.input("time_ids"),
        image_tokens=golden.input("image_embeds"),
    )


def check_lora_toggle(golden: Golden) -> None:
    network, conditions = tiny_network(golden), make_conditions(golden)
    latents, timestep = golden.input("sample"), golden.input("timestep")
    golden.check("noise_pred_lora_off", network.denoise_eps(latents, timestep, conditions))
    with previewer_enabled(network.unet):
        golden.check("noise_pred_lora_on", predict_noise(network.unet, latents, timestep, conditions))
    deltas = previewer_deltas(network.unet)
    assert sorted(deltas) == sorted(golden.description["lora_layers"])
    for name in [n for n in golden.tensors if n.startswith("output/delta_weight/")]:
        golden.check(name.removeprefix("output/"), deltas[name.removeprefix("output/delta_weight/")])
    merged = copy.deepcopy(network.unet)
    for name, delta in deltas.items():
        merged.get_submodule(name).base_layer.weight += delta  # type: ignore[operator, union-attr]
    golden.check("noise_pred_merged", predict_noise(merged, latents, timestep, conditions))


def check_preview(golden: Golden) -> None:
    network, conditions = tiny_network(golden), make_conditions(golden)
    numbers = golden.config["ip_adapter_index"]
    for number, attention in cross_attentions(network.unet).items():
        assert network.unet.get_submodule(numbers[int(number)].removesuffix(".processor")) is attention
    latents, timestep = golden.input("sample"), golden.input("timestep")
    with previewer_enabled(network.unet):
        golden.check("noise_pred", predict_noise(network.unet, latents, timestep, conditions))
    golden.check("preview_latent", golden.calls(network).preview(latents, timestep, conditions))


def check_unet_step(golden: Golden) -> None:
    network, conditions = tiny_network(golden, aggregator=True), make_conditions(golden)
    calls = golden.calls(network)
    latents, timestep = golden.input("sample"), golden.input("timestep")
    golden.check("temb", unet_embedding(network.unet, latents, timestep.expand(len(latents)), conditions))
    golden.check("ip_tokens", network.perceptor.image_proj(conditions.image_tokens))
    golden.check("noise_pred_no_aggregator", calls.denoise_eps(latents, timestep, conditions))
    residuals = calls.residuals(golden.input("lq_latent"), timestep, golden.input("preview_latent"), conditions)
    check_residuals(golden, "aggregator/", residuals)
    golden.check("noise_pred", calls.denoise_eps(latents, timestep, conditions, residuals))
    for name in [n for n in golden.tensors if n.startswith("output/noise_pred_scale")]:
        residuals_of_scale = residuals.scale_by(float(name.removeprefix("output/noise_pred_scale")))
        golden.check(name.removeprefix("output/"), calls.denoise_eps(latents, timestep, conditions, residuals_of_scale))


def check_schedulers(golden: Golden) -> None:
    config, schedule = golden.config, schedule_of(golden.config)
    output, sample, timesteps = (golden.input(n) for n in ("model_output", "sample", "timesteps"))
    golden.check("alphas_cumprod", schedule.alphas_cumprod)
    skip, out = boundary_scalings(timesteps)
    golden.check("c_skip", skip)
    golden.check("c_out", out)
    golden.check("lcm_denoised", consistency_output(schedule, sample, output, timesteps))
    for name in [n for n in golden.tensors if n.startswith("output/timesteps_")]:
        count = int(name.removeprefix("output/timesteps_"))
        grid = schedule.timesteps(count, config["timestep_spacing"], config["steps_offset"])
        golden.check(name.removeprefix("output/"), grid)
    for kind, count, step in sorted({_step_of(n) for n in golden.tensors if n.startswith(("output/dd",))}):
        sigmas = schedule.sampling_sigmas(schedule.timesteps(count, config["timestep_spacing"], config["steps_offset"]))
        prefix = f"{kind}{count}/{step}"
        expected = golden.tensors[f"output/{prefix}/prev_sample"]
        rows = len(expected)
        start = Schedule.exploding(sample[:rows], sigmas[step].expand(rows))

        def denoise(latents: Tensor, sigma: Tensor, eps: Tensor = output[:rows]) -> Tensor:
            return latents - sigma.view(-1, 1, 1, 1) * eps

        golden.check(f"{prefix}/pred_original_sample", denoise(start, sigmas[step].expand(rows)))
        if kind == "ddim":
            after = sample_ddim(denoise, start, sigmas[step : step + 2])
        else:
            noise = golden.input(f"{prefix}/noise")
            after = sample_ddpm(denoise, start, sigmas[step : step + 2], {0: noise}.__getitem__)
        golden.check(f"{prefix}/prev_sample", Schedule.preserving(after, sigmas[step + 1].expand(rows)))


def _step_of(name: str) -> tuple[str, int, int]:
    """(kind, steps, step) of an output name: output/ddim30/14/prev_sample -> ("ddim", 30, 14)."""
    _, kind, step, _ = name.split("/")
    return kind[:4], int(kind[4:]), int(step)


def check_distill_step(golden: Golden) -> None:
    """The blocks of the distillation step, one by one, from given predictions.

    This does not see how PreviewerObjective combines the blocks; test_golden_compositions.py does, on the same file.
    """
    config = golden.config
    assert (config["timestep_scaling"], config["sigma_data"]) == (10.0, 0.5)
    schedule = Schedule()
    grid = SolverGrid(schedule, config["num_ddim_timesteps"])
    start, end = grid.interval(golden.input("index"))
    golden.check("start_timesteps", start)
    golden.check("end_timesteps", end)
    noisy = schedule.add_noise(golden.input("latents"), golden.input("noise"), start)
    golden.check("noisy", noisy)
    conditional, unconditional = golden.input("teacher_cond"), golden.input("teacher_uncond")
    w = golden.input("w").flatten()
    eps = distillation_guide(unconditional, conditional, w)
    clean = distillation_guide(
        schedule.x0_from_eps(noisy, unconditional, start), schedule.x0_from_eps(noisy, conditional, start), w
    )
    previous = ddim_step(schedule, clean, eps, end)
    golden.check("x_prev", previous)
    student = consistency_output(schedule, noisy, golden.input("student_pred"), start)
    target = consistency_output(schedule, previous, golden.input("target_pred"), end)
    golden.check("student_x0", student)
    golden.check("target_x0", target)
    golden.check("huber_loss", pseudo_huber(student, target, config["huber_c"]).mean()[None])


def check_loop(golden: Golden) -> None:
    options, config = dict(golden.description["options"]), golden.config
    network = tiny_network(golden, aggregator=True)
    schedule, steps = network.prior.schedule, golden.description["num_inference_steps"]
    timesteps = schedule.timesteps(steps, config["scheduler"]["timestep_spacing"], config["scheduler"]["steps_offset"])
    golden.check("timesteps", timesteps)
    lq, noise = golden.input("lq_latent"), golden.input("initial_noise")
    batch = len(lq)
    assert batch == options.pop("batch", batch)
    from_lq = options.pop("init_latents_with_lq")
    settings = LoopSettings(
        cfg_scale=options.pop("guidance_scale"),
        guidance_rescale=options.pop("guidance_rescale", 0.0),
        aggregator_scale=options.pop("controlnet_conditioning_scale", 1.0),
        aggregator_stop=options.pop("control_guidance_end", 1.0),
        preview_start=options.pop("preview_start", 0.0),
        preview_stop=options.pop("preview_end", 1.0),
        adaptive="released" if options.pop("adastep_restore", False) else "none",
    )
    assert not options, f"options without a counterpart: {sorted(options)}"
    side = [d * config["vae_scale_factor"] for d in lq.shape[-2:]]
    time_ids = torch.tensor([[*side, 0, 0, *side]], dtype=torch.float32).expand(batch, -1)
    tokens = golden.input("image_embeds")
    positive = Conditions(
        text=golden.input("prompt_embeds"),
        pooled=golden.input("pooled"),
        time_ids=time_ids,
        image_tokens=tokens[-batch:],
    )
    negative = None
    if settings.guided:
        negative = Conditions(
            text=golden.input("negative_prompt_embeds"),
            pooled=golden.input("negative_pooled"),
            time_ids=time_ids,
            image_tokens=tokens[:batch],
        )
    denoiser = InstantIRDenoiser(golden.calls(network), lq, positive, negative, steps, settings)
    sigmas = schedule.sampling_sigmas(timesteps)
    start = lq + sigmas[0] * noise if from_lq else Schedule.exploding(noise, sigmas[0].expand(batch))
    torch.testing.assert_close(
        Schedule.preserving(start, sigmas[0].expand(batch)), golden.input("initial_latent"), atol=1e-5, rtol=0
    )
    record: dict[str, list[Tensor]] = {}

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        # the latents of a step are the result of the step before
        record.setdefault("latents", []).append(Schedule.preserving(latents, sigma))
        clean = denoiser(latents, sigma)
        assert denoiser.preview is not None
        values = {
            "preview_latent": denoiser.preview,
            "preview_factor": denoiser.factor.view(-1, 1, 1, 1),
            "noise_pred": denoiser.eps,
            "unet_pred_latent": clean,
            "cond_scale": denoiser.residual_scale.view(-1, 1, 1, 1),
        }
        for name, value in values.items():
            record.setdefault(name, []).append(value)
        return clean

    if golden.description["scheduler"] == "ddim":
        final = sample_ddim(denoise, start, sigmas)
    else:
        final = sample_ddpm(denoise, start, sigmas, lambda step: golden.input("step_noise")[step])
    golden.check("final_latent", final)
    record["latents"] = [*record["latents"][1:], final]
    for name, values in record.items():
        golden.check(f"steps/{name}", torch.stack(values))


def check_preprocess(golden: Golden) -> None:
    config = golden.config
    numbers = [int(n) for n in re.findall(r"\d+", config["dino_processor"].split(",/255")[0])]
    edge, crop = numbers[:2]  # "resize shortest edge 256 (PIL bicubic), centre crop 224, /255, ..."
    image = golden.input("image_uint8_chw").permute(1, 2, 0).numpy()
    view = ImageView(shortest_edge_px=edge, crop_px=crop)
    golden.check("dino_pixel_values", view_pixels(image, view, "crop"))
    rule = ResizeRule(**{k: config["resize"][k] for k in ("min_side", "max_side", "multiple")})
    assert config["resize"]["mode"] == "PIL bilinear"
    for row in golden.description["resize_table"]:
        sizes = released_sizes(tuple(row["input_wh"]), row.get("width"), row.get("height"), rule)
        assert [list(size) for size in sizes] == [row["runtime_wh"], row["output_wh"]], row
    (width, height), _ = released_sizes((image.shape[1], image.shape[0]), rule=rule)
    runtime = resize(image, (height, width), Pillow.Resampling.BILINEAR)[::4, ::4]  # as in the json's `call`
    expected = golden.tensors["output/runtime_image_uint8_chw"]
    assert (torch.from_numpy(runtime.copy()).permute(2, 0, 1).int() - expected.int()).abs().max() <= 1
    golden.compared.add("output/runtime_image_uint8_chw")


CHECKS: Mapping[str, Callable[[Golden], None]] = {
    "preprocess": check_preprocess,
    "resampler": check_resampler,
    "attn_processor": check_attn_processor,
    "aggregator": check_aggregator,
    "lora_toggle": check_lora_toggle,
    "preview": check_preview,
    "unet_step": check_unet_step,
    "schedulers": check_schedulers,
    "distill_step": check_distill_step,
    "loop": check_loop,
}


def descriptions(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for path in sorted(folder.glob("instantir_*.json")):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def kind_of(module: str) -> str:
    return "loop" if module.startswith("loop_") else module


def test_every_golden_file_has_a_check(golden_dir: Path) -> None:
    kinds = {kind_of(description["module"]) for _, description in descriptions(golden_dir)}
    assert kinds - set(CHECKS) - NO_TENSORS - OTHER_TESTS <= LATER
    assert set(CHECKS) - kinds == set(), "a check without a golden file"


@pytest.mark.parametrize("kind", CHECKS)
@torch.no_grad()
def test_golden(kind: str, golden_dir: Path) -> None:
    files = [(p, d) for p, d in descriptions(golden_dir) if kind_of(d["module"]) == kind]
    assert files
    for path, description in files:
        golden = Golden(golden_dir, description, load_file(path.with_suffix(".safetensors")))
        CHECKS[kind](golden)
        assert not golden.missing(), f"{path.name}: outputs without a check: {sorted(golden.missing())}"


SPEEDS = {
    "merged": Speed(merge_previewer="on"),
    "toggled": Speed(merge_previewer="off"),
    "channels-last": Speed(merge_previewer="on", join=False, channels_last="on"),
}


FAST = [
    # the loops take another minute, so make test runs them with one setting only
    pytest.param(kind, speed, marks=[pytest.mark.full] if kind == "loop" and speed != "merged" else [])
    for kind in ("preview", "unet_step", "loop")
    for speed in SPEEDS
]


@pytest.mark.parametrize(("kind", "speed"), FAST)
@torch.no_grad()
def test_golden_fast(kind: str, speed: str, golden_dir: Path) -> None:
    """Every file of the networks and every loop, on the fast path with each setting."""
    files = [(p, d) for p, d in descriptions(golden_dir) if kind_of(d["module"]) == kind]
    assert files
    for path, description in files:
        golden = Golden(golden_dir, description, load_file(path.with_suffix(".safetensors")), speed=SPEEDS[speed])
        CHECKS[kind](golden)
        assert not golden.missing(), f"{path.name}: outputs without a check: {sorted(golden.missing())}"
