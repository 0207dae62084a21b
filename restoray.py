"""Restoray in Python. docs/python.md shows each function at work.

    load(model)                 a model in this process; its `restore` takes pictures and gives pictures back
    restore, degrade, evaluate  jobs on folders of pictures, as the commands of these names do them
    curate, train, run          corpora, trainings, plans
    serve                       a running HTTP service
    dataset                     the training stream as a webdataset pipeline
    models, recipes             what there is

The command line calls the same functions. An import of this module is cheap: torch, Ray and MLflow are imported when a
function needs them. Work that needs Ray uses the Ray of the process if it has one, after `ray.init()` for example;
otherwise it joins the cluster at RAY_ADDRESS, or starts a Ray that ends with the call.

Errors: UsageError for a wrong argument (the message has the nearest name), SampleError for a picture that cannot be
used, Failure for work that failed, RetryLater if another job has the folder, Unfinished if the minutes are over,
GateFailed for a student that is worse than its teacher. All but SampleError are a RestorayError.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.types import SampleError as SampleError
    from pipelines.api.corpora import curate as curate
    from pipelines.api.datasets import dataset as dataset
    from pipelines.api.measuring import degrade as degrade
    from pipelines.api.measuring import evaluate as evaluate
    from pipelines.api.models import models as models
    from pipelines.api.pictures import load as load
    from pipelines.api.plans import run as run
    from pipelines.api.restoration import restore as restore
    from pipelines.api.restoration import serve as serve
    from pipelines.api.training import recipes as recipes
    from pipelines.api.training import train as train
    from pipelines.core.errors import Failure as Failure
    from pipelines.core.errors import GateFailed as GateFailed
    from pipelines.core.errors import RestorayError as RestorayError
    from pipelines.core.errors import RetryLater as RetryLater
    from pipelines.core.errors import Unfinished as Unfinished
    from pipelines.core.errors import UsageError as UsageError

MODULES = {
    "load": "pipelines.api.pictures",
    "restore": "pipelines.api.restoration",
    "curate": "pipelines.api.corpora",
    "train": "pipelines.api.training",
    "run": "pipelines.api.plans",
    "degrade": "pipelines.api.measuring",
    "evaluate": "pipelines.api.measuring",
    "serve": "pipelines.api.restoration",
    "dataset": "pipelines.api.datasets",
    "models": "pipelines.api.models",
    "recipes": "pipelines.api.training",
    "RestorayError": "pipelines.core.errors",
    "UsageError": "pipelines.core.errors",
    "Failure": "pipelines.core.errors",
    "RetryLater": "pipelines.core.errors",
    "Unfinished": "pipelines.core.errors",
    "GateFailed": "pipelines.core.errors",
    "SampleError": "components.types",
}
"""Where the public names are defined; `__getattr__` imports them at their first use."""

PACKAGES = ("components", "pipelines")

__all__ = list(MODULES)


def hidden_by() -> str:
    """One sentence if another project's package has the name of one of ours and comes first on sys.path; else ""."""
    folder = Path(__file__).resolve().parent
    for name in PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # a module without a spec
            spec = None
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
        first = Path(str(places[0])).resolve() if places else None
        if first != folder / name:
            return (
                f"another project's `{name}` ({first or 'no file'}) comes before Restoray's ({folder / name}) on "
                "Python's path: uninstall it, or take its folder out of PYTHONPATH."
            )
    return ""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use; raises ImportError with the sentence of `hidden_by`."""
    if name == "__version__":
        from importlib.metadata import version

        return version("restoray")
    if name not in MODULES:
        raise AttributeError(f"module 'restoray' has no attribute {name!r}")
    if problem := hidden_by():
        raise ImportError(problem)
    value = getattr(importlib.import_module(MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})


def main() -> None:
    """The entry point of the script `restoray`."""
    if problem := hidden_by():
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"error": problem, "exit_code": 1}) + "\n")
        sys.stderr.write(f"restoray: {problem}\n")
        sys.exit(1)
    importlib.import_module("pipelines.commands.main").main()


_is_script = Path(sys.argv[0] if sys.argv else "").name in ("restoray", "restoray.exe")
if not _is_script and (_problem := hidden_by()):  # the script says it in `main`
    warnings.warn(_problem, RuntimeWarning, stacklevel=2)

if __name__ == "__main__":  # python -m restoray
    main()
