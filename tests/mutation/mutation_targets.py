"""Files that `make mutate` changes, and the tests of each."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

AREAS: dict[str, tuple[str, ...]] = {
    "objectives": (
        "components/objectives/*.py",
        "components/systems/*/objective*.py",
        "components/systems/*/scores.py",
        "components/systems/*/training.py",
        "components/systems/prior/flow.py",
    ),
    "samplers": (
        "components/samplers/*.py",
        "components/systems/*/denoiser.py",
        "components/systems/*/walk.py",
        "components/priors/unet_walk.py",
    ),
    "train step": ("components/training*.py",),
    "degradation": ("components/degradations/**/*.py",),
    "statistics": ("components/statistics*.py", "components/evaluation/*.py"),
    "ordering": ("pipelines/stream/ordering.py",),
}
"""The mathematics, by area: patterns of paths. A pattern may match no file yet."""

TESTED_THROUGH: dict[str, tuple[str, ...]] = {
    "components/degradations/batched/transfer.py": ("tests/components/test_batched_degradations.py",),
    "components/degradations/batched/ops.py": ("tests/components/test_batched_degradations.py",),
    "components/degradations/bsrgan.py": (
        "tests/components/test_degradations.py",
        "tests/components/test_golden_degradation.py",
    ),
    "components/degradations/engine.py": ("tests/components/test_batched_degradations.py",),
    "components/degradations/jpeg.py": (
        "tests/components/test_degradations.py",
        "tests/components/test_batched_degradations.py",
    ),
    "components/degradations/masks.py": ("tests/components/test_batched_degradations.py",),
    "components/degradations/kernels.py": ("tests/components/test_batched_degradations.py",),
    "components/degradations/filters.py": ("tests/components/test_batched_degradations.py",),
    "components/samplers/picture_tiles.py": ("tests/components/test_unetres.py", "tests/components/test_swinir.py"),
    "components/degradations/scratch.py": ("tests/components/test_degradations.py",),
    "components/degradations/simple.py": (
        "tests/components/test_degradations.py",
        "tests/components/test_degradation_operations.py",
    ),
    "components/systems/dra/denoiser.py": (
        "tests/components/test_dra_restorer.py",
        "tests/components/test_dra_tokens.py",
    ),
    "components/priors/unet_walk.py": (
        "tests/components/test_fast_instantir.py",
        "tests/components/test_instantir_modes.py",
    ),
    "components/systems/instantir/walk.py": (
        "tests/components/test_instantir.py",
        "tests/components/test_instantir_modes.py",
    ),
    "components/evaluation/__init__.py": ("tests/components/test_statistics.py",),
    "components/evaluation/downloads.py": ("tests/components/test_metric_weights.py",),
    "components/objectives/score_distillation.py": (
        "tests/components/test_flow_students.py",
        "tests/components/test_whole_batch.py",
        "tests/components/test_instarevive_objective.py",
    ),
    "components/systems/instarevive/objective.py": (
        "tests/components/test_instarevive_objective.py",
        "tests/components/test_whole_batch.py",
        "tests/components/test_instarevive_training.py",
    ),
    "components/systems/instarevive/scores.py": ("tests/components/test_instarevive_training.py",),
    "components/systems/prior/training.py": ("tests/components/test_one_text_priors.py",),
    "components/training.py": ("tests/components/test_whole_batch.py",),
}
"""Tests of files that tests reach through other modules, besides the test files that import the file itself."""

TOO_LONG = {"tests/components/test_degradation_distributions.py"}
"""Test files that take a minute for a few tests over thousands of pictures; a mutant has 20 s."""

MOST = 6
"""Test files of one file. Ours: a module that twenty test files use has its own tests in the first few."""

FOLDERS = ("tests/components", "tests/pipelines")
"""Folders with tests of files; those under tests/end_to_end, cluster and benchmarks are too slow."""


def mutated_files(root: Path) -> dict[str, str]:
    """Return the area of each file with mathematics, by its path under `root`; files of one docstring are left out."""
    files: dict[str, str] = {}
    for area, patterns in AREAS.items():
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if len(ast.parse(path.read_text(encoding="utf-8")).body) > 1:
                    files[path.relative_to(root).as_posix()] = area
    return files


def own_tests(root: Path, file: str) -> list[str]:
    """Return the test files of a file: at most MOST that import it, then those of TESTED_THROUGH.

    Those that share a word of its name come first, then those that import most names.
    """
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    uses = {test: names[module] for test, names in _imports(root).items() if module in names}
    words = set(module.replace("_", ".").split(".")) - {"components", "pipelines"}
    shared = {test: len(words & set(Path(test).stem.split("_"))) for test in uses}
    direct = sorted(uses, key=lambda test: (-shared[test], -uses[test], test))
    return list(dict.fromkeys([*direct[:MOST], *TESTED_THROUGH.get(file, ())]))


@cache
def _imports(root: Path) -> dict[str, dict[str, int]]:
    """Return the modules that each test file imports, with the number of names from each."""
    tests: dict[str, dict[str, int]] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("test_*.py")):
            if path.relative_to(root).as_posix() in TOO_LONG:
                continue
            names: dict[str, int] = {}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names[node.module] = names.get(node.module, 0) + len(node.names)
                    for alias in node.names:
                        names.setdefault(f"{node.module}.{alias.name}", 1)
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        names.setdefault(alias.name, 1)
            tests[path.relative_to(root).as_posix()] = names
    return tests
