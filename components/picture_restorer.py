"""The base of restorers that restore one picture after the other, each by itself, without seeds and prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
from PIL import Image as Pillow

from components.options import option_texts, replace_options
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError, StepEvent

Options = TypeVar("Options")


class PictureRestorer(Restorer, Generic[Options]):
    """See types.Restorer. A derived class restores a picture in `restore_image`.

    Args:
        system: its name, for the results.
        defaults: options that replace the built-in ones, by name.
        built_in: the system's options.

    Raises:
        ValueError: a default is unknown or out of range.
    """

    def __init__(self, system: str, defaults: Mapping[str, object], built_in: Options) -> None:
        self.system = system
        self.defaults = replace_options(defaults, built_in)

    @abstractmethod
    def restore_image(
        self, image: Image, size: tuple[int, int], options: Options, cancelled: Cancelled | None, key: str
    ) -> Image:
        """Restore a picture, uint8 [H, W, 3] -> [*size, 3]; `cancelled` is called before each tile."""

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order, one picture at a time.

        Args:
            requests: any sizes; `size` enlarges or shrinks by bicubic interpolation first.
            on_step: called after each picture.
            cancelled: called before each tile.

        Raises:
            SampleError: a picture that is not uint8 RGB ("bad_image"), or an impossible size ("bad_size").
            ValueError: unknown or wrong options; the message names the nearest option.
            Cancellation: `cancelled()` became true.
        """
        restored = []
        for number, request in enumerate(requests, start=1):
            options = replace_options(request.options, self.defaults)
            image = self.restore_image(request.image, check_request(request), options, cancelled, request.key)
            restored.append(
                Restored(key=request.key, image=image, info={"system": self.system, **option_texts(options)})
            )
            if on_step is not None:
                on_step(StepEvent(step=number, of=len(requests)))
        return restored


def check_request(request: Request) -> tuple[int, int]:
    """(height, width) of the result; SampleError for a picture or a size that cannot be."""
    image = request.image
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
    size = request.size or (image.shape[0], image.shape[1])
    if min(size) < 1:
        raise SampleError("bad_size", f"size must be positive, got {size[0]} x {size[1]}", request.key)
    return size


def resize_bicubic(image: Image, size: tuple[int, int]) -> Image:
    """A picture resized to (height, width) by Pillow; one of that size is returned as it is."""
    if image.shape[:2] == size:
        return image
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), Pillow.Resampling.BICUBIC))
