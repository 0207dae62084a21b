"""Weights files of the community, and what an import takes beside them. Torch-free: checked early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLISHED = (
    "by their authors: one file of a network that spandrel detects (ESRGAN, Compact, SwinIR, HAT, DAT, and others)"
)

PART = "network"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
FILES = {PART: "any name with " + ", ".join(SUFFIXES)}

SIDECAR = "restoray.json"
"""Written next to an exported file: recipe, licence and origin."""

LICENCE_TEXTS = ("modelspec.license", "license", "licence")
ORIGIN_TEXTS = ("modelspec.author", "author", "source", "url")
"""Texts in the head of a safetensors file that name licence and origin."""


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing: all sizes follow from the shapes. ValueError for any size."""
    if sizes:
        raise ValueError(f"unknown size {next(iter(sizes))!r}: the sizes of a regressor follow from its weights")
    return {}


def find_files(place: Path) -> Sequence[Path]:
    """The weights file: the file itself, or the only one in a folder.

    Raises:
        ValueError: `place` does not exist, or holds no weights file or several.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"{place} does not exist")
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(files) != 1:
        names = ", ".join(path.name for path in files[:5])
        raise ValueError(
            f"{place} holds {f'several weights files ({names}): name one' if files else 'no weights file'}"
        )
    return files
