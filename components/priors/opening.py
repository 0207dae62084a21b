"""Opens a prior by name: a shipped or trained model folder, a diffusers folder, or a hub id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from components.models import Model, ModelError, load_model, resolve_model
from components.priors.files import Precision, check_prior_folder, fill_prior, first_line
from components.priors.hub import load_sdxl
from components.priors.nano import build_prior
from components.priors.sdxl import Prior
from components.priors.sdxl_config import DINOV2


def load_prior(
    name: str | Path, device: str = "cpu", image_encoder: str = DINOV2, precision: Precision = "fp32"
) -> Prior:
    """Loads a prior, frozen.

    Args:
        name: a shipped name ("nano"), a model folder, a diffusers folder or a hub id of an SDXL pipeline; a folder may
            be a name below RESTORAY_HOME/weights.
        device: torch device.
        image_encoder: Dinov2 folder or hub id, used with a diffusers prior only; "" for none.
        precision: dtype of the networks' weights, see Prior.in_precision.

    Raises:
        ModelError: no prior under that name; the message lists the places that were tried.
    """
    try:
        model = load_model(name, prior=True)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
        return load_diffusers_prior(str(name), image_encoder, precision, str(error)).to(device).freeze()
    check_prior_folder(model)
    return prior_from_model(model).in_precision(precision).to(device).freeze()


def open_recorded_prior(
    name: str,
    record: Mapping[str, str] | None,
    device: str,
    precision: Precision = "fp32",
    image_encoder: str = DINOV2,
) -> Prior:
    """Open the prior that a model or recipe names, and check it against the digest that the model records.

    Args:
        name: name, folder or hub id of the prior, as load_prior takes it.
        record: the entry "prior" of model.json: id, digest ("" if the prior is not a Restoray model), image_encoder.
            None if there is no model yet.
        device: device of the networks.
        precision: precision of the weights.
        image_encoder: of a diffusers prior whose record names none; "" for none.

    Raises:
        ModelError: there is no such prior, or its digest is not the recorded one.
    """
    encoder = (record or {}).get("image_encoder") or image_encoder
    return open_as_recorded(name, record, lambda place: load_prior(place, device, encoder, precision))


class Named(Protocol):
    """A prior with the digest of its model folder, or ""."""

    digest: str


SomePrior = TypeVar("SomePrior", bound=Named)


def open_as_recorded(name: str, record: Mapping[str, str] | None, load: Callable[[str], SomePrior]) -> SomePrior:
    """The prior that `load` opens by its place, checked against the digest of its record; see open_recorded_prior."""
    digest = (record or {}).get("digest", "")
    try:
        # A prior with a digest is a local model folder, so the hub is not asked.
        prior = load(str(resolve_model(name, prior=True)) if digest else name)
    except ModelError as error:
        if not digest:
            raise
        raise ModelError(
            f"the model was trained on prior {name!r} with digest {digest[:12]}: bring it back to that path ({error})"
        ) from error
    if digest and prior.digest and digest != prior.digest:
        raise ModelError(
            f"prior {name!r} has digest {prior.digest[:12]}, but the model was trained on {digest[:12]}: "
            "bring that prior back, or train the model again"
        )
    return prior


def prior_from_model(model: Model) -> Prior:
    """Builds a prior from its model folder.

    Raises:
        ModelError: its config builds no prior, or its weights do not fit.
    """
    tokenizer = model.file("tokenizer.json").read_text(encoding="utf-8")
    family = model.info["config"].get("family", "sdxl")
    if family != "sdxl":
        raise ModelError(
            f"{model.path}: a prior of SDXL's shape is needed here, and this one is of the family {family}"
        )
    try:
        prior = build_prior(model.info["config"], tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: its config builds no prior ({first_line(error)})") from error
    fill_prior(prior, model)
    return prior


def load_diffusers_prior(
    name: str, image_encoder: str = DINOV2, precision: Precision = "fp32", before: str = ""
) -> Prior:
    """Loads an SDXL pipeline in diffusers' layout (folder or hub id) and a Dinov2 model in transformers' layout.

    Raises:
        ModelError: the message lists the places that were tried; `before` is the message of an earlier attempt.
    """
    try:
        return Prior(**load_sdxl(name, image_encoder, precision))
    except ModelError as error:
        raise ModelError(f"no SDXL pipeline: {error}{f' ({before})' if before else ''}") from error
