"""A model opened for the batch job or the service: its folder, identity, options and restorer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.options import OptionCheck
from components.restoring import MAX_OUTPUT_PIXELS, Ask, Identity, parse_ask
from components.systems import SYSTEMS, build_restorer
from components.types import Restorer
from pipelines.core.errors import Failure, UsageError
from pipelines.core.places.addresses import is_address
from pipelines.core.places.models import fetch_model
from pipelines.core.places.place import Place, place_of

Factory = Callable[[], Restorer]
"""Builds the restorer inside a worker; picklable."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """The model folder of a restoration model, opened without its weights.

    Attributes:
        folder: path of the model folder.
        identity: information about the model in results.
        build: settings of the restorer that differ from the defaults: device, precision, speed. Records hold them too.
        factory: builds the restorer in each worker.
    """

    folder: Path
    identity: Identity
    build: Mapping[str, Any] = field(default_factory=dict)
    factory: Factory

    @property
    def check(self) -> OptionCheck:
        """Function that checks the restorer options of a request and converts them to their types."""
        return option_check(self.identity.system, self.identity.defaults)

    def request_options(self, options: Mapping[str, Any], max_output_pixels: int = MAX_OUTPUT_PIXELS) -> Ask:
        """Check options and convert them to their types. Raises UsageError for a wrong option."""
        return request_options(options, self.check, max_output_pixels)


def open_model(model: str | Path, build: Mapping[str, Any] | None = None) -> OpenedModel:
    """Open a model folder or a shipped model.

    Args:
        model: a path, an address in a store, or a name.
        build: see OpenedModel.

    Raises:
        UsageError: the model does not exist, its model.json is broken, or it is not a restoration model.
    """
    from components.models import ModelError, load_model  # imports torch

    place = place_of(model) if is_address(model) else None
    try:
        files = load_model(fetch_model(place) if isinstance(place, Place) else model)
    except ModelError as error:
        raise UsageError(str(error)) from error
    info, folder = files.info, files.path.resolve()
    system = SYSTEMS.get(str(info["system"]))
    if system is not None and system.check_options is None:
        raise UsageError(f"{model} is a {info['system']} model, which restores nothing: name a restoration model.")
    recipe = info.get("recipe") or {}
    identity = Identity(
        name=str(info["name"]),
        system=str(info["system"]),
        recipe=str(recipe.get("name") or info["name"]),
        digest=files.digest,
        licence=str(info.get("licence", "unstated")),
        permitted_use=str(info.get("permitted_use", "unstated")),
        frame=str(recipe.get("prompt") or ""),
        defaults=recipe_defaults(str(info["system"]), recipe),
    )
    factory = functools.partial(build_restorer, folder, **(build or {}))
    if isinstance(place, Place):
        factory = functools.partial(_build_stored, place, files.digest, **(build or {}))
    return OpenedModel(folder=folder, identity=identity, build=dict(build or {}), factory=factory)


def _build_stored(place: Place, digest: str, **build: Any) -> Restorer:
    """Build the restorer of a model in a store, in a worker whose machine may not have it yet."""
    from components.models import load_model

    folder = fetch_model(place)
    if load_model(folder).digest != digest:
        raise Failure(f"{place} was changed while the job ran.")
    return build_restorer(folder, **build)


def recipe_defaults(system: str, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the restorer options that a resolved recipe sets for its model."""
    return SYSTEMS[system].restore_defaults(recipe) if system in SYSTEMS else {}


def option_check(system: str, defaults: Mapping[str, Any]) -> OptionCheck:
    """Return the function that checks a request's options; for a system outside SYSTEMS it accepts all options.

    Args:
        defaults: options that the model's recipe sets, see Identity.
    """
    entry = SYSTEMS.get(system)
    if entry is None or entry.check_options is None:
        return dict
    return functools.partial(entry.check_options, defaults=dict(defaults))


def request_options(
    options: Mapping[str, Any], check: OptionCheck = dict, max_output_pixels: int = MAX_OUTPUT_PIXELS
) -> Ask:
    """Call `parse_ask`; its error becomes a UsageError."""
    try:
        return parse_ask(options, check, max_output_pixels)
    except ValueError as error:
        raise UsageError(str(error)) from error
