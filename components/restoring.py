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
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from components.images import Limits, decode, encode_png
from components.naming import bounded
from components.options import OptionCheck, UnknownOption
from components.randomness import stream_key
from components.types import Cancellation, Cancelled, Request, Restored, Restorer, SampleError

MAX_KEY_BYTES = 200
"""A key is a file name: 255 bytes less room for suffixes, in every common file system."""

MAX_PROMPT_CHARS = 2000
MAX_OUTPUT_PIXELS = 50_000_000  # ours; as many as Limits lets in
MAX_SEED = 2**63 - 1
TEXTS, SIDES = ("prompt", "negative_prompt"), ("height", "width")  # options that every system takes


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a restored picture and the service say about the model: a few fields of model.json, and its digest."""

    name: str
    system: str
    recipe: str
    digest: str
    licence: str = "unstated"
    permitted_use: str = "unstated"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is wanted of every picture of a job, besides its seed.

    Attributes:
        prompt, negative_prompt: text for guidance.
        size: (height, width) of the result in pixels; None keeps the input's.
        options: system-specific settings, in the system's own types.
    """

    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON, without what was not asked for."""
        named = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        size = {"height": self.size[0], "width": self.size[1]} if self.size else {}
        return {**{k: v for k, v in named.items() if v}, **size, **self.options}

    def digest(self) -> str:
        """Equal for equal wishes."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture to restore: its key, the bytes of its file, and its seed."""

    key: str
    data: bytes
    seed: int


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


def parse_ask(options: Mapping[str, Any], check: OptionCheck = dict, max_output_pixels: int = MAX_OUTPUT_PIXELS) -> Ask:
    """Sort loose options into an Ask; prompt, negative_prompt, width and height are ours, the rest the system's.

    Args:
        check: the system's `check_options`; the default takes its options as they are.

    Raises:
        ValueError: one sentence that names the option.
    """
    left = dict(options)
    texts = {name: left.pop(name, "") for name in TEXTS}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {text!r}")
        if len(text) > MAX_PROMPT_CHARS:
            raise ValueError(f"{name} has {len(text)} characters; the limit is {MAX_PROMPT_CHARS}")
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\n\t" for letter in text):
            raise ValueError(f"{name} holds control characters")
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
    for name, value in left.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    try:
        own = check(left)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*error.known, *TEXTS, *SIDES)) from None
    return Ask(**texts, size=(size["height"], size["width"]) if given else None, options=own)


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
    for index, picture in enumerate(pictures):
        try:
            requests[index] = Request(
                key=picture.key,
                image=decode(picture.data, limits, picture.key),
                seed=picture.seed,
                prompt=ask.prompt,
                negative_prompt=ask.negative_prompt,
                size=ask.size,
                options=ask.options,
            )
        except SampleError as error:
            results[index] = error
    for index, restored in _restore(restorer, requests, cancelled).items():
        if isinstance(restored, SampleError):
            results[index] = restored
        else:
            text = png_text(identity, pictures[index], ask, restored)
            results[index] = encode_png(restored.image, text)
    return [results[index] for index in range(len(pictures))]


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
        "options": json.dumps(ask.document(), sort_keys=True),
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
            return {index: _as_sample_error(error, request.key)}
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


def _as_sample_error(error: Exception, key: str) -> SampleError:
    if isinstance(error, SampleError):
        return SampleError(error.code, error.detail, error.key or key)
    # torch.OutOfMemoryError is a RuntimeError known here only by its name
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return SampleError("out_of_memory", "not enough memory to restore the picture", key)
    if isinstance(error, ValueError):
        return SampleError("refused", str(error), key)
    return SampleError("failed", f"{type(error).__name__}: {error}", key)
