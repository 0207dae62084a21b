"""What the parts of the shipped restorer's training are each worth at its size, with several seeds.

    python tests/benchmarks/bench_ablation_unetres.py --start MODEL --out runs/worth    # trains and scores the arms
    python tests/benchmarks/bench_ablation_unetres.py --out runs/worth --report docs    # its table and plot

MODEL is the model folder of plan `nano`'s stage denoiser: a regression and the score of sharp pictures. Every arm
trains the generator for the same number of steps on the same crops in the same order. What differs from the recipe:

    full        nothing
    regression  no generator at all: what the first stage does alone
    no-coarse   no regression before the generator, which changes the input itself and starts from random weights
    no-anchor   no regression loss: score matching alone
    no-score    no score matching and no distance of features: the regression loss alone
    no-prior    a score that has learned for as many steps as the generator only

The training pictures are the demo corpus without the demo's held-out photographs, which are the test: each is degraded
by SUPIR's five test degradations and by realesrgan, and its score is the mean over the six.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ablation import DEMO, arguments, results, row, run, summary, table

ARMS: Mapping[str, tuple[str, ...]] = {
    "full": (),
    "regression": (),
    "no-coarse": ("generator_start=new",),
    "no-anchor": ("distillation.fixed_alpha=0",),
    "no-score": ("distillation.score=false", "features.weight=0"),
    "no-prior": (),
}
"""Changes of the recipe by arm."""
SETTINGS = ("size", "batch", "steps", "strength", "pictures", "set")
"""What all lines of one folder must agree in."""
METRICS = ("psnr", "ssim", "st_lpips", "niqe_restoray")


def split() -> tuple[list[Path], list[Path]]:
    """(training pictures, held-out photographs) of the demo corpus, by the demo's own split."""
    spec = yaml.safe_load((DEMO.parents[1] / "datasets" / "demo.yaml").read_text(encoding="utf-8"))
    names = set(spec["split"]["held_out"])
    paths = sorted(DEMO.glob("*.jpg"))
    train = [path for path in paths if path.stem.split("-detail-")[0] not in names]
    return train, [path for path in paths if path.stem in names]


@lru_cache(maxsize=1)
def heldout(size: int, pictures: int) -> list[tuple[str, str, Any, Any]]:
    """(picture, degradation, hq, lq): the centre of each held-out photograph, 2 * size px; 0 pictures are all."""
    from bench_peers import POOR, cases

    return [(case.key, case.row, case.hq, case.lq) for case in cases(split()[1][: pictures or None], 2 * size, POOR)]


def score(images: Sequence[Any], settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores by picture, means over its degradations."""
    from components.evaluation.metrics import Metrics

    scorer, values = Metrics(METRICS), dict[str, list[Mapping[str, float]]]()
    for image, (key, _, hq, _) in zip(images, heldout(settings.size, settings.pictures), strict=True):
        values.setdefault(key, []).append(scorer.measure(image, hq, key).values)
    return {
        key: {name: float(np.mean([scores[name] for scores in own])) for name in METRICS} for key, own in values.items()
    }


def lq_scores(settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores of the inputs themselves."""
    return score([lq for _, _, _, lq in heldout(settings.size, settings.pictures)], settings)


def recipe_of(arm: str, stage: str, seed: int, settings: argparse.Namespace) -> Any:
    """The shipped model's recipe of a stage, at this run's size, with networks as large as the start's."""
    from components.models import load_model, resolve_model
    from components.systems.recipes import load_recipe
    from components.systems.unetres.build import REGRESSION
    from components.systems.unetres.recipe import UNetResRecipe

    changes = [
        f"seed={seed}",
        f"batch_size={settings.batch}",
        f"steps={settings.steps}",
        f"optimizer.warmup_steps={max(1, settings.steps // 20)}",
        "placement.workers=1",
        f"resolution={settings.size}",
        *([f"distillation.window={settings.size * 7 // 8 // 16 * 16}"] if stage == "generator" else []),
        *(settings.set or ()),
    ]
    recipe = load_recipe(f"unetres-{stage}", [*changes, *(ARMS[arm] if stage == "generator" else ())])
    assert isinstance(recipe, UNetResRecipe)
    recipe.size = dict(load_model(resolve_model(settings.start)).info["config"][REGRESSION])
    return recipe


def batches(seed: int, settings: argparse.Namespace, preset: str) -> Iterator[Any]:
    """The batches of a training: the same ones for every arm of a seed."""
    from components.tensors import collate_rows

    pictures = split()[0]
    for step in range(settings.steps):
        positions = range(step * settings.batch, (step + 1) * settings.batch)
        yield collate_rows([row(seed, position, settings.size, preset, 0.05, pictures) for position in positions])


def train(objective: Any, recipe: Any, seed: int, settings: argparse.Namespace, preset: str) -> tuple[Any, list[float]]:
    """Train an objective: (its averaged weights, the loss of every step)."""
    from components.randomness import Noise
    from components.training import Ema, averaged_trainables, build_optimizers, train_step

    optimizers, ema = build_optimizers(objective, recipe.optimizer), Ema(averaged_trainables(objective), 0.98)
    losses = []
    for step, batch in enumerate(batches(seed, settings, preset)):
        lr = recipe.optimizer.lr_at(step, settings.steps)
        noise = Noise(seed, batch.positions)
        metrics = train_step(objective, [(batch, noise)], optimizers, lr=lr, clip_norm=recipe.optimizer.clip_norm)
        ema.update(step)
        losses.append(float(metrics.get("loss_regression", metrics.get("loss", float("nan")))))
    return ema, losses


def start_of(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> Any:
    """The model that an arm's generator starts from."""
    from components.models import ModelCard, load_model, resolve_model, save_model
    from components.systems.unetres.build import DENOISER, REGRESSION, network_of, parameters_of
    from components.systems.unetres.network import build_unetres
    from components.systems.unetres.objective import denoiser_objective

    start = load_model(resolve_model(settings.start))
    if arm not in ("no-coarse", "no-prior"):
        return start
    regression, denoiser = network_of(start, REGRESSION), network_of(start, DENOISER)
    if arm == "no-coarse":
        regression = build_unetres(regression.config, seed, "identity")  # its last layer is zero
    else:
        recipe = recipe_of(arm, "denoiser", seed, settings)
        objective = denoiser_objective(recipe, {"regression": _without(start, DENOISER, work)})
        ema, _ = train(objective, recipe, seed, settings, "none")
        with ema.swap_in():
            denoiser = copy.deepcopy(objective.score.network)
    networks = {REGRESSION: regression, DENOISER: denoiser}
    card = ModelCard(
        name=f"start-{arm}", system="unetres", config={name: each.config.to_dict() for name, each in networks.items()}
    )
    return save_model(work / f"start-{arm}", card, {name: parameters_of(each) for name, each in networks.items()})


def _without(model: Any, part: str, work: Path) -> Any:
    """A copy of a model folder without one part."""
    from components.models import ModelCard, save_model

    parts = {name: model.part(name) for name in model.info["parts"] if name != part}
    config = {name: value for name, value in model.info["config"].items() if name != part}
    return save_model(work / f"without-{part}", ModelCard(name="start", system="unetres", config=config), parts)


def run_arm(arm: str, seed: int, work: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Train and score one arm."""
    from components.models import ModelCard, save_model
    from components.systems import build_restorer
    from components.systems.unetres.objective import generator_objective
    from components.types import Request

    begin, folder = time.time(), work / f"{arm}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed run
    start, losses = start_of(arm, seed, folder, settings), list[float]()
    model, strength = start.path, 0.0
    if arm != "regression":
        recipe = recipe_of(arm, "generator", seed, settings)
        objective = generator_objective(recipe, {"denoiser": start})
        ema, losses = train(objective, recipe, seed, settings, "mixed")
        card = ModelCard(name=arm, system="unetres", config=objective.config)
        with ema.swap_in():
            model, strength = save_model(folder / "model", card, objective.parts()).path, settings.strength
    restorer = build_restorer(model)
    requests = [
        Request(key=f"{key} {name}", image=lq, seed=0, options={"strength": strength})
        for key, name, _, lq in heldout(settings.size, settings.pictures)
    ]
    images = [restorer.restore([request])[0].image for request in requests]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "arm": arm,
        "seed": seed,
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "train_s": round(time.time() - begin, 1),
        "curve": [round(value, 6) for value in losses[:: max(1, settings.steps // 50)]],
        "scores": score(images, settings),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ARMS), Path("runs/worth"))
    parser.set_defaults(size=128)
    parser.add_argument("--start", default="nano", help="model folder with a regression and a denoiser")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--pictures", type=int, default=0, help="most held-out photographs; 0 takes all")
    parser.add_argument("--set", nargs="*", help="changes of both recipes, KEY=VALUE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score, or report."""
    settings = parse(argv)
    if settings.report is None:
        run(settings, METRICS, run_arm, lq_scores)
        return
    sys.stdout.write(table(summary(results(settings.out), METRICS)) + "\n")


if __name__ == "__main__":
    main()
