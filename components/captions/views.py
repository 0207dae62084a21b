"""Views: the picture that a captioner gets, which is the target, the input, or a system's picture. Torch-free.

SUPIR captions the output of its degradation-robust encoder and decoder, InstaRevive its coarse restoration, the
adapter paper lq. Each system adds views for its own pictures to the ones here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from components.naming import did_you_mean
from components.types import Image, SampleError


class View(Protocol):
    """Selects or makes the picture to caption, uint8 or float32 [H, W, 3]. A class may derive from it.

    Attributes:
        needs_lq: whether the view shows the input, or a model's output for the input.
    """

    needs_lq: bool

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        """Return the picture; raise SampleError "no_view" if the picture that the view needs is None."""

    def for_recipe(self, recipe: Any) -> View:
        """Return the view for a recipe; it may use a model that the recipe names.

        Raises:
            ValueError: the recipe lacks what the view needs.
        """
        return self


class TargetView(View):
    """The target, for training."""

    needs_lq = False

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        return _require(hq, "hq")


class InputView(View):
    """The input, which is also available at test time."""

    needs_lq = True

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        return _require(lq, "lq")


class PreviewView(View):
    """The restorer's preliminary result; there is none outside a restoration."""

    needs_lq = True

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        return _require(preview, "preliminary")


VIEWS: Mapping[str, View] = {"hq": TargetView(), "lq": InputView()}
"""Views without a model."""


def find_view(name: str, more: Mapping[str, View] | None = None) -> View:
    """Return a view by name; `more` are the views of a system.

    Raises:
        ValueError: an unknown name, with a suggestion.
    """
    views = {**VIEWS, **(more or {})}
    if name not in views:
        raise ValueError(f"unknown view {name!r}. {did_you_mean(name, views)}")
    return views[name]


def view_for(recipe: Any, name: str, more: Mapping[str, View] | None = None) -> View:
    """Find a view by name and return it for a recipe; see `View.for_recipe`.

    Raises:
        ValueError: an unknown name, or a recipe that lacks what the view needs.
    """
    return find_view(name, more).for_recipe(recipe)


def _require(image: Image | None, name: str) -> Image:
    if image is None:
        raise SampleError("no_view", f"there is no {name} picture to caption")
    return image
