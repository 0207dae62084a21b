"""A model folder of the first demo's format: it must load, restore to the same picture, and train further.

The code of the first demo wrote fixtures/instantir-format-1/record.json; it must not be regenerated. It holds the
model.json of a model and of its prior (the smallest size with every part), and the names and shapes of all tensors. The
values are not part of the format; this module computes them from raw Philox words. With these values, the first demo's
code restored the picture below to `restored.png`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FIXTURE = Path(__file__).parent / "fixtures" / "instantir-format-1"
DECODER = 1 / 16
IMAGE_SIZE, SEED, PROMPT = (16, 24), 3, "red"


def words(name: str, count: int) -> np.ndarray:
    """float64 [count] in [-1, 1), equal on every machine and in every numpy version."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(40)) / 2.0**23 - 1


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that keeps activations in range: norm scales near 1, weights scaled by their fan-in, other values small.

    A UNet with such weights removes no noise, so the decoder's last layers are small to avoid clipped pictures.
    """
    tensor = words(name, int(np.prod(shape))).reshape(shape)
    if len(shape) > 1:
        tensor = tensor * (3 / np.prod(shape[1:])) ** 0.5
    elif name.endswith(".weight"):
        tensor = 1 + 0.1 * tensor
    else:
        tensor = 0.1 * tensor
    last = name.startswith(("autoencoder.decode_linear", "autoencoder.decode_residual.conv_out"))
    return (tensor * (DECODER if last else 1)).astype(np.float32)


def picture() -> np.ndarray:
    """uint8 [16, 24, 3]."""
    return (words("picture", 3 * IMAGE_SIZE[0] * IMAGE_SIZE[1]).reshape(*IMAGE_SIZE, 3) * 127 + 128).astype(np.uint8)


def write_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Write model.json, parts/ and files/ as in 0001-the-house.md, with safetensors and without Restoray's code."""
    from safetensors.numpy import save_file

    card = json.loads(json.dumps(record["model.json"]))
    (folder / "parts").mkdir(parents=True)
    for part, layout in record["layouts"].items():
        file = folder / card["parts"][part]["file"]
        save_file({name: values(f"{part}.{name}", tuple(shape)) for name, shape in layout.items()}, file)
        card["parts"][part]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name, text in record["files"].items():
        (folder / "files").mkdir(exist_ok=True)
        (folder / "files" / name).write_text(text, encoding="utf-8")
        card["files"][name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(card))


def write_model(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write prior and model below `folder`; as after training, the model names its prior by path and digest."""
    from components.models import load_model

    write_folder(folder / "prior", record["prior"])
    write_folder(folder / "model", record["model"])
    card = folder / "model" / "model.json"
    info = json.loads(card.read_text())
    info["prior"] = {"id": str(folder / "prior"), "digest": load_model(folder / "prior").digest}
    card.write_text(json.dumps(info))
    return folder / "model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path, json.loads((FIXTURE / "record.json").read_text()))


def test_it_loads_and_restores_the_same_picture(model: Path) -> None:
    from components.images import decode
    from components.systems import build_restorer
    from components.types import Request

    request = Request(key="a", image=picture(), seed=SEED, prompt=PROMPT, options={"color": "none"})  # as it was then
    (result,) = build_restorer(model).restore([request])
    expected = decode((FIXTURE / "restored.png").read_bytes()).astype(int)
    assert expected.std() > 20, "a flat picture would not test anything"
    difference = np.abs(result.image - expected)
    assert difference.max() <= 1, "float rounding on another machine may change a value by at most one level"


def test_it_trains_further(model: Path) -> None:
    from components.models import load_model
    from components.systems.instantir.system import INSTANTIR
    from components.systems.recipes import load_recipe

    parent = load_model(model)
    recipe = load_recipe("instantir-aggregator-nano", [f"prior={parent.info['prior']['id']}"])
    objective = INSTANTIR.build_objective(recipe, {"previewer": parent})
    assert objective.network.time_modulation and objective.network.perceptor_scale == 1
    parts = objective.parts()
    assert set(parts) == {"perceptor", "previewer", "aggregator"}
    for part, tensors in parts.items():
        assert {k: v.tolist() for k, v in tensors.items()} == {k: v.tolist() for k, v in parent.part(part).items()}


def test_the_first_demos_prior_is_unchanged() -> None:
    """Models record their prior's digest: with another `nano` prior, no demo model would open."""
    from components.models import load_model

    assert load_model("nano", prior=True).digest == "f2255415fe6766dcd7750b8ed62b240b861a9cd28926ca6bc8f148982f38704b"
