"""Pictures per second of the torch back end on a GPU, and of the original's batch path on the same GPU.

    python tests/benchmarks/bench_degradation_gpu.py --basicsr basicsr-1.4.2
    python tests/benchmarks/bench_degradation_gpu.py --device cpu --side 64 --batch 4

Ours draws all numbers per picture, the original its kernels per picture and the others per batch. Plans and kernels are
drawn before the clock starts, as workers draw them with the crop. HQ is on the device, and the clock waits for the
device at both ends. Arms take turns; medians are reported, and a line is void if an arm spreads over 25 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_degradation as bench
import numpy as np
import torch
from timing import is_void, median_and_spread, ratio, synchronise

SHARPENING = {"realesrgan": "twice", "instantir": "once", "instarevive-bsr": "off"}


def measure(
    batch_sizes: Sequence[int] = (32, 512),
    side: int = 512,
    rounds: int = 5,
    device: str = "cuda",
    basicsr: Path | None = None,
    presets: Sequence[str] = tuple(SHARPENING),
) -> list[dict[str, Any]]:
    """Pictures per second by preset and batch size, with the ratio to the original if `basicsr` is given."""
    from components.degradations import build_degradation
    from components.degradations.batched import apply_plans

    results = []
    for preset in presets:
        degradation = build_degradation(preset)
        for size in batch_sizes:
            pictures = bench.crops(None, size, side)
            hq = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().to(device)

            def draw(seed: int, size: int = size, degradation: Any = degradation) -> list[Any]:
                return [degradation.draw(seed, "bench", k) for k in range(size)]

            arms: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]]
            arms = {"ours": (draw, functools.partial(apply_plans, hq))}
            if basicsr is not None:
                arms["original"] = bench.original(basicsr, size, SHARPENING[preset], pictures, device)
            rates: dict[str, list[float]] = {name: [] for name in arms}
            for seed in range(rounds + 1):
                for name, (draw_plans, run) in arms.items():
                    plans = draw_plans(seed)
                    synchronise(device)
                    start = time.perf_counter()
                    run(plans)
                    synchronise(device)
                    if seed:  # the first round is a warm-up
                        rates[name].append(size / (time.perf_counter() - start))
            row: dict[str, Any] = {"preset": preset, "batch": size, "side": side, "device": device_name(device)}
            row |= {f"{name}_images_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
            spread = max(median_and_spread(values)[1] for values in rates.values())
            row |= {"spread": round(spread, 3), "void": is_void(rounds, spread)}
            if basicsr is not None:
                row["ratio"] = ratio(*(statistics.median(rates[name]) for name in ("ours", "original")))
            if device != "cpu":
                row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            results.append(row)
    return results


def device_name(device: str) -> str:
    """Name of the device."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--basicsr", type=Path, help="a checkout or unpacked source archive of BasicSR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default 32 and 512")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for row in measure(options.batch or (32, 512), options.side, options.rounds, options.device, options.basicsr):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
