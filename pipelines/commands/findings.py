"""What a check of `restoray doctor` says. Standard library only: the checks run also where packages are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check: its status, what the check saw, and advice unless the status is ok."""

    check: str
    status: Status
    seen: str
    advice: str = ""


def ok(check: str, observation: str) -> Finding:
    return Finding(check=check, status="ok", seen=observation)


def warn(check: str, observation: str, advice: str) -> Finding:
    return Finding(check=check, status="warn", seen=observation, advice=advice)


def fail(check: str, observation: str, advice: str) -> Finding:
    return Finding(check=check, status="fail", seen=observation, advice=advice)


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings as lines: one line each, and one more for advice."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.check:<14} {finding.seen}")
        if finding.advice:
            lines.append(f"      {'':<14} -> {finding.advice}")
    return lines
