"""What the benchmarks measure with: turns without the warm-up, medians with their spread, PSNR."""

from __future__ import annotations

import math
import time

import pytest
import timing
import torch


def test_arms_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is that of the calls: arm "a" takes 1, 2, 3 s, arm "b" 10 s each."""
    now, calls = [0.0], list[str]()

    def arm(name: str) -> torch.Tensor:
        calls.append(name)
        now[0] += 10.0 if name == "b" else float(calls.count("a"))
        return torch.tensor(float(len(calls)))

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    seconds, results = timing.take_turns({"a": lambda: arm("a"), "b": lambda: arm("b")}, "cpu", 2)
    assert calls == ["a", "b"] * 3
    assert seconds == {"a": [2.0, 3.0], "b": [10.0, 10.0]}
    assert [float(results[name]) for name in ("a", "b")] == [5.0, 6.0], "the last round's"


def test_a_line_is_void_if_its_times_spread() -> None:
    assert timing.summary([1.0, 1.1, 1.2], "cpu") == {"median_cpu_s": 1.1, "spread": 0.182, "void": False}
    assert timing.summary([1.0, 1.0, 1.3], "cuda") == {"median_s": 1.0, "spread": 0.3, "void": True}


def test_a_single_round_and_a_stopped_clock_say_nothing() -> None:
    """One time has no spread, so the spread cannot make its line void."""
    assert timing.summary([1.0], "cpu") == {"median_cpu_s": 1.0, "spread": 0.0, "void": True}
    assert timing.is_void(2, math.nan)
    for times in ([], [0.0, 0.0], [math.inf] * 3):
        with pytest.raises(SystemExit, match=f"nothing was measured: {len(times)} rounds"):
            timing.summary(times, "cpu")


def test_psnr_is_over_the_exact_range() -> None:
    exact = torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert timing.psnr(exact + 0.02, exact) == pytest.approx(40.0, abs=1e-3)
    assert timing.psnr(exact, exact) == math.inf
