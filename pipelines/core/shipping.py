"""The code that travels to a cluster: one zip file with the wheel's content, and nothing else.

Every node then runs the driver's code, whatever is installed there. The nodes need only the dependencies of the lock.
A run's data and weights stay where they are: the zip holds files of the two packages, with the few shipped weights, and
nothing else. The zip of the same files has the same bytes, so a cluster stores it once.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.core.errors import UsageError
from pipelines.core.home import data_folder, package_folder

MAX_CODE_MIB = 200
"""Ours. Ray's own limit is 512 MiB, kept in the memory of the head node for every version of the code."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job, whose environment already holds the code."""

PACKAGES = ("components", "pipelines")
MODULE = "restoray.py"
DATA = ("datasets", "clusters")
LEFT_OUT = ("__pycache__", ".git", ".venv", "_data")
EPOCH = (1980, 1, 1, 0, 0, 0)


def code_environment(folder: Path) -> dict[str, Any]:
    """Ray's runtime environment for the workers of this driver; {} in a submitted job.

    Args:
        folder: the zip is written there; Ray reads it while it connects.
    """
    if JOB_CONFIG in os.environ:
        return {}
    return {"working_dir": str(write_code(folder / "restoray.zip"))}


def write_code(path: Path, more: Mapping[str, Path] | None = None, limit_mib: float = MAX_CODE_MIB) -> Path:
    """Write the packages, and other files, into a zip file.

    Args:
        path: the zip.
        more: further files by their names in the zip.
        limit_mib: most MiB of all files together.

    Raises:
        UsageError: the files are larger, or a further file would replace one of the code.
    """
    files = dict(code_files())
    for name, source in (more or {}).items():
        if name.split("/")[0] in (*PACKAGES, MODULE):
            raise UsageError(f"{source} would replace code of Restoray on the cluster: rename {name.split('/')[0]}.")
        files[name] = source
    sizes = {name: source.stat().st_size for name, source in files.items()}
    if sum(sizes.values()) > limit_mib * 2**20:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise UsageError(
            f"the files for the cluster have {sum(sizes.values()) / 2**20:.0f} MiB, and at most {limit_mib:g} MiB may "
            f"travel ({', '.join(f'{name}: {sizes[name] / 2**20:.0f} MiB' for name in largest)}). Put data and weights "
            "where all nodes can read them."
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, date_time=EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, files[name].read_bytes())
    return path


def code_files() -> Iterator[tuple[str, Path]]:
    """(name in the zip, file) of the packages and the module as the wheel has them."""
    top = package_folder().parent
    yield MODULE, top / MODULE
    for package in PACKAGES:
        for path in files_below(top / package):
            yield f"{package}/{path.relative_to(top / package).as_posix()}", path
    for kind in DATA:
        folder = data_folder(kind)
        for path in files_below(folder):
            yield f"pipelines/_data/{kind}/{path.relative_to(folder).as_posix()}", path


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder, sorted, without caches, version control and hidden files."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part in LEFT_OUT or part.startswith(".") for part in parts):
            yield path
