"""`restoray analyze arms`: several sets of options on the same pictures; closed forms on a restorer of arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from components.degradations import build_degradation
from components.evaluation.statistics import psnr, training_band
from components.images import encode_png, to_float, to_uint8
from components.options import typed_options
from components.restoring import picture_seed
from components.synthetic import dead_leaves
from components.types import Cancelled, OnStep, Request, Restored, Restorer
from pipelines.analysis import arms as arms_module
from pipelines.analysis.arms import INPUT, METRICS, WITHOUT_WEIGHTS, analyze_arms
from pipelines.analysis.model import StudyJob, WholeModel
from pipelines.commands.analyze import app, parse_arms
from pipelines.core.errors import UsageError
from pipelines.core.rows import read_lines

SIDE = 96


class Lift(Restorer):
    """Adds `lift` levels to the input, one more with a prompt, and `more` of its own."""

    def __init__(self, more: int = 0) -> None:
        self.requests: list[Request] = []
        self.more = more

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        self.requests += requests
        return [Restored(key=request.key, image=self._one(request)) for request in requests]

    def _one(self, request: Request) -> np.ndarray:
        lift = request.options.get("lift", 0) + bool(request.prompt) + self.more
        return np.clip(request.image.astype(int) + lift, 0, 255).astype(np.uint8)


def check(options: Mapping[str, Any]) -> dict[str, Any]:
    return typed_options(options, {"lift": int})


def subject(tmp_path: Path, out: str = "out") -> tuple[WholeModel, Lift]:
    images = tmp_path / "in"
    if not images.is_dir():
        images.mkdir()
        for number in range(6):
            (images / f"p{number}.png").write_bytes(encode_png(dead_leaves(SIDE, 3, number)))
    restorer = Lift()
    job = StudyJob(model="lift", images=images, out=tmp_path / out, side_px=SIDE)
    model = WholeModel(job=job, name="lift", digest="0" * 64, system="none", restorer=restorer, options={}, check=check)
    return model, restorer


ARMS: dict[str, dict[str, Any]] = {"plain": {}, "lift 8": {"lift": 8}, "text": {"prompt": "a dog", "lift": 3}}


def test_arms_are_paired_and_compared_with_the_first(tmp_path: Path) -> None:
    model, restorer = subject(tmp_path)
    result = analyze_arms(model, ARMS, mixed="x4")
    assert (result.measured, result.quarantined) == (6, 0)
    rows = read_lines(model.job.out / "values.jsonl")
    assert all(set(row["arms"]) == {INPUT, *ARMS} for row in rows)
    degradation = build_degradation("x4")
    picture = dead_leaves(SIDE, 3, 0)
    lq = to_uint8(degradation.apply(to_float(picture), degradation.draw(0, "p0", 0)))
    lifted = np.clip(lq.astype(int) + 4, 0, 255).astype(np.uint8)
    (row,) = [row for row in rows if row["key"] == "p0"]
    assert row["arms"]["text"]["psnr"] == pytest.approx(psnr(lifted, picture), abs=1e-3)  # three levels and the prompt
    assert row["arms"][INPUT] == row["arms"]["plain"]
    summary = json.loads((model.job.out / "summary.json").read_text())
    assert summary["compared_with"] == "plain" and set(summary["arms"]["plain"]) == set(METRICS)
    gaps = [row["arms"]["lift 8"]["psnr"] - row["arms"]["plain"]["psnr"] for row in rows]
    band = summary["differences"]["lift 8"]["psnr"]
    assert band["mean"] == pytest.approx(np.mean(gaps), abs=1e-6) and band["high"] < 0
    assert summary["unavailable"] == list(WITHOUT_WEIGHTS)
    seeds = {request.key: {r.seed for r in restorer.requests if r.key == request.key} for request in restorer.requests}
    assert all(len(each) == 1 for each in seeds.values()) and len({min(s) for s in seeds.values()}) == 6
    text = result.report.read_text()
    assert "unavailable" in text and "lift 8 against plain" in text
    assert (model.job.out / "arms.png").is_file() and (model.job.out / "arms.jpg").is_file()
    again, calls = subject(tmp_path)
    assert analyze_arms(again, ARMS, mixed="x4").kept == 6 and not calls.requests


def test_wrong_arms_are_told(tmp_path: Path) -> None:
    model, _ = subject(tmp_path)
    for arms, word in (
        ({}, "at least one arm"),
        ({INPUT: {}}, "cannot be called"),
        ({"a": {"lif": 1}}, "arm 'a': unknown option"),
        ({"a": {"prompt": 3}}, "prompt must be text"),
    ):
        with pytest.raises(UsageError, match=word):
            analyze_arms(model, arms)
    with pytest.raises(UsageError, match="x8"):
        analyze_arms(model, ARMS, mixed="x5")


def test_an_arm_may_have_another_model_and_a_caption_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`caption` takes the original's caption in the model's frame, or that of the next picture."""
    model, restorer = subject(tmp_path)
    other, second = subject(tmp_path)
    other = replace(other, frame="photo of {caption}", digest="1" * 64)
    monkeypatch.setattr(arms_module, "open_whole", lambda job: {"second": other}[job.model])

    class Writer:
        def caption(self, images: Sequence[np.ndarray]) -> list[str]:
            return [f"mean {image.mean():.3f}" for image in images]

    monkeypatch.setattr(arms_module, "build_captioner", lambda *_, **__: Writer())
    arms = {"plain": {}, "own": {"caption": "own"}, "other": {"model": "second", "caption": "other", "lift": 2}}
    paper = {"own": {"psnr": 20.66}, "input": {"psnr": 19.5}}
    result = analyze_arms(model, arms, mixed="x4", paper=paper)
    captions = [f"mean {dead_leaves(SIDE, 3, number).mean():.3f}" for number in range(6)]
    by_key = {request.key: request.prompt for request in restorer.requests if request.prompt}
    assert by_key == {f"p{n}": captions[n] for n in range(6)}
    assert {r.key: r.prompt for r in second.requests} == {
        f"p{n}": f"photo of {captions[(n + 1) % 6]}" for n in range(6)
    }
    assert len(restorer.requests) == 12 and all(r.options == {"lift": 2} for r in second.requests)
    summary = json.loads((model.job.out / "summary.json").read_text())
    assert summary["paper"] == paper and "paper: psnr" in result.report.read_text()
    settings = json.loads((model.job.out / "study.json").read_text())["settings"]
    assert settings["arms"]["other"]["model"] == "1" * 64 and settings["captions"]["p0"] == captions[0]

    for wrong, word in (
        ({"a": {"caption": "mine"}}, "caption 'mine'|unknown caption"),
        ({"a": {"caption": "own", "prompt": "x"}}, "leave one out"),
    ):
        with pytest.raises(UsageError, match=word):
            analyze_arms(model, wrong)
    with pytest.raises(UsageError, match="paper's numbers"):
        analyze_arms(model, {"plain": {}}, paper={"plane": {"psnr": 1.0}})


def test_trainings_of_an_arm_are_paired_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trainings of two arms: the n-th have the n-th noise, and the interval is over pictures and trainings."""
    model, _ = subject(tmp_path)
    lifts = {"plain/0": 1, "plain/1": 2, "plain/2": 4, "more/0": 5, "more/1": 9, "more/2": 9}
    models = {}
    for number, (name, more) in enumerate(lifts.items()):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        job = replace(model.job, model=str(folder))
        models[str(folder)] = replace(model, job=job, restorer=Lift(more), digest=str(number))
        if not name.startswith("more/2"):
            rows = [("trained_parameters", 1000 + more), ("cpu_seconds_per_step", 0.25), ("cpu_seconds_per_step", 9.0)]
            lines = [{"step": step, "name": key, "value": value} for step, (key, value) in enumerate(rows)]
            lines.append({"step": 3, "name": "cpu_seconds_per_step", "value": 0.5})
            (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(arms_module, "open_whole", lambda job: models[job.model])
    places = list(models)
    arms = {"plain": {"model": places[:3]}, "more": {"model": places[3:]}}
    result = analyze_arms(model, arms, mixed="x4")
    degradation, scores = build_degradation("x4"), np.zeros((6, 2, 3))
    for number in range(6):
        picture = dead_leaves(SIDE, 3, number)
        lq = to_uint8(degradation.apply(to_float(picture), degradation.draw(0, f"p{number}", 0))).astype(int)
        for place, more in enumerate(lifts.values()):
            lifted = np.clip(lq + more, 0, 255).astype(np.uint8)
            scores[number, place // 3, place % 3] = psnr(lifted, picture)
    summary = json.loads((model.job.out / "summary.json").read_text())
    expected = training_band(scores[:, 1] - scores[:, 0])
    band = summary["differences"]["more"]["psnr"]
    for end in ("mean", "low", "high"):
        assert band[end] == pytest.approx(float(getattr(expected, end)), abs=1e-4)
    assert summary["arms"]["plain"]["psnr"]["mean"] == pytest.approx(scores[:, 0].mean(), abs=1e-4)
    assert summary["trainings"] == 3
    for number, place in enumerate(places):
        restorer: Any = models[place].restorer
        assert {r.key: r.seed for r in restorer.requests} == {
            f"p{n}": picture_seed(number % 3, f"p{n}") for n in range(6)
        }
    lines = (model.job.out / "values.csv").read_text().splitlines()
    assert lines[0].startswith("key,arm,training,psnr") and len(lines) == 1 + 6 * (1 + 3 + 3)
    settings = json.loads((model.job.out / "study.json").read_text())["settings"]
    assert settings["arms"]["more"]["model"] == ["3", "4", "5"]
    assert "pictures and 3 trainings" in result.report.read_text()
    assert summary["costs"]["plain"] == {"trained_parameters": 1004, "cpu_seconds_per_step": 0.5}
    assert summary["costs"]["more"] == {}, "a training without a log"
    head, rows = summary["table"]["head"], summary["table"]["rows"]
    assert head[:4] == ["Arm", "trained parameters", "CPU time of a step, s", "psnr"]
    assert [row[1:3] for row in rows] == [["", ""], ["1,004", "0.5"], ["", ""]]
    with pytest.raises(UsageError, match="1 for arm 'more' and 3 for 'plain'"):
        analyze_arms(model, {"plain": arms["plain"], "more": {"model": places[3]}})


def test_arms_from_a_command_line() -> None:
    arms = parse_arms(["tau=0, 4", "steps=2"], ["both: prompt='a dog' tau=1"])
    assert arms == {
        "tau=0": {"tau": 0},
        "tau=4": {"tau": 4},
        "steps=2": {"steps": 2},
        "both": {"prompt": "a dog", "tau": 1},
    }
    for vary, arm, word in ((["tau"], [], "KEY=V1"), ([], ["tau=1"], "NAME: KEY"), (["a=1,1"], [], "given twice")):
        with pytest.raises(UsageError, match=word):
            parse_arms(vary, arm)


def test_the_command_runs_on_the_shipped_model(tmp_path: Path) -> None:
    model, _ = subject(tmp_path)
    arguments = ["arms", "--model", "nano", "--images", str(model.job.images), "--out", str(tmp_path / "o")]
    answer = CliRunner().invoke(app, [*arguments, "--vary", "tile_px=64,96", "--side", "96", "--limit", "1", "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.output)["measured"] == 1
