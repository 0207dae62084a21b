"""A plan's run in MLflow: a parent run, a child run for each stage, and the metrics and samples of each stage.

Workers only write files (metrics.jsonl, samples/step-*.png), and a thread of the driver reads them. So workers do not
need MLflow, and a store that is down does not affect a training.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.writing import replace_file
from pipelines.core.metrics import tail_metrics
from pipelines.runs.tracking import DATABASE, Tracker, store_uri

if TYPE_CHECKING:
    from pipelines.runs.records import PlannedStage, PlanResult

POLL_S = 3.0
PUBLISHED = "published.json"
SAMPLE = re.compile(r"step-0*(\d+)")


class RunTracking:
    """The parent run of one driver; use as a context manager."""

    def __init__(self, run_dir: Path, plan: str) -> None:
        self.run_dir, self.plan = run_dir, plan
        self.location = store_uri(run_dir / DATABASE)
        self.children: dict[str, str] = {}

    def __enter__(self) -> RunTracking:
        (self.run_dir / PUBLISHED).unlink(missing_ok=True)  # the store may be new; `publish` writes the file again
        self.tracker = Tracker(self.run_dir, self.plan)
        self.parent = self.tracker.start_parent(self.plan, {"plan": self.plan, "run_dir": str(self.run_dir)})
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.tracker.finish(self.parent, end_status(kind))

    @contextmanager
    def stage(self, stage: PlannedStage, folder: Path) -> Iterator[str]:
        """Open a child run around one stage; yields its id."""
        run = self.tracker.start_child(self.parent, stage.name, stage.digest)
        self.children[stage.name] = run
        self.tracker.log_params(run, {"verb": stage.verb, "digest": stage.digest, **stage.resolved})
        follower = Follower(self.tracker, run, folder)
        follower.start()
        kind: type[BaseException] | None = None
        try:
            yield run
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            follower.stop()
            self.tracker.finish(run, end_status(kind))

    def publish(self, result: PlanResult) -> None:
        """Register the run's last model and log its data with the parent run, also for stages that were done before."""
        document = publication(result)
        for name, digest in document["data"].items():
            self.tracker.log_dataset_digest(self.parent, name, digest)
        last = result.last_model()
        if last is not None:
            folder = result.run_dir / last.stage.folder
            if (
                last.stage.name not in self.children
            ):  # an earlier driver trained it: continue its run, or make a new one
                with self.stage(last.stage, folder):
                    pass
            name = json.loads((folder / "model" / "model.json").read_text()).get("name") or self.plan
            self.tracker.register_model(self.children[last.stage.name], folder / "model", name)
        if not self.tracker.backlog.exists():
            replace_file(self.run_dir / PUBLISHED, json.dumps(document).encode())


def publication(result: PlanResult) -> dict[str, Any]:
    """What MLflow must hold of a finished run: sha256 of the last model's model.json, and the corpora's digests."""
    last = result.last_model()
    model = last and result.run_dir / last.stage.folder / "model" / "model.json"
    digests = {record.stage.name: record.results.get("manifest_digest") for record in result.stages}
    return {
        "model": model and hashlib.sha256(model.read_bytes()).hexdigest(),
        "data": {name: digest for name, digest in digests.items() if digest},
    }


def is_published(result: PlanResult) -> bool:
    """Whether MLflow holds the publication; a file in the run's folder records it, because a query takes seconds."""
    document, path = publication(result), result.run_dir / PUBLISHED
    if document == {"model": None, "data": {}}:
        return True
    try:
        return (result.run_dir / DATABASE).is_file() and json.loads(path.read_text()) == document
    except (OSError, ValueError):
        return False


class Follower:
    """Copies a stage's metrics.jsonl and samples/ into its MLflow run, every POLL_S seconds."""

    def __init__(self, tracker: Any, run: str, folder: Path) -> None:
        self.tracker, self.run, self.folder = tracker, run, folder
        self.offset, self.logged_samples = 0, set[str]()
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self.follow, name="follow-metrics", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread and copy the rest."""
        self.stop_event.set()
        self.thread.join()
        self.copy()

    def follow(self) -> None:
        """The thread's loop."""
        while not self.stop_event.wait(POLL_S):
            self.copy()

    def copy(self) -> None:
        """Copy new metric rows and samples."""
        rows, self.offset = tail_metrics(self.folder / "metrics.jsonl", self.offset)
        if rows:
            self.tracker.log_metrics(self.run, rows)
        for path in sorted((self.folder / "samples").glob("step-*.png")):
            match = SAMPLE.match(path.stem)
            if match and path.name not in self.logged_samples:
                self.logged_samples.add(path.name)
                self.tracker.log_image(self.run, path, "samples", int(match[1]))


def end_status(kind: type[BaseException] | None) -> str:
    """MLflow's status of a block that ended with an exception of this class, or with None."""
    if kind is None:
        return "FINISHED"
    return "FAILED" if issubclass(kind, Exception) else "KILLED"
