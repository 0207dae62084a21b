"""Pictures as Python has them (PIL, NumPy, torch, bytes, paths): to the bytes of a file, and a result back to its kind.

An array, a tensor or a PIL picture becomes a PNG without loss, so that it takes the way of a file in a batch job and
gives the same bits. torch is imported only if the caller has a tensor, and then it is there already.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from components.images import Limits, encode_png
from components.restoring import Result, file_key
from components.types import Image
from pipelines.core.errors import UsageError
from pipelines.core.pictures import read_picture
from pipelines.core.places.place import place_of

KEY = "picture"
"""Key of a picture without a name; the service takes the same one."""

PIL_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "I;16")
"""Modes that PNG holds; the others that restoring takes go through TIFF."""

Info = Mapping[str, str]


class RestoredArray(np.ndarray):
    """A restored picture, uint8, with its record as `info`; views and copies have it too."""

    info: Info

    def __array_finalize__(self, source: Any) -> None:
        self.info = getattr(source, "info", {})


class RestoredBytes(bytes):
    """The PNG file of a restored picture, with its record as `info`."""

    info: Info


@dataclass(frozen=True)
class Input:
    """One picture to restore.

    Attributes:
        data: bytes of a picture file.
        key: the picture's name, which with the seed determines every random number.
        back: turns the result into the kind of the input, with `info`.
    """

    data: bytes
    key: str
    back: Callable[[Result], Any]


def is_one(images: Any) -> bool:
    """Whether this is one picture, or a batch [B, C, H, W], and no collection of pictures."""
    return isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Pillow.Image | np.ndarray) or (
        _is_tensor(images)
    )


def read_input(image: Any, key: str, limits: Limits) -> Input:
    """Read one picture of any kind.

    Args:
        image: a path or an address in a store, the bytes of a file, a PIL picture, a uint8 array [H, W], [H, W, 1],
            [H, W, 3] or [H, W, 4], or a tensor [C, H, W] with C of 1, 3 or 4: uint8, or floats in [0, 1].
        key: "" takes the file's name, or KEY.
        limits: larger files are refused.

    Raises:
        UsageError: another type, shape or range.
        SampleError: the file cannot be read, or is too large.
    """
    if isinstance(image, str | os.PathLike):
        place = place_of(os.fspath(image))
        if isinstance(place, Path) and (place.is_dir() or not place.exists()):
            advice = f"is a folder: restoray.restore({str(place)!r}, out=...) restores all its pictures"
            raise UsageError(f"{place} {advice if place.is_dir() else 'does not exist'}.")
        return Input(read_picture(place, key or place.name, limits), key or file_key(place.stem), _as_pillow)
    if isinstance(image, bytes | bytearray | memoryview):
        return Input(bytes(image), key or KEY, _as_bytes)
    if isinstance(image, Pillow.Image):
        return Input(_pillow_bytes(image), key or KEY, lambda result: _as_pillow(result, image.mode))
    if isinstance(image, np.ndarray):
        return Input(encode_png(_checked_array(image), level=0), key or KEY, lambda r: _as_array(r, image.shape))
    if _is_tensor(image):
        return Input(_tensor_bytes(image), key or KEY, lambda result: _as_tensor(result, image))
    raise UsageError(
        f"a picture is a path, bytes, a PIL picture, a NumPy array or a torch tensor, got {type(image).__name__}."
    )


def split_batch(images: Any) -> list[Any] | None:
    """Return the pictures of a tensor [B, C, H, W]; None for anything else."""
    return list(images) if _is_tensor(images) and images.ndim == 4 else None


def join_batch(pictures: list[Any]) -> Any:
    """Return restored tensors as one [B, C, H, W], whose `info` is the list of their records."""
    import torch

    batch = torch.stack(pictures)
    batch.info = [picture.info for picture in pictures]  # type: ignore[attr-defined]
    return batch


# -- to bytes ----------------------------------------------------------------------------------------------------------


def _pillow_bytes(image: Pillow.Image) -> bytes:
    """Encode a PIL picture without loss, with its colour profile and its orientation."""
    target, extra = io.BytesIO(), {}
    if profile := image.info.get("icc_profile"):
        extra["icc_profile"] = profile
    exif = image.getexif()
    if exif:
        extra["exif"] = exif.tobytes()
    try:
        if image.mode in PIL_MODES:
            image.save(target, "PNG", compress_level=0, **extra)
        else:
            image.save(target, "TIFF", **extra)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"a PIL picture of mode {image.mode} cannot be restored ({error}): convert it to RGB."
        ) from error
    return target.getvalue()


def _checked_array(image: np.ndarray) -> Image:
    """Return an array as encode_png takes it; raises UsageError for another shape or type."""
    if image.dtype != np.uint8:
        raise UsageError(
            f"an array must be uint8, [H, W], [H, W, 3] or [H, W, 4], got {image.dtype} {image.shape}. For floats in "
            "[0, 1]: (255 * array).round().astype('uint8')."
        )
    plane = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if not (plane.ndim == 2 or (plane.ndim == 3 and plane.shape[2] in (3, 4))) or 0 in plane.shape:
        raise UsageError(f"an array must be [H, W], [H, W, 3] or [H, W, 4], got {image.shape}.")
    return np.ascontiguousarray(plane)


def _tensor_bytes(image: Any) -> bytes:
    """Encode a tensor as PNG; raises UsageError for another shape, type or range."""
    import torch

    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or 0 in image.shape:
        raise UsageError(
            f"a tensor must be [C, H, W] or [B, C, H, W] with 1, 3 or 4 channels, got {tuple(image.shape)}."
        )
    pixels = image.detach()
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise UsageError(f"a tensor of floats must lie in [0, 1], got {low:g} to {high:g}.")
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise UsageError(f"a tensor must be uint8, or floats in [0, 1], got {pixels.dtype}.")
    return encode_png(_checked_array(pixels.permute(1, 2, 0).cpu().numpy()), level=0)


def _is_tensor(image: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


# -- and back ----------------------------------------------------------------------------------------------------------


def _as_pillow(result: Result, mode: str = "") -> Pillow.Image:
    picture = Pillow.fromarray(result.image)
    if mode in ("RGB", "RGBA") and picture.mode != mode:  # a gray RGB picture stays RGB
        picture = picture.convert(mode)
    picture.info.update(result.text)
    return picture


def _as_bytes(result: Result) -> RestoredBytes:
    data = RestoredBytes(result.encode().data)
    data.info = dict(result.text)
    return data


def _as_array(result: Result, shape: tuple[int, ...]) -> RestoredArray:
    image = _with_channels(result.image, shape[2] if len(shape) == 3 else 1)
    if len(shape) == 3 and image.ndim == 2:
        image = image[..., None]
    array = np.ascontiguousarray(image).view(RestoredArray)
    array.info = dict(result.text)
    return array


def _as_tensor(result: Result, like: Any) -> Any:
    import torch

    image = _with_channels(result.image, like.shape[0])
    planes = np.ascontiguousarray(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))
    tensor = torch.from_numpy(planes).to(like.device)
    if like.is_floating_point():
        tensor = (tensor.float() / 255).to(like.dtype)
    tensor.info = dict(result.text)  # type: ignore[attr-defined]
    return tensor


def _with_channels(image: Image, channels: int) -> Image:
    """Return a result [H, W], [H, W, 2], [H, W, 3] or [H, W, 4] with the channels of the input.

    One channel becomes three only if the restorer added colours (gray=color).
    """
    colors, alpha = image, np.full(image.shape[:2], 255, np.uint8)
    if image.ndim == 3 and image.shape[2] in (2, 4):
        colors, alpha = image[..., :-1], image[..., -1]
    if channels == 1:
        return colors
    planes = np.dstack([colors] * 3) if colors.ndim == 2 or colors.shape[2] == 1 else colors
    return planes if channels == 3 else np.dstack([planes, alpha])
