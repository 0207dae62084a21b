"""A model opened for the batch job or the service: its folder, identity, options and restorer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.options import OptionCheck
from components.places import on_this_machine
from components.restoring import MAX_OUTPUT_PIXELS, Ask, Identity, parse_ask
from components.systems import SYSTEMS, build_restorer
from components.systems.sharing import build_shared_restorer, check_sharing
from components.types import Restorer
from pipelines.core.errors import Failure, UsageError
from pipelines.core.places.addresses import is_address
from pipelines.core.places.models import fetch_model
from pipelines.core.places.place import Place, Where, place_of
from pipelines.restoration.routes import Choice

Factory = Callable[[], Restorer]
"""Builds the restorer inside a worker; picklable."""

Source = tuple[Where, str]
"""Where a model is, its folder or its address in a store, and its digest."""


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """The model folder of a restoration model, opened without its weights.

    Attributes:
        folder: path of the model folder on this machine.
        source: where the workers find it, and its digest.
        identity: information about the model in results.
        build: settings of the restorer that differ from the defaults: device, precision, speed. Records hold them too.
        factory: builds the restorer in each worker; with siblings that of all of them, see systems.sharing.
        siblings: further models on the same prior, which the restorer holds too.
    """

    folder: Path
    source: Source
    identity: Identity
    build: Mapping[str, Any] = field(default_factory=dict)
    factory: Factory
    siblings: tuple[OpenedModel, ...] = ()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The models that pictures may name; this one is the first."""
        return tuple(
            Choice(identity=each.identity, check=each.check, names=(each.identity.name, each.source[0].name))
            for each in (self, *self.siblings)
        )

    @property
    def check(self) -> OptionCheck:
        """Function that checks the restorer options of a request and converts them to their types."""
        return option_check(self.identity.system, self.identity.defaults)

    def request_options(self, options: Mapping[str, Any], max_output_pixels: int = MAX_OUTPUT_PIXELS) -> Ask:
        """Check options, for all models, and convert them to their types. Raises UsageError for a wrong option."""
        for each in self.siblings:
            request_options(options, each.check, max_output_pixels, each.identity.own_scale)
        return request_options(options, self.check, max_output_pixels, self.identity.own_scale)


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
        own_scale=system.own_scale(info["config"]) if system is not None else 1.0,
    )
    source: Source = (place if isinstance(place, Place) else folder, files.digest)
    factory = functools.partial(_build_restorer, source, **(build or {}))
    return OpenedModel(folder=folder, source=source, identity=identity, build=dict(build or {}), factory=factory)


def open_models(models: Sequence[str | Path], build: Mapping[str, Any] | None = None) -> OpenedModel:
    """Open models whose prior will be in memory once; the first one is the default, the others are its siblings.

    Args:
        models: paths, addresses in a store or names, at least one.
        build: see OpenedModel.

    Raises:
        UsageError: see open_model; or the models cannot share a prior.
    """
    from components.models import ModelError, load_model  # imports torch

    first, *others = (open_model(model, build) for model in models)
    if not others:
        return first
    opened = (first, *others)
    try:
        check_sharing([load_model(each.folder) for each in opened])
    except ModelError as error:
        raise UsageError(str(error)) from error
    factory = functools.partial(_build_together, [each.source for each in opened], **(build or {}))
    return replace(first, factory=factory, siblings=tuple(others))


def _build_restorer(source: Source, **build: Any) -> Restorer:
    """Build a restorer in a worker, perhaps on another machine."""
    return build_restorer(_folder_here(source), **build)


def _build_together(sources: Sequence[Source], **build: Any) -> Restorer:
    """Build restorers that share a prior in a worker, perhaps on another machine."""
    return build_shared_restorer([_folder_here(source) for source in sources], **build)


def _folder_here(source: Source) -> Path:
    """The folder of a model on this machine, which may not have a model of a store yet."""
    from components.models import load_model

    where, digest = source
    if isinstance(where, Path):
        return on_this_machine(where)
    folder = fetch_model(where)
    if load_model(folder).digest != digest:
        raise Failure(f"{where} was changed while the job ran.")
    return folder


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
    options: Mapping[str, Any],
    check: OptionCheck = dict,
    max_output_pixels: int = MAX_OUTPUT_PIXELS,
    own_scale: float = 1.0,
) -> Ask:
    """Call `parse_ask`; its error becomes a UsageError."""
    try:
        return parse_ask(options, check, max_output_pixels, own_scale)
    except ValueError as error:
        raise UsageError(str(error)) from error
