"""Options that several functions share: of building a restorer, of input pictures, of captioners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.corpora import CaptionSpec
from components.images import Limits, limits_for_any_shape
from components.options import COMPILE_MODES
from components.overrides import apply_overrides
from pipelines.core.errors import UsageError, unknown

MAX_LIMIT = 1e9
"""Largest number of megapixels and megabytes; ours, far above any picture."""


def picture_limits(max_megapixels: float, max_megabytes: float | None) -> Limits:
    """Return the limits of input pictures.

    Raises:
        UsageError: a limit is no number of at most MAX_LIMIT.
    """
    for name, value in (("--max-megapixels", max_megapixels), ("--max-megabytes", max_megabytes)):
        if value is not None and not 0 < value <= MAX_LIMIT:  # also refuses NaN
            raise UsageError(f"{name} must be a number up to {MAX_LIMIT:g}, got {value:g}.")
    max_bytes = None if max_megabytes is None else max(1, round(max_megabytes * 1e6))
    return limits_for_any_shape(max(1, round(max_megapixels * 1e6)), max_bytes)


def build_options(device: str, precision: str, compile_mode: str = "off", offload: bool = False) -> dict[str, Any]:
    """Return the options with which a restorer is built, without defaults, so that records of earlier jobs still match.

    Raises:
        UsageError: the device, precision or compile mode does not exist.
    """
    devices, precisions = ("cpu", "cuda"), ("fp32", "bf16", "fp16", "fp8")
    for kind, name, choices in (
        ("device", device, devices),
        ("precision", precision, precisions),
        ("compile", compile_mode, COMPILE_MODES),
    ):
        if name not in choices:
            raise unknown(kind, name, choices)
    options: dict[str, Any] = {"device": device, "precision": precision, "speed": {"compile": compile_mode}}
    options["offload"] = offload
    defaults = {"device": "cpu", "precision": "fp32", "speed": {"compile": "off"}, "offload": False}
    return {k: v for k, v in options.items() if v != defaults[k]}


def caption_spec(model: str, overrides: Sequence[str] = ()) -> CaptionSpec:
    """Return a captioner's settings. Raises UsageError for an unknown setting."""
    try:
        spec = OmegaConf.to_object(apply_overrides(CaptionSpec, {}, [*overrides, f"model={model}"]))
    except (OmegaConfBaseException, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    assert isinstance(spec, CaptionSpec)
    return spec


def file_options(**settings: str | int | None) -> dict[str, str | int]:
    """Those settings of a result's file that were given: format, quality, bits, metadata, icc."""
    return {name: value for name, value in settings.items() if value is not None}
