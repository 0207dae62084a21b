"""Which picture a captioner sees: the target, the input, or what a system makes of the input. Torch-free.

SUPIR captions the output of its degradation-robust encoder and decoder, InstaRevive its coarse restoration, the
adapter paper the LQ itself. Such pictures are a system's own: it passes its views beside the ones here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from components.naming import did_you_mean
from components.types import Image, SampleError


class View(Protocol):
    """Chooses or makes the picture to caption, uint8 or float32 [H, W, 3]."""

    def __call__(self, hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
        """Of target, input and coarse restoration any may be absent; SampleError "no_view" where the needed one is."""


def view_hq(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
    """The target: for training."""
    return _present(hq, "hq")


def view_lq(hq: Image | None, lq: Image | None, preview: Image | None) -> Image:
    """The input as it is: what is known at test time."""
    return _present(lq, "lq")


VIEWS: Mapping[str, View] = {"hq": view_hq, "lq": view_lq}
"""Views that need no model."""


def find_view(name: str, more: Mapping[str, View] | None = None) -> View:
    """A view by name; `more` are those of a system.

    Raises:
        ValueError: an unknown name, with the near one.
    """
    known = {**VIEWS, **(more or {})}
    if name not in known:
        raise ValueError(f"unknown view {name!r}. {did_you_mean(name, known)}")
    return known[name]


def view_for(recipe: Any, name: str, more: Mapping[str, View] | None = None) -> View:
    """`find_view`, settled for a recipe: a system's view may look through a model that the recipe names.

    Raises:
        ValueError: an unknown name, or a recipe that lacks what the view needs.
    """
    view = find_view(name, more)
    settle = getattr(view, "for_recipe", None)
    return settle(recipe) if settle is not None else view


def needs_lq(view: View) -> bool:
    """Whether a view shows the input or what a model makes of it."""
    return view is view_lq or bool(getattr(view, "needs_lq", False))


def _present(image: Image | None, name: str) -> Image:
    if image is None:
        raise SampleError("no_view", f"there is no {name} picture to caption")
    return image
