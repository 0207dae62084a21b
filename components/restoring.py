"""Restoration of single pictures: bytes of a file in, bytes of a file out. Batch jobs and the service share it.

Both call `restore_pictures`. So the service and a batch job write the same bytes for the same model, key, seed, options
and batch size; float rounding may differ with the batch size. Torch-free: the restorer is an argument.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from PIL import Image as Pillow

from components.images import (
    ANY_SHAPE,
    PNG_LEVEL,
    Decoded,
    Limits,
    check_png_level,
    flatten,
)
from components.naming import printable, shorten
from components.options import TEXTS, OptionCheck, UnknownOption
from components.picture_files import SETTINGS, Encoded, FileSettings, PictureFile, decode_any, encode_file, read_file
from components.randomness import stream_key
from components.types import Cancellation, Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError

MAX_KEY_BYTES = 200
"""Longest key. A key is a file name: common file systems allow 255 bytes, and suffixes need room."""

MAX_PROMPT_CHARS = 2000
MAX_OUTPUT_PIXELS = 100_000_000  # ours: a square with sides of 10,000 px
MAX_SCALE = 16.0  # ours
KEEP = "keep"  # as scale: that of the model's networks
MAX_SEED = 2**63 - 1
SIDES = ("height", "width")  # options of every system, as are TEXTS and the CHOICES:
CHOICES: Mapping[str, tuple[str, ...]] = {"alpha": ("keep", "restore", "flatten"), "gray": ("keep", "color")}
COMMON = (*TEXTS, *SIDES, "scale", *CHOICES, "png_level", *SETTINGS)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Information about a model in restored pictures and in the service: fields of model.json, and its digest.

    Attributes:
        frame: the recipe's prompt template, with {caption} for the caption; "": the caption alone.
        defaults: restorer options that the recipe sets; options of a request override them.
        own_scale: the `scale` with which the model's networks get a picture as it is; scale=keep means it.
    """

    name: str
    system: str
    recipe: str
    digest: str
    licence: str = "unstated"
    permitted_use: str = "unstated"
    frame: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    own_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The options for every picture of a job, except the seed.

    Attributes:
        prompt, negative_prompt: texts for guidance.
        size: (height, width) of the result in pixels; None means the input's size times `scale`.
        scale: ratio of the result's sides to the input's.
        alpha: for transparent pictures. "keep" resamples alpha (unchanged if the size stays), "restore" restores alpha
            as a separate picture, "flatten" puts the picture on white.
        gray: "keep" makes the result of a gray picture gray; "color" lets the restorer add colours.
        options: system-specific options in the system's types.
        max_output_pixels: a larger result is refused; not part of `document` and `digest`.
        png_level: of the results' compression, 0 to 9; not part of them either, as pixels do not depend on it.
        file: how results are written; has a document of its own.
    """

    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    scale: float = 1.0
    alpha: str = "keep"
    gray: str = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_output_pixels: int = MAX_OUTPUT_PIXELS
    png_level: int = PNG_LEVEL
    file: FileSettings = field(default_factory=FileSettings)

    def document(self) -> dict[str, Any]:
        """Return the options as JSON, without defaults."""
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        size = {"height": self.size[0], "width": self.size[1]} if self.size else {}
        kinds = {"scale": (self.scale, 1.0), "alpha": (self.alpha, "keep"), "gray": (self.gray, "keep")}
        others = {name: value for name, (value, default) in kinds.items() if value != default}
        return {**{k: v for k, v in texts.items() if v}, **size, **others, **self.options}

    def with_prompt(self, prompt: str) -> Ask:
        """Return the same options with a picture's own prompt; "" keeps the job's prompt."""
        return replace(self, prompt=prompt) if prompt else self

    def output_size(self, height: int, width: int, key: str = "") -> tuple[int, int]:
        """Return (height, width) of the result for a picture of that size.

        Raises:
            SampleError: too_large: more pixels than max_output_pixels; too_small: a side below one pixel.
        """
        size = self.size or (round(height * self.scale), round(width * self.scale))
        if min(size) < 1:
            raise SampleError("too_small", f"a scale of {self.scale:g} leaves nothing of {width} x {height}", key)
        if size[0] * size[1] > self.max_output_pixels:
            detail = f"{size[1]} x {size[0]} pixels exceed max_output_pixels, which is {self.max_output_pixels}"
            raise SampleError("too_large", detail, key)
        return size

    def digest(self) -> str:
        """Return the sha256 of `document`."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to restore.

    Attributes:
        key: name of the result.
        data: bytes of its file; b"" before they are read.
        seed: the picture's seed.
        reference: bytes of a second picture's file; b"" for none.
        prompt: replaces the job's prompt; "" for none.
    """

    key: str
    data: bytes = b""
    seed: int
    reference: bytes = b""
    prompt: str = ""


def file_key(name: str) -> str:
    """Make a readable key from any file name without its suffix; the key names the result's file.

    A key has no path, no control characters and no leading dot, and at most MAX_KEY_BYTES as UTF-8. In a long name, a
    hash of the whole replaces the end, so that different names stay different. Bytes that are not UTF-8 become "_xe9".
    """
    text = unicodedata.normalize("NFC", printable(name))
    text = "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in text)
    text = "_" + text[1:] if text.startswith(".") else text
    return shorten(text, MAX_KEY_BYTES, text) or "picture"


def picture_key(name: str) -> str:
    """Make a key from a picture's path below its folder, without its suffix: `file_key` of each part, with "/" between.

    The key of a key is the key itself, so the results of a job have the keys of their sources.
    """
    return "/".join(file_key(part) for part in name.split("/") if part not in ("", ".", "..")) or "picture"


def picture_seed(seed: int, key: str) -> int:
    """Return the seed of one picture in a job: 31 bits, independent of the job's other pictures."""
    return stream_key(seed, key) % 2**31


def check_text(name: str, text: Any) -> str:
    """Check a text for guidance and return it; only the line breaks of Windows and of browsers' forms become "\\n".

    Raises:
        ValueError: not a text, too long, or with control characters; the message names `name`.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    text = text.replace("\r\n", "\n")
    if len(text) > MAX_PROMPT_CHARS:
        raise ValueError(f"{name} has {len(text)} characters; the limit is {MAX_PROMPT_CHARS}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
        raise ValueError(f"{name} holds control characters")
    return text


def parse_ask(
    options: Mapping[str, Any],
    check: OptionCheck = dict,
    max_output_pixels: int = MAX_OUTPUT_PIXELS,
    own_scale: float = 1.0,
) -> Ask:
    """Build an Ask from options by name; those not in COMMON belong to the system.

    Args:
        check: the system's `check_options`; the default does not check them.
        own_scale: see Identity.

    Raises:
        ValueError: a wrong option; one sentence that names it.
    """
    rest = dict(options)
    texts = {name: check_text(name, rest.pop(name, "")) for name in TEXTS}
    size = {name: rest.pop(name, None) for name in SIDES}
    sides = [name for name, value in size.items() if value is not None]
    if len(sides) == 1:
        raise ValueError(f"{sides[0]} was given alone; give width and height together, or neither")
    for name in sides:
        if isinstance(size[name], bool) or not isinstance(size[name], int) or not 1 <= size[name] <= 1 << 16:
            raise ValueError(f"{name} must be a whole number of pixels from 1 to {1 << 16}, got {size[name]!r}")
    if sides and size["height"] * size["width"] > max_output_pixels:
        raise ValueError(
            f"{size['width']} x {size['height']} pixels exceed max_output_pixels, which is {max_output_pixels}"
        )
    scale = _scale(rest.pop("scale", None), sides, own_scale)
    png_level = check_png_level(rest.pop("png_level", PNG_LEVEL))
    file = FileSettings(**{name: rest.pop(name) for name in SETTINGS if name in rest})
    kinds = {name: rest.pop(name, choices[0]) for name, choices in CHOICES.items()}
    for name, kind in kinds.items():
        if kind not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {kind!r:.80}")
    for name, value in rest.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    try:
        system_options = check(rest)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*error.choices, *COMMON)) from None
    return Ask(
        **texts,
        size=(size["height"], size["width"]) if sides else None,
        scale=scale,
        **kinds,
        options=system_options,
        max_output_pixels=max_output_pixels,
        png_level=png_level,
        file=file,
    )


def _scale(value: Any, sides: Sequence[str], own_scale: float) -> float:
    """Check an output scale; None means 1, KEEP the model's own."""
    if value is None:
        return 1.0
    if sides:
        raise ValueError("scale and width and height exclude each other; give one of them")
    if value == KEEP:
        return own_scale
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 / MAX_SCALE <= value <= MAX_SCALE:
        raise ValueError(
            f"scale must be a number from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, or {KEEP}, got {value!r:.80}"
        )
    return float(value)


def restore_batch(
    restorer: Restorer,
    identity: Identity,
    pictures: Sequence[Picture],
    ask: Ask,
    limits: Limits = ANY_SHAPE,
    cancelled: Cancelled | None = None,
) -> list[bytes | SampleError]:
    """Decode, restore and encode pictures: the files of `restore_pictures`, with its errors."""
    results = restore_pictures(restorer, identity, pictures, ask, limits, cancelled)
    return [result if isinstance(result, SampleError) else result.encode().data for result in results]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A restored picture before its encoding, which needs no network and takes long: callers do it in another thread.

    Attributes:
        image: uint8, as encode_file accepts.
        text: what the result says about itself.
        level: of a PNG's compression.
        file: how it is written.
        source: record of the source's file, without pixels.
        facts: what XMP says besides `text`.
    """

    image: Image
    text: Mapping[str, str]
    level: int
    file: FileSettings
    source: PictureFile
    facts: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> Encoded:
        """Encode the picture.

        Raises:
            SampleError: the format has no pictures of that size.
        """
        return encode_file(self.image, self.file, self.source, self.text, self.level, self.facts)


def restore_pictures(
    restorer: Restorer,
    identity: Identity,
    pictures: Sequence[Picture],
    ask: Ask,
    limits: Limits = ANY_SHAPE,
    cancelled: Cancelled | None = None,
    on_step: OnStep | None = None,
) -> list[Result | SampleError]:
    """Decode and restore pictures; a broken picture does not affect the others.

    If the batch fails as a whole (out of memory, for example), its pictures are restored one by one.

    Args:
        on_step: called after each step of a sampler; not for alpha.

    Returns:
        For each picture its result, or a SampleError with the reason: the codes of `components.images`, and `refused`
        (the restorer's ValueError: an unknown option, an unsupported size), `not_finite` (a broken model),
        `out_of_memory`, `failed`.

    Raises:
        Cancellation: `cancelled` became true.
    """
    results: dict[int, Result | SampleError] = {}
    requests: dict[int, Request] = {}
    alphas: dict[int, Request] = {}  # alpha as gray pictures
    files: dict[int, PictureFile] = {}
    for index, picture in enumerate(pictures):
        try:
            files[index] = read_file(picture.data, limits, picture.key, ask.file)
            requests[index] = _request(picture, files[index].parts, ask.with_prompt(picture.prompt), limits)
        except SampleError as error:
            results[index] = error
            continue
        alpha = files[index].parts.alpha
        if alpha is not None and ask.alpha == "restore":
            alphas[index] = replace(
                requests[index],
                image=np.dstack([alpha] * 3),
                prompt="",
                negative_prompt="",
                reference=_reference_alpha(picture, limits) if picture.reference else None,
            )
    answers = _restore(restorer, requests, cancelled, on_step)
    alpha_results = _restore(restorer, {i: a for i, a in alphas.items() if isinstance(answers[i], Restored)}, cancelled)
    for index, restored in answers.items():
        mask = alpha_results.get(index)
        if isinstance(restored, SampleError) or isinstance(mask, SampleError):
            results[index] = restored if isinstance(restored, SampleError) else mask  # type: ignore[assignment]
        else:
            file = files.pop(index)
            results[index] = Result(
                image=_with_parts(restored.image, file.parts, ask, mask.image if mask is not None else None),
                text=png_text(identity, pictures[index], ask, restored),
                level=ask.png_level,
                file=ask.file,
                source=file.without_pixels(),
                facts={
                    "licence": identity.licence,
                    "permitted_use": identity.permitted_use,
                    "options_digest": ask.with_prompt(pictures[index].prompt).digest(),
                },
            )
    return [results[index] for index in range(len(pictures))]


def request_of(picture: Picture, ask: Ask, limits: Limits = ANY_SHAPE) -> Request:
    """Return the request that `restore_pictures` makes for a picture.

    Raises:
        SampleError: the picture cannot be decoded, or its result would be too large.
    """
    file = read_file(picture.data, limits, picture.key, ask.file)
    return _request(picture, file.parts, ask.with_prompt(picture.prompt), limits)


def _request(picture: Picture, parts: Decoded, ask: Ask, limits: Limits) -> Request:
    """Build the restorer's request; raise SampleError."""
    image = flatten(parts) if ask.alpha == "flatten" else parts.image
    size = ask.output_size(image.shape[0], image.shape[1], picture.key)
    reference = None
    if picture.reference:
        try:
            reference = decode_any(picture.reference, limits, picture.key)
        except SampleError as error:
            raise SampleError(error.code, f"of the reference: {error.detail}", picture.key) from error
    return Request(
        key=picture.key,
        image=image,
        seed=picture.seed,
        prompt=ask.prompt,
        negative_prompt=ask.negative_prompt,
        size=size if size != image.shape[:2] else None,
        options=ask.options,
        reference=reference,
    )


def _reference_alpha(picture: Picture, limits: Limits) -> Image:
    """Return the alpha of a reference as a gray picture [H, W, 3]; opaque if the reference has no alpha."""
    parts = read_file(picture.reference, limits, picture.key).parts
    alpha = np.full(parts.image.shape[:2], 255, np.uint8) if parts.alpha is None else parts.alpha
    return np.dstack([alpha] * 3)


def _with_parts(image: Image, parts: Decoded, ask: Ask, restored_alpha: Image | None) -> Image:
    """Make a restored picture [H, W, 3] gray if its source is gray, and add its source's alpha.

    Returns:
        uint8 [H, W], [H, W, 2], [H, W, 3] or [H, W, 4], as encode_file accepts.
    """
    gray = parts.gray and ask.gray == "keep"
    planes = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] if gray else [image]
    if parts.alpha is not None and ask.alpha != "flatten":
        if restored_alpha is not None:
            alpha = cv2.cvtColor(restored_alpha, cv2.COLOR_RGB2GRAY)
        elif parts.alpha.shape == image.shape[:2]:
            alpha = parts.alpha
        else:
            size = (image.shape[1], image.shape[0])
            alpha = np.asarray(Pillow.fromarray(parts.alpha).resize(size, Pillow.Resampling.BICUBIC))
        planes.append(alpha)
    result = np.dstack(planes) if len(planes) > 1 else planes[0]
    return np.ascontiguousarray(result).astype(np.uint8, copy=False)


def png_text(identity: Identity, picture: Picture, ask: Ask, restored: Restored) -> dict[str, str]:
    """Return what the result says about itself, enough to reproduce it: text chunks of a PNG, XMP of other formats."""
    return {
        **restored.info,
        "software": "restoray",
        "model": identity.name,
        "model_digest": identity.digest,
        "system": identity.system,
        "recipe": identity.recipe,
        "key": picture.key,
        "seed": str(picture.seed),
        "source_sha256": hashlib.sha256(picture.data).hexdigest(),
        **({"reference_sha256": hashlib.sha256(picture.reference).hexdigest()} if picture.reference else {}),
        "options": json.dumps(ask.with_prompt(picture.prompt).document(), sort_keys=True),
        **({"file": json.dumps(ask.file.document(), sort_keys=True)} if ask.file.document() else {}),
    }


def _restore(
    restorer: Restorer,
    requests: Mapping[int, Request],
    cancelled: Cancelled | None,
    on_step: OnStep | None = None,
) -> dict[int, Restored | SampleError]:
    """Restore requests as one batch; if it fails, restore them one by one to assign the error to its picture."""
    if not requests:
        return {}
    try:
        watch = {} if on_step is None else {"on_step": on_step}
        answers = restorer.restore(list(requests.values()), cancelled=cancelled, **watch)
        if len(answers) != len(requests):  # zip's ValueError would blame the request
            raise RuntimeError(f"the restorer gave {len(answers)} answers to {len(requests)} requests")
        for request, answer in zip(requests.values(), answers, strict=True):
            _check_answer(request, answer)
        return dict(zip(requests, answers, strict=True))
    except Cancellation:
        raise
    except Exception as error:  # noqa: BLE001 - any failure of a system becomes the SampleError of one picture
        if len(requests) == 1:
            (index, request), *_ = requests.items()
            return {index: as_sample_error(error, request.key)}
    results: dict[int, Restored | SampleError] = {}
    for index, request in requests.items():
        results.update(_restore(restorer, {index: request}, cancelled, on_step))
    return results


def _check_answer(request: Request, answer: Restored) -> None:
    """Check key, type and size of an answer, so that a restorer that mixes up pictures writes no file."""
    image, size = answer.image, request.size or request.image.shape[:2]
    if answer.key != request.key:
        raise RuntimeError(f"the restorer answered with {answer.key!r} for {request.key!r}")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (*size, 3):
        description = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise RuntimeError(f"the restorer returned {description} instead of uint8 {(*size, 3)}")


def as_sample_error(error: Exception, key: str) -> SampleError:
    """Turn a restorer's exception for one picture into a SampleError with a code of `restore_pictures`."""
    if isinstance(error, SampleError):
        return SampleError(error.code, error.detail, error.key or key)
    # torch.OutOfMemoryError is a RuntimeError; this module cannot import it
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SampleError("out_of_memory", "not enough memory to restore the picture", key)
    if isinstance(error, ValueError):
        return SampleError("refused", str(error), key)
    return SampleError("failed", f"{type(error).__name__}: {error}", key)
