"""The coarse restoration as a captioner's view (section 3.4: BLIP describes SwinIR's result).

Torch-free until called: views are sent to data tasks, and most streams use none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from components.captions.views import View
from components.images import pad_to_multiple
from components.types import Image, SampleError


@dataclass(frozen=True)
class CoarseView(View):
    """See captions.views.View.

    Attributes:
        model: the coarse restorer's folder or name; "" if the caller passes the preview.
    """

    model: str = ""

    needs_lq = True

    def for_recipe(self, recipe: Any) -> CoarseView:
        """The view through the coarse restorer that a recipe names.

        Raises:
            ValueError: the recipe names none.
        """
        if not recipe.coarse:
            raise ValueError("the coarse view needs a coarse restorer: name one with coarse=MODEL, or choose another")
        folder = Path(recipe.coarse)  # data tasks have a different current folder
        return replace(self, model=str(folder.absolute()) if folder.is_dir() else str(recipe.coarse))

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        """The preview if there is one, else the coarse restoration of lq, uint8 [H, W, 3]; SampleError "no_view"."""
        if preview is not None:
            return preview
        if lq is None or not self.model:
            raise SampleError("no_view", "there is no coarse restoration to caption, and no input or model to make one")
        return _restore(self.model, lq)


@lru_cache(maxsize=1)
def _open(model: str) -> Any:
    from components.systems.instarevive.build import open_coarse

    return open_coarse(model)


def _restore(model: str, image: Image) -> Image:
    import torch

    from components.tensors import images_to_tensor, tensor_to_images

    coarse, (height, width) = _open(model), image.shape[:2]
    padded = pad_to_multiple(image, coarse.multiple_px)
    with torch.inference_mode():
        restored = coarse(images_to_tensor([padded]) * 0.5 + 0.5) * 2 - 1
    return np.ascontiguousarray(tensor_to_images(restored)[0][:height, :width])
