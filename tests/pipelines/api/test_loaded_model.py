"""`restoray.load`: every kind of picture goes in and comes back, with the bits of a batch job."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

import restoray
from components.images import decode
from components.restoring import picture_seed
from components.types import StepEvent
from pipelines.core.pool import Pool
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model

OPTIONS = {"strength": 0.7, "scale": 1.5}


@pytest.fixture(scope="module")
def nano() -> Any:
    return restoray.load("nano", device="cpu")


def pixels(channels: int = 3) -> np.ndarray:
    """uint8 [28, 36, channels] without symmetry."""
    return np.random.default_rng(3).integers(0, 256, (28, 36, channels), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    Pillow.fromarray(array).save(target, "PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def batch_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a batch job with seed 5: an opaque and a transparent picture, and a gray one."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "in").mkdir()
    for name, channels in (("rgb", 3), ("rgba", 4)):
        (folder / "in" / f"{name}.png").write_bytes(png(pixels(channels)))
    (folder / "in" / "gray.png").write_bytes(png(pixels(1)[..., 0]))
    opened = open_model("nano")
    job = RestoreJob(ask=opened.request_options(OPTIONS), seed=5)
    result = restore_folder(opened, folder / "in", folder / "out", job, Pool(workers=0))
    assert result.restored == 3
    return {path.stem: path.read_bytes() for path in (folder / "out").glob("*.png")}


def test_bytes_give_the_file_of_the_batch_job(nano: Any, batch_results: dict[str, bytes]) -> None:
    restored = nano.restore(png(pixels()), seed=5, keys="rgb", **OPTIONS)
    assert isinstance(restored, bytes) and restored == batch_results["rgb"]
    assert restored.info["key"] == "rgb" and restored.info["model_digest"] == nano.identity.digest
    assert restored.info["seed"] == str(picture_seed(5, "rgb"))
    assert json.loads(restored.info["options"])["strength"] == 0.7
    other = nano.restore(png(pixels()), seed=6, keys="rgb", **OPTIONS)
    assert other.info["seed"] != restored.info["seed"]


def test_a_path_gives_a_pil_picture_under_its_own_name(
    nano: Any, batch_results: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "rgb.png"
    path.write_bytes(png(pixels()))
    for place in (path, str(path)):
        restored = nano.restore(place, seed=5, **OPTIONS)
        assert isinstance(restored, Pillow.Image)
        assert np.array_equal(np.asarray(restored), decode(batch_results["rgb"]))
        assert restored.info["key"] == "rgb" and restored.size == (54, 42)


@pytest.mark.parametrize(("name", "channels"), [("rgb", 3), ("rgba", 4), ("gray", 1)])
def test_arrays_tensors_and_pil_pictures_have_the_same_pixels(
    nano: Any, batch_results: dict[str, bytes], name: str, channels: int
) -> None:
    expected = np.asarray(Pillow.open(io.BytesIO(batch_results[name])))
    array = pixels(channels)
    ask = {"seed": 5, "keys": name, **OPTIONS}

    restored = nano.restore(array, **ask)
    assert isinstance(restored, np.ndarray) and restored.dtype == np.uint8 and restored.shape == (42, 54, channels)
    assert np.array_equal(np.squeeze(restored), expected) and restored.info["key"] == name
    assert restored[:5].info is restored.info
    if channels == 1:
        assert nano.restore(array[..., 0], **ask).shape == (42, 54)

    tensor = torch.from_numpy(array).permute(2, 0, 1)
    answer = nano.restore(tensor, **ask)
    assert isinstance(answer, torch.Tensor) and answer.dtype == torch.uint8 and answer.shape == (channels, 42, 54)
    assert np.array_equal(answer.permute(1, 2, 0).squeeze().numpy(), expected)
    floats = nano.restore(tensor.double() / 255, **ask)
    assert floats.dtype == torch.float64 and floats.info == restored.info | {
        "source_sha256": answer.info["source_sha256"]
    }
    assert torch.equal((floats * 255).round().to(torch.uint8), answer)

    picture = nano.restore(Pillow.fromarray(np.squeeze(array)), **ask)
    assert isinstance(picture, Pillow.Image) and np.array_equal(np.asarray(picture), expected)
    assert picture.info["key"] == name


def test_a_gray_picture_in_colours_keeps_its_channels(nano: Any) -> None:
    gray = np.repeat(pixels(1), 3, axis=2)
    assert nano.restore(gray).shape == (28, 36, 3)
    assert nano.restore(torch.from_numpy(gray).permute(2, 0, 1)).shape == (3, 28, 36)
    assert nano.restore(Pillow.fromarray(gray)).mode == "RGB"
    opaque = np.dstack([gray, np.full((28, 36), 255, np.uint8)])
    assert (nano.restore(opaque)[..., 3] == 255).all()


def test_a_batch_of_tensors_is_a_batch_again(nano: Any) -> None:
    batch = torch.stack([torch.from_numpy(pixels()).permute(2, 0, 1), torch.zeros(3, 28, 36, dtype=torch.uint8)])
    restored = nano.restore(batch, keys=["a", "b"])
    assert restored.shape == (2, 3, 28, 36) and [info["key"] for info in restored.info] == ["a", "b"]
    assert torch.equal(restored[0], nano.restore(batch[0], keys="a"))


def test_lists_give_lists_and_other_iterables_generators(nano: Any) -> None:
    asked: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for number in range(3):
            asked.append(number)
            yield pixels() // (number + 1)

    results = nano.restore(source())
    assert isinstance(results, GeneratorType) and asked == []
    first = next(results)
    assert asked == [0] and np.array_equal(first, nano.restore(pixels()))
    mixed = nano.restore([pixels(), png(pixels())])
    assert [type(each).__name__ for each in mixed] == ["RestoredArray", "RestoredBytes"]
    assert np.array_equal(mixed[0], decode(mixed[1]))


def test_a_pil_picture_keeps_its_orientation_and_profile(nano: Any) -> None:
    array = pixels()
    exif = Pillow.Exif()
    exif[0x0112] = 6  # a quarter turn
    target = io.BytesIO()
    Pillow.fromarray(array).save(target, "PNG", exif=exif.tobytes())
    restored = nano.restore(Pillow.open(io.BytesIO(target.getvalue())))
    assert restored.size == (28, 36)
    assert np.array_equal(np.asarray(restored), decode(nano.restore(target.getvalue())))
    cmyk = Pillow.fromarray(array).convert("CMYK")
    assert nano.restore(cmyk).size == (36, 28)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (pixels().astype(np.float32) / 255, "must be uint8"),
        (np.zeros((2, 3, 5), np.uint8), r"\[H, W, 4\], got \(2, 3, 5\)"),
        (torch.zeros(5, 8, 8), "with 1, 3 or 4 channels"),
        (torch.full((3, 8, 8), 1.5), r"lie in \[0, 1\], got 1.5 to 1.5"),
        (torch.full((3, 8, 8), float("nan")), r"lie in \[0, 1\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int32), "must be uint8, or floats"),
        ({"a": 1}, "a picture is a path"),
        ("no-such-file.png", "does not exist"),
        (".", "is a folder: restoray.restore"),
    ],
)
def test_a_wrong_picture_is_one_sentence(nano: Any, image: object, sentence: str) -> None:
    with pytest.raises(restoray.UsageError, match=sentence):
        nano.restore([image] if isinstance(image, dict) else image)


def test_options_models_and_keys_are_checked_at_once(nano: Any) -> None:
    with pytest.raises(restoray.UsageError, match="strength"):
        nano.restore(iter([]), strenght=0.5)
    with pytest.raises(restoray.UsageError, match='Did you mean "nano"'):
        restoray.load("nanno")
    with pytest.raises(restoray.UsageError, match="precision"):
        restoray.load("nano", precision="fp61")
    with pytest.raises(restoray.UsageError, match="load takes no speed"):
        restoray.load("nano", speed="fast")
    with pytest.raises(restoray.UsageError, match="2 keys were given for 1 pictures"):
        nano.restore(pixels(), keys=["a", "b"])
    with pytest.raises(restoray.SampleError) as caught:
        nano.restore(png(pixels())[:200], keys="broken")
    assert caught.value.code == "truncated" and caught.value.key == "broken"


def test_threads_of_the_caller_stay(nano: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        nano.restore(pixels())
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_steps_and_previews(tiny: Path) -> None:
    model = restoray.load(tiny)
    events: list[StepEvent] = []
    model.restore(np.zeros((64, 64, 3), np.uint8), on_step=events.append, steps=3)
    assert [(event.step, event.of) for event in events] == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ZeroDivisionError):
        model.restore(np.zeros((64, 64, 3), np.uint8), on_step=lambda event: 1 / 0, steps=3)
    (preview,) = model.decode(events[-1].preview)
    assert preview.dtype == np.uint8 and preview.shape == (64, 64, 3)


def test_a_model_without_previews_says_so(nano: Any) -> None:
    with pytest.raises(restoray.UsageError, match="no previews"):
        nano.decode(torch.zeros(1, 4, 8, 8))
