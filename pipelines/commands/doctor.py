"""`restoray doctor`."""

from __future__ import annotations

import dataclasses

import typer

from pipelines.commands.words import Json, Out
from pipelines.core.console import Console
from pipelines.core.errors import EXIT_FAILURE


def doctor(
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Look for problems that would stop a run, with advice for each."""
    from pipelines.commands.machine import examine, finding_lines

    findings = examine(out)
    failed = any(finding.status == "fail" for finding in findings)
    document = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
    Console(silent=as_json).result(document, finding_lines(findings))
    raise typer.Exit(EXIT_FAILURE if failed else 0)
