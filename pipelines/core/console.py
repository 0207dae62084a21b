"""Progress for people: bars in a terminal, plain lines in a log, nothing under --json.

A command calls `say`, `warn` and `bar` of a `Console`; `bar` yields a `Progress`, to call with (count, of, note).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from components.naming import printable
from pipelines.core.environment import ray_in_use
from pipelines.core.rows import json_text

SILENCE_S = 120.0
"""Time without progress after which a bar says so."""
LINE_INTERVAL_S = 10.0
"""A log gets at most one progress line per bar in this time, and the bar's last line."""


class Progress(Protocol):
    """Callback for the progress of a piece of work: `count` of `of` items in any unit; an `of` of 0 means unknown."""

    def __call__(self, count: int, of: int = 0, note: str = "") -> None: ...


def no_progress(count: int, of: int = 0, note: str = "") -> None:
    """A Progress that shows nothing."""


class Console:
    """Output for people on `stream`: standard error by default, since standard output is for results.

    Args:
        silent: for --json: only `result` prints.
        stream: receives the text; a terminal gets live bars.
    """

    def __init__(self, silent: bool = False, stream: TextIO | None = None) -> None:
        self.silent, self.stream = silent, stream or sys.stderr
        self.live = not silent and self.stream.isatty()
        self._bars: Any = None

    def say(self, text: str) -> None:
        """Print one line."""
        if self.silent:
            return
        if self._bars is not None:  # the live display prints the line above its bar
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def warn(self, text: str) -> None:
        """Print one line as a warning."""
        self.say(f"warning: {text}")

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """Show a progress bar for one piece of work; bars do not nest."""
        if self.silent:
            yield no_progress
        elif self.live:
            with self._live_bar(title) as progress, Watch(title, progress, self.say) as watched:
                yield watched
        else:
            with Watch(title, LinePrinter(title, self.say), self.say) as watched:
                yield watched

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
                yield lambda count, of=0, note="": bars.update(task, completed=count, total=of or None, note=note)
            finally:
                self._bars = None

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a small table as padded text."""
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
        """Print the command's result on standard output: one JSON document under --json, otherwise its lines."""
        text = json_text(document, default=str) if self.silent else printable("\n".join(lines))
        if text:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()


class Watch:
    """A Progress that passes its calls on, and says so when none comes for SILENCE_S, then 2, 4, 8 times as long.

    Some work is slow, and some waits for CPUs without end: the line shows which of Ray's CPUs are in use.
    """

    def __init__(self, title: str, progress: Progress, say: Any, silence_s: float = SILENCE_S) -> None:
        self.title, self.progress, self.say, self.silence_s = title, progress, say, silence_s
        self.last, self.end = time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()

    def __call__(self, count: int, of: int = 0, note: str = "") -> None:
        self.last = time.monotonic()
        self.progress(count, of, note)

    def _run(self) -> None:
        seen, limit = self.last, self.silence_s
        while not self.end.wait(self.silence_s / 4):
            if self.last != seen:
                seen, limit = self.last, self.silence_s
            silence = time.monotonic() - seen
            if silence >= limit:
                limit *= 2
                in_use = ray_in_use()
                self.say(
                    f"{self.title}: no progress for {silence:.0f} s{f'; in use: {in_use}' if in_use else ''}; "
                    "Ctrl-C ends it, and the same command continues"
                )


class LinePrinter:
    """A Progress for logs: one line at the start, one every LINE_INTERVAL_S, and one when `count` reaches `of`."""

    def __init__(self, title: str, say: Any) -> None:
        self.title, self.say = title, say
        self.start, self.last, self.finished = time.monotonic(), float("-inf"), False

    def __call__(self, count: int, of: int = 0, note: str = "") -> None:
        now = time.monotonic()
        complete = bool(of) and count >= of
        if (complete and self.finished) or (not complete and now - self.last < LINE_INTERVAL_S):
            return
        self.last, self.finished = now, complete
        share = f"{count}/{of} ({100 * count // of} %)" if of else str(count)
        self.say(f"{self.title}: {share}, {now - self.start:.0f} s{', ' + note if note else ''}")
