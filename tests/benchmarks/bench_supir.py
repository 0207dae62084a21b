"""Speed and memory of SUPIR's networks with random weights: sampling, a train step, and the peak of a restoration.

    python tests/benchmarks/bench_supir.py                                  # CPU time at two small sizes
    python tests/benchmarks/bench_supir.py --size sdxl --device cuda --compile blocks     # on a GPU: SDXL, 1024 px
    python tests/benchmarks/bench_supir.py --size sdxl --device cuda --train             # a step of 512 px crops

Arms of sampling, in turns on the same inputs: "straightforward", the official loop written with diffusers' own blocks,
which computes texts, sizes and projections anew in every step; and "ours", the product's fast path. Both make the same
latents up to rounding; the difference is printed. TFLOP are counted on the meta device. Times vary between runs:
compare rows of one run, as ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_instantir import Size, measure_ceiling, sizes
from timing import ratio, summary, take_turns

if TYPE_CHECKING:
    import torch

    from components.priors.conditions import SizedConditions
    from components.systems.supir.network import Supir

STEPS: Mapping[str, int] = {"nano": 6, "middle": 3, "sdxl": 50}
"""Sampler steps by size; 50 are the release's."""


def build_network(size: Size, device: str, dtype: torch.dtype) -> Supir:
    """SUPIR's networks of random weights, created on the device; zero-initialised layers get small values."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from components.priors.nano import build_prior, build_tokenizer_json
    from components.priors.robust_encoder import RobustEncoder
    from components.priors.sdxl_config import SDXL_AUTOENCODER
    from components.systems.supir.config import AdaptorConfig
    from components.systems.supir.network import Adaptor, Supir

    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[] if device != "cuda" else [torch.cuda.current_device()]):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)  # weights never take twice the memory
            with torch.device(device):
                prior = build_prior(size.prior, build_tokenizer_json(["red", "blue"], int(size.prior["text_length"])))
        finally:
            torch.set_default_dtype(default_dtype)
        with torch.device(device):
            if size.prior["unet"]["in_channels"] == 4:
                prior.autoencoder = AutoencoderKL.from_config(dict(SDXL_AUTOENCODER))  # type: ignore[assignment]
            prior.autoencoder.float()
        adaptor = Adaptor(prior.unet, AdaptorConfig())
        network = Supir(prior, RobustEncoder(prior.autoencoder), adaptor)
        network.to(device, dtype)
        if device != "meta":
            with torch.no_grad():
                for parameter in adaptor.parameters():
                    if not bool(parameter.any()):
                        parameter.normal_(std=0.02)
    return network


def make_inputs(
    network: Supir, size: Size, dtype: torch.dtype, latent_px: int = 0, batch: int = 1
) -> tuple[SizedConditions, SizedConditions, torch.Tensor, torch.Tensor]:
    """(positive, negative, LQ latents, start noise) of random values."""
    import torch

    from components.priors.conditions import SizedConditions

    unet, device, side = size.prior["unet"], network.prior.device, latent_px or size.latent_px
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind, generator=generator)

    px = float(side * network.prior.factor)
    ids = torch.tensor([[px, px, 0, 0, px, px]], device=device).expand(batch, -1)
    pair = [
        SizedConditions(
            text=random(batch, size.prior["text_length"], unet["cross_attention_dim"]),
            pooled=random(batch, pooled),
            time_ids=ids,
        )
        for _ in range(2)
    ]
    shape = (batch, network.prior.latent_channels, side, side)
    return pair[0], pair[1], random(*shape, kind=torch.float32), random(*shape, kind=torch.float32)


# ------------------------------------------------------------------------------------------------------------- sampling


def plain_eps(
    network: Supir, latents: torch.Tensor, times: torch.Tensor, lq: torch.Tensor, conditions: SizedConditions
) -> torch.Tensor:
    """The networks' noise prediction with diffusers' own blocks, module by module."""
    import torch

    from components.priors.encoder_copy import embed_step

    assert network.adaptor is not None
    unet: Any = network.prior.unet
    adaptor, dtype = network.adaptor, unet.dtype
    own, text = conditions.to(dtype), conditions.text.to(dtype)
    features = []
    control: Any = adaptor.control
    for net, first in (
        (control, control.conv_in(latents.to(dtype)) + control.hint_conv(lq.to(dtype))),
        (unet, unet.conv_in(latents.to(dtype))),
    ):
        temb, x, skips = embed_step(net, times, own.pooled, own.time_ids, dtype), first, [first]
        for block in net.down_blocks:
            attends = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x, more = block(hidden_states=x, temb=temb, **attends)
            skips += more
        x = net.mid_block(x, temb, encoder_hidden_states=text)
        features.append([*skips, x])
    controls, (*skips, x) = features
    connectors = list(reversed(list(adaptor.connectors)))
    x = connectors.pop(0)(controls.pop(), x)
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            feature = controls.pop()
            x = resnet(connectors.pop(0)(feature, skips.pop(), x), temb)
            if attention is not None:
                x = attention(x, encoder_hidden_states=text, return_dict=False)[0]
        if block.upsamplers is not None:
            x = block.upsamplers[0](connectors.pop(0)(feature, x))
    return unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(x))).to(latents.dtype)  # type: ignore[no-any-return]


def straightforward_loop(
    network: Supir,
    positive: SizedConditions,
    negative: SizedConditions,
    lq: torch.Tensor,
    noise: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The official loop, plainly: doubled batch, snapped levels, linear guidance 1 to 4, Euler steps."""
    import torch

    from components.priors.conditions import join
    from components.samplers.edm import edm_sigmas, level_table

    table = level_table(network.prior.schedule).to(lq.device)
    sigmas, both, lq_twice = edm_sigmas(table, steps).to(lq.device), join([negative, positive]), torch.cat([lq, lq])
    latents = noise * (1 + sigmas[0] ** 2).sqrt()
    for step in range(steps):
        sigma = sigmas[step]
        index = (table - sigma).abs().argmin()
        level = table[index]
        twice = torch.cat([latents, latents])
        eps = plain_eps(network, twice / (1 + level**2).sqrt(), index.expand(len(twice)), lq_twice, both)
        clean = twice - level * eps
        without, with_text = clean.chunk(2)
        clean = without + ((1 - 4) * sigma / table[-1] + 4) * (with_text - without)
        latents = latents + (latents - clean) / sigma * (sigmas[step + 1] - sigma)
    return latents


def our_loop(
    fast: Any, positive: SizedConditions, negative: SizedConditions, lq: torch.Tensor, noise: torch.Tensor, steps: int
) -> torch.Tensor:
    """The same loop with the product's parts; each call is a new run, as for a new picture."""
    from components.priors.conditions import join
    from components.samplers.edm import edm_sigmas, level_table, sample_edm
    from components.systems.supir.denoiser import Ramp, SupirDenoiser

    table = level_table(fast.network.prior.schedule).to(lq.device)
    sigmas = edm_sigmas(table, steps)
    denoise = SupirDenoiser(
        predict=fast.run().predict_eps,
        table=table,
        lq=lq,
        conditions=join([negative, positive]),
        guided=True,
        cfg_scale=Ramp(start=1.0, end=4.0),
        control_scale=Ramp(start=1.0, end=1.0),
        sigma_max=float(table[-1]),
    )
    return sample_edm(denoise, noise * (1 + sigmas[0] ** 2).sqrt(), sigmas)


def count_step_tflop(size: Size) -> float:
    """TFLOP of one step with guidance, by torch's counter on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from components.priors.conditions import join

    with torch.no_grad():
        network = build_network(size, "meta", torch.float32)
        positive, negative, lq, _ = make_inputs(network, size, torch.float32)
        times = torch.zeros(2, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter:
            plain_eps(network, torch.cat([lq, lq]), times, torch.cat([lq, lq]), join([negative, positive]))
    return counter.get_total_flops() / 1e12


def measure_sampling(name: str, device: str, rounds: int, speed: Any) -> list[dict[str, Any]]:
    """Rows for both arms, with the ratio of their medians and the difference of their latents."""
    import torch

    from components.systems.supir.fast import FastSupir

    size, steps = sizes()[name], STEPS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        network = build_network(size, device, dtype)
        inputs = make_inputs(network, size, dtype)
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "straightforward": lambda: straightforward_loop(network, *inputs, steps)
        }
        before: tuple[Any, Any] = ({}, {})
        if device == "cuda":  # measured first, as ours changes the weights' memory layout, which slows the other down
            before = take_turns(arms, device, rounds)
            arms = {}
        fast = FastSupir(network, speed)
        arms["ours"] = lambda: our_loop(fast, *inputs, steps)
        seconds, results = take_turns(arms, device, rounds)
    seconds, results = before[0] | seconds, before[1] | results
    tflop, exact, rows = count_step_tflop(size) * steps, results["ours"].float(), []
    for arm, times in seconds.items():
        row = {"what": "sampling", "size": name, "arm": arm, "steps": steps, **summary(times, device)}
        row["ratio"] = ratio(statistics.median(seconds["straightforward"]), statistics.median(times))
        row["tflop"] = round(tflop, 4)
        row["difference"] = float((results[arm].float() - exact).abs().max() / exact.abs().max())
        if device == "cuda":
            row["tflop_per_s"] = ratio(tflop, statistics.median(times), 1)
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------- training, memory


def measure_training(name: str, device: str, rounds: int, batch: int, checkpoint: bool) -> dict[str, Any]:
    """One train step of the adaptor: forward, backward and optimiser; latents and embeddings are precomputed."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from components.priors.block_calls import recompute
    from components.randomness import Noise
    from components.recipes import Optimizer
    from components.systems.supir.objectives import AdaptorObjective
    from components.training import build_optimizers, train_step
    from components.types import Batch

    size = sizes()[name]
    latent_px = size.latent_px // 2  # 512 px crops of 1024 px pictures
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    network = build_network(size, device, dtype)
    assert network.adaptor is not None
    network.adaptor.float()
    if checkpoint:
        network.blocks = network.blocks.wrap_all(recompute)
    objective = AdaptorObjective(network)
    optimizers = build_optimizers(objective, Optimizer(lr=1e-5))
    side = latent_px * network.prior.factor
    positive, _, lq, _ = make_inputs(network, size, torch.float32, latent_px, batch)
    pictures = torch.zeros(batch, 3, side, side, device=device)
    rows = Batch(
        keys=tuple(str(n) for n in range(batch)),
        positions=np.arange(batch),
        hq=pictures,
        lq=pictures,
        prompts=("",) * batch,
        plans=({},) * batch,
        sizes=torch.tensor([[side, side, 0, 0, side, side]] * batch),
        latents=lq,
        embeddings={"text": positive.text, "pooled": positive.pooled},
    )
    noise = Noise(0, rows.positions, device)
    with FlopCounterMode(display=False) as counter:
        train_step(objective, [(rows, noise)], optimizers, lr=1e-5, clip_norm=1.0, precision="bf16")
    tflop = counter.get_total_flops() / 1e12

    def step() -> torch.Tensor:
        train_step(objective, [(rows, noise)], optimizers, lr=1e-5, clip_norm=1.0, precision="bf16")
        return lq

    seconds, _ = take_turns({"step": step}, device, rounds)
    row = {"what": "training", "size": name, "batch": batch, "checkpoint": checkpoint, "px": side, "tflop": tflop}
    row |= summary(seconds["step"], device)
    if device == "cuda":
        row["tflop_per_s"] = ratio(tflop, statistics.median(seconds["step"]), 1)
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def measure_memory(name: str, device: str, sides: list[int]) -> list[dict[str, Any]]:
    """Peak memory of two steps and both autoencoder passes by picture side, above the weights; on a GPU only."""
    import numpy as np
    import torch

    from components.systems.supir.restorer import SupirRestorer
    from components.types import Request

    size = sizes()[name]
    network, rows = build_network(size, device, torch.bfloat16), []
    weights = torch.cuda.memory_allocated()
    for side in sides:
        for tiles in ("exact", "faded"):
            torch.cuda.reset_peak_memory_stats()
            options = {"steps": 2, "autoencoder_tiles": tiles}
            SupirRestorer(network).restore(
                [Request(key="k", image=np.zeros((side, side, 3), np.uint8), options=options)]
            )
            peak = (torch.cuda.max_memory_allocated() - weights) / 2**30
            row = {"what": "memory", "size": name, "side": side, "autoencoder_tiles": tiles}
            rows.append({**row, "weights_gib": round(weights / 2**30, 2), "above_weights_gib": round(peak, 2)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=sorted(STEPS), help="may be repeated; nano and middle")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", default="off", choices=["off", "autoencoder", "blocks", "whole"])
    parser.add_argument("--train", action="store_true", help="a train step instead of sampling")
    parser.add_argument("--batch", type=int, default=4, help="crops of the train step")
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the train step")
    parser.add_argument("--memory", type=int, nargs="+", help="picture sides whose peak memory is measured, on a GPU")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    import torch

    from components.priors.fast_unet import Speed

    torch.set_num_threads(options.threads)
    with options.out.open("a", encoding="utf-8") as stream:

        def write_row(row: Mapping[str, Any]) -> None:
            print(json.dumps(row))
            stream.write(json.dumps(row) + "\n")

        write_row(measure_ceiling(options.device, 8192 if options.device == "cuda" else 1024))
        for name in options.size or ("nano", "middle"):
            if options.memory:
                rows = measure_memory(name, options.device, options.memory)
            elif options.train:
                rows = [measure_training(name, options.device, options.rounds, options.batch, options.checkpoint)]
            else:
                rows = measure_sampling(name, options.device, options.rounds, Speed(compile=options.compile))
            for row in rows:
                write_row(row)


if __name__ == "__main__":
    main()
