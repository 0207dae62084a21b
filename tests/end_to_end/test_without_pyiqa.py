"""The product from a wheel, outside the checkout, where pyiqa cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BLOCK = """
import sys

class WithoutPyiqa:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "pyiqa":
            raise ModuleNotFoundError("No module named 'pyiqa'", name="pyiqa")

sys.meta_path.insert(0, WithoutPyiqa)
"""

PLAN = """
title: Curation, training, restoration, scores and service
free_mib: 100
stages:
  - {name: corpus, verb: curate, spec: demo}
  - name: tuned
    verb: train
    recipe: unetres-regression-finetune
    overrides: [steps=2, evaluate_every=2, checkpoint_every=2, batch_size=2, resolution=32, short_side=48]
    needs: [corpus]
  - {name: restored, verb: restore, preset: realesrgan, short_side: 64, limit: 2, needs: [corpus, tuned]}
  - {name: scores, verb: evaluate, metrics: [psnr, ssim], needs: [restored]}
  - {name: service, verb: serve-check, needs: [tuned, restored]}
"""


def test_all_verbs_run_from_a_wheel_without_pyiqa(repository: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True, timeout=120)
    site, place = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(site)
    (site / "sitecustomize.py").write_text(BLOCK)  # Python imports it at the start of every process, also Ray's
    place.mkdir()
    (place / "plan.yaml").write_text(PLAN)
    environ = {**os.environ, "PYTHONPATH": str(site), "RESTORAY_HOME": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=place, env=environ, capture_output=True, text=True, timeout=1500, check=False
        )

    script = "import pipelines; print(pipelines.__file__)\ntry: import pyiqa\nexcept ImportError: print('blocked')"
    assert run("-c", script).stdout.split() == [str(site / "pipelines" / "__init__.py"), "blocked"]
    process = run("-m", "pipelines.commands.main", "run", "plan.yaml", "--out", "out")
    assert process.returncode == 0, process.stderr[-3000:]
    folders = {name: next((place / "out").glob(f"{name}-????????")) for name in ("restored", "scores", "service")}
    (summary,) = folders["scores"].rglob("summary.json")
    means = json.loads(summary.read_text())["means"]["restored"]
    assert set(means) == {"psnr", "ssim"}
    assert 10 < means["psnr"]["mean"] < 50 and 0 < means["ssim"]["mean"] < 1
    folder = folders["restored"]
    pictures = [str(folder / "restored"), "--lq", str(folder / "lq"), "--hq", str(folder / "hq")]
    evaluate = ("-m", "pipelines.commands.main", "evaluate", *pictures, "--out", "scores")
    refused = run(*evaluate, "--metric", "vif")
    assert refused.returncode == 2
    assert refused.stderr.startswith("restoray: metric 'vif' is pyiqa's, and the package pyiqa")
    assert "psnr, psnry, ssim" in refused.stderr and "Traceback" not in refused.stderr
    default = run(*evaluate)
    assert default.returncode == 0, default.stderr[-2000:]
    assert "so these metrics are left out: ms_ssim, vif, piqe." in default.stdout + default.stderr
