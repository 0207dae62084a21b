"""`restoray doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.findings import Finding, fail, finding_lines
from pipelines.commands.packages import check_packages
from pipelines.commands.words import Address, Json
from pipelines.core.console import Console
from pipelines.core.errors import EXIT_FAILURE, UsageError


def doctor(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder of the results of a run.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Instead: will a restoration with this model fit in memory?")
    ] = None,
    size: Annotated[str, typer.Option(help="With --model: WIDTHxHEIGHT at which its networks run.")] = "1024x1024",
    memory: Annotated[
        float | None, typer.Option(help="With --model: GiB of the device; the default is this machine's.")
    ] = None,
    licences: Annotated[
        bool, typer.Option("--licences", help="Instead: the terms of all packages, weights and corpora.")
    ] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Look for problems of this machine, or of the cluster at --address, that would stop a run, with advice."""
    if licences:
        if model is not None:
            raise UsageError("--licences and --model answer two questions: give one of them")
        from pipelines.commands.licences import licence_lines, list_terms

        terms = list_terms()
        Console(silent=as_json).result({"terms": [dataclasses.asdict(each) for each in terms]}, licence_lines(terms))
        return
    if model is not None:
        from pipelines.commands.model_memory import examine_model

        findings = examine_model(model, size, memory)
    elif address is not None:
        from pipelines.commands.cluster_doctor import examine_cluster

        findings = examine_cluster(out)
    else:
        findings = _examine(out)
    failed = any(finding.status == "fail" for finding in findings)
    document = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
    Console(silent=as_json).result(document, finding_lines(findings))
    raise typer.Exit(EXIT_FAILURE if failed else 0)


def _examine(out: Path | None) -> list[Finding]:
    """Every check. Those of the packages come first: the others may not even be imported without them."""
    findings = check_packages()
    try:
        from pipelines.commands.machine import examine
    except ImportError as error:
        return [*findings, fail("machine", f"the other checks need a package: {error}", "First repair the packages.")]
    return findings + examine(out)
