"""Load helper files of tests by path; tests are not a package, so `import` does not find them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parents[1]


def load_helper(place: str) -> ModuleType:
    """Return a file of tests/ as a module; each test process loads it once.

    Args:
        place: path under tests/, such as "pipelines/_tiny.py".
    """
    path = TESTS / place
    name = f"restoray_tests_{path.stem.strip('_')}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_helper_for_workers(place: str) -> ModuleType:
    """Return `load_helper(place)`, pickled by value so that Ray's workers need not import it."""
    from ray import cloudpickle

    module = load_helper(place)
    cloudpickle.register_pickle_by_value(module)
    return module
