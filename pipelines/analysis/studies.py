"""`restoray analyze`: the dictionary of studies. See docs/insight.md.

A study opens a model for its job and measures it on a folder of some dozens of pictures, in this process. Studies of
any model stand next to this file; studies of one system's networks stand in a folder of that system.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.images import Limits
from pipelines.analysis import levels as lv
from pipelines.analysis.arms import analyze_arms
from pipelines.analysis.instantir.studies import INSTANTIR_STUDIES
from pipelines.analysis.model import StudyJob, open_whole
from pipelines.analysis.seeds import analyze_seeds
from pipelines.analysis.study import Study, StudyResult, list_study_pictures
from pipelines.analysis.supir.studies import SUPIR_STUDIES
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError, unknown

STUDIES: Mapping[str, Study] = {
    **INSTANTIR_STUDIES,
    **SUPIR_STUDIES,
    "seeds": Study(open=open_whole, run=analyze_seeds),
    "arms": Study(open=open_whole, run=analyze_arms),
}

ARM_STUDIES = ("arms", *SUPIR_STUDIES)
"""Studies that compare arms, so that a plan's stage can run them on the models of other stages."""


def analyze(study: str, job: StudyJob, progress: Progress = no_progress, **settings: Any) -> StudyResult:
    """Run one study.

    Args:
        study: a name in STUDIES.
        job: the model, the pictures and where the results go.
        settings: the study's own settings: mixed, faults, stop, seeds, arms, metrics, captioner, paper.

    Raises:
        UsageError: the study, an option or a preset is unknown, there are no pictures, the model's system does not fit
            the study, or the output folder holds another study.
        Failure: the model cannot be loaded, or no picture could be measured.
    """
    if study not in STUDIES:
        raise unknown("study", study, STUDIES)
    if job.side_px < Limits().min_side_px:
        raise UsageError(f"--side must be at least {Limits().min_side_px} px, got {job.side_px}")
    list_study_pictures(job.images, job.out, job.limit)  # raises before the model is loaded
    lv.quality_levels(str(settings.get("mixed", "realesrgan")))  # raises too
    entry = STUDIES[study]
    return entry.run(entry.open(job), progress=progress, **settings)
