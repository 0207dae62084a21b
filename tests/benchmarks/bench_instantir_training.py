"""The Aggregator's train step with plain and fast forward passes, and its share of the device's ceiling.

    python tests/benchmarks/bench_instantir_training.py                                    # CPU, nano size
    python tests/benchmarks/bench_instantir_training.py --size sdxl --device cuda --compile autoencoder --batch 4

Sizes, networks and clocks are those of bench_instantir.py. On a GPU frozen networks are bf16, as in the shipped recipe,
and the Aggregator is float32 under autocast. The FLOP are the model's own, by torch's counter, without recomputation.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_instantir import Size, build_network, measure_ceiling, sizes
from timing import ratio, summary, take_turns

if TYPE_CHECKING:
    import torch

    from components.systems.instantir.fast import Speed
    from components.systems.instantir.network import InstantIR

STAGE_BATCH = 2


def measure_training(
    name: str,
    device: str = "cpu",
    rounds: int = 5,
    speed: Speed | None = None,
    batch_size: int = STAGE_BATCH,
    half_autoencoder: bool = False,
    latents_in_batch: bool = False,
) -> list[dict[str, Any]]:
    """Rows for the Aggregator's train step, with plain and fast forward passes; FLOP by torch's counter.

    With `half_autoencoder`, the autoencoder runs in half precision, as one like sdxl-vae-fp16-fix can. With
    `latents_in_batch`, targets are encoded before (`precompute:` of a corpus spec), and only LQ pictures are encoded.
    """
    from dataclasses import replace

    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from components.randomness import Noise
    from components.recipes import Optimizer
    from components.systems.instantir.fast import Speed
    from components.systems.instantir.objectives import AggregatorObjective
    from components.training import build_optimizers, train_step
    from components.types import Batch

    size, on_gpu = sizes()[name], device == "cuda"
    network = build_network(size, device, torch.bfloat16 if on_gpu else torch.float32)
    assert network.aggregator is not None
    network.aggregator.float()
    if half_autoencoder:
        torch.nn.Module.to(network.prior.autoencoder, dtype=network.dtype)
    side, positions = size.latent_px * network.prior.factor, np.arange(batch_size)
    pictures = [torch.from_numpy(values).to(device) for values in _pictures(batch_size, side)]
    batch = Batch(
        keys=[str(p) for p in positions],
        positions=positions,
        hq=pictures[0],
        lq=pictures[1],
        prompts=[""] * batch_size,
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(batch_size, -1),
    )
    if latents_in_batch:
        with torch.no_grad():
            batch = replace(batch, latents=network.prior.encode(batch.hq))
    _shape_text(network, size)
    speed = speed or Speed()
    if speed.checkpoint:
        _checkpoint_plainly(network)
    objectives = {
        "plain": AggregatorObjective(network),
        "ours": AggregatorObjective(network, speed=speed),
    }
    precision = "bf16" if on_gpu else "fp32"
    losses: dict[str, float] = {}

    def step(arm: str) -> Callable[[], torch.Tensor]:
        objective, noise = objectives[arm], Noise(0, positions, device)
        optimizers = build_optimizers(objective, Optimizer())

        def run() -> torch.Tensor:
            # with a learning rate of zero, every step of every arm does the same work on the same weights
            metrics = train_step(objective, [(batch, noise)], optimizers, lr=0.0, clip_norm=1.0, precision=precision)
            losses[arm] = metrics["loss"]
            return torch.tensor(metrics["loss"])

        return run

    # the model's own work: LoRA merged if the arm merges it, nothing computed twice
    objectives["counted"] = AggregatorObjective(network, speed=replace(speed, compile="off", checkpoint=False))
    with FlopCounterMode(display=False) as counter:
        step("counted")()
    del objectives["counted"]
    tflop = counter.get_total_flops() / 1e12
    seconds, _ = take_turns({arm: step(arm) for arm in objectives}, device, rounds)
    rows = []
    for arm, times in seconds.items():
        row = {"what": "aggregator train step", "size": name, "arm": arm, "batch": batch_size, **summary(times, device)}
        row |= {"ratio_to_plain": ratio(statistics.median(seconds["plain"]), statistics.median(times))}
        row |= {"loss": losses[arm], "tflop": round(tflop, 4), "compile": speed.compile if arm == "ours" else "off"}
        if on_gpu:
            row |= {"tflop_per_s": ratio(tflop, statistics.median(times), 1)}
            row |= {"samples_per_s": round(batch_size / statistics.median(times), 2)}
            row |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
        rows.append(row)
    return rows


def _checkpoint_plainly(network: InstantIR) -> None:
    """Gradient checkpointing in diffusers' own blocks, for the plain arm."""
    import functools

    from torch.utils.checkpoint import checkpoint

    for module in (network.unet, network.aggregator):
        assert module is not None
        for block in module.modules():
            if hasattr(block, "gradient_checkpointing"):
                block.gradient_checkpointing = True  # type: ignore[assignment]
                block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore


def _pictures(count: int, side: int) -> Sequence[Any]:
    from components.randomness import generator

    return [generator(0, "bench", k).uniform(-1, 1, (count, 3, side, side)).astype("float32") for k in range(2)]


def _shape_text(network: InstantIR, size: Size) -> None:
    """Repeat the small text encoders' output to the widths of the UNet, for SDXL size."""
    prior, unet = network.prior, size.prior["unet"]
    pooled_dim = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    embed = prior.embed_prompts

    def embed_wide(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text, pooled = embed(prompts)
        text = text.repeat(1, 1, math.ceil(unet["cross_attention_dim"] / text.shape[-1]))
        pooled = pooled.repeat(1, math.ceil(pooled_dim / pooled.shape[-1]))
        return text[..., : unet["cross_attention_dim"]], pooled[..., :pooled_dim]

    prior.embed_prompts = embed_wide  # type: ignore[method-assign]


def main() -> None:
    """Measure and print one JSON line each, appended to bench.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="nano", choices=sorted(sizes()))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=STAGE_BATCH)
    parser.add_argument("--compile", default="off", choices=["off", "autoencoder", "blocks"])
    parser.add_argument("--checkpoint", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--half-autoencoder", action="store_true", help="the autoencoder in bf16 too")
    parser.add_argument("--given-latents", action="store_true", help="targets' latents come with the batch")
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    from components.systems.instantir.fast import Speed

    torch.set_num_threads(options.threads)
    speed = Speed(compile=options.compile, checkpoint=options.checkpoint)
    rows = [measure_ceiling(options.device, 8192 if options.device == "cuda" else 1024)]
    rows += measure_training(
        options.size,
        options.device,
        options.rounds,
        speed,
        options.batch,
        options.half_autoencoder,
        options.given_latents,
    )
    with options.out.open("a", encoding="utf-8") as stream:
        for row in rows:
            print(json.dumps(row))
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
