"""Recorded runs of one picture for studies: tensors, seeds and steps, and strips of small pictures for the sheets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from components.images import decode, encode_png
from components.restoring import picture_seed
from components.types import Image
from pipelines.analysis.study import Subject, numbers
from pipelines.sheets import contact_sheet

if TYPE_CHECKING:
    from torch import Tensor

    from components.systems.instantir.insight import Trajectory

TILE_PX = 96
STRIP_STEPS = 6
SHEET_PICTURES = 4


def settings_of(subject: Subject) -> dict[str, Any]:
    """What decides the rows of every study with a model."""
    from dataclasses import asdict

    return {
        "model": subject.digest,
        "options": asdict(subject.options),
        "side_px": subject.side_px,
        "seed": subject.seed,
        "device": subject.device,
    }


def tensor(picture: Image) -> Tensor:
    """uint8 [S, S, 3] -> float32 [1, 3, S, S] in [-1, 1]."""
    from components.tensors import images_to_tensor

    return images_to_tensor([picture])


def record_picture(subject: Subject, key: str, lq: Image, prompt: str = "", **changes: Any) -> Trajectory:
    """Restore one picture and keep the run. `changes` are options for this run only."""
    from dataclasses import replace

    from components.systems.instantir.insight import record

    options = replace(subject.options, **changes)
    return record(subject.network, tensor(lq), options, [picture_seed(subject.seed, key)], [prompt])


def latents_of(subject: Subject, picture: Image) -> Tensor:
    """The picture's clean latents [1, C, h, w]."""
    import torch

    with torch.inference_mode():
        return subject.network.prior.encode(tensor(picture).to(subject.network.prior.device))


def decoded(subject: Subject, latents: Tensor) -> list[Image]:
    """Pictures uint8 [S, S, 3] of latents [B, C, h, w]."""
    import torch

    from components.tensors import tensor_to_images

    with torch.inference_mode():
        return tensor_to_images(subject.network.prior.decode(latents))


def run_values(run: Trajectory, hq: Tensor) -> dict[str, list[Any]]:
    """Of one picture's run, by step: the distances of Fig. 4 and the errors against the clean latents."""
    from components.systems.instantir.insight import distances, errors

    found, wrong = distances(run), errors(run, hq)
    return {
        "to_denoised": numbers(found.to_denoised[:, 0].cpu()),
        "change": numbers(found.change[:, 0].cpu()),
        "delta": numbers(found.delta[:, 0].cpu()),
        "preview_error": numbers(wrong["preview"][:, 0].cpu()),
        "denoised_error": numbers(wrong["denoised"][:, 0].cpu()),
    }


# -- strips ------------------------------------------------------------------------------------------------------------


def strip_name(key: str) -> str:
    """Where a picture's strip lies below the study's folder."""
    return f"strips/{key}.png"


def sheet_keys(keys: Sequence[str], most: int = SHEET_PICTURES) -> list[str]:
    """Pictures that the sheet shows: spread evenly over the keys by a hash, so that neither name nor result chooses."""
    return sorted(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:most])


def strip_steps(steps: int, renewed: Sequence[bool] | None = None) -> list[int]:
    """0-based steps that a strip shows, first and last included, of those whose preview was made."""
    made = [step for step in range(steps) if renewed is None or renewed[step]]
    if not made:
        return []
    return [made[i] for i in np.unique(np.linspace(0, len(made) - 1, STRIP_STEPS).round().astype(int))]


def strip_row(subject: Subject, run: Trajectory, before: Sequence[Image]) -> list[Image]:
    """`before`, then previews over the steps, then the result: small squares."""
    import torch

    shown = strip_steps(len(run.timesteps), run.renewed.tolist())
    latents = torch.cat([*(run.previews[step] for step in shown), run.latents])
    return [small(picture) for picture in [*before, *decoded(subject, latents)]]


def small(picture: Image) -> Image:
    """TILE_PX square of a square picture."""
    shrink = picture.shape[0] > TILE_PX
    method = cv2.INTER_AREA if shrink else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, (TILE_PX, TILE_PX), interpolation=method), dtype=np.uint8)


def strip_png(rows: Sequence[Sequence[Image]]) -> bytes:
    """Rows of small squares as one PNG; short rows end in white."""
    columns = max(len(row) for row in rows)
    blank = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
    return encode_png(np.vstack([np.hstack([*row, *[blank] * (columns - len(row))]) for row in rows]))


def read_strip(path: Path) -> list[list[Image]]:
    """The squares of a strip again, row by row."""
    picture = decode(path.read_bytes())
    height, width = picture.shape[0] // TILE_PX, picture.shape[1] // TILE_PX
    return [[picture[r * TILE_PX :, c * TILE_PX :][:TILE_PX, :TILE_PX] for c in range(width)] for r in range(height)]


def strip_sheet(out: Path, rows: Sequence[Mapping[str, Any]], captions: Mapping[str, Sequence[str]]) -> bytes | None:
    """One contact sheet (JPEG) of all strips of these rows; `captions` by key name each line of a strip."""
    cells = []
    for row in rows:
        name = strip_name(row["key"])
        if name in row["files"]:
            lines = read_strip(out / name)
            cells += [(line, caption) for line, caption in zip(lines, captions[row["key"]], strict=True)]
    return contact_sheet(cells, side_px=TILE_PX, columns=1) if cells else None
