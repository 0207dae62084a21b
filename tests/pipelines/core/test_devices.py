"""--device and GPU counts: a device that is not there ends a command at once, with one sentence and code 2."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.corpora import CaptionSpec, CorpusSpec, ModelScore, SourceSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.commands.main import build_app
from pipelines.core import devices
from pipelines.core.devices import check_device, check_gpus
from pipelines.core.errors import UsageError
from pipelines.core.pool import Pool, answers_of
from pipelines.training.recipes import load_checked_recipe


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0, monkeypatch)
    monkeypatch.setattr("pipelines.core.cluster.start_ray", lambda *_: pytest.fail("Ray was started"))


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "local_gpu_count", lambda: count)
    monkeypatch.setattr(devices, "gpu_count", lambda: float(count))


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "Use --device cpu"),
        ("cuda:3", "Use --device cpu"),
        ("cud", 'unknown device "cud". Did you mean "cuda"'),
        ("gpu", 'unknown device "gpu". Did you mean "cuda"'),
        ("CUDA", 'unknown device "CUDA". Did you mean "cuda"'),
        ("CPU", 'Did you mean "cpu"'),
        ("cuda:x", 'Did you mean "cuda"'),
        ("cuda:-1", 'Did you mean "cuda"'),
        ("cpu:0", 'Did you mean "cpu"'),
        ("", "Known: cpu, cuda"),
        ("mps", "Apple's accelerators are not supported"),
        ("xpu:0", "Intel's accelerators are not supported"),
    ],
)
def test_a_device_that_is_not_there(device: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_device(device)


def test_numbers_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2, monkeypatch)
    check_device("cpu")
    check_device("cuda")
    check_device("cuda:1", one_of=False)
    with pytest.raises(UsageError, match="this machine has 2 GPUs, cuda:0 to 1"):
        check_device("cuda:3")
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1 and --device cuda"):
        check_device("cuda:1")  # Ray hands out the GPU


def test_every_setting_with_gpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpus({"num_gpus": 0, "workers": 9})
    with pytest.raises(UsageError, match=r"^num_gpus=0\.5 needs 0\.5 GPU, and .*0 uses the CPU"):
        check_gpus(CaptionSpec(model="blip", num_gpus=0.5))
    spec = CorpusSpec(name="x", sources=[SourceSpec(kind="folder", path="p")])
    spec.filters.models = [ModelScore(name="a", kind="pyiqa", model="niqe", num_gpus=1)]
    with pytest.raises(UsageError, match=r"^filters\.models\.0\.num_gpus=1 needs 1 GPU, and "):
        check_gpus(spec)
    recipe = load_checked_recipe("instantir-dcp-nano", ["placement.gpus_per_worker=1", "placement.workers=2"])
    with pytest.raises(UsageError, match=r"^placement\.gpus_per_worker=1 on 2 workers needs 2 GPUs, and "):
        check_gpus(recipe)
    gpus(1, monkeypatch)
    with pytest.raises(UsageError, match=r"needs 2 GPUs, and there is 1: lower it"):
        check_gpus(recipe)
    check_gpus(CaptionSpec(model="blip", num_gpus=1, workers=8))  # eight workers may take turns
    gpus(2, monkeypatch)
    check_gpus(recipe)


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf])
def test_a_share_that_is_no_number_of_gpus_or_cpus_is_named(number: float) -> None:
    """Ray would wait for NaN GPUs, or fail after its start."""
    with pytest.raises(UsageError, match="num_gpus must be a number of at least 0, got"):
        check_gpus(CaptionSpec(model="blip", num_gpus=number))
    for field in ("num_cpus", "num_gpus"):
        with pytest.raises(UsageError, match="numbers of at least"):
            Pool(**{field: number})
    for field in ("cpus_per_worker", "gpus_per_worker", "cpus_per_captioner", "gpus_per_captioner"):
        with pytest.raises(UsageError, match=rf"placement needs workers|placement.{field} must be a number, got nan"):
            load_checked_recipe("instantir-dcp-nano", [f"placement.{field}={number}"])
    with pytest.raises(UsageError, match="placement needs workers"):
        load_checked_recipe("instantir-dcp-nano", ["placement.workers=0"])


def test_a_pool_does_not_wait_for_a_gpu() -> None:
    with pytest.raises(UsageError, match="num_gpus=1 needs 1 GPU"):
        list(answers_of(lambda: list, [1], Pool(num_gpus=1)))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_png(dead_leaves(96, 1, 0)))
    return tmp_path / "in"


@pytest.mark.parametrize(
    "words",
    [
        ["restore", "{in}", "--model", "m", "--out", "{out}", "--device", "cuda"],
        ["serve", "--model", "m", "--device", "cuda"],
        ["serve", "--model", "m", "--device", "cuda:3"],
        ["analyze", "seeds", "--model", "m", "--images", "{in}", "--out", "{out}", "--device", "cuda"],
        ["analyze", "previews", "--model", "m", "--images", "{in}", "--out", "{out}", "--device", "cuda:1"],
        ["analyze", "accuracy", "--images", "{in}", "--out", "{out}", "--device", "cuda"],
        ["curate", "folder", "sources.0.path={in}", "--out", "{out}", "caption.model=blip", "caption.num_gpus=1"],
        ["run", "demo", "--out", "{out}", "dcp.placement.gpus_per_worker=1"],
    ],
)
def test_every_command_ends_before_ray_starts(words: list[str], pictures: Path, tmp_path: Path) -> None:
    places = {"in": str(pictures), "out": str(tmp_path / "out")}
    result: Any = CliRunner().invoke(build_app(), [word.format(**places) for word in words])
    assert isinstance(result.exception, UsageError), (result.output, result.exception)
    assert "GPU" in str(result.exception) or "built for the CPU" in str(result.exception)
    assert not (tmp_path / "out").exists() and result.exception.exit_code == 2


def test_help_imports_no_torch(repository: Path) -> None:
    code = (
        "import sys; from pipelines.commands.main import build_app; import typer.testing as t;"
        "r = t.CliRunner().invoke(build_app(), ['restore', '--help']); assert '--device' in r.output;"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository, env=environment, timeout=120)
