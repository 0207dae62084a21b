"""`import restoray`: cheap, complete, and honest about a package that hides ours."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import restoray
from components.corpora import CorpusSpec
from components.options import TEXTS
from components.overrides import apply_overrides
from components.recipes import Recipe
from components.restoring import COMMON
from components.systems import SYSTEMS
from pipelines.api.settings import setting_texts
from pipelines.commands.packages import judge_own_packages
from pipelines.core.errors import RestorayError
from pipelines.stream.config import StreamConfig

FUNCTIONS = (
    "load",
    "restore",
    "curate",
    "train",
    "run",
    "degrade",
    "evaluate",
    "serve",
    "dataset",
    "models",
    "recipes",
)


EMPTY = Path(__file__).parent
"""A folder without packages: Python puts the current one first on the path."""


def run_python(code: str, *path: Path, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with these folders on its path, in a folder without code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=EMPTY, capture_output=True, text=True, check=False, timeout=120)


def test_the_import_brings_nothing_along(repository: Path, tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "import restoray; names = set(sys.modules) - before\n"
        "print(sorted(name for name in names if name.partition('.')[0] not in sys.stdlib_module_names), len(names))"
    )
    process = run_python(code, repository)
    assert process.returncode == 0, process.stderr
    own, count = process.stdout.rsplit(" ", 1)
    assert own == "['restoray']"
    assert int(count) < 60  # modules of the standard library: importlib, json, pathlib, warnings
    assert list(tmp_path.iterdir()) == []


def test_every_function_is_there_and_documented() -> None:
    assert set(FUNCTIONS) < set(restoray.__all__)
    assert set(restoray.__all__) < set(dir(restoray))
    for name in FUNCTIONS:
        text = inspect.getdoc(getattr(restoray, name)) or ""
        assert text.count("\n") >= 3 and ("Returns:" in text or name in ("models", "load")), name
        for parameter in inspect.signature(getattr(restoray, name)).parameters:
            assert parameter in text or parameter in ("lq", "hq"), (name, parameter)
    assert issubclass(restoray.UsageError, RestorayError) and issubclass(restoray.SampleError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'restor'"):
        restoray.restor  # noqa: B018
    assert restoray.__version__.count(".") == 2


def test_no_argument_hides_a_setting() -> None:
    """A setting goes through **keywords, so no parameter beside them may have its name."""

    def parameters(name: str) -> set[str]:
        kinds = inspect.signature(getattr(restoray, name)).parameters.values()
        return {each.name for each in kinds if each.kind is not inspect.Parameter.VAR_KEYWORD}

    recipe_fields = {field.name for system in SYSTEMS.values() for field in fields(system.recipe)}
    assert {field.name for field in fields(Recipe)} <= recipe_fields
    assert parameters("train") & recipe_fields == set()
    assert parameters("curate") & {field.name for field in fields(CorpusSpec)} == set()
    stream = {field.name for field in fields(StreamConfig)}
    assert parameters("dataset") & stream == {"degradation", "resolution", "seed", "batch_size"}
    restoring = set(inspect.signature(restoray.load("nano", device="cpu").restore).parameters)
    assert restoring & set(COMMON) == {"prompt"} and "prompt" in TEXTS


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"steps": 50, "optimizer__lr": 1e-4}, ["steps=50", "optimizer.lr=0.0001"]),
        ({"optimizer.lr": 1e-4, "flip": True, "prior": None}, ["optimizer.lr=0.0001", "flip=true", "prior=null"]),
        ({"prompt": "a: #1 [x]", "sources__0__path": Path("a b")}, ["prompt=a: #1 [x]", "sources.0.path=a b"]),
        ({"scale": (0.5, 1), "sources": {"a": Path("x")}}, ["scale=[0.5, 1]", 'sources={"a": "x"}']),
    ],
)  # fmt: skip
def test_settings_become_the_texts_of_the_command_line(settings: dict[str, Any], texts: list[str]) -> None:
    assert setting_texts(settings) == texts


def test_settings_have_the_same_values_as_on_the_command_line() -> None:
    typed = apply_overrides(
        Recipe, {}, ["optimizer.lr=1e-4", "sources={a: 1.5, b: 2}", "prompt={caption}, sharp", "flip=true"]
    )
    settings = {"optimizer__lr": 1e-4, "sources": {"a": 1.5, "b": 2}, "prompt": "{caption}, sharp", "flip": True}
    assert apply_overrides(Recipe, {}, setting_texts(settings)) == typed
    assert apply_overrides(Recipe, {}, setting_texts({"optimizer": {"lr": 1e-4}})).optimizer.lr == 1e-4
    with pytest.raises(restoray.UsageError, match="optimizer must be a text"):
        setting_texts({"optimizer": {"lr": object()}})


def test_the_nearest_name_is_suggested(tmp_path: Path) -> None:
    for call, near in (
        (lambda: restoray.train("swinir-nanno", out=tmp_path / "o"), "swinir-nano"),
        (lambda: restoray.train("swinir-nano", out=tmp_path / "o", optimizer__lrr=1), "lr"),
        (lambda: restoray.curate("flickr2", out=tmp_path / "o"), "flickr2k"),
        (lambda: restoray.run("dem", out=tmp_path / "o"), "demo"),
        (lambda: restoray.recipes("swinir-nanno"), "swinir-nano"),
        (lambda: restoray.degrade(tmp_path, tmp_path / "o", preset="realesrgam"), "realesrgan"),
        (lambda: restoray.restore(tmp_path, out=tmp_path / "o", device="cud"), "cuda"),
    ):
        with pytest.raises(restoray.UsageError, match=f"(?i)did you mean:? [\"']?{near}"):
            call()
    assert not (tmp_path / "o").exists()


def test_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "home" / "weights").mkdir(parents=True)
    (tmp_path / "home" / "weights" / "mine").symlink_to(tiny)
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    entries = {entry.name: entry for entry in restoray.models()}
    assert entries["nano"].kind == "shipped" and entries["nano"].licence == "Apache-2.0"
    assert entries["mine"].kind == "stored" and (entries["mine"].folder / "model.json").is_file()
    assert restoray.load("mine", device="cpu").identity.name == "tiny"
    listing = restoray.recipes()
    assert "demo" in listing["plans"] and "realesrgan" in listing["degradations"]
    assert restoray.recipes("swinir-nano")["system"] == "swinir"


@pytest.mark.parametrize("name", ["components", "pipelines"])
def test_a_foreign_package_before_ours_is_named(name: str, repository: Path, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('foreign code ran')")
    sentence = f"another project's `{name}` ({tmp_path / name}) comes before Restoray's"
    process = run_python("import restoray\nrestoray.load", tmp_path, repository)
    assert process.returncode == 1
    assert f"RuntimeWarning: {sentence}" in process.stderr and f"ImportError: {sentence}" in process.stderr
    script = "import sys; sys.argv = ['restoray', *sys.argv[1:]]; from restoray import main; main()"
    for arguments in (("doctor",), ("doctor", "--json")):
        process = run_python(script, tmp_path, repository, arguments=arguments)
        assert process.returncode == 1 and process.stderr.count("\n") == 1
        assert process.stderr.startswith(f"restoray: {sentence}") and "PYTHONPATH" in process.stderr
    assert json.loads(process.stdout)["exit_code"] == 1
    behind = run_python("import restoray\nprint(restoray.hidden_by() == '')", repository, tmp_path)
    assert behind.stdout == "True\n" and behind.stderr == ""


def test_doctor_names_a_project_that_installs_the_same_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_own_packages({"numpy": ["numpy"]}).status == "ok"
    assert judge_own_packages({"components": ["restoray"], "pipelines": ["restoray"]}).status == "ok"
    finding = judge_own_packages({"components": ["restoray", "kfp-things"], "pipelines": ["restoray"]})
    assert finding.status == "warn" and "kfp-things" in finding.seen and "components" in finding.seen
