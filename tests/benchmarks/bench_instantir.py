"""InstantIR's sampling loop, ours and an obvious one; bench_instantir_training.py has the train step.

    python tests/benchmarks/bench_instantir.py                           # CPU, nano and middle size; part of make bench
    python tests/benchmarks/bench_instantir.py --size sdxl --device cuda --compile blocks  # --quick: the ceiling alone
    python tests/benchmarks/bench_instantir.py --model runs/demo/NAME/model   # errors by reuse, of a trained model

All sizes use the same code. Weights are random and created on the device: nothing is downloaded. "obvious" is a plain
loop with diffusers: LoRA switched by peft, DDIMScheduler, guidance as a batch of two, the UNet's own forward, all
computed in every call. "ours" is InstantIRDenoiser over FastInstantIR. Arms take turns; medians of CPU time are
reported (on a GPU: of wall time, synchronised, and "obvious" before the others). A line is void if an arm spreads over
25 %. `difference` is the largest difference of the arms' latents over their largest value.

It needs torch, numpy, diffusers, transformers, tokenizers, peft and safetensors, and of this project only components/.
On a machine without network: copy wheels, `pip install --no-index --no-deps --target SITE *.whl`, and run with
PYTHONPATH=SITE:. from the root. Compiling takes a minute or two at SDXL size: --rounds 3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import psnr, ratio, summary, take_turns

if TYPE_CHECKING:
    import torch

    from components.systems.instantir.fast import Speed
    from components.systems.instantir.network import Conditions, InstantIR


@dataclass(frozen=True, kw_only=True)
class Size:
    """A set of shapes. `latent_px` is the latents' side; `prior` has the form of priors.nano.NANO."""

    prior: Mapping[str, Any]
    resampler: Mapping[str, int]
    lora: Mapping[str, int]
    latent_px: int
    steps: int


def sizes() -> dict[str, Size]:
    """Sizes by name: the shipped nano prior's, a middle one in which arithmetic dominates, and SDXL's."""
    from components.priors.nano import NANO

    nano_resampler = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_queries": 16}
    middle = {
        **NANO["unet"],
        "block_out_channels": [128, 192, 256],
        "attention_head_dim": [2, 3, 4],
        "norm_num_groups": 32,
    }
    sdxl = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return {
        "nano": Size(prior=NANO, resampler=nano_resampler, lora={"rank": 16, "alpha": 16}, latent_px=32, steps=4),
        "middle": Size(
            prior={**NANO, "unet": middle},
            resampler=nano_resampler,
            lora={"rank": 16, "alpha": 16},
            latent_px=64,
            steps=2,
        ),
        "sdxl": Size(
            prior={**NANO, "unet": sdxl, "text_length": 77},
            resampler={"embedding_dim": 1024, "output_dim": 2048},
            lora={"rank": 64, "alpha": 1},
            latent_px=128,
            steps=30,
        ),
    }


def build_network(size: Size, device: str, dtype: torch.dtype) -> InstantIR:
    """A whole InstantIR of random weights, created on the device; zero-initialised layers get small values.

    At SDXL size the autoencoder is SDXL's and the picture encoder DINOv2-large. The text encoders stay small, since
    they run once; random text of the right shape replaces their output.
    """
    import torch

    from components.systems.instantir.network import InstantIR

    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[] if device != "cuda" else [torch.cuda.current_device()]):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)  # weights never take twice the memory
            with torch.device(device):
                prior = _prior(size)
        finally:
            torch.set_default_dtype(default_dtype)
        prior.autoencoder.float()
        with torch.device(device):
            network = InstantIR(prior, size.resampler, dict(size.lora), aggregator=True)
        network.to(device, dtype)
        if device != "meta":
            _fill_zeros(network)
    return network


def _prior(size: Size) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import Dinov2Config, Dinov2Model

    from components.priors.nano import build_prior, build_tokenizer_json
    from components.priors.sdxl_config import ImageView

    prior = build_prior(size.prior, build_tokenizer_json(["red", "blue"], int(size.prior["text_length"])))
    if size.resampler.get("embedding_dim") == 1024:
        prior.autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        prior.image_encoder = Dinov2Model(
            Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=518)
        )
        prior.view = ImageView()
    return prior


def _fill_zeros(network: InstantIR) -> None:
    """Fill zero-initialised layers: with them, LoRA and Aggregator would have no effect, and arms would be equal."""
    import torch

    with torch.no_grad():
        for module in (network.unet, network.aggregator):
            assert module is not None
            for parameter in module.parameters():
                if not bool(parameter.any()):
                    parameter.normal_(std=0.02)


def make_inputs(
    network: InstantIR, size: Size, dtype: torch.dtype, batch: int = 1
) -> tuple[Conditions, Conditions, torch.Tensor, torch.Tensor]:
    """(positive, negative, LQ latents, start noise) of random values."""
    import torch

    from components.systems.instantir.network import Conditions

    unet, device = size.prior["unet"], network.prior.device
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind, generator=generator)

    side = size.latent_px * network.prior.factor
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device).expand(batch, -1)
    tokens = (network.prior.view.crop_px // int(network.prior.image_encoder.config.patch_size)) ** 2 + 1  # type: ignore
    pair = [
        Conditions(
            text=random(batch, size.prior["text_length"], unet["cross_attention_dim"]),
            pooled=random(batch, pooled),
            time_ids=ids,
            image_tokens=random(batch, tokens, network.prior.image_token_dim),
        )
        for _ in range(2)
    ]
    shape = (batch, network.prior.latent_channels, size.latent_px, size.latent_px)
    lq, noise = random(*shape, kind=torch.float32), random(*shape, kind=torch.float32)
    return pair[0], pair[1], lq, noise


# ------------------------------------------------------------------------------------------------------------- sampling


def obvious_loop(
    network: InstantIR,
    positive: Conditions,
    negative: Conditions,
    lq: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    cfg_scale: float = 7.0,
) -> torch.Tensor:
    """InstantIR's loop written plainly with diffusers and peft; returns the last latents."""
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from components.systems.instantir.network import predict_noise

    unet, dtype = network.unet, network.unet.dtype
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(steps, device=lq.device)
    lq = lq.to(dtype)
    latents = scheduler.add_noise(lq, noise.to(dtype), scheduler.timesteps[:1])
    conditions = negative.concat(positive)
    lq_twice = torch.cat([lq, lq])
    for t in scheduler.timesteps:
        twice = torch.cat([latents, latents])
        times = t.expand(len(twice))
        unet.enable_adapters()
        eps = predict_noise(unet, twice, times, conditions)
        unet.disable_adapters()
        alpha = scheduler.alphas_cumprod.to(lq.device)[t]
        clean = (twice - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        scaled = t * 10.0
        preview = clean * scaled / (scaled**2 + 0.25).sqrt() + twice * 0.25 / (scaled**2 + 0.25)
        residuals = network.residuals(lq_twice, times, preview.to(dtype), conditions)
        eps = predict_noise(unet, twice, times, conditions, residuals)
        negative_eps, positive_eps = eps.chunk(2)
        eps = negative_eps + cfg_scale * (positive_eps - negative_eps)
        latents = scheduler.step(eps, t, latents).prev_sample
    return latents


def our_loop(
    fast: Any,
    positive: Conditions,
    negative: Conditions,
    lq: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
    **settings: Any,
) -> torch.Tensor:
    """The same loop with the product's parts; each call is a new run, as for a new picture."""
    from components.samplers.ddim import sample_ddim
    from components.systems.instantir.denoiser import InstantIRDenoiser
    from components.systems.instantir.options import LoopSettings

    schedule = fast.network.prior.schedule
    sigmas = schedule.sampling_sigmas(schedule.timesteps(steps)).to(lq.device)
    denoise = InstantIRDenoiser(fast.run(), lq, positive, negative, steps, LoopSettings(cfg_scale=7.0, **settings))
    return sample_ddim(denoise, lq + sigmas[0] * noise, sigmas)


def count_step_flops(size: Size, merged: bool = False) -> float:
    """TFLOP of one step with guidance, by torch's counter on the meta device (attention is two products).

    Args:
        merged: without the LoRA's products, as if it is merged into a second UNet.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad():
        network = build_network(size, "meta", torch.float32)
        positive, negative, lq, _ = make_inputs(network, size, torch.float32)
        conditions, lq = negative.concat(positive), torch.cat([lq, lq])
        times = torch.zeros(2, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter:
            if merged:
                network.denoise_eps(lq, times, conditions)
            else:
                network.preview(lq, times, conditions)
            residuals = network.residuals(lq, times, lq, conditions)
            network.denoise_eps(lq, times, conditions, residuals)
    return counter.get_total_flops() / 1e12


def measure_sampling(
    name: str, device: str = "cpu", rounds: int = 5, speed: Speed | None = None, reuse: bool = True
) -> list[dict[str, Any]]:
    """Rows for the obvious loop, ours, and ours with previews or features reused."""
    import torch

    from components.systems.instantir.fast import FastInstantIR, Speed

    size = sizes()[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        network = build_network(size, device, dtype)
        inputs = make_inputs(network, size, dtype)
    speed = speed or Speed()
    arms: dict[str, Callable[[], torch.Tensor]] = {"obvious": lambda: obvious_loop(network, *inputs, size.steps)}
    before: tuple[Any, Any] = ({}, {})
    if device == "cuda":  # measured first, as ours changes the weights' memory layout, which slows "obvious" down
        with torch.inference_mode():
            before = take_turns(arms, device, rounds)
        arms = {}
    fast = FastInstantIR(network, speed)
    arms["ours"] = lambda: our_loop(fast, *inputs, size.steps)
    if reuse:
        arms["ours, preview_every 2"] = lambda: our_loop(fast, *inputs, size.steps, preview_every=2)
        arms["ours, preview and aggregator every 2"] = lambda: our_loop(
            fast, *inputs, size.steps, preview_every=2, aggregator_every=2
        )
    with torch.inference_mode():
        seconds, results = take_turns(arms, device, rounds)
    seconds, results = before[0] | seconds, before[1] | results
    exact = results["ours"].float()
    rows = []
    for arm, times in seconds.items():
        row = {"what": "sampling", "size": name, "arm": arm, "steps": size.steps, **summary(times, device)}
        row |= {"ratio_to_obvious": ratio(statistics.median(seconds["obvious"]), statistics.median(times))}
        tflop = count_step_flops(size, fast.merged and arm != "obvious") * size.steps
        row |= {"tflop": round(tflop, 3), "merged": fast.merged}
        row |= {"compile": speed.compile if arm != "obvious" else "off"}
        if arm == "obvious":
            row["difference"] = float((results[arm].float() - exact).abs().max() / exact.abs().max())
        elif arm != "ours":
            row["psnr_to_exact_db"] = round(psnr(results[arm].float(), exact), 1)
        if arm in ("obvious", "ours") and device == "cuda":
            row["tflop_per_s"] = ratio(tflop, statistics.median(times), 1)
        rows.append(row)
    if device == "cuda":
        rows.append({"what": "once", "size": name, **measure_once(network, fast, inputs[2], device, rounds)})
    return rows


def measure_once(network: InstantIR, fast: Any, lq: torch.Tensor, device: str, rounds: int) -> dict[str, Any]:
    """Seconds per picture besides its steps: picture encoder, encode and decode, plain and ours."""
    import torch

    prior, side = network.prior, lq.shape[-1] * network.prior.factor
    with torch.inference_mode():
        picture = torch.zeros(1, 3, side, side, device=device)
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "see": lambda: prior.embed_images(picture),
            "encode": lambda: prior.encode(picture),
            "encode_ours": lambda: fast.encode(picture),
            "decode": lambda: prior.decode(lq),
            "decode_ours": lambda: fast.decode(lq),
        }
        seconds, _ = take_turns(arms, device, rounds)
    return {f"{name}_s": round(statistics.median(times), 4) for name, times in seconds.items()}


# -------------------------------------------------------------------------------------------------------------- measure


def measure_reuse(model: Path, device: str = "cpu", count: int = 4, steps: int = 12) -> list[dict[str, Any]]:
    """PSNR of a trained model's restorations with reused previews or features, against its exact ones."""
    import numpy as np

    from components.degradations import build_degradation
    from components.images import to_float, to_uint8
    from components.synthetic import dead_leaves
    from components.systems import build_restorer
    from components.types import Request

    restorer, degradation = build_restorer(model, device=device), build_degradation("realesrgan-nano")
    inputs = []
    for k in range(count):
        hq = dead_leaves(128, 0, k)
        inputs.append(to_uint8(degradation.apply(to_float(hq), degradation.draw(0, str(k), k))))

    def restore(**options: int) -> Any:
        requests = [Request(key=str(k), image=p, options={"steps": steps, **options}) for k, p in enumerate(inputs)]
        return np.stack([r.image for r in restorer.restore(requests)]).astype(np.float64)

    exact, rows = restore(), []
    for previews, features in ((2, 1), (3, 1), (2, 2), (3, 3)):
        error = np.square(restore(preview_every=previews, aggregator_every=features) - exact).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            decibels = 10 * np.log10(255**2 / error)  # infinite for equal pictures
        row = {"what": "reuse", "steps": steps, "preview_every": previews, "aggregator_every": features}
        rows.append({**row, "psnr_db": round(float(decibels.mean()), 1), "worst_db": round(float(decibels.min()), 1)})
    return rows


def measure_ceiling(device: str, side: int = 8192, rounds: int = 20) -> dict[str, Any]:
    """TFLOP/s of a square bf16 matrix product (float32 on a CPU): the ceiling of all other rates."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds, _ = take_turns({"product": lambda: one @ other}, device, rounds)
    median = statistics.median(seconds["product"])
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"what": "ceiling", "device": name, "side": side, "tflop_per_s": round(2 * side**3 / median / 1e12, 2)}


def main() -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", action="append", choices=sorted(sizes()), help="may be repeated; default nano and middle"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", default="off", choices=["off", "autoencoder", "blocks", "whole"])
    parser.add_argument("--compile-mode", default="")
    parser.add_argument("--graphs", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--merge-previewer", default="auto", choices=["auto", "on", "off"])
    parser.add_argument(
        "--model", type=Path, help="a trained model folder: measures the error of reuse instead of times"
    )
    parser.add_argument("--quick", action="store_true", help="the ceiling only")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    from components.systems.instantir.fast import Speed

    torch.set_num_threads(options.threads)
    speed = Speed(
        merge_previewer=options.merge_previewer,
        compile=options.compile,
        compile_mode=options.compile_mode,
        graphs=options.graphs,
    )
    with options.out.open("a", encoding="utf-8") as stream:

        def write_row(row: Mapping[str, Any]) -> None:
            for line in (print, stream.write):
                line(json.dumps(row) + ("" if line is print else "\n"))
            stream.flush()

        write_row(measure_ceiling(options.device, 8192 if options.device == "cuda" else 1024))
        if options.quick:
            return
        if options.model is not None:
            for row in measure_reuse(options.model, options.device):
                write_row(row)
            return
        for name in options.size or ("nano", "middle"):
            for row in measure_sampling(name, options.device, options.rounds, speed):
                write_row(row)


if __name__ == "__main__":
    main()
