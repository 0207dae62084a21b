"""Weights of metrics that are missing, broken or unreachable, and metrics that cannot score a picture alone."""

from __future__ import annotations

import socket
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.evaluation.metrics import MetricError, Metrics, metric_info, without_target

PICTURE = np.full((48, 48, 3), 90, np.uint8)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of weights on a machine without a network; returns pyiqa's part of it."""
    import torch.hub
    from pyiqa.utils import download_util

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(download_util, "DEFAULT_CACHE_DIR", str(tmp_path / "hub" / "pyiqa"))
    return tmp_path / "hub" / "pyiqa"


@pytest.mark.parametrize(
    ("metric", "file"), [("niqe", "niqe_modelparameters.mat"), ("brisque", "brisque_svm_weights.pth")]
)
def test_a_failed_download_names_metric_file_and_folder(metric: str, file: str, hub: Path) -> None:
    metrics = Metrics((metric,))
    for act in (metrics.load, lambda: metrics.measure(PICTURE)):
        with pytest.raises(MetricError) as error:
            act()
        text = str(error.value)
        assert text.startswith(f"metric {metric}: its weights could not be downloaded (URLError:")
        assert f"/{file} on another machine and put the file at {hub / file}; " in text
        assert "TORCH_HOME" in text and "\n" not in text and len(text) < 2000
    assert not (hub / file).exists()


def test_a_silent_server_does_not_hold_the_work_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub waits as long as the sockets' default says, which is for ever."""
    import pyiqa

    seen: list[float | None] = []
    monkeypatch.setattr(pyiqa, "create_metric", lambda *_, **__: seen.append(socket.getdefaulttimeout()))
    Metrics(("niqe",)).load()
    assert seen == [60.0] and socket.getdefaulttimeout() is None


@pytest.mark.parametrize("metric", ["niqe", "musiq"])
def test_a_broken_weights_file_is_named(metric: str, hub: Path) -> None:
    file = {"niqe": "niqe_modelparameters.mat", "musiq": "musiq_koniq_ckpt-e95806b9.pth"}[metric]
    hub.mkdir(parents=True)
    (hub / file).write_bytes(b"<html>Please log in</html>")
    with pytest.raises(MetricError) as error:
        Metrics((metric,)).load()
    assert f"its weights {hub / file} cannot be read (" in str(error.value) and "Delete the file" in str(error.value)


def test_a_repository_of_the_hub_and_a_package_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pyiqa

    def create(name: str, device: str) -> None:
        def hub_download(repo_id: str) -> None:
            raise FileNotFoundError("offline\nsecond line")

        if name == "qalign":
            raise ModuleNotFoundError("No module named 'icecream'", name="icecream")
        try:
            hub_download("timm/resnet50")
        except FileNotFoundError as error:
            raise RuntimeError("cannot build") from error

    monkeypatch.setattr(pyiqa, "create_metric", create)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with pytest.raises(MetricError, match=rf"`hf download timm/resnet50`, and .* {tmp_path}/hub; HF_HOME"):
        Metrics(("nima",)).load()
    with pytest.raises(MetricError, match="metric qalign needs the Python package icecream"):
        Metrics(("qalign",)).load()


def test_metrics_of_sets_and_of_captions_are_refused_by_name() -> None:
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    kinds = {name: metric_info(name).judges for name in DEFAULT_CONFIGS}
    sets = {name for name, judges in kinds.items() if judges == "sets of pictures"}
    assert sets == {"fid", "sfid", "fid_dinov2", "inception_score"}
    assert {name for name, judges in kinds.items() if judges} - sets == {"clipscore"}
    for name in sets:
        with pytest.raises(ValueError, match=rf"{name} judges sets of pictures.*pyiqa {name} -t RESTORED -r ORIGINALS"):
            Metrics(("psnr", name))
    with pytest.raises(ValueError, match=r"clipscore judges pictures with captions.*needs no caption"):
        Metrics(("clipscore",))


def test_metrics_without_a_target() -> None:
    assert without_target() == ("piqe", "niqe_restoray", "consistency", "color_drift")
    assert without_target(("psnr", "entropy", "niqe", "lpips")) == ("entropy", "niqe")
