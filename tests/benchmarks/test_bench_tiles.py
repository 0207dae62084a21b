"""Tiles at nano size: seams, difference from the whole, and memory, on real photographs if available."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bench_tiles as bench
import numpy as np
import pytest
from untrained import SYSTEMS

BENCH = Path(__file__).with_name("bench_tiles.py")


def test_the_score_is_above_one_at_a_seam_only() -> None:
    """A step of 3 levels on a ramp of 1 level per pixel scores (1 + 3) / 1."""
    plain = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    assert bench.seam_score(plain, ([], [32])) == pytest.approx(1.0)
    seam = plain.copy()
    seam[:, 32:] += 3
    assert bench.seam_score(seam, ([], [32])) == pytest.approx(4.0)
    assert bench.seam_score(seam, ([], [16, 48])) == pytest.approx(1.0)
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert bench.seam_score(flat, ([], [32])) == 1.0
    flat[:, 32:] += 1
    assert bench.seam_score(flat, ([], [32])) == math.inf
    assert bench.borders_of(120, 200, 64, 0.25, 8) == (sorted({24, 64, 56, 88}), sorted({40, 64, 104, 88, 136, 152}))


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("system", SYSTEMS)
def test_ramp_sky_and_texture_have_no_visible_seam(system: str, images_dir: Path) -> None:
    rows = list(
        bench.main(["seams", "--system", system, "--pictures", str(images_dir), "--side", "768", "--tile", "384"])
    )
    assert [row["picture"] for row in rows] == ["ramp", "sky", "texture"]
    for row in rows:
        assert row["seam"] <= 1.02 * max(1.0, row["seam_of_the_whole"]), row
        assert row["seam_in_step"] <= 1.02 * max(1.0, row["in_step_of_the_whole"]), row


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("system", SYSTEMS)
def test_memory_is_bounded_by_the_latents_not_by_the_picture(system: str) -> None:
    """In its own process, since the peak is that of a process; 4096 px here, 8192 in the benchmark."""
    command = [sys.executable, str(BENCH), "memory", "--system", system, "--side", "4096", "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parents[2])}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    row = json.loads(process.stdout.splitlines()[-1])
    assert row["peak_above_weights_mib"] <= 1024, row  # a quarter of the 4 GiB that 8192 px may take
