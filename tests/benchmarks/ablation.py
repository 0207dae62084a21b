"""Shared by the ablations: pictures and their split, lines of results, paired differences and their table.

The pictures are those of the demo corpus at half its usual size. Whole photographs, with their details, are held out. A
line of results.jsonl has an arm's scores of each held-out photograph; an arm with a line is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluation import TOO_FEW

DEMO = Path(__file__).resolve().parents[2] / "pipelines" / "demo_corpus"
HELD_OUT_EVERY = 3
"""Every third photograph is held out, as the demo has only 20."""
DEGRADATION_SEED = 20260101
"""Seed of the held-out inputs, and of the noise in restoration."""
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
    heldout: list[Path] = []
    for number, (_, paths) in enumerate(sorted(photographs().items())):
        if number % HELD_OUT_EVERY == 0:
            heldout.append(paths[0])
        else:
            train += paths
    return train, heldout


@lru_cache(maxsize=64)
def picture(path: Path, short_side: int) -> Any:
    from components.images import decode, resize_short_side

    return resize_short_side(decode(path.read_bytes(), key=path.stem), short_side)


def row(
    seed: int,
    position: int,
    size: int,
    preset: str = PRESET,
    leaves: float = 0.5,
    pictures: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """The training row at a position: photographs and, with a share of `leaves`, dead leaves, degraded by a preset.

    The defaults are instantir-dcp-nano's and the training pictures of `split`.
    """
    from components.captions.tags import describe
    from components.degradations import build_degradation
    from components.images import to_float, to_uint8
    from components.randomness import generator
    from components.synthetic import dead_leaves

    draw = generator(seed, position, "row")
    if draw.random() < leaves:
        hq = dead_leaves(size, seed, position)
    else:
        paths = split()[0] if pictures is None else pictures
        whole = picture(paths[int(draw.integers(0, len(paths)))], 2 * size)
        top, left = (int(draw.integers(0, side - size + 1)) for side in whole.shape[:2])
        hq = np.ascontiguousarray(whole[top : top + size, left : left + size])
        hq = np.ascontiguousarray(hq[:, ::-1]) if draw.random() < 0.5 else hq
    degradation = build_degradation(preset)
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

    triples, degradation = [], build_degradation(PRESET)
    for position, path in enumerate(split()[1]):
        whole = picture(path, 2 * size)
        hq = center_crop(whole, 2 * size // 16 * 16, 2 * size // 16 * 16)
        plan = degradation.draw(DEGRADATION_SEED, path.stem, position)
        triples.append((path.stem, hq, to_uint8(degradation.apply(to_float(hq), plan))))
    return triples


def score(
    restored: Sequence[Any], heldout: Sequence[tuple[str, Any, Any]], metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Scores by picture, by metric."""
    from components.evaluation.metrics import Metrics

    scorer = Metrics(metrics)
    return {
        key: dict(scorer.measure(image, hq, key).values) for image, (key, hq, _) in zip(restored, heldout, strict=True)
    }


def scores_of_inputs(size: int, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores of the held-out inputs themselves."""
    heldout = pairs(size)
    return score([lq for _, _, lq in heldout], heldout, metrics)


# --- results ----------------------------------------------------------------------------------------------------------


def results(out: Path) -> list[dict[str, Any]]:
    """Lines of results.jsonl."""
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(out: Path, result: Mapping[str, Any]) -> None:
    """Append a line to results.jsonl, and print its short form."""
    with (out / "results.jsonl").open("a") as stream:
        stream.write(json.dumps(result) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k not in ("scores", "curves")}), flush=True)


def run(
    settings: argparse.Namespace,
    metrics: Sequence[str],
    run_arm: Callable[[str, int, Path, argparse.Namespace], dict[str, Any]],
    lq_scores: Callable[[argparse.Namespace], dict[str, dict[str, float]]] | None = None,
) -> None:
    """Run all arms of all seeds that have no line yet, and score the inputs themselves as arm "lq".

    Args:
        settings: those of `arguments` and of `run_arm`.
        metrics: names of `components.evaluation`.
        run_arm: (arm, seed, work folder, settings) -> the arm's line.
        lq_scores: settings -> scores of the inputs by picture; those of `pairs` by default.
    """
    import torch

    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    for line in results(settings.out):
        other = {k: v for k, v in line.get("settings", {}).items() if getattr(settings, k, v) != v}
        if other:
            raise SystemExit(f"{settings.out} holds {line['arm']} with {other}: choose another --out")
    if not any(line["arm"] == "lq" for line in results(settings.out)):
        scores = (lq_scores or (lambda settings: scores_of_inputs(settings.size, metrics)))(settings)
        append(settings.out, {"arm": "lq", "seed": 0, "scores": scores})
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for arm in settings.arms:
            if not any((line["arm"], line["seed"]) == (arm, seed) for line in results(settings.out)):
                append(settings.out, run_arm(arm, seed, settings.out / "work", settings))
        shutil.rmtree(settings.out / "work" / f"shared-{seed}", ignore_errors=True)


def means_by_picture(rows: Sequence[Mapping[str, Any]], arm: str, metric: str) -> dict[str, float]:
    """Mean over seeds of an arm's score, by held-out picture."""
    of_arm = [r["scores"] for r in rows if r["arm"] == arm]
    return {key: float(np.mean([scores[key][metric] for scores in of_arm])) for key in of_arm[0]}


def summary(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """For each arm and metric: mean, each seed's mean, and the paired difference to full with its 95 % interval.

    The interval is None with too few pictures, see mean_interval.
    """
    from components.evaluation.statistics import mean_interval

    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for metric in metrics:
            by_picture = means_by_picture(rows, arm, metric)
            full = means_by_picture(rows, "full", metric)
            seeds = [float(np.mean([s[metric] for s in r["scores"].values()])) for r in rows if r["arm"] == arm]
            difference = np.array([by_picture[key] - full[key] for key in full])
            interval = mean_interval(difference) if arm != "full" else None
            line = {"arm": arm, "metric": metric, "mean": float(np.mean(list(by_picture.values()))), "seeds": seeds}
            lines.append({**line, "difference": float(difference.mean()), "interval": interval})
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a row for each arm and a column for each metric: mean, spread of seeds, difference to full."""
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    text = ["| arm | " + " | ".join(metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for metric in metrics:
            (line,) = [each for each in lines if (each["arm"], each["metric"]) == (arm, metric)]
            digits = 4 if metric in ("ssim", "gmsd") else 2
            cell = f"{line['mean']:.{digits}f}"
            if len(line["seeds"]) > 1:
                cell += f" ({min(line['seeds']):.{digits}f} to {max(line['seeds']):.{digits}f})"
            if arm != "full":
                ends = ", ".join(f"{end:+.{digits}f}" for end in line["interval"] or ())
                cell += f"<br>{line['difference']:+.{digits}f} " + (f"[{ends}]" if ends else f"({TOO_FEW})")
            cells.append(cell)
        text.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def arguments(doc: str, arms: Sequence[str], out: Path) -> argparse.ArgumentParser:
    """A parser with the options of every ablation."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--report", type=Path, help="draw the plot in its images/ and print the table; trains nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="several processes may share one --out")
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--size", type=int, default=64, help="pixels of a training crop; pictures are twice as large")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    return parser
