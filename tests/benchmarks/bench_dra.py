"""What DRA's adapters cost over the bare prior: FLOP of a denoiser call, time of a call, a train step, its memory.

    python tests/benchmarks/bench_dra.py --flop                          # on the meta device, at 512 and 1024 px
    python tests/benchmarks/bench_dra.py                                 # CPU time at both nano sizes
    python tests/benchmarks/bench_dra.py --size sdxl --size sd3 --device cuda --compile blocks
    python tests/benchmarks/bench_dra.py --size sdxl --size sd3 --device cuda --train --checkpoint

Arms of a call, in turns on the same inputs, random weights, a guided pair of rows: "bare", the prior's walk without
adapters; "adapters", the same walk with them; and "fast", the product's fast path in a run, where what depends on text
alone is computed once. The LQ path is computed once for a picture, and so is not in a call; `lq_tflop` is its work.
Times vary between runs: compare rows of one run, as ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_instantir import measure_ceiling, sizes
from timing import ratio, summary, take_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAPS: Mapping[str, str] = {"nano": "nano", "sdxl": "sdxl"}
TOKENS = ("sd3-nano", "sd3")
SIDES: Mapping[str, tuple[int, ...]] = {"nano": (128,), "sd3-nano": (128,), "sdxl": (512, 1024), "sd3": (512, 1024)}
"""Picture sides in pixels by size."""


def build_network(size: str, device: str, dtype: torch.dtype) -> Any:
    """DRA's networks of random weights, created on the device; zero-initialised layers get small values."""
    import torch

    from components.systems.dra.config import AdapterConfig, LoraConfig
    from components.systems.dra.network import Dra
    from components.systems.dra.tokens import TokenDra

    default_dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[] if device != "cuda" else [torch.cuda.current_device()]):
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)  # weights never take twice the memory
            with torch.device(device):
                prior = _token_prior(size) if size in TOKENS else _map_prior(size)
        finally:
            torch.set_default_dtype(default_dtype)
        prior.freeze()
        kind: Any = TokenDra if size in TOKENS else Dra
        network = kind(prior, AdapterConfig(), LoraConfig())
        network.adapters.to(dtype)
        if device != "meta":
            with torch.no_grad():
                for part in network.parts().values():
                    for value in part.values():
                        if not bool(value.any()):
                            value.normal_(std=0.02)
    return network


def _map_prior(size: str) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from components.priors.nano import build_prior, build_tokenizer_json
    from components.priors.sdxl_config import SDXL_AUTOENCODER

    own = sizes()[MAPS[size]].prior
    prior = build_prior(own, build_tokenizer_json(["red", "blue"], int(own["text_length"])))
    if own["unet"]["in_channels"] == 4:
        prior.autoencoder = AutoencoderKL.from_config(dict(SDXL_AUTOENCODER))  # type: ignore[assignment]
    prior.autoencoder.float()
    return prior


def _token_prior(size: str) -> Any:
    """Without text encoders: texts are random."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from components.priors.autoencoder import SpaceToDepthAutoencoder
    from components.priors.sd3 import SD3Prior
    from components.priors.sd3_config import NANO_SD3, SD3_AUTOENCODER, SD3_TRANSFORMER
    from components.samplers.schedules import FlowSchedule

    small = size == "sd3-nano"
    autoencoder: Any = (
        SpaceToDepthAutoencoder(**NANO_SD3["autoencoder"])
        if small
        else AutoencoderKL.from_config(dict(SD3_AUTOENCODER))
    )
    return SD3Prior(
        name="untrained",
        digest="",
        network=SD3Transformer2DModel(**(NANO_SD3["transformer"] if small else SD3_TRANSFORMER)),
        autoencoder=autoencoder.float(),
        text_encoders=(None, None, None),
        tokenizers=(None, None, None),
        schedule=FlowSchedule(shift=3.0),
    )


def text_tokens(size: str) -> int:
    """Of a prompt: SDXL 77; SD3 both CLIPs' and, as in the reference's counts, as many of T5."""
    return {"nano": 16, "sd3-nano": 32, "sdxl": 77, "sd3": 154}[size]


def make_inputs(
    network: Any, size: str, side: int, rows: int, dtype: torch.dtype
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """(conditions, noisy latents, times, LQ latents of half the rows, or of the only one) of random values."""
    import torch

    from components.priors.conditions import Conditions, SizedConditions

    prior, config = network.prior, network.prior.network.config
    device = prior.device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(1)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind, generator=generator)

    latent_px = side // prior.factor
    shape = (prior.latent_channels, latent_px, latent_px)
    latents, lq = random(rows, *shape, kind=torch.float32), random(max(1, rows // 2), *shape, kind=torch.float32)
    if size in TOKENS:
        text = random(rows, text_tokens(size), config["joint_attention_dim"])
        conditions: Any = Conditions(text=text, pooled=random(rows, config["pooled_projection_dim"]))
        return conditions, latents, torch.full((rows,), 0.5, device=device), lq
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=device).expand(rows, -1)
    text = random(rows, text_tokens(size), config["cross_attention_dim"])
    conditions = SizedConditions(text=text, pooled=random(rows, pooled), time_ids=ids)
    return conditions, latents, torch.full((rows,), 500, dtype=torch.int64, device=device), lq


def predict(network: Any, latents: Tensor, times: Tensor, features: Any, conditions: Any) -> Tensor:
    """A call with the adapters, without the fast path."""
    call = network.predict_velocity if network.shape == "tokens" else network.predict_eps
    return call(latents, times, features, conditions)  # type: ignore[no-any-return]


def predict_bare(network: Any, latents: Tensor, times: Tensor, conditions: Any) -> Tensor:
    """A call of the prior's own walk."""
    from components.priors.encoder_copy import embed_step
    from components.priors.mmdit_walk import walk_mmdit
    from components.priors.unet_walk import text_inputs, walk_unet

    own: Any = network.prior.network
    noisy, conditions = latents.to(network.dtype), conditions.cast(network.dtype)
    if network.shape == "tokens":
        embedding = own.time_text_embed(1000 * times, conditions.pooled)
        return walk_mmdit(own, noisy, embedding, conditions.text).to(latents.dtype)
    embedding = embed_step(own, times, conditions.pooled, conditions.time_ids, network.dtype)
    return walk_unet(own, noisy, text_inputs(own, embedding, conditions.text)).to(latents.dtype)


# ----------------------------------------------------------------------------------------------------------------- FLOP


def count_tflop(size: str, side: int, rows: int = 1) -> dict[str, float]:
    """TFLOP (a multiplication and an addition are two) on the meta device: a bare call, what adapters add, the LQ path.

    The LoRA is merged, as in the product.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def tflop(call: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e12

    with torch.no_grad():
        network = build_network(size, "meta", torch.float32).merge_lora()
        conditions, latents, times, lq = make_inputs(network, size, side, rows, torch.float32)
        bare = tflop(lambda: predict_bare(network, latents, times, conditions))
        features = network.features(lq)
        own = tflop(lambda: predict(network, latents, times, features, conditions))
        path = tflop(lambda: network.features(lq))
    return {"bare_tflop": bare, "adapters_tflop": own - bare, "lq_tflop": path}


# ----------------------------------------------------------------------------------------------------------------- time


def measure_calls(size: str, side: int, device: str, rounds: int, speed: Any, calls: int = 0) -> list[dict[str, Any]]:
    """Rows for the arms: a run of a few guided calls each, with the ratio to the bare prior's."""
    import torch

    from components.systems.dra.steps import steps_of

    dtype, calls = torch.bfloat16 if device == "cuda" else torch.float32, calls or (8 if device == "cuda" else 4)
    with torch.inference_mode():
        network = build_network(size, device, dtype).merge_lora()
        conditions, latents, times, lq = make_inputs(network, size, side, 2, dtype)
        features = network.features(lq)

        def bare() -> Tensor:
            return [predict_bare(network, latents, times, conditions) for _ in range(calls)][-1]

        def adapted() -> Tensor:
            return [predict(network, latents, times, features, conditions) for _ in range(calls)][-1]

        arms: dict[str, Callable[[], Tensor]] = {"bare": bare, "adapters": adapted}
        before: tuple[Any, Any] = ({}, {})
        if device == "cuda":  # measured first, as the fast path changes the weights' memory layout
            before = take_turns(arms, device, rounds)
            arms = {}
        steps: Any = steps_of(network, speed)

        def fast() -> Tensor:
            run = steps.fast.run()  # as for a new picture
            call = run.predict_velocity if network.shape == "tokens" else run.predict_eps
            # new times in every call, as in a sampler
            return [call(latents, times.clone(), features, conditions) for _ in range(calls)][-1]

        arms["fast"] = fast
        seconds, results = take_turns(arms, device, rounds)
    seconds, results = before[0] | seconds, before[1] | results
    tflop, rows = count_tflop(size, side, 2), []
    exact = results["adapters"].float()
    for arm, times_s in seconds.items():
        row = {"what": "calls", "size": size, "px": side, "arm": arm, "calls": calls, **summary(times_s, device)}
        row["cost"] = ratio(statistics.median(times_s), statistics.median(seconds["bare"]), 3)
        row["tflop"] = round(calls * (tflop["bare_tflop"] + (arm != "bare") * tflop["adapters_tflop"]), 6)
        if arm != "bare":
            row["difference"] = float((results[arm].float() - exact).abs().max() / exact.abs().max())
        if device == "cuda":
            row["tflop_per_s"] = ratio(row["tflop"], statistics.median(times_s), 1)
        rows.append(row)
    return rows


def measure_training(size: str, side: int, device: str, rounds: int, batch: int, checkpoint: bool) -> dict[str, Any]:
    """One train step of adapters and LoRA: encoding LQ, forward, backward, optimiser; HQ latents are precomputed."""
    import numpy as np
    import torch

    from components.priors.block_calls import recompute
    from components.randomness import Noise
    from components.recipes import Optimizer
    from components.systems.dra.objectives import AdaptersObjective, FlowAdaptersObjective
    from components.training import build_optimizers, train_step
    from components.types import Batch

    network = build_network(size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    network.adapters.float()
    if checkpoint:
        network.blocks = network.blocks.wrap_all(recompute)
    tokens = network.shape == "tokens"
    conditions, latents, _, _ = make_inputs(network, size, side, batch, torch.float32)
    objective: Any = (FlowAdaptersObjective if tokens else AdaptersObjective)(network, null_share=0.0, lq_share=0.0)
    optimizers = build_optimizers(objective, Optimizer(lr=1e-5))
    pictures = torch.zeros(batch, 3, side, side, device=device)
    rows = Batch(
        keys=tuple(str(n) for n in range(batch)),
        positions=np.arange(batch),
        hq=pictures,
        lq=pictures,
        prompts=("",) * batch,
        plans=({},) * batch,
        sizes=torch.tensor([[side, side, 0, 0, side, side]] * batch),
        latents=latents,
        embeddings={} if tokens else {"text": conditions.text, "pooled": conditions.pooled},
    )
    if tokens:  # no text encoders here
        network.prior.conditions = lambda prompts: conditions  # type: ignore[method-assign]
    noise = Noise(0, rows.positions, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> Tensor:
        train_step(objective, [(rows, noise)], optimizers, lr=1e-5, clip_norm=1.0, precision="bf16")
        return latents

    seconds, _ = take_turns({"step": step}, device, rounds)
    row = {"what": "training", "size": size, "px": side, "batch": batch, "checkpoint": checkpoint}
    row |= summary(seconds["step"], device)
    row["pictures_per_s"] = ratio(batch, statistics.median(seconds["step"]))
    row["trained"] = sum(p.numel() for p in objective.trainables["adapters"].parameters())
    if device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", choices=sorted(SIDES), help="may be repeated; both nano sizes")
    parser.add_argument("--side", type=int, action="append", help="picture sides in pixels; 128, or 512 and 1024")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", default="off", choices=["off", "autoencoder", "blocks", "whole"])
    parser.add_argument("--flop", action="store_true", help="only count, on the meta device; SDXL and SD3 by default")
    parser.add_argument("--train", action="store_true", help="a train step instead of calls, at the first side")
    parser.add_argument("--batch", type=int, default=4, help="crops of the train step")
    parser.add_argument("--checkpoint", action="store_true", help="recompute activations in the train step")
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

        if not options.flop:
            write_row(measure_ceiling(options.device, 8192 if options.device == "cuda" else 1024))
        for size in options.size or (("sdxl", "sd3") if options.flop else ("nano", "sd3-nano")):
            sides = options.side or SIDES[size]
            if options.train:
                write_row(
                    measure_training(size, sides[0], options.device, options.rounds, options.batch, options.checkpoint)
                )
                continue
            for side in sides:
                if options.flop:
                    counts = {name: round(value, 4) for name, value in count_tflop(size, side).items()}
                    write_row({"what": "flop", "size": size, "px": side, **counts})
                    continue
                for row in measure_calls(size, side, options.device, options.rounds, Speed(compile=options.compile)):
                    write_row(row)


if __name__ == "__main__":
    main()
