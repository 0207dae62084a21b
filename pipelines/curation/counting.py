"""Counts of the measured parts of a curation, and the end of a run with too many broken pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from components.corpora import CorpusSpec
from pipelines.core.errors import Failure

NOT_BROKEN = frozenset({"too_small", "too_large", "small_file", "aspect", "animated", "robots"})
"""Codes of intact pictures that the spec excludes; they do not count for max_bad_fraction."""

JUDGED_FROM = 64  # candidates before max_bad_fraction may end a run early; at the end it counts for any number


class Count:
    """Counts of the measured parts: a line of progress, and the check of max_bad_fraction.

    Attributes:
        parts, has_all: number of parts that are listed, and whether these are all.
    """

    def __init__(self, spec: CorpusSpec) -> None:
        self.spec, self.rows, self.codes, self.measured = spec, 0, Counter[str](), 0
        self.parts, self.has_all = 0, False

    def add(self, summary: Mapping[str, Any]) -> None:
        """Add a part."""
        self.measured += 1
        self.rows += summary["rows"]
        self.codes.update(summary["codes"])

    def note(self) -> str:
        """The counts in one line."""
        reasons = ", ".join(f"{count} {code}" for code, count in self.codes.most_common(4))
        return f"{self.rows} pictures" + (f"; refused: {reasons}" if reasons else "")

    def check(self, early: bool) -> None:
        """Raise a Failure with a table of reasons if too many pictures are broken."""
        if early and not self.has_all:
            return
        broken = sum(count for code, count in self.codes.items() if code not in NOT_BROKEN)
        if broken == self.rows and not early:
            return  # the error "none is usable" is clearer
        # Early only if intact pictures in all other parts would not help: the end must not depend on the parts' order.
        expected = self.rows * self.parts / max(1, self.measured) if early else self.rows
        if (early and self.rows < JUDGED_FROM) or broken <= self.spec.max_bad_fraction * expected:
            return
        table = "\n".join(f"  {count:>8}  {code}" for code, count in self.codes.most_common())
        raise Failure(
            f"{broken} of the first {self.rows} pictures of {self.spec.name} are broken, over max_bad_fraction "
            f"{self.spec.max_bad_fraction:g}:\n{table}"
        )
