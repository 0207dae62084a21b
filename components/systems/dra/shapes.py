"""The code of each shape of prior, by the record of its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.priors.families import family_of
from components.systems.dra.bundle import FAMILY, Bundle
from components.systems.dra.config import Shape, shape_of
from components.systems.dra.network import Dra
from components.systems.dra.tokens import TokenDra

BUNDLES: Mapping[Shape, type[Bundle[Any, Any]]] = {"maps": Dra, "tokens": TokenDra}


def bundle_of(family: str) -> type[Bundle[Any, Any]]:
    """The class of the networks on priors of a family. Raises ValueError for an unknown family, or one without any."""
    return BUNDLES[shape_of(family_of(family))]


def family_name(config: Mapping[str, Any]) -> str:
    """The family that a model's config names; older models have none and are SDXL-shaped."""
    return str(config.get(FAMILY) or Dra.own_family)
