"""The families of priors by name. Another family is one file of this folder, and one line here. Torch-free."""

from __future__ import annotations

from components.naming import did_you_mean
from components.priors.families.one_text import PIXART_FAMILY, SD_FAMILY
from components.priors.families.record import PriorFamily
from components.priors.families.sd3 import SD3_FAMILY
from components.priors.families.sdxl import NANO_FAMILY, SDXL_FAMILY

FAMILIES: dict[str, PriorFamily] = {
    family.name: family for family in (PIXART_FAMILY, SD_FAMILY, SDXL_FAMILY, NANO_FAMILY, SD3_FAMILY)
}


def family_of(name: str) -> PriorFamily:
    """The family of that name. Raises ValueError with the nearest name if there is none."""
    if name not in FAMILIES:
        raise ValueError(f"unknown prior family {name!r}. {did_you_mean(name, list(FAMILIES))}")
    return FAMILIES[name]


def licence_of(prior: str) -> str:
    """The published licence of a prior by its hub id; "see there" for any other."""
    return next((family.licences[prior] for family in FAMILIES.values() if prior in family.licences), "see there")


def permitted_use_of(prior: str) -> str:
    """The permitted use of weights that were trained on a prior, for model.json; by the prior's hub id."""
    return f"as the licences allow; of the prior {prior}: {licence_of(prior)}"
