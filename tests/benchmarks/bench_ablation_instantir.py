"""The effect of InstantIR's parts at nano size: arms without one part, with equal budgets and several seeds.

    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation    # trains and scores the missing arms
    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation --report docs   # its table and plot

Arms: full; no-preview (the LQ latents replace the reference, in training too); no-perceptor (Eq. 3's w is 0);
no-aggregator (perceptor and prior alone, from the noised LQ latents); no-time (keys and values of the perceptor do not
depend on the time step). An arm with one stage less adds its steps to its last stage. So every arm has the same number
of optimiser steps, on the same pictures in the same order. The product's own code builds, saves and loads the stages
(build_objective, train_step, save_model, build_restorer), without Ray.

Pictures, split and lines of results: ablation.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation import DEGRADATION_SEED, arguments, pairs, results, row, run, score, summary, table

ARMS = ("full", "no-preview", "no-perceptor", "no-aggregator", "no-time")
METRICS = ("psnr", "ssim", "piqe")


def train_stage(
    stage: str, steps: int, seed: int, parent: Path | None, out: Path, settings: argparse.Namespace, *overrides: str
) -> Path:
    """Train one stage with the product's builders and train step; returns the model folder, with averaged weights."""
    from components.models import ModelCard, load_model, save_model
    from components.randomness import Noise
    from components.recipes import identity
    from components.systems.instantir.recipe import InstantIRRecipe
    from components.systems.instantir.system import INSTANTIR
    from components.systems.recipes import load_recipe
    from components.tensors import collate_rows
    from components.training import Ema, build_optimizers, train_step

    if (out / "model.json").is_file():
        return out
    overrides_of_run = [
        f"seed={seed}",
        f"batch_size={settings.batch}",
        f"resolution={settings.size}",
        f"short_side={2 * settings.size}",
        f"steps={max(1, steps)}",
        f"optimizer.warmup_steps={max(1, steps // 10)}",
    ]
    recipe = load_recipe(f"instantir-{stage}-nano", [*overrides_of_run, *overrides])
    assert isinstance(recipe, InstantIRRecipe)
    model = load_model(parent) if parent else None
    objective = INSTANTIR.build_objective(recipe, {"parent": model} if model else {})
    optimizers, ema = build_optimizers(objective, recipe.optimizer), Ema(objective.trainables, 0.98)
    # stages use different ranges of one stream, the same in every arm
    first = {"dcp": 0, "previewer": 1, "aggregator": 2}[stage] * 10_000_000
    for step in range(steps):
        positions = range(first + step * settings.batch, first + (step + 1) * settings.batch)
        batch = collate_rows([row(seed, p, settings.size) for p in positions])
        lr = recipe.optimizer.lr_at(step, steps)
        train_step(objective, [(batch, Noise(seed, batch.positions))], optimizers, lr=lr, clip_norm=1.0)
        ema.update(step)
    card = ModelCard(
        name=recipe.name,
        system="instantir",
        recipe=identity(recipe),
        prior={"id": objective.prior.name, "digest": objective.prior.digest},
        config=objective.config,
    )
    with ema.swap_in():
        save_model(out, card, objective.parts())
    return out


def train_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(model folder, restorer options) of an arm; a stage that arms share is trained once."""
    dcp, previewer, aggregator = settings.dcp, settings.previewer, settings.aggregator
    total = dcp + previewer + aggregator
    arm_folder = work / f"{arm}-{seed}"

    def stage(name: str, steps: int, parent: Path | None, *overrides: str, folder: Path = arm_folder) -> Path:
        return train_stage(name, steps, seed, parent, folder / name, settings, *overrides)

    shared = work / f"shared-{seed}"
    if arm == "full":
        first = stage("dcp", dcp, None, folder=shared)
        return stage("aggregator", aggregator, stage("previewer", previewer, first)), {}
    if arm == "no-preview":
        first = stage("dcp", dcp, None, folder=shared)
        untrained = stage("previewer", 0, first)
        return stage("aggregator", aggregator + previewer, untrained, "reference=lq"), {}
    if arm == "no-perceptor":
        no_perceptor = "perceptor_scale=0"
        second = stage("previewer", previewer, stage("dcp", 0, None), no_perceptor)
        return stage("aggregator", aggregator + dcp, second, no_perceptor), {}
    if arm == "no-aggregator":
        untrained = stage("previewer", 0, stage("dcp", total, None))
        return stage("aggregator", 0, untrained), {"aggregator_stop": 0.0}
    if arm == "no-time":
        first = stage("dcp", dcp, None, "time_modulation=false")
        return stage("aggregator", aggregator, stage("previewer", previewer, first)), {}
    raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}")


def run_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Train and score one arm."""
    from components.systems import build_restorer
    from components.types import Request

    start = time.time()
    model, options = train_arm(arm, seed, work, settings)
    train_s, heldout = time.time() - start, pairs(settings.size)
    restorer = build_restorer(model, batch_size=len(heldout), **options)
    restored = restorer.restore([Request(key=k, image=lq, seed=DEGRADATION_SEED) for k, _, lq in heldout])
    result = {
        "arm": arm,
        "seed": seed,
        "settings": {k: getattr(settings, k) for k in ("size", "batch", "dcp", "previewer", "aggregator")},
        "train_s": round(train_s, 1),
        "scores": score([a.image for a in restored], heldout, METRICS),
    }
    for folder in work.glob(f"{arm}-{seed}*"):
        shutil.rmtree(folder)
    return result


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Paired differences to the full model with their intervals if there are any, one panel for each metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm not in ("full", "lq")]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for place, arm in enumerate(arms):
            (line,) = [each for each in lines if (each["arm"], each["metric"]) == (arm, metric)]
            if line["interval"]:
                axes.plot(line["interval"], [place, place], color="#2a6fb0", linewidth=3)
            axes.plot([line["difference"]], [place], "o", color="#12324f")
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_yticks(range(len(arms)), arms)
        axes.invert_yaxis()
        better = "higher is better" if metric != "piqe" else "lower is better"
        axes.set_title(f"{metric} minus full ({better})", fontsize=9)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = arguments(__doc__, ARMS, Path("runs/ablation"))
    parser.add_argument("--dcp", type=int, default=60, help="steps")
    parser.add_argument("--previewer", type=int, default=20, help="steps")
    parser.add_argument("--aggregator", type=int, default=60, help="steps")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(argv)
    if settings.report is None:
        run(settings, METRICS, run_arm)
        return
    lines = summary(results(settings.out), METRICS)
    plot(lines, settings.report / "images" / "ablation-instantir.png")
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
