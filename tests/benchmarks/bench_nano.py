"""Speed of the nano stages on this machine's CPU: rows of the stream, train steps, one restored picture.

    make bench                                  # all at their recipes' sizes
    python tests/benchmarks/bench_nano.py --resolution 32 --repeats 1

Prints a JSON line for each measurement and appends it to bench.jsonl. Times vary between runs: compare numbers of one
run only, as ratios. Rounds are interleaved over the arms; medians and spreads are reported.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import is_void, median_and_spread

STAGES = ("dcp", "previewer", "aggregator")


def rows(resolution: int, count: int) -> list[dict[str, Any]]:
    """Stream rows of synthetic pictures, degraded as in the nano recipes."""
    from components.captions.tags import describe
    from components.degradations import build_degradation
    from components.images import to_float, to_uint8
    from components.synthetic import dead_leaves

    degradation, stream_rows = build_degradation("realesrgan-nano"), []
    for position in range(count):
        hq = dead_leaves(resolution, 0, position)
        plan = degradation.draw(0, str(position), position)
        stream_rows.append(
            {
                "key": str(position),
                "position": position,
                "hq": hq,
                "lq": to_uint8(degradation.apply(to_float(hq), plan)),
                "prompt": describe(hq),
                "plan": json.dumps(plan),
                "sizes": np.array([resolution, resolution, 0, 0, resolution, resolution]),
            }
        )
    return stream_rows


def arms(resolution: int, threads: int) -> dict[str, Callable[[], None]]:
    """Measured functions by name; each call does the work once."""
    import torch

    from components.models import Model
    from components.priors.opening import load_prior
    from components.randomness import Noise
    from components.systems.instantir.network import InstantIR
    from components.systems.instantir.objectives import AggregatorObjective, PreviewerObjective
    from components.systems.instantir.recipe import InstantIRRecipe
    from components.systems.instantir.restorer import InstantIRRestorer
    from components.systems.instantir.system import INSTANTIR
    from components.systems.recipes import load_recipe
    from components.tensors import collate_rows
    from components.training import build_optimizers, train_step
    from components.types import Request

    torch.set_num_threads(threads)
    recipe = load_recipe("instantir-dcp-nano")
    assert isinstance(recipe, InstantIRRecipe)
    batch = collate_rows(rows(resolution, recipe.batch_size))
    resampler = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_queries": 16}

    def build_network() -> InstantIR:
        return InstantIR(load_prior("nano"), resampler, lora={"rank": 16, "alpha": 16.0}, aggregator=True)

    parents: dict[str, Model] = {}
    objectives = {
        "dcp": INSTANTIR.build_objective(recipe, parents),
        "previewer": PreviewerObjective(build_network(), guidance_range=None),
        "aggregator": AggregatorObjective(build_network()),
    }
    functions: dict[str, Callable[[], None]] = {
        f"{recipe.batch_size} rows": lambda: rows(resolution, recipe.batch_size) and None
    }
    for name, objective in objectives.items():
        optimizers = build_optimizers(objective, recipe.optimizer)

        def step(objective: Any = objective, optimizers: Any = optimizers) -> None:
            train_step(objective, [(batch, Noise(0, batch.positions))], optimizers, lr=1e-4, clip_norm=1.0)

        functions[f"train step {name}, batch {recipe.batch_size}"] = step
    restorer = InstantIRRestorer(build_network(), {"steps": 4, "cfg_scale": 1.0})
    picture = rows(2 * resolution, 1)[0]["lq"]
    functions[f"restore {2 * resolution} px, 4 steps"] = lambda: (
        restorer.restore([Request(key="x", image=picture)]) and None
    )
    return functions


def measure(resolution: int = 128, repeats: int = 5, threads: int = 2) -> list[dict[str, Any]]:
    """Medians over interleaved rounds, after one warm-up round."""
    functions = arms(resolution, threads)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "name": name,
            "resolution": resolution,
            "threads": threads,
            "median_s": round(median, 4),
            "spread": round(spread, 3),
            "void": is_void(repeats, spread),
        }
        for name, (median, spread) in ((name, median_and_spread(values)) for name, values in seconds.items())
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench.jsonl"))
    arguments = parser.parse_args()
    results = measure(arguments.resolution, arguments.repeats, arguments.threads)
    with arguments.out.open("a") as stream:
        for result in results:
            print(json.dumps(result))
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
