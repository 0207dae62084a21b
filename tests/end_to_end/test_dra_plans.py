"""DRA's plans at the smallest size: every stage of every plan, with one step of training in this process.

The pictures are dead leaves, and the prior of SD3's shape is untrained. The real verbs run, but without Ray: a training
takes one step on two random pictures. One test of all plans under Ray Train is marked full.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.images import encode_png
from components.models import ModelCard, load_model, save_model
from components.randomness import Noise
from components.recipes import Recipe, identity
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.training import build_optimizers, train_step
from components.types import Batch
from pipelines.analysis import arms
from pipelines.core.console import Console
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation.gate import pass_gate
from pipelines.runs import stages
from pipelines.runs.engine import RunOptions, run_plan
from pipelines.runs.plan import load_plan
from pipelines.training.inputs import TrainInputs, check_inputs
from pipelines.training.train import TrainResult

PLANS = ("dra-nano", "dra-table", "dra-ablations")
SMALL = ("steps=1", "resolution=32", "short_side=48", "batch_size=2", "heldout_triples=2", "checkpoint_every=1")
SIZES = {
    "train": SMALL,
    "study": ("limit=1", "side_px=64", "options.steps=2"),
    "restore": ("limit=2", "short_side=64", "options.steps=2"),
    "evaluate": ("metrics=[psnr,ssim]",),
}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty RESTORAY_HOME."""
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def small(plan: str) -> list[str]:
    """The overrides of a plan at the smallest size. Students take their number of steps from the recipe: one."""
    changes = []
    for stage in load_plan(plan).stages:
        sizes: Sequence[str] = SIZES.get(stage.verb, ())
        if stage.verb == "study" and any(name.startswith(("student", "regression")) for name in stage.needs):
            sizes = ("limit=1", "side_px=64")  # a restorer of one step has no option for their number
        changes += [f"{stage.name}.{change}" for change in sizes]
        changes += [f"{stage.name}.gate.pictures=6"] if stage.verb == "train" and stage.recipe.distil else []
        changes += [f"{stage.name}.restore_options.steps=2"] if stage.verb == "train" and not one_step(stage) else []
    return changes


def one_step(stage: Any) -> bool:
    return stage.recipe.stage == "onestep"


def leaves(spec: Any, out: Path, **options: Any) -> Any:
    """Dead leaves in place of a spec's photographs, of which six are held out."""
    samples: list[Any] = [(f"p{n}", "png", encode_png(dead_leaves(64, 11, n)), {}) for n in range(9)]
    write_corpus(out, "leaves", {"train": samples[:3], "held_out": samples[3:]})
    for name in ("manifest.jsonl", "quarantine.jsonl"):
        (out / name).touch()
    return SimpleNamespace(accepted=9, rejected=0, digest="d")


def batch(side: int = 32) -> Batch:
    draw = np.random.default_rng(0)
    hq, lq = (torch.from_numpy(draw.uniform(-1, 1, (2, 3, side, side)).astype("float32")) for _ in range(2))
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(2, -1)
    return Batch(keys=["a", "b"], positions=np.arange(2), hq=hq, lq=lq, prompts=["red", ""], sizes=sizes)


def one_training(recipe: Recipe, inputs: TrainInputs, out: Path, progress: Any, **options: Any) -> TrainResult:
    """`pipelines.runs.one_training.train_one` with one step, in this process."""
    check_inputs(recipe, inputs)
    objective: Any = SYSTEMS[recipe.system].build_objective(recipe, {})
    data, optimizers = batch(), build_optimizers(objective, recipe.optimizer)
    metrics = train_step(objective, [(data, Noise(recipe.seed, data.positions))], optimizers, lr=1e-3, clip_norm=1.0)
    assert np.isfinite(list(metrics.values())).all()
    count = sum(p.numel() for o in optimizers.values() for group in o.param_groups for p in group["params"])
    rows = {"trained_parameters": count, "cpu_seconds_per_step": 0.1, "peak_memory_mib": 1.0}
    lines = [json.dumps({"step": 1, "name": name, "value": value}) for name, value in rows.items()]
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    card = ModelCard(
        name=recipe.name,
        system=recipe.system,
        recipe=identity(recipe),
        prior=objective.prior.source,
        config=dict(objective.config),
    )
    save_model(out / "model", card, objective.parts(), getattr(objective, "files", None))
    if recipe.teacher:
        pass_gate(recipe, inputs.corpora, out, on_ray=False)
    return TrainResult(model=out / "model", heldout={}, seconds=0.0)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "curate", leaves)
    monkeypatch.setattr(stages, "train_one", one_training)
    monkeypatch.setattr(stages, "Pool", lambda workers: Pool(workers=0))
    monkeypatch.setattr("pipelines.runs.engine.running_ray", lambda need: SimpleContext())
    monkeypatch.setattr(arms, "METRICS", ("psnr", "st_lpips", "consistency"))  # the others take most of the time


class SimpleContext:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def run(home: Path, in_process: None, tmp_path: Path) -> Callable[[str], dict[str, Path]]:
    def one(plan: str) -> dict[str, Path]:
        """Run a plan; returns the folders of its stages."""
        options = RunOptions(track=False, console=Console(silent=True))
        result = run_plan(plan, tmp_path / "run", small(plan), options)
        assert {record.state for record in result.stages} <= {"finished", "done"} and result.report is not None
        return {record.stage.name: result.run_dir / record.stage.folder for record in result.stages}

    return one


def summary(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "study" / "summary.json").read_text())
    return document


@pytest.mark.slow
def test_both_twins_restore_and_the_table_has_all_kinds(run: Any) -> None:
    nano = run("dra-nano")
    for twin, family in (("unet", "sdxl"), ("mmdit", "sd3")):
        model = load_model(nano[f"dra-{twin}"] / "model")
        assert model.info["config"]["family"] == family
        assert len(read_lines(nano[f"scores-{twin}"] / "scores.jsonl")) == 2
        assert read_lines(nano[f"restored-{twin}"] / "restored" / "records.jsonl")
    assert list(summary(nano["twins"])["arms"]) == ["input", "DRA (UNet)", "DRA (MM-DiT)"]
    # the table takes dra-nano's trainings
    marks = {twin: (nano[f"dra-{twin}"] / "done.json").stat().st_mtime_ns for twin in ("unet", "mmdit")}
    folders = run("dra-table")
    for twin, mark in marks.items():
        assert (folders[f"dra-{twin}"] / "done.json").stat().st_mtime_ns == mark
        student, teacher = (load_model(folders[f"{kind}-{twin}"] / "model") for kind in ("student", "dra"))
        assert student.info["prior"]["digest"] == teacher.info["prior"]["digest"]
        assert student.info["config"]["family"] == teacher.info["config"]["family"]
        assert student.info["recipe"]["teacher"] == str(teacher.path)
        assert json.loads((folders[f"student-{twin}"] / "gate" / "gate.json").read_text())["passed"]
    flows = {twin: load_model(folders[f"student-{twin}"] / "model").info["config"] for twin in marks}
    assert (flows["unet"]["prediction"], flows["mmdit"]["prediction"]) == ("epsilon", "flow_prediction")
    table = summary(folders["table"])
    head = table["table"]["head"]
    for name in ("trained parameters", "peak memory of the training, MiB", "CPU time of a step, s", "consistency"):
        assert name in head
    assert "paper: trained parameters" in head and len(table["table"]["rows"]) == 8
    costs = {name: int(each["trained_parameters"]) for name, each in table["costs"].items()}
    assert costs["DRA (UNet)"] < costs["ControlNet (UNet)"] < costs["regression (UNet)"]
    assert costs["DRA (MM-DiT)"] < costs["ControlNet (MM-DiT)"]
    assert costs["one-step student (UNet)"] == 2 * costs["regression (UNet)"], "generator and fake score"


@pytest.mark.full  # nine trainings and 33 restorers: most of a minute
def test_the_ablations_compare_three_trainings_of_each_kind(run: Any) -> None:
    folders = run("dra-ablations")
    studies = {"lora": ("with LoRA", 2), "data": ("all photographs", 2), "sampling": ("a 0.8, w 0.05", 7)}
    for study, (first, count) in studies.items():
        document = summary(folders[study])
        assert document["trainings"] == 3 and document["compared_with"] == first
        assert len(document["arms"]) == count + 1
        rows = read_lines(folders[study] / "study" / "values.jsonl")
        assert {len(scores) for row in rows for name, scores in row["trainings"].items() if name != "input"} == {3}
    names = ["input", "DRA (UNet)", "ControlNet (UNet)", "DRA (MM-DiT)", "ControlNet (MM-DiT)"]
    assert list(summary(folders["controlnets"])["arms"]) == names
    parts = {name: set(load_model(folders[name] / "model").info["parts"]) for name in ("dra-unet", "no-lora-2")}
    assert parts == {"dra-unet": {"adapters", "lora"}, "no-lora-2": {"adapters"}}
    seeds = [load_model(folders[name] / "model").info["recipe"]["seed"] for name in ("small", "small-1", "small-2")]
    assert seeds == [0, 1, 2]


@pytest.mark.full  # fifteen trainings, each with processes of its own: minutes
@pytest.mark.timeout(3600)
def test_the_plans_run_as_a_user_runs_them(home: Path, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    for plan in PLANS:
        command = [sys.executable, "-m", "pipelines.commands.main", "run", plan, *small(plan)]
        command += ["--out", str(tmp_path / "r")]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
        assert process.returncode == 0, process.stderr[-3000:]
    (table,) = tmp_path.glob("r/table-*/study/summary.json")
    costs = json.loads(table.read_text())["costs"]
    assert len(costs) == 7
    for each in costs.values():
        assert each["trained_parameters"] > 1e5 and each["peak_memory_mib"] > 100 and each["cpu_seconds_per_step"] > 0
