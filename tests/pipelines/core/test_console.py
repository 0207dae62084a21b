"""Progress for people: a bar that says so when nothing happens."""

from __future__ import annotations

import time

import pytest

from pipelines.core import console
from pipelines.core.console import Watch


def test_a_bar_says_when_there_is_no_progress_and_how_much_of_ray_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "ray_in_use", lambda: "4 of 4 CPUs")
    lines: list[str] = []
    counts: list[int] = []
    with Watch("dcp", lambda count, of=0, note="": counts.append(count), lines.append, silence_s=0.2) as progress:
        end = time.monotonic() + 20
        while not lines and time.monotonic() < end:
            time.sleep(0.02)
        assert lines[0].startswith("dcp: no progress for 0 s; in use: 4 of 4 CPUs; Ctrl-C ends it")
        progress(1, 2)
        assert counts == [1]
    time.sleep(0.3)
    before = len(lines)
    time.sleep(1.0)
    assert len(lines) == before  # the end of the bar ends the watch


def test_progress_keeps_the_watch_silent() -> None:
    lines: list[str] = []
    with Watch("dcp", lambda count, of=0, note="": None, lines.append, silence_s=2.0) as progress:
        for count in range(24):
            progress(count)
            time.sleep(0.1)
    assert lines == []
