"""What InstantIR's parts are worth at nano size: arms with one of them left out, equal budget, several seeds.

    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation    # trains and scores what is missing
    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation --report docs   # table and plot of it

Arms: full; no-preview (the LQ latents stand in for the reference, in training too); no-perceptor (Eq. 3's w is 0);
no-aggregator (perceptor and prior alone, from the noised LQ latents); no-time (keys and values of the perceptor do not
follow the time step). An arm that has a stage less spends its steps in its last stage, so that every arm takes the
same number of optimiser steps, on the same pictures in the same order. Stages are built, saved and loaded by the
product's own code (build_objective, train_step, save_model, build_restorer), without Ray.

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
    """One stage through the product's builders and its train step; returns the model folder, the averaged weights."""
    from components.models import ModelCard, load_model, save_model
    from components.randomness import Noise
    from components.recipes import identity, load_recipe
    from components.systems.instantir.build import build_objective
    from components.systems.instantir.recipe import InstantIRRecipe
    from components.tensors import collate
    from components.training import Ema, build_optimizers, train_step

    if (out / "model.json").is_file():
        return out
    own = [
        f"seed={seed}",
        f"batch_size={settings.batch}",
        f"resolution={settings.size}",
        f"short_side={2 * settings.size}",
        f"steps={max(1, steps)}",
        f"optimizer.warmup_steps={max(1, steps // 10)}",
    ]
    recipe = load_recipe(f"instantir-{stage}-nano", [*own, *overrides])
    assert isinstance(recipe, InstantIRRecipe)
    model = load_model(parent) if parent else None
    objective = build_objective(recipe, {"parent": model} if model else {})
    optimizers, ema = build_optimizers(objective, recipe.optimizer), Ema(objective.trainables, 0.98)
    # stages see different stretches of one stream, the same in every arm
    first = {"dcp": 0, "previewer": 1, "aggregator": 2}[stage] * 10_000_000
    for step in range(steps):
        positions = range(first + step * settings.batch, first + (step + 1) * settings.batch)
        batch = collate([row(seed, p, settings.size) for p in positions])
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
    with ema.applied():
        save_model(out, card, objective.parts())
    return out


def train_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """(model folder, restorer options) of an arm; stages that arms share are trained once."""
    dcp, previewer, aggregator = settings.dcp, settings.previewer, settings.aggregator
    total = dcp + previewer + aggregator
    own = work / f"{arm}-{seed}"

    def stage(name: str, steps: int, parent: Path | None, *overrides: str, where: Path = own) -> Path:
        return train_stage(name, steps, seed, parent, where / name, settings, *overrides)

    shared = work / f"shared-{seed}"
    if arm == "full":
        first = stage("dcp", dcp, None, where=shared)
        return stage("aggregator", aggregator, stage("previewer", previewer, first)), {}
    if arm == "no-preview":
        first = stage("dcp", dcp, None, where=shared)
        untrained = stage("previewer", 0, first)
        return stage("aggregator", aggregator + previewer, untrained, "reference=lq"), {}
    if arm == "no-perceptor":
        left_out = "perceptor_scale=0"
        second = stage("previewer", previewer, stage("dcp", 0, None), left_out)
        return stage("aggregator", aggregator + dcp, second, left_out), {}
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

    began = time.time()
    model, options = train_arm(arm, seed, work, settings)
    trained, held = time.time() - began, pairs(settings.size)
    restorer = build_restorer(model, batch_size=len(held), **options)
    answers = restorer.restore([Request(key=k, image=lq, seed=DEGRADATION_SEED) for k, _, lq in held])
    result = {
        "arm": arm,
        "seed": seed,
        "settings": {k: getattr(settings, k) for k in ("size", "batch", "dcp", "previewer", "aggregator")},
        "train_s": round(trained, 1),
        "scores": score([a.image for a in answers], held, METRICS),
    }
    for left in work.glob(f"{arm}-{seed}*"):
        shutil.rmtree(left)
    return result


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Paired differences to the full model with their intervals, one panel a metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm not in ("full", "lq")]
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True):
        for place, arm in enumerate(arms):
            (line,) = [each for each in lines if (each["arm"], each["metric"]) == (arm, metric)]
            low, high = line["interval"]
            axes.plot([low, high], [place, place], color="#2a6fb0", linewidth=3)
            axes.plot([line["difference"]], [place], "o", color="#12324f")
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_yticks(range(len(arms)), arms)
        axes.invert_yaxis()
        better = "higher is better" if metric != "piqe" else "lower is better"
        axes.set_title(f"{metric} minus full ({better})", fontsize=9)
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = arguments(__doc__, ARMS, Path("runs/ablation"))
    parser.add_argument("--dcp", type=int, default=60, help="steps")
    parser.add_argument("--previewer", type=int, default=20, help="steps")
    parser.add_argument("--aggregator", type=int, default=60, help="steps")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(given)
    if settings.report is None:
        run(settings, METRICS, run_arm)
        return
    lines = summary(results(settings.out), METRICS)
    plot(lines, settings.report / "images" / "ablation-instantir.png")
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
