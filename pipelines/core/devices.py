"""Checks of --device and of GPU counts, before Ray starts: Ray waits for a GPU that does not exist without a word."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.core.environment import cluster_address
from pipelines.core.errors import UsageError, unknown

DEVICES = ("cpu", "cuda")
ALIASES = {"gpu": "cuda", "nvidia": "cuda"}
OTHERS = {
    "mps": "Apple",
    "xpu": "Intel",
    "hip": "AMD",
    "rocm": "AMD",
    "tpu": "Google",
    "xla": "Google",
    "npu": "Huawei",
}
"""Devices of other makers that torch names; this program does not use them."""


GPU_KEYS = ("num_gpus", "gpus_per_worker", "gpus_per_captioner")
"""Settings of specs and recipes with the GPUs of one worker."""


def gpu_count() -> float:
    """GPUs that a worker can get: those of the running Ray, else those of this machine that torch can use.

    No limit where Ray is a cluster's: placement.check_placement knows its nodes.
    """
    if cluster_address():
        return math.inf
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))
    return float(local_gpu_count())


def local_gpu_count() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_device(device: str, one_of: bool = True) -> None:
    """Check a device of a command; cpu imports nothing.

    Args:
        device: cpu, cuda, or cuda:N.
        one_of: Ray hands out the GPU, so a number is refused with the way to choose one.

    Raises:
        UsageError: an unknown device (with the nearest name), one of another maker, or a GPU that is not there.
    """
    if device == "cpu":
        return
    kind = device.partition(":")[0].lower()
    if kind in OTHERS:
        raise UsageError(f'--device {device}: {OTHERS[kind]}\'s accelerators are not supported; use "cuda" or "cpu".')
    if re.fullmatch(r"cuda(:\d+)?", device) is None:
        if kind in ALIASES or kind in DEVICES:
            near = ALIASES.get(kind, kind)
            raise UsageError(f'unknown device "{device}". Did you mean "{near}"? Known: cpu, cuda.')
        raise unknown("device", device, DEVICES)
    if cluster_address() and one_of:  # the workers are elsewhere; Ray hands out their GPUs
        if ":" in device:
            raise UsageError(f"--device {device}: the cluster hands out its GPUs; use --device cuda.")
        return
    count, number = local_gpu_count(), int(device.partition(":")[2] or 0)
    if not count:
        raise UsageError(f"--device {device}: {_no_gpu()}. Use --device cpu.")
    if number >= count:
        raise UsageError(f"--device {device}: this machine has {count} GPU{'s' * (count > 1)}, cuda:0 to {count - 1}.")
    if ":" in device and one_of:
        raise UsageError(f"--device {device}: choose one GPU with CUDA_VISIBLE_DEVICES={number} and --device cuda.")


def check_gpus(settings: Any) -> None:
    """Check that every worker of these settings can get its GPUs, before one waits for them for ever.

    Args:
        settings: a dataclass or nested mappings and lists; every GPU_KEYS inside counts.

    Raises:
        UsageError: there are too few GPUs, or it is no number of GPUs; the sentence names the setting.
    """
    is_record = dataclasses.is_dataclass(settings) and not isinstance(settings, type)
    shares = dict(_gpu_shares(dataclasses.asdict(settings) if is_record else settings))
    if not shares:
        return
    count = gpu_count()
    for name, share in shares.items():
        if share > count:
            supply = f"there {'is' if count == 1 else 'are'} {count:g}" if count else _no_gpu()
            raise UsageError(f"{name} needs {share:g} GPU{'s' * (share > 1)}, and {supply}: lower it; 0 uses the CPU.")


def _gpu_shares(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(setting, GPUs that must be there) of every setting above 0. All trainers run at once; other workers do not."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in GPU_KEYS and isinstance(inner, int | float):
                if not 0 <= inner < math.inf:
                    raise UsageError(f"{place}{key} must be a number of at least 0, got {inner:g}; 0 uses the CPU.")
                together = value.get("workers", 1) if key == "gpus_per_worker" else 1
                if inner > 0:
                    yield f"{place}{key}={inner:g}{f' on {together} workers' * (together > 1)}", inner * together
            else:
                yield from _gpu_shares(inner, f"{place}{key}.")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _gpu_shares(inner, f"{place}{number}.")


def _no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built for the CPU"
    return "torch finds no GPU on this machine"
