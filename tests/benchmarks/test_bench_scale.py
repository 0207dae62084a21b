"""The 20M proof at a small size: exact counts over several tars and shards, by the benchmark's code."""

from __future__ import annotations

from pathlib import Path

import bench_scale as scale
import pytest


@pytest.mark.full
@pytest.mark.usefixtures("ray_session")
def test_counts_are_exact_and_a_second_leg_repeats_nothing(tmp_path: Path) -> None:
    count = 3 * scale.PER_TAR
    scale.make_tars(tmp_path / "tars", count)
    leg = scale.run_leg(tmp_path, count, shard_mib=2.0)
    assert leg["counts"] == scale.expected_counts(count) == {"accepted": 14_700, "truncated": 15, "duplicate": 285}
    assert leg["exact"]
    assert leg["driver_bytes"] > 0
    again = scale.run_leg(tmp_path, count, shard_mib=2.0)
    assert again["reused"] == count
    assert again["counts"] == leg["counts"]


def test_the_fit_is_a_line_and_rates_are_compared() -> None:
    legs = [{"samples": n, "driver_bytes": 2**27 + 30 * n} for n in (100_000, 300_000, 1_000_000)]
    line = scale.fit(legs)
    assert line["bytes_a_sample"] == pytest.approx(30)
    assert line["bytes_a_sample_last_two"] == pytest.approx(30)
    assert line["start_mib"] == pytest.approx(128)
    assert line["bytes_a_sample_error"] == pytest.approx(0, abs=1e-6)
    peak = [{"samples": n, "driver_bytes": b} for n, b in ((0, 0), (1, 3), (2, 0))]  # level, with a peak in the middle
    assert scale.fit(peak)["bytes_a_sample"] == pytest.approx(0)
    assert scale.fit(peak)["bytes_a_sample_error"] == pytest.approx(3**0.5)  # (1 + 4 + 1) / 1 over 2, square root
    assert scale.fit(peak[:2])["bytes_a_sample_error"] is None
    even = [(t / 10, t) for t in range(200)]
    assert scale.steadiness(even) == pytest.approx(1.0, abs=0.01)
    slowing = [(t * t / 1000, t) for t in range(1, 200)]
    assert scale.steadiness(slowing) < 0.5
    assert scale.steadiness(even[:5]) is None
    assert scale.steadiness([(1.0, t) for t in range(200)]) is None, "a clock that stands still"
    assert scale.steadiness([(t / 10, 7) for t in range(200)]) is None, "nothing was done"
