"""The doctor's checks of packages, commands without a working package, and the list of licences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest

from pipelines.commands import packages
from pipelines.commands.licences import (
    KINDS,
    demo_licences,
    licence_lines,
    licence_of_package,
    list_terms,
    required_packages,
)
from pipelines.commands.packages import check_packages, cv2_builds, import_problem, judge_cv2, judge_import
from pipelines.core import environment


def test_two_builds_of_cv2_are_a_warning_and_a_broken_one_fails() -> None:
    both = ["opencv-python", "opencv-python-headless"]
    assert judge_cv2(both[1:], "").status == "ok"
    warning = judge_cv2(both, "")
    assert warning.status == "warn" and all(name in warning.seen for name in both)
    assert "pip uninstall -y opencv-python opencv-python-headless" in warning.advice
    broken = judge_cv2(both, "ImportError: libGL.so.1: cannot open shared object file")
    assert broken.status == "fail" and "libGL" in broken.seen and "opencv-python-headless" in broken.advice
    assert judge_cv2([], "ModuleNotFoundError: No module named 'cv2'").status == "fail"


def test_builds_of_cv2_are_read_from_the_installed_distributions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("opencv_python", "opencv_contrib_python", "numpy"):
        folder = tmp_path / f"{name}-5.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 5.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cv2_builds() == ["opencv-contrib-python", "opencv-python"]


def test_a_module_that_cannot_be_imported_is_named_with_its_package() -> None:
    def load(name: str) -> object:
        raise OSError("libx.so: cannot open\nmore lines")

    problem = import_problem("skimage", load)
    assert problem == "OSError: libx.so: cannot open"
    finding = judge_import("skimage", problem)
    assert finding.status == "fail" and "skimage (scikit-image)" in finding.seen and "scikit-image" in finding.advice
    assert import_problem("diffusers", lambda name: object()).startswith("AttributeError")  # the late class is tried
    assert import_problem("yaml") == ""


def test_all_problems_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = {"cv2": "ImportError: a", "yaml": "ImportError: b"}
    monkeypatch.setattr(packages, "import_problem", lambda name: problems.get(name, ""))
    assert {(one.check, one.status) for one in check_packages()} == {
        ("cv2", "fail"), ("imports", "fail"), ("own packages", "ok"), ("pyiqa", "ok")
    }  # fmt: skip
    problems.clear()
    assert ("imports", "ok") in {(one.check, one.status) for one in check_packages()}
    problems["pyiqa"] = "ImportError: c"
    assert ("pyiqa", "fail") in {(one.check, one.status) for one in check_packages()}
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    assert [one.status for one in check_packages() if "not installed" in one.seen and one.check == "pyiqa"] == ["ok"]


@pytest.fixture(scope="module")
def without_libgl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which cv2 fails as opencv-python does without libGL."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "cv2").mkdir()
    text = "libGL.so.1: cannot open shared object file: No such file or directory"
    (folder / "cv2" / "__init__.py").write_text(f"raise ImportError({text!r}, name='cv2')\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def restoray(repository: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.commands.main", *arguments]
    return subprocess.run(
        command, cwd=repository, env=environ, capture_output=True, text=True, timeout=280, check=False
    )


def test_a_command_without_cv2_ends_with_one_sentence(repository: Path, without_libgl: dict[str, str]) -> None:
    process = restoray(repository, without_libgl, "datasets")
    assert process.returncode == 1 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("restoray: the Python package cv2 cannot be imported: libGL.so.1")
    assert line.endswith("`restoray doctor` names the remedy.")


def test_the_doctor_itself_works_without_cv2(repository: Path, without_libgl: dict[str, str]) -> None:
    code = (
        "import sys\n"
        "from pipelines.commands import main, packages\n"
        "packages.IMPORTS = {'cv2': packages.IMPORTS['cv2']}  # the others take many seconds\n"
        "sys.modules['pyiqa'] = None\n"
        "sys.argv = ['restoray', 'doctor', '--json']\n"
        "main.main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env=without_libgl,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    document = json.loads(process.stdout)
    assert process.returncode == 1 and document["ok"] is False
    findings = {each["check"]: each for each in document["findings"]}
    assert set(findings) == {"cv2", "imports", "own packages", "pyiqa", "machine"}
    assert findings["cv2"]["status"] == "fail" and "libGL" in findings["cv2"]["seen"]
    assert "opencv-python-headless" in findings["cv2"]["advice"]
    assert findings["machine"]["status"] == "fail" and "libGL" in findings["machine"]["seen"]


# --- licences ---------------------------------------------------------------------------------------------------------


def distribution(folder: Path, name: str, lines: str) -> Distribution:
    place = folder / f"{name}-1.0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{lines}\n")
    return Distribution.at(place)


def test_a_licence_is_the_expression_then_the_short_field_then_the_classifiers(tmp_path: Path) -> None:
    classifier = "Classifier: License :: OSI Approved :: MIT License"
    long = "License: " + "The text of a licence. " * 9
    cases = {
        "a": (f"License-Expression: BSD-2-Clause\nLicense: MIT\n{classifier}", "BSD-2-Clause"),
        "b": (f"License: Apache 2.0\n{classifier}", "Apache 2.0"),
        "c": (
            f"{long}\n{classifier}\nClassifier: License :: OSI Approved :: BSD License",
            "MIT License and BSD License",
        ),
        "d": ("Summary: nothing", "unstated"),
        "huey": ("License: other", "MIT"),
    }
    for name, (lines, expected) in cases.items():
        assert licence_of_package(name, distribution(tmp_path, name, lines)) == expected


def test_required_packages_follow_extras_and_markers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs = "Requires-Dist: {}".format
    distribution(tmp_path, "top", "\n".join(map(needs, ["mid[extra]>=1", 'never; sys_platform == "none"', "absent"])))
    distribution(tmp_path, "mid", "\n".join(map(needs, ['deep; extra == "extra"', 'other; extra == "more"', "top"])))
    for name in ("deep", "other", "never"):
        distribution(tmp_path, name, "")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert set(required_packages("top")) == {"top", "mid", "deep"}
    with pytest.raises(PackageNotFoundError):
        required_packages("absent")


def test_the_terms_of_everything_are_listed() -> None:
    terms = list_terms()
    by_name = {each.name: each for each in terms}
    assert {each.kind for each in terms} == set(KINDS)
    assert "restoray" not in by_name and "torch" in by_name and "pyarrow" in by_name
    assert by_name["pyiqa"].limits_use and "Noncommercial" in by_name["pyiqa"].licence
    assert by_name["ffhq"].limits_use and not by_name["dead-leaves"].limits_use
    assert by_name["model nano"].licence.startswith("Apache-2.0") and not by_name["model nano"].limits_use
    assert by_name["weights of supir"].limits_use
    lines = licence_lines(terms)
    assert sum(line.startswith("* pyiqa ") for line in lines) == 1
    assert len(lines) == 1 + 2 * len(KINDS) + len(terms)


def test_pictures_of_the_demo_are_counted_by_licence(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("file,licence\na,CC0-1.0\nb,CC-BY-2.0\nc,CC0-1.0\n")
    assert demo_licences(tmp_path / "c.csv") == {"CC0-1.0": 2, "CC-BY-2.0": 1}


def test_licences_as_json(repository: Path) -> None:
    process = restoray(repository, dict(os.environ), "doctor", "--licences", "--json")
    assert process.returncode == 0
    rows = json.loads(process.stdout)["terms"]
    assert {"kind", "name", "version", "licence", "limits_use"} == set(rows[0])
    both = restoray(repository, dict(os.environ), "doctor", "--licences", "--model", "nano")
    assert both.returncode == 2 and "give one of them" in both.stderr


def test_cores_without_the_call_of_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert environment.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert environment.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert environment.cores() == 1
