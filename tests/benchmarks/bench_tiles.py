"""Effects of tiling: seam scores, difference from the whole, memory at 8K. Prints a JSON line for each.

    python tests/benchmarks/bench_tiles.py seams --model DIR --pictures DIR [--look OUT]
    python tests/benchmarks/bench_tiles.py whole --model DIR --pictures DIR --side 2048
    python tests/benchmarks/bench_tiles.py memory --side 8192 --steps 2

A patch autoencoder leaves a faint grid in every picture, with or without tiles, and tiles begin on its lines. `seam`
therefore scores the grid too. `seam_of_the_whole` is the score of the picture without tiles at the same places.
`seam_in_step` compares with lines at a distance of the networks' total downsampling factor, which are on the grid too;
`in_step_of_the_whole` is the same without tiles.

Without --model: an untrained model of --system on the nano prior, with the shapes and costs of a trained one. The model
may restore in one step, e.g. the shipped one: `--model components/systems/weights/nano`. It takes no --steps.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from untrained import SYSTEMS, save_untrained

from components.images import decode, encode_png
from components.samplers.tiles import tile_boxes
from components.systems import build_restorer
from components.types import Image, Request, StepEvent


def open_restorer(model: Path | None, system: str, steps: int) -> Any:
    """A trained model's restorer, or that of an untrained model of a system on the nano prior."""
    if model is not None:
        return build_restorer(model)
    with tempfile.TemporaryDirectory() as folder:
        return build_restorer(save_untrained(system, Path(folder) / "model", steps).path)


def seam_score(picture: Image, borders: tuple[list[int], list[int]], width: int = 2) -> float:
    """Mean step across tile borders over the mean step `width` pixels away from them; 1 without a seam.

    Infinite if the picture is flat away from the borders and steps at them.


    Args:
        picture: uint8 [H, W, 3].
        borders: rows and columns where a tile begins or ends.
    """
    levels = picture.astype(np.float64)
    border_steps, near_steps = [], []
    for axis, places in enumerate(borders):
        steps = np.abs(np.diff(levels, axis=axis)).mean(axis=2)
        for place in places:
            line = [steps.take(i, axis=axis).mean() for i in (place - 1, place - 1 - width, place - 1 + width)]
            border_steps.append(line[0])
            near_steps.append((line[1] + line[2]) / 2)
    border, near = float(np.mean(border_steps)), float(np.mean(near_steps))
    return border / near if near else math.inf if border else 1.0


def borders_of(height: int, width: int, tile_px: int, overlap: float, multiple_px: int) -> tuple[list[int], list[int]]:
    """Rows and columns where the restorer's tiles begin or end, without the picture's outer edges."""
    padded = (height + -height % multiple_px, width + -width % multiple_px)
    boxes = tile_boxes(*padded, (tile_px, tile_px), overlap, multiple_px)
    rows = {edge for top, _, h, _ in boxes for edge in (top, top + h) if 2 < edge < height - 3}
    columns = {edge for _, left, _, w in boxes for edge in (left, left + w) if 2 < edge < width - 3}
    return sorted(rows), sorted(columns)


def ramp(side: int) -> Image:
    """A slow colour ramp, in which the smallest step is visible."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    return np.rint(255 * np.stack([0.2 + 0.6 * x, 0.3 + 0.5 * y, 0.8 - 0.5 * (x + y) / 2], -1)).astype(np.uint8)


SOURCES = (("sky", "hq/roman-colosseum.jpg", (0.2, 1.0)), ("texture", "hq/the-spices-of-life.jpg", (0.5, 0.5)))
"""Name, file below the shared pictures, and position of the square (0 first, 1 last row or column)."""


def pictures_of(folder: Path | None, side: int) -> dict[str, Image]:
    """Ramp, sky and texture; sky and texture are half-height squares of shared photographs."""
    pictures = {"ramp": ramp(side)}
    for name, file, place in SOURCES if folder is not None else ():
        assert folder is not None
        image = decode((folder / file).read_bytes())
        size = min(image.shape[:2]) // 2
        top, left = (int(f * (length - size)) for f, length in zip(place, image.shape[:2], strict=True))
        pictures[name] = cv2.resize(
            image[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_CUBIC
        )
    return pictures


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str]) -> Iterator[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["seams", "whole", "memory"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--system", choices=SYSTEMS, default="instantir")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--look", type=Path)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=4)
    settings = parser.parse_args(arguments)
    restorer = open_restorer(settings.model, settings.system, settings.steps)
    options = {"tile_px": settings.tile, "tile_overlap": settings.overlap}
    if hasattr(restorer, "network"):
        options["steps"] = settings.steps
        multiple = restorer.network.prior.multiple_px
    else:
        multiple = restorer.multiple_px
    if settings.what == "memory":
        before = peak_mib()
        start = time.perf_counter()
        image = np.tile(ramp(1024), (-(-settings.side // 1024), -(-settings.side // 1024), 1))[
            : settings.side, : settings.side
        ]

        def print_step(event: StepEvent) -> None:
            print(f"step {event.step} of {event.of}: {peak_mib() - before:.0f} MiB", file=sys.stderr, flush=True)

        restorer.restore([Request(key="large", image=image, options=options)], print_step)
        seconds = time.perf_counter() - start
        peak = peak_mib() - before
        row = {
            "what": "memory",
            "system": settings.system,
            "side": settings.side,
            "steps": settings.steps,
            "tile": settings.tile,
        }
        yield {**row, "peak_above_weights_mib": round(peak), "seconds": round(seconds)}
        return
    for name, image in pictures_of(settings.pictures, settings.side).items():
        request = Request(key=name, image=image, seed=1, options=options)
        tiles = restorer.restore([request])[0].image
        whole_options = {**options, "tile_px": settings.side}
        whole = restorer.restore([Request(key=name, image=image, seed=1, options=whole_options)])[0].image
        borders = borders_of(settings.side, settings.side, settings.tile, settings.overlap, multiple)
        difference = np.abs(tiles.astype(float) - whole)
        row = {"what": settings.what, "picture": name,
               "side": settings.side, "tile": settings.tile, "overlap": settings.overlap,
               "seam": seam_score(tiles, borders), "seam_of_the_whole": seam_score(whole, borders),
               "seam_in_step": seam_score(tiles, borders, multiple),
               "in_step_of_the_whole": seam_score(whole, borders, multiple),
               "mean_difference": float(difference.mean()), "p99": float(np.quantile(difference, 0.99))}  # fmt: skip
        if settings.look is not None:
            settings.look.mkdir(parents=True, exist_ok=True)
            for kind, picture in (("lq", image), ("tiles", tiles), ("whole", whole)):
                (settings.look / f"{name}-{kind}.png").write_bytes(encode_png(picture))
        yield row


if __name__ == "__main__":
    for line in main(sys.argv[1:]):
        print(json.dumps(line), flush=True)
