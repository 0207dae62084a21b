"""Parts of every page: templates, data URIs of pictures, and an even selection of what a page can show."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import jinja2
import numpy as np
from PIL import Image as Pillow

from components.types import Image

T = TypeVar("T")


def shrink(image: Image, side_px: int) -> Image:
    """Area-resize to a longer side of at most `side_px`; smaller pictures stay as they are."""
    height, width = image.shape[:2]
    if max(height, width) <= side_px:
        return image
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def data_uri(image: Image, quality: int) -> str:
    """The picture as a JPEG's data URI, without metadata and with full-resolution chroma, for small pictures."""
    stream = io.BytesIO()
    Pillow.fromarray(image).save(stream, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file_uri(stream.getvalue(), "image/jpeg")


def file_uri(data: bytes, media_type: str) -> str:
    """A file's bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def load_template(name: str) -> Callable[[Mapping[str, Any]], str]:
    """A page of templates/ as a function of its content. It escapes all content; an unknown name is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.get_template(name)
    return lambda content: template.render(content)
