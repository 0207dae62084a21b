"""Model folders: a round trip is exact, and errors name every fault."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.models import ModelCard, ModelError, load_model, load_strictly, resolve_model, save_model

CARD = ModelCard(name="toy", system="prior", config={"width": 3})


def parts() -> dict[str, dict[str, torch.Tensor]]:
    return {"a": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor([7])}, "b": {"x": torch.ones(2)}}


def test_round_trip_keeps_bits_and_files(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", CARD, parts(), {"note.txt": "hello"})
    assert model.part("a")["w"].equal(parts()["a"]["w"])
    assert model.file("note.txt").read_text() == "hello"
    assert load_model(tmp_path / "m").digest == model.digest


def test_equal_parts_give_equal_digests_and_other_weights_differ(tmp_path: Path) -> None:
    first, again = save_model(tmp_path / "1", CARD, parts()), save_model(tmp_path / "2", CARD, parts())
    changed = parts()
    changed["b"]["x"][0] = 2
    other = save_model(tmp_path / "3", CARD, changed)
    assert first.digest == again.digest != other.digest


def test_the_digest_covers_files_and_recipe_but_not_markdown(tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "CARD.md": "old"}
    first = save_model(tmp_path / "1", CARD, parts(), files)
    assert save_model(tmp_path / "2", CARD, parts(), {**files, "CARD.md": "new"}).digest == first.digest
    assert save_model(tmp_path / "3", CARD, parts(), {**files, "tokenizer.json": "[]"}).digest != first.digest
    other = replace(CARD, recipe={"steps_at_restore": 30})
    assert save_model(tmp_path / "4", other, parts(), files).digest != first.digest
    (tmp_path / "1" / "files" / "tokenizer.json").write_text("tampered")
    with pytest.raises(ModelError, match=r"tokenizer\.json.*sha256"):
        first.file("tokenizer.json")


def test_half_stores_floats_as_float16_and_leaves_integers(tmp_path: Path) -> None:
    part = save_model(tmp_path / "m", CARD, parts(), half=True).part("a")
    assert part["w"].dtype == torch.float16 and part["n"].dtype == torch.int64


def test_replacing_a_model_leaves_no_leftovers(tmp_path: Path) -> None:
    save_model(tmp_path / "m", CARD, parts())
    save_model(tmp_path / "m", CARD, {"a": parts()["a"]})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert set(load_model(tmp_path / "m").info["parts"]) == {"a"}


def test_tampered_part_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", CARD, parts())
    file = tmp_path / "m" / "parts" / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="sha256"):
        model.part("a")


def test_errors_name_missing_parts_and_bad_json(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", CARD, parts())
    with pytest.raises(ModelError, match=r"no part 'c'; it has \['a', 'b'\]"):
        model.part("c")
    (tmp_path / "m" / "model.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ModelError, match="lacks"):
        load_model(tmp_path / "m")


def test_an_unknown_model_lists_the_shipped_ones() -> None:
    for prior in (False, True):
        with pytest.raises(ModelError, match='Did you mean "nano"'):
            resolve_model("nanoo", prior)


def test_a_prior_and_a_restorer_may_have_one_name() -> None:
    restorer, prior = load_model("nano"), load_model("nano", prior=True)
    assert (restorer.info["system"], prior.info["system"]) == ("unetres", "prior")
    assert restorer.digest != prior.digest


def test_load_strictly_names_every_fault() -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(ModelError) as error:
        load_strictly(module, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, "toy")
    for word in ("bias", "extra", "weight: (3, 3) instead of (3, 2)"):
        assert word in str(error.value)
