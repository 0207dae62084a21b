"""The benchmarks' code runs at a size that takes seconds; the tests check no times."""

from __future__ import annotations

import math
from pathlib import Path

import bench_degradation as bench
import bench_degradation_gpu
import pytest
from timing import ratio


def test_every_recipe_is_measured_on_the_cpu() -> None:
    results = bench.measure(side=64, pictures=4, rounds=1, seeds=1)
    assert [row["recipe"] for row in results] == list(bench.RECIPES)
    assert all(row["ours_ms"] > 0 and row["void"] for row in results)  # one round has no spread
    with pytest.raises(SystemExit, match="holds no basicsr"):
        bench.original(Path("nowhere"), 1, "off", bench.crops(None, 1, 64))


def test_batches_are_measured_on_the_cpu() -> None:
    results = bench_degradation_gpu.measure(batch_sizes=(2,), side=64, rounds=1, device="cpu")
    assert all(row["ours_images_per_s"] > 0 and row["void"] for row in results)


def test_pictures_that_do_not_fill_the_originals_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 pictures in batches of 12 the original would do nothing, and the ratio would be 0."""
    pictures = bench.crops(None, 4, 64)
    for count, batch in ((4, 12), (4, 3), (0, 4)):
        with pytest.raises(SystemExit, match=f"batches of {batch}, and {count} pictures do not fill them"):
            bench.original(Path("nowhere"), batch, "off", pictures[:count])
    with pytest.raises(SystemExit, match="batches of 12, and 4 pictures"):
        bench.measure(["default"], side=64, pictures=4, rounds=1, seeds=1, basicsr=Path("nowhere"))
    for wrong in ({"pictures": 0}, {"rounds": 0}, {"seeds": 0}):
        with pytest.raises(SystemExit, match="must be at least 1"):
            bench.measure(["default"], **{"side": 64, "pictures": 4, "rounds": 1, "seeds": 1, **wrong})
    monkeypatch.setattr(bench, "original", lambda *_: lambda seed: bench.ours("realesrgan", {}, pictures)(seed))
    (row,) = bench.measure(["instantir"], side=64, pictures=4, rounds=1, seeds=1, basicsr=Path("stand-in"))
    assert row["ratio"] == pytest.approx(row["original_ms"] / row["ours_ms"], abs=0.06)


def test_photographs_are_needed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no photograph"):
        bench.crops(tmp_path, 2, 64)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 2.0)])
def test_a_ratio_of_nothing_is_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(SystemExit, match="nothing was measured"):
        ratio(*pair)
    assert ratio(3.0, 1.5, 1) == 2.0
