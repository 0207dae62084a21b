"""The files of clusters/: every manifest is valid by KubeRay's own schema, and every name in it exists."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from typer.main import get_command

from components.places import find_model_folder
from pipelines.commands.main import build_app
from pipelines.core.placement import read_needs
from pipelines.corpus.catalogue import load_spec
from pipelines.training.recipes import load_checked_recipe

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "clusters"
MANIFESTS = sorted(path.name for path in FOLDER.glob("ray-*.yaml"))
LOCK = dict(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def manifest(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((FOLDER / name).read_text())
    return dict(document)


def strict(schema: Any) -> Any:
    """A schema that refuses unknown keys wherever it lists the known ones."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.fixture(scope="module")
def schemas(kuberay_dir: Path) -> dict[str, Any]:
    """Strict schemas by kind. The apiserver's own fields, which the resources only declare, are open."""
    by_kind = {}
    for path in kuberay_dir.glob("*.json"):
        document = json.loads(path.read_text())
        closed = strict(document["schema"])
        closed["properties"]["metadata"] = {"type": "object"}
        by_kind[document["kind"]] = closed
    return by_kind


def problems(document: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schemas[document["kind"]])
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_valid(name: str, schemas: dict[str, Any]) -> None:
    assert problems(manifest(name), schemas) == []


def places(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a document, at any depth."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from places(part)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return dict(spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"])


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(document)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize(
    "key", ["rayVersion", "image", "mountPath", "minReplicas", "mode", "runAsNonRoot", "entrypoint"]
)
def test_a_typo_fails(key: str, schemas: dict[str, Any]) -> None:
    document = copy.deepcopy(manifest("ray-job.train.yaml"))
    place = next(place for place in places(document) if key in place)
    place[f"{key}s"] = place.pop(key)
    assert any(f"'{key}s'" in problem for problem in problems(document, schemas))


def test_all_kinds_of_work_have_a_manifest() -> None:
    assert MANIFESTS == ["ray-cluster.yaml", "ray-job.curate.yaml", "ray-job.restore.yaml", "ray-job.train.yaml"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_cluster_is_closed_and_fits_its_image(name: str) -> None:
    """Token mode, no ingress, no root; Ray's version is that of the lock, and the image one that Dockerfile builds."""
    document = manifest(name)
    cluster = cluster_of(document)
    assert cluster["rayVersion"] == LOCK["ray"]
    assert cluster["authOptions"] == {"mode": "token"} and cluster["networkPolicy"]["mode"] == "DenyAllIngress"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    for pod in pods(document):
        (container,) = pod["containers"]
        image, _, tag = container["image"].partition(":")
        version, _, target = tag.partition("-")
        assert (image, version) == ("restoray", PROJECT["version"]) and target in stages
        assert container["resources"]["requests"] == container["resources"]["limits"]
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert gpu == bool(pod.get("tolerations")) and (target == "cuda" or not gpu)
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def command_words(name: str) -> list[str]:
    return shlex.split(manifest(name)["spec"]["entrypoint"])


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a command line; raises for an unknown verb or option."""
    program, verb, *rest = words
    assert program == "restoray"
    root: Any = get_command(build_app()) if isinstance(build_app(), typer.Typer) else None
    command = root.commands[verb]
    return dict(command.make_context(verb, rest).params)


def test_the_commands_of_jobs_exist_and_their_needs_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes, specs, models, options and labels; and every group has the GPUs that the command asks for."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    train, restore = parsed(command_words("ray-job.train.yaml")), parsed(command_words("ray-job.restore.yaml"))
    curate = parsed(command_words("ray-job.curate.yaml"))
    recipe = load_checked_recipe(train["recipe"], train["overrides"])
    spec = load_spec(curate["spec"], curate["overrides"])
    assert all(find_model_folder(model) is not None for model in restore["models"])
    needs = read_needs(restore["placement"])
    groups = {
        name: {g["groupName"]: g for g in cluster_of(manifest(f"ray-job.{name}.yaml"))["workerGroupSpecs"]}
        for name in ("train", "restore", "curate")
    }
    group = groups["train"][recipe.placement.labels["group"]]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["maxReplicas"] >= recipe.placement.workers
    assert recipe.placement.gpus_per_worker == limits["nvidia.com/gpu"] == 1
    assert recipe.placement.cpus_per_worker < int(limits["cpu"])  # the data tasks need the rest
    assert groups["restore"][needs.labels["group"]]["maxReplicas"] >= (needs.workers or 0) and needs.gpus == 1
    assert spec.placement["labels"]["group"] in groups["curate"]
    for name in groups:
        assert all(group["labels"] == {"group": key} for key, group in groups[name].items())


# --- Dockerfile and Slurm ---------------------------------------------------------------------------------------------


def test_the_dockerfile_takes_the_lock_and_no_root() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert "uv pip sync --no-cache --require-hashes requirements.lock" in text
    (uv,) = re.findall(r"UV_VERSION := (\S+)", (ROOT / "Makefile").read_text())
    assert f"uv=={uv}" in text
    (builder,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert builder.partition(">")[0] not in LOCK  # so the build takes it from the other lock
    assert "--build-constraints requirements-dev.lock" in text
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split()), source
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    names = [name for _, name in stages]
    assert len(stages) == text.count("FROM ") and all(base in names or ":" in base for base, _ in stages)
    assert "latest" not in text and {"cpu", "cuda"} < set(names)
    for target in ("cpu", "cuda"):
        body = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert body.rstrip().splitlines()[-1] == "USER 1000"
    pins = {name: LOCK[name] for name in ("torch", "torchvision")}
    assert dict(re.findall(r"(torch\w*)==([\d.]+)", text)) == pins
    assert set(re.findall(r"restoray:([\d.]+)-", text)) == {PROJECT["version"]}


def test_the_slurm_script_is_a_script_and_names_options_of_ray() -> None:
    path = FOLDER / "ray.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    options = set(re.findall(r'"(--[a-z-]+)"', (Path(spec.origin).parent / "scripts" / "scripts.py").read_text()))
    lines = re.findall(r"^ +ray start (.+?)(?: &)?$", text, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert set(re.findall(r"--[a-z-]+", line)) <= options, line
    assert "RAY_AUTH_MODE=token" in text and "umask 077" in text


def test_the_shipped_files_are_of_four_kinds() -> None:
    names = [path.name for path in FOLDER.iterdir()]
    assert [name for name in names if not (name.endswith((".yaml", ".sbatch")) or name == "Dockerfile")] == []
