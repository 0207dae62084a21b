"""Strips: small pictures of single steps or results, a PNG for each picture, and the contact sheet of all strips."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from components.images import decode, encode_png
from components.types import Image
from pipelines.pages.sheets import contact_sheet

TILE_PX = 96
SHEET_PICTURES = 4


def strip_name(key: str) -> str:
    """Path of a picture's strip in the study's folder."""
    return f"strips/{key}.png"


def sheet_keys(keys: Sequence[str], count: int = SHEET_PICTURES) -> list[str]:
    """Keys of the pictures on the sheet. A hash of the key selects them, so neither names nor results decide."""
    return sorted(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:count])


def tile(picture: Image) -> Image:
    """A square picture at TILE_PX."""
    method = cv2.INTER_AREA if picture.shape[0] > TILE_PX else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, (TILE_PX, TILE_PX), interpolation=method), dtype=np.uint8)


def strip_png(rows: Sequence[Sequence[Image]]) -> bytes:
    """Rows of tiles as one PNG; white tiles fill short rows."""
    columns = max(len(row) for row in rows)
    blank = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
    return encode_png(np.vstack([np.hstack([*row, *[blank] * (columns - len(row))]) for row in rows]))


def strip_files(key: str, rows: Sequence[Sequence[Image]]) -> dict[str, bytes]:
    """The strip as a "files" entry of a row; empty without rows."""
    return {strip_name(key): strip_png(rows)} if rows else {}


def read_strip(path: Path) -> list[list[Image]]:
    """The tiles of a strip, row by row."""
    picture = decode(path.read_bytes())
    height, width = picture.shape[0] // TILE_PX, picture.shape[1] // TILE_PX
    return [[picture[r * TILE_PX :, c * TILE_PX :][:TILE_PX, :TILE_PX] for c in range(width)] for r in range(height)]


def strip_sheet(out: Path, rows: Sequence[Mapping[str, Any]], captions: Mapping[str, Sequence[str]]) -> bytes | None:
    """A contact sheet (JPEG) of the strips of these rows; None if no row has a strip.

    Args:
        captions: by key, a caption for each row of the strip.
    """
    cells = []
    for row in rows:
        name = strip_name(row["key"])
        if name in row["files"]:
            lines = read_strip(out / name)
            cells += [(line, caption) for line, caption in zip(lines, captions[row["key"]], strict=True)]
    return contact_sheet(cells, side_px=TILE_PX, columns=1) if cells else None
