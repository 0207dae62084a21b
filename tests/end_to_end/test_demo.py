"""The demo at a tiny size, as a user runs it: the command, its folder, its exit codes, its second run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(1800)  # eight stages, each with processes of its own; the machine may be busy

STAGES = ("corpus", "dcp", "previewer", "tuned", "chosen", "restored", "scores", "service")
TINY_TRAINING = (
    "resolution=32",
    "short_side=48",
    "batch_size=4",
    "steps=3",
    "checkpoint_every=1",
    "evaluate_every=3",
    "heldout_triples=4",
)
TINY = [
    *(f"{stage}.{change}" for stage in ("dcp", "previewer", "tuned") for change in TINY_TRAINING),
    "chosen.short_side=64",
    "chosen.pictures=6",
    "restored.short_side=64",
    "restored.limit=3",
    "scores.metrics=[psnr,ssim]",
]


def restoray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.commands.main", *arguments]


def demo(out: Path, *more: str, timeout_s: float = 1500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        restoray("demo", "--out", str(out), *TINY, *more), capture_output=True, text=True, timeout=timeout_s
    )


def stage_folder(out: Path, name: str) -> Path:
    (folder,) = out.glob(f"{name}-????????")
    return folder


def model_name(out: Path) -> str:
    """The name of the chosen model, under which it is registered."""
    return str(json.loads((stage_folder(out, "chosen") / "model" / "model.json").read_text())["name"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One complete run."""
    out = tmp_path_factory.mktemp("demo")
    process = demo(out)
    assert process.returncode == 0, process.stderr[-3000:]
    for word in ("Report", "Model", "MLflow", "Scores"):
        assert word in process.stdout
    return out


@pytest.mark.slow
def test_every_stage_has_its_results(run: Path) -> None:
    for name in STAGES:
        assert json.loads((stage_folder(run, name) / "done.json").read_text())["digest"]
    restored = sorted((stage_folder(run, "restored") / "restored").glob("*.png"))
    assert len(restored) == 3
    from components.images import read_png_text
    from components.models import load_model

    text = read_png_text(restored[0].read_bytes())
    choice = json.loads((stage_folder(run, "chosen") / "choice.json").read_text())
    assert choice["chosen"] in ("standard", "trained") and choice["sentence"]
    expected = load_model("nano" if choice["chosen"] == "standard" else stage_folder(run, "tuned") / "model")
    assert text["model_digest"] == expected.digest and text["seed"].isdigit()
    summary = json.loads((stage_folder(run, "scores") / "summary.json").read_text())
    assert summary["verdict"]
    page = (run / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and len(page) > 50_000


@pytest.mark.slow
def test_mlflow_has_a_parent_with_a_child_for_each_stage_and_the_model(run: Path) -> None:
    from pipelines.runs.tracking import resolve

    listing = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, json, mlflow\n"
            "client = mlflow.MlflowClient(sys.argv[1], sys.argv[1])\n"
            "ids = [e.experiment_id for e in client.search_experiments()]\n"
            "runs = client.search_runs(ids, max_results=100)\n"
            "print(json.dumps([[r.info.run_name, r.info.status, r.data.tags.get('mlflow.parentRunId'), "
            "sorted(r.data.metrics)] for r in runs]))",
            f"sqlite:///{run / 'mlflow.db'}",
        ],
        capture_output=True,
        text=True,
        cwd=run,
        check=True,
    )
    runs = json.loads(listing.stdout.splitlines()[-1])
    parents = [r for r in runs if r[2] is None]
    children = {r[0].split("-")[0]: r for r in runs if r[2] is not None}
    assert len(parents) == 1 and set(STAGES) <= set(children)
    assert {r[1] for r in runs} == {"FINISHED"}
    assert "loss" in children["dcp"][3]
    folder = resolve(f"models:/{model_name(run)}@latest", run)
    assert (folder / "model.json").is_file()


@pytest.mark.slow
def test_a_second_run_skips_done_stages(run: Path) -> None:
    again = demo(run)
    assert again.returncode == 0
    assert again.stderr.count("done before, skipped") == len(STAGES)


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "nothing"
    process = demo(out, "--dry-run")
    assert process.returncode == 0 and not out.exists()
    for name in STAGES:
        assert name in process.stdout


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_any_stage_resumes(stage: str, run: Path, tmp_path: Path) -> None:
    """kill -9 of the driver while a stage works leaves no orphan; the same command skips done stages and finishes."""
    from pipelines.runs.tracking import resolve

    out = tmp_path / "run"
    shutil.copytree(run, out)
    for name in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(stage_folder(out, name))
    (out / "mlflow.db").unlink()
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(restoray("demo", "--out", str(out), *TINY), stderr=stream, stdout=stream)
    deadline = time.time() + 600
    while f"{stage}: starts" not in log.read_text() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(2.0)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Ray's two agents try for a fixed 60 s to report the raylet's death to the dead driver, then end (73 s measured)
    _, alive = psutil.wait_procs(family, timeout=150)
    assert not alive, [p.cmdline() for p in alive]
    result = demo(out)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("done before, skipped") >= STAGES.index(stage)
    assert (resolve(f"models:/{model_name(out)}@latest", out) / "model.json").is_file()
    first, second = ((stage_folder(o, "restored") / "restored") for o in (run, out))
    assert {p.name: p.read_bytes() for p in first.glob("*.png")} == {
        p.name: p.read_bytes() for p in second.glob("*.png")
    }


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_two_workers_see_the_samples_of_one_worker(run: Path, tmp_path: Path) -> None:
    """Equal orders, and at the first step equal gradient norms: a sum over the workers would double them."""
    from pipelines.core.metrics import read_metrics
    from pipelines.training.stage_files import read_order

    process = demo(tmp_path / "run", "workers=2")
    assert process.returncode == 0, process.stderr[-3000:]
    for name, trainable in (("dcp", "perceptor"), ("previewer", "previewer")):
        folders = [stage_folder(out, name) for out in (run, tmp_path / "run")]
        one, two = (read_order(folder) for folder in folders)
        assert one == two and len(one) == 12
        norms = [read_metrics(folder / "metrics.jsonl")[f"{trainable}/grad_norm"] for folder in folders]
        assert norms[1][1] == pytest.approx(norms[0][1], rel=1e-2), name


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_training_stage_of_instantir_nano_learns(tmp_path: Path) -> None:
    """The loss on 64 fixed held-out triples must fall by at least a tenth."""
    from pipelines.core.metrics import heldout_losses

    out = tmp_path / "run"
    process = subprocess.run(
        restoray("run", "instantir-nano", "--out", str(out)), capture_output=True, text=True, timeout=3500
    )
    assert process.returncode == 0, process.stderr[-3000:]
    for name, trainable in (("dcp", "perceptor"), ("previewer", "previewer"), ("aggregator", "aggregator")):
        losses = heldout_losses(stage_folder(out, name) / "metrics.jsonl")[trainable]
        assert losses[max(losses)] <= 0.9 * losses[min(losses)], (name, losses)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_broken_pictures_end_in_quarantine_with_exit_3(images_dir: Path, tmp_path: Path) -> None:
    process = demo(tmp_path / "run", "--images", str(images_dir / "odd"))
    assert process.returncode == 3, process.stderr[-3000:]
    rows = [
        json.loads(line)
        for line in (stage_folder(tmp_path / "run", "corpus") / "quarantine.jsonl").read_text().splitlines()
    ]
    assert len(rows) > 20 and all(row["code"] and row["key"] for row in rows)
    assert "truncated" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "--images", "EMPTY"], 2, "no picture"),
        (["demo", "dcp.stepz=3"], 2, "id you mean"),
        (["run", "dem"], 2, "id you mean"),
        (["demmo"], 2, "id you mean"),
    ],
)
def test_wrong_input_gets_one_clear_sentence(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty") if a == "EMPTY" else a for a in arguments]
    extra = ["--out", str(tmp_path / "out")] if arguments[0] in ("demo", "run") else []
    process = subprocess.run(restoray(*arguments, *extra), capture_output=True, text=True, timeout=300)
    output = process.stderr + process.stdout
    assert process.returncode == code, output
    assert words in output and "Traceback" not in output
