"""--max-megapixels and --max-megabytes: one name in every command, and every shape below them is taken."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from components.corpora import FilterSpec
from components.images import ANY_SHAPE, decode, encode_png
from pipelines.commands import corpora, measuring, restoration
from pipelines.commands.main import build_app
from pipelines.core.errors import UsageError
from pipelines.evaluation.degrade import degrade_folder
from pipelines.evaluation.evaluate import evaluate
from pipelines.service.front import Refusal, ServeLimits, check_picture

SHAPES = {"point": (1, 1), "row": (1, 300), "column": (300, 1), "small": (3, 5), "usual": (40, 50)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, (name, shape) in enumerate(SHAPES.items()):
        noise = np.random.default_rng(number).integers(0, 256, (*shape, 3), np.uint8)
        (folder / f"{name}.png").write_bytes(encode_png(noise))
    return folder


def rows(path: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_every_shape_is_degraded_and_measured(pictures: Path, tmp_path: Path) -> None:
    result = degrade_folder(pictures, tmp_path / "lq")
    assert (result.degraded, result.quarantined) == (len(SHAPES), 0)
    for name, shape in SHAPES.items():
        assert decode((tmp_path / "lq" / f"{name}.png").read_bytes(), ANY_SHAPE).shape == (*shape, 3)
    (tmp_path / "lq" / "contact.jpg").unlink()
    summary = evaluate(tmp_path / "lq", tmp_path / "lq", pictures, tmp_path / "scores", metrics=["psnr"])
    assert (sorted(summary.pictures), summary.missing) == (sorted(SHAPES), [])


@pytest.mark.parametrize(
    ("option", "words"),
    [("--max-megapixels=0.001", "limit of 1000 (--max-megapixels)"), ("--max-megabytes=0.002", "(--max-megabytes)")],
)
def test_a_larger_picture_is_refused_with_the_option_s_name(
    pictures: Path, tmp_path: Path, option: str, words: str
) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(build_app(), ["degrade", str(pictures), str(out), option]).exit_code == 3
    (bad,) = rows(out / "quarantine.jsonl").values()
    assert (bad["key"], bad["code"]) == ("usual", "too_large") and words in bad["detail"]
    command = ["evaluate", str(pictures), "--hq", str(pictures), "--lq", str(pictures), "--metric=psnr", option]
    assert CliRunner().invoke(build_app(), [*command, "--out", str(tmp_path / "scores")]).exit_code == 3
    (missing,) = json.loads((tmp_path / "scores" / "summary.json").read_text())["missing"]
    assert missing["key"] == "usual" and words in missing["reason"]


@pytest.mark.parametrize("option", ["--max-megapixels=inf", "--max-megabytes=inf", "--max-megapixels=1e308"])
def test_a_limit_that_is_no_number_is_refused(pictures: Path, tmp_path: Path, option: str) -> None:
    result = CliRunner().invoke(build_app(), ["degrade", str(pictures), str(tmp_path / "out"), option])
    assert isinstance(result.exception, UsageError) and "must be a number" in str(result.exception)
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="max_megapixels > 0"):
            FilterSpec(max_megapixels=value)


def test_every_command_that_reads_pictures_has_both_options(pictures: Path) -> None:
    for command in (restoration.restore, restoration.serve, measuring.degrade, measuring.evaluate, corpora.curate):
        assert {"max_megapixels", "max_megabytes"} <= set(inspect.signature(command).parameters), command.__name__
    options = ["--max-megapixels=2.5", "--max-megabytes=1.048576"]
    result = CliRunner().invoke(
        build_app(), ["curate", "folder", "--images", str(pictures), "--dry-run", "--json", *options]
    )
    filters = json.loads(result.stdout)["filters"]
    assert (filters["max_megapixels"], filters["max_file_mib"]) == (2.5, 1.0)


def test_the_service_s_limits_have_the_same_names(pictures: Path) -> None:
    for shape in SHAPES:
        check_picture(
            (pictures / f"{shape}.png").read_bytes(), SimpleNamespace(output_size=lambda *_: None), ServeLimits()
        )  # type: ignore[arg-type]
    data = (pictures / "usual.png").read_bytes()
    for limits, words in (
        (ServeLimits(max_input_pixels=1000), "--max-megapixels"),
        (ServeLimits(max_bytes=1000), "--max-megabytes"),
    ):
        with pytest.raises(Refusal, match=words) as error:
            check_picture(data, None, limits)
        assert (error.value.status, error.value.code) == (422, "too_large")
