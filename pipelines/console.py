"""What people see while work goes on: bars in a terminal, plain lines in a log, nothing under --json.

A verb gets a `Console` and calls `say`, `warn` and `bar`; `bar` gives a `Progress` to call with (done, of, note).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

LINE_INTERVAL_S = 10.0
"""A log gets at most one progress line in this time for each bar, besides its last."""


class Progress(Protocol):
    """Told how far a piece of work is: done and of in any one unit; of 0 means unknown."""

    def __call__(self, done: int, of: int = 0, note: str = "") -> None: ...


def no_progress(done: int, of: int = 0, note: str = "") -> None:
    """A Progress for callers that nobody watches."""


class Console:
    """Human output on `stream` (standard error, so that standard output stays for results).

    Args:
        silent: --json: say nothing; `result` alone prints.
        stream: where words go; a terminal gets live bars.
    """

    def __init__(self, silent: bool = False, stream: TextIO | None = None) -> None:
        self.silent, self.stream = silent, stream or sys.stderr
        self.live = not silent and self.stream.isatty()
        self._bars: Any = None

    def say(self, text: str) -> None:
        """One line of progress in words."""
        if self.silent:
            return
        if self._bars is not None:  # printing through the live display keeps the bar below the line
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def warn(self, text: str) -> None:
        """One line that should not be overlooked."""
        self.say(f"warning: {text}")

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """A progress bar for one piece of work; bars do not nest."""
        if self.silent:
            yield no_progress
        elif self.live:
            with self._live_bar(title) as progress:
                yield progress
        else:
            yield LinePrinter(title, self.say)

    @contextmanager
    def _live_bar(self, title: str) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = [
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        with Bars(*columns, console=RichConsole(file=self.stream), transient=False) as bars:
            task, self._bars = bars.add_task(title, total=None, note=""), bars
            try:
                yield lambda done, of=0, note="": bars.update(task, completed=done, total=of or None, note=note)
            finally:
                self._bars = None

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table; in a log the columns are padded text."""
        if self.silent:
            return
        cells = [[str(cell) for cell in row] for row in rows]
        widths = [
            max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(columns)
        ]
        self.say(title)
        for row in [list(columns), *cells]:
            self.say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def result(self, document: Mapping[str, Any], lines: Sequence[str] = ()) -> None:
        """The command's answer on standard output: one JSON document under --json, else its lines."""
        text = json.dumps(document, ensure_ascii=False, default=str) if self.silent else "\n".join(lines)
        if text:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


class LinePrinter:
    """A Progress for logs: one line at the start, one every LINE_INTERVAL_S, and one when done reaches of."""

    def __init__(self, title: str, say: Any) -> None:
        self.title, self.say = title, say
        self.start, self.last, self.finished = time.monotonic(), float("-inf"), False

    def __call__(self, done: int, of: int = 0, note: str = "") -> None:
        now = time.monotonic()
        complete = bool(of) and done >= of
        if (complete and self.finished) or (not complete and now - self.last < LINE_INTERVAL_S):
            return
        self.last, self.finished = now, complete
        share = f"{done}/{of} ({100 * done // of} %)" if of else str(done)
        self.say(f"{self.title}: {share}, {now - self.start:.0f} s{', ' + note if note else ''}")
