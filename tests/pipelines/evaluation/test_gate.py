"""The gate of a distillation: a good student passes; a bad one ends with exit code 4 and is not registered."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from components.images import encode_png
from components.recipes import Gate, RecipeError
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.recipes import load_recipe
from components.systems.system import Networks
from pipelines.commands.main import build_app
from pipelines.core.errors import EXIT_GATE, Failure, GateFailed, UsageError
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation import gate
from pipelines.evaluation.gate import compare, pass_gate
from pipelines.runs import one_training
from pipelines.runs.tracking import DATABASE
from pipelines.training.inputs import TrainInputs, check_inputs
from pipelines.training.train import TrainResult


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tests/pipelines/_tiny.py, with its restorer among the systems."""
    spec = importlib.util.spec_from_file_location("_tiny_for_gate", Path(__file__).parents[1] / "_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look up names here
    spec.loader.exec_module(module)
    networks = Networks(build_restorer=lambda model, **_: module.build_tiny(model.path))
    system = dataclasses.replace(module.SYSTEM, networks=lambda: networks)
    monkeypatch.setitem(SYSTEMS, "tiny", system)
    return module


@pytest.fixture
def inputs(tmp_path: Path) -> TrainInputs:
    pictures = [encode_png(dead_leaves(96, 3, index)) for index in range(10)]
    samples = [(f"p{n}", "png", data, {}) for n, data in enumerate(pictures)]
    write_corpus(tmp_path / "corpus", "leaves", {"train": samples[:2], "held_out": samples[2:]})
    return TrainInputs(corpora={"corpus": tmp_path / "corpus"})


def recipe(teacher: Path, *more: str) -> Any:
    own = [f"teacher={teacher}", "short_side=96", "resolution=64", "gate.pictures=6", "degradation.preset=x4-noise40"]
    return load_recipe("distil-onestep-nano", [*own, *more])


def test_a_student_like_its_teacher_passes(tiny: Any, inputs: TrainInputs, tmp_path: Path) -> None:
    teacher = tiny.write_model(tmp_path / "teacher", 60.0)
    tiny.write_model(tmp_path / "out" / "model", 55.0)
    result = pass_gate(recipe(teacher), inputs.corpora, tmp_path / "out", on_ray=False)
    document = json.loads((tmp_path / "out" / "gate" / "gate.json").read_text())
    assert result.passed and document["passed"] and len(result.pictures) == 6
    assert [one.metric for one in result.judgements] == ["psnr", "gmsd"]
    psnr = result.judgements[0]
    assert psnr.loss == pytest.approx(psnr.reference - psnr.candidate, abs=1e-6) and psnr.loss <= psnr.allowed == 0.5
    assert psnr.low is not None and psnr.high is not None and psnr.low <= psnr.loss <= psnr.high


def test_a_bad_student_fails(tiny: Any, inputs: TrainInputs, tmp_path: Path) -> None:
    """The student keeps the noise that its teacher removes."""
    teacher = tiny.write_model(tmp_path / "teacher", 100.0)
    tiny.write_model(tmp_path / "out" / "model", 0.5)
    with pytest.raises(GateFailed, match=r"psnr .* above the allowed 0\.5.*not registered") as error:
        pass_gate(recipe(teacher), inputs.corpora, tmp_path / "out", on_ray=False)
    assert error.value.exit_code == EXIT_GATE == 4
    document = json.loads((tmp_path / "out" / "gate" / "gate.json").read_text())
    assert not document["passed"] and document["judgements"][0]["loss"] > 0.5
    wide = recipe(teacher, "gate.psnr_db=60", "gate.perceptual=10")
    assert pass_gate(wide, inputs.corpora, tmp_path / "out", on_ray=False).passed, "only the margins decide"


def write(folder: Path, shift: dict[str, int], pictures: int = 6) -> None:
    """hq is gray noise; each arm's pictures are shifted by so many levels."""
    for number in range(pictures):
        hq = np.random.default_rng(number).integers(60, 180, (48, 48, 3)).astype(np.uint8)
        for name in ("hq", "lq", *shift):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"p{number}.png").write_bytes(encode_png(hq + np.uint8(shift.get(name, 0))))


def test_each_metric_has_its_own_margin(tmp_path: Path) -> None:
    write(tmp_path, {"teacher": 4, "student": 5})
    psnr, ssim = compare(tmp_path, Gate(psnr_db=1.0, metric="ssim")).judgements
    assert psnr.loss == pytest.approx(20 * np.log10(5 / 4), abs=1e-3) and not psnr.passed  # 1.94 dB, in every picture
    assert ssim.passed and ssim.allowed == pytest.approx(0.02 * ssim.reference)  # a shift leaves the structure
    assert compare(tmp_path, Gate(psnr_db=2.0, metric="ssim")).passed
    # GMSD of the teacher is almost 0, so the relative margin is too; GMSD sees the rounding of a shift
    assert not compare(tmp_path, Gate(psnr_db=2.0, metric="gmsd")).passed
    better = tmp_path / "better"
    write(better, {"teacher": 5, "student": 4})
    assert compare(better, Gate(psnr_db=0.0)).judgements[0].passed


def test_a_picture_that_only_the_teacher_restores_fails_the_student(tmp_path: Path) -> None:
    write(tmp_path, {"teacher": 4, "student": 4})
    (tmp_path / "student" / "p1.png").unlink()
    result = compare(tmp_path, Gate())
    assert result.lost == ["p1"] and not result.passed and "could not restore p1" in result.sentence()
    for path in (tmp_path / "student").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(Failure):
        compare(tmp_path, Gate())


def test_an_earlier_students_picture_does_not_count(tmp_path: Path) -> None:
    """A picture in this run's quarantine has no score, even if an earlier run's file of it is still there."""
    write(tmp_path, {"teacher": 4, "student": 4})
    (tmp_path / "student" / "quarantine.jsonl").write_text(json.dumps({"key": "p1", "code": "failed"}) + "\n")
    result = compare(tmp_path, Gate())
    assert result.lost == ["p1"] and not result.passed and "p1" not in result.pictures


def test_a_missing_score_fails_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"teacher": 4, "student": 4})
    evaluate = gate.evaluate

    def without(restored: Path, lq: Path, hq: Path, out: Path, **more: Any) -> Any:
        result = evaluate(restored, lq, hq, out, **more)
        if restored.name == "student":
            rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
            del rows[0]["scores"]["restored"]["gmsd"]
            (out / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return result

    monkeypatch.setattr(gate, "evaluate", without)
    result = compare(tmp_path, Gate(metric="gmsd"))
    assert len(result.lost) == 1 and not result.passed


def test_a_teacher_without_a_result_is_a_failure(tmp_path: Path) -> None:
    write(tmp_path, {"teacher": 4, "student": 4})
    (tmp_path / "teacher" / "p1.png").unlink()
    with pytest.raises(Failure, match="teacher has no result of p1"):
        compare(tmp_path, Gate())


@pytest.mark.parametrize("passes", [True, False])
def test_the_command_registers_only_a_student_that_passes(
    passes: bool, tiny: Any, inputs: TrainInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`restoray train distil-onestep-nano teacher=MODEL`, with a ready student in place of the training."""
    teacher, out = tiny.write_model(tmp_path / "teacher", 100.0), tmp_path / "out"
    names: list[str] = []

    def train(recipe: Any, inputs: TrainInputs, out: Path, on_metrics: Any = None, **_: Any) -> TrainResult:
        tiny.write_model(out / "model", 100.0 if passes else 0.5)
        return TrainResult(model=out / "model", heldout={}, seconds=0.0)

    monkeypatch.setattr(one_training, "train", train)
    monkeypatch.setattr(one_training, "pass_gate", functools.partial(pass_gate, on_ray=False))
    monkeypatch.setattr("pipelines.api.training.running_ray", contextlib.nullcontext)
    monkeypatch.setattr("pipelines.api.training.register", lambda recipe, out: names.append(recipe.name) or 1)
    more = ["short_side=96", "resolution=64", "degradation.preset=x4-noise40"]
    command = ["train", "distil-onestep-nano", f"teacher={teacher}", *more, "--out", str(out)]
    result = CliRunner().invoke(build_app(), [*command, "--input", f"corpus={inputs.corpora['corpus']}"])
    if passes:
        assert result.exit_code == 0, result.output
        assert names == ["distil-onestep-nano"] and "version 1" in result.output
    else:
        assert isinstance(result.exception, GateFailed) and names == []


PROCESS = """
import contextlib, dataclasses, functools, importlib.util, sys
import pipelines.core.cluster
from pipelines.runs import one_training
from components.systems import SYSTEMS
from components.systems.system import Networks
from pipelines.commands import main as cli
from pipelines.evaluation.gate import pass_gate

spec = importlib.util.spec_from_file_location("_tiny", sys.argv.pop(1))
tiny = sys.modules["_tiny"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
networks = Networks(build_restorer=lambda model, **_: tiny.build_tiny(model.path))
SYSTEMS["tiny"] = dataclasses.replace(tiny.SYSTEM, networks=lambda: networks)

def train(recipe, inputs, out, on_metrics=None, **_):
    tiny.write_model(out / "model", 0.5)
    return one_training.TrainResult(model=out / "model", heldout={}, seconds=0.0)

one_training.train, one_training.pass_gate = train, functools.partial(pass_gate, on_ray=False)
pipelines.core.cluster.running_ray = contextlib.nullcontext
cli.main()
"""
"""The command with its real gate and exit code; a ready bad student replaces training and Ray, which take minutes."""


def test_the_process_of_a_failed_gate_ends_with_code_4(
    tiny: Any, inputs: TrainInputs, repository: Path, tmp_path: Path
) -> None:
    teacher, out = tiny.write_model(tmp_path / "teacher", 100.0), tmp_path / "out"
    words = ["train", "distil-onestep-nano", f"teacher={teacher}", "--input", f"corpus={inputs.corpora['corpus']}"]
    more = ["short_side=96", "resolution=64", "degradation.preset=x4-noise40", "gate.pictures=6", "--out", str(out)]
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, str(Path(__file__).parents[1] / "_tiny.py"), *words, *more],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 4, process.stderr[-2000:]
    assert "restoray: distil-onestep-nano: on 6 held-out pictures" in process.stderr
    assert "it is not registered" in process.stderr and "Traceback" not in process.stderr
    assert not json.loads((out / "gate" / "gate.json").read_text())["passed"]
    assert (out / "model" / "model.json").is_file(), "the student's folder stays"
    assert not (out / DATABASE).exists(), "registering would open this store"


def test_a_distillation_without_a_teacher_is_refused() -> None:
    result = CliRunner().invoke(build_app(), ["train", "distil-onestep", "--dry-run"])
    assert "Name a trained model: teacher=MODEL" in str(result.exception)
    result = CliRunner().invoke(build_app(), ["train", "distil-onestep", "teacher=nowhere", "--dry-run"])
    assert 'unknown teacher "nowhere"' in str(result.exception)
    with pytest.raises(RecipeError, match="metric other than psnr"):
        load_recipe("distil-onestep", ["gate.metric=psnr"])


def test_few_pictures_pass_no_student(tiny: Any, tmp_path: Path) -> None:
    """The student is better on every picture, but five are too few to say so of others."""
    write(tmp_path, {"teacher": 5, "student": 4}, pictures=5)
    result = compare(tmp_path, Gate(psnr_db=60, perceptual=10))
    assert not result.passed and [(one.pictures, one.low, one.passed) for one in result.judgements] == [
        (5, None, False),
        (5, None, False),
    ]
    assert "within the allowed 60; 5 pictures are too few to say" in result.sentence()
    write(tmp_path, {"teacher": 5, "student": 4}, pictures=6)
    six = compare(tmp_path, Gate(psnr_db=60, perceptual=10))
    assert six.passed and "too few" not in six.sentence()


def test_a_gate_without_enough_pictures_ends_before_the_training(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gate\.pictures=5 is too few to say .* at least 6"):
        load_recipe("distil-onestep-nano", ["gate.pictures=5"])
    samples = [(f"p{n}", "png", encode_png(dead_leaves(96, 3, n)), {}) for n in range(9)]
    for held_out, names in ((5, "few"), (6, "enough")):
        split = {"train": samples[held_out:], "held_out": samples[:held_out]}
        write_corpus(tmp_path / names, "leaves", split)
    own = recipe(tiny.write_model(tmp_path / "teacher", 60.0))
    with pytest.raises(UsageError, match=r"at least 6 held-out pictures, and the largest corpus holds out 5.*split"):
        check_inputs(own, TrainInputs(corpora={"corpus": tmp_path / "few"}))
    check_inputs(own, TrainInputs(corpora={"corpus": tmp_path / "enough"}))


def test_the_gates_metric_is_checked_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyiqa

    def create(name: str, device: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(pyiqa, "create_metric", create)
    monkeypatch.setattr(one_training, "train", lambda *_, **__: pytest.fail("it trained"))
    for metric, error, words in (("lpips", Failure, "no network"), ("fid", UsageError, "sets of pictures")):
        own = recipe(tmp_path / "teacher", f"gate.metric={metric}")
        with pytest.raises(error, match=f"{metric}.*{words}"):
            one_training.train_one(own, TrainInputs(), tmp_path / "out", progress=lambda *_: None)
