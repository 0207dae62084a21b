"""The Python API in a process that has a Ray already, a notebook for example: every function uses that one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import restoray
from components.images import encode_png
from components.synthetic import dead_leaves

pytestmark = pytest.mark.slow


def test_jobs_use_the_ray_of_the_process_and_leave_it(ray_session: None, tmp_path: Path) -> None:
    import ray

    before = ray.get_runtime_context().gcs_address
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode_png(dead_leaves(160, 1, number)))

    corpus = restoray.curate("folder", images=tmp_path / "in", out=tmp_path / "corpus", quiet=True)
    assert corpus.accepted + corpus.rejected == 3
    degraded = restoray.degrade(tmp_path / "in", tmp_path / "poor", preset="realesrgan-nano", seed=2, quiet=True)
    assert degraded.degraded == 3 and len(degraded.records.read_text().splitlines()) == 3
    restored = restoray.restore(tmp_path / "poor", out=tmp_path / "out", seed=4, strength=0.2, quiet=True)
    assert restored.restored == 3

    model = restoray.load(device="cpu")
    data = model.restore((tmp_path / "poor" / "1.png").read_bytes(), seed=4, keys="1", strength=0.2)
    assert data == (tmp_path / "out" / "1.png").read_bytes()
    scores = restoray.evaluate(
        tmp_path / "out",
        lq=tmp_path / "poor",
        hq=tmp_path / "in",
        out=tmp_path / "scores",
        metrics=["psnr"],
        quiet=True,
    )
    assert set(scores.means) >= {"restored", "lq"} and np.isfinite(scores.means["restored"]["psnr"]["mean"])
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["pictures"] == ["0", "1", "2"]
    assert ray.is_initialized() and ray.get_runtime_context().gcs_address == before
