"""Tracking on a real sqlite store: runs continue, outages are replayed, models resolve to folders."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipelines.core.errors import Failure, UsageError
from pipelines.core.metrics import tail_metrics
from pipelines.runs.tracking import ARTIFACTS, BACKLOG, REFUSED, Tracker, flatten, resolve

DIGEST = "ab" * 32


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for the module: creating its tables takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    Tracker(folder, "tests").start_parent("warm-up")
    return folder


def raw(store, query, *values):
    """Query the database directly, so that a check does not use the code under test."""
    connection = sqlite3.connect(store / "mlflow.db")
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


def status(store, run):
    return raw(store, "select status from runs where run_uuid = ?", run)[0][0]


def lock(store):
    connection = sqlite3.connect(store / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def model_folder(folder, **metrics):
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "unet.safetensors").write_bytes(b"weights")
    (folder / "model.json").write_text(json.dumps({"format": 1, "metrics": metrics}))
    return folder


def test_operations_are_stored(store, tmp_path):
    tracker = Tracker(store, "tests")
    parent = tracker.start_parent("operations", {"plan": "demo"})
    run = tracker.start_child(parent, "dcp", DIGEST)
    tracker.log_params(run, {"optimizer": {"lr": 1e-4}, "steps": 5})
    tracker.log_metrics(
        run, [(i, "loss", 1 / (i + 1), 1e9 + i) for i in range(2500)] + [(9, "odd!name", float("nan"), 1e9)]
    )
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "step-3.png")
    tracker.log_image(run, tmp_path / "step-3.png", "triplet", 3)
    tracker.log_artifact(run, tmp_path / "step-3.png", "samples")
    tracker.log_dataset_digest(run, "demo corpus", DIGEST)
    tracker.finish(run)
    tracker.finish(parent, "FAILED")

    assert not tracker.backlog.exists()
    assert dict(raw(store, "select key, value from params where run_uuid = ?", run)) == {
        "optimizer.lr": "0.0001",
        "steps": "5",
    }
    rows = raw(store, "select step, value, timestamp from metrics where run_uuid = ? and key = 'loss'", run)
    assert len(rows) == 2500
    assert (7, 1 / 8, (10**9 + 7) * 1000) in rows
    assert raw(store, "select is_nan from metrics where run_uuid = ? and key = 'odd_name'", run) == [(1,)]
    tags = dict(raw(store, "select key, value from tags where run_uuid = ?", run))
    assert tags["mlflow.parentRunId"] == parent
    assert (tags["restoray.stage"], tags["restoray.digest"]) == ("dcp", DIGEST)
    assert tags["restoray.dataset.demo corpus"] == DIGEST
    assert raw(store, "select count(*) from datasets where digest = ?", DIGEST[:32]) == [(1,)]
    assert list((store / ARTIFACTS).rglob("samples/step-3.png"))
    assert any("triplet" in path.name for path in (store / ARTIFACTS).rglob("images/*"))
    assert (status(store, run), status(store, parent)) == ("FINISHED", "FAILED")


def test_a_second_start_continues_the_same_runs(store):
    first = Tracker(store, "tests")
    parent = first.start_parent("again")
    run = first.start_child(parent, "dcp", DIGEST)
    other = first.start_child(parent, "dcp", "cd" * 32)
    first.log_params(run, {"workers": 1, "seed": 7})
    second = Tracker(store, "tests")
    assert second.start_parent("again") == parent
    assert (status(store, parent), status(store, run)) == ("RUNNING", "KILLED")  # the first tracker left it open
    assert second.start_child(parent, "dcp", DIGEST) == run
    assert (status(store, run), status(store, other)) == ("RUNNING", "KILLED")
    second.log_params(run, {"workers": 2, "seed": 7})
    assert dict(raw(store, "select key, value from params where run_uuid = ?", run)) == {"workers": "1", "seed": "7"}
    assert ("2",) in raw(store, "select value from tags where run_uuid = ? and key = 'changed.workers'", run)
    assert second.sweep(parent) == []  # its own runs are not swept


def test_metrics_logged_twice_are_stored_once(store):
    tracker = Tracker(store, "tests")
    run = tracker.start_child(tracker.start_parent("twice"), "dcp", DIGEST)
    rows = [(i, "loss", float(i), 1e9) for i in range(50)]
    tracker.log_metrics(run, rows[:30])
    tracker.log_metrics(run, rows)  # a resumed driver reads metrics.jsonl from its start
    assert raw(store, "select count(*) from metrics where run_uuid = ?", run) == [(50,)]


def test_a_picture_logged_twice_is_stored_once(store, tmp_path):
    picture = tmp_path / "step-000001.png"
    Image.new("RGB", (8, 8)).save(picture)
    for _ in range(2):  # a resumed driver finds the samples of the earlier one
        tracker = Tracker(store, "tests")
        run = tracker.start_child(tracker.start_parent("pictures"), "dcp", DIGEST)
        tracker.log_image(run, picture, "samples", 1)
        tracker.log_image(run, picture, "samples", 2)
    files = list((store / ARTIFACTS / run).rglob("*.png"))
    assert len(files) == 2


def test_a_locked_store_costs_nothing_and_is_replayed(store):
    warnings = []
    tracker = Tracker(store, "tests", warn=warnings.append, lock_timeout_s=0.05)
    parent = tracker.start_parent("outage")
    early = tracker.start_child(parent, "curate", DIGEST)
    holder = lock(store)
    late = tracker.start_child(parent, "dcp", DIGEST)
    tracker.log_params(late, {"steps": 5})
    tracker.log_metrics(late, [(1, "loss", 0.5, 1e9)])
    tracker.log_metrics(early, [(1, "kept", 31.0, 1e9)])
    tracker.finish(late)
    holder.close()
    assert late.startswith("pending-")
    assert len(warnings) == 1  # once for the outage, not once for each call
    assert len((store / BACKLOG).read_text().splitlines()) == 5
    with (store / BACKLOG).open("a") as stream:
        stream.write('{"op": "metri')  # a kill inside the last line

    follower = Tracker(store, "tests")
    assert follower.replay_backlog() == 5
    assert not (store / BACKLOG).exists()
    [(run,)] = raw(store, "select run_uuid from tags where key = ? and value = 'yes'", f"restoray.{late}")
    assert raw(store, "select value from metrics where run_uuid = ?", run) == [(0.5,)]
    assert raw(store, "select value from metrics where run_uuid = ?", early) == [(31.0,)]
    assert status(store, run) == "FINISHED"
    tracker.log_metrics(late, [(2, "loss", 0.4, 1e9)])  # within the retry interval, so it goes to the backlog
    assert follower.replay_backlog() == 1
    assert (0.4,) in raw(store, "select value from metrics where run_uuid = ?", run)


def test_an_operation_that_a_healthy_store_refuses_does_not_block_the_others(store):
    tracker = Tracker(store, "tests", warn=lambda text: None)
    run = tracker.start_child(tracker.start_parent("refused"), "dcp", DIGEST)
    tracker.log_artifact(run, store / "no-such-file.png")
    tracker.log_metrics(run, [(1, "loss", 0.5, 1e9)])
    assert raw(store, "select value from metrics where run_uuid = ?", run) == [(0.5,)]
    assert tracker.replay_backlog() == 0
    assert not (store / BACKLOG).exists()
    [line] = (store / REFUSED).read_text().splitlines()
    assert json.loads(line)["op"] == "artifact"


def test_a_store_that_never_opens_never_raises(tmp_path):
    (tmp_path / "mlflow.db").mkdir()
    warnings = []
    tracker = Tracker(tmp_path, "tests", warn=warnings.append)
    run = tracker.start_child(tracker.start_parent("demo"), "dcp", DIGEST)
    tracker.log_metrics(run, [(1, "loss", 0.5, 1e9)])
    assert tracker.register_model(run, model_folder(tmp_path / "m"), "nano") is None
    assert tracker.sweep(run) == []
    tracker.finish(run)
    assert len(warnings) == 1
    assert len((tmp_path / BACKLOG).read_text().splitlines()) == 5
    with pytest.raises(Failure, match="no MLflow store"):
        tracker.resolve("models:/nano@latest")
    (tmp_path / "mlflow.db").rmdir()
    assert Tracker(tmp_path, "tests").replay_backlog() == 5
    assert (resolve("models:/nano@candidate", tmp_path) / "parts" / "unet.safetensors").read_bytes() == b"weights"


def test_models_resolve_to_whole_folders(store, tmp_path):
    tracker = Tracker(store, "tests")
    run = tracker.start_child(tracker.start_parent("models"), "dcp", DIGEST)
    one, two = model_folder(tmp_path / "one", psnr=20.5, heldout={"loss": 0.3}), model_folder(tmp_path / "two", psnr=21)
    assert tracker.register_model(run, one, "nano") == 1
    assert tracker.register_model(run, two, "nano") == 2
    assert tracker.register_model(run, one, "nano") == 1  # the same model again
    for address, origin in {"@latest": two, "": two, "/1": one, "@candidate": one}.items():
        folder = tracker.resolve(f"models:/nano{address}")
        assert (folder / "model.json").read_bytes() == (origin / "model.json").read_bytes()
        assert (folder / "parts" / "unet.safetensors").read_bytes() == b"weights"
    tracker.set_alias("nano", "champion", 2)
    assert tracker.resolve("models:/nano@champion") == tracker.resolve("models:/nano/2")
    metrics = raw(store, "select metric_name, metric_value from logged_model_metrics where run_id = ?", run)
    assert {("psnr", 20.5), ("heldout.loss", 0.3), ("psnr", 21.0)} <= set(metrics)


def test_resolving_refuses_unknown_addresses_and_changed_models(store, tmp_path):
    tracker = Tracker(store, "tests")
    run = tracker.start_child(tracker.start_parent("absent"), "dcp", DIGEST)
    tracker.register_model(run, model_folder(tmp_path / "one"), "tiny")
    for address, words in {
        "models:/tinny@latest": 'Did you mean "tiny"',
        "models:/tiny@champion": "unknown alias of tiny",
        "models:/tiny/9": "unknown version of tiny",
        "models:/../../etc": "is not a model address",
        "tiny": "is not a model address",
    }.items():
        with pytest.raises(UsageError, match=words):
            tracker.resolve(address)
    folder = tracker.resolve("models:/tiny/1")
    (folder / "model.json").write_text("{}")
    with pytest.raises(Failure, match="was changed"):
        tracker.resolve("models:/tiny/1")
    (folder / "model.json").unlink()
    with pytest.raises(Failure, match="does not exist"):
        tracker.resolve("models:/tiny/1")
    with pytest.raises(Failure, match="not a model folder"):
        tracker.register_model(run, tmp_path, "tiny")
    with pytest.raises(Failure, match="cannot name a model"):
        tracker.register_model(run, tmp_path / "one", "x' or '1")


def test_the_next_driver_sweeps_the_runs_of_a_killed_one(store):
    code = (
        "import os, signal, sys; from pathlib import Path; from pipelines.runs.tracking import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), 'tests'); parent = tracker.start_parent('killed')\n"
        "print(parent, tracker.start_child(parent, 'dcp', 'ef' * 32), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    # an empty working directory: MLflow's default store must not appear there
    place = store.parent / "cwd"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.run(
        [sys.executable, "-c", code, str(store)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    parent, run = process.stdout.split()
    assert process.returncode == -9
    assert "alembic" not in process.stderr
    assert list(place.iterdir()) == []
    assert status(store, run) == "RUNNING"
    assert Tracker(store, "tests").sweep(parent) == [run]
    assert status(store, run) == "KILLED"


def test_importing_is_free_of_mlflow_and_a_tracker_makes_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; import pipelines.runs.tracking as t\n"
        "t.Tracker(Path(sys.argv[1]) / 'out'); assert 'mlflow' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_status_must_be_valid(tmp_path):
    with pytest.raises(ValueError, match="FINISHED, FAILED or KILLED"):
        Tracker(tmp_path).finish("run", "DONE")


def test_tail_reads_whole_new_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert tail_metrics(path) == ([], 0)
    line = '{"step": 1, "name": "loss", "value": 0.5, "time": 10.0}\n'
    path.write_text(line + '{"step": 2, "na')
    rows, offset = tail_metrics(path)
    assert rows == [(1, "loss", 0.5, 10.0)]
    assert offset == len(line)
    assert tail_metrics(path, offset) == ([], offset)
    with path.open("a") as stream:
        stream.write('me": "loss", "value": 0.25, "time": 11.0}\nnot json\n{"step": 3}\n')
    rows, offset = tail_metrics(path, offset)
    assert rows == [(2, "loss", 0.25, 11.0)]
    assert offset == path.stat().st_size
    path.write_text(line)  # the stage started again
    assert tail_metrics(path, offset)[0] == [(1, "loss", 0.5, 10.0)]


def test_flatten_keeps_lists():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, {"e": 2}], "f": {}}) == {"a.b.c": 1, "d": [1, {"e": 2}]}


@pytest.mark.parametrize("name", ["My%20run", "what?", "a#b;c&d=e", "q'\"x é+ a@b:c", "100%"])
def test_a_store_may_lie_in_a_folder_of_any_name(store, tmp_path, name):
    """SQLAlchemy reads "%20" and "?" in an address; MLflow would retry for minutes, or write to another file."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(store / "mlflow.db", folder / "mlflow.db")  # making the tables takes seconds
    tracker = Tracker(folder, "in a new folder", warn=pytest.fail)
    run = tracker.start_child(tracker.start_parent("named"), "dcp", DIGEST)
    tracker.log_artifact(run, __file__)
    assert status(folder, run) == "RUNNING"
    assert [path.name for path in tmp_path.iterdir()] == [name], "MLflow made another folder"
    assert list((folder / ARTIFACTS).rglob(Path(__file__).name)), "the artifact lies elsewhere"
    if name == "My%20run":
        tracker.register_model(run, model_folder(tmp_path / "a?b" / "model"), "named")
        copy = resolve("models:/named@candidate", folder)
        assert copy.is_relative_to(folder)
        assert (copy / "parts" / "unet.safetensors").read_bytes() == b"weights"


def test_a_folder_whose_name_is_not_text_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match=r"caf\\xe9.* is not UTF-8 text"):
        Tracker(tmp_path / os.fsdecode(b"caf\xe9"))
