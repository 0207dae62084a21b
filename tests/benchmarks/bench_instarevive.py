"""InstaRevive's one step at the papers' sizes: encode, generate and decode, plain and fast; and its training update.

    python tests/benchmarks/bench_instarevive.py                                         # CPU, nano sizes
    python tests/benchmarks/bench_instarevive.py --device cuda --what generate512 --compile on --batch 1 --batch 16
    python tests/benchmarks/bench_instarevive.py --device cuda --what generate1024 --compile on --batch 1 --batch 8
    python tests/benchmarks/bench_instarevive.py --device cuda --what update --batch 4

All sizes use the same code. Weights are random and created on the device: nothing is downloaded. generate512 is
PixArt's DiT (611M) with the autoencoder of Stable Diffusion on 512 x 512 with 300 tokens. generate1024 is SDXL's
UNet and autoencoder on 1024 x 1024 with 77 tokens. On a CPU both are small networks of the same kind. "plain" is the
product's code in bfloat16, "ours" the same with fast.FastOneStep: channels last, compiled blocks (--compile on), calls
replayed from CUDA graphs (--graphs on), the autoencoder in bfloat16. Arms take turns; medians are of wall time on a GPU
(synchronised), of CPU time elsewhere. A line is void if an arm spreads over 25 %. `difference` is the largest
difference of the arms' pictures over the largest value, `psnr_db` the PSNR of ours against plain.

It needs torch, numpy, diffusers, transformers, peft, safetensors, omegaconf, OpenCV and (for update) simplejpeg, and of
this project components/.
Compiling blocks takes about a minute for each size; --compile off --graphs on has most of the gain at a batch of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timing import psnr, ratio, repeat, summary, synchronise

if TYPE_CHECKING:
    import torch

    from components.priors.conditions import Conditions
    from components.randomness import Noise
    from components.systems.instarevive.fast import FastOneStep, Speed
    from components.types import Batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """A set of shapes.

    Attributes:
        family: of the generator. network, autoencoder: diffusers' arguments.
        side_px: of the pictures. tokens: of a prompt with padding. text_tokens: of them without padding (0: no mask).
        latency_s: goal, most seconds at a batch of one. images_per_s: goal, least rate at any batch. 0: no goal.
    """

    family: str
    network: Mapping[str, Any]
    autoencoder: Mapping[str, Any]
    side_px: int
    tokens: int
    text_tokens: int = 0
    latency_s: float = 0.0
    images_per_s: float = 0.0


def cases() -> dict[str, dict[str, Case]]:
    """Cases by --what, by size: "nano" for a CPU, "real" for a GPU."""
    from components.priors.nano import NANO
    from components.priors.one_text_config import PIXART_DIT, SD_VAE
    from components.priors.sdxl_config import SDXL_UNET

    small_vae = {**SD_VAE, "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8}
    small_dit = {
        **PIXART_DIT,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 4,
        "cross_attention_dim": 64,
        "caption_channels": 64,
        "sample_size": 16,
    }
    small_unet = {**NANO["unet"], "in_channels": 4, "out_channels": 4}
    dit = Case(
        family="pixart",
        network=PIXART_DIT,
        autoencoder=SD_VAE,
        side_px=512,
        tokens=300,
        text_tokens=28,
        latency_s=0.025,
        images_per_s=60,
    )
    unet = Case(
        family="sdxl",
        network=SDXL_UNET,
        autoencoder={**SD_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        side_px=1024,
        tokens=77,
        latency_s=0.2,
        images_per_s=8,
    )
    none: dict[str, Any] = {"latency_s": 0.0, "images_per_s": 0.0, "autoencoder": small_vae, "side_px": 128}
    return {
        "generate512": {"real": dit, "nano": replace(dit, network=small_dit, tokens=16, text_tokens=5, **none)},
        "generate1024": {"real": unet, "nano": replace(unet, network=small_unet, tokens=16, **none)},
    }


def build_case(case: Case, device: str, dtype: torch.dtype, image_dtype: torch.dtype) -> tuple[Any, Any]:
    """(generator, backbone) with random weights on the device, networks in dtype, the autoencoder in image_dtype."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from torch import nn

    from components.priors.one_text import OneTextPrior
    from components.priors.sdxl import Prior
    from components.samplers.schedules import Schedule
    from components.systems.instarevive.backbone import Backbone
    from components.systems.instarevive.network import EpsPredictor, OneStepGenerator, build_network

    schedule = (
        Schedule(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear") if case.family == "pixart" else Schedule()
    )
    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[] if device != "cuda" else [torch.cuda.current_device()]):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)  # weights never take twice the memory
            with torch.device(device):
                network = nn.Module.to(build_network(case.family, case.network), dtype=dtype)
            torch.set_default_dtype(image_dtype)
            with torch.device(device):
                arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in case.autoencoder.items()}
                autoencoder = nn.Module.to(AutoencoderKL(**arguments), dtype=image_dtype)
        finally:
            torch.set_default_dtype(default_dtype)
    prior: Any
    if case.family == "pixart":
        prior = OneTextPrior(
            name="random",
            digest="",
            network=network,
            autoencoder=autoencoder,
            text_encoder=None,
            tokenizer=None,
            schedule=schedule,
        )
    else:
        prior = Prior(
            name="random",
            digest="",
            unet=network,  # type: ignore[arg-type]
            autoencoder=autoencoder,
            text_encoders=(nn.Identity(), nn.Identity()),
            tokenizers=(),
            image_encoder=nn.Identity(),
            schedule=schedule,
        )
    prior.freeze()
    return OneStepGenerator(EpsPredictor(network, schedule)).eval(), Backbone(family=case.family, prior=prior)  # type: ignore


def make_inputs(case: Case, device: str, batch: int) -> tuple[Conditions, torch.Tensor]:
    """Random conditions and pictures [batch, 3, H, W] in [-1, 1]."""
    import torch

    from components.priors.conditions import Conditions

    generator = None if device == "meta" else torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    pictures = random(batch, 3, case.side_px, case.side_px).clamp(-1, 1)
    if case.family == "pixart":
        mask = None
        if case.text_tokens:
            mask = (torch.arange(case.tokens, device=device) < case.text_tokens).float().expand(batch, -1).contiguous()
        return Conditions(text=random(batch, case.tokens, case.network["caption_channels"]), mask=mask), pictures
    pooled = case.network["projection_class_embeddings_input_dim"] - 6 * case.network["addition_time_embed_dim"]
    size = torch.tensor([[case.side_px, case.side_px, 0, 0, case.side_px, case.side_px]], device=device)
    return (
        Conditions(
            text=random(batch, case.tokens, case.network["cross_attention_dim"]),
            pooled=random(batch, pooled),
            time_ids=size.float().expand(batch, -1).contiguous(),
        ),
        pictures,
    )


# ----------------------------------------------------------------------------------------------------------- one step


def count_flops(case: Case) -> dict[str, float]:
    """TFLOP of encode, generate and decode for one picture, by torch's counter on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    tflop = {}
    with torch.no_grad():
        generator, backbone = build_case(case, "meta", torch.float32, torch.float32)
        conditions, pictures = make_inputs(case, "meta", 1)
        side = case.side_px // backbone.factor
        latents = torch.empty(1, backbone.latent_channels, side, side, device="meta")
        calls: dict[str, Callable[[], Any]] = {
            "encode": lambda: backbone.autoencoder.encode(pictures),
            "generate": lambda: generator(latents, conditions),
            "decode": lambda: backbone.autoencoder.decode(latents),
        }
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            tflop[name] = counter.get_total_flops() / 1e12
    return tflop


def one_step(fast: FastOneStep, conditions: Conditions, pictures: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    """Pictures through encoder, generator and decoder; the autoencoder processes `chunk` of them at a time (0: all)."""
    import torch

    chunk = chunk or len(pictures)
    lq = torch.cat([fast.encode(part) for part in pictures.split(chunk)])
    clean = fast.generate(lq, conditions)
    return torch.cat([fast.decode(part) for part in clean.split(chunk)])


def measure_generate(
    what: str,
    size: str,
    device: str = "cpu",
    batches: Sequence[int] = (1,),
    rounds: int = 5,
    speed: Speed | None = None,
    chunk: int = 0,
) -> list[dict[str, Any]]:
    """Rows for the plain arm and ours at each batch, and for each of the three calls alone at the first batch."""
    import torch

    from components.systems.instarevive.fast import FastOneStep, Speed

    case = cases()[what][size]
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # as in the product: SDXL's autoencoder stays in float32, unless Speed casts it
    image_dtype = dtype if case.family == "pixart" else torch.float32
    plain_speed = Speed(channels_last="off")
    speed = speed or Speed(channels_last="on", autoencoder="bf16" if on_gpu else "kept")
    tflop = count_flops(case)
    rows = []
    networks = build_case(case, device, dtype, image_dtype)
    arms = {"plain": FastOneStep(*networks, plain_speed)}
    plain = {b: _time_arms(arms, case, device, b, rounds, chunk) for b in batches}
    # FastOneStep changes the modules in place, so the plain arm comes first
    arms = {"ours": FastOneStep(*networks, speed)}
    for batch in batches:
        ours = _time_arms(arms, case, device, batch, rounds, chunk)
        for arm, (times, result, once_s, peak) in (("plain", plain[batch]["plain"]), ("ours", ours["ours"])):
            median = statistics.median(times)
            row = {"what": what, "size": size, "arm": arm, "batch": batch, **summary(times, device)}
            row |= {"images_per_s": round(batch / median, 2), "once_s": round(once_s, 1)}
            row |= {"tflop": round(sum(tflop.values()) * batch, 4)}
            row |= {
                "compile": speed.compile if arm == "ours" else "off",
                "graphs": arm == "ours" and speed.graphs == "on",
            }
            if arm == "ours":
                exact = plain[batch]["plain"][1]
                row |= {"difference": float((result - exact).abs().max() / exact.abs().max())}
                row |= {"psnr_db": round(psnr(result, exact), 1)}
                row |= {"ratio_to_plain": ratio(statistics.median(plain[batch]["plain"][0]), median)}
            if on_gpu:
                row |= {"tflop_per_s": ratio(sum(tflop.values()) * batch, median, 1), "peak_gib": round(peak, 1)}
            rows.append({**row, **_goals(case, batch, median)})
    rows.append(
        {
            "what": f"{what} calls",
            "size": size,
            "arm": "ours",
            "batch": batches[0],
            **_time_calls(arms["ours"], case, device, batches[0], rounds, tflop),
        }
    )
    return rows


def _time_arms(
    arms: Mapping[str, FastOneStep], case: Case, device: str, batch: int, rounds: int, chunk: int
) -> dict[str, tuple[list[float], torch.Tensor, float, float]]:
    """(seconds, pictures as float32 on the CPU, seconds of the first call, peak GiB) of each arm."""
    import torch

    conditions, pictures = make_inputs(case, device, batch)
    results = {}
    with torch.inference_mode():
        for name, fast in arms.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            one_step(fast, conditions, pictures, chunk)
            synchronise(device)
            once_s = time.perf_counter() - start
            times, result = repeat(lambda fast=fast: one_step(fast, conditions, pictures, chunk), device, rounds)  # type: ignore
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            results[name] = (times, result.float().cpu(), once_s, peak)
    return results


def _time_calls(
    fast: FastOneStep, case: Case, device: str, batch: int, rounds: int, tflop: Mapping[str, float]
) -> dict[str, Any]:
    """Median seconds and TFLOP of each call alone."""
    import torch

    conditions, pictures = make_inputs(case, device, batch)
    row: dict[str, Any] = {}
    with torch.inference_mode():
        lq = fast.encode(pictures)
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "encode": lambda: fast.encode(pictures),
            "generate": lambda: fast.generate(lq, conditions),
            "decode": lambda: fast.decode(lq),
        }
        for name, call in calls.items():
            times, _ = repeat(call, device, rounds)
            row[f"{name}_s"] = round(statistics.median(times), 5)
            row[f"{name}_tflop"] = round(tflop[name] * batch, 4)
    return row


def _goals(case: Case, batch: int, median: float) -> dict[str, Any]:
    """The case's goals that apply to this batch, and whether they are reached."""
    goals: dict[str, Any] = {}
    if case.latency_s and batch == 1:
        goals |= {"goal_s": case.latency_s, "latency_reached": median <= case.latency_s}
    if case.images_per_s:
        goals |= {"goal_images_per_s": case.images_per_s, "rate_reached": batch / median >= case.images_per_s}
    return goals


# ------------------------------------------------------------------------------------------------------------- update


def measure_update(
    size: str, device: str = "cpu", batch: int = 1, rounds: int = 3, fake: str = "full", checkpoint: bool = True
) -> dict[str, Any]:
    """A row for a whole training step of the three networks: generator and fake score, both with their optimiser.

    Shapes are generate512's. Trained weights are float32, forward passes under bf16 on a GPU; the autoencoder is in
    bf16 there. The regression is LPIPS's network with random weights, which costs as much as the real one.

    Args:
        fake: "full" or "lora".
        checkpoint: recompute activations of networks and decoder in the backward pass.
    """
    import torch

    from components.recipes import Optimizer
    from components.training import build_optimizers, train_step

    on_gpu = device == "cuda"
    case = cases()["generate512"][size]
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    objective = build_update(case, device, fake, checkpoint)
    optimizers = build_optimizers(objective, Optimizer())
    noisy_batch = update_batch(case, device, batch)
    metrics: dict[str, float] = {}

    def step() -> torch.Tensor:
        # with a learning rate of zero, every step does the same work on the same weights
        metrics.update(
            train_step(
                objective, [noisy_batch], optimizers, lr=0.0, clip_norm=1.0, precision="bf16" if on_gpu else "fp32"
            )
        )
        return torch.tensor(metrics["loss_fake"])

    times, _ = repeat(step, device, rounds)
    parameters = {
        name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in objective.trainables.items()
    }
    row = {"what": "update", "size": size, "fake": fake, "checkpoint": checkpoint, "batch": batch}
    row |= {**summary(times, device), "images_per_s": round(batch / statistics.median(times), 3), "trained": parameters}
    row |= {"losses": {name: round(metrics[name], 5) for name in ("loss_regression", "loss_dsm", "loss_fake")}}
    if on_gpu:
        row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
    return row


def build_update(case: Case, device: str, fake: str, checkpoint: bool) -> Any:
    """The product's objective with a case's random networks: a copy of the prior as generator, real and fake score."""
    import torch

    from components.objectives.distillation import Distillation
    from components.objectives.regression import VggLpips
    from components.randomness import seeded_init
    from components.systems.instarevive.network import OneStepGenerator
    from components.systems.instarevive.objective import InstaReviveObjective
    from components.systems.instarevive.scores import build_scores

    on_gpu = device == "cuda"
    _, backbone = build_case(case, device, torch.float32, torch.bfloat16 if on_gpu else torch.float32)
    generator = OneStepGenerator(backbone.predictor(trainable=True))
    real, fake_score = build_scores(backbone.predictor(), fake, rank=64)  # type: ignore[arg-type]
    if checkpoint:
        for predictor in (generator.predictor, fake_score):
            predictor.network.enable_gradient_checkpointing()  # type: ignore[operator]
    with seeded_init(0, "lpips"):
        perceptual = VggLpips().to(device)
    for name, parameter in perceptual.named_parameters():
        if name.startswith("lin"):
            parameter.data.abs_()  # like the trained ones: a distance must not be negative
    settings = Distillation(fake=fake, checkpoint_decoder=checkpoint)  # type: ignore[arg-type]
    return InstaReviveObjective(
        generator, real, fake_score, backbone, RandomTexts(case, device), settings, perceptual=perceptual
    )


class RandomTexts:
    """objective.Texts of random embeddings, as if a text encoder ran before."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device

    def conditions(self, batch: Batch, dropped: torch.Tensor) -> Conditions:
        return make_inputs(self.case, self.device, len(batch))[0]

    def unconditional(self, batch: Batch) -> Conditions:
        conditions = self.conditions(batch, batch.sizes)
        return replace(conditions, text=-conditions.text)  # another text, so that guidance has an effect


def update_batch(case: Case, device: str, batch: int) -> tuple[Batch, Noise]:
    """Random pairs and their noise."""
    import numpy as np
    import torch

    from components.randomness import Noise
    from components.types import Batch

    positions, side = np.arange(batch), case.side_px
    _, pictures = make_inputs(case, device, 2 * batch)
    rows = Batch(
        keys=[str(p) for p in positions],
        positions=positions,
        hq=pictures[:batch],
        lq=pictures[batch:],
        prompts=[""] * batch,
        sizes=torch.tensor([[side, side, 0, 0, side, side]], device=device).expand(batch, -1),
    )
    return rows, Noise(0, positions, device)


# --------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    whats = [*cases(), "update"]
    parser.add_argument("--what", action="append", choices=whats, help="may be repeated; default all")
    parser.add_argument("--size", default="", choices=["", "nano", "real"], help="default: nano on a CPU, else real")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", action="append", type=int, help="may be repeated; default 1")
    parser.add_argument("--chunk", type=int, default=0, help="pictures in a call of the autoencoder; 0: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", default="off", choices=["off", "on", "whole"], help="on compiles blocks")
    parser.add_argument("--compile-mode", default="")
    parser.add_argument("--graphs", default="", choices=["", "on", "off"], help="default: on with a GPU")
    parser.add_argument("--no-checkpoint", action="store_true", help="update: keep activations")
    parser.add_argument("--autotune", action="store_true", help="cuDNN benchmarks its convolutions, in all arms")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    from components.systems.instarevive.fast import Speed

    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = options.autotune
    on_gpu = options.device == "cuda"
    speed = Speed(
        compile={"on": "blocks"}.get(options.compile, options.compile),  # type: ignore[arg-type]
        compile_mode=options.compile_mode,
        channels_last="on",
        graphs=options.graphs or ("on" if on_gpu else "off"),
        autoencoder="bf16" if on_gpu else "kept",
    )
    size = options.size or ("real" if on_gpu else "nano")
    with options.out.open("a", encoding="utf-8") as stream:

        def write_row(row: Mapping[str, Any]) -> None:
            for line in (print, stream.write):
                line(json.dumps(row) + ("" if line is print else "\n"))
            stream.flush()

        write_row(
            {"what": "device", "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__}
        )
        batches = options.batch or [1]
        for what in options.what or whats:
            if what == "update":
                for fake in ("full", "lora"):
                    for batch in batches:
                        write_row(
                            measure_update(size, options.device, batch, options.rounds, fake, not options.no_checkpoint)
                        )
                continue
            for row in measure_generate(what, size, options.device, batches, options.rounds, speed, options.chunk):
                write_row(row)


if __name__ == "__main__":
    main()
