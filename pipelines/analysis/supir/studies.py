"""The table of SUPIR's studies."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.analysis.study import Study
from pipelines.analysis.supir.encoder import analyze_encoder, open_encoder

SUPIR_STUDIES: Mapping[str, Study] = {"encoder": Study(open=open_encoder, run=analyze_encoder)}
