"""`restoray doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.words import Json
from pipelines.core.console import Console
from pipelines.core.errors import EXIT_FAILURE


def doctor(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder of the results of a run.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Instead: will a restoration with this model fit in memory?")
    ] = None,
    size: Annotated[str, typer.Option(help="With --model: WIDTHxHEIGHT at which its networks run.")] = "1024x1024",
    memory: Annotated[
        float | None, typer.Option(help="With --model: GiB of the device; the default is this machine's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for problems that would stop a run, with advice for each."""
    from pipelines.commands.machine import examine, finding_lines

    if model is not None:
        from pipelines.commands.model_memory import examine_model

        findings = examine_model(model, size, memory)
    else:
        findings = examine(out)
    failed = any(finding.status == "fail" for finding in findings)
    document = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
    Console(silent=as_json).result(document, finding_lines(findings))
    raise typer.Exit(EXIT_FAILURE if failed else 0)
