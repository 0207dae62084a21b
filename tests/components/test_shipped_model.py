"""The shipped restorer, and the shipped prior of SD3's shape: what they were trained on, their sizes, what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from components.degradations import build_degradation
from components.fingerprints import alike, fingerprint
from components.images import ANY_SHAPE, Image, center_crop, decode, resize_short_side, to_float, to_uint8
from components.models import Model, load_model
from components.places import SHIPPED_MODELS, SHIPPED_PRIORS
from components.priors.sd3_files import load_sd3_prior
from components.randomness import generator
from components.systems import build_restorer
from components.tensors import images_to_tensor
from components.types import Request

SKIMAGE = {"chelsea": "chelsea.png", "coffee": "coffee.png", "astronaut": "astronaut.png"}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("nano")


@pytest.fixture(params=["nano", "nano-sd3"])
def shipped(request: pytest.FixtureRequest) -> Model:
    """A shipped folder that lists its pictures: the restorer, and a prior."""
    return load_model(request.param if request.param == "nano" else SHIPPED_PRIORS / request.param)


def held_out(repository: Path) -> dict[str, Image]:
    """The demo's twelve held-out pictures by name."""
    spec = yaml.safe_load((repository / "datasets" / "demo.yaml").read_text(encoding="utf-8"))
    names = spec["split"]["held_out"]
    assert len(names) == 12
    import skimage

    places = {name: Path(skimage.__file__).parent / "data" / file for name, file in SKIMAGE.items()}
    corpus = repository / "pipelines" / "demo_corpus"
    return {n: decode(places.get(n, corpus / f"{n}.jpg").read_bytes(), ANY_SHAPE, n) for n in names}


def listed(model: Model) -> list[dict[str, Any]]:
    lines = model.file("pictures.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_demos_held_out_pictures_are_in_no_list_of_the_training(shipped: Model, repository: Path) -> None:
    """By name, and by the fingerprint of the whole and of quarters: a detail is a picture of its own."""
    rows, pictures = listed(shipped), held_out(repository)
    trained = np.array([[int(word, 16) for word in row["fingerprint"]] for row in rows], np.uint64)
    assert len(rows) == 96 and {row["split"] for row in rows} == {"train", "held_out"}
    for name, picture in pictures.items():
        assert not [row["key"] for row in rows if row["key"].startswith(name)]
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        quarters = [picture[top : top + height, left : left + width] for top in (0, height) for left in (0, width)]
        for part in (picture, *quarters):
            prints = np.repeat(fingerprint(np.ascontiguousarray(part))[None], len(trained), axis=0)
            assert not [rows[n]["key"] for n in np.flatnonzero(alike(prints, trained))], name


def test_the_fingerprints_would_find_them(model: Model, repository: Path) -> None:
    """The check above is no formality: a resized, recompressed copy of a listed picture is found."""
    import cv2

    rows = {row["key"]: row for row in listed(model)}
    copies = 0
    for name in ("lake-sherburne", "tea-gardens", "the-spices-of-life", "high-trestle-trail"):
        picture = decode((repository / "pipelines" / "demo_corpus" / f"{name}.jpg").read_bytes(), ANY_SHAPE, name)
        small = resize_short_side(picture, 300)
        copy = cv2.imdecode(cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 70])[1], 1)[..., ::-1]
        own = np.array([int(word, 16) for word in rows[name]["fingerprint"]], np.uint64)
        copies += bool(alike(fingerprint(np.ascontiguousarray(copy))[None], own[None])[0])
    assert copies == 4


def test_every_picture_has_a_licence_that_allows_it(shipped: Model) -> None:
    for row in listed(shipped):
        assert any(word in row["licence"] for word in ("CC0", "public domain", "CC-BY", "CC BY")), row


def test_all_shipped_weights_are_small() -> None:
    """24 MB for what `nano` needs, 6 more for the prior of SD3's shape."""
    files = [path for folder in (SHIPPED_MODELS, SHIPPED_PRIORS) for path in folder.rglob("*") if path.is_file()]
    own = [path for path in files if (SHIPPED_PRIORS / "nano-sd3") in path.parents]
    assert 0 < sum(path.stat().st_size for path in own) <= 6_000_000
    assert sum(path.stat().st_size for path in files if path not in own) <= 24_000_000
    assert max(path.stat().st_size for path in files) <= 15 << 20


def test_the_prior_of_sd3s_shape_predicts_velocities(repository: Path) -> None:
    """Of held-out photographs, at five times: far better than the mean velocity, which is that of nothing learned."""
    prior = load_sd3_prior("nano-sd3")
    velocity = prior.velocity(prior.conditions([""]))
    errors, differences = [], []
    for name in ("casa-mila", "perched-osprey", "roman-colosseum"):
        picture = decode((repository / "pipelines" / "demo_corpus" / f"{name}.jpg").read_bytes(), ANY_SHAPE, name)
        hq = center_crop(resize_short_side(picture, 256), 128, 128)
        with torch.no_grad():
            latents = prior.encode(images_to_tensor([hq]))
            noise = torch.from_numpy(generator(3, name).standard_normal(tuple(latents.shape)).astype(np.float32))
            for t in (0.2, 0.35, 0.5, 0.65, 0.8):
                predicted = velocity((1 - t) * latents + t * noise, torch.tensor([t]))
                errors.append(float((predicted - (noise - latents)).square().mean()))
                differences.append(float((noise - latents).square().mean()))
    assert np.mean(errors) < 0.45 * np.mean(differences)


@pytest.mark.parametrize("preset", ["x4-noise40", "blur2-x4-noise20-jpeg50"])
def test_it_makes_degraded_photographs_better(preset: str, repository: Path) -> None:
    restorer, degradation = build_restorer("nano"), build_degradation(preset)
    gains = []
    for name in ("casa-mila", "perched-osprey", "roman-colosseum"):
        picture = decode((repository / "pipelines" / "demo_corpus" / f"{name}.jpg").read_bytes(), ANY_SHAPE, name)
        hq = center_crop(resize_short_side(picture, 256), 256, 256)
        lq = to_uint8(degradation.apply(to_float(hq), degradation.draw(0, name, 0)))
        restored = restorer.restore([Request(key=name, image=lq)])[0].image
        before, after = (float(np.square(side.astype(float) - hq).mean()) for side in (lq, restored))
        gains.append(10 * np.log10(before / after))
    assert min(gains) > 0 and np.mean(gains) > {"x4-noise40": 3.5, "blur2-x4-noise20-jpeg50": 0.3}[preset]
