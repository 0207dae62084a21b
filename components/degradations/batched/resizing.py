"""Resizing of batches: each picture to its own size, in its own mode, as a matrix of weights along each axis.

A GPU's time depends on the number of steps, not on their size. So the weights of all pictures, both axes and all
canvases of a round are made together as taps: each output pixel's input pixels and their weights. Each canvas then only
scatters its part of the taps into its matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.degradations.batched.transfer import to_device

Sides = Sequence[tuple[int, int]]
"""(height, width) of each picture's valid part."""

Ops = Sequence[Mapping[str, Any]]
"""Each picture's operation."""


@dataclass(frozen=True)
class Taps:
    """The input pixels of each output pixel and their weights, for N lines of pixels.

    Attributes:
        where: int64 [N, R, T], indices of input pixels, within each line's own input.
        weights: float32 [N, R, T], zero beyond each line's own output. If several taps of an output pixel have the same
            index, all but one are zero.
    """

    where: Tensor
    weights: Tensor

    def matrices(self, start: int, stop: int, rows: int, size: int) -> Tensor:
        """The matrices of lines start .. stop - 1, float32 [n, rows, size]."""
        where, weights = self.where[start:stop, :rows], self.weights[start:stop, :rows]
        return weights.new_zeros(stop - start, rows, size).scatter_add_(2, where, weights)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A resize of pictures that share a canvas before and after it.

    Attributes:
        images: float32 [b, 3, H, W].
        sides, goals: (height, width) of each picture's valid part, before and after.
        ops: each picture's operation.
        canvas: (height, width) of the result.
    """

    images: Tensor
    sides: Sides
    goals: Sides
    ops: Ops
    canvas: tuple[int, int]


def resize(images: Tensor, sides: Sides, goals: Sides, ops: Ops, canvas: tuple[int, int] | None = None) -> Tensor:
    """Resizes each picture to its goal, on a canvas [B, 3, H', W'] (default: the largest goal). Modes: resize.py."""
    canvas = canvas or (max(g[0] for g in goals), max(g[1] for g in goals))
    (result,) = resize_all([Job(images=images, sides=sides, goals=goals, ops=ops, canvas=canvas)])
    return result


def resize_all(jobs: Sequence[Job]) -> list[Tensor]:
    """The result of each job, float32 [b, 3, H', W']."""
    steps = [
        (1 / op["scale"],) * 2
        if op.get("sampling") == "factor" and op["mode"] in ("bilinear", "bicubic")
        else (side[0] / goal[0], side[1] / goal[1])
        for job in jobs
        for side, goal, op in zip(job.sides, job.goals, job.ops, strict=True)
    ]
    count = len(steps)
    taps = make_taps(
        [side[axis] for axis in (0, 1) for job in jobs for side in job.sides],
        [goal[axis] for axis in (0, 1) for job in jobs for goal in job.goals],
        [step[axis] for axis in (0, 1) for step in steps],
        [op["mode"] for job in jobs for op in job.ops] * 2,
        max(max(job.canvas) for job in jobs),
        jobs[0].images.device,
    )
    results, start = [], 0
    for job in jobs:
        stop, (height, width) = start + len(job.ops), job.images.shape[2:]
        rows = taps.matrices(start, stop, job.canvas[0], height)
        columns = taps.matrices(count + start, count + stop, job.canvas[1], width)
        results.append(rows[:, None] @ job.images @ columns.transpose(1, 2)[:, None])
        start = stop
    return results


def sampling_matrices(
    size: int,
    sides: Sequence[int],
    goals: Sequence[int],
    steps: Sequence[float],
    modes: Sequence[str],
    like: Tensor,
    tallest: int,
) -> Tensor:
    """resize.sampling_matrix of each picture, zero beyond its goal: float32 [B, tallest, size]."""
    return make_taps(sides, goals, steps, modes, tallest, like.device).matrices(0, len(sides), tallest, size)


def make_taps(
    sides: Sequence[int],
    goals: Sequence[int],
    steps: Sequence[float],
    modes: Sequence[str],
    rows: int,
    device: torch.device,
) -> Taps:
    """The taps of N lines with `rows` output pixels each; only the first `goals` of them have weights.

    Args:
        sides, goals: input and output pixels of each line.
        steps: input pixels per output pixel.
        modes: the mode of each line, see resize.py.
    """
    whole = to_device([sides, goals], device)[..., None, None]
    step = to_device(steps, device, torch.float64)[:, None, None]
    row = torch.arange(rows, device=device)[None, :, None]
    parts: list[tuple[list[int], Tensor, Tensor]] = []
    for mode in sorted(set(modes)):
        places = [i for i, other in enumerate(modes) if other == mode]
        alone = len(places) == len(modes)
        index = to_device(places, device)
        side, goal = whole if alone else whole[:, index]
        reach = _reach(mode, [sides[i] for i in places], [goals[i] for i in places], [steps[i] for i in places])
        where, weights = _taps(mode, row, side, goal, step if alone else step[index], reach)
        weights = torch.where(row < goal, weights, 0.0).float()
        where = torch.minimum(where.clamp_min(0), side - 1).expand(weights.shape)
        for tap in range(1, reach):  # merge taps on a repeated edge in order: bits must not depend on a GPU's order
            same = where[..., tap] == where[..., tap - 1]
            weights[..., tap] += torch.where(same, weights[..., tap - 1], 0.0)
            weights[..., tap - 1].masked_fill_(same, 0.0)
        if alone:
            return Taps(where, weights)
        parts.append((places, where, weights))
    taps = max(where.shape[2] for _, where, _ in parts)
    both = (
        torch.zeros(len(modes), rows, taps, dtype=torch.int64, device=device),
        torch.zeros(len(modes), rows, taps, device=device),
    )
    for places, *taps_of_mode in parts:
        index = to_device(places, device)
        for whole_part, part in zip(both, taps_of_mode, strict=True):
            whole_part[index, :, : part.shape[2]] = part
    return Taps(*both)


def _reach(mode: str, sides: Sequence[int], goals: Sequence[int], steps: Sequence[float]) -> int:
    """The number of taps T that suffices for all of these lines."""
    if mode == "pool":
        return max(-(-side // goal) for side, goal in zip(sides, goals, strict=True)) + 1
    if mode == "area":
        return max(2, math.ceil(max(steps)) + 1)
    return {"bilinear": 2, "bicubic": 4}.get(mode) or 2 * math.ceil(2 * max(1.0, *steps))


def _taps(mode: str, row: Tensor, side: Tensor, goal: Tensor, step: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """The taps of one mode: where (int64) and weights (float64), both [n, R, T].

    Args:
        row: int64 [1, R, 1]. side, goal: int64 [n, 1, 1]. step: float64 [n, 1, 1]. reach: T.
    """
    tap = torch.arange(reach, device=row.device)
    if mode == "pool":
        first, last = row * side // goal, -(-(row + 1) * side // goal)
        return first + tap, torch.where(first + tap < last, 1 / (last - first).double(), 0.0)
    if mode == "area":
        first = torch.floor(row * step).long()
        where = first + tap
        overlap = torch.minimum(where + 1, (row + 1) * step) - torch.maximum(where.double(), row * step)
        overlap = torch.where(where < side, overlap.clamp_min(0), 0.0)
        share = (row + 1) - (first + 1) / step
        share = torch.where(share > 0, share - torch.floor(share), 0.0)
        mix = torch.where(tap == 0, 1 - share, torch.where(tap == 1, share, 0.0))
        return where, torch.where(step >= 1, overlap / _total(overlap).clamp_min(1e-12), mix)
    centre = (row + 0.5) * step - 0.5
    if mode == "bilinear":
        centre = centre.clamp_min(0)
    where = torch.floor(centre).long() - reach // 2 + 1 + tap
    if mode == "bilinear":
        return where, (1 - (where - centre).abs()).clamp_min(0)
    if mode == "bicubic":
        return where, _cubic((where - centre).abs(), -0.75)
    weights = _cubic((where - centre).abs() / step.clamp_min(1), -0.5)
    return where, weights / _total(weights)


def _total(weights: Tensor) -> Tensor:
    """The sum over taps, [n, R, 1], in order: extra zeros, which depend on the batch, then change no bit."""
    total = weights[..., :1].clone()
    for tap in range(1, weights.shape[2]):
        total += weights[..., tap : tap + 1]
    return total


def _cubic(distance: Tensor, a: float) -> Tensor:
    """resize.cubic."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
