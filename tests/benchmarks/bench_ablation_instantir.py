"""What InstantIR's parts are worth at nano size: arms with one of them left out, equal budget, several seeds.

    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation    # trains and scores what is missing
    python tests/benchmarks/bench_ablation_instantir.py --out runs/ablation --report docs   # table and plot of it

Arms: full; no-preview (the LQ latents stand in for the reference, in training too); no-perceptor (Eq. 3's w is 0);
no-aggregator (perceptor and prior alone, from the noised LQ latents); no-time (keys and values of the perceptor do not
follow the time step). An arm that has a stage less spends its steps in its last stage, so that every arm takes the
same number of optimiser steps, on the same pictures in the same order. Stages are built, saved and loaded by the
product's own code (build_objective, train_step, save_model, build_restorer), without Ray.

Pictures are the demo corpus at half its usual size; whole photographs (with their details) are held out. A result is a
line of results.jsonl; a line that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ARMS = ("full", "no-preview", "no-perceptor", "no-aggregator", "no-time")
METRICS = ("psnr", "ssim", "piqe")
DEMO = Path(__file__).resolve().parents[2] / "pipelines" / "demo_corpus"
HELD_OUT_EVERY = 3
"""Every third photograph is held out; a demo of 20 photographs has no more to give."""
DEGRADATION_SEED = 20260101
PRESET = "realesrgan-nano"


def photographs() -> dict[str, list[Path]]:
    """Pictures of the demo corpus by photograph: a photograph and its details stay on one side of the split."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(DEMO.glob("*.jpg")):
        groups.setdefault(path.stem.split("-detail-")[0], []).append(path)
    return groups


def split() -> tuple[list[Path], list[Path]]:
    """(training pictures with details, held-out photographs without)."""
    train: list[Path] = []
    held: list[Path] = []
    for number, (_, paths) in enumerate(sorted(photographs().items())):
        if number % HELD_OUT_EVERY == 0:
            held.append(paths[0])
        else:
            train += paths
    return train, held


@lru_cache(maxsize=64)
def picture(path: Path, short_side: int) -> Any:
    from components.images import decode, resize_short_side

    return resize_short_side(decode(path.read_bytes(), key=path.stem), short_side)


def row(seed: int, position: int, size: int) -> dict[str, Any]:
    """The training row at a position: half photographs, half dead leaves, as in instantir-dcp-nano."""
    from components.captions.tags import describe
    from components.degradations import build_degradation
    from components.images import to_float, to_uint8
    from components.randomness import generator
    from components.synthetic import dead_leaves

    draw = generator(seed, position, "row")
    if draw.random() < 0.5:
        hq = dead_leaves(size, seed, position)
    else:
        paths = split()[0]
        whole = picture(paths[int(draw.integers(0, len(paths)))], 2 * size)
        top, left = (int(draw.integers(0, side - size + 1)) for side in whole.shape[:2])
        hq = np.ascontiguousarray(whole[top : top + size, left : left + size])
        hq = np.ascontiguousarray(hq[:, ::-1]) if draw.random() < 0.5 else hq
    degradation = build_degradation(PRESET)
    plan = degradation.draw(seed, str(position), position)
    return {
        "key": str(position),
        "position": position,
        "hq": hq,
        "lq": to_uint8(degradation.apply(to_float(hq), plan)),
        "prompt": describe(hq),
        "plan": json.dumps(plan),
        "sizes": np.array([size, size, 0, 0, size, size]),
    }


def pairs(size: int) -> list[tuple[str, Any, Any]]:
    """(key, hq, lq) of the held-out photographs: short side 2 * size, centre crops of whole multiples of 16."""
    from components.degradations import build_degradation
    from components.images import center_crop, to_float, to_uint8

    made, degradation = [], build_degradation(PRESET)
    for position, path in enumerate(split()[1]):
        whole = picture(path, 2 * size)
        hq = center_crop(whole, 2 * size // 16 * 16, 2 * size // 16 * 16)
        plan = degradation.draw(DEGRADATION_SEED, path.stem, position)
        made.append((path.stem, hq, to_uint8(degradation.apply(to_float(hq), plan))))
    return made


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


def score(restored: Sequence[Any], held: Sequence[tuple[str, Any, Any]]) -> dict[str, dict[str, float]]:
    """Scores by picture, by metric."""
    from components.evaluation.metrics import Metrics

    scorer = Metrics(METRICS)
    return {
        key: dict(scorer.measure(image, hq, key).values) for image, (key, hq, _) in zip(restored, held, strict=True)
    }


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
        "scores": score([a.image for a in answers], held),
    }
    for left in work.glob(f"{arm}-{seed}*"):
        shutil.rmtree(left)
    return result


def results(out: Path) -> list[dict[str, Any]]:
    """Lines of results.jsonl."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(settings: argparse.Namespace) -> None:
    """All arms of all seeds that have no line yet."""
    import torch

    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "results.jsonl"
    if not any(r["arm"] == "lq" for r in results(settings.out)):
        held = pairs(settings.size)
        append(path, {"arm": "lq", "seed": 0, "scores": score([lq for _, _, lq in held], held)})
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for arm in settings.arms:
            if not any((r["arm"], r["seed"]) == (arm, seed) for r in results(settings.out)):
                append(path, run_arm(arm, seed, settings.out / "work", settings))
        shutil.rmtree(settings.out / "work" / f"shared-{seed}", ignore_errors=True)


def append(path: Path, result: Mapping[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "scores"}), flush=True)


# --- the report -------------------------------------------------------------------------------------------------------


def means_by_picture(rows: Sequence[Mapping[str, Any]], arm: str, metric: str) -> dict[str, float]:
    """An arm's score of each held-out picture, the mean over its seeds."""
    of_arm = [r["scores"] for r in rows if r["arm"] == arm]
    return {key: float(np.mean([scores[key][metric] for scores in of_arm])) for key in of_arm[0]}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each arm and metric: mean, each seed's mean, and the paired difference to full with its 95 % interval."""
    from pipelines.evaluate import bootstrap_interval

    lines = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        for metric in METRICS:
            own = means_by_picture(rows, arm, metric)
            full = means_by_picture(rows, "full", metric)
            seeds = [float(np.mean([s[metric] for s in r["scores"].values()])) for r in rows if r["arm"] == arm]
            difference = np.array([own[key] - full[key] for key in full])
            lines.append(
                {
                    "arm": arm,
                    "metric": metric,
                    "mean": float(np.mean(list(own.values()))),
                    "seeds": seeds,
                    "difference": float(difference.mean()),
                    "interval": bootstrap_interval(difference, 0, "ablation", arm, metric) if arm != "full" else None,
                }
            )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row an arm, a column a metric, as mean, spread of seeds and difference to full."""
    text = ["| arm | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for metric in METRICS:
            (line,) = [each for each in lines if (each["arm"], each["metric"]) == (arm, metric)]
            digits = 4 if metric == "ssim" else 2
            cell = f"{line['mean']:.{digits}f}"
            if len(line["seeds"]) > 1:
                cell += f" ({min(line['seeds']):.{digits}f} to {max(line['seeds']):.{digits}f})"
            if line["interval"]:
                low, high = line["interval"]
                cell += f"<br>{line['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
            cells.append(cell)
        text.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(text)


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--report", type=Path, help="write ablation.png and print the table; trains nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="several processes may share one --out")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--size", type=int, default=64, help="pixels of a training crop; pictures are twice as large")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dcp", type=int, default=60, help="steps")
    parser.add_argument("--previewer", type=int, default=20, help="steps")
    parser.add_argument("--aggregator", type=int, default=60, help="steps")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(arguments)
    if settings.report is None:
        run(settings)
        return
    rows = results(settings.out)
    lines = summary(rows)
    plot(lines, settings.report / "images" / "ablation-instantir.png")
    sys.stdout.write(table(lines) + "\n")


if __name__ == "__main__":
    main()
