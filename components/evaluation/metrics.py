"""Picture quality by name, one picture at a time, by metrics of ours and of pyiqa.

This module alone imports pyiqa, at the first use of one of its metrics: the import takes seconds and hundreds of MB.
The default set needs no file from the network. Any other pyiqa name is accepted too and may download weights. pyiqa's
licence is non-commercial, and it may be absent: the metrics of `OWN`, consistency and color_drift do not need it.

    psnr, psnry    dB over RGB, or over Y alone; pyiqa's Y is full range (0.299 R + 0.587 G + 0.114 B), which reads
                   1.3 dB below the studio-range Y of many papers. pyiqa adds 1e-8 to the squared error, so equal
                   pictures score 80 dB and not infinity. Restored pictures stay far below 80, and means are finite.
    ssim, ms_ssim  1 for equal pictures, on Y; ms_ssim halves the picture four times and needs 161 px a side.
    gmsd           deviation of gradient similarity, 0 for equal pictures.
    vif            share of the target's information in the result, 1 for equal pictures; sharpening can exceed 1.
    st_lpips       shift-tolerant LPIPS, 0 for equal pictures; a learned score whose weights come with the requirements.
    niqe_restoray  without a target: distance from the statistics of sharp photographs, 0 and up; not NIQE.
    consistency    dB: the result, degraded again by the recorded plan, against the input.
    color_drift    mean Delta E between the colours of result and input, over areas of 16 px.
    piqe           without a target: 0 (clean) to 100 (blocky, noisy or blurred), from local statistics only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from components.evaluation import IDENTITY_PSNR_DB as IDENTITY_PSNR_DB
from components.evaluation.downloads import weights_error
from components.naming import near_name
from components.types import Image, Plan, SampleError

NO_DOWNLOAD: tuple[str, ...] = (
    "psnr", "ssim", "ms_ssim", "gmsd", "vif", "st_lpips", "piqe", "niqe_restoray", "consistency", "color_drift"
)  # fmt: skip
"""The default set: no network, each below 0.3 s at 256 px on one CPU thread."""

ONE_THREAD_PIXELS = 1_000_000
"""Below this size one CPU thread is faster: at 256 x 448 on two busy cores vif took 0.5 s, with two threads 7.8 s."""

DOWNLOAD_SILENCE_S = 60.0
"""Longest silence of a server of weights; ours."""


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """The properties of a metric.

    Attributes:
        higher_is_better: true if a higher score is better.
        full_reference: the metric compares with a target; without a target it is missing.
        unit: "dB" or "".
        min_side_px: for smaller sides the metric is undefined and recorded as missing.
        needs_detail: undefined for a target of one colour (a ratio of zeros), and then recorded as missing.
        downloads: the first use may download weights.
        judges: what the metric judges, if that is not a picture alone: one of JUDGES' values.
        compares: "input": with the input picture; "plan": with it, and needs the plan that made it; "" for neither.
    """

    higher_is_better: bool
    full_reference: bool = True
    unit: str = ""
    min_side_px: int = 1
    needs_detail: bool = False
    downloads: bool = False
    judges: str = ""
    compares: str = ""


JUDGES = {"FID": "sets of pictures", "InceptionScore": "sets of pictures", "CLIPScore": "pictures with captions"}
"""Kinds of pyiqa's networks that cannot score a picture alone, and what they judge."""


class MetricError(ValueError):
    """A metric cannot be used: its weights are missing or broken, or a package is; one line that says what to do."""


METRIC_INFO: dict[str, MetricInfo] = {
    "psnr": MetricInfo(higher_is_better=True, unit="dB"),
    "psnry": MetricInfo(higher_is_better=True, unit="dB"),
    "ssim": MetricInfo(higher_is_better=True, min_side_px=11),
    "ssimc": MetricInfo(higher_is_better=True, min_side_px=11),
    "ms_ssim": MetricInfo(higher_is_better=True, min_side_px=161),  # an 11 px window after four halvings: 10 * 16 + 1
    "cw_ssim": MetricInfo(higher_is_better=True, min_side_px=64, needs_detail=True),
    "fsim": MetricInfo(higher_is_better=True, min_side_px=32),
    "gmsd": MetricInfo(higher_is_better=False, min_side_px=8),
    "nlpd": MetricInfo(higher_is_better=False, min_side_px=64),
    "vif": MetricInfo(higher_is_better=True, min_side_px=64, needs_detail=True),
    "vsi": MetricInfo(higher_is_better=True, min_side_px=32),
    "mad": MetricInfo(higher_is_better=False, min_side_px=64),
    "piqe": MetricInfo(higher_is_better=False, full_reference=False, min_side_px=32),
    "entropy": MetricInfo(higher_is_better=True, full_reference=False),
    "st_lpips": MetricInfo(higher_is_better=False, min_side_px=32),
    "niqe_restoray": MetricInfo(higher_is_better=False, full_reference=False, min_side_px=96),
    "consistency": MetricInfo(higher_is_better=True, full_reference=False, unit="dB", compares="plan"),
    "color_drift": MetricInfo(higher_is_better=False, full_reference=False, compares="input"),
}
"""The metrics that need no download; `metric_info` looks others up in pyiqa."""


def _fidelity(name: str) -> Callable[[str], Any]:
    def load(device: str) -> Any:
        from components.evaluation import fidelity

        return getattr(fidelity, name)

    return load


def _st_lpips(device: str) -> Any:
    from components.evaluation.st_lpips import load_st_lpips

    return load_st_lpips(device)


def _niqe_restoray(device: str) -> Any:
    from components.evaluation.niqe_restoray import naturalness
    from components.tensors import tensor_to_images

    return lambda images: naturalness(tensor_to_images(images * 2 - 1)[0])


OWN: dict[str, Callable[[str], Any]] = {
    **{name: _fidelity(name) for name in ("psnr", "psnry", "ssim", "ssimc", "gmsd")},
    "st_lpips": _st_lpips,
    "niqe_restoray": _niqe_restoray,
}
"""Metrics of ours: (device) -> network, called like pyiqa's with pictures [1, 3, H, W] in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The input of a restored picture, uint8 [H', W', 3], and the plan that made it; None if it is not recorded."""

    lq: Image
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One picture's scores: `values` by metric, and in `missing` the reason for each metric without a value."""

    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def has_pyiqa() -> bool:
    """Whether pyiqa is installed."""
    try:
        return importlib.util.find_spec("pyiqa") is not None
    except ImportError:
        return False


def needs_pyiqa(name: str) -> bool:
    """Whether a metric is pyiqa's."""
    return name not in OWN and not (name in METRIC_INFO and METRIC_INFO[name].compares)


def usable(names: Sequence[str] = NO_DOWNLOAD) -> tuple[str, ...]:
    """The names that work here: all of them, or those of ours if pyiqa is not installed."""
    return tuple(names) if has_pyiqa() else tuple(name for name in names if not needs_pyiqa(name))


def left_out(names: Sequence[str] = NO_DOWNLOAD) -> tuple[str, ...]:
    """The names that do not work here."""
    return tuple(name for name in names if name not in usable(names))


def metric_info(name: str) -> MetricInfo:
    """Looks a metric up; only names outside METRIC_INFO load pyiqa.

    Raises:
        ValueError: the name is unknown; the message names the nearest one. Or pyiqa would know, and is not installed.
    """
    if name in METRIC_INFO:
        return METRIC_INFO[name]
    if not has_pyiqa():
        raise ValueError(_without_pyiqa(name, "is no metric of Restoray's own"))
    configs = _load_pyiqa()[1]
    if name not in configs:
        names = sorted({*METRIC_INFO, *configs})
        near = name.lower() if name.lower() in names else near_name(name, names)
        if "," in name or " " in name.strip():
            raise ValueError(
                f"unknown metric {name!r}. Each metric needs an option of its own: --metric psnr --metric ssim"
            )
        hint = f'Did you mean "{near}"?' if near else f"The default set is {', '.join(NO_DOWNLOAD)}."
        raise ValueError(f"unknown metric {name!r}. {hint}")
    config = configs[name]
    return MetricInfo(
        higher_is_better=not config.get("lower_better", False),
        full_reference=config.get("metric_mode") == "FR",
        downloads=True,
        judges=JUDGES.get(config.get("metric_opts", {}).get("type", ""), ""),
    )


def _without_pyiqa(name: str, what: str) -> str:
    """The sentence about a metric that needs pyiqa, where pyiqa is absent."""
    near = near_name(name, usable(tuple(METRIC_INFO)))
    hint = f' Did you mean "{near}"?' if near else ""
    return (
        f"metric {name!r} {what}, and the package pyiqa (licence: non-commercial) is not installed. Without it there "
        f"are {', '.join(usable(tuple(METRIC_INFO)))}.{hint}"
    )


def without_target(names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names that need no target; None takes the default set, as far as it works here."""
    names = usable() if names is None else names
    return tuple(name for name in names if not metric_info(name).full_reference)


def _load_pyiqa() -> tuple[Any, dict[str, Any]]:
    import pyiqa
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from pyiqa.utils.logger import get_root_logger

    get_root_logger()  # its first call installs handlers and sets level INFO; raise the level after it
    logging.getLogger("pyiqa").setLevel(logging.WARNING)
    return pyiqa, dict(DEFAULT_CONFIGS)


def _check(picture: Image, role: str, key: str) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise SampleError("shape", f"the {role} must be uint8 [H, W, 3], got {picture.dtype} {picture.shape}", key)


@contextmanager
def _patience() -> Iterator[None]:
    """Let a silent server of weights fail after DOWNLOAD_SILENCE_S; torch.hub would wait for it for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SILENCE_S if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _threads(picture: Image) -> Iterator[None]:
    """Sets one torch thread for a small picture, and restores the caller's number afterwards."""
    import torch

    before = torch.get_num_threads()
    if picture.shape[0] * picture.shape[1] < ONE_THREAD_PIXELS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Metrics:
    """Scores pictures by the metrics in `names`; each network is built at its first use and reused.

    Args:
        names: metric names, in the order of the results; duplicates are ignored.
        device: "cpu" or a torch device.

    Raises:
        ValueError: a name is unknown (the message names the nearest), a metric cannot score a picture alone or needs
            pyiqa where that is absent, or `names` is empty.
    """

    def __init__(self, names: Sequence[str] = NO_DOWNLOAD, device: str = "cpu") -> None:
        self.names = tuple(dict.fromkeys(names))
        if not self.names:
            raise ValueError(f"no metric was named; the default set is {', '.join(NO_DOWNLOAD)}")
        self.info = {name: metric_info(name) for name in self.names}
        for name in left_out(self.names):
            raise ValueError(_without_pyiqa(name, "is pyiqa's"))
        for name, info in self.info.items():
            if info.judges:
                advice = (
                    f"measure the two folders with pyiqa itself: pyiqa {name} -t RESTORED -r ORIGINALS"
                    if "sets" in info.judges
                    else "choose a metric that needs no caption"
                )
                raise ValueError(f"{name} judges {info.judges}, not a picture alone: leave it out here, and {advice}")
        self.device = device
        self._networks: dict[str, Any] = {}

    def load(self) -> None:
        """Open the networks that may need a download, so that a missing file ends the work before it starts.

        Raises:
            MetricError: a network cannot be opened.
        """
        for name, info in self.info.items():
            if info.downloads:
                self._network(name)

    def _network(self, name: str) -> Any:
        if name not in self._networks:
            try:
                if name in OWN:
                    self._networks[name] = OWN[name](self.device)
                    return self._networks[name]
                create = _load_pyiqa()[0].create_metric
                with contextlib.redirect_stdout(sys.stderr), _patience():  # pyiqa prints; stdout is for results
                    self._networks[name] = create(name, device=self.device)
            except Exception as error:  # noqa: BLE001 the libraries below raise many kinds
                raise MetricError(weights_error(name, error)) from None
        return self._networks[name]

    def score(
        self, restored: Image, hq: Image | None = None, key: str = "", origin: Origin | None = None
    ) -> dict[str, float]:
        """The values only; `measure` also returns the reasons for missing ones."""
        return self.measure(restored, hq, key, origin).values

    def measure(self, restored: Image, hq: Image | None = None, key: str = "", origin: Origin | None = None) -> Scores:
        """Scores one picture.

        Args:
            restored: uint8 [H, W, 3].
            hq: the target, same shape; with None the full-reference metrics are missing.
            key: the sample's key, for errors.
            origin: the picture's input, for the metrics that compare with it.

        Returns:
            Finite values by metric, and a reason for each metric without one ("no target", "no input", "no recorded
            plan", "needs 161 px a side, ...", "not a number", or the error of the metric).

        Raises:
            SampleError: "shape": a picture is not uint8 RGB, or the two sizes differ.
            MetricError: a network cannot be opened; see `load`.
        """
        _check(restored, "restored picture", key)
        if hq is not None:
            _check(hq, "target", key)
            if hq.shape != restored.shape:
                sizes = f"{restored.shape[0]} x {restored.shape[1]} and {hq.shape[0]} x {hq.shape[1]}"
                raise SampleError("shape", f"restored picture and target differ in size: {sizes}", key)
        scores = Scores()
        for name in self.names:
            compares = self.info[name].compares
            value, reason = _agreement(name, restored, origin) if compares else self._one(name, restored, hq)
            if value is None:
                scores.missing[name] = reason
            else:
                scores.values[name] = value
        return scores

    def _one(self, name: str, restored: Image, hq: Image | None) -> tuple[float | None, str]:
        info = self.info[name]
        if info.full_reference and hq is None:
            return None, "no target"
        side = min(restored.shape[:2])
        if side < info.min_side_px:
            return None, f"needs {info.min_side_px} px a side, the picture has {side}"
        if info.needs_detail and hq is not None and not np.ptp(hq, axis=(0, 1)).any():
            return None, "the target is one flat colour"
        import torch

        def tensor(picture: Image) -> torch.Tensor:
            copy = np.ascontiguousarray(picture.transpose(2, 0, 1))
            return torch.from_numpy(copy).to(self.device).float().div(255.0).unsqueeze(0)

        network = self._network(name)
        inputs = [tensor(restored)] + ([tensor(hq)] if info.full_reference and hq is not None else [])
        try:
            with torch.inference_mode(), _threads(restored):
                value = float(network(*inputs))
        except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:  # undefined on this picture
            return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return (value, "") if math.isfinite(value) else (None, f"not a number ({value})")


def _agreement(name: str, restored: Image, origin: Origin | None) -> tuple[float | None, str]:
    """Value, or None and the reason, of a metric that compares with the input."""
    from components.evaluation.agreement import color_drift, consistency_db

    if origin is None:
        return None, "no input"
    if name == "color_drift":
        return color_drift(restored, origin.lq), ""
    if origin.plan is None:
        return None, "no recorded plan"
    try:
        return consistency_db(restored, origin.lq, origin.plan), ""
    except ValueError as error:
        return None, str(error)
