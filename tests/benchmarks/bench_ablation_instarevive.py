"""InstaRevive's Table 3 at nano size: the full training against three with one thing left out, several seeds.

    python tests/benchmarks/bench_ablation_instarevive.py --out runs/table3    # trains and scores what is missing
    python tests/benchmarks/bench_ablation_instarevive.py --out runs/table3 --report docs   # table and plots of it

Arms: full; no-score (regression alone); no-dynamic (times over the whole range, a fixed share of the regression);
no-prompt (every prompt is empty, in training and at inference). All start from the shipped nano prior, take the same
number of steps on the same pictures in the same order, and are built, saved and loaded by the product's own code.

Pictures and their split are those of bench_ablation_instantir.py. A result is a line of results.jsonl with the scores
of each held-out photograph and the curves of its training (Fig. 7); a line that is there is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ARMS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "no-score": ("distillation.score=false",),
    "no-dynamic": ("distillation.dynamic=false",),
    "no-prompt": ("distillation.prompt=false",),
}
"""What each arm changes of the recipe."""
METRICS = ("psnr", "ssim", "gmsd", "piqe")
CURVES = ("heldout_regression", "heldout_distance", "t_max", "alpha", "loss_dsm", "loss_fake")
DEGRADATION_SEED = 20260101
WATCHED = {"regression": "loss_regression", "distance": "distance"}
"""Of the held-out pictures, by the metric that says it."""


def _shared() -> Any:
    """The other ablation's script: pictures, split and scoring are the same."""
    path = Path(__file__).with_name("bench_ablation_instantir.py")
    spec = importlib.util.spec_from_file_location("bench_ablation_instantir", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


shared = _shared()


def recipe_of(arm: str, seed: int, settings: argparse.Namespace) -> Any:
    """The nano recipe at this run's size."""
    from components.recipes import load_recipe

    own = [
        f"seed={seed}",
        f"batch_size={settings.batch}",
        f"resolution={settings.size}",
        f"short_side={2 * settings.size}",
        f"steps={settings.steps}",
        f"optimizer.warmup_steps={max(1, settings.steps // 20)}",
    ]
    return load_recipe("instarevive-bsr-nano", [*own, *ARMS[arm]])


def heldout_batch(size: int) -> Any:
    """The held-out photographs as one batch, their middle of the training's size."""
    from components.captions.tags import describe
    from components.images import center_crop
    from components.tensors import collate

    rows = []
    for number, (key, hq, lq) in enumerate(shared.pairs(size)):
        cut = center_crop(hq, size, size)
        sizes = np.array([*hq.shape[:2], 0, 0, size, size])
        row = {"key": key, "position": number, "hq": cut, "lq": center_crop(lq, size, size), "plan": "{}"}
        rows.append({**row, "prompt": describe(cut), "sizes": sizes})
    return collate(rows)


def measured(objective: Any, heldout: Any) -> dict[str, float]:
    """Regression and distance of the held-out pictures, at fixed noise."""
    import torch

    from components.randomness import Noise

    with torch.no_grad():
        name, loss = next(objective.phases(heldout, Noise(DEGRADATION_SEED, heldout.positions)))
    assert name == "generator"
    metrics = loss.metrics
    return {f"heldout_{name}": float(metrics[key]) for name, key in WATCHED.items()}


def train_arm(
    arm: str, seed: int, out: Path, settings: argparse.Namespace
) -> tuple[Path, dict[str, list[list[float]]]]:
    """(model folder, curves as [step, value] by name) of an arm."""
    from components.models import ModelCard, save_model
    from components.randomness import Noise
    from components.recipes import identity
    from components.systems.instarevive.training import build_objective
    from components.tensors import collate
    from components.training import Ema, build_optimizers, train_step

    recipe = recipe_of(arm, seed, settings)
    objective = build_objective(recipe, {})
    optimizers, ema = build_optimizers(objective, recipe.optimizer), Ema(objective.trainables, 0.98)
    curves: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    heldout = heldout_batch(settings.size)

    def note(step: int, values: Mapping[str, float]) -> None:
        for name in CURVES:
            if name in values:
                curves[name].append([step, round(values[name], 6)])

    note(0, measured(objective, heldout))
    for step in range(settings.steps):
        positions = range(step * settings.batch, (step + 1) * settings.batch)
        batch = collate([shared.row(seed, position, settings.size) for position in positions])
        lr = recipe.optimizer.lr_at(step, settings.steps)
        noise = Noise(seed, batch.positions)
        metrics = train_step(objective, [(batch, noise)], optimizers, lr=lr, clip_norm=recipe.optimizer.clip_norm)
        ema.update(step)
        note(step + 1, metrics)
        if (step + 1) % settings.measure_every == 0 or step + 1 == settings.steps:
            with ema.applied():
                note(step + 1, measured(objective, heldout))
    card = ModelCard(
        name=f"{recipe.name}-{arm}",
        system="instarevive",
        recipe=identity(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    with ema.applied():
        save_model(out, card, objective.parts())
    return out, curves


def run_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Train and score one arm."""
    from components.captions.tags import describe
    from components.systems import build_restorer
    from components.types import Request

    began, folder = time.time(), work / f"{arm}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    model, curves = train_arm(arm, seed, folder, settings)
    trained, held = time.time() - began, shared.pairs(settings.size)
    restorer = build_restorer(model)
    # what a captioner would say of the picture: the words that training uses, here of the input
    words = {key: "" if arm == "no-prompt" else describe(lq) for key, _, lq in held}
    asked = [Request(key=key, image=lq, seed=DEGRADATION_SEED, prompt=words[key]) for key, _, lq in held]
    answers = restorer.restore(asked)
    shutil.rmtree(folder)
    return {
        "arm": arm,
        "seed": seed,
        "settings": {name: getattr(settings, name) for name in ("size", "batch", "steps")},
        "train_s": round(trained, 1),
        "curves": curves,
        "scores": scores([answer.image for answer in answers], held),
    }


def scores(restored: Sequence[Any], held: Sequence[tuple[str, Any, Any]]) -> dict[str, dict[str, float]]:
    """Scores by picture, by metric."""
    from components.evaluation.metrics import Metrics

    scorer = Metrics(METRICS)
    return {
        key: dict(scorer.measure(image, hq, key).values) for image, (key, hq, _) in zip(restored, held, strict=True)
    }


def run(settings: argparse.Namespace) -> None:
    """All arms of all seeds that have no line yet."""
    import torch

    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "results.jsonl"
    if not any(row["arm"] == "lq" for row in shared.results(settings.out)):
        held = shared.pairs(settings.size)
        append(path, {"arm": "lq", "seed": 0, "scores": scores([lq for _, _, lq in held], held)})
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for arm in settings.arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in shared.results(settings.out)):
                append(path, run_arm(arm, seed, settings.out / "work", settings))


def append(path: Path, result: Mapping[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("scores", "curves")}), flush=True)


# --- the report -------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each arm and metric: mean, each seed's mean, and the paired difference to full with its 95 % interval."""
    from pipelines.evaluate import bootstrap_interval

    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for metric in METRICS:
            own = shared.means_by_picture(rows, arm, metric)
            full = shared.means_by_picture(rows, "full", metric)
            seeds = [float(np.mean([s[metric] for s in r["scores"].values()])) for r in rows if r["arm"] == arm]
            difference = np.array([own[key] - full[key] for key in full])
            interval = bootstrap_interval(difference, 0, "table 3", arm, metric) if arm != "full" else None
            line = {"arm": arm, "metric": metric, "mean": float(np.mean(list(own.values()))), "seeds": seeds}
            lines.append({**line, "difference": float(difference.mean()), "interval": interval})
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row an arm, a column a metric, as mean, spread of seeds and difference to full."""
    text = ["| arm | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for metric in METRICS:
            (line,) = [each for each in lines if (each["arm"], each["metric"]) == (arm, metric)]
            digits = 4 if metric in ("ssim", "gmsd") else 2
            cell = f"{line['mean']:.{digits}f}"
            if len(line["seeds"]) > 1:
                cell += f" ({min(line['seeds']):.{digits}f} to {max(line['seeds']):.{digits}f})"
            if line["interval"]:
                low, high = line["interval"]
                cell += f"<br>{line['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        text.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def mean_curve(rows: Sequence[Mapping[str, Any]], arm: str, name: str) -> tuple[list[float], list[float], list[float]]:
    """(steps, mean over seeds, standard deviation over seeds) of an arm's curve; empty where it has none."""
    found = [np.array(row["curves"][name]) for row in rows if row["arm"] == arm and row["curves"].get(name)]
    if not found:
        return [], [], []
    values = np.stack([each[:, 1] for each in found])
    return found[0][:, 0].tolist(), values.mean(0).tolist(), values.std(0).tolist()


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/table3"))
    parser.add_argument("--report", type=Path, help="write the curves and print the table; trains nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="several processes may share one --out")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--size", type=int, default=64, help="pixels of a training crop; pictures are twice as large")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--measure-every", type=int, default=20, help="steps between two held-out points of the curves")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(arguments)
    if settings.report is None:
        run(settings)
        return
    rows = shared.results(settings.out)
    plot(rows, settings.report / "images" / "ablation-instarevive.png")
    sys.stdout.write(table(summary(rows)) + "\n")


if __name__ == "__main__":
    main()
