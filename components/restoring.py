"""One picture's way through a restorer: bytes in, PNG bytes out; shared by batch jobs and the service.

Because both call `restore_batch`, a picture restored by the service has the bytes that the batch job wrote, provided
the model, the key, the seed and the options are the same (and the batch size: float rounding may differ in company).
Torch-free: the restorer is passed in.
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

from components.images import Decoded, Limits, decode, decode_parts, encode_png, flattened
from components.naming import bounded
from components.options import OptionCheck, UnknownOption
from components.randomness import stream_key
from components.types import Cancellation, Cancelled, Image, Request, Restored, Restorer, SampleError

MAX_KEY_BYTES = 200
"""A key is a file name: 255 bytes less room for suffixes, in every common file system."""

MAX_PROMPT_CHARS = 2000
MAX_OUTPUT_PIXELS = 100_000_000  # ours: a square of 10,000 px
MAX_SCALE = 16.0  # ours
MAX_SEED = 2**63 - 1
TEXTS, SIDES = ("prompt", "negative_prompt"), ("height", "width")  # options that every system takes, as are these:
CHOICES: Mapping[str, tuple[str, ...]] = {"alpha": ("keep", "restore", "flatten"), "gray": ("keep", "color")}
COMMON = (*TEXTS, *SIDES, "scale", *CHOICES)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a restored picture and the service say about the model: a few fields of model.json, and its digest.

    Attributes:
        frame: what the recipe told the model of a picture, with its caption in the place of {caption}; "": that alone.
        defaults: restorer options that its recipe settles; a request's own win over them.
    """

    name: str
    system: str
    recipe: str
    digest: str
    licence: str = "unstated"
    permitted_use: str = "unstated"
    frame: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is wanted of every picture of a job, besides its seed.

    Attributes:
        prompt, negative_prompt: text for guidance.
        size: (height, width) of the result in pixels; None keeps the input's, times `scale`.
        scale: result's side over input's side.
        alpha: of transparent pictures: "keep" resamples it (untouched where the size stays), "restore" sends it through
            the restorer as a picture of its own, "flatten" shows the picture on white.
        gray: "keep" gives a picture without colours a result without colours; "color" lets the restorer add them.
        options: system-specific settings, in the system's own types.
        max_output_pixels: a larger result is refused; no part of the wish.
    """

    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    scale: float = 1.0
    alpha: str = "keep"
    gray: str = "keep"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_output_pixels: int = MAX_OUTPUT_PIXELS

    def document(self) -> dict[str, Any]:
        """As JSON, without what was not asked for."""
        named = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        size = {"height": self.size[0], "width": self.size[1]} if self.size else {}
        kinds = {"scale": (self.scale, 1.0), "alpha": (self.alpha, "keep"), "gray": (self.gray, "keep")}
        changed = {name: value for name, (value, usual) in kinds.items() if value != usual}
        return {**{k: v for k, v in named.items() if v}, **size, **changed, **self.options}

    def saying(self, prompt: str) -> Ask:
        """The same wish with a picture's own prompt; "" for none."""
        return replace(self, prompt=prompt) if prompt else self

    def output_size(self, height: int, width: int, key: str = "") -> tuple[int, int]:
        """(height, width) of the result of a picture of that size.

        Raises:
            SampleError: too_large, more pixels than max_output_pixels; too_small, less than one.
        """
        size = self.size or (round(height * self.scale), round(width * self.scale))
        if min(size) < 1:
            raise SampleError("too_small", f"a scale of {self.scale:g} leaves nothing of {width} x {height}", key)
        if size[0] * size[1] > self.max_output_pixels:
            detail = f"{size[1]} x {size[0]} pixels exceed max_output_pixels, which is {self.max_output_pixels}"
            raise SampleError("too_large", detail, key)
        return size

    def digest(self) -> str:
        """Equal for equal wishes."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to restore.

    Attributes:
        key: name of the result.
        data: bytes of its file.
        seed: its own.
        reference: bytes of a second picture's file; b"" for none.
        prompt: its own, in the place of the job's; "" for none.
    """

    key: str
    data: bytes
    seed: int
    reference: bytes = b""
    prompt: str = ""


def file_key(name: str) -> str:
    """A key that stays recognisable, from any file name without its suffix: it names the result's file.

    No path, no control characters, no leading dot, at most MAX_KEY_BYTES as UTF-8.
    What is cut off a long name is replaced by a hash of the whole, so that different names stay different.
    """
    text = name.encode("utf-8", "replace").decode("utf-8")  # lone surrogates stand for bytes that are no UTF-8
    text = unicodedata.normalize("NFC", text)
    text = "".join("_" if letter in "/\\:" or not letter.isprintable() else letter for letter in text)
    text = "_" + text[1:] if text.startswith(".") else text
    return bounded(text, MAX_KEY_BYTES, text) or "picture"


def picture_seed(seed: int, key: str) -> int:
    """The seed of one picture in a job of that seed: 31 bits, independent of the job's other pictures."""
    return stream_key(seed, key) % 2**31


def check_text(name: str, text: Any) -> str:
    """A text for guidance as it came.

    Raises:
        ValueError: no text, too long, or with control characters; says so of `name`.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    if len(text) > MAX_PROMPT_CHARS:
        raise ValueError(f"{name} has {len(text)} characters; the limit is {MAX_PROMPT_CHARS}")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
        raise ValueError(f"{name} holds control characters")
    return text


def parse_ask(options: Mapping[str, Any], check: OptionCheck = dict, max_output_pixels: int = MAX_OUTPUT_PIXELS) -> Ask:
    """Sort loose options into an Ask; those of COMMON are ours, the rest the system's.

    Args:
        check: the system's `check_options`; the default takes its options as they are.

    Raises:
        ValueError: one sentence that names the option.
    """
    left = dict(options)
    texts = {name: check_text(name, left.pop(name, "")) for name in TEXTS}
    size = {name: left.pop(name, None) for name in SIDES}
    given = [name for name, value in size.items() if value is not None]
    if len(given) == 1:
        raise ValueError(f"{given[0]} was given alone; give width and height together, or neither")
    for name in given:
        if isinstance(size[name], bool) or not isinstance(size[name], int) or not 8 <= size[name] <= 1 << 16:
            raise ValueError(f"{name} must be a whole number of pixels from 8 to {1 << 16}, got {size[name]!r}")
    if given and size["height"] * size["width"] > max_output_pixels:
        raise ValueError(
            f"{size['width']} x {size['height']} pixels exceed max_output_pixels, which is {max_output_pixels}"
        )
    scale = _scale(left.pop("scale", None), given)
    kinds = {name: left.pop(name, choices[0]) for name, choices in CHOICES.items()}
    for name, kind in kinds.items():
        if kind not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {kind!r:.80}")
    for name, value in left.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    try:
        own = check(left)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*error.known, *COMMON)) from None
    return Ask(
        **texts,
        size=(size["height"], size["width"]) if given else None,
        scale=scale,
        **kinds,
        options=own,
        max_output_pixels=max_output_pixels,
    )


def _scale(value: Any, sides: Sequence[str]) -> float:
    """A checked output scale; 1 where none was given."""
    if value is None:
        return 1.0
    if sides:
        raise ValueError("scale and width and height exclude each other; give one of them")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 / MAX_SCALE <= value <= MAX_SCALE:
        raise ValueError(f"scale must be a number from {1 / MAX_SCALE:g} to {MAX_SCALE:g}, got {value!r:.80}")
    return float(value)


def restore_bytes(
    restorer: Restorer,
    identity: Identity,
    picture: Picture,
    ask: Ask,
    limits: Limits = Limits(),
    cancelled: Cancelled | None = None,
) -> bytes:
    """Restore one picture; the PNG's bytes.

    Raises:
        SampleError: the picture cannot be decoded or restored; see `restore_batch`.
        Cancellation: `cancelled` became true.
    """
    result = restore_batch(restorer, identity, [picture], ask, limits, cancelled)[0]
    if isinstance(result, SampleError):
        raise result
    return result


def restore_batch(
    restorer: Restorer,
    identity: Identity,
    pictures: Sequence[Picture],
    ask: Ask,
    limits: Limits = Limits(),
    cancelled: Cancelled | None = None,
) -> list[bytes | SampleError]:
    """Decode, restore and encode; one broken picture does not harm its neighbours.

    If a batch fails as a whole (no memory, say) its pictures are tried one by one.

    Returns:
        For each picture its PNG, or the SampleError that says why not: the codes of `components.images`, and
        `refused` (the restorer's ValueError: an unknown option, a size that it cannot do), `out_of_memory`, `failed`.

    Raises:
        Cancellation: `cancelled` became true.
    """
    results: dict[int, bytes | SampleError] = {}
    requests: dict[int, Request] = {}
    veils: dict[int, Request] = {}  # transparency, as gray pictures
    parts: dict[int, Decoded] = {}
    for index, picture in enumerate(pictures):
        try:
            parts[index] = decode_parts(picture.data, limits, picture.key)
            requests[index] = _request(picture, parts[index], ask.saying(picture.prompt), limits)
        except SampleError as error:
            results[index] = error
            continue
        alpha = parts[index].alpha
        if alpha is not None and ask.alpha == "restore":
            veils[index] = replace(
                requests[index],
                image=np.dstack([alpha] * 3),
                prompt="",
                negative_prompt="",
                reference=_veil_of_reference(picture, limits) if picture.reference else None,
            )
    answers = _restore(restorer, requests, cancelled)
    lifted = _restore(restorer, {i: v for i, v in veils.items() if isinstance(answers[i], Restored)}, cancelled)
    for index, restored in answers.items():
        veil = lifted.get(index)
        if isinstance(restored, SampleError) or isinstance(veil, SampleError):
            results[index] = restored if isinstance(restored, SampleError) else veil  # type: ignore[assignment]
        else:
            image = _with_parts(restored.image, parts[index], ask, veil.image if veil is not None else None)
            results[index] = encode_png(image, png_text(identity, pictures[index], ask, restored))
    return [results[index] for index in range(len(pictures))]


def request_of(picture: Picture, ask: Ask, limits: Limits = Limits()) -> Request:
    """What `restore_batch` asks the restorer for a picture.

    Raises:
        SampleError: it cannot be decoded, or its result would be too large.
    """
    return _request(picture, decode_parts(picture.data, limits, picture.key), ask.saying(picture.prompt), limits)


def _request(picture: Picture, parts: Decoded, ask: Ask, limits: Limits) -> Request:
    """What the restorer is asked; raises SampleError."""
    image = flattened(parts) if ask.alpha == "flatten" else parts.image
    size = ask.output_size(image.shape[0], image.shape[1], picture.key)
    reference = None
    if picture.reference:
        try:
            reference = decode(picture.reference, limits, picture.key)
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


def _veil_of_reference(picture: Picture, limits: Limits) -> Image:
    """The transparency of a reference as a gray picture [H, W, 3]: opaque everywhere where it has none of its own."""
    parts = decode_parts(picture.reference, limits, picture.key)
    alpha = np.full(parts.image.shape[:2], 255, np.uint8) if parts.alpha is None else parts.alpha
    return np.dstack([alpha] * 3)


def _with_parts(image: Image, parts: Decoded, ask: Ask, veil: Image | None) -> Image:
    """A restored picture [H, W, 3] as a gray one where its source is, and with its source's transparency.

    Returns:
        uint8 [H, W], [H, W, 2], [H, W, 3] or [H, W, 4], as encode_png takes it.
    """
    gray = parts.gray and ask.gray == "keep"
    planes = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] if gray else [image]
    if parts.alpha is not None and ask.alpha != "flatten":
        if veil is not None:
            alpha = cv2.cvtColor(veil, cv2.COLOR_RGB2GRAY)
        elif parts.alpha.shape == image.shape[:2]:
            alpha = parts.alpha
        else:
            size = (image.shape[1], image.shape[0])
            alpha = np.asarray(Pillow.fromarray(parts.alpha).resize(size, Pillow.Resampling.BICUBIC))
        planes.append(alpha)
    made = np.dstack(planes) if len(planes) > 1 else planes[0]
    return np.ascontiguousarray(made).astype(np.uint8, copy=False)


def png_text(identity: Identity, picture: Picture, ask: Ask, restored: Restored) -> dict[str, str]:
    """Text chunks of the result: enough to make it again. Nothing is copied from the input file's own metadata."""
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
        "options": json.dumps(ask.saying(picture.prompt).document(), sort_keys=True),
    }


def _restore(
    restorer: Restorer, requests: Mapping[int, Request], cancelled: Cancelled | None
) -> dict[int, Restored | SampleError]:
    """Restore together; where that fails, one by one, so that the error finds its picture."""
    if not requests:
        return {}
    try:
        answers = restorer.restore(list(requests.values()), cancelled=cancelled)
        for request, answer in zip(requests.values(), answers, strict=True):
            _check_answer(request, answer)
        return dict(zip(requests, answers, strict=True))
    except Cancellation:
        raise
    except Exception as error:  # noqa: BLE001 - any failure of a system becomes one picture's reason here
        if len(requests) == 1:
            (index, request), *_ = requests.items()
            return {index: as_sample_error(error, request.key)}
    alone: dict[int, Restored | SampleError] = {}
    for index, request in requests.items():
        alone.update(_restore(restorer, {index: request}, cancelled))
    return alone


def _check_answer(request: Request, answer: Restored) -> None:
    """A restorer that mixes pictures up must not get as far as a file."""
    image, size = answer.image, request.size or request.image.shape[:2]
    if answer.key != request.key:
        raise RuntimeError(f"the restorer answered with {answer.key!r} for {request.key!r}")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (*size, 3):
        got = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        raise RuntimeError(f"the restorer returned {got} where uint8 {(*size, 3)} was asked for")


def as_sample_error(error: Exception, key: str) -> SampleError:
    """What a restorer raised over one picture, as that picture's reason; the codes are those of `restore_batch`."""
    if isinstance(error, SampleError):
        return SampleError(error.code, error.detail, error.key or key)
    # torch.OutOfMemoryError is a RuntimeError known here only by its name
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SampleError("out_of_memory", "not enough memory to restore the picture", key)
    if isinstance(error, ValueError):
        return SampleError("refused", str(error), key)
    return SampleError("failed", f"{type(error).__name__}: {error}", key)
