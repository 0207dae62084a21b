"""The records of a run: a resolved plan, its stages, and each stage's state and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core.errors import EXIT_OK, EXIT_QUARANTINED


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One resolved stage.

    Attributes:
        needs: names of the stages whose folders it reads.
        settings: the verb's settings dataclass.
        recipe: the recipe of a train stage, else None.
        resolved: settings and recipe as plain data, for people and for the report.
        digest: sha256 in hex.
        version: of the verb or of the training stage; part of the digest.
        folder: its name below the run's folder.
    """

    name: str
    verb: str
    needs: tuple[str, ...]
    settings: Any
    recipe: Any
    resolved: Mapping[str, Any]
    digest: str
    version: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved plan.

    Attributes:
        title: one line for people.
        free_mib: free disk space that the run needs before it starts.
        origin: file ("" if shipped) and overrides, from which the report builds the run's command.
    """

    name: str
    title: str
    free_mib: int
    stages: tuple[PlannedStage, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class StageRecord:
    """A stage in this run; `state` is planned, done (skipped), running, finished, failed or interrupted."""

    stage: PlannedStage
    state: str = "planned"
    seconds: float = 0.0
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PlanResult:
    """The result of a plan's run; a path is None if the run has no such file or folder."""

    plan: str
    run_dir: Path
    stages: list[StageRecord]
    seconds: float = 0.0
    report: Path | None = None
    model: Path | None = None
    tracking: str | None = None
    dry_run: bool = False

    @property
    def quarantined(self) -> int:
        """Number of rejected samples of all stages, including stages that were done before."""
        return sum(int(record.results.get("quarantined", 0)) for record in self.stages)

    @property
    def verdict(self) -> str:
        """The last stage's sentence about the scores; "" without one."""
        return next((str(r.results["verdict"]) for r in reversed(self.stages) if r.results.get("verdict")), "")

    def last_model(self) -> StageRecord | None:
        """The last stage whose folder holds a model; None without one."""
        folders = ((record, self.run_dir / record.stage.folder) for record in reversed(self.stages))
        return next((record for record, folder in folders if (folder / "model" / "model.json").is_file()), None)

    @property
    def exit_code(self) -> int:
        return EXIT_QUARANTINED if self.quarantined else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """The document for --json."""
        return {
            "plan": self.plan,
            "run": str(self.run_dir),
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 1),
            "report": self.report and str(self.report),
            "model": self.model and str(self.model),
            "tracking": self.tracking,
            "quarantined": self.quarantined,
            "verdict": self.verdict,
            "stages": [stage_json(record) for record in self.stages],
        }

    def lines(self) -> list[str]:
        """The last lines that a run prints."""
        lines = [f"Run        {self.run_dir}"]
        for label, value in (("Report", self.report), ("Model", self.model), ("MLflow", self.tracking)):
            if value:
                lines.append(f"{label:<10} {value}")
        if self.quarantined:
            lines.append(f"Quarantine {self.quarantined} samples were refused; the report has the reasons.")
        if self.verdict:
            lines.append(f"Scores     {self.verdict}")
        return lines


def stage_json(record: StageRecord) -> dict[str, Any]:
    """One stage, for plan.json and --json."""
    stage = record.stage
    return {
        "name": stage.name,
        "verb": stage.verb,
        "needs": list(stage.needs),
        "digest": stage.digest,
        "version": stage.version,
        "folder": stage.folder,
        "state": record.state,
        "skipped": record.state == "done",
        "seconds": round(record.seconds, 3),
        "resolved": dict(stage.resolved),
    }
