"""Folders of weights on another machine than the one that named them."""

from __future__ import annotations

from pathlib import Path

from components.places import SHIPPED_MODELS, SHIPPED_PRIORS, on_this_machine


def test_shipped_weights_are_those_of_this_installation(tmp_path: Path) -> None:
    there = Path("/elsewhere/site-packages/components")
    assert on_this_machine(there / "systems" / "weights" / "nano") == SHIPPED_MODELS / "nano"
    assert on_this_machine(there / "priors" / "weights" / "nano") == SHIPPED_PRIORS / "nano"
    for other in (there / "systems" / "weights" / "unknown", there / "nano", tmp_path / "weights" / "nano"):
        assert on_this_machine(other) == other


def test_a_folder_that_exists_is_taken(tmp_path: Path) -> None:
    own = tmp_path / "components" / "systems" / "weights" / "nano"
    own.mkdir(parents=True)
    (own / "model.json").touch()
    assert on_this_machine(own) == own
