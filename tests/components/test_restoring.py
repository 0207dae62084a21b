"""From bytes to PNG bytes: output scale, transparency, gray pictures, orientation, profiles and references."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageCms

from components.corpora import FilterSpec
from components.images import (
    PNG_LEVEL,
    Limits,
    decode,
    decode_parts,
    encode_png,
    flatten,
    limits_for_any_shape,
    read_png_text,
    spread_colors,
    working_size,
)
from components.randomness import generator
from components.restoring import Ask, Identity, Picture, parse_ask, request_of, restore_batch
from components.types import Cancelled, OnStep, Request, Restored, Restorer, SampleError

IDENTITY = Identity(name="enlarger", system="none", recipe="none", digest="0" * 64)


@dataclass
class Enlarger(Restorer):
    """A restorer that enlarges and tints, and stores its requests."""

    history: list[Request] = field(default_factory=list)

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        self.history += requests
        answers = []
        for request in requests:
            height, width = request.size or request.image.shape[:2]
            image = cv2.resize(request.image, (width, height), interpolation=cv2.INTER_NEAREST)
            pixels = np.clip(image.astype(int) + np.array((9, 0, -9)), 0, 255).astype(np.uint8)
            answers.append(Restored(key=request.key, image=pixels))
        return answers


def photo(height: int = 24, width: int = 32, name: str = "photo") -> np.ndarray:
    return generator(0, name).integers(40, 210, (height, width, 3), dtype=np.uint8)


def encode(image: np.ndarray | Pillow.Image, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    picture = image if isinstance(image, Pillow.Image) else Pillow.fromarray(image)
    picture.save(target, kind, **options)
    return target.getvalue()


def result(data: bytes, restorer: Enlarger | None = None, reference: bytes = b"", **options: Any) -> Pillow.Image:
    picture = Picture(key="a", data=data, seed=5, reference=reference)
    (png,) = restore_batch(restorer or Enlarger(), IDENTITY, [picture], parse_ask(options))
    if isinstance(png, SampleError):
        raise png
    return Pillow.open(io.BytesIO(png))


def test_a_scale_multiplies_the_size() -> None:
    assert result(encode(photo())).size == (32, 24)
    assert result(encode(photo()), scale=2).size == (64, 48)
    assert result(encode(photo(25, 31)), scale=1.5).size == (46, 38)  # rounded half to even, as Python does
    assert result(encode(photo()), width=40, height=40).size == (40, 40)
    ask = parse_ask({"scale": 3})
    assert ask.document() == {"scale": 3.0} and ask.digest() != parse_ask({}).digest()
    assert parse_ask({"scale": 1, "alpha": "keep"}).document() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2, "width": 8, "height": 8}, "exclude each other"),
        ({"scale": 0}, "scale must be a number from 0.0625 to 16"),
        ({"scale": "big"}, "scale must be a number"),
        ({"scale": True}, "scale must be a number"),
        ({"alpha": "drop"}, "alpha must be one of keep, restore, flatten"),
        ({"gray": "no"}, "gray must be one of keep, color"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_ask(options)


def test_a_too_large_result_is_refused_for_its_picture_only() -> None:
    ask = parse_ask({"scale": 4}, max_output_pixels=16 * 24 * 32)
    pictures = [Picture(key=k, data=encode(photo(h)), seed=0) for k, h in (("fits", 24), ("large", 25))]
    fits, large = restore_batch(Enlarger(), IDENTITY, pictures, ask)
    assert isinstance(fits, bytes)
    assert isinstance(large, SampleError) and large.code == "too_large"
    assert "128 x 100 pixels exceed max_output_pixels, which is 12288" in large.detail


def test_transparency_stays_unchanged() -> None:
    alpha = generator(1, "alpha").integers(0, 256, (24, 32), dtype=np.uint8)
    restorer = Enlarger()
    picture = result(encode(np.dstack([photo(), alpha])), restorer)
    assert picture.mode == "RGBA" and np.array_equal(np.asarray(picture)[..., 3], alpha)
    visible = alpha > 0
    assert np.array_equal(restorer.history[0].image[visible], photo()[visible])
    assert np.asarray(result(encode(np.dstack([photo(), alpha])), scale=2)).shape == (48, 64, 4)
    flat = Enlarger()
    assert result(encode(np.dstack([photo(), alpha])), flat, alpha="flatten").mode == "RGB"
    assert np.array_equal(flat.history[0].image, decode(encode(np.dstack([photo(), alpha]))))


def test_transparency_can_be_restored_as_a_separate_picture() -> None:
    alpha = np.full((24, 32), 100, np.uint8)
    restorer = Enlarger()
    picture = result(encode(np.dstack([photo(), alpha])), restorer, alpha="restore", prompt="a cat", scale=2)
    assert [request.prompt for request in restorer.history] == ["a cat", ""]
    assert np.array_equal(restorer.history[1].image, np.dstack([alpha] * 3)) and restorer.history[1].seed == 5
    assert picture.size == (64, 48)
    # the restorer's tint of (+9, 0, -9) in luma: 0.299 * 9 - 0.114 * 9 = 1.7
    assert np.abs(np.asarray(picture)[..., 3].astype(int) - 102).max() <= 1


def test_alpha_is_restored_with_the_alpha_of_the_reference() -> None:
    alpha, other = np.full((24, 32), 100, np.uint8), np.full((24, 32), 7, np.uint8)
    data = encode(np.dstack([photo(), alpha]))
    for reference, expected in ((encode(np.dstack([photo(), other])), 7), (encode(photo()), 255)):
        restorer = Enlarger()
        ask = parse_ask({"alpha": "restore"})
        restore_batch(restorer, IDENTITY, [Picture(key="a", data=data, seed=5, reference=reference)], ask)
        colours, mask = (request.reference for request in restorer.history)
        assert np.array_equal(colours, decode(reference)) and np.array_equal(mask, np.full((24, 32, 3), expected))


def test_a_gray_picture_stays_gray() -> None:
    gray = photo()[..., 0]
    for data in (encode(gray), encode(np.dstack([gray] * 3)), encode(gray, "JPEG", quality=95)):
        picture = result(data)
        assert picture.mode == "L"
        assert np.abs(np.asarray(picture).astype(int) - decode(data)[..., 0]).max() <= 2
        assert result(data, gray="color").mode == "RGB"
    with_alpha = Pillow.fromarray(np.dstack([gray, np.full_like(gray, 7)]), "LA")
    assert result(encode(with_alpha)).mode == "LA"
    assert result(encode(photo())).mode == "RGB"
    wide = (gray.astype(np.uint16) * 257).astype(np.uint16)
    assert result(encode(wide)).mode == "L"


def test_orientation_is_applied_to_colours_and_transparency() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    alpha = generator(1, "alpha").integers(1, 256, (24, 32), dtype=np.uint8)
    data = encode(np.dstack([photo(), alpha]), "PNG", exif=exif)
    picture = result(data, scale=2)
    assert picture.size == (48, 64) and picture.getexif().get(0x0112) is None
    parts = decode_parts(data)
    assert parts.alpha is not None
    assert np.array_equal(parts.alpha, np.rot90(alpha, -1)) and np.array_equal(parts.image, np.rot90(photo(), -1))


def test_decode_parts_converts_profiles_like_decode() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind, options in (("PNG", {"icc_profile": profile}), ("JPEG", {}), ("WEBP", {"lossless": True})):
        data = encode(photo(), kind, **options)
        assert np.array_equal(decode_parts(data).image, decode(data))


def test_flattened_parts_equal_decode() -> None:
    alpha = generator(1, "alpha").integers(0, 3, (24, 32), dtype=np.uint8) * 127
    for image in (np.dstack([photo(), alpha]), photo(), photo()[..., 0], np.dstack([photo()[..., 0], alpha])):
        data = encode(image)
        parts = decode_parts(data)
        assert np.array_equal(flatten(parts), decode(data))
        assert (parts.alpha is not None) == (image.ndim == 3 and image.shape[2] in (2, 4))
        again = decode_parts(encode_png(image))
        assert np.array_equal(flatten(again), decode(data))


def test_hidden_colours_do_not_bleed() -> None:
    image = np.zeros((40, 60, 3), np.uint8)  # invisible pixels are black, as editors write them
    image[:, :20] = (200, 40, 90)
    alpha = np.zeros((40, 60), np.uint8)
    alpha[:, :20] = 255
    assert (spread_colors(image, alpha) == (200, 40, 90)).all()
    assert (spread_colors(image, np.zeros_like(alpha)) == 255).all()
    assert spread_colors(image, np.full_like(alpha, 1)) is image
    result = spread_colors(photo(), (photo()[..., 0] > 100).astype(np.uint8))
    visible = photo()[..., 0] > 100
    assert np.array_equal(result[visible], photo()[visible])
    low, high = photo()[visible].min(), photo()[visible].max()
    assert result.min() >= low and result.max() <= high


def test_a_reference_is_passed_to_the_restorer_and_recorded() -> None:
    restorer = Enlarger()
    picture = result(encode(photo()), restorer, encode(photo(10, 12, "other")))
    assert restorer.history[0].reference is not None
    assert np.array_equal(restorer.history[0].reference, photo(10, 12, "other"))
    assert len(picture.text["reference_sha256"]) == 64  # type: ignore[attr-defined]
    with pytest.raises(SampleError, match="of the reference") as error:
        result(encode(photo()), reference=b"<html>")
    assert error.value.code == "not_image"
    limits = Limits(max_pixels=500)
    bad = Picture(key="a", data=encode(photo(10, 10)), seed=0, reference=encode(photo()))
    (answer,) = restore_batch(Enlarger(), IDENTITY, [bad], parse_ask({}), limits)
    assert isinstance(answer, SampleError) and answer.code == "too_large"


def test_a_pictures_prompt_replaces_the_jobs() -> None:
    restorer, clear = Enlarger(), Pillow.fromarray(photo()).convert("RGBA")
    clear.putalpha(Pillow.fromarray(photo()[..., 0]))
    pictures = [
        Picture(key="own", data=encode(clear), seed=5, prompt="a fox"),
        Picture(key="none", data=encode(photo()), seed=5),
    ]
    ask = parse_ask({"prompt": "a photo", "alpha": "restore"})
    assert request_of(pictures[0], ask).prompt == "a fox"
    own, none = restore_batch(restorer, IDENTITY, pictures, ask)
    assert [r.prompt for r in restorer.history] == ["a fox", "a photo", ""]  # the last request is the transparency
    assert json.loads(read_png_text(own)["options"]) == {"alpha": "restore", "prompt": "a fox"}  # type: ignore[arg-type]
    assert json.loads(read_png_text(none)["options"])["prompt"] == "a photo"  # type: ignore[arg-type]
    assert (
        ask.with_prompt("a fox").digest() == parse_ask({"prompt": "a fox", "alpha": "restore"}).digest() != ask.digest()
    )
    assert ask.with_prompt("") is ask


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (3, 5), (7, 5)])
def test_any_shape_from_one_pixel_is_restored(size: tuple[int, int]) -> None:
    """Without a least side and an aspect; with transparency of each kind, and at another size."""
    height, width = size
    image = photo(height, width)
    assert result(encode(image)).size == (width, height)
    rgba = encode(np.dstack([image, photo(height, width, "alpha")[..., 0]]))
    for alpha in ("keep", "restore", "flatten"):
        assert result(rgba, alpha=alpha, scale=2).size == (2 * width, 2 * height)
    assert result(encode(image), width=1, height=1).size == (1, 1)


def test_working_sizes_are_bounded() -> None:
    """A short side is enlarged to the least one; the long side of a strip limits the enlargement."""
    assert working_size((100, 200), 512) == (512, 1024)
    assert working_size((600, 700), 512) == (600, 700)
    assert working_size((10, 200), 512) == (512, 10240)  # 20 to 1, the longest that grows fully
    assert working_size((1, 3000), 512) == (3, 10240)
    assert working_size((20000, 3), 512) == (20000, 3)
    assert working_size((1, 1), 0) == (1, 1)


def test_limits_name_their_options() -> None:
    data = encode(photo(40, 50))
    for limits, words in (
        (limits_for_any_shape(1999), r"50 x 40 pixels exceed the limit of 1999 \(--max-megapixels\)"),
        (limits_for_any_shape(2000, 99), r"exceed the limit of 99 bytes \(--max-megabytes\)"),
        (FilterSpec(max_megapixels=0.001, min_side_px=8).limits(), "--max-megapixels or filters.max_megapixels"),
        (FilterSpec(max_file_mib=0.0001, min_side_px=8).limits(), "--max-megabytes or filters.max_file_mib"),
    ):
        with pytest.raises(SampleError, match=words) as error:
            request_of(Picture(key="a", data=data, seed=0), Ask(), limits)
        assert error.value.code == "too_large"
    # a picture of the largest size fits in every depth with alpha
    assert limits_for_any_shape(200_000_000).max_bytes == 1_600_000_000
    assert limits_for_any_shape(1).max_bytes == 64 << 20


def test_the_png_level_is_an_option_that_leaves_the_digest() -> None:
    data, default = encode(photo(64, 64)), parse_ask({})
    assert default.png_level == PNG_LEVEL and default.digest() == parse_ask({"png_level": 9}).digest()
    pictures = [Picture(key="a", data=data, seed=1)]
    files = {
        level: restore_batch(Enlarger(), IDENTITY, pictures, parse_ask({"png_level": level}))[0] for level in (0, 6, 9)
    }
    assert all(isinstance(png, bytes) and np.array_equal(decode(png), decode(files[0])) for png in files.values())
    assert files[6] == encode_png(decode(files[6]), read_png_text(files[6]), 6)  # level 6 is that of earlier versions
    assert len(files[0]) > len(files[9])
    with pytest.raises(ValueError, match="png_level must be a whole number from 0 to 9, got 12"):
        parse_ask({"png_level": 12})


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_answers_is_the_restorers_fault(count: int) -> None:
    """ "refused" would blame the request, and the service would answer 422 and keep its process."""

    class Miscounting(Enlarger):
        def restore(self, requests: Sequence[Request], *rest: Any, **named: Any) -> list[Restored]:
            answers = super().restore(requests, *rest, **named)
            return (answers * 3)[: count if len(requests) == 2 else 2 * count]

    pictures = [Picture(key=key, data=encode(photo()), seed=5) for key in ("a", "b")]
    errors = restore_batch(Miscounting(), IDENTITY, pictures, Ask())
    assert [error.code for error in errors if isinstance(error, SampleError)] == ["failed", "failed"]
    assert all(isinstance(error, SampleError) and "answers to 1 requests" in error.detail for error in errors)
