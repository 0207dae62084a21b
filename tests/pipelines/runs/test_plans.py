"""Plans: digests, skipping, resuming after kill -9 in each stage, the lock, and overrides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.console import Console
from pipelines.core.errors import Failure, RetryLater, UsageError
from pipelines.core.folders import folder_lock
from pipelines.core.home import shipped_files
from pipelines.runs import plan as plans
from pipelines.runs.engine import RunOptions, read_done_json, run_plan
from pipelines.runs.identity import stage_digest
from pipelines.runs.plan import load_plan
from pipelines.runs.records import PlanResult
from pipelines.runs.tracking import resolve
from pipelines.runs.verb import StageContext, Verb

PLAN = """
title: counting
free_mib: 1
stages:
  - {name: one, verb: count, upto: 3}
  - {name: two, verb: count, upto: 2, needs: [one]}
  - {name: three, verb: count, upto: 1, needs: [one, two]}
"""


@dataclass(kw_only=True)
class CountSettings:
    upto: int = 1
    label: str = "x"


def count(context: StageContext) -> dict[str, Any]:
    """Append a line for each number that is not there yet; sum the counts of the inputs."""
    path = context.stage_dir / "numbers.txt"
    have = len(path.read_text().splitlines()) if path.exists() else 0
    stop = context.run_dir / f"stop-in-{context.name}"
    for number in range(have, context.settings.upto):
        with path.open("a") as file:
            file.write(f"{number} {os.getpid()}\n")
        if stop.exists():
            (context.run_dir / "reached").touch()
            time.sleep(60)
    total = sum(
        json.loads((folder / "done.json").read_text())["results"]["count"] for folder in context.inputs.values()
    )
    return {"count": context.settings.upto, "below": total, "outputs": ["numbers.txt"]}


def verbs(version: int = 1) -> Mapping[str, Verb]:
    return {"count": Verb(run=count, settings=CountSettings, uses_ray=False, version=version)}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "counting.yaml"
    path.write_text(PLAN)
    return path


def run(plan: Path, out: Path, *overrides: str, version: int = 1, **settings: Any) -> PlanResult:
    options = RunOptions(verbs=verbs(version), track=False, console=Console(silent=True), **settings)
    return run_plan(plan, out, overrides, options)


def states(result: PlanResult) -> list[str]:
    return [record.state for record in result.stages]


# -- digests


def test_digest_is_the_sha256_of_canonical_json() -> None:
    """Computed by hand: sorted keys, no spaces, UTF-8."""
    import hashlib

    text = '{"inputs":{"a":"00"},"recipe":{"b":1,"c":"ä"},"version":2}'
    assert stage_digest({"c": "ä", "b": 1}, {"a": "00"}, 2) == hashlib.sha256(text.encode()).hexdigest()


def test_digest_depends_on_all_its_parts() -> None:
    base = stage_digest({"a": 1}, {"x": "1"}, 1)
    others = [
        stage_digest({"a": 2}, {"x": "1"}, 1),
        stage_digest({"a": 1}, {"x": "2"}, 1),
        stage_digest({"a": 1}, {"y": "1"}, 1),
        stage_digest({"a": 1}, {"x": "1"}, 2),
    ]
    assert len({base, *others}) == 5


def test_a_change_changes_the_digests_of_later_stages_only(plan: Path) -> None:
    before = load_plan(plan, verbs=verbs()).stages
    after = load_plan(plan, ["two.upto=5"], verbs=verbs()).stages
    assert [a.digest == b.digest for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_a_plan_whose_file_name_is_not_text_has_a_name_that_is(plan: Path) -> None:
    renamed = plan.rename(plan.with_name(os.fsdecode(b"pl\xe9.yaml")))
    assert load_plan(renamed, verbs=verbs()).name == "pl\\xe9"


def test_placement_is_not_part_of_a_training_digest(tmp_path: Path) -> None:
    document = "stages:\n  - {name: train, verb: train, recipe: RECIPE}\n"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("system: prior\nstage: autoencoder\nsteps: 4\nbatch_size: 4\nresolution: 64\nshort_side: 64\n")
    path = tmp_path / "p.yaml"
    path.write_text(document.replace("RECIPE", str(recipe)))
    one, two = load_plan(path), load_plan(path, ["workers=2"])
    assert two.stages[0].recipe.placement.workers == 2
    assert one.stages[0].digest == two.stages[0].digest
    assert load_plan(path, ["train.steps=5"]).stages[0].digest != one.stages[0].digest


def test_a_stage_without_its_parent_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "stages:\n  - {name: corpus, verb: curate, spec: demo}\n"
        "  - {name: previewer, verb: train, recipe: instantir-previewer-nano, needs: [corpus]}\n"
    )
    with pytest.raises(UsageError, match="instantir-previewer-nano starts from the model of instantir stage dcp"):
        load_plan(path)


# -- running


def test_runs_in_order_then_skips(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    first = run(plan, out)
    assert states(first) == ["finished"] * 3
    assert first.stages[2].results["below"] == 5
    marks = {p: p.stat().st_mtime_ns for p in out.glob("*/done.json")}
    assert len(marks) == 3
    second = run_plan(plan, out, options=RunOptions(verbs=verbs(), track=False))
    assert states(second) == ["done"] * 3
    assert capsys.readouterr().err.count("skipped") == 3
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/done.json")} == marks
    listing = json.loads((out / "plan.json").read_text())
    assert [(s["name"], s["skipped"]) for s in listing["stages"]] == [("one", True), ("two", True), ("three", True)]
    assert (out / "report.html").is_file()


def test_a_changed_setting_reruns_its_stage_and_those_after_it(plan: Path, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    assert states(run(plan, tmp_path / "run", "two.label=y")) == ["done", "finished", "finished"]
    assert states(run(plan, tmp_path / "run")) == ["done"] * 3  # the old folders are still there


def test_a_raised_version_reruns(plan: Path, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    assert states(run(plan, tmp_path / "run", version=2)) == ["finished"] * 3


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "other"])
def test_a_wrong_done_json_is_ignored(plan: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    record = run(plan, out).stages[1]
    folder = out / record.stage.folder
    if damage == "missing":
        (folder / "numbers.txt").unlink()
    elif damage == "cut":
        (folder / "numbers.txt").write_text("")
    elif damage == "garbage":
        (folder / "done.json").write_text('{"digest": ')
    else:
        (folder / "done.json").write_text(json.dumps({**json.loads((folder / "done.json").read_text()), "digest": "0"}))
    assert read_done_json(folder, record.stage.digest) is None
    assert states(run(plan, out)) == ["done", "finished", "done"]


def test_an_output_must_exist(plan: Path, tmp_path: Path) -> None:
    bad_verbs = {"count": Verb(run=lambda c: {"outputs": ["no.txt"]}, settings=CountSettings, uses_ray=False)}
    with pytest.raises(Failure, match=r"one ended without its output no\.txt"):
        run_plan(plan, tmp_path / "run", options=RunOptions(verbs=bad_verbs, track=False))
    assert not list((tmp_path / "run").glob("*/done.json"))


def test_a_failing_stage_leaves_the_earlier_ones_done(plan: Path, tmp_path: Path) -> None:
    def fail_in_two(context: StageContext) -> dict[str, Any]:
        if context.name == "two":
            raise Failure("no luck")
        return count(context)

    failing = {"count": Verb(run=fail_in_two, settings=CountSettings, uses_ray=False)}
    with pytest.raises(Failure, match="no luck"):
        run_plan(plan, tmp_path / "run", options=RunOptions(verbs=failing, track=False))
    listing = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [s["state"] for s in listing["stages"]] == ["finished", "failed", "planned"]
    assert states(run(plan, tmp_path / "run")) == ["done", "finished", "finished"]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("stage", ["one", "two", "three"])
def test_killed_in_each_stage_it_continues(plan: Path, tmp_path: Path, stage: str, ending: signal.Signals) -> None:
    """The numbers of the killed process stay: the stage resumes and does not start again."""
    out = tmp_path / "run"
    out.mkdir()
    (out / f"stop-in-{stage}").touch()
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('t', sys.argv[1])\n"
        "t = importlib.util.module_from_spec(spec); sys.modules['t'] = t; spec.loader.exec_module(t)\n"
        "from pathlib import Path; t.run(Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(plans.__file__).parents[2])}
    victim = subprocess.Popen([sys.executable, "-c", code, __file__, str(plan), str(out)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (out / "reached").exists():
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(RetryLater, match=str(victim.pid)):  # while it lives, no other process may work there
            run(plan, out)
        victim.send_signal(ending)
        victim.wait(30)
    finally:
        victim.kill()
        victim.wait()
    (out / f"stop-in-{stage}").unlink()
    before = ["one", "two", "three"].index(stage)
    result = run(plan, out)
    assert states(result) == ["done"] * before + ["finished"] * (3 - before)
    lines = (out / result.stages[before].stage.folder / "numbers.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(3 - before))
    assert int(lines[0].split()[1]) == victim.pid


def test_dry_run_touches_nothing(plan: Path, tmp_path: Path) -> None:
    result = run(plan, tmp_path / "run", dry_run=True)
    assert states(result) == ["planned"] * 3
    assert not (tmp_path / "run").exists()
    run(plan, tmp_path / "run")
    assert states(run(plan, tmp_path / "run", dry_run=True)) == ["done"] * 3


def test_quarantined_samples_set_the_exit_code_also_when_skipped(plan: Path, tmp_path: Path) -> None:
    def with_rejects(context: StageContext) -> dict[str, Any]:
        return {"quarantined": 2 if context.name == "one" else 0}

    rejecting = {"count": Verb(run=with_rejects, settings=CountSettings, uses_ray=False)}
    for _ in range(2):
        options = RunOptions(verbs=rejecting, track=False, console=Console(silent=True))
        result = run_plan(plan, tmp_path / "run", options=options)
        assert (result.quarantined, result.exit_code) == (2, 3)


def test_a_second_driver_gets_retry_later(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        with pytest.raises(RetryLater, match=f"in use by process {os.getpid()} since 2") as error:
            with folder_lock(tmp_path):
                pass
    assert error.value.exit_code == 75
    with folder_lock(tmp_path):
        pass


def test_unwritable_output_is_one_sentence(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"cannot write to .*: Not a directory\.$"):
        run(plan, tmp_path / "file" / "run")


def test_too_little_disk_is_one_sentence(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"MiB free and this plan needs 999999999 MiB"):
        run(plan, tmp_path / "run", "free_mib=999999999")


# -- names and overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tow.upto=1"], r'unknown stage in the override "tow"\. Did you mean "two"\?'),
        (["two.upot=1"], r"(?i)upot.*did you mean:? 'upto'"),
        (["two.upto=many"], "(?i)many.*int"),
        (["free_mb=1"], r'unknown plan key "free_mb"\. Did you mean "free_mib"\?'),
        (["two=1"], "name a key of stage two"),
        (["nonsense"], r'"nonsense" is not key=value'),
    ],
)
def test_wrong_overrides_get_a_suggestion(plan: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_plan(plan, overrides, verbs=verbs())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{name: a, verb: cuont}]", r'unknown verb "cuont"\. Did you mean "count"\?'),
        ("stages: [{name: a, verb: count, needs: [b]}]", "unknown earlier stage in the needs of a"),
        ("stages: [{name: a, verb: count}, {name: a, verb: count}]", "two stages have the same name"),
        ("stages: [{name: ../a, verb: count}]", "is not a stage name"),
        ("stages: [{verb: count}]", "needs a name and a verb"),
        ("stages: 3", "no list of stages"),
        ("stages: [", "cannot be read as a plan"),
        ("titel: x\nstages: [{name: a, verb: count}]", "(?i)titel.*did you mean:? 'title'"),
    ],
)
def test_wrong_plans_are_usage_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_plan(path, verbs=verbs())


def test_an_unknown_plan_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r'unknown plan "dmeo".*Did you mean "demo"'):
        load_plan("dmeo")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("dcp.prior=nanoo", "nano"),
        ("dcp.degradation.options.sharpn=true", "sharpen"),
        ("restored.preset=realesrgan-nanoo", "realesrgan-nano"),
        ("restored.preset_options.sharpn=true", "sharpen"),
        ("restored.options.strenth=0.5", "strength"),
        ("chosen.model=nanoo", "nano"),
        pytest.param("scores.metrics=[psnrr]", "psnr", marks=pytest.mark.slow),  # imports pyiqa
    ],
)
def test_wrong_names_inside_settings_fail_when_the_plan_is_loaded(override: str, near: str) -> None:
    with pytest.raises(UsageError, match=f'(?i)did you mean "{near}"'):
        load_plan("demo", [override])


def test_options_that_contradict_the_model_fail_when_the_plan_is_loaded() -> None:
    overrides = ["restored.options.preset=paper"]
    load_plan("instantir-nano", overrides)
    with pytest.raises(UsageError, match=r"reference must be one of preview.*got lq"):
        load_plan("instantir-nano", [*overrides, "aggregator.reference=lq"])


def test_a_hub_id_needs_no_folder() -> None:
    load_plan("demo", ["dcp.prior=owner/name"])


# -- tracking


def test_a_later_driver_publishes_what_an_earlier_one_did_not(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def train(context: StageContext) -> dict[str, Any]:
        if context.name == "two":
            (context.stage_dir / "model").mkdir()
            (context.stage_dir / "model" / "model.json").write_text('{"name": "tiny"}')
        return {}

    training = {"count": Verb(run=train, settings=CountSettings, uses_ray=False)}

    def again(track: bool = True) -> PlanResult:
        options = RunOptions(verbs=training, track=track, console=Console(silent=True))
        return run_plan(plan, out, options=options)

    again(track=False)  # as after a kill between the last done.json and the registration
    with pytest.raises(Failure):
        resolve("models:/tiny@latest", out)
    assert again().tracking
    assert (resolve("models:/tiny@latest", out) / "model.json").is_file()
    monkeypatch.setattr("pipelines.runs.engine.RunTracking", lambda *_: pytest.fail("nothing is new for MLflow"))
    assert states(again()) == ["done"] * 3


# -- the shipped plans


@pytest.mark.parametrize("name", sorted(shipped_files("plans")))
def test_shipped_plans_resolve(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path))
    plan = load_plan(name)
    assert plan.stages[0].verb == "curate"
    assert len({stage.folder for stage in plan.stages}) == len(plan.stages)
    for stage in plan.stages:  # an override of `sources` adds to the recipe's, and a weight of 0 takes one away
        if stage.recipe is not None:
            assert set(stage.recipe.sources) - {"dead_leaves"} <= set(stage.needs), stage.name


def test_the_demo_takes_the_first_steps_of_instantir_nano_and_restores_with_another_model() -> None:
    demo, plan = ({s.name: s for s in load_plan(n).stages} for n in ("demo", "instantir-nano"))
    for stage in ("dcp", "previewer"):
        assert plan[stage].recipe.ema_decay > 0 and plan[stage].recipe.steps > 9 * demo[stage].recipe.steps
        assert plan[stage].recipe.degradation == demo[stage].recipe.degradation
    assert demo["tuned"].recipe.warm_start == demo["chosen"].settings.model == "nano"
    assert demo["tuned"].recipe.placement.workers == 2
    assert demo["restored"].needs == ("corpus", "chosen") and plan["restored"].needs == ("corpus", "aggregator")


def test_user_pictures_give_another_corpus(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    shipped, first = load_plan("demo"), load_plan("demo", images=tmp_path)
    assert shipped.stages[0].digest != first.stages[0].digest
    assert first.stages[0].digest == load_plan("demo", images=tmp_path).stages[0].digest
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert first.stages[0].digest != load_plan("demo", images=tmp_path).stages[0].digest


def test_empty_folder_is_one_sentence_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no picture"):
        run_plan("demo", tmp_path / "run", options=RunOptions(images=tmp_path / "empty"))
    assert not (tmp_path / "run").exists()


def test_texts_in_a_plan_stay_as_they_were_typed(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "title: 'a \\${title}'\n"
        "stages:\n"
        "  - {name: r, verb: restore, preset: none, options: {prompt: '${title} #1'}}\n"
        "  - {name: t, verb: train, recipe: swinir-nano, overrides: ['name=a #1: \\${b}']}\n"
    )
    plan = load_plan(path)
    assert plan.title == "a ${title}"
    assert plan.stages[0].settings.options == {"prompt": "a ${title} #1"}, "an interpolation is read once"
    assert plan.stages[1].recipe.name == "a #1: ${b}"
    typed = load_plan(path, ["title=yes", "r.options.prompt=[best], #2 ${x}", "r.options.steps=3", "t.name=007"])
    assert typed.title == "yes"
    assert typed.stages[0].settings.options == {"prompt": "[best], #2 ${x}", "steps": 3}
    assert typed.stages[1].recipe.name == "007"
