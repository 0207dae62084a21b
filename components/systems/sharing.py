"""Several models whose prior is in memory once, as one restorer that a request's model is picked from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.naming import list_some
from components.systems import SYSTEMS, build_restorer, check_precision
from components.systems.system import Sharing
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer


class SharedRestorers(Restorer):
    """The restorers of several models; `of_model` picks one. By itself it restores with the first model.

    Args:
        restorers: by the digest of the model, at least one.
    """

    def __init__(self, restorers: Mapping[str, Restorer]) -> None:
        self.restorers = dict(restorers)
        self._first = next(iter(self.restorers.values()))

    def of_model(self, digest: str) -> Restorer:
        return self.restorers[digest]

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        return self._first.restore(requests, on_step=on_step, cancelled=cancelled)

    def preview(self, request: Request) -> Image | None:
        return self._first.preview(request)

    def check_prompts_used(self, options: Mapping[str, Any]) -> None:
        self._first.check_prompts_used(options)


def check_sharing(models: Sequence[Any]) -> Sharing:
    """How these models share their prior, checked without their weights.

    Args:
        models: opened model folders (components.models.Model).

    Raises:
        ModelError: they are of several systems, of one whose models share no prior, on several priors, or equal.
    """
    from components.models import ModelError  # imports torch

    names = list_some([f"{model.info['name']} ({model.info['system']})" for model in models])
    systems = {str(model.info["system"]) for model in models}
    system = SYSTEMS.get(next(iter(systems)))
    sharing = system.networks().sharing if system is not None and len(systems) == 1 else None
    if sharing is None:
        able = [name for name, each in SYSTEMS.items() if each.check_options and each.networks().sharing]
        raise ModelError(
            f"{names}: models in one process must be of one system that shares its prior ({', '.join(able)})"
        )
    priors = [sharing.prior_of(model) for model in models]
    for model, (prior, place) in zip(models[1:], priors[1:], strict=True):
        if prior != priors[0][0]:
            raise ModelError(
                f"{model.path}: is on the prior {place}, and {models[0].path} on {priors[0][1]}: models in one process "
                "must share their prior"
            )
    digests = [model.digest for model in models]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            raise ModelError(f"{models[number].path}: equals {models[digests.index(digest)].path}: name a model once")
    return sharing


def build_shared_restorer(models: Sequence[str | Path], **options: Any) -> Restorer:
    """One restorer for several model folders or shipped models; see SharedRestorers. One model's is its own.

    Args:
        models: the first one is the default.
        options: keyword options of build_restorer.

    Raises:
        ModelError: see build_restorer and check_sharing.
    """
    from components.models import load_model  # imports torch

    if len(models) == 1:
        return build_restorer(models[0], **options)
    folders = [load_model(model) for model in models]
    build: Callable[..., Sequence[Restorer]] = check_sharing(folders).build
    for folder in folders:
        check_precision(folder, str(options.get("precision", "fp32")))
    restorers = build(folders, **options)
    return SharedRestorers({folder.digest: each for folder, each in zip(folders, restorers, strict=True)})
