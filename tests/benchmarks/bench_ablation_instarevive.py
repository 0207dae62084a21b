"""InstaRevive's Table 3 at nano size: the full training and three without one part, with several seeds.

    python tests/benchmarks/bench_ablation_instarevive.py --out runs/table3    # trains and scores the missing arms
    python tests/benchmarks/bench_ablation_instarevive.py --out runs/table3 --report docs   # its table and plots

Arms: full; no-score (regression alone); no-dynamic (times over the whole range, a fixed share of the regression);
no-prompt (every prompt is empty, in training and at inference). All start from the shipped nano prior and have
the same number of steps on the same pictures in the same order. The product's own code builds, saves and loads them.

Pictures, split and lines of results: ablation.py; a line also has the curves of its training (Fig. 7).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ablation import DEGRADATION_SEED, arguments, pairs, results, row, run, score, summary, table

ARMS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "no-score": ("distillation.score=false",),
    "no-dynamic": ("distillation.dynamic=false",),
    "no-prompt": ("distillation.prompt=false",),
}
"""Changes of the recipe by arm."""
METRICS = ("psnr", "ssim", "gmsd", "piqe")
CURVES = ("heldout_regression", "heldout_distance", "t_max", "alpha", "loss_dsm", "loss_fake")
HELDOUT_METRICS = {"regression": "loss_regression", "distance": "distance"}
"""Names in the held-out curves -> metrics of the objective."""


def recipe_of(arm: str, seed: int, settings: argparse.Namespace) -> Any:
    """The nano recipe at this run's size."""
    from components.systems.recipes import load_recipe

    changes = [
        f"seed={seed}",
        f"batch_size={settings.batch}",
        f"resolution={settings.size}",
        f"short_side={2 * settings.size}",
        f"steps={settings.steps}",
        f"optimizer.warmup_steps={max(1, settings.steps // 20)}",
        f"distillation.kappa={settings.kappa}",
    ]
    return load_recipe("instarevive-bsr-nano", [*changes, *ARMS[arm]])


def heldout_batch(size: int) -> Any:
    """The held-out photographs as one batch, cropped at the centre to the training's size."""
    from components.captions.tags import describe
    from components.images import center_crop
    from components.tensors import collate_rows

    rows = []
    for number, (key, hq, lq) in enumerate(pairs(size)):
        crop = center_crop(hq, size, size)
        sizes = np.array([*hq.shape[:2], 0, 0, size, size])
        row = {"key": key, "position": number, "hq": crop, "lq": center_crop(lq, size, size), "plan": "{}"}
        rows.append({**row, "prompt": describe(crop), "sizes": sizes})
    return collate_rows(rows)


def heldout_metrics(objective: Any, heldout: Any) -> dict[str, float]:
    """Regression and distance of the held-out pictures, at fixed noise."""
    import torch

    from components.randomness import Noise

    with torch.no_grad():
        name, loss = next(objective.phases(heldout, Noise(DEGRADATION_SEED, heldout.positions)))
    assert name == "generator"
    metrics = loss.metrics
    return {f"heldout_{name}": float(metrics[key]) for name, key in HELDOUT_METRICS.items()}


def train_arm(
    arm: str, seed: int, out: Path, settings: argparse.Namespace
) -> tuple[Path, dict[str, list[list[float]]]]:
    """(model folder, curves as [step, value] by name) of an arm."""
    from components.models import ModelCard, save_model
    from components.randomness import Noise
    from components.recipes import identity
    from components.systems.instarevive.training import build_objective
    from components.tensors import collate_rows
    from components.training import Ema, averaged_trainables, build_optimizers, train_step

    recipe = recipe_of(arm, seed, settings)
    objective = build_objective(recipe, {})
    optimizers, ema = build_optimizers(objective, recipe.optimizer), Ema(averaged_trainables(objective), 0.98)
    curves: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    heldout = heldout_batch(settings.size)

    def append_point(step: int, values: Mapping[str, float]) -> None:
        for name in CURVES:
            if name in values:
                curves[name].append([step, round(values[name], 6)])

    append_point(0, heldout_metrics(objective, heldout))
    for step in range(settings.steps):
        positions = range(step * settings.batch, (step + 1) * settings.batch)
        batch = collate_rows([row(seed, position, settings.size) for position in positions])
        lr = recipe.optimizer.lr_at(step, settings.steps)
        noise = Noise(seed, batch.positions)
        metrics = train_step(objective, [(batch, noise)], optimizers, lr=lr, clip_norm=recipe.optimizer.clip_norm)
        ema.update(step)
        append_point(step + 1, metrics)
        if (step + 1) % settings.measure_every == 0 or step + 1 == settings.steps:
            with ema.swap_in():
                append_point(step + 1, heldout_metrics(objective, heldout))
    card = ModelCard(
        name=f"{recipe.name}-{arm}",
        system="instarevive",
        recipe=identity(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    with ema.swap_in():
        save_model(out, card, objective.parts())
    return out, curves


def run_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Train and score one arm."""
    from components.captions.tags import describe
    from components.systems import build_restorer
    from components.types import Request

    start, folder = time.time(), work / f"{arm}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    model, curves = train_arm(arm, seed, folder, settings)
    train_s, heldout = time.time() - start, pairs(settings.size)
    restorer = build_restorer(model)
    # captions by the training's captioner, here of the input
    prompts = {key: "" if arm == "no-prompt" else describe(lq) for key, _, lq in heldout}
    requests = [Request(key=key, image=lq, seed=DEGRADATION_SEED, prompt=prompts[key]) for key, _, lq in heldout]
    restored = restorer.restore(requests)
    shutil.rmtree(folder)
    return {
        "arm": arm,
        "seed": seed,
        "settings": {name: getattr(settings, name) for name in ("size", "batch", "steps", "kappa")},
        "train_s": round(train_s, 1),
        "curves": curves,
        "scores": score([answer.image for answer in restored], heldout, METRICS),
    }


def mean_curve(rows: Sequence[Mapping[str, Any]], arm: str, name: str) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean over seeds, standard deviation over seeds) of an arm's curve; empty if it has none."""
    curves = [np.array(row["curves"][name]) for row in rows if row["arm"] == arm and row["curves"].get(name)]
    if not curves:
        return [], [], []
    values = np.stack([each[:, 1] for each in curves])
    return curves[0][:, 0].tolist(), values.mean(0).tolist(), values.std(0).tolist()


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of every arm, mean and spread over seeds: held-out regression and distance, T_max, alpha."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = ("heldout_regression", "heldout_distance", "t_max", "alpha")
    figure = Figure(figsize=(11, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        for arm in ARMS:
            steps, mean, spread = mean_curve(rows, arm, name)
            if steps:
                (line,) = axes.plot(steps, mean, label=arm, linewidth=1.2)
                low, high = np.array(mean) - spread, np.array(mean) + spread
                axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_title(name.replace("_", ", "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[2].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ARMS), Path("runs/table3"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--kappa",
        type=float,
        default=1.0,
        help="with 1.5, T_max stays at its end for such small crops, and alpha near 1",
    )
    parser.add_argument("--measure-every", type=int, default=20, help="steps between two held-out points of the curves")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(argv)
    if settings.report is None:
        run(settings, METRICS, run_arm)
        return
    rows = results(settings.out)
    plot(rows, settings.report / "images" / "ablation-instarevive.png")
    sys.stdout.write(table(summary(rows, METRICS)) + "\n")


if __name__ == "__main__":
    main()
