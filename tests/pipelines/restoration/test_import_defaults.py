"""Imported weights restore as their release does unless an option says otherwise; trained models keep their recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from components.models import ModelCard, load_model, save_model
from components.systems import build_restorer
from components.types import Request
from pipelines.commands import machine
from pipelines.core.errors import UsageError
from pipelines.restoration.models import open_model
from pipelines.restoration.weights import export_weights, import_lines, import_weights

SMALL = np.full((64, 96, 3), 128, np.uint8)
TINY = {"resampler": {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}}
TINY["lora"] = {"rank": 2}


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))


def one_step_model(folder: Path) -> Path:
    """An untrained InstaRevive on the nano prior, with a recipe of its own."""
    from components.systems.instarevive.backbone import open_backbone
    from components.systems.instarevive.build import generator_config, generator_parts
    from components.systems.instarevive.network import EpsPredictor, OneStepGenerator

    backbone = open_backbone("nano", "nano")
    predictor = EpsPredictor(backbone.network, backbone.prior.schedule)  # type: ignore[arg-type]
    generator = OneStepGenerator(predictor)
    card = ModelCard(
        name="own",
        system="instarevive",
        recipe={"restore_options": {"color": "wavelet"}},
        prior=backbone.source,
        config=generator_config(backbone, generator),
    )
    return save_model(folder, card, generator_parts(generator)).path


def published(system: str, model: Path, folder: Path) -> Path:
    """The files of a model in the published layout, without the sidecar that only our exports have."""
    export_weights(system, model, folder)
    (folder / "restoray.json").unlink()
    return folder


def jobs_of(model: str | Path) -> Callable[..., Any]:
    """A function (prompt, options) -> how the model would run a small picture: its options and its working size."""
    opened, restorer = open_model(model), cast(Any, build_restorer(model))

    def job_of(prompt: str = "", **options: Any) -> Any:
        request = Request(key="a", image=SMALL, seed=0, prompt=prompt, options=opened.check(options))
        if prompt:
            restorer.check_prompts_used(request.options)
        return restorer._prepare(0, request)

    return job_of


def test_an_imported_instantir_takes_the_releases_view_and_size(tiny: Path, tmp_path: Path) -> None:
    files = published("instantir", tiny, tmp_path / "files")
    report = import_weights("instantir", [files], prior="nano", sizes=TINY)
    assert "restores with color=none resize=released view=crop" in "\n".join(import_lines(report))
    assert (
        report.defaults
        == open_model("instantir").identity.defaults
        == {"view": "crop", "resize": "released", "color": "none"}
    )
    job_of = jobs_of("instantir")
    job = job_of()
    assert (job.options.view, job.unpadded.shape) == ("crop", (640, 1024, 3))  # to 768 x 1152, to 1024, down to 64s
    # explicit options go first, alone and as a preset
    job = job_of(view="whole", resize="native")
    assert (job.options.view, job.unpadded.shape) == ("whole", (64, 96, 3))
    assert job_of(min_side_px=128).unpadded.shape == (128, 192, 3)
    assert job_of(preset="default").options.view == "whole"
    with pytest.raises(ValueError, match="leave min_side_px out"):
        open_model("instantir").check({"min_side_px": 128, "resize": "released"})
    # the import of an export keeps them, without a note of its own
    export_weights("instantir", "instantir", tmp_path / "again")
    back = import_weights("instantir", [tmp_path / "again"], tmp_path / "back")
    assert back.defaults == report.defaults and back.digest == report.digest


def test_a_study_runs_at_the_pictures_size(tiny: Path, tmp_path: Path) -> None:
    from pipelines.analysis.instantir.subject import open_subject
    from pipelines.analysis.model import StudyJob

    files = published("instantir", tiny, tmp_path / "files")
    import_weights("instantir", [files], prior="nano", sizes=TINY)
    job = StudyJob(model="instantir", images=tmp_path, out=tmp_path / "o", side_px=64)
    options = open_subject(job).options
    assert (options.view, options.resize) == ("crop", "native")


def test_an_imported_instarevive_takes_the_releases_prompt_and_side(tmp_path: Path) -> None:
    from components.systems.instarevive.options import FIXED_PROMPTS
    from components.systems.instarevive.restorer import _prompt

    files = published("instarevive", one_step_model(tmp_path / "own"), tmp_path / "files")
    report = import_weights("instarevive", [files], sizes={"family": "nano"})
    expected = {"text": "photo", "min_side_px": 512, "color": "none"}
    assert report.defaults == open_model("instarevive").identity.defaults == expected
    assert "restores with color=none min_side_px=512 text=photo" in "\n".join(import_lines(report))
    job_of = jobs_of("instarevive")
    job = job_of()
    assert (_prompt(job), job.inside) == (FIXED_PROMPTS["photo"], (512, 768))
    # explicit options and prompts go first
    assert job_of(min_side_px=0).inside == (64, 96)
    assert _prompt(job_of(text="face")) == FIXED_PROMPTS["face"]
    assert _prompt(job_of(prompt="a red fox")) == "a red fox"
    with pytest.raises(ValueError, match="text=photo uses one fixed prompt"):
        job_of(prompt="a red fox", text="photo")
    with pytest.raises(ValueError, match="text=photo uses one fixed prompt"):
        job_of(prompt="a red fox", preset="released")


def test_trained_models_keep_their_recipe_through_export_and_import(tiny: Path, tmp_path: Path) -> None:
    export_weights("instantir", tiny, tmp_path / "one")
    assert import_weights("instantir", [tmp_path / "one"], tmp_path / "m1").defaults == {"steps": 2, "cfg_scale": 2.0}
    export_weights("instarevive", one_step_model(tmp_path / "own"), tmp_path / "two")
    assert import_weights("instarevive", [tmp_path / "two"], tmp_path / "m2").defaults == {"color": "wavelet"}


def test_an_import_of_before_is_named_and_made_again(tmp_path: Path) -> None:
    files = published("instarevive", one_step_model(tmp_path / "own"), tmp_path / "files")
    import_weights("instarevive", [files], sizes={"family": "nano"})
    place = tmp_path / "home" / "weights" / "instarevive" / "model.json"
    (finding,) = [one for one in machine.check_weights() if one.check == "instarevive"]
    assert finding.status == "ok" and "restores with color=none min_side_px=512 text=photo" in finding.seen
    info = json.loads(place.read_text())
    place.write_text(json.dumps({**info, "recipe": {}}))
    (finding,) = [one for one in machine.check_weights() if one.check == "instarevive"]
    assert finding.status == "warn" and "--overwrite" in finding.advice
    with pytest.raises(UsageError, match="made of these files with other defaults: give --overwrite"):
        import_weights("instarevive", [files], sizes={"family": "nano"})
    import_weights("instarevive", [files], sizes={"family": "nano"}, overwrite=True)
    assert load_model("instarevive").info["recipe"] == info["recipe"]
    place.write_text("{")
    assert [one.status for one in machine.check_weights() if one.check == "instarevive"] == ["fail"]
