"""Shared by the benchmarks: arms in turns, medians with their spread, and the PSNR between results.

Scripts import it by name: Python searches the script's folder first, and pytest has it in `pythonpath`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_SPREAD = 0.25
"""A line is void if an arm's times spread over more than this share of their median."""


def take_turns(
    arms: Mapping[str, Callable[[], torch.Tensor]], device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Seconds of each arm over interleaved rounds after a warm-up, and each arm's last result.

    Wall time on a GPU, CPU time of this process otherwise.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, torch.Tensor] = {}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for round_ in range(rounds + 1):
        for name, run in arms.items():
            synchronise(device)
            start = clock()
            results[name] = run()
            synchronise(device)
            if round_:
                seconds[name].append(clock() - start)
    return seconds, results


def repeat(call: Callable[[], torch.Tensor], device: str, rounds: int) -> tuple[list[float], torch.Tensor]:
    """Seconds of each of `rounds` calls after a warm-up call, and the last result."""
    seconds, results = take_turns({"call": call}, device, rounds)
    return seconds["call"], results["call"]


def summary(times: Sequence[float], device: str) -> dict[str, Any]:
    """Median, spread over the median, and whether the spread makes the line void."""
    median, spread = median_and_spread(times)
    clock = "median_s" if device == "cuda" else "median_cpu_s"
    return {clock: round(median, 5), "spread": round(spread, 3), "void": is_void(len(times), spread)}


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median of measurements, and their range as a share of it.

    Raises:
        SystemExit: there are none, or the median is not a positive number: nothing was measured.
    """
    median = statistics.median(values) if values else 0.0
    if not 0 < median < math.inf:
        raise SystemExit(f"nothing was measured: {len(values)} rounds with the median {median:g}")
    return median, (max(values) - min(values)) / median


def is_void(rounds: int, spread: float) -> bool:
    """Whether a line says nothing: its arms spread too far, or a single round shows no spread at all."""
    return rounds < 2 or not spread <= MAX_SPREAD


def ratio(numerator: float, denominator: float, digits: int = 2) -> float:
    """A ratio of two measurements, rounded.

    Raises:
        SystemExit: one of them is not a positive number: nothing was measured, and a ratio of it would look valid.
    """
    if not (0 < numerator < math.inf and 0 < denominator < math.inf):
        raise SystemExit(f"nothing was measured: a ratio of {numerator:g} and {denominator:g} says nothing")
    return round(numerator / denominator, digits)


def psnr(result: torch.Tensor, exact: torch.Tensor) -> float:
    """PSNR of latents or pictures with the range of the exact ones, dB."""
    error = float((result - exact).square().mean())
    return math.inf if error == 0 else 10 * math.log10(float(exact.max() - exact.min()) ** 2 / error)


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
