"""The console command in a process of its own: exit codes and printed texts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.commands import main as cli
from pipelines.core.console import Console, LinePrinter
from pipelines.core.errors import UsageError

VERBS = {"analyze", "caption", "curate", "datasets", "degrade", "demo", "doctor", "evaluate", "recipes", "replay"}
VERBS |= {"report", "restore", "run", "serve", "train", "weights"}
LATER = {"models", "trace"}


def environment(repository: Path, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(repository),
        "RESTORAY_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }


def restoray(repository: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.commands.main", *arguments],
        cwd=tmp_path,
        env=environment(repository, tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_lists_exactly_the_commands_and_loads_nothing_heavy(repository: Path, tmp_path: Path) -> None:
    process = restoray(repository, tmp_path, "--help")
    assert process.returncode == 0
    names = {line.split()[0] for line in process.stdout.partition("Commands:")[2].splitlines() if line.strip()}
    assert names & (VERBS | LATER) == VERBS
    heavy = ("torch", "ray", "mlflow", "omegaconf", "cv2", "numpy")
    code = f"import sys, pipelines.commands.main; print([m for m in {heavy} if m in sys.modules])"
    imports = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60, check=True
    )
    assert imports.stdout.strip() == "[]"


def test_dry_run_imports_nothing_slow(repository: Path, tmp_path: Path) -> None:
    words = ["demo", "restored.options.strength=0.5", "scores.metrics=[psnr]", "--dry-run", "--json"]
    code = (
        f"import sys, pipelines.commands.main as cli; cli.build_app()({words}, standalone_mode=False)\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'pyiqa') if m in sys.modules])"
    )
    imports = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env=environment(repository, tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert imports.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["dmeo"], "demo"),
        (["run", "dmeo"], "demo"),
        (["recipes", "instantir-dpc-nano"], "instantir-dcp-nano"),
        (["train", "instantir-dpc-nano", "--dry-run"], "instantir-dcp-nano"),
        (["train", "instantir-dcp-nano", "stepz=3", "--dry-run"], "steps"),
        (["train", "instantir-dcp-nano", "optimizer.lrr=3", "--dry-run"], "lr"),
        (["demo", "dpc.steps=3", "--dry-run"], "dcp"),
        (["demo", "dcp.stepz=3", "--dry-run"], "steps"),
        (["train", "instantir-dcp-nano", "degradation.preset=realesrgn", "--dry-run"], "realesrgan"),
        (["train", "instantir-dcp-nano", "prior=nanoo", "--dry-run"], "nano"),
        (["demo", "--dry-rum"], "--dry-run"),
        (["demo", "--imagse", "x"], "--images"),
    ],
)
def test_typos_get_a_suggestion_and_exit_2(repository: Path, tmp_path: Path, arguments: list[str], near: str) -> None:
    process = restoray(repository, tmp_path, *arguments)
    assert process.returncode == 2, process.stderr
    assert "did you mean" in process.stderr.lower()
    assert near in process.stderr.lower().partition("did you mean")[2]
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "home").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(repository: Path, tmp_path: Path) -> None:
    process = restoray(repository, tmp_path, "run", "demo", "dcp.steps=17", "--dry-run")
    assert process.returncode == 0, process.stderr
    for name in ("corpus", "dcp", "previewer", "tuned", "chosen", "restored", "scores", "service"):
        assert f"{name}-" in process.stdout
    assert "steps: 17" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_as_json_is_one_document_and_silent(repository: Path, tmp_path: Path) -> None:
    process = restoray(repository, tmp_path, "demo", "--dry-run", "--json")
    document = json.loads(process.stdout)
    assert [s["name"] for s in document["stages"]][:2] == ["corpus", "dcp"]
    assert process.stderr == ""


def test_a_resolved_recipe_can_be_run_again(repository: Path, tmp_path: Path) -> None:
    """The output of --dry-run, saved as a file, resolves to itself."""
    first = restoray(repository, tmp_path, "train", "instantir-dcp-nano", "steps=9", "--dry-run")
    assert first.returncode == 0, first.stderr
    (tmp_path / "saved.yaml").write_text(first.stdout)
    second = restoray(repository, tmp_path, "train", "saved.yaml", "--dry-run")
    assert second.stdout == first.stdout
    assert "steps: 9" in first.stdout


def test_recipes_lists_all_shipped_names(repository: Path, tmp_path: Path) -> None:
    document = json.loads(restoray(repository, tmp_path, "recipes", "--json").stdout)
    assert {"realesrgan", "instarevive-bfr", "dra"} <= set(document["degradations"])
    assert document["recipes"] == sorted(p.stem for p in (repository / "pipelines" / "recipes").glob("*.yaml"))
    assert {"demo", "nano-prior"} <= set(document["plans"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "instantir-dcp-nano"], 2, "--out"),
        (["train", "instantir-dcp-nano", "-o", "x", "-i", "corpus"], 2, "NAME=FOLDER"),
        (["train", "instantir-dcp-nano", "-o", "x", "-i", "corpus=nowhere"], 2, "there is no folder nowhere"),
        (["report", "nowhere"], 2, "nowhere is not a run"),
        (["degrade"], 2, "needs IN and OUT"),
        (["degrade", "empty", "sharpen=false"], 2, "needs IN and OUT"),
        (["degrade", "empty", "x"], 2, "holds no pictures"),
        (["degrade", "empty", ""], 2, "the path of out is empty"),
        (["restore", "empty", "--model", "nano", "--out="], 2, "the path of out is empty"),
        (["degrade", "empty", "x", "--preset", "bsrgna"], 2, 'Did you mean "bsrgan"'),
        (["degrade", "--replay", "file"], 2, "holds no records"),
        (["degrade", "--replay", "file", "--seed", "1"], 2, "the records hold them"),
        (["degrade", "--replay", "file", "x"], 2, "IN and OUT, or neither"),
        (["serve", "--model", "models:/nothing@x"], 2, "no model"),
        (["demo", "--images", "nowhere"], 2, "nowhere"),
        (["demo", "--images", "empty"], 2, "no picture"),
        (["demo", "--out", "file/run"], 1, "cannot write to"),
        (["demo", "free_mib=999999999", "--out", "run"], 1, "MiB free"),
    ],
)
def test_bad_input_is_one_sentence(
    repository: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    process = restoray(repository, tmp_path, *arguments)
    assert (process.returncode, message in process.stderr) == (code, True), process.stderr
    assert "Traceback" not in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curate", "demmo", "-o", "x"], 'Did you mean "demo"'),
        (["curate", "folder", "--images", "empty", "-o", "x"], "no picture"),
        (["restore", "empty", "--model", "nano", "-o", "x"], "holds no pictures"),
        (["restore", "one", "--model", "nanoo", "-o", "x"], 'Did you mean "nano"'),
        (["serve", "--model", "nanoo"], 'Did you mean "nano"'),
        (["train", "instantir-dcp-nano", "-o", "x"], "add --input corpus=CORPUS"),
        (["train", "instantir-dcp-nano", "-o", "x", "-i", "corpus=empty"], "neither a corpus"),
    ],
)
def test_bad_input_fails_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    monkeypatch.chdir(tmp_path)
    for module in ("api.corpora", "api.restoration", "api.training", "core.pool", "core.cluster"):  # imported first
        monkeypatch.setattr(f"pipelines.{module}.running_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(UsageError, match=message):
        cli.build_app()(arguments, standalone_mode=False)
    assert not (tmp_path / "x").exists()


def exit_code_of(monkeypatch: pytest.MonkeyPatch, error: BaseException, *more: str) -> int:
    """Exit code of `restoray doctor` when its work raises."""

    def work(out: Path | None) -> None:
        raise error

    monkeypatch.setattr("pipelines.commands.machine.examine", work)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["restoray", "doctor", *more])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(str(exit_info.value.code))


def test_an_interrupted_command_says_that_it_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == f"restoray: {cli.INTERRUPT_MESSAGE}\n"
    assert exit_code_of(monkeypatch, KeyboardInterrupt(), "--json") == 130
    assert json.loads(capsys.readouterr().out) == {"error": cli.INTERRUPT_MESSAGE, "exit_code": 130}


def test_an_operating_system_error_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(monkeypatch, OSError(28, "No space left on device", "some/report.html")) == 1
    assert capsys.readouterr().err == "restoray: some/report.html: No space left on device.\n"


def test_errors_under_json_are_json_too(repository: Path, tmp_path: Path) -> None:
    process = restoray(repository, tmp_path, "run", "dmeo", "--json")
    assert json.loads(process.stdout)["exit_code"] == process.returncode == 2


def test_completion_offers_recipes(repository: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from pipelines.commands.main import build_app; build_app()(prog_name='restoray')"],
        cwd=tmp_path,
        env={
            **environment(repository, tmp_path),
            "_RESTORAY_COMPLETE": "complete_bash",
            "COMP_WORDS": "restoray train instantir-dcp",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "instantir-dcp-nano" in process.stdout.split()


def test_log_lines_are_few_and_include_the_last() -> None:
    lines: list[str] = []
    printer = LinePrinter("work", lines.append)
    for step in range(1, 1001):
        printer(step, 1000)
    assert lines[0].startswith("work: 1/1000") and lines[-1].startswith("work: 1000/1000 (100 %)")
    assert len(lines) == 2


def test_silent_console_prints_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(silent=True)
    console.say("words")
    console.table("t", ["a"], [["b"]])
    with console.bar("bar") as progress:
        progress(1, 2)
    console.result({"a": 1}, ["for people"])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ('{"a": 1}\n', "")


def processes_of(session: int) -> list[str]:
    """Command lines of live processes with this test's marker in their environment."""
    import psutil

    commands = []
    for process in psutil.process_iter():
        try:
            matches = process.environ().get("RR_TEST_MARKER") == str(session)
            if matches and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(" ".join(process.cmdline())[:120])
        except psutil.Error:
            continue
    return commands


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 130, marks=pytest.mark.full),
        pytest.param(
            signal.SIGKILL, -9, marks=pytest.mark.full
        ),  # `make test` has a kill in tests/pipelines/curation/test_curate.py
    ],
)
def test_an_interrupt_leaves_no_process_and_the_command_continues(
    repository: Path, tmp_path: Path, ending: signal.Signals, code: int
) -> None:
    """Ctrl-C, SIGTERM and kill -9 while Ray works leave no orphans, and the same command finishes the job."""
    pictures, out = tmp_path / "pictures", tmp_path / "corpus"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), np.uint8)).save(pictures / f"{number}.png")
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    words = ["curate", "folder", "filters.preset=none", "--images", str(pictures), "--out", str(out)]
    command = [sys.executable, "-m", "pipelines.commands.main", *words]
    marker = os.getpid() * 100 + int(ending)
    variables = {**environment(repository, tmp_path), "RR_TEST_MARKER": str(marker)}
    victim = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 180
        while not any("raylet" in line for line in processes_of(marker)):
            assert victim.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)
        victim.send_signal(ending)
        assert victim.wait(120) == code
    finally:
        victim.kill()
        _, stderr = victim.communicate()
    assert (cli.INTERRUPT_MESSAGE.encode() in stderr) == (code == 130)
    deadline = time.monotonic() + 150
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(marker) == []
    process = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert process.returncode == 3, process.stderr[-2000:]  # the broken picture is quarantined
    assert "12 accepted, 1 quarantined" in process.stdout
