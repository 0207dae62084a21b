"""Opens a prior of any family by name, and checks it against a trained model's record."""

from __future__ import annotations

from collections.abc import Mapping

from components.priors.families import family_of
from components.priors.families.record import FamilyPrior
from components.priors.files import Precision
from components.priors.opening import open_as_recorded


def open_family_prior(
    family: str, name: str, record: Mapping[str, str] | None, precision: Precision = "fp32"
) -> FamilyPrior:
    """Open a prior of a family on the CPU, frozen and without a picture encoder.

    Args:
        family: name of the family.
        name: a shipped name, a model folder, a diffusers folder or a hub id.
        record: the entry "prior" of model.json, see open_recorded_prior; None if there is no model yet.
        precision: of the weights.

    Raises:
        ModelError: there is no such prior, or its digest is not the recorded one.
        ValueError: an unknown family.
    """
    opener = family_of(family).open
    return open_as_recorded(name, record, lambda place: opener(place, precision, True))
