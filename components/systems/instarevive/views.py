"""The coarse restoration as a captioner's view (section 3.4: BLIP describes what SwinIR made of the input).

Torch-free until called: views travel to data tasks, and most streams ask for none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from components.types import Image, SampleError


@dataclass(frozen=True)
class CoarseView:
    """See captions.views.View.

    Attributes:
        model: the coarse restorer's folder or name; "" shows a preview that the caller has made, or nothing.
    """

    model: str = ""

    needs_lq = True

    def for_recipe(self, recipe: Any) -> CoarseView:
        """The view through the coarse restorer that a recipe names.

        Raises:
            ValueError: it names none.
        """
        if not recipe.coarse:
            raise ValueError("the coarse view needs a coarse restorer: name one with coarse=MODEL, or choose another")
        folder = Path(recipe.coarse)  # data tasks have another current folder
        return replace(self, model=str(folder.absolute()) if folder.is_dir() else str(recipe.coarse))

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        """The preview where there is one, else the coarse restoration of lq, uint8 [H, W, 3]; SampleError "no_view"."""
        if preview is not None:
            return preview
        if lq is None or not self.model:
            raise SampleError("no_view", "there is no coarse restoration to caption, and nothing to make one of")
        return _restored(self.model, lq)


@lru_cache(maxsize=1)
def _opened(model: str) -> Any:
    from components.systems.instarevive.build import open_coarse

    return open_coarse(model)


def _restored(model: str, image: Image) -> Image:
    import torch

    from components.images import pad_to_multiple
    from components.tensors import images_to_tensor, tensor_to_images

    coarse, (height, width) = _opened(model), image.shape[:2]
    padded = pad_to_multiple(image, coarse.multiple_px)
    with torch.inference_mode():
        made = coarse(images_to_tensor([padded]) * 0.5 + 0.5) * 2 - 1
    return np.ascontiguousarray(tensor_to_images(made)[0][:height, :width])
