"""The choice after a fine-tuning: the trained model restores, unless it is worse or was measured on few pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from helper_modules import load_helper

from components.images import encode_png
from components.recipes import Gate
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.system import Networks
from pipelines.core.errors import UsageError
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation.choice import Choice, choose_model
from pipelines.runs.plan import load_plan
from pipelines.runs.stages import VERBS


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_helper("pipelines/_tiny.py")
    networks = Networks(build_restorer=lambda model, **_: module.build_tiny(model.path))
    monkeypatch.setitem(SYSTEMS, "tiny", dataclasses.replace(module.SYSTEM, networks=lambda: networks))
    return module


def choose(tiny: Any, folder: Path, trained: float, held_out: int = 6, gate: Gate | None = None) -> Choice:
    """Models that blur noise away, the more the larger their number; the standard one has 10."""
    pictures = [encode_png(dead_leaves(96, 3, index)) for index in range(held_out + 1)]
    samples = [(f"p{n}", "png", data, {}) for n, data in enumerate(pictures)]
    write_corpus(folder / "corpus", "leaves", {"train": samples[:1], "held_out": samples[1:]})
    standard = tiny.write_model(folder / "standard", 10.0)
    own = tiny.write_model(folder / "trained", trained)
    return choose_model(
        own,
        str(standard),
        folder / "corpus",
        folder / "out",
        gate or Gate(psnr_db=0.0, perceptual=0.0, pictures=6, metric="ssim"),
        preset="x4-noise40",
        preset_options={},
        short_side=96,
        on_ray=False,
    )


@pytest.mark.parametrize(("trained", "chosen"), [(40.0, "trained"), (1.0, "standard")])
def test_the_better_model_is_copied(tiny: Any, tmp_path: Path, trained: float, chosen: str) -> None:
    choice = choose(tiny, tmp_path, trained)
    document = json.loads((tmp_path / "out" / "choice.json").read_text())
    assert choice.chosen == document["chosen"] == chosen
    assert (choice.model / "model.json").read_bytes() == (tmp_path / chosen / "model.json").read_bytes()
    assert choice.sentence.startswith("On 6 held-out pictures the trained model has psnr ")
    assert choice.sentence.endswith("it restores." if chosen == "trained" else "standard restores.")


def test_few_pictures_choose_the_standard_model(tiny: Any, tmp_path: Path) -> None:
    choice = choose(tiny, tmp_path, 40.0, held_out=3)
    assert choice.chosen == "standard" and "too few" in choice.sentence


def test_a_choice_of_wrong_settings_is_refused_before_anything_runs(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for setting, word in (
        ("model: nanoo", 'Did you mean "nano"'),
        ("preset: realesrgn", "Did you mean"),
        ("metric: st_lpip", "Did you mean"),
        ("pictures: 2", "pictures"),
    ):
        plan.write_text(
            "stages:\n  - {name: corpus, verb: curate, spec: demo}\n"
            "  - {name: tuned, verb: train, recipe: unetres-regression-finetune, needs: [corpus]}\n"
            f"  - {{name: chosen, verb: choose, needs: [corpus, tuned], {setting}}}\n"
        )
        with pytest.raises(UsageError, match=word):
            load_plan(str(plan), verbs=VERBS)
