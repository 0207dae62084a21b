"""The checks of `restoray doctor` on Python packages: every package that a command imports can be imported.

Standard library only: these checks run first, and also where a package is missing or broken.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions, packages_distributions

from pipelines.commands.findings import Finding, fail, ok, warn

IMPORTS: Mapping[str, tuple[str, str]] = {
    "PIL.Image": ("pillow", ""),
    "cv2": ("opencv-python-headless", ""),
    "diffusers": ("diffusers", "UNet2DConditionModel"),
    "fastapi": ("fastapi", ""),
    "fsspec": ("fsspec", ""),
    "huggingface_hub": ("huggingface_hub", "snapshot_download"),
    "jinja2": ("jinja2", ""),
    "markupsafe": ("markupsafe", ""),
    "matplotlib": ("matplotlib", ""),
    "mlflow": ("mlflow", ""),
    "numpy": ("numpy", ""),
    "omegaconf": ("omegaconf", ""),
    "packaging.requirements": ("packaging", ""),
    "peft": ("peft", "LoraConfig"),
    "psutil": ("psutil", ""),
    "pyarrow.parquet": ("pyarrow", ""),
    "python_multipart": ("python-multipart", ""),
    "ray.data": ("ray", ""),
    "ray.serve": ("ray", ""),
    "ray.train.torch": ("ray", ""),
    "rich.progress": ("rich", ""),
    "safetensors.torch": ("safetensors", ""),
    "scipy.ndimage": ("scipy", ""),
    "simplejpeg": ("simplejpeg", ""),
    "skimage": ("scikit-image", ""),
    "spandrel": ("spandrel", ""),
    "starlette": ("starlette", ""),
    "tokenizers": ("tokenizers", ""),
    "torch": ("torch", ""),
    "torchvision": ("torchvision", ""),
    "transformers": ("transformers", "CLIPTextModel"),
    "typer": ("typer", ""),
    "urllib3": ("urllib3", ""),
    "webdataset": ("webdataset", ""),
    "yaml": ("pyyaml", ""),
}
"""Modules that commands import: (distribution, a class that the package loads late, or "")."""

OPTIONAL = "pyiqa"
OWN_PACKAGES = ("components", "pipelines", "restoray")

CV2_BUILDS = (
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
    "opencv-python",
    "opencv-python-headless",
)
"""Distributions that write into the folder cv2. We require the last one; the others may need libGL."""

CV2_REMEDY = (
    "Run `make setup`, or `pip uninstall -y {names}` and then `pip install 'opencv-python-headless>=5,<6'`. "
    "README.md says how to install without the second build."
)


def check_packages() -> list[Finding]:
    """Import every package that a command imports, and look at the builds of cv2."""
    builds = cv2_builds()
    problems = {name: problem for name in IMPORTS if (problem := import_problem(name))}
    findings = [judge_cv2(builds, problems.pop("cv2", ""))]
    if problems:
        findings += [judge_import(name, problem) for name, problem in problems.items()]
    else:
        findings.append(ok("imports", f"{len(IMPORTS)} modules that the commands import"))
    return [*findings, judge_own_packages(packages_distributions()), judge_optional()]


def import_problem(name: str, load: Callable[[str], object] = importlib.import_module) -> str:
    """Why a module of IMPORTS cannot be imported, as one line; "" if it can."""
    try:
        module = load(name)
        if attribute := IMPORTS.get(name, ("", ""))[1]:
            getattr(module, attribute)
    except Exception as error:  # noqa: BLE001 a broken binary raises anything
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return ""


def judge_import(name: str, problem: str) -> Finding:
    """The finding on a module that cannot be imported."""
    distribution = IMPORTS[name][0]
    advice = f"Run `make setup`, or reinstall it: pip install --force-reinstall --no-deps {distribution}."
    return fail("imports", f"{name} ({distribution}): {problem}", advice)


def cv2_builds() -> list[str]:
    """The installed distributions that write into the folder cv2."""
    names = {str(each.metadata["Name"]).lower().replace("_", "-") for each in distributions()}
    return sorted(names & set(CV2_BUILDS))


def judge_cv2(builds: Sequence[str], problem: str) -> Finding:
    """Judge the builds of cv2; two in one place overwrite each other's files.

    Args:
        builds: the installed distributions.
        problem: why cv2 cannot be imported; "" if it can.
    """
    remedy = CV2_REMEDY.format(names=" ".join(builds) or "opencv-python-headless")
    seen = " and ".join(builds) or "no build is installed"
    if problem:
        return fail("cv2", f"{seen}: {problem}", remedy)
    if len(builds) > 1:
        return warn("cv2", f"{seen} share one folder; what was installed last is used, and may need libGL", remedy)
    return ok("cv2", seen)


def judge_own_packages(owners: Mapping[str, Sequence[str]]) -> Finding:
    """The finding on other projects with packages of our names. One earlier on the path stops `restoray` at its start.

    Args:
        owners: the installed distributions by the packages that they bring.
    """
    others = {name: [each for each in owners.get(name, ()) if each != "restoray"] for name in OWN_PACKAGES}
    seen = "; ".join(f"{' and '.join(who)} installs a package `{name}` too" for name, who in others.items() if who)
    if seen:
        advice = "Uninstall it, or give Restoray an environment of its own: one of two such packages hides the other."
        return warn("own packages", seen, advice)
    return ok("own packages", f"no other project installs {' or '.join(OWN_PACKAGES)}")


def judge_optional() -> Finding:
    """The finding on pyiqa, which may be absent."""
    if importlib.util.find_spec(OPTIONAL) is None:
        return ok(OPTIONAL, "not installed; PSNR, SSIM, GMSD, ST-LPIPS and our own scores work without it")
    if problem := import_problem(OPTIONAL):
        return fail(OPTIONAL, problem, "Run `make setup`, or uninstall it: only metrics need it.")
    return ok(OPTIONAL, "installed; its licence is non-commercial, and every command works without it")
