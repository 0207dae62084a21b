"""Verbs on a Ray of three nodes with working folders and homes of their own: the bytes are those of a local run.

Each verb runs as a command, once by --address or RAY_ADDRESS, and one as a submitted job. The results lie in a folder
that all nodes can write; bit equality holds for equal numbers of ranks and threads.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.images import encode_png
from components.synthetic import dead_leaves
from components.systems.recipes import load_recipe
from pipelines.corpus.catalogue import load_spec
from pipelines.curation.curate import curate
from pipelines.restoration.batch import restore_folder
from pipelines.restoration.models import open_model
from pipelines.service.client import check_service
from pipelines.training.inputs import TrainInputs
from pipelines.training.stage_files import read_order
from pipelines.training.train import train

spec = importlib.util.spec_from_file_location("_running", Path(__file__).with_name("_running.py"))
assert spec and spec.loader
running: Any = importlib.util.module_from_spec(spec)
sys.modules["_running"] = running
spec.loader.exec_module(running)
contents = running.contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

TINY = [
    "resolution=32",
    "short_side=48",
    "batch_size=4",
    "checkpoint_every=2",
    "heldout_triples=4",
    "steps_at_restore=1",
    "resampler_dim=16",
    "resampler_depth=1",
    "resampler_head_dim=8",
    "resampler_heads=2",
    "resampler_queries=4",
    "placement.workers=2",
    "placement.threads=1",
]
RECIPE = "instantir-dcp-nano"
ON_TWO_NODES = ["placement.cpus_per_worker=1.5", "placement.labels.group=worker"]
"""A node of the workers has two CPUs, so each rank has a node of its own."""


SMALL = ["filters.preset=none", "filters.min_side_px=32"]
"""The pictures have 64 pixels a side."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head and two workers, two CPUs each."""
    with running.running_nodes(tmp_path_factory.mktemp("three") / "nodes", 2, 2, 2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(12):
        (folder / f"leaves{index}.png").write_bytes(encode_png(dead_leaves(64, 5, index)))
    return folder


@pytest.fixture(scope="module")
def corpus(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of a local run."""
    out = tmp_path_factory.mktemp("local") / "corpus"
    curate(load_spec("folder", SMALL), out, images=pictures)
    return out


def corpus_files(folder: Path) -> dict[str, str]:
    files: dict[str, str] = contents(folder, "*.jsonl", "*.arrow", "index.json", "*/*.tar")
    return {name: digest for name, digest in files.items() if name != "shards.jsonl"}  # a log, in order of arrival


@pytest.fixture(scope="module")
def restored(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures restored by a local run, in `out`, and their sources in `in`."""
    folder = tmp_path_factory.mktemp("restored")
    (folder / "in").mkdir()
    for index in range(3):
        name = f"leaves{index}.png"
        (folder / "in" / name).write_bytes((pictures / name).read_bytes())
    restore_folder(open_model("nano"), folder / "in", folder / "out")
    return folder


def test_a_restoration_by_address_and_as_a_job(nodes: Any, restored: Path, tmp_path: Path) -> None:
    expected = contents(restored / "out", "*.png")
    assert len(expected) == 3
    (nodes.folder / "in").symlink_to(restored / "in")  # a relative path: no node has it
    words = ["restore", "in", "-o", "by-address", "--placement", "workers=2", "--placement", "labels.group=worker"]
    nodes.run(*words, "--address", nodes.address)
    assert contents(nodes.folder / "by-address", "*.png") == expected
    out = tmp_path / "by-job"
    job = nodes.run("submit", "--address", nodes.jobs, "--", "restore", str(restored / "in"), "-o", str(out))
    assert "3 restored" in job.stdout and "ended with exit code 0" in job.stdout
    assert contents(out, "*.png") == expected
    assert running.secrets_in(nodes.folder, [running.TOKEN]) == running.secrets_in(out, [running.TOKEN]) == []
    refused = nodes.run(
        "restore", "in", "-o", "x", "--placement", "cpus=3", expected=2, RAY_AUTH_TOKEN=running.TOKEN,
        RAY_ADDRESS=nodes.address,
    )  # fmt: skip
    assert "a worker needs 3 CPU, and no node has that. Ray has 3 nodes:" in refused.stderr
    assert refused.stderr.count("2 CPUs") == 3 and "group=worker" in refused.stderr


@pytest.mark.full
def test_a_curation_and_a_training_on_two_nodes(nodes: Any, pictures: Path, corpus: Path, tmp_path: Path) -> None:
    nodes.run("curate", "folder", *SMALL, "--images", str(pictures), "-o", "corpus", "--address", nodes.address)
    assert corpus_files(nodes.folder / "corpus") == corpus_files(corpus)
    short = [*TINY, "steps=2", "evaluate_every=2"]
    recipe = load_recipe(RECIPE, [*short, "placement.cpus_per_worker=0.5"])
    train(recipe, TrainInputs(corpora={"corpus": corpus}), tmp_path / "local")
    words = ["train", RECIPE, *short, *ON_TWO_NODES, "-i", "corpus=corpus", "-o", "trained", "--address", nodes.address]
    nodes.run(*words)
    for pattern in ("model/**/*.safetensors", "samples/*.png"):
        ours = contents(nodes.folder / "trained", pattern)
        assert ours and ours == contents(tmp_path / "local", pattern), pattern
    assert read_order(nodes.folder / "trained") == read_order(tmp_path / "local")  # ranks write as they arrive


PLAN = """
title: A small plan
free_mib: 10
stages:
  - {name: corpus, verb: curate, spec: folder, pictures: PICTURES, overrides: SMALL}
  - name: dcp
    verb: train
    recipe: instantir-dcp-nano
    overrides: OVERRIDES
    needs: [corpus]
"""


@pytest.mark.full
def test_a_plan_by_address(nodes: Any, pictures: Path, tmp_path: Path) -> None:
    from pipelines.runs.engine import RunOptions, run_plan

    overrides = [*TINY, "steps=2", "evaluate_every=2", "placement.cpus_per_worker=0.5"]
    plan = tmp_path / "small.yaml"
    plan.write_text(
        PLAN.replace("PICTURES", str(pictures))
        .replace("OVERRIDES", json.dumps(overrides))
        .replace("SMALL", json.dumps(SMALL))
    )
    local = run_plan(plan, tmp_path / "local", options=RunOptions(track=False))
    nodes.run("run", str(plan), "-o", "plan", "--address", nodes.address)
    names = [record.stage.folder for record in local.stages]
    for pattern in (f"{names[0]}/*/*.tar", f"{names[1]}/model/**/*.safetensors"):
        ours = contents(nodes.folder / "plan", pattern)
        assert ours and ours == contents(tmp_path / "local", pattern), pattern
    assert running.secrets_in(nodes.folder / "plan", [running.TOKEN]) == []  # also not in MLflow's store


@pytest.mark.full
def test_a_service_by_address(nodes: Any, restored: Path) -> None:
    service = nodes.start("serve", "--port", "0", "--address", nodes.address)
    try:
        assert service.stdout is not None
        url = service.stdout.readline().partition("ready: ")[2].strip()
        assert url, service.communicate()[1][-3000:]
        check_service(url, restored / "in" / "leaves1.png", restored / "out" / "leaves1.png", timeout_s=600)
    finally:
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=120)


@pytest.mark.full
def test_a_node_dies_during_a_training_and_a_rerun_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """kill -9 of everything on a node after the first checkpoint: the training goes on, or the same command does."""
    overrides = [*TINY, "steps=8", "evaluate_every=8"]
    recipe = load_recipe(RECIPE, [*overrides, "placement.cpus_per_worker=0.5"])
    train(recipe, TrainInputs(corpora={"corpus": corpus}), tmp_path / "local")
    with running.running_nodes(tmp_path / "nodes", 2, 2, 2, 2) as nodes:
        words = ["train", RECIPE, *overrides, *ON_TWO_NODES, "-i", f"corpus={corpus}", "-o", str(tmp_path / "trained")]
        words += ["--address", nodes.address]
        training = nodes.start(*words)
        running.wait_until(lambda: list((tmp_path / "trained").glob("ray/**/state.pt")), training)
        nodes.kill_node(3)
        training.communicate(timeout=running.COMMAND_TIMEOUT_S)
        if training.returncode:
            nodes.run(*words)
    ours = contents(tmp_path / "trained", "model/**/*.safetensors")
    assert ours and ours == contents(tmp_path / "local", "model/**/*.safetensors")


@pytest.mark.full
def test_a_node_dies_during_a_restoration(restored: Path, pictures: Path, tmp_path: Path) -> None:
    restore_folder(open_model("nano"), pictures, tmp_path / "local")
    expected = contents(tmp_path / "local", "*.png")
    with running.running_nodes(tmp_path / "nodes", 1, 1, 1) as nodes:
        words = ["restore", str(pictures), "-o", str(tmp_path / "out"), "--address", nodes.address]
        words += ["--placement", "workers=2", "--placement", "labels.group=worker"]
        job = nodes.start(*words)
        running.wait_until(lambda: len(list((tmp_path / "out").glob("*.png"))) >= 2, job)
        nodes.kill_node(2)
        job.communicate(timeout=running.COMMAND_TIMEOUT_S)
        if job.returncode:
            nodes.run(*words)
    assert contents(tmp_path / "out", "*.png") == expected
