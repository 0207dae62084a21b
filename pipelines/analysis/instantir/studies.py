"""The table of InstantIR's studies."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.analysis.instantir.creative import analyze_creative
from pipelines.analysis.instantir.previews import analyze_previews
from pipelines.analysis.instantir.questions import analyze_crowded, analyze_time
from pipelines.analysis.instantir.subject import open_subject
from pipelines.analysis.instantir.tokens import analyze_tokens
from pipelines.analysis.study import Study

INSTANTIR_STUDIES: Mapping[str, Study] = {
    "previews": Study(open=open_subject, run=analyze_previews),
    "tokens": Study(open=open_subject, run=analyze_tokens),
    "creative": Study(open=open_subject, run=analyze_creative),
    "time": Study(open=open_subject, run=analyze_time),
    "crowded": Study(open=open_subject, run=analyze_crowded),
}
