"""`restoray.load`: a model in this process, without Ray, which restores pictures of any kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.images import Limits
from components.restoring import Ask, Identity, Picture, Result, picture_key, picture_seed, restore_pictures
from components.types import Image, OnStep, Restorer, SampleError, StepEvent
from pipelines.api.kinds import Input, is_one, join_batch, read_input, split_batch
from pipelines.api.options import build_options, picture_limits
from pipelines.core.devices import check_device
from pipelines.core.errors import UsageError
from pipelines.core.pool import THREADS
from pipelines.restoration.models import OpenedModel, open_model
from pipelines.runs.registry import local_model

if TYPE_CHECKING:
    from torch import Tensor

AUTO = "auto"


def load(
    model: str | Path = "nano",
    device: str = AUTO,
    precision: str = AUTO,
    *,
    threads: int = THREADS,
    max_megapixels: float = 50,
    **build: Any,
) -> LoadedModel:
    """Load a model into this process.

    Args:
        model: a shipped name (`restoray.models()`), a model folder, an address in a store, or models:/name@alias.
        device: "cpu", "cuda" or "cuda:1"; auto takes a GPU if torch can use one.
        precision: of the weights: fp32, bf16, fp16, or fp8 for some systems. auto is fp32 on the CPU, and on a GPU bf16
            if the model runs in it.
        threads: torch threads on the CPU. One gives the bits of `restoray restore`; more are faster, and may change the
            last bit of a sum.
        max_megapixels: larger inputs are refused.
        build: compile="blocks" and offload=True, as the options of the command line.

    Raises:
        UsageError: there is no such model, device or precision, or the model restores nothing.
    """
    import torch

    from components.models import ModelError

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device
    check_device(device, one_of=False)
    kind, _, number = device.partition(":")
    limits = picture_limits(max_megapixels, None)
    is_auto = precision == AUTO
    attempts = (["bf16", "fp32"] if kind == "cuda" else ["fp32"]) if is_auto else [precision]
    unknown_options = sorted(set(build) - {"compile", "offload"})
    if unknown_options:
        raise UsageError(f"load takes no {unknown_options[0]}: it takes compile and offload.")
    for attempt in attempts:
        settings = build_options(kind, attempt, build.get("compile", "off"), bool(build.get("offload", False)))
        settings |= {"device": device} if number else {}
        opened = open_model(local_model(str(model)), settings)
        try:
            return LoadedModel(opened, opened.factory(), attempt, device, threads, limits)
        except ModelError as error:
            if attempt == attempts[-1]:
                raise UsageError(str(error)) from error
    raise AssertionError("the last attempt returns or raises")


class LoadedModel:
    """A model in this process; `load` makes it. One thread may use it at a time.

    Attributes:
        identity: name, system, recipe, digest, licence and permitted use.
        defaults: options that the model's recipe sets.
        device, precision: of the networks.
    """

    def __init__(
        self, opened: OpenedModel, restorer: Restorer, precision: str, device: str, threads: int, limits: Limits
    ) -> None:
        self.identity: Identity = opened.identity
        self.defaults: Mapping[str, Any] = dict(opened.identity.defaults)
        self.device, self.precision = device, precision
        self._opened, self._restorer, self._threads, self._limits = opened, restorer, threads, limits

    def __repr__(self) -> str:
        return f"<restoray model {self.identity.name}: {self.identity.system}, {self.device}, {self.precision}>"

    def restore(
        self,
        images: Any,
        *,
        prompt: str = "",
        seed: int = 0,
        on_step: OnStep | None = None,
        keys: str | Sequence[str] | None = None,
        reference_image: Any = None,
        **options: Any,
    ) -> Any:
        """Restore one picture or many, with the pixels of `restoray restore` for the same key, seed and options.

        The result has the kind of the input, and `info`, the record that the PNG of a batch job holds: model, digest,
        key, seed, options and the sha256 of the input.

            PIL picture        PIL picture (`info` is PIL's own mapping)
            NumPy array        NumPy array: uint8 [H, W, C] with the channels of the input
            torch tensor       tensor of the same type, device and channels: [C, H, W]; a batch [B, C, H, W] gives a
                               batch, whose info is a list
            bytes              bytes of a PNG, equal to the file of `restoray restore`
            path, address      PIL picture
            list or tuple      list
            other iterables    generator, which restores a picture when it is asked for

        Args:
            images: a path or address, bytes of a picture file, a PIL picture, a uint8 array [H, W], [H, W, 1],
                [H, W, 3] or [H, W, 4], a tensor [C, H, W] or [B, C, H, W] (uint8, or floats in [0, 1]), or an iterable
                of these.
            prompt: text for guidance, for all pictures.
            seed: with a picture's key it determines every random number.
            on_step: called after each step of a sampler, with step, of, and the latents of a preview if there is one;
                see `decode`.
            keys: names of the pictures. None takes the name of a file, and "picture" for a picture without one.
            reference_image: a second picture, for options such as reference="hq".
            options: as those of `restoray restore`: scale=2, steps=20, preset="paper".

        Raises:
            UsageError: an unknown or wrong option (the message has the nearest name), or a picture of a wrong type,
                shape or range.
            SampleError: a picture cannot be decoded or restored: `code`, `detail` and `key`.
        """
        ask = self._opened.request_options({"prompt": prompt, **options})
        ask = replace(ask, max_output_pixels=max(ask.max_output_pixels, self._limits.max_pixels))
        reference = read_input(reference_image, "", self._limits).data if reference_image is not None else b""
        batch = split_batch(images)
        restored = self._restored(images if batch is None else batch, ask, seed, on_step, keys, reference)
        if batch is not None:
            return join_batch(list(restored))
        if is_one(images):
            return next(restored)
        return list(restored) if isinstance(images, list | tuple) else restored

    def decode(self, latents: Tensor) -> list[Image]:
        """Turn the preview latents of `on_step` [B, C, h, w] into pictures, uint8 [H, W, 3] each.

        Raises:
            UsageError: the model has no previews.
        """
        with self._few_threads():
            pictures = self._restorer.decode(latents)
        if pictures is None:
            raise UsageError(f"a model of the system {self.identity.system} has no previews.")
        return pictures

    def _restored(
        self,
        images: Any,
        ask: Ask,
        seed: int,
        on_step: OnStep | None,
        keys: str | Sequence[str] | None,
        reference: bytes,
    ) -> Iterator[Any]:
        """Yield the restored pictures in order."""
        names = _names(images, keys)
        for image in [images] if is_one(images) else images:
            picture = read_input(image, next(names), self._limits)
            yield picture.back(self._restore_one(picture, ask, seed, on_step, reference))

    def _restore_one(self, one: Input, ask: Ask, seed: int, on_step: OnStep | None, reference: bytes) -> Result:
        """Restore a picture like the worker of a batch job, which has calls of one picture.

        Raises:
            SampleError: the picture cannot be restored.
            Exception: an error of `on_step` as it is; a batch job would count it as one of the picture.
        """
        errors: list[Exception] = []

        def watch(event: StepEvent) -> None:
            assert on_step is not None
            try:
                on_step(event)
            except Exception as error:
                errors.append(error)
                raise

        picture = Picture(key=one.key, data=one.data, seed=picture_seed(seed, one.key), reference=reference)
        with self._few_threads():
            (result,) = restore_pictures(
                self._restorer, self.identity, [picture], ask, self._limits, on_step=watch if on_step else None
            )
        if errors:
            raise errors[0]
        if isinstance(result, SampleError):
            raise result
        return result

    @contextlib.contextmanager
    def _few_threads(self) -> Iterator[None]:
        """Let torch use `threads` threads inside a `with` block."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _names(images: Any, keys: str | Sequence[str] | None) -> Iterator[str]:
    """Yield the key of each picture, "" for its own.

    Raises:
        UsageError: there are more or fewer keys than pictures.
    """
    if keys is None:
        while True:
            yield ""
    names = [keys] if isinstance(keys, str) else list(keys)
    if isinstance(images, Sequence | str) or is_one(images):
        count = 1 if is_one(images) else len(images)
        if count != len(names):
            raise UsageError(f"{len(names)} keys were given for {count} pictures.")
    for name in names:
        yield picture_key(name)
    raise UsageError(f"there are more pictures than the {len(names)} keys.")
