"""`restoray weights pack`: a training stage of a run as a small model folder, from which its training can go on."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.core.errors import UsageError, unknown
from pipelines.runs.plan import load_plan
from pipelines.runs.records import PlannedStage
from pipelines.training.packing import Packed, Trained, pack_stage, picture_list


def pack_run(
    run: Path,
    stage: str,
    out: Path,
    card: Path | None = None,
    credits_file: Path | None = None,
    licence: str = "unstated",
    permitted_use: str = "unstated",
    state_of: str = "",
    eight_bit: int = 0,
) -> Packed:
    """Pack the newest checkpoint of a run's stage, with the list of its pictures.

    Args:
        run: the run's folder.
        stage: name of the stage in the plan; "" for the last one with a checkpoint.
        out: the model folder; replaced.
        card: a text for files/CARD.md.
        credits_file: a CSV with the columns file, licence and credit, for pictures whose source has none.
        licence, permitted_use: of the weights.
        eight_bit: number of the largest matrices that are stored in 8 bits.
        state_of: name of an earlier stage whose state is packed instead; "" for the stage's own.

    Raises:
        UsageError: `run` is no run of a plan, or has no such stage.
        Failure: the stage has no checkpoint.
    """
    try:
        document: dict[str, Any] = json.loads((run / "plan.json").read_bytes())
        plan = load_plan(document.get("file") or document["plan"], document["overrides"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run} is not a run: its plan.json cannot be read ({type(error).__name__}).") from error
    trained = {planned.name: planned for planned in plan.stages if planned.recipe is not None}
    begun = [name for name, planned in trained.items() if any((run / planned.folder).glob("ray/run/checkpoint_*"))]
    for name in filter(None, (stage, state_of)):
        if name not in trained:
            raise unknown("training stage", name, trained)
    if not stage and not begun:
        raise UsageError(f"no training stage of {run} has a checkpoint.")

    def needs_of(name: str) -> list[PlannedStage]:
        return [other for other in plan.stages if other.name in trained[name].needs]

    def stage_of(name: str) -> Trained:
        models = {str(o.recipe.stage): run / o.folder / "model" for o in needs_of(name) if o.recipe is not None}
        return Trained(recipe=trained[name].recipe, inputs=models, folder=run / trained[name].folder)

    name = stage or begun[-1]
    corpora = [run / other.folder for other in needs_of(name) if (run / other.folder / "index.json").is_file()]
    credited = _credits(credits_file) if credits_file is not None else {}
    files = {"pictures.jsonl": "".join(picture_list(corpus, credited) for corpus in corpora)}
    if card is not None:
        files["CARD.md"] = card.read_text(encoding="utf-8")
    own, kept = stage_of(name), stage_of(state_of) if state_of else None
    return pack_stage(own.recipe, own.inputs, own.folder, out, files, licence, permitted_use, kept, eight_bit)


def _credits(path: Path) -> Mapping[str, tuple[str, str]]:
    """(licence, credit) by file name."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            if not {"file", "licence", "credit"} <= set(rows.fieldnames or ()):
                raise UsageError(f"{path} has no columns file, licence and credit.")
            return {row["file"]: (row["licence"] or "", row["credit"] or "") for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}).") from error
